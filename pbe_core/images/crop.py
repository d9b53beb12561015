"""Rectangles and windows of a photo: cut, resize, pad, paste. Building samples and editing photos share them.

    photo ──cut (reflection beyond it)──▶ window ──resize──▶ view        view ──resize──▶ window ──paste──▶ photo

Frame: origin at the photo's top left corner, x right, y down; pixel (i, j) covers [i, i+1) x [j, j+1). Pure geometry: no I/O.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

# A panorama of 65,500 x 1,500 px may need a window of 61,751 px: 11 GB, most of it reflection. Windows that reach beyond the
# photo and are longer than this (64 Mpx, 192 MB) are shrunk to it before they are padded: still 15 times a view of 512 px.
LONGEST_PADDED_SIDE = 8000

Resizing = Literal["antialiased", "published"]
# Of a view, px: width and height; one number is the side of a square.
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Rectangle:
    """A rectangle [x_min, x_max) x [y_min, y_max)."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def width(self) -> float:
        """Length along x."""
        return self.x_max - self.x_min

    @property
    def height(self) -> float:
        """Length along y."""
        return self.y_max - self.y_min

    def holds(self, other: "Rectangle") -> bool:
        """Whether no part of `other` lies outside."""
        return self.x_min <= other.x_min and self.y_min <= other.y_min and self.x_max >= other.x_max and self.y_max >= other.y_max

    def intersection(self, other: "Rectangle") -> "Rectangle":
        """The common part; empty (of zero or negative size) where there is none."""
        return Rectangle(
            max(self.x_min, other.x_min), max(self.y_min, other.y_min), min(self.x_max, other.x_max), min(self.y_max, other.y_max)
        )

    def pixels(self) -> tuple[int, int, int, int]:
        """The smallest rectangle of whole pixels around it: x_min, y_min, x_max, y_max."""
        return math.floor(self.x_min), math.floor(self.y_min), math.ceil(self.x_max), math.ceil(self.y_max)

    def corners(self) -> Float[np.ndarray, "4 2"]:
        """Top left, top right, bottom right, bottom left."""
        return np.array(
            [[self.x_min, self.y_min], [self.x_max, self.y_min], [self.x_max, self.y_max], [self.x_min, self.y_max]], np.float64
        )


@dataclass(frozen=True)
class Window:
    """What a view shows of the photo, in photo px. May reach beyond the photo. Without a height it is a square."""

    left: int
    top: int
    width: int
    height: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "height", self.height or self.width)

    @property
    def side(self) -> int:
        """The longer side, or that of a square."""
        return max(self.width, self.height)

    def numbers(self) -> tuple[int, int, int] | tuple[int, int, int, int]:
        """As records have it: left, top and side of a square, else left, top, width and height. `Window(*...)` reads both."""
        square = self.width == self.height
        return (self.left, self.top, self.width) if square else (self.left, self.top, self.width, self.height)

    def rectangle(self) -> Rectangle:
        """The same as a rectangle."""
        return Rectangle(self.left, self.top, self.left + self.width, self.top + self.height)

    def to_view(self, points: Float[np.ndarray, "points 2"], size: Size) -> Float[np.ndarray, "points 2"]:
        """Photo px -> px of a view of this size, (x, y)."""
        width, height = width_height(size)
        return (points - (self.left, self.top)) * (width / self.width, height / self.height)


def width_height(size: Size) -> tuple[int, int]:
    """Width and height of a view, px."""
    return (size, size) if isinstance(size, int) else size


def whole_photo(width: int, height: int) -> Rectangle:
    """The rectangle of a photo of `width` x `height` px."""
    return Rectangle(0, 0, width, height)


def is_padded(window: Window, photo_width: int, photo_height: int) -> bool:
    """Whether a part of the window lies outside the photo."""
    return not whole_photo(photo_width, photo_height).holds(window.rectangle())


