"""All parts -> the tables of a photo store (status, failures, index, quarantine), and the check of a store from end to end.

    parts (each sorted by key) ──a range of keys at a time──▶ latest row of each photo ──▶ status.parquet, failures.parquet
                                                                                    └────▶ index.parquet, quarantine.parquet

The latest part that knows a photo counts. Memory holds one range of keys, and eight bytes of the hash of each photo, by which
placeholders are found.
"""

import hashlib
import itertools
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from pbe_core.files import atomic_file
from pbe_core.photo_files import hash_bytes
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pipelines.crawling.rounds import Part, due_parts, lost_keys, read_part, read_parts
from pipelines.threads import in_order
from schemas.outcomes import OK, OUTCOMES
from schemas.tables import PHOTO_INDEX, PHOTO_STATUS, STORED_PHOTOS, with_plain_words

PLACEHOLDER_IDS = 10
"""The same bytes under so many ids, where no OriginalMD5 vouches for them, are a placeholder."""
_ROWS_AT_ONCE = 200_000
_THREADS = 2
_MADE_FROM = b"made from"
_PLAIN = with_plain_words(STORED_PHOTOS)
_PLACE = with_plain_words(
    pa.schema([PHOTO_INDEX.field(name) for name in ("split", "photo_id", "file", "offset", "length", "sha256")])
)
# The status comes last: it bears the mark that says that all four are there.
STORE_TABLES = {
    "index.parquet": PHOTO_INDEX,
    "quarantine.parquet": PHOTO_INDEX,
    "failures.parquet": PHOTO_STATUS,
    "status.parquet": PHOTO_STATUS,
}


def merge(store: Path, parts: Sequence[Part]) -> None:
    """Write the store's tables, unless they are of just these parts.

    Args:
        store: the photo store.
        parts: that count, in order.
    """
    if is_merged(store, parts):
        return
    marks = {_MADE_FROM: _names_of(store, parts)}
    placeholders = pa.array(find_placeholders(store, parts), pa.string())
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


def find_placeholders(store: Path, parts: Sequence[Part]) -> list[str]:
    """SHA-256 of the bytes that came for so many ids that they cannot be photos of them all, sorted."""
    # Photos with the first bytes of a hash in common are few: only theirs are read again, and compared in full.
    often = come_often(_first_eight(_placed(store, part)["sha256"]) for part in parts)
    if not len(often):
        return []
    tables = (_placed(store, part) for part in parts)
    rows = [table.filter(pa.array(np.isin(_first_eight(table["sha256"]), often))) for table in tables]
    counts = pa.concat_tables(rows).group_by("sha256").aggregate([("key", "count_distinct")])
    many = counts.filter(pc.greater_equal(counts["key_count_distinct"], PLACEHOLDER_IDS))
    return sorted(many["sha256"].to_pylist())


def come_often(parts: Iterable[UInt64[np.ndarray, " photos"]]) -> UInt64[np.ndarray, " repeated"]:
    """The numbers that come `PLACEHOLDER_IDS` times or more in all parts together. Memory holds all, twice for a moment."""
    found = np.concatenate([np.zeros(0, np.uint64), *parts])
    found.sort()
    last = found[PLACEHOLDER_IDS - 1 :]
    return np.unique(last[last == found[: len(last)]])


def _placed(store: Path, part: Part) -> pa.Table:
    """Keys and hashes of a part's photos that are there and that nothing vouches for."""
    rows = _read(store, part, ["key", "code", "sha256", "verified"])
    there = pc.and_(pc.equal(rows["code"], OK), pc.invert(pc.fill_null(rows["verified"], False)))
    return rows.filter(pc.and_(there, pc.is_valid(rows["sha256"]))).select(["key", "sha256"])


def _first_eight(hashes: pa.ChunkedArray) -> UInt64[np.ndarray, " photos"]:
    """The first eight bytes of each hash, as a number."""
    return np.ascontiguousarray(hash_bytes(hashes)[:, :8]).view(np.uint64)[:, 0]


def count_codes(store: Path, wanted: pa.Array) -> Counter[str]:
    """What became of a build's wanted photos: code -> photos, in the order of `OUTCOMES`; "" for those not asked for yet.

    Args:
        store: the photo store, merged.
        wanted: their keys.
    """
    status = pq.read_table(store / "status.parquet", columns=["key", "code"])
    codes = status["code"].filter(pc.is_in(status["key"], wanted)).cast(pa.string())
    counts = Counter({item["values"]: item["counts"] for item in pc.value_counts(codes).to_pylist()})
    ordered = Counter({code: counts[code] for code in OUTCOMES if code in counts})
    if ordered.total() != counts.total() or ordered.total() > len(wanted):
        raise RuntimeError(f"{store}: the counts do not balance: {number_of(len(wanted), 'photo')} wanted, and {dict(counts)}")
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

    A photo that was asked for again and had not changed has its row in a later part than the one that holds it.
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


