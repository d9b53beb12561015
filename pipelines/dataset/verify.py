"""Is a dataset whole? Sizes and hashes of its files, its tables against each other, and every sample decoded as training does it.

    plan ──▶ tables ──▶ each shard: commit record ──▶ size, SHA-256 ──▶ part of the index against the plan ──▶ CRC-32, decode

The SHA-256 of a tar and of its part of the index covers each of their bytes: it says that something is wrong. The index has a
CRC-32 of each member, which says which sample is hurt. Whatever is wrong becomes a finding, never an exception.
"""

import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt64

from pbe_core.dataset_reader import find_imbalance, member_places, read_dataset
from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.progress import Progress
from pbe_core.randomness import generator, hash_column
from pbe_core.sample_codec import decode_sample
from pbe_core.words import number_of
from pipelines.dataset.finalize import count_all, count_splits, counted
from pipelines.dataset.folder import Record
from pipelines.dataset.plan_shards import Plan
from pipelines.dataset.write_plan import PLAN_RECORD, PLAN_TABLES, SELECTION_RECORD, accepted_fingerprints, read_selection
from pipelines.threads import in_order
from schemas.dataset import DatasetInfo
from schemas.tables import FAILURES, INDEX, SHARD_RECORDS

SHOWN = 20
"""Findings that are kept of one shard, and of all that is no shard; the rest are counted."""
Repair = Literal["pack", "finalize", "plan", "remove"]
"""What makes it whole again: to pack the shard anew, to finalize the dataset anew, to put the plan right, to remove a file."""
_FINALIZE = "the build makes it again"
_REPLAN = (
    f"remove {SELECTION_RECORD} and run the build again, which makes objects, rejects and plan anew from the annotations; if "
    f"this dataset was extended, put the file back from a copy instead"
)
_RECORD_PLAN = f"remove {PLAN_RECORD} and run the build again, which writes it anew"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset."""

    problem: str
    """A sentence."""
    repair: Repair
    shard: str | None = None
    """The shard that is hurt; null where it is the dataset's own tables."""
    key: str | None = None
    """The sample that is hurt, where one is known to be."""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.shard, self.key and f"sample {self.key}") if part)
        return f"{place}: {self.problem}" if place else self.problem


@dataclass
class Verified:
    """What came of looking at a dataset."""

    findings: list[Finding] = field(default_factory=list)
    more: Counter[str] = field(default_factory=Counter)
    """Shard -> findings beyond the first `SHOWN`."""
    shards: int = 0
    """Shards that were looked at."""
    samples: int = 0
    """Samples that were read and decoded."""
    of_samples: int = 0
    """Samples in these shards."""


