"""Is a dataset whole? Sizes and hashes of its files, its tables against each other, and every sample decoded as training does it.

    plan ──▶ commit records ──▶ tables ──▶ each shard: size, SHA-256 ──▶ part of the index against the plan ──▶ CRC-32, decode

The SHA-256 of a tar and of its part of the index covers each of their bytes: it says that something is wrong. The index has a
CRC-32 of each member, which says which sample is hurt. Whatever is wrong becomes a finding, never an exception.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.buckets import Shape, square_side
from pbe_core.dataset_reader import member_places, read_dataset
from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.progress import Progress
from pbe_core.sample_codec import decode_sample
from pbe_core.words import number_of
from pipelines.dataset.finalize import count_all, count_splits, counted, in_columns_of, index_schema
from pipelines.dataset.folder import Record
from pipelines.dataset.plan_shards import Plan
from pipelines.dataset.write_plan import (
    PLAN_RECORD,
    PLAN_TABLES,
    SELECTION_RECORD,
    accepted_fingerprints,
    holds_means_only,
    read_selection,
)
from pipelines.threads import in_order
from schemas.dataset import DatasetInfo, shard_shape
from schemas.tables import FAILURES, SHARD_RECORDS

SHOWN = 20
"""Findings that are kept of one shard; the rest are counted."""
_THREADS = min(8, os.cpu_count() or 1)
_REPLAN = (
    f"remove {SELECTION_RECORD} and run the build again, which makes objects, rejects and plan anew from the annotations; if "
    f"this dataset was extended, put the file back from a copy instead"
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset."""

    problem: str
    """A sentence."""
    repair: Literal["pack", "finalize", "plan", "remove"]
    """What makes it whole again: to pack the shard anew, to finalize anew, to put the plan right, to remove a file."""
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
    url: str | None = None
    """Where the build keeps the dataset, if this folder is a copy; null also where dataset.json is damaged."""
    shards: int = 0
    """Shards that were looked at."""
    samples: int = 0
    """Samples that were read and decoded."""
    of_samples: int = 0
    """Samples in these shards, as their commit records say."""