def cut_view(
    photo: UInt8[np.ndarray, "height width 3"], window: Window, size: Size, resizing: Resizing = "antialiased"
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """The window's pixels, resized to `size`; what lies outside the photo is filled by reflection (edge pixels not repeated).

    Never takes more memory than a few times the photo, the view or `LONGEST_PADDED_SIDE` squared.
    """
    width, height = width_height(size)
    return resize(cut(photo, window, max(width, height, LONGEST_PADDED_SIDE)), width, height, resizing)


def cut(
    photo: Shaped[np.ndarray, "height width *channels"], window: Window, longest_padded: int | None = None
) -> Shaped[np.ndarray, "height2 width2 *channels"]:
    """The window's pixels; what lies outside the photo is the reflection of what lies inside (edge pixels not repeated).

    Args:
        photo: RGB, or a mask as uint8.
        window: some of it lies in the photo.
        longest_padded: a longer window that is to be padded is shrunk until its longer side is so many px, before.
    """
    height, width = photo.shape[:2]
    right, bottom = window.left + window.width, window.top + window.height
    inside = photo[max(window.top, 0) : min(bottom, height), max(window.left, 0) : min(right, width)]
    if inside.shape[:2] == (window.height, window.width):
        return inside
    side = min(window.side, longest_padded or window.side)
    high, wide = (max(1, round(length * side / window.side)) for length in (window.height, window.width))
    if side < window.side:
        rows, columns = (max(1, round(length * side / window.side)) for length in inside.shape[:2])
        inside = resize(inside, columns, rows)
    above = min(round(max(-window.top, 0) * side / window.side), high - inside.shape[0])
    before = min(round(max(-window.left, 0) * side / window.side), wide - inside.shape[1])
    borders = above, high - inside.shape[0] - above, before, wide - inside.shape[1] - before
    padded: np.ndarray = cv2.copyMakeBorder(inside, *borders, cv2.BORDER_REFLECT_101)
    return padded


def resize(
    photo: UInt8[np.ndarray, "height width 3"], width: int, height: int, resizing: Resizing = "antialiased"
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """Resize without aliasing, by cubic interpolation; what shrinks, over as many more pixels as make up one of the result.

    As `published` it is bilinear, without antialias, both ways: where it shrinks, pixels between the sampled ones are left out.
    """
    if photo.shape[:2] == (height, width):
        return np.ascontiguousarray(photo)
    if resizing == "antialiased" and (width < photo.shape[1] or height < photo.shape[0]):
        return _shrink(photo, width, height)
    interpolation = cv2.INTER_LINEAR if resizing == "published" else cv2.INTER_CUBIC
    resized: np.ndarray = cv2.resize(photo, (width, height), interpolation=interpolation)
    return resized


def _shrink(photo: UInt8[np.ndarray, "height width 3"], width: int, height: int) -> UInt8[np.ndarray, "height2 width2 3"]:
    """As Pillow's bicubic, to one level (of noise, now and then two); PyTorch takes a fifth of the time.

    The same bytes come of every CPU.
    """
    import torch  # Takes seconds, and most who deal in windows resize nothing.

    pixels = torch.from_numpy(np.require(photo, requirements=["C", "W"]))
    # The fast way is for strides of channels-last, which `pixels.permute(2, 0, 1)[None]` does not have.
    batch = pixels.reshape(1, *photo.shape).permute(0, 3, 1, 2)
    shrunk = torch.nn.functional.interpolate(batch, (height, width), mode="bicubic", antialias=True)
    resized: np.ndarray = shrunk[0].permute(1, 2, 0).numpy()
    return resized


def cut_mask(mask: Bool[np.ndarray, "height width"], window: Window, size: Size) -> Bool[np.ndarray, "height2 width2"]:
    """The window's part of a mask at another size; a px is set if any part of it was, so that thin regions do not vanish.

    Beyond the photo it is the mask's reflection, as the photo is: else the model would see there what it is to repaint.
    """
    part = cut(mask.astype(np.uint8), window).astype(np.float32)
    width, height = width_height(size)
    shrinks = window.width > width or window.height > height
    covered: np.ndarray = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST) > 0
    return covered


def pad(picture: UInt8[np.ndarray, "height width 3"], size: int, colour: tuple[int, ...]) -> UInt8[np.ndarray, "size size 3"]:
    """A picture that is no larger, in the middle of a square of this colour; an odd pixel is below it or to its right."""
    height, width = picture.shape[:2]
    if height == width == size:
        return picture
    top, left = (size - height) // 2, (size - width) // 2
    edges = top, size - height - top, left, size - width - left
    square: np.ndarray = cv2.copyMakeBorder(picture, *edges, cv2.BORDER_CONSTANT, value=colour)
    return square


def paste(
    photo: UInt8[np.ndarray, "height width 3"],
    view: UInt8[np.ndarray, "height2 width2 3"],
    mask: Bool[np.ndarray, "height width"] | None,
    window: Window,
) -> UInt8[np.ndarray, "height width 3"]:
    """The photo with the window's pixels replaced by `view`: where the mask is True only, or everywhere if that is None.

    Outside the mask every byte is the photo's own. Inside, the border fades in over about 1.5 px, so that no jagged edge shows.
    """
    edited: np.ndarray = photo.copy()
    height, width = photo.shape[:2]
    top, bottom = max(window.top, 0), min(window.top + window.height, height)
    left, right = max(window.left, 0), min(window.left + window.width, width)
    outside = slice(top, bottom), slice(left, right)
    inside = slice(top - window.top, bottom - window.top), slice(left - window.left, right - window.left)
    if mask is None:
        edited[outside] = view[inside]
        return edited
    # No more than the region is computed, which is a small part of a large photo.
    rows, columns = _stretch(mask, 1, top, bottom), _stretch(mask, 0, left, right)
    changed, region, share = edited[rows, columns], mask[rows, columns], _shares(mask, rows, columns)
    new = view[rows.start - window.top : rows.stop - window.top, columns.start - window.left : columns.stop - window.left]
    np.copyto(changed, new, where=region[..., None])
    fades = region & (share < 1)
    weight = share[fades][:, None]
    changed[fades] = np.rint(weight * new[fades] + (1 - weight) * photo[rows, columns][fades]).astype(np.uint8)
    return edited


def _stretch(mask: Bool[np.ndarray, "height width"], across: int, first: int, last: int) -> slice:
    """From the first line of [first, last) that has a set px to the last one; empty where none has. `across` as numpy's axis."""
    lines = np.flatnonzero(mask.any(across))
    lines = lines[(lines >= first) & (lines < last)]
    return slice(int(lines[0]), int(lines[-1]) + 1) if len(lines) else slice(first, first)


def _shares(mask: Bool[np.ndarray, "height width"], rows: slice, columns: slice) -> Float[np.ndarray, "height2 width2"]:
    """How much of the view is seen in a part of the photo: 1 but for the region's border of about 1.5 px."""
    # One px more to each side, as far as the photo goes: what is farther away makes nothing fade. A border of zeros would fade
    # the region at the photo's own edge, beyond which there is nothing to fade to.
    above, before = max(rows.start - 1, 0), max(columns.start - 1, 0)
    near = mask[above : rows.stop + 1, before : columns.stop + 1].astype(np.uint8)
    share: np.ndarray = np.clip(cv2.distanceTransform(near, cv2.DIST_L2, 5) / 1.5, 0, 1)
    return share[rows.start - above : rows.stop - above, columns.start - before : columns.stop - before]
