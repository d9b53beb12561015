"""Checks of a dataset folder around its shards: which files are there, the plan and its sources, and what sealing put together.

    annotations ──▶ objects, rejects ──▶ plan      made together; selection.json has their hashes
    commit records ──▶ index, shard_records, failures, sizes, dataset.json      made by sealing, and all can be counted again

Tables are read in parts; memory holds two 64-bit hashes of each object, and the commit records without their failed samples.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from pbe_core.dataset_reader import find_imbalance
from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.randomness import hash_column, mix, name_hash
from pipelines.dataset.samples import Row
from pipelines.dataset.verify_dataset import Finding, Mend, first_line, parse_record, read_part, was_extended
from pipelines.dataset.write_plan import PLAN_RECORD, SELECTION_RECORD, fingerprint_hash, read_selection
from schemas.dataset import Books, DatasetInfo, SplitCounts
from schemas.tables import COORDINATES, FAILURES, INDEX, OBJECTS, PLAN, REJECTS, SAME_PHOTOS, SHARD_RECORDS, with_plain_words

# Everything that a build may leave in the folder of a dataset; without those that a check below needs, it is not whole.
ROOT_FILES = frozenset(
    {
        *("objects.parquet", "rejects.parquet", "same_photos.parquet", "plan.parquet", "selection.json", "plan.json"),
        *("shards", "index.parquet", "shard_records.parquet", "failures.parquet", "dataset.json"),
        *("estimate.json", "report.html", "report.json", "contact_sheet.png", "README.md", ".lock"),
    }
)
SHARD_FILES = (".tar", ".index.parquet", ".json")
SIZES = "sizes.json"

_WAY_OUT: Mapping[Mend, str] = {
    "pack": "it has to be packed again",
    "seal": "sealing makes it again",
    "select": f"remove {SELECTION_RECORD} and run the build again, which makes objects, rejects and plan anew from the "
    f"annotations; if this dataset was extended, put the file back from a copy instead",
    "freeze": f"remove {PLAN_RECORD} and run the build again, which writes it anew, and packs again what was packed otherwise",
    "remove": "is it a dataset's?",
}
_OF_OBJECT_IDS = ("object_id", "split", "photo_id", "label", *COORDINATES)


class Unreadable(Exception):
    """Something without which nothing else can be checked cannot be read."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.problem)
        self.finding = finding


