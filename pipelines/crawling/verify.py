"""Reading a photo store from end to end: is every photo where the index says, whole, once, and is all of it told?"""

import hashlib
import itertools
import mmap
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pbe_core.progress import Progress
from pbe_core.words import number_of
from pipelines.crawling.merging import STORE_TABLES, is_merged
from pipelines.crawling.parts import Part, latest_round, read_part
from pipelines.crawling.rounds import read_parts, read_round_record
from pipelines.threads import in_order
from schemas.outcomes import OK
from schemas.tables import PHOTO_INDEX, with_plain_words

_THREADS = 2
_PLACE = with_plain_words(
    pa.schema([PHOTO_INDEX.field(name) for name in ("split", "photo_id", "file", "offset", "length", "sha256")])
)


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
    recorded = {f"parts/{name}": (part, sha256) for part in parts for name, (_, sha256) in part.tars.items()}
    unread = sorted(recorded.keys() - set(pc.unique(rows["file"]).to_pylist()))
    total = pc.count_distinct(rows["file"]).as_py() + len(unread)
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        Progress("verifying", total, "files") as progress,
    ):
        files = itertools.chain(_by_file(rows), ((file, _PLACE.empty_table()) for file in unread))
        work = ((store / file, photos, recorded.get(file)) for file, photos in files)
        for found in in_order(pool, lambda item: _check_file(*item), work, ahead=4 * _THREADS):
            problems += found
            progress.update()
    return problems, len(index)


def _check_records(store: Path) -> Iterator[str]:
    """Parts that should be there and are not whole."""
    newest = latest_round(store)
    named = read_round_record(store, newest)["parts"] if newest else []
    for name in named:
        path = store / "parts" / f"{name}.json"
        if read_part(path) is None:
            yield (
                f"{path}: this part's record, or a file that it names, is missing or of another size; "
                f"crawl again, which gets its photos anew"
            )
    for path in sorted((store / "parts").glob(f"{newest:06d}-*.json")):
        if read_part(path) is None:
            yield f"{path}: a file that this record names is missing or of another size; crawl again, which gets its photos anew"


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
            told = f"{number_of(len(rows), 'photo')}, status.parquet says {codes[code]}"
            yield f"{store / name}: {told}; remove both files and crawl again"


def _by_file(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Each file with its rows, where rows are sorted by file."""
    runs = pc.run_end_encode(rows["file"].combine_chunks())
    start = 0
    for file, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield file, rows.slice(start, end - start)
        start = end


def _check_file(path: Path, rows: pa.Table, recorded: tuple[Part, str] | None) -> list[str]:
    """What is wrong with a file and the photos in it."""
    try:
        with path.open("rb") as file:
            problems = []
            if recorded and hashlib.file_digest(file, "sha256").hexdigest() != recorded[1]:
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
