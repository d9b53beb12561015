"""Counting the rows of a dataset folder's tables, each table in one pass.

Tables may have millions of rows, so they stream by, batch after batch, and only counts are kept. All results are plain lists,
dicts and finite numbers, ready for JSON.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int64, Num, UInt64

from pbe_core.errors import InputError
from pbe_core.randomness import generator, hash_column
from pipelines.config import SPLITS
from schemas.tables import COORDINATES, FLAGS, REJECT_REASONS

# Shares of a photo or view: twenty bins a decade, from a box of 3 x 3 px in a photo of a megapixel to the whole.
SHARE_EDGES = np.logspace(-5, 0, 101)
# Width / height: four bins to each doubling, from 1:32 to 32:1.
ASPECT_EDGES = np.logspace(-5, 5, 41, base=2)
CELLS = 32
MAX_COUNTED_PER_PHOTO = 30
EXAMPLES = 5
_MAX_DETAIL = 300
# Read as dictionaries, and counted as numbers; a shard's name is a string in the schema, but repeats as words do.
_WORDS = ("split", "label", "label_name", "reason", "file", "shard")
_BATCH_ROWS = 65_536


def count_objects(path: Path, packed: UInt64[np.ndarray, " objects"] | None = None) -> dict[str, dict[str, Any]]:
    """Figures of objects.parquet: classes, areas, aspects, positions, photos and flags; and `accepted`, its photos.

    Args:
        path: of the table.
        packed: sorted hashes of ids: all but `accepted` is counted of these objects alone.

    Raises:
        InputError: the table cannot be read or lacks a column; so for the other tables.
    """
    counters: dict[str, _Counter] = {
        "classes": _Classes(),
        "areas": _Areas(),
        "aspects": _Aspects(),
        "positions": _Positions(),
        "photos": _Photos(),
        "flags": _Flags(),
    }
    if packed is None:
        _stream(path, list(counters.values()))
        accepted = counters["photos"]
    else:
        accepted = _Photos()
        for batch in read_batches(path, [*_columns_of(counters.values()), "object_id"]):
            accepted.add(batch)
            shown = batch.filter(_among(batch.column("object_id"), packed))
            for counter in counters.values():
                counter.add(shown)
    return {name: counter.result() for name, counter in {**counters, "accepted": accepted}.items()}


def count_rejects(path: Path) -> dict[str, Any]:
    """Figures of rejects.parquet: rejected boxes by rule, in the documented order, with the first few malformed rows of each."""
    rejects = _Rejects()
    _stream(path, [rejects])
    return rejects.result()


def count_plan(path: Path) -> dict[str, Any]:
    """Figures of plan.parquet: planned samples and shards by split."""
    plan = _Plan()
    _stream(path, [plan])
    return plan.result()


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
    chosen = chosen_places(path, count, seed)
    taken, start = [], 0
    for batch in read_batches(path, columns):
        first, last = np.searchsorted(chosen, (start, start + len(batch)))
        taken.append(batch.take(pa.array(chosen[first:last] - start)))
        start += len(batch)
    return pa.Table.from_batches(taken) if taken else pq.read_table(path, columns=list(columns))


def chosen_places(path: Path, count: int, seed: int) -> Int64[np.ndarray, " rows"]:
    """Places of a seeded choice of `count` rows of a table (all, if it has no more), sorted."""
    total = pq.read_metadata(path).num_rows
    return np.sort(generator(seed, "report", path.name).choice(total, min(count, total), replace=False))


def bin_counts(values: Num[np.ndarray, " values"], edges: Float[np.ndarray, " edges"]) -> Int64[np.ndarray, " edges+1"]:
    """Counts below the first edge, between each two, above the last; a bin holds its lower edge, the last one both."""
    places = np.searchsorted(edges, values, side="right")
    places[values == edges[-1]] -= 1
    return np.bincount(places, minlength=len(edges) + 1)


def binned(counts: Int64[np.ndarray, " places"]) -> dict[str, Any]:
    """The counts of `bin_counts`, or sums of such, under names."""
    return {"below": int(counts[0]), "counts": counts[1:-1].tolist(), "above": int(counts[-1])}


@runtime_checkable
class _Counter(Protocol):
    """Something counted while a table streams by: `add` sees each batch once, with at least `columns`; `result` is for JSON."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def add(self, batch: pa.RecordBatch) -> None: ...

    def result(self) -> dict[str, Any]: ...


class _Classes:
    """Objects by class and split, the largest class first."""

    columns = ("split", "label", "label_name")

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.names: dict[str, str] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        for (split, label, name), count in _count_words(batch, *self.columns).items():
            self.counts[split, label] += count
            self.names.setdefault(label, name)

    def result(self) -> dict[str, Any]:
        total: Counter[str] = Counter()
        for (_, label), count in self.counts.items():
            total[label] += count
        splits = in_order({split for split, _ in self.counts})
        return {
            "splits": splits,
            "objects": sum(total.values()),
            "classes": [
                {
                    "label": label,
                    "name": self.names[label],
                    "objects": count,
                    "by_split": [self.counts[split, label] for split in splits],
                }
                for label, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))
            ],
        }


