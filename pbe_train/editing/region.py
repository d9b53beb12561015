"""From a photo of any size to the square that the model sees, and back. Pure geometry.

    photo, mask ──choose_window──▶ square around the region ──cut──▶ view ──(the model)──▶ painted view ──paste──▶ photo

All lengths in photo px, origin at the top left, x right, y down.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Int64, UInt8

Photo = UInt8[np.ndarray, "height width 3"]
Mask = Bool[np.ndarray, "height width"]
# The same where several of them, of any sizes, stand side by side.
AnyMask = Bool[np.ndarray, "_ _"]


class Window(NamedTuple):
    """A square of a photo; it reaches beyond the photo where no square inside holds the region."""

    left: int
    top: int
    side: int


def choose_window(mask: Mask) -> Window:
    """The square to repaint a region in: twice as long as the region, as in training, where a region fills about half a view.

    It is never longer than the photo's short side, unless the region itself is, and lies inside the photo where it can.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    longest = max(bottom - top, right - left)
    side = max(longest, min(2 * longest, height, width))
    return Window(_place(left, right, side, width), _place(top, bottom, side, height), side)


def _place(first: int, last: int, side: int, length: int) -> int:
    """Start of a stretch of `side` px centred on [first, last), moved inside [0, length) or, if longer than that, around it."""
    start = (first + last - side) // 2
    if side > length:
        return (length - side) // 2
    return min(max(start, 0), length - side)


def cut(photo: Photo, window: Window) -> UInt8[np.ndarray, "side side 3"]:
    """The window's pixels; what lies beyond the photo is its reflection."""
    rows = _reflect(window.top, window.side, photo.shape[0])
    columns = _reflect(window.left, window.side, photo.shape[1])
    pixels: Photo = photo[rows[:, None], columns]
    return pixels


def cut_mask(mask: Mask, window: Window) -> Bool[np.ndarray, "side side"]:
    """The window's part of the mask; beyond the photo its reflection, or the model would see there what it is to repaint."""
    rows = _reflect(window.top, window.side, mask.shape[0])
    columns = _reflect(window.left, window.side, mask.shape[1])
    part: Mask = mask[rows[:, None], columns]
    return part


def resize(picture: Photo, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A square picture at another size."""
    shrinks = picture.shape[0] > size
    resized: np.ndarray = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized


def resize_mask(mask: Bool[np.ndarray, "side side"], size: int) -> Bool[np.ndarray, "size size"]:
    """A square mask at another size; a px is editable if any part of it was, so that thin regions do not vanish."""
    interpolation = cv2.INTER_AREA if mask.shape[0] > size else cv2.INTER_NEAREST
    covered: np.ndarray = cv2.resize(mask.astype(np.float32), (size, size), interpolation=interpolation) > 0
    return covered


def paste(photo: Photo, view: UInt8[np.ndarray, "side side 3"], mask: Mask | None, window: Window) -> Photo:
    """The photo with the window's pixels replaced by `view`: inside the mask only, or everywhere if that is None.

    Outside the mask every byte is the photo's own. Inside, the border fades in over about 1.5 px, so that no jagged edge shows.
    """
    edited = photo.copy()
    inside, outside = _overlap(window, *photo.shape[:2])
    if mask is None:
        edited[outside] = view[inside]
        return edited
    # A border of zeros would fade the region at the photo's own edge; there is nothing beyond it to fade to.
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)[outside]
    share = np.clip(distance / 1.5, 0, 1)[..., None]
    blended = np.rint(share * view[inside] + (1 - share) * photo[outside]).astype(np.uint8)
    edited[outside] = np.where(mask[outside][..., None], blended, photo[outside])
    return edited


def _reflect(start: int, count: int, length: int) -> Int64[np.ndarray, " count"]:
    """Indices start, start + 1, ... folded into [0, length), the edge px not repeated."""
    period = max(1, 2 * (length - 1))
    folded = np.arange(start, start + count, dtype=np.int64) % period
    return np.minimum(folded, period - folded) if length > 1 else folded * 0


def _overlap(window: Window, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a window that lies in the photo: as slices of the window, and of the photo."""
    top, bottom = max(window.top, 0), min(window.top + window.side, height)
    left, right = max(window.left, 0), min(window.left + window.side, width)
    photo = slice(top, bottom), slice(left, right)
    return (slice(top - window.top, bottom - window.top), slice(left - window.left, right - window.left)), photo
