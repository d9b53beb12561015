"""Counting the rows of a dataset folder's tables, each table in one pass.

Tables may have millions of rows, so they stream by, batch after batch, and only counts are kept. All results are plain lists,
dicts and finite numbers, ready for JSON.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    classes: Counter[tuple[str, ...]] = Counter()
    areas = np.zeros(len(SHARE_EDGES) + 1, np.int64)
    aspects = {unit: np.zeros(len(ASPECT_EDGES) + 1, np.int64) for unit in ("pixels", "fractions")}
    coverage, centres = np.zeros((2, CELLS, CELLS), np.int64)
    flags = {flag: np.zeros(3, np.int64) for flag in FLAGS}
    photos, accepted = _Photos(), _Photos()
    columns = ["split", "photo_id", "object_id", "label", "label_name", "area_share", *COORDINATES, "width", "height", *FLAGS]
    for batch in read_batches(path, columns):
        accepted.add(batch)
        if packed is not None:
            batch = batch.filter(_among(batch.column("object_id"), packed))
            photos.add(batch)
        classes.update(_count_words(batch, "split", "label", "label_name"))
        areas += bin_counts(_numbers(batch, "area_share"), SHARE_EDGES)
        x_min, x_max, y_min, y_max = (_numbers(batch, name) for name in COORDINATES)
        ratios = (x_max - x_min) / (y_max - y_min)
        width, height = _numbers(batch, "width"), _numbers(batch, "height")  # NaN where unknown
        known = (width > 0) & (height > 0)
        aspects["pixels"] += bin_counts(ratios[known] * width[known] / height[known], ASPECT_EDGES)
        aspects["fractions"] += bin_counts(ratios[~known], ASPECT_EDGES)
        coverage += count_coverage(x_min, x_max, y_min, y_max, CELLS)
        column, row = (
            np.clip(middle * CELLS, 0, CELLS - 1).astype(np.int64) for middle in ((x_min + x_max) / 2, (y_min + y_max) / 2)
        )
        centres += np.bincount(row * CELLS + column, minlength=CELLS**2).reshape(CELLS, CELLS)
        for flag, counts in flags.items():
            counts += np.bincount(batch.column(flag).to_numpy().astype(np.int64) + 1, minlength=3)
    return {
        "classes": _by_class(classes),
        "areas": {"edges": SHARE_EDGES.tolist(), **binned(areas)},
        "aspects": {"edges": ASPECT_EDGES.tolist(), **{unit: binned(counts) for unit, counts in aspects.items()}},
        "positions": {"cells": CELLS, "coverage": coverage.tolist(), "centres": centres.tolist()},
        "photos": (accepted if packed is None else photos).result(),
        "flags": {flag: dict(zip(("unknown", "no", "yes"), counts.tolist(), strict=True)) for flag, counts in flags.items()},
        "accepted": accepted.result(),
    }


def _by_class(counts: Counter[tuple[str, ...]]) -> dict[str, Any]:
    """Objects by class and split, the largest class first, from counts of (split, label, name)."""
    total: Counter[str] = Counter()
    own: Counter[tuple[str, str]] = Counter()
    names: dict[str, str] = {}
    for (split, label, name), count in counts.items():
        total[label] += count
        own[split, label] += count
        names.setdefault(label, name)
    splits = in_order({split for split, _ in own})
    classes = [
        {"label": label, "name": names[label], "objects": count, "by_split": [own[split, label] for split in splits]}
        for label, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))
    ]
    return {"splits": splits, "objects": sum(total.values()), "classes": classes}


def count_rejects(path: Path) -> dict[str, Any]:
    """Figures of rejects.parquet: rejected boxes by rule, in the documented order, with the first few malformed rows of each."""
    counts: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    for batch in read_batches(path, ("reason", "reasons", "detail", "file", "row")):
        counts.update({reason: count for (reason,), count in _count_words(batch, "reason").items()})
        broken.update(
            {entry["values"]: entry["counts"] for entry in pc.list_flatten(batch.column("reasons")).value_counts().to_pylist()}
        )
        malformed = batch.filter(pc.is_valid(batch.column("detail")))
        codes = malformed.column("reason").indices.to_numpy()
        for code in np.unique(codes).tolist():
            rows = malformed.take(np.flatnonzero(codes == code)[:EXAMPLES]).to_pylist()
            shown = examples.setdefault(rows[0]["reason"], [])
            for row in rows[: EXAMPLES - len(shown)]:
                shown.append({"file": row["file"], "row": row["row"], "detail": _shortened(row["detail"])})
    reasons = [
        {
            "reason": reason,
            "meaning": REJECT_REASONS.get(reason, ""),
            "boxes": counts[reason],
            "broken": broken[reason] if broken else None,
            "examples": examples.get(reason, []),
        }
        for reason in [*REJECT_REASONS, *sorted(counts.keys() - REJECT_REASONS.keys())]
    ]
    return {"rejected": sum(counts.values()), "all_reasons": bool(broken), "reasons": reasons}


def count_plan(path: Path) -> dict[str, Any]:
    """Figures of plan.parquet: planned samples and shards by split."""
    samples: Counter[str] = Counter()
    shards: dict[str, set[str]] = {}
    for batch in read_batches(path, ("split", "shard")):
        for (split, shard), count in _count_words(batch, "split", "shard").items():
            samples[split] += count
            shards.setdefault(split, set()).add(shard)
    return {"samples": dict(samples), "shards": {split: len(own) for split, own in shards.items()}}


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


class _Photos:
    """Photos by split, and by how many objects they have. Relies on the order of objects.parquet: a photo's rows are adjacent.

    Holds 8 bytes for each photo.
    """

    def __init__(self) -> None:
        self.photos: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.starts: list[Int64[np.ndarray, " photos"]] = []
        """Number of each photo's first row."""
        self.last: tuple[str, str] | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Count the next rows, which have `split` and `photo_id`."""
        if not len(batch):
            return
        split, photo = batch.column("split"), batch.column("photo_id")
        codes = split.indices.to_numpy()
        begins = np.ones(len(batch), bool)
        begins[1:] = pc.not_equal(photo[1:], photo[:-1]).to_numpy(zero_copy_only=False) | (codes[1:] != codes[:-1])
        begins[0] = self.last != (split[0].as_py(), photo[0].as_py())
        self.last = split[-1].as_py(), photo[-1].as_py()
        self.starts.append(np.flatnonzero(begins) + self.objects.total())
        for counts, where in ((self.photos, codes[begins]), (self.objects, codes)):
            counts.update(dict(zip(split.dictionary.to_pylist(), np.bincount(where).tolist(), strict=False)))

    def result(self) -> dict[str, Any]:
        """The counts, for JSON."""
        photos, objects = self.photos.total(), self.objects.total()
        lengths = np.diff(np.concatenate([*self.starts, [objects]]))
        counts = np.bincount(np.minimum(lengths, MAX_COUNTED_PER_PHOTO + 1), minlength=MAX_COUNTED_PER_PHOTO + 2)
        per_photo = {
            "photos": photos,
            "objects": list(range(1, MAX_COUNTED_PER_PHOTO + 1)),
            "counts": counts[1:-1].tolist(),
            "above": int(counts[-1]),
            "mean": objects / photos if photos else None,
            "largest": int(lengths.max(initial=0)),
        }
        return {"photos": dict(+self.photos), "objects": dict(+self.objects), "per_photo": per_photo}


def _among(ids: pa.Array, packed: UInt64[np.ndarray, " objects"]) -> pa.Array:
    """Whether each id is one of those whose sorted hashes these are."""
    hashes = hash_column(ids)
    places = np.minimum(np.searchsorted(packed, hashes), max(0, len(packed) - 1))
    return pa.array(packed[places] == hashes if len(packed) else np.zeros(len(ids), bool))


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


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_DETAIL else f"{text[: _MAX_DETAIL - 1]}…"