class _Areas:
    """Histogram of box area / photo area."""

    columns = ("area_share",)

    def __init__(self) -> None:
        self.counts = np.zeros(len(SHARE_EDGES) + 1, np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        self.counts += bin_counts(_numbers(batch, "area_share"), SHARE_EDGES)

    def result(self) -> dict[str, Any]:
        return {"edges": SHARE_EDGES.tolist(), **binned(self.counts)}


class _Aspects:
    """Histograms of width / height: in px where the tables tell the photo's size, in fractions of the photo where they do not."""

    columns = (*COORDINATES, "width", "height")

    def __init__(self) -> None:
        self.counts = {unit: np.zeros(len(ASPECT_EDGES) + 1, np.int64) for unit in ("pixels", "fractions")}

    def add(self, batch: pa.RecordBatch) -> None:
        x_min, x_max, y_min, y_max = (_numbers(batch, name) for name in COORDINATES)
        photo_width, photo_height = _numbers(batch, "width"), _numbers(batch, "height")  # NaN where unknown
        aspects = (x_max - x_min) / (y_max - y_min)
        known = (photo_width > 0) & (photo_height > 0)
        in_pixels = aspects[known] * photo_width[known] / photo_height[known]
        self.counts["pixels"] += bin_counts(in_pixels, ASPECT_EDGES)
        self.counts["fractions"] += bin_counts(aspects[~known], ASPECT_EDGES)

    def result(self) -> dict[str, Any]:
        return {"edges": ASPECT_EDGES.tolist(), **{unit: binned(counts) for unit, counts in self.counts.items()}}


class _Positions:
    """Where in the photo objects are: how many boxes overlap each cell of a grid, and how many have their centre in it."""

    columns = COORDINATES

    def __init__(self) -> None:
        self.coverage = np.zeros((CELLS, CELLS), np.int64)
        self.centres = np.zeros((CELLS, CELLS), np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        x_min, x_max, y_min, y_max = (_numbers(batch, name) for name in COORDINATES)
        self.coverage += count_coverage(x_min, x_max, y_min, y_max, CELLS)
        column, row = (
            np.clip((low + high) / 2 * CELLS, 0, CELLS - 1).astype(np.int64) for low, high in ((x_min, x_max), (y_min, y_max))
        )
        self.centres += np.bincount(row * CELLS + column, minlength=CELLS**2).reshape(CELLS, CELLS)

    def result(self) -> dict[str, Any]:
        return {"cells": CELLS, "coverage": self.coverage.tolist(), "centres": self.centres.tolist()}


class _Photos:
    """Photos by split, and by how many objects they have. Relies on the order of objects.parquet: a photo's rows are adjacent."""

    columns = ("split", "photo_id")

    def __init__(self) -> None:
        self.photos: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.counts = np.zeros(MAX_COUNTED_PER_PHOTO + 2, np.int64)
        self.largest = 0
        # The photo at the end of the last batch may go on in the next one.
        self.open_photo: tuple[str, str] | None = None
        self.open_objects = 0

    def add(self, batch: pa.RecordBatch) -> None:
        if not len(batch):
            return
        split, photo = batch.column("split"), batch.column("photo_id")
        codes = split.indices.to_numpy()
        begins = np.ones(len(batch), bool)
        begins[1:] = pc.not_equal(photo[1:], photo[:-1]).to_numpy(zero_copy_only=False) | (codes[1:] != codes[:-1])
        begins[0] = self.open_photo != (split[0].as_py(), photo[0].as_py())
        starts = np.flatnonzero(begins)
        for counts, where in ((self.photos, codes[starts]), (self.objects, codes)):
            for code, count in enumerate(np.bincount(where).tolist()):
                counts[split.dictionary[code].as_py()] += count

        # Lengths between the starts; the first piece belongs to the photo left open, the last one stays open.
        pieces = np.diff(np.r_[0, starts, len(batch)])
        pieces[0] += self.open_objects
        self._close(pieces[:-1])
        self.open_photo, self.open_objects = (split[-1].as_py(), photo[-1].as_py()), int(pieces[-1])

    def result(self) -> dict[str, Any]:
        self._close(np.array([self.open_objects]))
        self.open_photo, self.open_objects = None, 0
        photos, objects = sum(self.photos.values()), sum(self.objects.values())
        return {
            "photos": dict(+self.photos),
            "objects": dict(+self.objects),
            "per_photo": {
                "photos": photos,
                "objects": list(range(1, MAX_COUNTED_PER_PHOTO + 1)),
                "counts": self.counts[1:-1].tolist(),
                "above": int(self.counts[-1]),
                "mean": objects / photos if photos else None,
                "largest": self.largest,
            },
        }

    def _close(self, lengths: Int64[np.ndarray, " photos"]) -> None:
        lengths = lengths[lengths > 0]  # Nothing was open, or the batch begins with another photo.
        self.counts += np.bincount(np.minimum(lengths, MAX_COUNTED_PER_PHOTO + 1), minlength=len(self.counts))
        self.largest = max(self.largest, int(lengths.max(initial=0)))


class _Flags:
    """How many objects have each flag: yes (1), no (0), unknown (-1)."""

    columns = FLAGS

    def __init__(self) -> None:
        self.counts = {flag: np.zeros(3, np.int64) for flag in FLAGS}

    def add(self, batch: pa.RecordBatch) -> None:
        for flag, counts in self.counts.items():
            counts += np.bincount(batch.column(flag).to_numpy().astype(np.int64) + 1, minlength=3)

    def result(self) -> dict[str, Any]:
        return {flag: dict(zip(("unknown", "no", "yes"), counts.tolist(), strict=True)) for flag, counts in self.counts.items()}


class _Rejects:
    """Rejected boxes by rule, in the documented order, with the first few malformed rows of each."""

    columns = ("reason", "reasons", "detail", "file", "row")

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        for (reason,), count in _count_words(batch, "reason").items():
            self.counts[reason] += count
        for entry in pc.list_flatten(batch.column("reasons")).value_counts().to_pylist():
            self.broken[entry["values"]] += entry["counts"]
        malformed = batch.filter(pc.is_valid(batch.column("detail")))
        codes = malformed.column("reason").indices.to_numpy()
        for code in np.unique(codes).tolist():
            self._add_examples(malformed.take(np.flatnonzero(codes == code)[:EXAMPLES]).to_pylist())

    def result(self) -> dict[str, Any]:
        reasons = [*REJECT_REASONS, *sorted(self.counts.keys() - REJECT_REASONS.keys())]
        return {
            "rejected": sum(self.counts.values()),
            "all_reasons": bool(self.broken),
            "reasons": [
                {
                    "reason": reason,
                    "meaning": REJECT_REASONS.get(reason, ""),
                    "boxes": self.counts[reason],
                    "broken": self.broken[reason] if self.broken else None,
                    "examples": self.examples.get(reason, []),
                }
                for reason in reasons
            ],
        }

    def _add_examples(self, rows: list[dict[str, Any]]) -> None:
        examples = self.examples.setdefault(rows[0]["reason"], [])
        for row in rows[: EXAMPLES - len(examples)]:
            examples.append({"file": row["file"], "row": row["row"], "detail": _shortened(row["detail"], _MAX_DETAIL)})


class _Plan:
    """Planned samples and shards by split."""

    columns = ("split", "shard")

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.shards: dict[str, set[str]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        for (split, shard), count in _count_words(batch, *self.columns).items():
            self.samples[split] += count
            self.shards.setdefault(split, set()).add(shard)

    def result(self) -> dict[str, Any]:
        return {"samples": dict(self.samples), "shards": {split: len(shards) for split, shards in self.shards.items()}}


def _among(ids: pa.Array, packed: UInt64[np.ndarray, " objects"]) -> pa.Array:
    """Whether each id is one of those whose sorted hashes these are."""
    hashes = hash_column(ids)
    places = np.minimum(np.searchsorted(packed, hashes), max(0, len(packed) - 1))
    return pa.array(packed[places] == hashes if len(packed) else np.zeros(len(ids), bool))


def _stream(path: Path, counters: Sequence[_Counter]) -> None:
    for batch in read_batches(path, _columns_of(counters)):
        for counter in counters:
            counter.add(batch)


def _columns_of(counters: Iterable[_Counter]) -> list[str]:
    return list(dict.fromkeys(name for counter in counters for name in counter.columns))


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Stream some columns of a table, words as dictionaries.

    Raises:
        InputError: the table is not there, cannot be read or lacks a column.
    """
    try:
        metadata = pq.read_metadata(path)
        missing = [name for name in columns if name not in metadata.schema.to_arrow_schema().names]
        if missing:
            raise InputError(f"{path}: no column {missing[0]}; it was made by another version, run the build again")
        words = [name for name in columns if name in _WORDS]
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=words) as table:
            yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet table ({' '.join(str(error).split())}); run the build again") from None


def _count_words(batch: pa.RecordBatch, *columns: str) -> dict[tuple[str, ...], int]:
    """How often each combination of words stands in these columns."""
    groups = pa.Table.from_batches([batch]).group_by(list(columns)).aggregate([([], "count_all")]).to_pylist()
    return {tuple(group[name] for name in columns): group["count_all"] for group in groups}


def _numbers(batch: pa.RecordBatch, name: str) -> Float[np.ndarray, " rows"]:
    """A column as float64; NaN where it is null."""
    values: np.ndarray = batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
