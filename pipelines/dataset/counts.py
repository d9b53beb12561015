"""Counting the rows of a dataset folder's tables, each table in one pass.

Tables may have millions of rows, so they stream by, batch after batch, and only counts are kept. All results are plain lists,
dicts and finite numbers, ready for JSON.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int64, Num, UInt64

from pbe_core.errors import InputError
from pbe_core.randomness import generator, hash_column
from pipelines.config import SPLITS
from pipelines.dataset.plan_shards import Plan
from pipelines.threads import read_ahead
from schemas.dataset import shard_split
from schemas.tables import COORDINATES, FLAGS, REJECT_REASONS

# Shares of a photo or view: twenty bins a decade, from a box of 3 x 3 px in a photo of a megapixel to the whole.
SHARE_EDGES = np.logspace(-5, 0, 101)
# Width / height: four bins to each doubling, from 1:32 to 32:1.
ASPECT_EDGES = np.logspace(-5, 5, 41, base=2)
CELLS = 32
MAX_COUNTED_PER_PHOTO = 30
EXAMPLES = 5
_MAX_DETAIL = 300
# Read as dictionaries, and counted as numbers.
_WORDS = ("split", "label", "label_name", "reason", "file")
_NUMBERS = (*COORDINATES, "width", "height", "area_share")
_BATCH_ROWS = 65_536


def count_objects(path: Path, unmade: UInt64[np.ndarray, " objects"] | None = None) -> dict[str, dict[str, Any]]:
    """Figures of objects.parquet: classes, areas, aspects, positions, photos and flags; and `accepted`, its photos.

    Args:
        path: of the table.
        unmade: sorted hashes (`hash_column`) of ids: all but `accepted` is counted without these objects.

    Raises:
        InputError: the table cannot be read or lacks a column; so for the other tables.
    """
    shown, accepted = _Objects(), _Photos()
    columns = ["split", "photo_id", "label", "label_name", *FLAGS, *_NUMBERS]
    for batch in read_batches(path, columns if unmade is None else [*columns, "object_id"]):
        accepted.add(batch)
        shown.add(batch if unmade is None else batch.filter(pa.array(~_among(batch.column("object_id"), unmade))))
    return {**shown.result(), "accepted": accepted.result()}


def count_rejects(path: Path) -> dict[str, Any]:
    """Figures of rejects.parquet: rejected boxes by rule, in the documented order, with the first few malformed rows of each."""
    counts: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for batch in read_batches(path, ("reason", "reasons", "detail", "file", "row")):
        counts.update(_count(batch.column("reason")))
        broken.update(_count(pc.list_flatten(batch.column("reasons"))))
        malformed = batch.filter(pc.is_valid(batch.column("detail")))
        reasons = malformed.column("reason").cast(pa.string())
        for reason in reasons.unique().to_pylist():
            wanted = EXAMPLES - len(examples[reason])
            for row in malformed.filter(pc.equal(reasons, reason)).slice(0, wanted).to_pylist():
                examples[reason].append({"file": row["file"], "row": row["row"], "detail": _shortened(row["detail"])})
    reasons = [*REJECT_REASONS, *sorted(counts.keys() - REJECT_REASONS.keys())]
    return {
        "rejected": counts.total(),
        "all_reasons": bool(broken),
        "reasons": [
            {
                "reason": reason,
                "meaning": REJECT_REASONS.get(reason, ""),
                "boxes": counts[reason],
                "broken": broken[reason] if broken else None,
                "examples": examples.get(reason, []),
            }
            for reason in reasons
        ],
    }


def count_plan(path: Path) -> dict[str, Counter[str]]:
    """Planned samples and shards by split, as the footer of plan.parquet tells."""
    with _readable(path):
        planned = Plan(path).shards
    samples: Counter[str] = Counter()
    for shard, count in planned.items():
        samples[shard_split(shard)] += count
    return {"samples": samples, "shards": Counter(map(shard_split, planned))}


def hash_unmade(path: Path, views: int) -> UInt64[np.ndarray, " objects"]:
    """Sorted hashes (`hash_column`) of the ids of all objects that have no sample. Holds 8 bytes for each sample that failed.

    Args:
        path: failures.parquet of a finished dataset: planned samples are there or have a sample.
        views: planned of each object.
    """
    hashes = [np.zeros(0, np.uint64)]
    for batch in read_batches(path, ["key"]):
        hashes.append(hash_column(pc.replace_substring_regex(batch.column("key"), r"_\d+$", "")))
    objects, failed = np.unique(np.concatenate(hashes), return_counts=True)
    return objects[failed >= views]


def in_order(splits: set[str]) -> list[str]:
    """Splits in the order train, validation, test; others after them."""
    return sorted(splits, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))


def count_coverage(
    x_min: Float[np.ndarray, " boxes"],
    x_max: Float[np.ndarray, " boxes"],
    y_min: Float[np.ndarray, " boxes"],
    y_max: Float[np.ndarray, " boxes"],
    cells: int,
) -> Int64[np.ndarray, "cells cells"]:
    """How many boxes overlap each cell of a `cells` x `cells` grid over the photo, [row, column] from the top left.

    Coordinates are fractions of the photo. Each box counts +1 at its first cell and -1 behind its last one, along both axes; the
    cumulative sums of these differences are the counts, so that time goes with boxes + cells, not boxes x cells.
    """
    left, top = (np.clip(np.floor(low * cells), 0, cells - 1).astype(np.int64) for low in (x_min, y_min))
    right, bottom = (np.clip(np.ceil(high * cells), 1, cells).astype(np.int64) for high in (x_max, y_max))
    side = cells + 1
    differences = np.zeros(side * side, np.int64)
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        differences += sign * np.bincount(row * side + column, minlength=side * side)
    coverage: np.ndarray = differences.reshape(side, side).cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
    return coverage


def sample_rows(path: Path, columns: Sequence[str], count: int, seed: int) -> pa.Table:
    """A seeded choice of `count` rows of a table (all, if it has no more), in the table's order; streamed."""
    chosen = choose(pq.read_metadata(path).num_rows, count, seed, path.name)
    taken, start = [], 0
    for batch in read_batches(path, columns):
        first, last = np.searchsorted(chosen, (start, start + len(batch)))
        taken.append(batch.take(pa.array(chosen[first:last] - start)))
        start += len(batch)
    return pa.Table.from_batches(taken) if taken else pq.read_table(path, columns=list(columns))