def verify_dataset(folder: Path, sample: int | None = None) -> Verified:
    """Check everything that a dataset folder says of itself.

    Args:
        folder: of the dataset.
        sample: at most so many samples are read, evenly spread, and no tar is hashed; null reads and hashes all.

    Raises:
        InputError: no dataset is there, its build is not finished, or it is of another format version.
    """
    info = _read_info(folder)
    with Progress("checking the plan"):
        verified = Verified(list(_check_plan(folder)), info.settings.get("upload") if info else None)
    if verified.findings:  # Nobody knows what the shards should hold.
        return verified
    plan = Plan(folder / "plan.parquet")
    with Progress("checking the tables"):
        records = _read_records(folder, plan, verified.findings)
        verified.findings += _check_tables(folder, info, plan, records)
    verified.shards = len(records)
    verified.of_samples = sum(record["samples"] for record in records.values())
    every = -(-verified.of_samples // sample) if sample else 1

    def tasks() -> Iterator[tuple[Record, list[str], range | None]]:
        start = 0
        for shard, rows in plan.tables(["key"]):
            if shard in records:
                count = records[shard]["samples"]
                yield records[shard], rows["key"].to_pylist(), range(-start % every, count, every) if sample else None
                start += count

    total = sum(record["bytes"] for record in records.values())
    check = partial(_check_shard, folder / "shards", means_only=holds_means_only(folder))
    with ThreadPoolExecutor(_THREADS) as pool, Progress("verifying", total, "B") as progress:
        for record, findings, read in in_order(pool, check, tasks(), ahead=2 * _THREADS):
            verified.findings += findings
            verified.samples += read
            progress.update(record["bytes"])
    return verified


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


def _problem(file: str, is_whole: Callable[[], object], otherwise: str) -> str | None:
    """What is wrong with a file, in words; null where it is whole. What readers raise on damaged files has no end."""
    try:
        return None if is_whole() else f"{file} {otherwise}"
    except FileNotFoundError:
        return f"{file} is not there"
    except Exception as error:
        return f"{file} cannot be read ({_first_line(error)})"


def _check_plan(folder: Path) -> Iterator[Finding]:
    """The plan's records, and the tables that were made with the plan, by their hashes."""
    hashes: dict[str, str] = {}

    def read_hashes() -> bool:
        hashes.update(json.loads((folder / SELECTION_RECORD).read_bytes())["sha256"])
        return bool(read_selection(folder) and hashes)

    problem = _problem(PLAN_RECORD, lambda: accepted_fingerprints(folder), "is empty")
    if problem:
        yield Finding(f"{problem}; remove {PLAN_RECORD} and run the build again, which writes it anew", "plan")
    problems = [_problem(SELECTION_RECORD, read_hashes, "has no hashes")]
    for name in PLAN_TABLES if hashes else ():
        is_whole = partial(lambda name: file_sha256(folder / name) == hashes.get(name), name)
        problems.append(_problem(name, is_whole, f"is not what {SELECTION_RECORD} says (SHA-256)"))
    yield from (Finding(f"{problem}; {_REPLAN}", "plan") for problem in problems if problem)


def _read_records(folder: Path, plan: Plan, findings: list[Finding]) -> dict[str, Record]:
    """Commit records of this plan without their failed samples, in its order. What is wrong with others becomes findings."""
    records: dict[str, Record] = {}
    copies: dict[str, Record] = {}
    fingerprints = accepted_fingerprints(folder)
    with contextlib.suppress(Exception):  # `_check_tables` says what is wrong with it.
        rows = pq.read_table(folder / "shard_records.parquet").to_pylist(maps_as_pydicts="strict")
        copies = {row["shard"]: row for row in rows}
    for shard in plan.shards:
        try:
            whole = _read_record(folder / "shards", shard)
            record = {name: whole[name] for name in SHARD_RECORDS.names}
            if record["shard"] != shard or record["fingerprint"] not in fingerprints:
                raise ValueError(f"it is of {record['shard']}, and of plan {record['fingerprint'][:12]}...")
            differing = [name for name in record if record[name] != copies.get(shard, record)[name]]
            if differing:
                raise ValueError(f"it and shard_records.parquet differ: {', '.join(differing)}")
            records[shard] = record | {name: whole[name] for name in ("references", "lost_references") if name in whole}
        except Exception as error:
            findings.append(Finding(f"its commit record is not whole ({_first_line(error)})", "pack", shard))
    return records


def _read_record(shards: Path, shard: str) -> Record:
    """A commit record; raises whatever there is to raise where a field is missing or has a wrong type."""
    record: Record = json.loads((shards / f"{shard}.json").read_bytes())
    pa.Table.from_pylist([{name: record[name] for name in SHARD_RECORDS.names}], schema=SHARD_RECORDS)
    failed = [{name: {"shard": shard, **failure}[name] for name in FAILURES.names} for failure in record["failed_samples"]]
    pa.Table.from_pylist(failed, schema=FAILURES)
    return record


def _check_tables(folder: Path, info: DatasetInfo | None, plan: Plan, records: Mapping[str, Record]) -> Iterator[Finding]:
    """What finalizing put together from the shards, and files that are of no shard."""
    shards = folder / "shards"
    known = {f"{shard}{ending}" for shard in plan.shards for ending in (".tar", ".index.parquet", ".json")}
    for name in sorted({path.name for path in shards.glob("*")} - known - {"sizes.json"}):
        yield Finding(f"shards/{name} is of no planned shard; remove it, or move it elsewhere", "remove")
    if len(records) < len(plan.shards):  # Finalizing comes after packing: all of these are made again.
        return

    def is_index_whole() -> bool:
        """The parts of the shards one after another; a part that is hurt itself is found with its shard."""
        schema = index_schema(records.values())
        found = (_read_part(shards, record) for record in records.values())
        parts = (None if part is None else in_columns_of(schema, part) for part in found)
        with pq.ParquetFile(folder / "index.parquet") as index:
            return index.num_row_groups == len(records) and all(
                part is None or index.read_row_group(group).equals(part) for group, part in enumerate(parts)
            )

    def is_info_whole() -> bool:
        planned = json.loads((folder / PLAN_RECORD).read_bytes())["fingerprint"]
        return (
            info is not None
            and info.fingerprint in accepted_fingerprints(folder)
            and (info.view_size, info.buckets) == _planned_shapes(planned["settings"]["views"])
            and info.masks_per_view == planned["settings"]["masks"]["per_view"]
            and info.vae.sha256 == planned["vae"]
            and info.vae.deterministic == holds_means_only(folder)
            and info.books == count_all(folder, counts)
            and info.splits == count_splits([*records.values()])
        )

    counts = counted(records.values(), plan.shards)
    failed = {record["shard"]: record["failed"] for record in counts if record["failed"]}
    sizes = {f"{shard}.tar": record["samples"] for shard, record in records.items()}
    checks: dict[str, Callable[[], bool]] = {
        "shard_records.parquet": lambda: list(_count_rows(folder / "shard_records.parquet")) == list(records),
        "failures.parquet": lambda: _count_rows(folder / "failures.parquet") == failed,
        "shards/sizes.json": lambda: [*json.loads((shards / "sizes.json").read_bytes()).items()] == [*sizes.items()],
        "index.parquet": is_index_whole,
        "dataset.json": is_info_whole,
    }
    for file, is_whole in checks.items():
        problem = _problem(file, is_whole, "is not what the commit records say")
        if problem:
            yield Finding(f"{problem}; the build makes it again", "finalize")


def _planned_shapes(views: Mapping[str, Any]) -> tuple[int, tuple[Shape, ...] | None]:
    """`view_size` and `buckets` of a dataset that was planned with these settings of views."""
    buckets = tuple((width, height) for width, height in views.get("buckets") or ())
    return (square_side(buckets), buckets) if buckets else (views["size"], None)


def _count_rows(table: Path) -> dict[str, int]:
    """Rows of each shard in a table, in the order in which shards stand there."""
    return {each["values"]: each["counts"] for each in pq.read_table(table)["shard"].value_counts().to_pylist()}


def _check_shard(
    shards: Path, task: tuple[Record, list[str], range | None], *, means_only: bool
) -> tuple[Record, list[Finding], int]:
    """The record, what is wrong with its shard (at most `SHOWN` findings, and one that counts the rest), and samples read.

    Args:
        shards: the folder.
        task: commit record, keys of the planned samples, places of those that are read; null reads all, and hashes the tar.
        means_only: as in `decode_sample`.
    """
    record, planned, places = task
    problems: list[tuple[str | None, str]] = []
    read, tar = 0, shards / f"{record['shard']}.tar"
    try:
        problems += _file_problems(shards, record, hashed=places is None)
        part = _read_part(shards, record)
        if part is not None and tar.is_file():
            failed = {failure["key"] for failure in _read_record(shards, record["shard"])["failed_samples"]}
            problems += _key_problems(part["key"].to_pylist(), [key for key in planned if key not in failed])
            rows = [row for place, row in enumerate(part.to_pylist()) if places is None or place in places]
            problems += _sample_problems(tar, rows, means_only)
            read = len(rows)
    except Exception as error:  # Damage has no limits; what no check foresaw is told all the same.
        problems.append((None, f"cannot be checked ({_first_line(error)})"))
    if len(problems) > SHOWN:
        problems[SHOWN:] = [(None, f"and {len(problems) - SHOWN:,} more")]
    return record, [Finding(problem, "pack", record["shard"], key) for key, problem in problems], read


def _file_problems(shards: Path, record: Record, hashed: bool) -> Iterator[tuple[None, str]]:
    """Sizes and hashes of the tar, which is hashed only where that is asked for, and of the part of the index."""
    for ending, size, sha256 in (
        (".tar", record["bytes"], record["sha256"] if hashed else None),
        (".index.parquet", record["index_bytes"], record["index_sha256"]),
    ):
        path = shards / f"{record['shard']}{ending}"
        try:
            found = path.stat().st_size
            if found != size:
                yield None, f"shards/{path.name} has {number_of(found, 'byte')}, its commit record says {size:,}"
            elif sha256 and file_sha256(path) != sha256:
                yield None, f"shards/{path.name} is not what was written (SHA-256)"
        except OSError as error:
            yield None, f"shards/{path.name} cannot be read ({error.strerror})"


def _key_problems(keys: list[str], due: list[str]) -> Iterator[tuple[str | None, str]]:
    """The index must have the planned samples in their order, but for those that failed."""
    for key in sorted({*due} - {*keys}):
        yield key, "was planned and has not failed, but is not in the index"
    for key in sorted({*keys} - {*due}):
        yield key, "is in the index, and has failed or was not planned for this shard"
    if keys != due and {*keys} == {*due}:
        yield None, "its samples do not stand in the index as in the plan"


def _sample_problems(tar: Path, rows: list[dict[str, Any]], means_only: bool) -> Iterator[tuple[str, str]]:
    """Samples of a tar by their rows of the index: the bytes of the members, then what they say."""
    with tar.open("rb") as file:
        for row in rows:
            members, places = {}, member_places(row)
            for name, place in places.items():
                file.seek(place["offset"])
                members[name] = file.read(place["length"])
            hurt = [name for name, place in places.items() if zlib.crc32(members[name]) != place["crc32"]]
            if hurt:
                yield row["key"], f"member {', '.join(hurt)} is not what was written (CRC-32)"
                continue
            try:
                sample = decode_sample(members, "it cannot be decoded", means_only=means_only)
                if len(sample.record.references) != len(row.get("refs_jpg") or ()):
                    yield row["key"], "its record and the index differ in the number of references"
                if sample.record.key != row["key"]:
                    yield row["key"], f"its record is of {sample.record.key}"
                shape = shard_shape(tar.stem)
                if shape and sample.masks.shape[:0:-1] != shape:
                    yield row["key"], "its view is {} x {} px, its shard's {} x {}".format(*sample.masks.shape[:0:-1], *shape)
            except InputError as error:
                yield row["key"], str(error)


def _read_part(shards: Path, record: Record) -> pa.Table | None:
    """A shard's part of the index; null where it is not what its commit record says."""
    path = shards / f"{record['shard']}.index.parquet"
    if not path.is_file() or file_sha256(path) != record["index_sha256"]:
        return None
    return pq.read_table(path)


def _first_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
