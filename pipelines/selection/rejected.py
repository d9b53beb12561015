"""Rejected boxes by the id that they would have as objects: rejects.parquet does not hold it, but what it is made of."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe_core.dataset_reader import find_places, take_rows
from pipelines.selection.rules import Boxes, box_identity, label_hashes, object_ids
from schemas.tables import COORDINATES

# More boxes than any photo has.
_BOXES_OF_A_PHOTO = 10_000


def rejected_boxes(rejects: Path, name: str) -> list[dict[str, Any]]:
    """Rejected boxes whose object id begins with a name.

    Args:
        rejects: rejects.parquet.
        name: a photo's id, an object's id or its beginning, or a sample's key.

    Returns:
        Rows with `object_id`, `reason`, `file` and `row`.

    Raises:
        InputError: the table is not there or damaged.
    """
    beginning = re.sub(r"(-[0-9a-f]{12})_\d+$", r"\1", name)
    # Ids of photos may have dashes, the hash of a box has none.
    photos = pa.array([beginning, beginning.rpartition("-")[0]])
    places = find_places(rejects, "photo_id", lambda ids: pc.is_in(ids, value_set=photos), _BOXES_OF_A_PHOTO)
    rows = take_rows(rejects, places, ["photo_id", "label", *COORDINATES, "reason", "file", "row"])
    if not rows:
        return []
    named = [{**row, "object_id": object_id} for row, object_id in zip(rows, _object_ids(rows), strict=True)]
    return [row for row in named if row["object_id"].startswith(beginning)]


def _object_ids(rows: list[dict[str, Any]]) -> list[str]:
    """What the selection would have called these boxes."""
    count = len(rows)
    labels = sorted({row["label"] or "" for row in rows})
    boxes = Boxes(
        photo=np.zeros(count, np.uint64),
        photo_id=pa.array([row["photo_id"] for row in rows]),
        label=np.array([labels.index(row["label"] or "") for row in rows], np.int32),
        **{name: np.array([row[name] for row in rows], np.float64) for name in COORDINATES},  # None becomes NaN.
        flags={},
        problem=np.full(count, -1, np.int8),
        width=np.full(count, np.nan),
        height=np.full(count, np.nan),
        listed=np.ones(count, bool),
        repeated=np.zeros(count, bool),
        outline=np.zeros(count, np.uint64),
        object_share=np.full(count, np.nan),
    )
    ids: list[str] = object_ids(boxes.photo_id, box_identity(boxes, label_hashes(labels))).to_pylist()
    return ids