def choose(total: int, count: int, seed: int, name: str) -> Int64[np.ndarray, " rows"]:
    """Places of a seeded choice of `count` of `total` rows of the table `name` (all, if it has no more), sorted."""
    return np.sort(generator(seed, "report", name).choice(total, min(count, total), replace=False))


def bin_counts(values: Num[np.ndarray, " values"], edges: Float[np.ndarray, " edges"]) -> Int64[np.ndarray, " edges+1"]:
    """Counts below the first edge, between each two, above the last; a bin holds its lower edge, the last one both."""
    places = np.searchsorted(edges, values, side="right")
    places[values == edges[-1]] -= 1
    return np.bincount(places, minlength=len(edges) + 1)


def binned(counts: Int64[np.ndarray, " places"]) -> dict[str, Any]:
    """The counts of `bin_counts`, or sums of such, under names."""
    return {"below": int(counts[0]), "counts": counts[1:-1].tolist(), "above": int(counts[-1])}


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Stream some columns of a table, words as dictionaries.

    Raises:
        InputError: the table is not there, cannot be read or lacks a column.
    """
    with _readable(path), pq.ParquetFile(path, read_dictionary=[name for name in columns if name in _WORDS]) as table:
        missing = [name for name in columns if name not in table.schema_arrow.names]
        if missing:
            raise InputError(f"{path}: no column {missing[0]}; it was made by another version, run the build again")
        # One row group at a time: a reader of all of them keeps what it has read of each.
        groups = (table.iter_batches(_BATCH_ROWS, [group], list(columns)) for group in range(table.num_row_groups))
        yield from read_ahead(chain.from_iterable(groups))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what Arrow raises on a damaged table into an InputError."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet table ({' '.join(str(error).split())}); run the build again") from None


class _Objects:
    """Figures of objects, batch after batch."""

    def __init__(self) -> None:
        self.classes: dict[str, Counter[str]] = defaultdict(Counter)
        self.names: dict[str, str] = {}
        self.areas = np.zeros(len(SHARE_EDGES) + 1, np.int64)
        self.aspects = {unit: np.zeros(len(ASPECT_EDGES) + 1, np.int64) for unit in ("pixels", "fractions")}
        self.coverage, self.centres = (np.zeros((CELLS, CELLS), np.int64) for _ in range(2))
        self.flags = {flag: np.zeros(3, np.int64) for flag in FLAGS}
        self.photos = _Photos()

    def add(self, batch: pa.RecordBatch) -> None:
        for group in _group(batch, "label", "label_name", "split").to_pylist():
            self.classes[group["label"]][group["split"]] += group["count_all"]
            self.names.setdefault(group["label"], group["label_name"])
        # NaN where a photo's size is unknown.
        numbers = [batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in _NUMBERS]
        x_min, x_max, y_min, y_max, width, height, area = numbers
        self.areas += bin_counts(area, SHARE_EDGES)
        aspects = (x_max - x_min) / (y_max - y_min)
        known = (width > 0) & (height > 0)
        self.aspects["pixels"] += bin_counts(aspects[known] * width[known] / height[known], ASPECT_EDGES)
        self.aspects["fractions"] += bin_counts(aspects[~known], ASPECT_EDGES)
        self.coverage += count_coverage(x_min, x_max, y_min, y_max, CELLS)
        middles = ((y_min + y_max) / 2, (x_min + x_max) / 2)
        row, column = (np.clip(middle * CELLS, 0, CELLS - 1).astype(np.int64) for middle in middles)
        self.centres += np.bincount(row * CELLS + column, minlength=CELLS**2).reshape(CELLS, CELLS)
        for flag, counts in self.flags.items():
            counts += np.bincount(batch.column(flag).to_numpy().astype(np.int64) + 1, minlength=3)
        self.photos.add(batch)

    def result(self) -> dict[str, Any]:
        splits = in_order({split for counts in self.classes.values() for split in counts})
        classes = [
            {
                "label": label,
                "name": self.names[label],
                "objects": counts.total(),
                "by_split": [counts[split] for split in splits],
            }
            for label, counts in sorted(self.classes.items(), key=lambda item: (-item[1].total(), item[0]))
        ]
        flags = {flag: dict(zip(("unknown", "no", "yes"), own.tolist(), strict=True)) for flag, own in self.flags.items()}
        return {
            "classes": {"splits": splits, "objects": sum(each["objects"] for each in classes), "classes": classes},
            "areas": {"edges": SHARE_EDGES.tolist(), **binned(self.areas)},
            "aspects": {"edges": ASPECT_EDGES.tolist(), **{unit: binned(counts) for unit, counts in self.aspects.items()}},
            "positions": {"cells": CELLS, "coverage": self.coverage.tolist(), "centres": self.centres.tolist()},
            "photos": self.photos.result(),
            "flags": flags,
        }


class _Photos:
    """Photos by split, and by how many objects they have. Relies on the order of objects.parquet: a photo's rows are adjacent."""

    def __init__(self) -> None:
        self.photos: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.counts = np.zeros(MAX_COUNTED_PER_PHOTO + 2, np.int64)
        self.largest = 0
        # The photo at the end of the last batch may go on in the next one.
        self.last: tuple[str, str] | None = None
        self.last_objects = 0

    def add(self, batch: pa.RecordBatch) -> None:
        if not len(batch):
            return
        split, photo_id = batch.column("split"), batch.column("photo_id")
        # A photo begins where another id is, or another split: these are numbered, as words are.
        begins = pc.or_(pc.not_equal(photo_id[1:], photo_id[:-1]), pc.not_equal(split.indices[1:], split.indices[:-1]))
        starts = np.flatnonzero(np.r_[True, begins.to_numpy(zero_copy_only=False)])
        self.objects.update(_count(split))
        self.photos.update(_count(split.take(pa.array(starts))))
        first, last = ((split[place].as_py(), photo_id[place].as_py()) for place in (0, len(batch) - 1))
        lengths = np.diff(np.r_[starts, len(batch)])
        if first == self.last:
            lengths[0] += self.last_objects
            self.photos[first[0]] -= 1
        else:
            self._close(np.array([self.last_objects]))
        self._close(lengths[:-1])
        self.last, self.last_objects = last, int(lengths[-1])

    def result(self) -> dict[str, Any]:
        self._close(np.array([self.last_objects]))
        self.last, self.last_objects = None, 0
        photos = self.photos.total()
        return {
            "photos": dict(+self.photos),
            "objects": dict(+self.objects),
            "per_photo": {
                "photos": photos,
                "objects": list(range(1, MAX_COUNTED_PER_PHOTO + 1)),
                "counts": self.counts[1:-1].tolist(),
                "above": int(self.counts[-1]),
                "mean": self.objects.total() / photos if photos else None,
                "largest": self.largest,
            },
        }

    def _close(self, lengths: Int64[np.ndarray, " photos"]) -> None:
        self.counts += np.bincount(np.minimum(lengths, MAX_COUNTED_PER_PHOTO + 1), minlength=len(self.counts))
        self.largest = max(self.largest, int(lengths.max(initial=0)))


def _group(batch: pa.RecordBatch, *columns: str) -> pa.Table:
    """How often (`count_all`) each combination of values stands in these columns, in the order in which they are met."""
    return pa.Table.from_batches([batch]).group_by(list(columns), use_threads=False).aggregate([([], "count_all")])


def _count(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in values.value_counts().to_pylist()}


def _among(ids: pa.Array, hashes: UInt64[np.ndarray, " objects"]) -> Bool[np.ndarray, " ids"]:
    """Whether each id is one of those whose sorted hashes these are."""
    if not len(hashes):
        return np.zeros(len(ids), bool)
    own = hash_column(ids)
    found: np.ndarray = hashes[np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)] == own
    return found


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_DETAIL else f"{text[: _MAX_DETAIL - 1]}…"