def latest_of_each(keys: UInt64[np.ndarray, " rows"]) -> np.ndarray:
    """Places of the last row of each key, in the order of the keys. Rows come in the order of their parts."""
    _, from_the_end = np.unique(keys[::-1], return_index=True)
    return len(keys) - 1 - from_the_end


def is_merged(store: Path, parts: Sequence[Part]) -> bool:
    """Whether the store's tables are there, and of just these parts."""
    made_from = _names_of(store, parts)
    try:
        return all((pq.read_schema(store / name).metadata or {}).get(_MADE_FROM) == made_from for name in STORE_TABLES)
    except (OSError, pa.ArrowInvalid):
        return False


def _names_of(store: Path, parts: Sequence[Part]) -> bytes:
    names = [*(part.table for part in parts), *lost_keys(store)]
    return hashlib.sha256(" ".join(names).encode()).hexdigest().encode()


def verify_store(store: Path) -> tuple[list[str], int]:
    """Check everything that can be checked without the network.

    Returns:
        What is wrong, a sentence for each, and the number of photos that the index holds.
    """
    with Progress("checking the records"):
        problems = list(_check_records(store))
        parts = read_parts(store)
        problems += _check_tables(store, parts)
    if not all((store / name).is_file() for name in STORE_TABLES):
        return problems, 0
    index, quarantine = (
        pq.read_table(store / name, columns=_PLACE.names).cast(_PLACE) for name in ("index.parquet", "quarantine.parquet")
    )
    rows = pa.concat_tables([index, quarantine]).sort_by([("file", "ascending"), ("offset", "ascending")])
    recorded = {f"parts/{name}": sha256 for part in parts for name, (_, sha256) in part.tars.items()}
    unread = sorted(recorded.keys() - set(pc.unique(rows["file"]).to_pylist()))
    total = pc.count_distinct(rows["file"]).as_py() + len(unread)
    with ThreadPoolExecutor(_THREADS) as pool, Progress("verifying", total, "files") as progress:
        files = itertools.chain(_by_file(rows), ((file, _PLACE.empty_table()) for file in unread))
        work = ((store / file, photos, recorded.get(file)) for file, photos in files)
        for found in in_order(pool, lambda item: _check_file(*item), work, ahead=4 * _THREADS):
            problems += found
            progress.update()
    return problems, len(index)


def _check_records(store: Path) -> Iterator[str]:
    """Parts that should be there and are not whole."""
    for name in due_parts(store):
        path = store / "parts" / f"{name}.json"
        if read_part(path) is None:
            yield (
                f"{path}: this part's record, or a file that it names, is missing or of another size; "
                f"crawl again, which gets its photos anew"
            )


def _check_tables(store: Path, parts: list[Part]) -> Iterator[str]:
    for part in parts:
        path = store / "parts" / part.table
        if hashlib.sha256(path.read_bytes()).hexdigest() != part.table_sha256:
            yield f"{path}: not what was written; remove this file and crawl again"
    missing = [name for name in STORE_TABLES if not (store / name).is_file()]
    if missing:
        yield f"{store}: {', '.join(missing)} missing; crawl again, which makes them from the parts"
        return
    if not is_merged(store, parts):
        yield f"{store}: index.parquet and status.parquet are of other parts than are there; crawl again, which makes them anew"
    status = pq.read_table(store / "status.parquet", columns=["key", "code"])
    codes = Counter(status["code"].cast(pa.string()).to_pylist())
    if pc.count_distinct(status["key"]).as_py() != len(status):
        yield f"{store / 'status.parquet'}: a photo is there twice; remove the file and crawl again"
    for name, code in (("index.parquet", OK), ("quarantine.parquet", "placeholder")):
        rows = pq.read_table(store / name, columns=["key"])
        if pc.count_distinct(rows["key"]).as_py() != len(rows) or (code == OK and len(rows) != codes[code]):
            found = f"{number_of(len(rows), 'photo')}, status.parquet says {codes[code]}"
            yield f"{store / name}: {found}; remove both files and crawl again"


def _by_file(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Each file with its rows, where rows are sorted by file."""
    runs = pc.run_end_encode(rows["file"].combine_chunks())
    start = 0
    for file, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield file, rows.slice(start, end - start)
        start = end


def _check_file(path: Path, rows: pa.Table, recorded: str | None) -> list[str]:
    """What is wrong with a file and the photos in it."""
    try:
        with path.open("rb") as file:
            problems = []
            if recorded and hashlib.file_digest(file, "sha256").hexdigest() != recorded:
                problems.append(f"{path}: not what was written (SHA-256); remove this file and crawl again")
            if not len(rows):
                return problems
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for split, photo_id, _, offset, length, sha256 in zip(*rows.to_pydict().values(), strict=True):
                    photo = data[offset : offset + length]
                    if hashlib.sha256(photo).hexdigest() != sha256:
                        problems.append(f"{path}: {split}/{photo_id} at {offset}: not the photo that was stored (SHA-256)")
            return problems
    except (OSError, ValueError) as error:  # An empty file cannot be mapped.
        return [f"{path}: cannot be read ({error}); {number_of(len(rows), 'photo')} of the index should be in it"]
