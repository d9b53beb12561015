"""What the edit page's mask is to be, by the plain rule for each pixel: its centre lies in the shape (static/geometry.js)."""

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]
"""x, y in px of the photo."""


def snap(value: float) -> float:
    """In eighths of a px; halves go up, as JavaScript rounds."""
    return float(np.floor(value * 8 + 0.5) / 8)


def stroke(points: Sequence[Point], size: float, width: int, height: int) -> np.ndarray:
    """Of a brush of a diameter in px, from point to point: all that is no farther from the line than its radius."""
    covered = np.zeros((height, width), bool)
    for start, end in zip(points, [*points[1:], points[-1]], strict=True):
        covered |= _capsule(start, end, size / 2, width, height)
    return covered


def box(one: Point, other: Point, width: int, height: int) -> np.ndarray:
    """Of a rectangle between two points."""
    x, y = _centres(width, height)
    across = (min(one[0], other[0]) <= x) & (x < max(one[0], other[0]))
    return across & (min(one[1], other[1]) <= y) & (y < max(one[1], other[1]))


def lasso(points: Sequence[Point], width: int, height: int) -> np.ndarray:
    """Of a closed polygon: all around which it turns."""
    x, y = _centres(width, height)
    turns = np.zeros((height, width), int)
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        if ay == by:
            continue
        met = ax + ((y - ay) * (bx - ax)) / (by - ay) <= x
        turns += met & (ay <= y) & (by > y)
        turns -= met & (by <= y) & (ay > y)
    covered: np.ndarray = turns != 0
    return covered


def _centres(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5


def _capsule(start: Point, end: Point, radius: float, width: int, height: int) -> np.ndarray:
    centre_x, centre_y = _centres(width, height)
    x, y = centre_x - start[0], centre_y - start[1]
    along_x, along_y = end[0] - start[0], end[1] - start[1]
    length = along_x * along_x + along_y * along_y
    along = x * along_x + y * along_y
    across = x * along_y - y * along_x
    first = x * x + y * y <= radius * radius
    last = (x - along_x) * (x - along_x) + (y - along_y) * (y - along_y) <= radius * radius
    return np.where(along <= 0, first, np.where(along >= length, last, across * across <= radius * radius * length))