@contextmanager
def reading(file: str, mend: Mend) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into `Unreadable`."""
    try:
        yield
    except Exception as error:  # What readers raise on damaged files has no end.
        if isinstance(error, FileNotFoundError):
            cause = "is not there"
        else:
            # An InputError says its own way out, which is the one of a build.
            cause = "cannot be read" if isinstance(error, InputError) else f"cannot be read ({first_line(error)})"
        raise Unreadable(Finding(f"{file} {cause}; {_WAY_OUT[mend]}", mend)) from None


def attempt(check: Callable[[], Iterable[Finding]], file: str, mend: Mend) -> Iterator[Finding]:
    """The findings of a check; that its file cannot be read is one of them."""
    try:
        with reading(file, mend):
            yield from check()
    except Unreadable as error:
        yield error.finding


def check_folder(folder: Path, shards: Iterable[str]) -> Iterator[Finding]:
    """What is in the folder and should not be. What lacks is told by the check that needs it."""
    for path in sorted(folder.iterdir()):
        if path.name not in ROOT_FILES:
            yield Finding(f"{path.name} is none of a dataset's files; {_stray(path)}", "remove")
    known = {f"{shard}{ending}" for shard in shards for ending in SHARD_FILES} | {SIZES}
    for path in sorted((folder / "shards").iterdir()):
        if path.name not in known:
            yield Finding(f"shards/{path.name} is of no planned shard; {_stray(path)}", "remove")


def check_plan_record(folder: Path, info: DatasetInfo) -> Iterator[Finding]:
    """plan.json against dataset.json."""
    content = json.loads((folder / PLAN_RECORD).read_bytes())["fingerprint"]
    settings = content["settings"]
    for name, right, found in (
        ("view_size", settings["views"]["size"], info.view_size),
        ("masks_per_view", settings["masks"]["per_view"], info.masks_per_view),
        ("vae.sha256", content["vae"], info.vae.sha256),
    ):
        if right != found:
            yield Finding(f"dataset.json says {name} {found}, {PLAN_RECORD} {right}; {_WAY_OUT['seal']}", "seal")
    if info.fingerprint != fingerprint_hash(content):
        problem = f"dataset.json is of another plan ({info.fingerprint[:12]}...) than {PLAN_RECORD}"
        yield Finding(f"{problem}; {_WAY_OUT['seal']}", "seal")


def check_selected(folder: Path) -> Iterator[Finding]:
    """The tables that were made from the annotations, each as recorded and readable from end to end."""
    hashes: dict[str, str] = {}
    try:
        with reading(SELECTION_RECORD, "select"):
            hashes = json.loads((folder / SELECTION_RECORD).read_bytes())["sha256"]
            read_selection(folder)
    except Unreadable as error:
        yield error.finding
        return
    for name, schema in (("objects", OBJECTS), ("rejects", REJECTS), ("same_photos", SAME_PHOTOS), ("plan", PLAN)):
        file = f"{name}.parquet"
        yield from attempt(partial(_check_selected_table, folder / file, schema, hashes.get(file)), file, "select")


def _check_selected_table(path: Path, schema: pa.Schema, sha256: str | None) -> Iterator[Finding]:
    if file_sha256(path) != sha256:
        yield Finding(f"{path.name} is not what {SELECTION_RECORD} says (SHA-256); {_WAY_OUT['select']}", "select")
    for batch in _read(path, schema).iter_batches():
        batch.validate(full=True)


def check_plan(folder: Path, shards: Mapping[str, int]) -> Iterator[Finding]:
    """The plan: one row group for each shard, views of objects as objects.parquet has them, each named by its key."""
    plan = pq.ParquetFile(folder / "plan.parquet")
    if plan.metadata.num_row_groups != len(shards):
        yield Finding(f"plan.parquet names a shard twice; {_WAY_OUT['select']}", "select")
        return
    extended = bool(json.loads((folder / PLAN_RECORD).read_bytes()).get("extends"))
    # Shards that were there before a dataset was extended keep their rows, whatever the annotations say now of author or address;
    # what an object's id is made of cannot have changed.
    columns = _OF_OBJECT_IDS if extended else OBJECTS.names
    ids, rows = object_hashes(folder / "objects.parquet", columns)
    if (ids[1:] == ids[:-1]).any():
        yield Finding(f"objects.parquet has an object twice; {_WAY_OUT['select']}", "select")
    for group, shard in enumerate(shards):
        part = plan.read_row_group(group).cast(with_plain_words(PLAN)).combine_chunks()
        own = hash_column(part["object_id"].combine_chunks(), "object")
        places = np.searchsorted(ids, own)
        known = bool((np.r_[ids, np.uint64(0)][places] == own).all())
        positions = part["position"].to_numpy()
        if not (
            known
            and np.array_equal(rows[places], row_hashes(part, columns))
            and part["key"].equals(pc.binary_join_element_wise(part["object_id"], part["view"].cast(pa.string()), "_"))
            and pc.all(pc.equal(part["shard"], shard)).as_py()
            and (np.array_equal(positions, np.arange(len(part))) or (extended and (np.diff(positions) > 0).all()))
        ):
            yield Finding(f"plan.parquet and objects.parquet disagree on shard {shard}; {_WAY_OUT['select']}", "select")


def object_hashes(objects: Path, columns: Sequence[str]) -> tuple[UInt64[np.ndarray, " objects"], UInt64[np.ndarray, " objects"]]:
    """Hashes of each object's id, sorted, and of its row."""
    ids, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for batch in pq.ParquetFile(objects).iter_batches():
        part = pa.Table.from_batches([batch]).cast(with_plain_words(OBJECTS))
        ids.append(hash_column(part["object_id"].combine_chunks(), "object"))
        rows.append(row_hashes(part, columns))
    together = np.concatenate(ids)
    order = np.argsort(together)
    return together[order], np.concatenate(rows)[order]


