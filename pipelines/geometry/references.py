"""References: the crop of the photo that shows the object. Pure geometry."""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from pipelines.geometry.rectangles import Rectangle, whole_photo
from pipelines.geometry.views import Resizing, resize


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


def cut_mask(
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
