"""How much of a reference its object covers, from the tables alone: for references that show nothing but the object."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from pycocotools import mask as coco_mask

Column = Float64[np.ndarray, " boxes"]


def object_shares(
    outlines: pa.Array, sides: tuple[Column, Column], edges: Mapping[str, Column], padding: int
) -> Float64[np.ndarray, " boxes"]:
    """Share of each reference's px that the object's outline covers; NaN where there is no outline, or no size of the photo.

    Args:
        outlines: compressed RLE, checked when it was read; null where there is none.
        sides: width and height of each box's photo, px, as the outlines have it; NaN where the tables do not say.
        edges: `x_min`, `x_max`, `y_min` and `y_max` of each box, fractions of the photo; may be anything.
        padding: of the reference, px on each side.

    The reference's window is that of `geometry.references.reference_window`, for columns.
    """
    shares = np.full(len(outlines), np.nan)
    rows = np.flatnonzero(outlines.is_valid().to_numpy(zero_copy_only=False) & np.isfinite(sides[0]) & np.isfinite(sides[1]))
    if not len(rows):
        return shares
    window = np.ones(len(rows))
    for axis, side in zip("xy", sides, strict=True):
        low, high, length = edges[f"{axis}_min"][rows], edges[f"{axis}_max"][rows], side[rows]
        window *= np.ceil(np.minimum(high * length + padding, length)) - np.floor(np.maximum(low * length - padding, 0))
    with np.errstate(divide="ignore"):  # Of boxes that are nowhere in the photo, which are rejected as such.
        shares[rows] = outline_areas(outlines.take(pa.array(rows)).to_pylist()) / window
    return shares


def outline_areas(outlines: Sequence[str]) -> Float64[np.ndarray, " outlines"]:
    """How many px each outline covers: compressed RLE, which is that of a whole photo, whatever its size."""
    # The area is that of the runs: the size beside them is not looked at.
    runs = [{"size": [1, 1], "counts": counts} for counts in outlines]
    # pycocotools 2.0.11 keeps the number of outlines in 8 bits, which numpy 2 refuses above 255.
    areas = [coco_mask.area(runs[start : start + 255]) for start in range(0, len(runs), 255)]
    return np.concatenate(areas).astype(np.float64)