def row_hashes(objects: pa.Table, columns: Sequence[str]) -> UInt64[np.ndarray, " rows"]:
    """A hash of some columns of each object's row. Text that `hash_column` does not take counts as empty."""
    total = np.zeros(len(objects), np.uint64)
    for name in columns:
        column = objects[name].combine_chunks()
        if pa.types.is_string(column.type):
            hashes = hash_column(pc.fill_null(column, "\0"), name)
        else:
            bits = pc.fill_null(column, -1).to_numpy(zero_copy_only=False).astype(np.float64).view(np.uint64)
            hashes = mix(bits ^ np.uint64(name_hash(name)))
        total = mix(total ^ hashes)
    return total


def read_records(folder: Path, shards: Iterable[str]) -> dict[str, Row]:
    """Commit records by shard, without their failed samples. `check_shard` tells of those that cannot be read."""
    records = {}
    for shard in shards:
        try:
            record = parse_record((folder / "shards" / f"{shard}.json").read_bytes())
        except (OSError, ValueError):
            continue
        records[shard] = {name: record[name] for name in SHARD_RECORDS.names}
    return records


def counted(records: Mapping[str, Row], shards: Mapping[str, int], fingerprint: str) -> dict[str, Row]:
    """Records as the books count them: what failed in a shard before the dataset was extended counts where it was planned then.

    Args:
        records: by shard.
        shards: shard -> samples that are planned in it now.
        fingerprint: of the plan as it is now.
    """
    nothing: Row = {"failed": 0, "failures": {}}
    return {
        shard: record | nothing if was_extended(record, shards[shard], fingerprint) else record
        for shard, record in records.items()
    }


def check_sizes(folder: Path, records: Mapping[str, Row], shards: Sequence[str]) -> Iterator[Finding]:
    """shards/sizes.json: samples per tar."""
    sizes = json.loads((folder / "shards" / SIZES).read_bytes())
    if list(sizes) != [f"{shard}.tar" for shard in shards] or any(
        sizes[f"{shard}.tar"] != record["samples"] for shard, record in records.items()
    ):
        yield Finding(f"shards/{SIZES} is not what the commit records say; {_WAY_OUT['seal']}", "seal")


def check_shard_records(folder: Path, records: Mapping[str, Row], shards: Sequence[str]) -> Iterator[Finding]:
    """shard_records.parquet: the commit records in one table."""
    order = []
    for batch in _read(folder / "shard_records.parquet", SHARD_RECORDS).iter_batches():
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            order.append(row["shard"])
            record = records.get(row["shard"])
            if record is not None and row != record:
                names = ", ".join(name for name in row if row[name] != record[name])
                yield Finding(
                    f"shard_records.parquet: {names} of {row['shard']} not as in its commit record; {_WAY_OUT['seal']}", "seal"
                )
    if order != list(shards):
        yield Finding(f"shard_records.parquet has not one row for each shard, in order; {_WAY_OUT['seal']}", "seal")


def check_index(folder: Path, records: Mapping[str, Row], shards: Sequence[str]) -> Iterator[Finding]:
    """index.parquet: the parts one after another. Parts that are not what was written are told by `check_shard`."""
    order = []
    for shard, rows in by_shard(_read(folder / "index.parquet", INDEX)):
        order.append(shard)
        if shard in records:
            part = read_part(folder / "shards", shard, records[shard])
            if part is not None and not rows.equals(part.combine_chunks()):
                yield Finding(f"index.parquet: rows of {shard} not as in its part; {_WAY_OUT['seal']}", "seal")
    yield from _check_order("index.parquet", order, records, shards, "samples")


