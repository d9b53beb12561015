"""Object masks that annotations give as px: the box around them, and the mask of the whole photo as compressed RLE."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from pipelines.annotations.coco_file import MAX_MASKED_PHOTO
from pipelines.annotations.source import RowProblem

Outline = Callable[[int, int], str]
"""A photo's width and height -> compressed RLE. Raises ValueError where the mask does not fit in."""


def box_of_pixels(
    pixels: Bool[np.ndarray, "height width"], left: int = 0, top: int = 0
) -> tuple[tuple[float, float, float, float], Outline]:
    """The box around an object's px (left, top, right, bottom, edges of px), and its mask.

    Args:
        pixels: that are the object, of a part of the photo, or of all.
        left: of that part in the photo.
        top: of that part in the photo.

    Raises:
        RowProblem: `empty_box`: there is none.
    """
    rows, columns = np.flatnonzero(np.any(pixels, axis=1)), np.flatnonzero(np.any(pixels, axis=0))
    if not len(rows):
        raise RowProblem("empty_box", "a mask without a px")
    part = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    shape, packed = part.shape, np.packbits(part)  # A bit a px: a file may hold many masks.
    x, y = left + int(columns[0]), top + int(rows[0])

    def outline(width: int, height: int) -> str:
        if x < 0 or y < 0 or x + shape[1] > width or y + shape[0] > height or width * height > MAX_MASKED_PHOTO:
            raise ValueError(f"a mask goes beyond the photo of {width}x{height} px, or that has more than {MAX_MASKED_PHOTO:,}")
        whole = np.zeros((height, width), np.uint8, order="F")
        whole[y : y + shape[0], x : x + shape[1]] = np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape)
        return compress_pixels(whole)

    return (float(x), float(y), float(x + shape[1]), float(y + shape[0])), outline


def compress_pixels(mask: np.ndarray) -> str:
    """A mask of a whole photo (height, width), 0 or 1, as compressed RLE."""
    return str(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"], "ascii")
