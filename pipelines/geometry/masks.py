"""Edit regions of a view: extended boxes and arbitrary shapes made of Bessel curves.

    box ──extend──▶ extended box ──────────────────▶ box mask
                         └──one curve per edge──▶ jittered polygon ──▶ Bessel mask

         P1 on the extended box
        .·˙ ˙·.            The paper (section 4.1) calls the curve Bessel; it is a quadratic Bézier curve
     P0 ───────── P2       B(t) = (1-t)² P0 + 2t(1-t) P1 + t² P2 from corner to corner of the box.
      │    box    │

Everything up to rasterising happens in photo pixels, as published: the jitter of 1-5 px is one of the photo, not of the view.
Pure geometry: no I/O, an explicit random generator.
"""

import functools
import math

import cv2
import numpy as np
from jaxtyping import Bool, Float

from pipelines.geometry.rectangles import Rectangle
from schemas.sample import MaskKind

_SUBPIXEL_BITS = 6


def extend_box(box: Rectangle, frame: Rectangle, max_extension: float, random: np.random.Generator) -> Rectangle:
    """Push each side of a box outward by a uniform random share, up to `max_extension`, of the free space on that side.

    Args:
        box: the object's box, photo px.
        frame: what there is to extend into (the photo), photo px; holds the box.
        max_extension: largest share of the free space, in [0, 1]; the paper's code uses 0.4.
        random: four uniform numbers are drawn: left, top, right, bottom.

    Source: Yang et al. 2023, section 4.1, and its published code.
    """
    left, top, right, bottom = random.uniform(0, max_extension, 4).tolist()
    extended = Rectangle(
        box.x_min - left * (box.x_min - frame.x_min),
        box.y_min - top * (box.y_min - frame.y_min),
        box.x_max + right * (frame.x_max - box.x_max),
        box.y_max + bottom * (frame.y_max - box.y_max),
    )
    return extended.intersection(frame)  # Rounding must not push it out by the last bit.


def bessel_curves(box: Rectangle, extended: Rectangle, points_per_edge: int) -> Float[np.ndarray, "points 2"]:
    """Points on the four curves around a box, clockwise from its top left corner: photo px, `4 * points_per_edge` of them.

    Each edge's curve runs from corner to corner with its control point above the edge's middle, on the extended box. It is
    sampled uniformly in t; a corner belongs to the edge that starts there. No point lies inside the box.
    """
    middle_x, middle_y = (box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2
    corners = box.corners()
    start, end = corners[:, None], corners[[1, 2, 3, 0], None]
    control = np.array(
        [[middle_x, extended.y_min], [extended.x_max, middle_y], [middle_x, extended.y_max], [extended.x_min, middle_y]]
    )[:, None]
    of_start, of_control, of_end = _bezier_weights(points_per_edge)
    curves: np.ndarray = of_start * start + of_control * control + of_end * end
    return curves.reshape(-1, 2)


@functools.cache
def _bezier_weights(points: int) -> Float[np.ndarray, "3 points 1"]:
    """Of start, control point and end at t = 0, 1/points, ..."""
    t = (np.arange(points) / points)[:, None]
    return np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])


def bessel_polygon(
    box: Rectangle, extended: Rectangle, points_per_edge: int, jitter: tuple[int, int], random: np.random.Generator
) -> Float[np.ndarray, "points 2"]:
    """The outline of an arbitrary-shape mask, photo px: curve points, each moved by a random offset along each axis.

    The offset has a uniform whole length in `jitter` (inclusive; the paper: 1 to 5 px) and a random sign. What lies deeper inside
    the box than the largest offset is therefore always inside the polygon.
    """
    points = bessel_curves(box, extended, points_per_edge)
    lengths = random.integers(jitter[0], jitter[1], points.shape, endpoint=True)
    signs = random.integers(0, 1, points.shape, endpoint=True) * 2 - 1
    polygon: np.ndarray = points + lengths * signs
    return polygon


def fill_outline(kind: MaskKind, outline: Float[np.ndarray, "points 2"], size: int) -> Bool[np.ndarray, "size size"]:
    """The mask that an outline given in view px encloses: of kind `box`, with the corners of a rectangle, or `bessel`."""
    return fill_box(outline, size) if kind == "box" else fill_polygon(outline, size)


def fill_box(corners: Float[np.ndarray, "4 2"], size: int) -> Bool[np.ndarray, "size size"]:
    """The pixels whose centres lie in an upright rectangle given in view px (top left and bottom right included); never empty.

    A box of whole pixels is just these pixels, as in the published code. The pixel nearest to its middle is always set.
    """
    (left, top), (right, bottom) = corners[0], corners[2]
    mask = np.zeros((size, size), bool)
    mask[_between(top, bottom, size), _between(left, right, size)] = True
    return mask


def _between(low: float, high: float, size: int) -> slice:
    """The pixels of a row of `size` with their centres in [low, high); at least one."""
    first, last = math.ceil(low - 0.5), math.ceil(high - 0.5)
    if first >= last:
        first = math.floor((low + high) / 2)
        last = first + 1
    first = min(max(first, 0), size - 1)
    return slice(first, max(first + 1, min(last, size)))


def fill_polygon(polygon: Float[np.ndarray, "points 2"], size: int) -> Bool[np.ndarray, "size size"]:
    """Fill a polygon given in view px (even-odd rule), its outline included, as the published code does; never empty.

    Points beyond the view are moved to its edge. A pixel is set if its centre lies inside or the outline passes through it.
    """
    # OpenCV puts pixel centres on whole numbers, the frame of geometry.py puts them on halves.
    centred = np.clip(polygon - 0.5, 0, size - 1)
    fixed_point = np.round(centred * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    mask = np.zeros((size, size), bool)
    cv2.fillPoly(mask.view(np.uint8), [fixed_point], 1, shift=_SUBPIXEL_BITS)
    return mask
