"""Lists of photos: each split and id once, with what any row of the source's tables knows about it.

Memory goes by the number of listed photos, not by the number of boxes.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt64

from pbe_core.randomness import hash_column

_NAME = ["split", "photo_id"]
_ROWS_HELD = 1_000_000


def photo_keys(photos: pa.Table) -> UInt64[np.ndarray, " photos"]:
    """What a photo is known by: a hash of its split and id, the same in every build."""
    split, photo_id = (photos[name].cast(pa.string()) for name in _NAME)
    return hash_column(pc.binary_join_element_wise(split, photo_id, "/").combine_chunks(), "photo")


def as_listed(rows: pa.RecordBatch | pa.Table, listed: pa.Schema) -> pa.Table:
    """The columns of a list, from rows that may lack some of them (null) and have others; words become strings."""
    names = rows.schema.names
    columns = [
        rows[name].cast(field.type) if (name := field.name) in names else pa.nulls(len(rows), field.type) for field in listed
    ]
    return pa.table(columns, schema=listed)


def known_about(photos: Iterable[pa.RecordBatch], wanted: pa.Table, listed: pa.Schema) -> pa.Table:
    """A list of wanted photos (split, photo_id and others), with what the source's `read_photos` says about them.

    Args:
        photos: batches of `schemas.tables.PHOTOS`; a photo may come twice.
        wanted: rows of the list, each photo once.
        listed: the list's schema.

    Returns:
        One row for each wanted photo, sorted by split and id. What the wanted row itself says counts most.
    """
    keys = np.sort(photo_keys(wanted))
    known = each_once((_rows_with(keys, as_listed(batch, listed)) for batch in photos), listed)
    joined = wanted.select(listed.names).join(known, _NAME, join_type="left outer", right_suffix=" known")
    both = [joined[name] if name in _NAME else pc.coalesce(joined[name], joined[f"{name} known"]) for name in listed.names]
    return pa.table(both, schema=listed).sort_by([(name, "ascending") for name in _NAME]).combine_chunks()


def each_once(parts: Iterable[pa.Table], listed: pa.Schema) -> pa.Table:
    """Each split and photo once, with what any of its rows knows."""
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