def check_failures(folder: Path, records: Mapping[str, Row], shards: Sequence[str]) -> Iterator[Finding]:
    """failures.parquet: the failed samples of all commit records that count (`counted`), one after another."""
    order = []
    for shard, rows in by_shard(_read(folder / "failures.parquet", FAILURES)):
        order.append(shard)
        if shard in records and records[shard]["failed"]:
            failed = parse_record((folder / "shards" / f"{shard}.json").read_bytes())["failed_samples"]
            told = [{name: row[name] for name in row if name != "shard"} for row in rows.to_pylist()]
            if told != failed and [{**row, "detail": ""} for row in told] == [{**row, "detail": ""} for row in failed]:
                # Nothing else repeats these words, so neither of the two can be believed.
                yield Finding("its commit record and failures.parquet differ in details of failed samples", "pack", shard)
            elif told != failed:
                yield Finding(f"failures.parquet: rows of {shard} not as in its commit record; {_WAY_OUT['seal']}", "seal")
    yield from _check_order("failures.parquet", order, records, shards, "failed")


def check_totals(folder: Path, info: DatasetInfo, records: Mapping[str, Row], shards: Mapping[str, int]) -> Iterator[Finding]:
    """dataset.json: its books balance, and are what can be counted in the tables and commit records."""
    imbalance = find_imbalance(info.books)
    if imbalance:
        yield Finding(f"dataset.json: the books do not balance: {imbalance}; {_WAY_OUT['seal']}", "seal")
    if len(records) < len(shards):
        return  # Then the books cannot be counted, and the lack is told elsewhere.
    reasons: Counter[str] = Counter()
    for batch in pq.ParquetFile(folder / "rejects.parquet").iter_batches(columns=["reason"]):
        for entry in pc.value_counts(batch.column("reason").cast(pa.string())).to_pylist():
            reasons[entry["values"]] += entry["counts"]
    rows = list(records.values())
    books = Books(
        boxes=read_selection(folder).boxes,
        objects=pq.ParquetFile(folder / "objects.parquet").metadata.num_rows,
        rejects=dict(reasons),
        planned=sum(shards.values()),
        samples=sum(row["samples"] for row in rows),
        failures=_sum(row["failures"] for row in rows),
        masks=_sum(row["masks"] for row in rows),
        padded_views=sum(row["padded_views"] for row in rows),
    )
    for name in Books.model_fields:
        if getattr(info.books, name) != getattr(books, name):
            problem = f"dataset.json: books.{name} is {getattr(info.books, name)}, counted are {getattr(books, name)}"
            yield Finding(f"{problem}; {_WAY_OUT['seal']}", "seal")
    splits = {
        split: SplitCounts(
            shards=[row["shard"] for row in rows if row["split"] == split],
            samples=sum(row["samples"] for row in rows if row["split"] == split),
            bytes=sum(row["bytes"] for row in rows if row["split"] == split),
        )
        for split in {row["split"] for row in rows}
    }
    if info.splits != splits:
        yield Finding(f"dataset.json: splits are not what the commit records say; {_WAY_OUT['seal']}", "seal")


def by_shard(table: pq.ParquetFile) -> Iterator[tuple[str, pa.Table]]:
    """Runs of rows of one shard; memory holds one part of the table and one shard."""
    shard: str | None = None
    waiting: list[pa.RecordBatch] = []
    for batch in table.iter_batches():
        runs = pc.run_end_encode(batch.column("shard"))
        start = 0
        for name, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
            if waiting and name != shard:
                yield str(shard), pa.Table.from_batches(waiting).combine_chunks()
                waiting = []
            shard = name
            waiting.append(batch.slice(start, end - start))
            start = end
    if waiting:
        yield str(shard), pa.Table.from_batches(waiting).combine_chunks()


def _check_order(
    file: str, order: list[str], records: Mapping[str, Row], shards: Sequence[str], column: str
) -> Iterator[Finding]:
    """Rows come in the order of the plan, for each shard that has any. What a shard without a record has, nobody knows."""
    due = [shard for shard in shards if shard in records and records[shard][column]]
    if [shard for shard in order if shard in records or shard not in shards] != due:
        yield Finding(f"{file} does not hold the rows of each shard, in order; {_WAY_OUT['seal']}", "seal")


def _read(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    table = pq.ParquetFile(path)
    if not table.schema_arrow.equals(schema):
        raise ValueError("other columns than this program writes")
    return table


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _stray(path: Path) -> str:
    if re.fullmatch(r"\..*\.tmp", path.name):
        return "a killed run left it; remove it, or let the next build do so"
    return "remove it, or move it elsewhere"
