"""Photos of a build: how one is read, in the frame of its boxes, and lists of them.

<root>/<split>/<id>.jpg, or the file that the annotations name   ──┐
a photo store (crawl.py): status.parquet, index.parquet, tars     ──┴─▶ read_photo: upright RGB, SHA-256
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

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
        wanted: rows of the list, each photo once.
        listed: the list's schema.

    Returns:
        One row for each wanted photo, sorted by split and id. The wanted row itself counts most.
    """
    keys = np.sort(photo_keys(wanted))
    known = each_once((_rows_with(keys, as_listed(batch, listed)) for batch in photos), listed)
    joined = wanted.select(listed.names).join(known, _NAME, join_type="left outer", right_suffix=" known")
    both = [joined[name] if name in _NAME else pc.coalesce(joined[name], joined[f"{name} known"]) for name in listed.names]
    return pa.table(both, schema=listed).sort_by([(name, "ascending") for name in _NAME]).combine_chunks()


def each_once(parts: Iterable[pa.Table], listed: pa.Schema) -> pa.Table:
    """Each split and photo once, with what any of its rows has."""
    held, waiting, limit = [listed.empty_table()], 0, _ROWS_HELD
    for part in parts:
        held.append(_merged(part, listed))
        waiting += len(held[-1])
        if waiting > limit:
            held, waiting = [_merged(pa.concat_tables(held), listed)], 0
            limit = _ROWS_HELD + len(held[0])
    return _merged(pa.concat_tables(held), listed)


def _rows_with(keys: UInt64[np.ndarray, " photos"], rows: pa.Table) -> pa.Table:
    """The rows whose key is among the sorted ones."""
    own = photo_keys(rows)
    place = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
    return rows.filter(pa.array(keys[place] == own)) if len(keys) else rows.slice(0, 0)


def _merged(rows: pa.Table, listed: pa.Schema) -> pa.Table:
    # The smallest, not the first: the order of rows must not matter.
    others = [name for name in listed.names if name not in _NAME]
    merged = rows.group_by(_NAME).aggregate([(name, "min") for name in others])
    return merged.rename_columns([*_NAME, *others]).select(listed.names).cast(listed)