@dataclass
class _Shard:
    """What a shard is checked against, and what came of that."""

    name: str
    planned: list[str]
    """Keys of its planned samples."""
    chosen: Collection[int] | None
    """Places of the samples that are read; null reads all of them, and hashes the tar."""
    findings: list[Finding] = field(default_factory=list)
    keys: UInt64[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hash of each key in its part of the index: 8 bytes of memory for each sample of the dataset."""
    samples: int = 0


def verify_dataset(folder: Path, sample: int | None = None, threads: int = 2) -> Verified:
    """Check everything that a dataset folder says of itself.

    Args:
        folder: of the dataset.
        sample: so many samples are read, chosen at random but always the same ones; null reads all, and hashes all files.
        threads: shards that are read at once.

    Raises:
        InputError: no dataset is there, its build is not finished, or it is of another format version.
    """
    info = _read_info(folder)
    with Progress("checking the plan"):
        verified = Verified(list(_check_plan(folder)))
    if verified.findings:  # Nobody knows what the shards should hold.
        return verified
    plan, fingerprints = Plan(folder / "plan.parquet"), accepted_fingerprints(folder)
    records: dict[str, Record] = {}
    with Progress("checking the tables"):
        verified.findings += _read_records(folder, plan, records)
        verified.findings += _Tables(folder, info, plan, records).findings()
    counts = [records[shard]["samples"] if shard in records else 0 for shard in plan.shards]
    places: Sequence[frozenset[int] | None] = [None] * len(counts) if sample is None else choose(counts, sample)
    total = sum(record["bytes"] for record in records.values())
    keys = {}
    with ThreadPoolExecutor(threads) as pool, Progress("verifying", total, "B") as progress:
        shards = (
            _Shard(name, rows["key"].to_pylist(), chosen)
            for (name, rows), chosen in zip(plan.tables(["key"]), places, strict=True)
            if name in records
        )
        check = partial(_check_shard, folder / "shards", records, fingerprints)
        for shard in in_order(pool, check, shards, ahead=2 * threads):
            verified.findings += shard.findings[:SHOWN]
            verified.more[shard.name] += max(0, len(shard.findings) - SHOWN)
            keys[shard.name] = shard.keys
            verified.samples += shard.samples
            verified.of_samples += len(shard.keys)
            verified.shards += 1
            progress.update(records[shard.name]["bytes"])
    verified.findings += find_duplicates(folder, keys)
    return verified


def choose(counts: Sequence[int], sample: int) -> list[frozenset[int]]:
    """A random choice among all samples, the same each time: their places in each shard, where each has so many samples."""
    total = sum(counts)
    numbers = np.sort(generator(0, "verify").choice(total, min(sample, total), replace=False))
    ends = list(itertools.accumulate(counts))
    parts = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
    return [frozenset((part - (end - count)).tolist()) for part, end, count in zip(parts, ends, counts, strict=True)]


def _read_info(folder: Path) -> DatasetInfo | None:
    """dataset.json; null where it is damaged, which is a finding. Raises InputError as `verify_dataset`."""
    try:
        info = read_dataset(folder)
    except InputError as error:
        if not (folder / "dataset.json").is_file() or "format version" in str(error):
            raise
        return None
    url = info.settings.get("upload")
    if url and not any((folder / "shards").glob("*.tar")):
        raise InputError(f"{folder}: the shards of this dataset are at {url}; copy it to a folder to verify it")
    return info


def _attempt(check: Callable[[], Iterable[Finding]], file: str, repair: Repair, way_out: str) -> Iterator[Finding]:
    """The findings of a check; that its file cannot be read is one of them."""
    try:
        yield from check()
    except Exception as error:  # What readers raise on damaged files has no end.
        cause = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({_first_line(error)})"
        yield Finding(f"{file} {cause}; {way_out}", repair)


def _check_plan(folder: Path) -> Iterator[Finding]:
    """The plan's record, and the tables that were made with the plan, by their hashes."""

    def check_selection() -> Iterator[Finding]:
        hashes = json.loads((folder / SELECTION_RECORD).read_bytes())["sha256"]
        read_selection(folder)
        for name in PLAN_TABLES:
            yield from _attempt(partial(check_table, name, hashes.get(name)), name, "plan", _REPLAN)

    def check_table(name: str, sha256: str | None) -> Iterator[Finding]:
        if file_sha256(folder / name) != sha256:
            yield Finding(f"{name} is not what {SELECTION_RECORD} says (SHA-256); {_REPLAN}", "plan")

    def check_record() -> Iterable[Finding]:
        accepted_fingerprints(folder)
        return ()

    yield from _attempt(check_record, PLAN_RECORD, "plan", _RECORD_PLAN)
    yield from _attempt(check_selection, SELECTION_RECORD, "plan", _REPLAN)


def _read_records(folder: Path, plan: Plan, records: dict[str, Record]) -> Iterator[Finding]:
    """Commit records without their failed samples, in the order of the plan. Those that cannot be read are told."""
    for shard in plan.shards:
        try:
            record = _read_record(folder / "shards", shard)
            records[shard] = {name: record[name] for name in SHARD_RECORDS.names}
        except Exception as error:
            cause = error.strerror if isinstance(error, OSError) else _first_line(error)
            yield Finding(f"its commit record cannot be read ({cause})", "pack", shard)


def _read_record(shards: Path, shard: str) -> Record:
    """A commit record; raises whatever there is to raise where a field is missing or has a wrong type."""
    record: Record = json.loads((shards / f"{shard}.json").read_bytes())
    if record["shard"] != shard:
        raise ValueError(f"it is of {record['shard']}")
    pa.Table.from_pylist([{name: record[name] for name in SHARD_RECORDS.names}], schema=SHARD_RECORDS)
    failed = [{name: {"shard": shard, **failure}[name] for name in FAILURES.names} for failure in record["failed_samples"]]
    pa.Table.from_pylist(failed, schema=FAILURES)
    return record


@dataclass(frozen=True)
class _Tables:
    """What finalizing put together from the shards, and files that are of no shard."""

    folder: Path
    info: DatasetInfo | None
    plan: Plan
    records: Mapping[str, Record]

    def findings(self) -> Iterator[Finding]:
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            "shard_records.parquet": self._records,
            "shards/sizes.json": self._sizes,
            "index.parquet": self._index,
            "dataset.json": self._info,
        }
        if len(self.records) == len(self.plan.shards):  # What is missing is told elsewhere.
            checks |= {"failures.parquet": self._failures, "dataset.json: counts": self._counts}
        for file, check in checks.items():
            yield from _attempt(check, file, "finalize", _FINALIZE)
        known = {f"{shard}{ending}" for shard in self.plan.shards for ending in (".tar", ".index.parquet", ".json")}
        shards = self.folder / "shards"
        for name in sorted({path.name for path in shards.iterdir()} - known - {"sizes.json"} if shards.is_dir() else ()):
            yield Finding(f"shards/{name} is of no planned shard; remove it, or move it elsewhere", "remove")

    def _records(self) -> Iterator[Finding]:
        rows = pq.read_table(self.folder / "shard_records.parquet").to_pylist(maps_as_pydicts="strict")
        if [row["shard"] for row in rows] != list(self.plan.shards):
            yield _differ("shard_records.parquet is")
        for row in rows:
            record = self.records.get(row["shard"], row)
            names = ", ".join(name for name in record if row.get(name) != record[name])
            if names:
                yield Finding(f"its commit record and shard_records.parquet differ ({names})", "pack", row["shard"])

    def _sizes(self) -> Iterator[Finding]:
        sizes = json.loads((self.folder / "shards" / "sizes.json").read_bytes())
        right = {f"{shard}.tar": record["samples"] for shard, record in self.records.items()}
        if list(sizes) != [f"{shard}.tar" for shard in self.plan.shards] or not right.items() <= sizes.items():
            yield _differ("shards/sizes.json is")

    def _index(self) -> Iterator[Finding]:
        with pq.ParquetFile(self.folder / "index.parquet") as index:
            if index.num_row_groups != len(self.plan.shards):
                yield _differ("index.parquet is")
                return
            for group, shard in enumerate(self.plan.shards):
                part = _read_part(self.folder / "shards", self.records[shard]) if shard in self.records else None
                if part is not None and not index.read_row_group(group).equals(part):
                    yield _differ(f"index.parquet: rows of {shard} are")

    def _failures(self) -> Iterator[Finding]:
        shards = [record["shard"] for record in counted(self.records.values(), self.plan.shards) if record["failed"]]
        listed = (
            {"shard": shard, **failure}
            for shard in shards
            for failure in _read_record(self.folder / "shards", shard)["failed_samples"]
        )
        rows = (row for batch in pq.ParquetFile(self.folder / "failures.parquet").iter_batches() for row in batch.to_pylist())
        for one, other in itertools.zip_longest(listed, rows):
            if one != other:  # Nothing else repeats these words, so neither of the two can be believed.
                yield Finding("its commit record and failures.parquet differ", "pack", (one or other)["shard"])
                return

    def _info(self) -> Iterator[Finding]:
        if self.info is None:
            raise ValueError("it is no manifest of a dataset")
        content = json.loads((self.folder / PLAN_RECORD).read_bytes())["fingerprint"]
        planned = content["settings"]["views"]["size"], content["settings"]["masks"]["per_view"], content["vae"]
        made = self.info.view_size, self.info.masks_per_view, self.info.vae.sha256
        if self.info.fingerprint not in accepted_fingerprints(self.folder) or planned != made:
            yield Finding(f"dataset.json is of another plan than {PLAN_RECORD}; {_FINALIZE}", "finalize")
        imbalance = find_imbalance(self.info.books)
        if imbalance:
            yield Finding(f"dataset.json: the counts do not balance: {imbalance}; {_FINALIZE}", "finalize")

    def _counts(self) -> Iterator[Finding]:
        if self.info and self.info.books != count_all(self.folder, counted(self.records.values(), self.plan.shards)):
            yield _differ("dataset.json: books are")
        if self.info and self.info.splits != count_splits(list(self.records.values())):
            yield _differ("dataset.json: splits are")


