"""Which object mask belongs to which box, where a source has them in two tables: that of its photo, its label and its edges.

Open Images writes the edges of masks with 6 digits and those of boxes with more, so each edge may differ by rounding.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64, UInt64

from pbe_core.randomness import mix
from schemas.tables import COORDINATES

# Half of the sixth digit, on both sides: some tables of boxes are rounded too.
_ROUNDING = 1.1e-6
_PAIRS_AT_ONCE = 4_000_000


def join_masks(boxes: pa.Table, masks: pa.Table) -> tuple[pa.Table, int]:
    """Boxes with the masks that belong to them in `segmentation`, and how many masks belong to a box.

    Args:
        boxes: columns photo and label, as numbers, the four edges, and segmentation, which is kept where no mask is found.
        masks: likewise, one row each; all of the photos that the boxes are of.

    Of several masks of a box the nearest counts, and of equal ones the first by its text, so that no order of rows decides.
    """
    if not len(masks) or not len(boxes):
        return boxes, 0
    masks = masks.sort_by("segmentation")
    groups = _groups(masks)
    order = np.argsort(groups, kind="stable")
    edges, mask_edges = _edges(boxes), _edges(masks)
    taken = np.full(len(boxes), -1)
    for box, place in _pairs(_groups(boxes), groups[order]):
        mask = order[place]
        apart = np.abs(edges[box] - mask_edges[mask]).max(axis=1, initial=0)
        near = apart <= _ROUNDING  # Edges that are none (NaN) are near to nothing.
        box, mask, apart = box[near], mask[near], apart[near]
        nearest = np.lexsort((mask, apart, box))
        first = nearest[np.r_[True, np.diff(box[nearest]) > 0][: len(nearest)]]
        taken[box[first]] = mask[first]
    found = masks["segmentation"].take(pa.array(taken, mask=taken < 0)).combine_chunks()
    column = boxes.schema.get_field_index("segmentation")
    joined = boxes.set_column(column, "segmentation", pc.coalesce(found, boxes["segmentation"].combine_chunks()))
    return joined, len(np.unique(taken[taken >= 0]))


def _edges(rows: pa.Table) -> Float64[np.ndarray, "rows 4"]:
    return np.stack([rows[name].to_numpy() for name in COORDINATES], axis=1)


def _groups(rows: pa.Table) -> UInt64[np.ndarray, " rows"]:
    """A number of each row's photo and label; two of one number are of other edges but for a chance of 1 in 10**13 a photo."""
    return mix(rows["photo"].to_numpy() ^ mix(rows["label"].to_numpy().astype(np.uint64)))


def _pairs(
    boxes: UInt64[np.ndarray, " boxes"], masks: UInt64[np.ndarray, " masks"]
) -> Iterator[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]]:
    """All pairs of a box and a mask of the same group, the latter sorted by group: some millions at once, all of a box together.

    A photo has a few; a broken table may say that all masks are of one.
    """
    start, end = (np.searchsorted(masks, boxes, side) for side in ("left", "right"))
    count = end - start
    part = np.cumsum(count) // _PAIRS_AT_ONCE
    for rows in np.split(np.arange(len(boxes)), np.flatnonzero(np.diff(part)) + 1):
        box = np.repeat(rows, count[rows])
        within = np.arange(len(box)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows])
        yield box, start[box] + within
