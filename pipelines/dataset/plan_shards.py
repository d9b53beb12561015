"""Cutting objects into shards: objects.parquet -> plan.parquet, and the plan read again, shard by shard.

    objects (by split, hash of the photo) ──views──▶ samples ──cut every `shards.samples`──▶ shard, position

Where views have several shapes, each shard holds one of them: `shapes.py` says which a sample has.

A sample's place depends on names and settings alone. Objects come in the order of a hash of their photo, so that shards mix
classes and a photo is decoded once. Streams: memory holds one part of the objects and one row group of the plan.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool

from pbe_core.errors import InputError
from pbe_core.files import atomic_file
from pbe_core.randomness import hash_column
from pbe_core.words import number_of
from pipelines.dataset.shapes import PhotoShapes
from pipelines.threads import OneBehind, read_ahead
from schemas.dataset import shard_group, shard_name, shard_split
from schemas.tables import PLAN, paired, with_dictionary

ROWS_PER_GROUP = 16_384
"""A row group of the plan holds whole shards, of at least so many rows together. With one shard each, the footer that every
packing actor reads grows by 1.8 kB for each shard."""
_SHARDS = "shards"
"""Key of the footer's metadata: a JSON object, shard -> planned samples, in order."""


@dataclass(frozen=True)
class PlanRow:
    """One sample to be made: the columns of a row of the plan that packing reads. Their meaning: `schemas.tables.PLAN`."""

    key: str
    view: int
    split: str
    photo_id: str
    object_id: str
    label: str
    label_name: str
    x_min: float
    x_max: float
    y_min: float
    y_max: float
    segmentation: str | None
    file_name: str | None
    width: int | None
    height: int | None
    rotation: int | None
    url: str | None
    author: str | None
    licence: str | None
    group: str | None = None
    references: Sequence[Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "PlanRow":
        """The fields that a row of a table has among others; some only where the source says which boxes belong together."""
        return cls(**{name: row[name] for name in _READ if name in row or name not in _OPTIONAL})


_READ = {field.name for field in dataclasses.fields(PlanRow)}
_OPTIONAL = {field.name for field in dataclasses.fields(PlanRow) if field.default is not dataclasses.MISSING}


class Plan:
    """plan.parquet, opened. The footer is read at once; rows are read shard by shard."""

    def __init__(self, path: Path) -> None:
        """Open the plan.

        Raises:
            InputError: it has no list of its shards.
        """
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        shards = (metadata.metadata or {}).get(_SHARDS.encode())
        if shards is None:
            raise InputError(f"{path}: made by another version; remove selection.json beside it and run the build again")
        self.shards: dict[str, int] = json.loads(shards)
        """Shard -> number of planned samples, in order."""
        self.columns: list[str] = self._file.schema_arrow.names
        self._starts = dict(zip(self.shards, accumulate(self.shards.values(), initial=0), strict=False))
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._groups = np.cumsum([0, *sizes])

    def rows(self, shard: str) -> list[PlanRow]:
        """The planned samples of a shard; reads the one row group that holds them."""
        start = self._starts[shard]
        group = int(np.searchsorted(self._groups, start, side="right")) - 1
        table = self._file.read_row_group(group, [name for name in self.columns if name in _READ])
        return [PlanRow.of(row) for row in table.slice(start - int(self._groups[group]), self.shards[shard]).to_pylist()]

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Some columns of each shard's rows, in order; each row group is read once."""
        shards = iter(self.shards.items())
        for group, rows in enumerate(np.diff(self._groups).tolist()):
            table, start = self._file.read_row_group(group, list(columns)), 0
            while start < rows:
                shard, count = next(shards)
                yield shard, table.slice(start, count)
                start += count


def write_plan(objects: Path, plan: Path, views: int, samples: int, shapes: PhotoShapes | None = None) -> None:
    """Plan every view of every object.

    Args:
        objects: objects.parquet.
        plan: where plan.parquet goes.
        views: of each object.
        samples: of each shard; the last one of a split, or of a shape in it, may hold fewer.
        shapes: of views; by default they are all squares of one size.
    """
    table = pq.ParquetFile(objects)
    parts = read_ahead(map(table.read_row_group, range(table.num_row_groups)))
    with writing_plan(plan, is_paired(table)) as add:
        for shard in plan_samples(parts, views, samples, shapes=shapes):
            add(shard)


def extend_plan(
    objects: Path,
    plan: Path,
    finished: Collection[str],
    packed: pa.Array,
    views: int,
    samples: int,
    shapes: PhotoShapes | None = None,
) -> None:
    """Add the samples that are not packed yet to a plan, in shards of their own, behind those that are there.

    The shards that are there keep the rows that are in them; those that could not be made are planned again with the new ones.

    Args:
        objects: objects.parquet, which has more objects now.
        plan: plan.parquet, replaced.
        finished: shards of the dataset; others in the plan are of an extension that was not finished, and are planned anew.
        packed: keys of all samples of the dataset.
        views: of each object.
        samples: of each new shard.
        shapes: of views, as in `write_plan`.

    Raises:
        InputError: a sample that is packed is of an object that is not among the objects any more, or is in another split now.
    """
    known = PackedKeys(packed)
    table = pq.ParquetFile(objects)
    parts = (table.read_row_group(group) for group in range(table.num_row_groups))
    there: dict[str, int] = {}
    met = 0
    packed_in: dict[str, list[pa.Array]] = {}
    before = Plan(plan)
    with writing_plan(plan, is_paired(table) or "group" in before.columns) as add:
        for shard, rows in before.tables(before.columns):
            if shard not in finished:
                continue
            there[shard_group(shard)] = int(shard.rpartition("-")[2]) + 1
            rows = rows.filter(pa.array(known.hold(rows["key"].combine_chunks())))
            if len(rows):
                packed_in.setdefault(shard_split(shard), []).append(rows["key"].combine_chunks())
                add(rows)
        for new in plan_samples(parts, views, samples, there, known, shapes):
            add(new)
        for group in range(table.num_row_groups):
            keys = _keys(table.read_row_group(group, ["object_id"])["object_id"], views)
            met += int(known.hold(keys).sum())
        if met < len(packed):
            raise InputError(
                f"{plan.parent}: {number_of(len(packed) - met, 'sample')} of the dataset belong to boxes that these settings or "
                f"annotations do not accept; --extend only adds: give settings that accept all that is there, or another --out"
            )
        _check_splits_kept(table, plan, {split: PackedKeys(pa.concat_arrays(keys)) for split, keys in packed_in.items()}, views)


def _check_splits_kept(objects: pq.ParquetFile, plan: Path, packed_in: Mapping[str, "PackedKeys"], views: int) -> None:
    """Raises InputError where a packed sample's object is in another split now: its instance would be in two."""
    moved, example = 0, ""
    for group in range(objects.num_row_groups):
        for now, rows in _by_split(objects.read_row_group(group, ["object_id", "photo_id", "split"])):
            keys = _keys(rows["object_id"], views)
            for split, packed in packed_in.items():
                found = np.flatnonzero(packed.hold(keys)) if split != now else np.zeros(0, np.int64)
                moved += len(found)
                if len(found) and not example:
                    example = f"photo {rows['photo_id'][int(found[0]) // views].as_py()} from {split} to {now}"
    if moved:
        raise InputError(
            f"{plan.parent}: {number_of(moved, 'sample')} of the dataset would be in another split by these annotations "
            f"({example}); --extend only adds: give annotations that keep the splits (own boxes may say them, in a column "
            f"`split`; instances that are linked anew are in one), or another --out"
        )


def is_paired(objects: pq.ParquetFile) -> bool:
    """Whether a table of objects says which of them show the same instance."""
    return "group" in objects.schema_arrow.names


@contextmanager
def writing_plan(plan: Path, pairs: bool = False) -> Iterator[Callable[[pa.Table], None]]:
    """Write plan.parquet: what is yielded takes the rows of one shard after another; with `pairs`, with groups and references."""
    schema = paired(PLAN) if pairs else PLAN
    shards: dict[str, int] = {}
    waiting: list[pa.Table] = []
    # Statistics would make the footer twice as large, and nobody reads them.
    options = {"write_statistics": False, "use_dictionary": with_dictionary(schema)}
    with atomic_file(plan) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:

        def write(parts: list[pa.Table]) -> None:
            table = pa.concat_tables(parts).unify_dictionaries()
            writer.write_table(table, row_group_size=len(table))

        def add(rows: pa.Table) -> None:
            shards[rows["shard"][0].as_py()] = len(rows)
            if not rows.schema.equals(schema):
                for name in set(schema.names).difference(rows.column_names):  # Planned before there were groups.
                    rows = rows.append_column(schema.field(name), pa.nulls(len(rows), schema.field(name).type))
                rows = _as(rows.select(schema.names), schema)
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                write_behind(waiting.copy())
                waiting.clear()

        with OneBehind(write) as write_behind:
            yield add
            if waiting:
                write_behind(waiting)
        writer.add_key_value_metadata({_SHARDS: json.dumps(shards)})


def plan_samples(
    objects: Iterable[pa.Table],
    views: int,
    samples: int,
    there: Mapping[str, int] = MappingProxyType({}),
    packed: "PackedKeys | None" = None,
    shapes: PhotoShapes | None = None,
) -> Iterator[pa.Table]:
    """Rows of the plan, shard by shard.

    Args:
        objects: parts of the objects table, in its order; a part may hold several splits.
        views: of each object; they stand together.
        samples: of each shard.
        there: number of the first new shard of each `shard_group`; the dataset has those before.
        packed: keys that are left out.
        shapes: of views, as in `write_plan`.
    """
    split = ""
    queues: dict[int, _Queue] = {}
    for part in objects:
        for own, rows in _by_split(part):
            if own != split:
                for _, queue in sorted(queues.items()):
                    yield from queue.rest()
                split, queues = own, {}
            for number, few in _by_shape(rows, shapes):
                shape = shapes.buckets[number] if shapes else None
                queue = queues.setdefault(number, _Queue(split, shape, samples, there))
                yield from queue.add(few, views, packed)
    for _, queue in sorted(queues.items()):
        yield from queue.rest()


class _Queue:
    """Samples of one split and shape that wait for a full shard."""

    def __init__(self, split: str, shape: tuple[int, int] | None, samples: int, there: Mapping[str, int]) -> None:
        self.split, self.shape, self.samples = split, shape, samples
        self.number = there.get(shard_group(shard_name(split, 0, shape)), 0)
        self.rows: pa.Table | None = None
        self.views = np.zeros(0, np.int32)

    def add(self, rows: pa.Table, views: int, packed: "PackedKeys | None") -> Iterator[pa.Table]:
        """Take all views of these objects that are not packed, and give the shards that are full."""
        each = np.repeat(np.arange(len(rows)), views)
        of_each = np.tile(np.arange(views, dtype=np.int32), len(rows))
        if packed is not None:
            new = ~packed.hold(_keys(rows["object_id"], views))
            each, of_each = each[new], of_each[new]
        # All of them as they are need not be copied, which takes a tenth of a plan's time.
        taken = rows if views == 1 and packed is None else rows.take(pa.array(each))
        waiting = taken if self.rows is None else pa.concat_tables([self.rows, taken])
        of_waiting = np.r_[self.views, of_each]
        full = len(waiting) // self.samples * self.samples
        for start in range(0, full, self.samples):
            yield self._shard(waiting.slice(start, self.samples), of_waiting[start : start + self.samples])
        self.rows, self.views = waiting.slice(full).combine_chunks(), of_waiting[full:]

    def rest(self) -> Iterator[pa.Table]:
        """The last shard, if anything waits."""
        if self.rows is not None and len(self.rows):
            yield self._shard(self.rows, self.views)

    def _shard(self, rows: pa.Table, views: np.ndarray) -> pa.Table:
        name = shard_name(self.split, self.number, self.shape)
        self.number += 1
        return _shard(rows, views, name)


class PackedKeys:
    """A set of keys that is asked about many times. Arrow's own `is_in` would build its hash table anew each time."""

    def __init__(self, keys: pa.Array) -> None:
        hashes = hash_column(keys, "packed")
        order = np.argsort(hashes)
        self._hashes = hashes[order]
        self._keys = keys.take(pa.array(order))

    def hold(self, keys: pa.Array) -> Bool[np.ndarray, " keys"]:
        """Whether each of these keys is in the set; exact, since keys of the same hash are compared."""
        if not len(self._hashes):
            return np.zeros(len(keys), bool)
        hashes = hash_column(keys, "packed")
        first = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found: np.ndarray = self._hashes[first] == hashes
        same = pc.equal(keys.filter(pa.array(found)), self._keys.take(pa.array(first[found]))).to_numpy(zero_copy_only=False)
        others = np.flatnonzero(found)[~same]
        if len(others):  # Two keys of one hash, of which the other one was met: next to never.
            found[others] = pc.is_in(keys.take(pa.array(others)), self._keys).to_numpy(zero_copy_only=False)
        return found


def _by_split(objects: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Runs of rows of one split."""
    splits = objects["split"].cast(pa.string()).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.r_[True, splits[1:] != splits[:-1]][: len(splits)])
    for start, end in zip(starts, np.r_[starts[1:], len(splits)], strict=True):
        yield str(splits[start]), objects.slice(start, end - start)


def _by_shape(rows: pa.Table, shapes: PhotoShapes | None) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each bucket, by its number; all of them under 0 where there is one size."""
    if shapes is None:
        yield 0, rows
        return
    numbers = shapes.of(rows)
    for number in np.unique(numbers).tolist():
        yield number, rows.filter(pa.array(numbers == number))


def _keys(objects: pa.ChunkedArray, views: int) -> pa.Array:
    """Keys of all views of objects, those of an object together."""
    each = np.repeat(np.arange(len(objects)), views)
    return _join(objects.take(pa.array(each)), np.tile(np.arange(views, dtype=np.int32), len(objects)))


def _join(objects: pa.ChunkedArray, views: np.ndarray) -> pa.Array:
    keys = pc.binary_join_element_wise(objects, pa.array(views).cast(pa.string()), "_")
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def _shard(rows: pa.Table, views: np.ndarray, name: str) -> pa.Table:
    count = len(rows)
    columns = {
        "shard": pa.repeat(name, count),
        "position": pa.array(np.arange(count, dtype=np.int32)),
        "key": _join(rows["object_id"], views),
        "view": pa.array(views),
    }
    schema = paired(PLAN) if "group" in rows.column_names else PLAN
    arrays = [columns[name] if name in columns else rows[name] for name in schema.names]
    return _as(pa.table(arrays, names=schema.names), schema).unify_dictionaries()


def _as(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows with this schema; a cast goes through all columns one by one even where their types are right."""
    if rows.schema.types == schema.types:
        return pa.Table.from_arrays(rows.columns, schema=schema)
    return rows.unify_dictionaries().cast(schema)
