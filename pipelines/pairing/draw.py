"""Which objects become pairs, and which may be references: drawn by name from the objects that selection accepts.

objects ──one a photo, by its hash──▶ targets, in the order of their photos' hashes: the first `count` that work are the set
   └──────one a photo and class─────▶ pools: of each class the objects of the `candidates` photos of the smallest hashes
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from pbe_core.dataset_reader import take_rows
from pbe_core.randomness import hash_column
from pipelines.selection.partition import Vocabulary

Row = dict[str, Any]
_BATCH_ROWS = 100_000
# Of `schemas.tables.OBJECTS`: all that a pair takes.
_COLUMNS = (
    *("split", "photo_id", "object_id", "label", "label_name", "x_min", "x_max", "y_min", "y_max"),
    *("file_name", "width", "height", "rotation", "url", "author", "licence"),
)


@dataclass(frozen=True)
class Draw:
    """What was drawn; rows are places in `objects.parquet`."""

    objects: Path
    targets: Int64[np.ndarray, " targets"]
    """In the order in which they are tried."""
    pools: dict[str, list[Row]]
    """By class id, in the order of the draw; a class of one photo has a pool of one."""
    left_out: dict[str, int]
    """Objects that are no targets, by reason; these and the targets are all objects."""

    def read_targets(self, at_once: int) -> Iterator[list[Row]]:
        """The targets in their order, so many at once: most of a large source are never needed."""
        for start in range(0, len(self.targets), at_once):
            places = self.targets[start : start + at_once]
            rows = take_rows(self.objects, places.tolist(), _COLUMNS)  # In the order of the table.
            yield [rows[place] for place in np.argsort(np.argsort(places)).tolist()]


def draw(objects: Path, seed: int, candidates: int) -> Draw:
    """Draw targets and pools. Takes 28 bytes of memory an object, and what the pools' rows take.

    Args:
        objects: objects.parquet of a selection.
        seed: which draw.
        candidates: the most objects in the pool of a class.
    """
    labels = Vocabulary()
    parts = []
    with pq.ParquetFile(objects) as table:
        for batch in table.iter_batches(_BATCH_ROWS, columns=["photo_id", "object_id", "label"]):
            # Other hashes than the selection's caps have: a class's quota must not decide whose turn it is here.
            photo = hash_column(batch.column("photo_id"), seed, "benchmark photo")
            own = hash_column(batch.column("object_id"), seed, "benchmark object")
            parts.append((labels.encode(batch.column("label")), photo, own))
    label, photo, own = (np.concatenate(column) for column in zip(*parts, strict=True))

    order = np.lexsort((own, photo, label))
    of_photo = order[_first(label[order], photo[order])]  # One object for each class and photo, by class.
    counts = np.bincount(label[of_photo], minlength=len(labels.words))
    place = np.arange(len(of_photo)) - (np.cumsum(counts) - counts)[label[of_photo]]
    pools = _pools(objects, of_photo[place < candidates], label, labels)

    usable = counts[label] > 1
    order = np.lexsort((own, photo))
    order = order[usable[order]]
    targets = order[_first(photo[order])]
    left_out = {"only_photo_of_class": int((~usable).sum()), "another_of_photo": len(order) - len(targets)}
    return Draw(objects, targets, pools, left_out)


def _first(*groups: np.ndarray) -> Bool[np.ndarray, " rows"]:
    """The first row of each group, where equal ones stand together."""
    changes = [values[1:] != values[:-1] for values in groups]
    first: Bool[np.ndarray, " rows"] = np.r_[True, np.any(changes, axis=0)][: len(groups[0])]
    return first


def _pools(objects: Path, places: np.ndarray, label: np.ndarray, labels: Vocabulary) -> dict[str, list[Row]]:
    """Rows of each class, in the order of the places."""
    rows = take_rows(objects, places.tolist(), _COLUMNS)
    pools: dict[str, list[Row]] = {}
    for place, number in zip(np.argsort(np.argsort(places)).tolist(), label[places].tolist(), strict=True):
        pools.setdefault(labels.words[number], []).append(rows[place])
    return pools
