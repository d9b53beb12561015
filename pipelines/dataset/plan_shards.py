"""Cutting objects into shards: objects.parquet -> plan.parquet, one row group per shard.

    objects (by split, hash of the photo) ──views──▶ samples ──cut every `shards.samples`──▶ shard, position

A sample's place depends on names and settings alone. Objects come in the order of a hash of their photo, so that shards mix
classes and a photo is decoded once. Streams: memory holds one part of the objects and one shard.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool

from pbe_core.errors import InputError
from pbe_core.files import atomic_file
from pbe_core.randomness import hash_column
from pbe_core.words import number_of
from schemas.tables import OBJECTS, PLAN


def write_plan(objects: Path, plan: Path, views: int, samples: int) -> None:
    """Plan every view of every object.

    Args:
        objects: objects.parquet.
        plan: where plan.parquet goes.
        views: of each object.
        samples: of each shard; the last one of a split may hold fewer.
    """
    table = pq.ParquetFile(objects)
    parts = (table.read_row_group(group) for group in range(table.num_row_groups))
    # Statistics of all columns would make the footer, which every packing actor reads, twenty times larger.
    with atomic_file(plan) as temporary, pq.ParquetWriter(temporary, PLAN, write_statistics=["shard"]) as writer:
        for shard in plan_samples(parts, views, samples):
            writer.write_table(shard, row_group_size=len(shard))


def extend_plan(objects: Path, plan: Path, sealed: Collection[str], packed: pa.Array, views: int, samples: int) -> None:
    """Add the samples that are not packed yet to a plan, in shards of their own, behind those that are there.

    The shards that are there keep the rows that are in them; those that could not be made are planned again with the new ones.

    Args:
        objects: objects.parquet, which has more objects now.
        plan: plan.parquet, replaced.
        sealed: shards of the dataset; others in the plan are of an extension that was not finished, and are planned anew.
        packed: keys of all samples of the dataset.
        views: of each object.
        samples: of each new shard.

    Raises:
        InputError: a sample that is packed is of an object that is not among the objects any more.
    """
    known = PackedKeys(packed)
    old = pq.ParquetFile(plan)
    table = pq.ParquetFile(objects)
    parts = (table.read_row_group(group) for group in range(table.num_row_groups))
    there: dict[str, int] = {}
    met = 0
    with atomic_file(plan) as temporary, pq.ParquetWriter(temporary, PLAN, write_statistics=["shard"]) as writer:
        for group in range(old.num_row_groups):
            rows = old.read_row_group(group)
            shard = rows["shard"][0].as_py()
            if shard not in sealed:
                continue
            split, _, number = shard.rpartition("-")
            there[split] = int(number) + 1
            rows = rows.filter(pa.array(known.hold(rows["key"].combine_chunks())))
            if len(rows):
                writer.write_table(rows.cast(PLAN), row_group_size=len(rows))
        for new in plan_samples(parts, views, samples, there, known):
            writer.write_table(new, row_group_size=len(new))
        for group in range(table.num_row_groups):
            keys = _keys(table.read_row_group(group, ["object_id"])["object_id"], views)
            met += int(known.hold(keys).sum())
        if met < len(packed):
            raise InputError(
                f"{plan.parent}: {number_of(len(packed) - met, 'sample')} of the dataset belong to boxes that these settings or "
                f"annotations do not accept; --extend only adds: give settings that accept all that is there, or another --out"
            )


def plan_samples(
    objects: Iterable[pa.Table],
    views: int,
    samples: int,
    there: Mapping[str, int] = MappingProxyType({}),
    packed: "PackedKeys | None" = None,
) -> Iterator[pa.Table]:
    """Rows of the plan, shard by shard.

    Args:
        objects: parts of the objects table, in its order; a part may hold several splits.
        views: of each object; they stand together.
        samples: of each shard.
        there: number of the first new shard of each split; the dataset has those before.
        packed: keys that are left out.
    """
    split, number = "", 0
    waiting = OBJECTS.empty_table()
    views_waiting = np.zeros(0, np.int32)
    for part in objects:
        for own, rows in _by_split(part):
            if own != split:
                if len(waiting):
                    yield _shard(waiting, views_waiting, split, number)
                split, number, waiting, views_waiting = own, there.get(own, 0), OBJECTS.empty_table(), np.zeros(0, np.int32)
            each = np.repeat(np.arange(len(rows)), views)
            of_each = np.tile(np.arange(views, dtype=np.int32), len(rows))
            if packed is not None:
                new = ~packed.hold(_keys(rows["object_id"], views))
                each, of_each = each[new], of_each[new]
            waiting = pa.concat_tables([waiting, rows.take(pa.array(each))])
            views_waiting = np.r_[views_waiting, of_each]
            full = len(waiting) // samples * samples
            for start in range(0, full, samples):
                yield _shard(waiting.slice(start, samples), views_waiting[start : start + samples], split, number)
                number += 1
            waiting, views_waiting = waiting.slice(full).combine_chunks(), views_waiting[full:]
    if len(waiting):
        yield _shard(waiting, views_waiting, split, number)


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


def planned_shards(plan: Path) -> dict[str, int]:
    """Shard -> number of planned samples; the n-th shard is row group n of the plan. Reads the footer alone."""
    metadata = pq.ParquetFile(plan).metadata
    column = PLAN.get_field_index("shard")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return {group.column(column).statistics.min: group.num_rows for group in groups}


def _by_split(objects: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Runs of rows of one split."""
    splits = objects["split"].cast(pa.string()).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.r_[True, splits[1:] != splits[:-1]][: len(splits)])
    for start, end in zip(starts, np.r_[starts[1:], len(splits)], strict=True):
        yield str(splits[start]), objects.slice(start, end - start)


def _keys(objects: pa.ChunkedArray, views: int) -> pa.Array:
    """Keys of all views of objects, those of an object together."""
    each = np.repeat(np.arange(len(objects)), views)
    return _join(objects.take(pa.array(each)), np.tile(np.arange(views, dtype=np.int32), len(objects)))


def _join(objects: pa.ChunkedArray, views: np.ndarray) -> pa.Array:
    keys = pc.binary_join_element_wise(objects, pa.array(views).cast(pa.string()), "_")
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def _shard(rows: pa.Table, views: np.ndarray, split: str, number: int) -> pa.Table:
    count = len(rows)
    columns = {
        "shard": pa.array([f"{split}-{number:06d}"] * count, pa.string()),
        "position": pa.array(np.arange(count, dtype=np.int32)),
        "key": _join(rows["object_id"], views),
        "view": pa.array(views),
    }
    arrays = [columns[name] if name in columns else rows[name] for name in PLAN.names]
    return pa.table(arrays, names=PLAN.names).unify_dictionaries().cast(PLAN)