def _differ(what: str) -> Finding:
    return Finding(f"{what} not what the commit records say; {_FINALIZE}", "finalize")


def _check_shard(shards: Path, records: Mapping[str, Record], fingerprints: Collection[str], shard: _Shard) -> _Shard:
    """Everything that can be said of one shard."""
    try:
        for key, problem in _shard_problems(shards, records[shard.name], fingerprints, shard):
            shard.findings.append(Finding(problem, "pack", shard.name, key))
    except Exception as error:  # Damage has no limits; what no check foresaw is told all the same.
        shard.findings.append(Finding(f"cannot be checked ({_first_line(error)})", "pack", shard.name))
    return shard


def _shard_problems(
    shards: Path, record: Record, fingerprints: Collection[str], shard: _Shard
) -> Iterator[tuple[str | None, str]]:
    """The story of a check: the sample that is hurt, where one is known to be, and a sentence."""
    if record["fingerprint"] not in fingerprints:
        yield None, f"its commit record is of another plan ({record['fingerprint'][:12]}...)"
    for name, size, sha256, hashed in (
        (f"{shard.name}.tar", record["bytes"], record["sha256"], shard.chosen is None),
        (f"{shard.name}.index.parquet", record["index_bytes"], record["index_sha256"], True),
    ):
        try:
            found = (shards / name).stat().st_size
            if found != size:
                yield None, f"shards/{name} has {number_of(found, 'byte')}, its commit record says {size:,}"
            if hashed and file_sha256(shards / name) != sha256:
                yield None, f"shards/{name} is not what was written (SHA-256)"
        except OSError as error:
            yield None, f"shards/{name} cannot be read ({error.strerror})"
    part = _read_part(shards, record)
    if part is None or not (shards / f"{shard.name}.tar").is_file():
        return
    keys = part["key"].to_pylist()
    shard.keys = hash_column(pa.array(keys, pa.string()), "key")
    failed = [failure["key"] for failure in _read_record(shards, shard.name)["failed_samples"]]
    if (record["samples"], record["failed"], record["planned"]) != (len(keys), len(failed), len(keys) + len(failed)):
        counts = f"{record['samples']} samples and {record['failed']} failed of {record['planned']}"
        yield None, f"its commit record counts {counts}, its index has {len(keys)}, and its list of failures {len(failed)}"
    yield from _key_problems(keys, shard.planned, failed)
    with (shards / f"{shard.name}.tar").open("rb") as tar:
        for number, row in enumerate(part.to_pylist()):
            if shard.chosen is None or number in shard.chosen:
                shard.samples += 1
                yield from ((row["key"], problem) for problem in _sample_problems(tar, row))


