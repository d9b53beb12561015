"""Rectangles in photo pixels.

Frame of all geometry: origin at the photo's top left corner, x right, y down; pixel (i, j) covers [i, i+1) x [j, j+1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


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


def whole_photo(width: int, height: int) -> Rectangle:
    """The rectangle of a photo of `width` x `height` px."""
    return Rectangle(0, 0, width, height)


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
