"""What a build cuts from a photo: views (windows that hold the object), masks over them, and references.

    photo ┌────────────────────────┐      a view: a square as high as the photo, anywhere as long as it holds the extended box,
          │     ┌───────────┐      │      then zoomed in:
          │     │  ┌────┐   │      │      published  all four sides are trimmed alike; a square photo is never zoomed
          │     │  └────┘   │      │      free       a smaller square anywhere in it, of any photo
          └─────┴───────────┴──────┘
                                          Where the extended box is longer than the photo's short side, no square inside the
                                          photo can hold it: the square reaches beyond, filled by reflection, and is counted.

    A view of another shape has a window of that shape, by the same laws: as large as the photo holds, and zoomed in.

    box ──extend──▶ extended box ──────────────────▶ box mask
                         └──one curve per edge──▶ jittered polygon ──▶ Bessel mask

         P1 on the extended box
        .·˙ ˙·.            The paper (section 4.1) calls the curve Bessel; it is a quadratic Bézier curve
     P0 ───────── P2       B(t) = (1-t)² P0 + 2t(1-t) P1 + t² P2 from corner to corner of the box.
      │    box    │

Everything up to rasterising happens in photo pixels, as published: the jitter of 1-5 px is one of the photo, not of the view.
Pure geometry: no I/O, an explicit random generator.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from pbe_core.buckets import Form, Shape
from pbe_core.images.crop import Rectangle, Resizing, Size, Window, resize, whole_photo, width_height
from schemas.sample import MaskKind

POINTS_PER_EDGE = 20
"""Points sampled on each Bessel curve, as the paper has it; its code takes 18."""
_SUBPIXEL_BITS = 6

Zoom = Literal["published", "free"]


def box_in_photo(row: Mapping[str, Any], width: int, height: int) -> Rectangle:
    """The box of a table row (x_min, y_min, x_max, y_max as fractions of the photo), in photo pixels."""
    return Rectangle(row["x_min"] * width, row["y_min"] * height, row["x_max"] * width, row["y_max"] * height)


def turned(box: Rectangle, width: int, height: int, rotation: int) -> Rectangle:
    """Where a box lies once its photo is turned.

    Args:
        box: in px of the photo as it was.
        width: of the photo as it was, px.
        height: likewise.
        rotation: degrees counterclockwise: 0, 90, 180 or 270.

    Agrees with `numpy.rot90(photo, rotation // 90)`.
    """
    for _ in range(rotation // 90):
        box = Rectangle(box.y_min, width - box.x_max, box.y_max, width - box.x_min)
        width, height = height, width
    return box


def square_window(
    extended: Rectangle, photo_width: int, photo_height: int, zoom: Zoom, max_zoom: float, random: np.random.Generator
) -> Window:
    """A random square that holds the extended box: `view_window` of the shape 1:1."""
    return view_window(extended, photo_width, photo_height, (1, 1), zoom, max_zoom, random)


def view_window(
    extended: Rectangle,
    photo_width: int,
    photo_height: int,
    shape: Shape,
    zoom: Zoom,
    max_zoom: float,
    random: np.random.Generator,
    least: int = 0,
) -> Window:
    """A random window of a shape that holds the extended box.

    Args:
        extended: the extended box, photo px, inside the photo.
        photo_width: px.
        photo_height: px.
        shape: width and height of the view, px; the window has their ratio, to half a px of its shorter side.
        zoom: how the largest window inside the photo is zoomed in: `_trimmed` (published) or `_anywhere` (free).
        max_zoom: largest share, in [0, 1], of the free margin that zooming in takes; the paper's code uses 0.6.
        random: the source of zoom and place.
        least: px of the window's longer side below which it is not zoomed in.

    The result lies inside the photo if any such window can; otherwise it is the smallest that holds the extended box.
    Source: Yang et al. 2023, published code; the squashing of photos where no square fits is replaced by reflection, and
    squares are windows of the shape 1:1.
    """
    x_min, y_min, x_max, y_max = extended.pixels()
    form = Form(*shape)
    width, height = form.sides(max(form.holding(x_max - x_min, y_max - y_min), form.within(photo_width, photo_height)))
    left = _place(x_min, x_max, width, 0, photo_width, random)
    top = _place(y_min, y_max, height, 0, photo_height, random)
    whole = Window(left, top, width, height)
    if zoom == "free":
        return _anywhere(extended, whole, form, max_zoom, random, least)
    return whole if (width, height) == (photo_width, photo_height) else _trimmed(extended, whole, form, max_zoom, random, least)


def _trimmed(extended: Rectangle, whole: Window, form: Form, max_zoom: float, random: np.random.Generator, least: int) -> Window:
    """The published zoom: a concentric window; all four sides lose as much, up to `max_zoom` of the smallest margin.

    Only photos that are not of the window's shape come here: the published code cuts and zooms no others. Its test also squashes
    a photo in which exactly one square holds the box. That square is taken here: in it the smallest margin is 0, so that it is
    not zoomed. Where a window is no square, margins along its shorter side count, and lose, in the ratio of the sides.
    """
    x_min, y_min, x_max, y_max = extended.pixels()
    right, bottom = whole.left + whole.width, whole.top + whole.height
    margin_x, margin_y = min(x_min - whole.left, right - x_max), min(y_min - whole.top, bottom - y_max)
    margin = min(margin_x * whole.side / whole.width, margin_y * whole.side / whole.height)
    trim = int(random.integers(0, int(max_zoom * margin), endpoint=True))
    held = form.holding(x_max - x_min, y_max - y_min)
    width, height = form.sides(max(whole.side - 2 * trim, held, min(least, whole.side)))
    # Half a px of rounding must not push the box out.
    left = min(max(whole.left + (whole.width - width) // 2, x_max - width), x_min)
    top = min(max(whole.top + (whole.height - height) // 2, y_max - height), y_min)
    return Window(left, top, width, height)


def _anywhere(extended: Rectangle, whole: Window, form: Form, max_zoom: float, random: np.random.Generator, least: int) -> Window:
    """Our own zoom: the longer side loses up to `max_zoom` of its excess over what holds the box; the window lies anywhere in it.

    It zooms more often and further than the published one, so that masks cover more of a view and objects are less central.
    """
    x_min, y_min, x_max, y_max = extended.pixels()
    left, top = whole.left, whole.top
    zoomed = whole.side - int(random.uniform(0, max_zoom) * (whole.side - form.holding(x_max - x_min, y_max - y_min)))
    width, height = form.sides(max(zoomed, min(least, whole.side)))
    return Window(
        _place(x_min, x_max, width, left, left + whole.width, random),
        _place(y_min, y_max, height, top, top + whole.height, random),
        width,
        height,
    )


def _place(low: int, high: int, side: int, frame_low: int, frame_high: int, random: np.random.Generator) -> int:
    """A uniform start of an interval of length `side` that holds [low, high): inside the frame, or around it if longer."""
    if side <= frame_high - frame_low:
        first, last = max(frame_low, high - side), min(low, frame_high - side)
    else:  # Longer than the frame: hold all of the frame, so that as little as possible is padded.
        first, last = frame_high - side, frame_low
    return int(random.integers(first, last, endpoint=True))


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
    t = (np.arange(points_per_edge) / points_per_edge)[:, None]
    curves: np.ndarray = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    return curves.reshape(-1, 2)


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


def fill_outline(kind: MaskKind, outline: Float[np.ndarray, "points 2"], size: Size) -> Bool[np.ndarray, "height width"]:
    """The mask that an outline given in view px encloses: of kind `box`, with the corners of a rectangle, or `bessel`."""
    return fill_box(outline, size) if kind == "box" else fill_polygon(outline, size)


def fill_box(corners: Float[np.ndarray, "4 2"], size: Size) -> Bool[np.ndarray, "height width"]:
    """The pixels whose centres lie in an upright rectangle given in view px (top left and bottom right included); never empty.

    A box of whole pixels is just these pixels, as in the published code. The pixel nearest to its middle is always set.
    """
    (left, top), (right, bottom) = corners[0], corners[2]
    width, height = width_height(size)
    mask = np.zeros((height, width), bool)
    mask[_between(top, bottom, height), _between(left, right, width)] = True
    return mask


def _between(low: float, high: float, size: int) -> slice:
    """The pixels of a row of `size` with their centres in [low, high); at least one."""
    first, last = math.ceil(low - 0.5), math.ceil(high - 0.5)
    if first >= last:
        first = math.floor((low + high) / 2)
        last = first + 1
    first = min(max(first, 0), size - 1)
    return slice(first, max(first + 1, min(last, size)))


def fill_polygon(polygon: Float[np.ndarray, "points 2"], size: Size) -> Bool[np.ndarray, "height width"]:
    """Fill a polygon given in view px (even-odd rule), its outline included, as the published code does; never empty.

    Points beyond the view are moved to its edge. A pixel is set if its centre lies inside or the outline passes through it.
    """
    # OpenCV puts pixel centres on whole numbers, the frame of photos puts them on halves.
    width, height = width_height(size)
    centred = np.clip(polygon - 0.5, 0, (width - 1, height - 1))
    fixed_point = np.round(centred * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    mask = np.zeros((height, width), bool)
    cv2.fillPoly(mask.view(np.uint8), [fixed_point], 1, shift=_SUBPIXEL_BITS)
    return mask


def reference_window(box: Rectangle, photo_width: int, photo_height: int, padding: int) -> tuple[int, int, int, int]:
    """The object's box padded on each side and clipped to the photo, in whole photo px: x_min, y_min, x_max, y_max.

    Args:
        box: the object's box, photo px.
        photo_width: px.
        photo_height: px.
        padding: photo px on each side; the paper's code uses 10.
    """
    padded = Rectangle(box.x_min - padding, box.y_min - padding, box.x_max + padding, box.y_max + padding)
    x_min, y_min, x_max, y_max = padded.intersection(whole_photo(photo_width, photo_height)).pixels()
    return x_min, y_min, x_max, y_max


def reference_size(width: int, height: int, side: int, max_side: int, resizing: Resizing = "antialiased") -> tuple[int, int]:
    """Width and height in px of the reference that a window of this size becomes.

    Antialiased, its aspect is kept, and it is never resized up. As `published`, it is a square of `side` px, up or down.

    Args:
        width: of the window, photo px.
        height: as well.
        side: it is shrunk until its shorter side is so many px: more than the encoder sees, whatever the aspect.
        max_side: and until its longer side is so many; the published way has no use for it.
        resizing: which way.
    """
    if resizing == "published":
        return side, side
    scale = min(1.0, side / min(width, height), max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def cut_reference(
    photo: UInt8[np.ndarray, "height width 3"],
    window: tuple[int, int, int, int],
    side: int,
    max_side: int,
    resizing: Resizing = "antialiased",
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """The pixels of a reference window, resized to what `reference_size` says.

    The published code makes the encoder's square of the window in one step, bilinear without antialias. Stored as that square, a
    reference comes to an encoder of `side` px unchanged; one that is resized in two steps would not show the same.
    """
    x_min, y_min, x_max, y_max = window
    crop = photo[y_min:y_max, x_min:x_max]
    height, width = crop.shape[:2]
    return resize(crop, *reference_size(width, height, side, max_side, resizing), resizing)


def cut_reference_mask(
    pixels: Bool[np.ndarray, "height width"],
    photo_size: tuple[int, int],
    window: tuple[int, int, int, int],
    size: tuple[int, int],
    resizing: Resizing = "antialiased",
) -> Bool[np.ndarray, "height2 width2"]:
    """The part of an object's mask that a reference shows, at the reference's size.

    Args:
        pixels: the object's pixels over the whole photo, at the size of the annotations, which may not be the photo's.
        photo_size: width and height of the photo, px.
        window: the reference's, photo px.
        size: width and height of the reference, px.
        resizing: as the reference itself is.
    """
    if pixels.shape != photo_size[::-1]:
        pixels = cv2.resize(pixels.astype(np.uint8), photo_size, interpolation=cv2.INTER_NEAREST).astype(bool)
    x_min, y_min, x_max, y_max = window
    crop = pixels[y_min:y_max, x_min:x_max].astype(np.uint8) * 255
    # A pixel is the object's if most of what it shows is.
    mask: np.ndarray = cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR if resizing == "published" else cv2.INTER_AREA) > 127
    return mask


def grey_background(
    reference: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The reference with mid grey, 127, wherever the mask is not; untouched where the mask is empty (an outline of no pixels)."""
    return np.where(mask[..., None], reference, np.uint8(127)) if mask.any() else reference
