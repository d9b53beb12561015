"""Object masks as COCO writes them, polygons or run lengths: checked, compressed, measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from pycocotools import mask as coco_mask

from pbe_core.images.rle import decode_counts
from pipelines.annotations.source import shown

# Of one annotation, in px. pycocotools draws polygons at five times the photo's scale, point by point, in 32-bit numbers that it
# does not check; COCO's longest outlines have some 10,000 px.
MAX_OUTLINE = 1_000_000
MAX_COORDINATE = 100_000_000
# The most px of a photo with object masks. The limit keeps what pycocotools 2.0.11 writes within the memory that it reserves:
# enough where at most two of a mask's runs have 2**24 px or more.
MAX_MASKED_PHOTO = 3 * 2**24


def compress_mask(segmentation: Any, width: int, height: int) -> str | None:
    """Polygons or RLE of a photo of `width` x `height` px -> compressed RLE; null where there is none (missing or empty).

    Polygons are lists of x, y, or one such list by itself. Points and lines (two or four numbers), which tools leave beside good
    polygons, cover nothing and are passed over; pycocotools would take four numbers for a box.

    All numbers are checked before pycocotools sees them: it trusts them, and goes out of bounds in memory where they are wrong.

    Raises:
        ValueError: with what is wrong, in words.
    """
    if isinstance(segmentation, list):
        parts = segmentation if any(isinstance(part, list) for part in segmentation) else [segmentation]
        segmentation = [part for part in parts if not isinstance(part, list) or len(part) not in (0, 2, 4)]
    if segmentation in (None, "", {}, []):
        return None
    if width * height > MAX_MASKED_PHOTO:
        raise ValueError(f"is of a photo of {width}x{height} px, more than {MAX_MASKED_PHOTO:,}")
    if isinstance(segmentation, dict):
        counts = _run_lengths(segmentation, width, height)
        encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    elif isinstance(segmentation, list):
        polygons = [_polygon(part) for part in segmentation]
        length = sum(map(_length, polygons))
        if length > MAX_OUTLINE:
            raise ValueError(f"is {length:,.0f} px long, more than {MAX_OUTLINE:,}")
        encoded = coco_mask.merge(coco_mask.frPyObjects([polygon.ravel() for polygon in polygons], height, width))
    else:
        raise ValueError(f"is {shown(segmentation)}, expected polygons or RLE")
    if coco_mask.area(encoded) == 0:
        raise ValueError("covers no pixel")
    return str(encoded["counts"], "ascii")


def mask_areas(masks: Sequence[str]) -> Float64[np.ndarray, " masks"]:
    """How many px each mask covers: compressed RLE of a whole photo, whatever its size."""
    # The area is that of the runs: the size beside them is not looked at.
    runs = [{"size": [1, 1], "counts": counts} for counts in masks]
    # pycocotools 2.0.11 keeps the number of masks in 8 bits, which numpy 2 refuses above 255.
    areas = [coco_mask.area(runs[start : start + 255]) for start in range(0, len(runs), 255)]
    return np.concatenate(areas).astype(np.float64)


def _length(polygon: Float64[np.ndarray, "points 2"]) -> float:
    """How many px pycocotools draws, along the longer axis of each side."""
    # Not np.roll: this is a tenth of all the time that reading takes.
    sides = np.abs(polygon[1:] - polygon[:-1]).max(axis=1).sum() + np.abs(polygon[0] - polygon[-1]).max()
    return float(sides)


def _run_lengths(segmentation: dict[str, Any], width: int, height: int) -> Int64[np.ndarray, " runs"]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"has `size` {shown(size)}, the photo [{height}, {width}]")
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count <= width * height for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError(f"has `counts` {shown(counts)}, expected text, or whole numbers from 0 to {width * height}")
    if runs.min(initial=0) < 0 or runs.sum() != width * height:
        raise ValueError(f"has `counts` that sum up to {runs.sum()}, or go below 0; the photo has {width * height} px")
    return runs


def _polygon(polygon: Any) -> Float64[np.ndarray, "points 2"]:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"has a polygon {shown(polygon)}, expected x, y of three points or more")
    if set(map(type, polygon)) <= {int, float} and max(polygon) <= MAX_COORDINATE and min(polygon) >= -MAX_COORDINATE:
        points = np.array(polygon, np.float64).reshape(-1, 2)
        if not np.isnan(points).any():
            return points
    raise ValueError(f"has a polygon {shown(polygon)}, expected numbers of px")
