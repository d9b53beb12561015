"""References: the crop of the photo that shows the object. Pure geometry."""

import numpy as np
from jaxtyping import UInt8

from pipelines.geometry import Rectangle, whole_photo
from pipelines.views import resize


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


def cut_reference(
    photo: UInt8[np.ndarray, "height width 3"], window: tuple[int, int, int, int], max_side: int
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """The pixels of a reference window, aspect kept, shrunk to `max_side` px if longer, never resized up."""
    x_min, y_min, x_max, y_max = window
    crop = photo[y_min:y_max, x_min:x_max]
    height, width = crop.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    return resize(crop, max(1, round(width * scale)), max(1, round(height * scale)))
