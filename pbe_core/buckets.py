"""Aspect buckets: a few shapes of views, each photo's views having the one nearest to its own shape.

    photo 1024 x 683 ──aspects 1.50 : 1, against 1.29, 1.00, 0.78 ...──▶ bucket 576 x 448

A shape is width and height in px. Nearest is the smallest ratio of the two aspects: what the largest window of a bucket loses of
a photo. Exact in whole numbers of any photo, so that one is in the same bucket everywhere.
Source: bucketing by aspect as in NovelAI's improvements on Stable Diffusion (2022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

Shape = tuple[int, int]


def nearest_bucket(width: int, height: int, buckets: Sequence[Shape]) -> Shape:
    """The bucket whose aspect is nearest to that of a photo of `width` x `height` px; of two as near, the first."""
    return buckets[int(nearest_buckets(np.array([width]), np.array([height]), buckets)[0])]


def nearest_buckets(
    widths: Int64[np.ndarray, " photos"], heights: Int64[np.ndarray, " photos"], buckets: Sequence[Shape]
) -> Int64[np.ndarray, " photos"]:
    """`nearest_bucket` of many photos: numbers of buckets. A photo of unknown size, 0 x 0, is taken for a square."""
    known = (widths > 0) & (heights > 0)
    widths, heights = (np.where(known, lengths, 1).astype(np.int64) for lengths in (widths, heights))
    apart: list[Float64[np.ndarray, " photos"]] = []
    for width, height in buckets:
        ours, theirs = widths * height, heights * width
        # One division of whole numbers is rounded alike on every machine; logarithms are not.
        apart.append(np.maximum(ours, theirs) / np.minimum(ours, theirs))
    nearest: Int64[np.ndarray, " photos"] = np.argmin(np.stack(apart), axis=0)
    return nearest


@dataclass(frozen=True)
class Form:
    """Windows of one ratio, by their longer side; the other one is rounded to whole px. Exact: whole numbers alone."""

    width: int
    height: int

    def sides(self, longer: int) -> tuple[int, int]:
        """Width and height of the window with this longer side."""
        long, short = max(self.width, self.height), min(self.width, self.height)
        shorter = max(1, (2 * longer * short + long) // (2 * long))
        return (longer, shorter) if self.width >= self.height else (shorter, longer)

    def holding(self, width: int, height: int) -> int:
        """The longer side of the smallest window that is at least so wide and so high."""
        long, short = max(self.width, self.height), min(self.width, self.height)
        along, across = (width, height) if self.width >= self.height else (height, width)
        return max(along, -(-(2 * across - 1) * long // (2 * short)) if across > 1 else 1)

    def within(self, width: int, height: int) -> int:
        """The longer side of the largest window that is at most so wide and so high."""
        long, short = max(self.width, self.height), min(self.width, self.height)
        along, across = (width, height) if self.width >= self.height else (height, width)
        return max(1, min(along, ((2 * across + 1) * long - 1) // (2 * short)))


def square_side(shapes: Sequence[Shape]) -> int:
    """Side in px of the smallest square as large as each of these shapes; a multiple of what divides all their sides."""
    step = math.gcd(*(side for shape in shapes for side in shape))
    largest = max(width * height for width, height in shapes)
    return -(-(math.isqrt(largest - 1) + 1) // step) * step


def by_shape(shapes: Sequence[Shape]) -> list[list[int]]:
    """Places of the same shape, which can be one batch: in the order in which shapes come first."""
    places: dict[Shape, list[int]] = {}
    for place, shape in enumerate(shapes):
        places.setdefault(shape, []).append(place)
    return list(places.values())


def suggest_buckets(size: int, max_aspect: float, step: int) -> list[Shape]:
    """Shapes of at most the area of a square, its own among them, widest first.

    Args:
        size: side of the square, px.
        max_aspect: largest ratio of a shape's longer side to its shorter one.
        step: all sides are multiples of it, px.

    Raises:
        ValueError: the square's side is no multiple of `step`, or no aspect is allowed.
    """
    if size < step or size % step or not 1 <= max_aspect < float("inf"):
        raise ValueError(f"size {size} must be a multiple of {step}, and max_aspect {max_aspect:g} be 1 or more")
    wide: list[Shape] = []
    for width in range(size, int(size * max_aspect) + 1, step):
        height = size * size // width // step * step
        if height and width <= max_aspect * height:
            wide.append((width, height))
    return [*reversed(wide), *((height, width) for width, height in wide[1:])]