def _key_problems(keys: list[str], planned: list[str], failed: list[str]) -> Iterator[tuple[str | None, str]]:
    """The index must have the planned samples in their order, but for those that failed."""
    due = [key for key in planned if key not in {*failed}]
    if keys == due:
        return
    for key in sorted({*due} - {*keys}):
        yield key, "was planned and has not failed, but is not in the index"
    for key in sorted({*keys} - {*due}):
        yield key, "is in the index, and has failed or was not planned for this shard"
    if {*keys} == {*due}:
        yield None, "its samples do not stand in the index as in the plan"


def _sample_problems(tar: BinaryIO, row: Mapping[str, Any]) -> Iterator[str]:
    """One sample of a tar: the bytes of its members, then what they say."""
    members, places = {}, member_places(row)
    for name, place in places.items():
        tar.seek(place["offset"])
        members[name] = tar.read(place["length"])
    hurt = [name for name, place in places.items() if zlib.crc32(members[name]) != place["crc32"]]
    if hurt:
        yield f"member {', '.join(hurt)} is not what was written (CRC-32)"
        return
    try:
        sample = decode_sample(members, "it cannot be decoded")
        if sample.record.key != row["key"]:
            yield f"its record is of {sample.record.key}"
    except InputError as error:
        yield str(error)


def _read_part(shards: Path, record: Record) -> pa.Table | None:
    """A shard's part of the index; null where it is not what its commit record says."""
    path = shards / f"{record['shard']}.index.parquet"
    if not path.is_file() or file_sha256(path) != record["index_sha256"]:
        return None
    return pq.read_table(path, schema=INDEX)


def find_duplicates(folder: Path, hashes: Mapping[str, UInt64[np.ndarray, " samples"]]) -> Iterator[Finding]:
    """Keys that are there twice, by their hashes (shard -> of its keys); strings are read of those alone that may be."""
    together = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes.values()]))
    twice = np.unique(together[1:][together[1:] == together[:-1]])
    first: dict[str, str] = {}
    for shard in (shard for shard, own in hashes.items() if np.isin(own, twice).any()):
        keys = pq.read_table(folder / "shards" / f"{shard}.index.parquet", columns=["key"])["key"].to_pylist()
        for key in itertools.compress(keys, np.isin(hashes[shard], twice)):
            if key in first:
                yield Finding(f"the same key is in {first[key]} too, so the plan is wrong; {_REPLAN}", "plan", shard, key)
            first.setdefault(key, shard)


def _first_line(error: BaseException) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
