"""Photos of a build: how one is read, in the frame of its boxes, and lists of them.

<root>/<split>/<id>.jpg, or the file that the annotations name   ──┐
a photo store (crawl.py): status.parquet, index.parquet, tars     ──┴─▶ read_photo: upright RGB, SHA-256
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt8, UInt64

from pbe_core.errors import InputError
from pbe_core.images.decode import decode_photo
from pbe_core.photo_files import check_store, fetch_store, is_store, photo_keys, read_photo_bytes
from pipelines.config import BuildSettings, SourceSettings

_NAME = ["split", "photo_id"]
_ROWS_HELD = 1_000_000
_ROWS_DIVIDED = 200_000
_BUCKETS = 64
_STARTS = np.arange(_BUCKETS, dtype=np.uint64) * np.uint64(2**64 // _BUCKETS)


def read_photo_file(row: Mapping[str, Any], source: SourceSettings) -> bytes:
    """A photo's file as it is.

    Args:
        row: of the plan, or of another table: split, photo_id, file_name.
        source: where the photos are.

    Raises:
        PhotoError: it is not there or cannot be read; of a store, also if it could not be crawled, or is not what was crawled.
    """
    return read_photo_bytes(row, source.photos, source.photos_url, source.storage)


def read_photo(row: Mapping[str, Any], source: SourceSettings) -> tuple[UInt8[np.ndarray, "height width 3"], str]:
    """A photo's pixels (RGB, in the frame of its boxes, then turned by `rotation`) and the SHA-256 of its file.

    Args:
        row: of the plan, or a sample's record as a mapping: split, photo_id, file_name, rotation.
        source: where photos are, the boxes' frame, and the largest size that is decoded.

    Raises:
        PhotoError: it is missing, or cannot be read or decoded.
    """
    data = read_photo_file(row, source)
    photo = decode_photo(
        data, frame=source.photo_frame, max_pixels=source.max_photo_pixels, missing_end_mark=source.missing_end_mark
    )
    upright = np.ascontiguousarray(np.rot90(photo, (row["rotation"] or 0) // 90))
    return upright, hashlib.sha256(data).hexdigest()


def check_photos(settings: BuildSettings) -> None:
    """Look before any work whether there are photos at all.

    Raises:
        InputError: the folder, or a split's folder, is missing or empty, the store is of other photos, or is still to be made.
    """
    source, root = settings.source, settings.source.photos
    if source.photos_url:
        fetch_store(source.photos_url, source.storage, root)
    if is_store(root):
        check_store(root, source.photos_of)
        return
    if settings.crawl.sources:
        raise InputError(f"{root}: the photos are still to be crawled; run pipelines/crawl.py with these settings first")
    if not source.photos_by_id:
        if not root.is_dir() or next(root.iterdir(), None) is None:
            raise InputError(f"{root}: no photos here; put them there, or set build.source.photos to the folder that holds them")
        return
    for split in source.splits:
        if not any(next(folder.glob("*.jpg"), None) for folder in (root / split, *root.glob(f"{split}_?"))):
            raise InputError(
                f"{root / split}: no .jpg here (nor in {split}_0 to {split}_f beside it); "
                f"put the photos there as <ImageID>.jpg, or set build.source.photos"
            )


def as_listed(rows: pa.RecordBatch | pa.Table, listed: pa.Schema) -> pa.Table:
    """The columns of a list, from rows that may lack some of them (null) and have others; words become strings."""
    names = rows.schema.names
    columns = [
        rows[name].cast(field.type) if (name := field.name) in names else pa.nulls(len(rows), field.type) for field in listed
    ]
    return pa.table(columns, schema=listed)


def known_about(photos: Iterable[pa.RecordBatch], wanted: pa.Table, listed: pa.Schema) -> pa.Table:
    """A list of wanted photos (split, photo_id and others), with what the source's `read_photos` has on them.

    Args:
        photos: batches of `schemas.tables.PHOTOS`; a photo may come twice.
        wanted: rows of the list, each photo once, as `each_once` gives them.
        listed: the list's schema.

    Returns:
        The wanted rows, in their order. What they say themselves counts most.
    """
    keys = photo_keys(wanted)
    known = _collected((_found_among(keys, wanted, as_listed(batch, listed)) for batch in photos), listed)
    place = np.full(len(wanted), -1, np.int64)
    place[np.searchsorted(keys, known.keys)] = np.arange(len(known.rows))
    joined = known.rows.take(pa.array(place, mask=place < 0))
    both = [wanted[name] if name in _NAME else pc.coalesce(wanted[name], joined[name]) for name in listed.names]
    return pa.table(both, schema=listed).combine_chunks()


def each_once(parts: Iterable[pa.Table], listed: pa.Schema) -> pa.Table:
    """Each split and photo once, with what any of its rows has; sorted by the photos' keys.

    Raises:
        RuntimeError: two photos have the same key.
    """
    return _collected((_Keyed(photo_keys(rows), rows) for rows in map(_without_repeats, parts)), listed).rows


class _Keyed(NamedTuple):
    """Rows of a list, each with the key of its photo."""

    keys: UInt64[np.ndarray, " rows"]
    rows: pa.Table


def _found_among(keys: UInt64[np.ndarray, " photos"], wanted: pa.Table, rows: pa.Table) -> _Keyed:
    """The rows that are of wanted photos, which are sorted by their keys."""
    own = photo_keys(rows)
    place = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
    same = np.flatnonzero(keys[place] == own) if len(keys) else np.zeros(0, np.int64)
    rows = rows.take(pa.array(same))
    for name in _NAME:  # Of a list that nobody has looked at yet, ids that are none have one key.
        there = pc.fill_null(pc.equal(rows[name], wanted[name].take(pa.array(place[same]))), False).to_numpy()
        same, rows = same[there], rows.filter(pa.array(there))
    return _Keyed(own[same], rows)


def _without_repeats(rows: pa.Table) -> pa.Table:
    """Rows without those that are equal to the row before them, as the objects of a photo are."""
    repeated = np.ones(max(0, len(rows) - 1), bool)
    for name in rows.column_names:
        column = rows[name].combine_chunks()
        if column.null_count < len(column):
            equal = pc.fill_null(pc.equal(column[1:], column[:-1]), False).to_numpy(zero_copy_only=False)
            none = column.is_null().to_numpy(zero_copy_only=False)
            repeated &= equal | (none[1:] & none[:-1])
    return rows.filter(pa.array(np.r_[True, ~repeated][: len(rows)]))


def _collected(parts: Iterable[_Keyed], listed: pa.Schema) -> _Keyed:
    """All parts in one, each photo once, sorted by key.

    Rows are divided by the first bits of their keys before they are put in order: what is put in order at once fits into the
    processor's caches. At the end the pieces become one, for which the whole list is in memory twice.
    """
    buckets: list[list[_Keyed]] = [[] for _ in range(_BUCKETS)]
    few: list[_Keyed] = []
    held, limit = 0, _ROWS_HELD

    def divide() -> None:
        if not few:
            return
        keys, rows = _joined(few)
        few.clear()
        order = np.argsort(keys)
        keys, rows = keys[order], rows.take(pa.array(order))
        ends = [*np.searchsorted(keys, _STARTS).tolist(), len(keys)]
        for bucket, start, end in zip(buckets, ends[:-1], ends[1:], strict=True):
            if start < end:
                bucket.append(_Keyed(keys[start:end], rows.slice(start, end - start)))

    for part in parts:
        few.append(part)
        held += len(part.rows)
        if sum(len(each.rows) for each in few) >= _ROWS_DIVIDED:
            divide()
        if held > limit:
            divide()
            buckets = [[_merged(bucket)] if bucket else [] for bucket in buckets]
            held = sum(len(each.rows) for bucket in buckets for each in bucket)
            limit = _ROWS_HELD + held
    divide()
    merged = [_merged(bucket) for bucket in buckets if bucket]
    keys, rows = _joined([_Keyed(np.zeros(0, np.uint64), listed.empty_table()), *merged])
    return _Keyed(keys, rows.combine_chunks())  # Looked up in row by row, which takes longer in pieces.


def _joined(parts: list[_Keyed]) -> _Keyed:
    keys, tables = zip(*parts, strict=True)
    return _Keyed(np.concatenate(keys), pa.concat_tables(tables))


def _merged(parts: list[_Keyed]) -> _Keyed:
    """Each photo once, sorted by key; a value is the smallest of its rows: their order must not matter."""
    keys, rows = _joined(parts)
    order, rows = np.argsort(keys), rows.combine_chunks()
    keys = keys[order]
    begins = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
    alone = begins & np.r_[begins[1:], True][: len(keys)]
    if alone.all():
        return _Keyed(keys, rows.take(pa.array(order)))
    several = rows.take(pa.array(order[~alone])).append_column("key", pa.array(keys[~alone]))
    kinds = [(name, kind) for name in rows.column_names for kind in (("min", "max") if name in _NAME else ("min",))]
    merged = several.group_by("key").aggregate(kinds)
    if any(pc.any(pc.not_equal(merged[f"{name}_min"], merged[f"{name}_max"])).as_py() for name in _NAME):
        raise RuntimeError("two photos have the same key: rename one of them")
    columns = [merged[f"{name}_min"].cast(rows.schema.field(name).type) for name in rows.column_names]
    both = pa.concat_tables([rows.take(pa.array(order[alone])), pa.table(columns, schema=rows.schema)])
    keys = np.r_[keys[alone], merged["key"].to_numpy()]
    order = np.argsort(keys)
    return _Keyed(keys[order], both.take(pa.array(order)))
