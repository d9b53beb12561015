"""All parts -> the tables of a photo store: status, failures, index, quarantine. The latest part that knows a photo counts.

    parts (each sorted by key) ──a range of keys at a time──▶ latest row of each photo ──▶ status.parquet, failures.parquet
                                                                                    └────▶ index.parquet, quarantine.parquet

Memory holds one range of keys, and the hashes of all photos, by which placeholders are found.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pbe_core.files import atomic_file
from pbe_core.words import number_of
from pipelines.crawling.parts import Part
from pipelines.crawling.rounds import latest_of_each, lost_keys
from schemas.outcomes import OK, OUTCOMES
from schemas.tables import PHOTO_INDEX, PHOTO_STATUS, STORED_PHOTOS, with_plain_words

_ROWS_AT_ONCE = 200_000
_MADE_FROM = b"made from"
_PLAIN = with_plain_words(STORED_PHOTOS)
# The status comes last: it bears the mark that says that all four are there.
STORE_TABLES = {
    "index.parquet": PHOTO_INDEX,
    "quarantine.parquet": PHOTO_INDEX,
    "failures.parquet": PHOTO_STATUS,
    "status.parquet": PHOTO_STATUS,
}


def merge(store: Path, parts: Sequence[Part], placeholder_ids: int) -> None:
    """Write the store's tables, unless they are of just these parts.

    Args:
        store: the photo store.
        parts: that count, in order.
        placeholder_ids: the same bytes under so many ids, none of them vouched for, are a placeholder.
    """
    marks = {_MADE_FROM: _names_of(store, parts), b"placeholder ids": str(placeholder_ids).encode()}
    if _bear(store, marks):
        return
    placeholders = pa.array(find_placeholders(store, parts, placeholder_ids), pa.string())
    with ExitStack() as stack:
        writers = {}
        for name, schema in reversed(STORE_TABLES.items()):  # Closed, and so renamed, in the reverse order.
            temporary = stack.enter_context(atomic_file(store / name))
            marked = schema.with_metadata({**schema.metadata, **marks})
            writers[name] = stack.enter_context(pq.ParquetWriter(temporary, marked))
        for rows in _latest_rows(store, parts):
            found = pc.and_(pc.equal(rows["code"], OK), pc.invert(rows["verified"]))
            still = pc.and_(pc.equal(rows["code"], "placeholder"), pc.is_valid(rows["file"]))  # Asked for again in vain.
            fake = pc.or_(pc.fill_null(pc.and_(found, pc.is_in(rows["sha256"], placeholders)), False), still)
            rows = _with_placeholders(rows, fake)
            good = pc.equal(rows["code"], OK)
            for name, chosen in (
                ("index.parquet", rows.filter(good)),
                ("quarantine.parquet", rows.filter(fake)),
                ("failures.parquet", rows.filter(pc.invert(good))),
                ("status.parquet", rows),
            ):
                schema = STORE_TABLES[name]
                table = pa.table([chosen[field.name].cast(field.type) for field in schema], schema=writers[name].schema)
                writers[name].write_table(table)


def find_placeholders(store: Path, parts: Sequence[Part], placeholder_ids: int) -> list[str]:
    """SHA-256 of the bytes that came for so many ids that they cannot be photos of them all, sorted."""
    columns = ["key", "code", "sha256", "verified"]
    rows = [_read(store, part, columns) for part in parts]
    if not rows:
        return []
    table = pa.concat_tables(rows)
    counts = (
        table.filter(pc.and_(pc.equal(table["code"], OK), pc.invert(pc.fill_null(table["verified"], False))))
        .group_by("sha256")
        .aggregate([("key", "count_distinct")])
    )
    many = counts.filter(pc.greater_equal(counts["key_count_distinct"], placeholder_ids))
    return sorted(many["sha256"].to_pylist())


def count_codes(store: Path, wanted: pa.Array) -> Counter[str]:
    """What became of a build's wanted photos: code -> photos, in the order of `OUTCOMES`; "" for those not asked for yet.

    Args:
        store: the photo store, merged.
        wanted: their keys.
    """
    counts: Counter[str] = Counter()
    sorted_keys = np.sort(wanted.to_numpy())
    for batch in pq.ParquetFile(store / "status.parquet").iter_batches(columns=["key", "code"]):
        keys = batch["key"].to_numpy()
        place = np.minimum(np.searchsorted(sorted_keys, keys), max(len(sorted_keys) - 1, 0))
        among = sorted_keys[place] == keys if len(sorted_keys) else np.zeros(len(keys), bool)
        codes = batch["code"].cast(pa.string()).filter(pa.array(among))
        counts.update({item["values"]: item["counts"] for item in pc.value_counts(codes).to_pylist()})
    ordered = Counter({code: counts[code] for code in OUTCOMES if code in counts})
    if ordered.total() != counts.total() or ordered.total() > len(wanted):
        raise RuntimeError(f"{store}: the books do not balance: {number_of(len(wanted), 'photo')} wanted, and {dict(counts)}")
    if len(wanted) > ordered.total():
        ordered[""] = len(wanted) - ordered.total()
    return ordered


def _latest_rows(store: Path, parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Rows of `STORED_PHOTOS`, each photo once, sorted by key, in tables of a range of keys each."""
    total = sum(part.photos for part in parts)
    ranges = max(1, -(-total // _ROWS_AT_ONCE))
    edges = [place * 2**64 // ranges for place in range(ranges + 1)]
    tars = pa.array([f"parts/{name}" for part in parts for name in part.tars], pa.string())
    lost = lost_keys(store).values()
    for first, after in itertools.pairwise(edges):
        tables = [_PLAIN.empty_table()]
        for part in parts:
            if part.first_key < after and part.last_key >= first:
                rows = _read(store, part, STORED_PHOTOS.names)
                rows = rows.slice(*_range(rows["key"].to_numpy(), first, after))
                for number, keys in lost:
                    if part.round <= number:  # A later part, now damaged, knew better.
                        rows = rows.filter(pc.invert(pc.is_in(rows["key"], keys)))
                tables.append(rows)
        table = pa.concat_tables(tables).combine_chunks()
        yield _with_a_place(table.take(pa.array(latest_of_each(table["key"].to_numpy()))), tars)


def _with_a_place(rows: pa.Table, tars: pa.Array) -> pa.Table:
    """Without photos that lie in a tar of a part that does not count any more: nothing is known about them.

    A photo that was asked for again and had not changed is told by a later part than the one that holds it.
    """
    elsewhere = pc.or_(pc.is_null(rows["file"]), pc.invert(pc.starts_with(rows["file"], "parts/")))
    return rows.filter(pc.or_(pc.fill_null(elsewhere, True), pc.is_in(rows["file"], tars)))


def _range(keys: np.ndarray, first: int, after: int) -> tuple[int, int]:
    """Start and length of the sorted keys that are in [first, after)."""
    start = int(np.searchsorted(keys, np.uint64(first)))
    end = len(keys) if after > 2**64 - 1 else int(np.searchsorted(keys, np.uint64(after)))
    return start, end - start


def _with_placeholders(rows: pa.Table, fake: pa.ChunkedArray) -> pa.Table:
    code = pc.if_else(fake, "placeholder", rows["code"].cast(pa.string()))
    detail = pc.if_else(fake, "the same bytes came for many other ids", rows["detail"])
    rows = rows.set_column(rows.schema.get_field_index("code"), "code", code)
    return rows.set_column(rows.schema.get_field_index("detail"), "detail", detail)


def _read(store: Path, part: Part, columns: list[str]) -> pa.Table:
    table = pq.read_table(store / "parts" / part.table, columns=columns)
    return table.cast(pa.schema([_PLAIN.field(name) for name in columns]))


def is_merged(store: Path, parts: Sequence[Part]) -> bool:
    """Whether the store's tables are there, and of just these parts."""
    return _bear(store, {_MADE_FROM: _names_of(store, parts)})


def _names_of(store: Path, parts: Sequence[Part]) -> bytes:
    names = [*(part.table for part in parts), *lost_keys(store)]
    return hashlib.sha256(" ".join(names).encode()).hexdigest().encode()


def _bear(store: Path, marks: dict[bytes, bytes]) -> bool:
    try:
        return all(marks.items() <= (pq.read_schema(store / name).metadata or {}).items() for name in STORE_TABLES)
    except (OSError, pa.ArrowInvalid):
        return False
