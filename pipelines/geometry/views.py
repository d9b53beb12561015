"""Views: square cuts of a photo that hold an object's extended box and are never squashed.

    photo ┌────────────────────────┐      square as high as the photo, anywhere as long as it holds the extended box,
          │     ┌───────────┐      │      then zoomed in:
          │     │  ┌────┐   │      │      published  all four sides are trimmed alike; a square photo is never zoomed
          │     │  └────┘   │      │      free       a smaller square anywhere in it, of any photo
          └─────┴───────────┴──────┘
                                          Where the extended box is longer than the photo's short side, no square inside the
                                          photo can hold it: the square reaches beyond, filled by reflection, and is counted.

Pure geometry: no I/O, an explicit random generator.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from pipelines.geometry.rectangles import Rectangle

# A panorama of 65,500 x 1,500 px may need a window of 61,751 px: 11 GB, most of it reflection. Windows that reach beyond the
# photo and are longer than this (64 Mpx, 192 MB) are shrunk to it before they are padded: still 15 times a view of 512 px.
LONGEST_PADDED_SIDE = 8000

Zoom = Literal["published", "free"]
Resizing = Literal["antialiased", "published"]


@dataclass(frozen=True)
class Window:
    """The square of the photo that a view shows: left, top and side in photo px. May reach beyond the photo."""

    left: int
    top: int
    side: int

    def rectangle(self) -> Rectangle:
        """The same square as a rectangle."""
        return Rectangle(self.left, self.top, self.left + self.side, self.top + self.side)

    def to_view(self, points: Float[np.ndarray, "points 2"], size: int) -> Float[np.ndarray, "points 2"]:
        """Photo px -> px of a view of `size` px, (x, y)."""
        return (points - (self.left, self.top)) * (size / self.side)


def square_window(
    extended: Rectangle, photo_width: int, photo_height: int, zoom: Zoom, max_zoom: float, random: np.random.Generator
) -> Window:
    """A random square that holds the extended box.

    Args:
        extended: the extended box, photo px, inside the photo.
        photo_width: px.
        photo_height: px.
        zoom: how a square as high (or wide) as the photo is zoomed in: `_trimmed` (published) or `_anywhere` (free).
        max_zoom: largest share, in [0, 1], of the free margin that zooming in takes; the paper's code uses 0.6.
        random: the source of zoom and place.

    The result lies inside the photo if any such square can; otherwise its side is the extended box's longer side.
    Source: Yang et al. 2023, published code; the squashing of photos where no square fits is replaced by reflection.
    """
    x_min, y_min, x_max, y_max = extended.pixels()
    side = max(x_max - x_min, y_max - y_min, min(photo_width, photo_height))
    left = _place(x_min, x_max, side, 0, photo_width, random)
    top = _place(y_min, y_max, side, 0, photo_height, random)
    whole = Window(left, top, side)
    if zoom == "free":
        return _anywhere(extended, whole, max_zoom, random)
    return whole if photo_width == photo_height else _trimmed(extended, whole, max_zoom, random)


def _trimmed(extended: Rectangle, whole: Window, max_zoom: float, random: np.random.Generator) -> Window:
    """The published zoom: a concentric square; all four sides lose as much, up to `max_zoom` of the smallest margin.

    Only photos that are not square come here: the published code cuts and zooms no others. Its test also squashes a photo in
    which exactly one square holds the box. That square is taken here: in it the smallest margin is 0, so that it is not zoomed.
    """
    x_min, y_min, x_max, y_max = extended.pixels()
    right, bottom = whole.left + whole.side, whole.top + whole.side
    margin = min(x_min - whole.left, y_min - whole.top, right - x_max, bottom - y_max)
    trim = int(random.integers(0, int(max_zoom * margin), endpoint=True))
    return Window(whole.left + trim, whole.top + trim, whole.side - 2 * trim)


def _anywhere(extended: Rectangle, whole: Window, max_zoom: float, random: np.random.Generator) -> Window:
    """Our own zoom: the side loses up to `max_zoom` of its excess over the box's longer side; the smaller square lies anywhere.

    It zooms more often and further than the published one, so that masks cover more of a view and objects are less central.
    """
    x_min, y_min, x_max, y_max = extended.pixels()
    left, top, side = whole.left, whole.top, whole.side
    zoomed = side - int(random.uniform(0, max_zoom) * (side - max(x_max - x_min, y_max - y_min)))
    return Window(
        _place(x_min, x_max, zoomed, left, left + side, random), _place(y_min, y_max, zoomed, top, top + side, random), zoomed
    )


def is_padded(window: Window, photo_width: int, photo_height: int) -> bool:
    """Whether a part of the window lies outside the photo."""
    return not Rectangle(0, 0, photo_width, photo_height).holds(window.rectangle())


def cut_view(
    photo: UInt8[np.ndarray, "height width 3"], window: Window, size: int, resizing: Resizing = "antialiased"
) -> UInt8[np.ndarray, "size size 3"]:
    """The window's pixels, resized to `size`; what lies outside the photo is filled by reflection (edge pixels not repeated).

    Never takes more memory than a few times the photo, the view or `LONGEST_PADDED_SIDE` squared.
    """
    height, width = photo.shape[:2]
    right, bottom = window.left + window.side, window.top + window.side
    inside = photo[max(window.top, 0) : min(bottom, height), max(window.left, 0) : min(right, width)]
    if inside.shape[:2] != (window.side, window.side):
        side = min(window.side, max(size, LONGEST_PADDED_SIDE))
        if side < window.side:
            rows, columns = (max(1, round(length * side / window.side)) for length in inside.shape[:2])
            inside = resize(inside, columns, rows)
        above = min(round(max(-window.top, 0) * side / window.side), side - inside.shape[0])
        before = min(round(max(-window.left, 0) * side / window.side), side - inside.shape[1])
        borders = above, side - inside.shape[0] - above, before, side - inside.shape[1] - before
        inside = cv2.copyMakeBorder(inside, *borders, cv2.BORDER_REFLECT_101)
    return resize(inside, size, size, resizing)


def resize(
    photo: UInt8[np.ndarray, "height width 3"], width: int, height: int, resizing: Resizing = "antialiased"
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """Resize without aliasing: area averaging where it shrinks, cubic interpolation where it grows.

    As `published` it is bilinear, without antialias, both ways: where it shrinks, pixels between the sampled ones are left out.
    """
    if photo.shape[:2] == (height, width):
        return np.ascontiguousarray(photo)
    shrinks = width * height < photo.shape[0] * photo.shape[1]
    antialiased = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    interpolation = cv2.INTER_LINEAR if resizing == "published" else antialiased
    resized: np.ndarray = cv2.resize(photo, (width, height), interpolation=interpolation)
    return resized


def _place(low: int, high: int, side: int, frame_low: int, frame_high: int, random: np.random.Generator) -> int:
    """A uniform start of an interval of length `side` that holds [low, high): inside the frame, or around it if longer."""
    if side <= frame_high - frame_low:
        first, last = max(frame_low, high - side), min(low, frame_high - side)
    else:  # Longer than the frame: hold all of the frame, so that as little as possible is padded.
        first, last = frame_high - side, frame_low
    return int(random.integers(first, last, endpoint=True))
