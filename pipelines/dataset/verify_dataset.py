"""Checks of one packed shard: its record, its part of the index, its tar, and each sample in it.

    commit record ──▶ sizes, hashes ──▶ index rows as planned ──▶ tar (checking_tars.py) ──▶ samples (checking_samples.py)

Hashes cover every byte, so they say *that* something is wrong. What stands below them says *where*: members are found by the
index, never by walking the tar, so that a damaged header costs its own sample and no other. Checks are generators of sentences.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt64

from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.randomness import hash_column
from pbe_core.words import number_of
from pipelines.dataset.samples import Row
from pipelines.dataset.verify_samples import Expected, check_sample, decode_checked
from pipelines.dataset.verify_tars import BLOCK, Place, check_end, check_layout, check_member, layout
from schemas.sample import SampleRecord
from schemas.tables import FAILURE_CODES, FAILURES, INDEX, SHARD_RECORDS

Told = tuple[str | None, str]
"""Key of the sample that is hurt, null where none is known to be; and a sentence."""
Mend = Literal["pack", "seal", "select", "freeze", "remove"]
"""What makes it whole again: to pack the shard anew, to seal the dataset anew, to make the tables of selection and plan anew, to
write the plan's record anew, or to remove what does not belong there."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset."""

    problem: str
    """A sentence."""
    mend: Mend
    shard: str | None = None
    """The shard that is hurt; null where it is the dataset's own tables."""
    key: str | None = None
    """The sample that is hurt, where one is known to be."""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.shard, self.key and f"sample {self.key}") if part)
        return f"{place}: {self.problem}" if place else self.problem


@dataclass
class Checked:
    """What came of looking at a shard."""

    findings: list[Finding] = field(default_factory=list)
    keys: UInt64[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hash of each key that its index rows name (`key_hashes`)."""
    samples: int = 0
    """Samples that were read."""


def check_shard(
    folder: Path, expected: Expected, shard: str, planned: list[Row], chosen: Collection[int] | None = None
) -> Checked:
    """Everything that can be said of one shard. Whatever is wrong with its files becomes a finding, never an exception.

    Args:
        folder: of the dataset.
        expected: what holds for all of it.
        shard: its name.
        planned: its rows of the plan.
        chosen: places of the samples that are read; null reads all of them, and hashes the tar.
    """
    checked = Checked()
    try:
        for key, problem in _problems(folder / "shards", shard, planned, expected, chosen, checked):
            checked.findings.append(Finding(problem, "pack", shard, key))
    except Exception as error:  # Damage has no limits; what no check foresaw is told all the same.
        checked.findings.append(Finding(f"cannot be checked ({first_line(error)})", "pack", shard))
    return checked


def _problems(
    folder: Path,
    shard: str,
    planned: list[Row],
    expected: Expected,
    chosen: Collection[int] | None,
    checked: Checked,
) -> Iterator[Told]:
    """The story of a check."""
    try:
        record = parse_record((folder / f"{shard}.json").read_bytes())
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        yield None, f"its commit record cannot be read ({cause}); without it nothing else was looked at"
        return
    yield from with_key(None, check_record(record, shard, planned, expected))
    yield from with_key(None, check_files(folder, record, shard, hashed=chosen is None))
    rows = read_rows(folder, shard, record)
    if rows is None:
        yield None, "neither its part of the index nor index.parquet can be read, so its samples were not looked at"
        return
    checked.keys = key_hashes([row["key"] for row in rows])
    yield from check_rows(rows, shard, planned, record)
    places = layout(rows)
    tar = folder / f"{shard}.tar"
    if not tar.is_file():
        return
    size = tar.stat().st_size
    yield from check_layout(places, size)
    by_key = {row["key"]: row for row in planned}
    samples = []
    with tar.open("rb") as file:
        for number, row in enumerate(rows):
            if chosen is None or number in chosen:
                sample = yield from check_stored_sample(file, size, layout([row]), by_key.get(row["key"]), expected)
                samples += [sample] if sample else []
                checked.samples += 1
        if chosen is None:
            yield from with_key(None, check_end(file, places))
    if chosen is None and len(samples) == len(rows):
        yield from with_key(None, check_counts(record, samples))


def parse_record(data: bytes) -> Row:
    """A commit record as it was written: all its fields, of their types.

    Raises:
        ValueError: says what is wrong.
    """
    record: Row = json.loads(data)
    if not isinstance(record, dict) or record.keys() != {*SHARD_RECORDS.names, "failed_samples"}:
        raise ValueError("it has not the fields of a commit record")
    failed = record["failed_samples"]
    names = {*FAILURES.names} - {"shard"}
    if not isinstance(failed, list) or any(not isinstance(failure, dict) or failure.keys() != names for failure in failed):
        raise ValueError("failed_samples has not the fields of failures")
    try:
        pa.Table.from_pylist([{name: record[name] for name in SHARD_RECORDS.names}], schema=SHARD_RECORDS)
        pa.Table.from_pylist([{"shard": "", **failure} for failure in failed], schema=FAILURES)
    except (pa.ArrowException, TypeError, AttributeError) as error:
        raise ValueError(f"a field has a wrong type: {first_line(error)}") from None
    for name in SHARD_RECORDS.names:
        if record[name] is None or (isinstance(record[name], int) and record[name] < 0):
            raise ValueError(f"{name} is {record[name]}")
    return record


def was_extended(record: Row, planned: int, fingerprint: str) -> bool:
    """Whether a shard was packed before the dataset was extended, and what failed in it was then planned in another shard.

    Args:
        record: its commit record.
        planned: samples that the plan has in it now.
        fingerprint: of the plan as it is now.
    """
    return bool(record["fingerprint"] != fingerprint and record["planned"] != planned and record["samples"] == planned)


def check_record(record: Row, shard: str, planned: Sequence[Row], expected: Expected) -> Iterator[str]:
    """A commit record against the plan, and against itself."""
    if record["shard"] != shard:
        yield f"its commit record is of {record['shard']}"
    if record["fingerprint"] not in expected.fingerprints:
        yield f"its commit record is of another plan ({record['fingerprint'][:12]}...)"
    if any(row["split"] != record["split"] for row in planned):
        yield f"its commit record says split {record['split']}, the plan {planned[0]['split']}"
    if record["planned"] != record["samples"] + record["failed"]:
        counts = f"{record['samples']} packed and {record['failed']} failed"
        yield f"its commit record says {number_of(record['planned'], 'planned sample')}, but {counts}"
    failed = record["failed_samples"]
    codes = dict(Counter(failure["code"] for failure in failed))
    if len(failed) != record["failed"] or codes != record["failures"]:
        yield f"its commit record counts {number_of(record['failed'], 'failed sample')} as {record['failures']} and lists {codes}"
    for failure in failed:
        if failure["code"] not in FAILURE_CODES:
            yield f"its commit record has the unknown code {failure['code']} for sample {failure['key']}"
    if was_extended(record, len(planned), expected.fingerprint):
        return
    if record["planned"] != len(planned):
        yield f"its commit record says {number_of(record['planned'], 'planned sample')}, the plan {len(planned)}"
    by_key = {row["key"]: row for row in planned}
    for failure in failed:
        row = by_key.get(failure["key"])
        if row is None:
            yield f"its commit record lists the failed sample {failure['key']}, which the plan does not know"
        elif any(row[name] != failure[name] for name in ("split", "photo_id", "file_name")):
            yield f"its commit record lists the failed sample {failure['key']} with another photo than the plan"


def check_files(folder: Path, record: Row, shard: str, hashed: bool) -> Iterator[str]:
    """Tar and index part against the sizes and hashes of the commit record; the tar's hash only if `hashed`."""
    for name, size, sha256, read in (
        (f"{shard}.tar", record["bytes"], record["sha256"], hashed),
        (f"{shard}.index.parquet", record.get("index_bytes"), record["index_sha256"], True),
    ):
        try:
            found = (folder / name).stat().st_size
            if size is not None and found != size:
                yield f"shards/{name} has {number_of(found, 'byte')}, its commit record says {size:,}"
            if read and file_sha256(folder / name) != sha256:
                yield f"shards/{name} is not what was written (SHA-256)"
        except OSError as error:
            yield f"shards/{name} cannot be read ({error.strerror})"


def read_part(folder: Path, shard: str, record: Row) -> pa.Table | None:
    """A shard's part of the index, in the folder of shards; null where it is not what its commit record says."""
    try:
        data = (folder / f"{shard}.index.parquet").read_bytes()
        if hashlib.sha256(data).hexdigest() == record["index_sha256"]:
            return pq.read_table(pa.BufferReader(data), schema=INDEX)
    except (OSError, pa.ArrowException):
        pass
    return None


def read_rows(folder: Path, shard: str, record: Row) -> list[Row] | None:
    """A shard's rows of the index: of its own part, or else of index.parquet; null where neither can be read."""
    table = read_part(folder, shard, record)
    if table is None:
        try:
            table = pq.read_table(folder.parent / "index.parquet", schema=INDEX, filters=[("shard", "==", shard)])
        except (OSError, pa.ArrowException):
            return None
    rows: list[Row] = table.to_pylist()
    return rows


def check_rows(rows: Sequence[Row], shard: str, planned: Sequence[Row], record: Row) -> Iterator[Told]:
    """Index rows against the plan: the planned samples in their order, but for those that failed."""
    failed = {failure["key"] for failure in record["failed_samples"]}
    due = [row["key"] for row in planned if row["key"] not in failed]
    there = [row["key"] for row in rows]
    if len(rows) != record["samples"]:
        yield None, f"its index has {number_of(len(rows), 'sample')}, its commit record says {record['samples']}"
    for key in sorted({*due} - {*there}):
        yield key, "was planned and has not failed, but is not in the index"
    by_key = {row["key"]: row for row in planned}
    for key, times in Counter(there).items():
        if times > 1:
            yield key, f"is {number_of(times, 'time')} in the index"
        if key in failed:
            yield key, "is in the index, but its commit record says that it failed"
        if key not in by_key:
            yield key, "is in the index, but was not planned for this shard"
    if there != due and sorted(there) == sorted(due):
        yield next(key for key, right in zip(there, due, strict=True) if key != right), "does not stand where the plan puts it"
    for number, row in enumerate(rows):
        wrong = [("shard", shard, row["shard"]), ("position", number, row["position"])]
        plan = by_key.get(row["key"])
        if plan:
            wrong += [(name, plan[name], row[name]) for name in ("split", "object_id", "label", "label_name")]
        for name, right, found in wrong:
            if found != right:
                yield row["key"], f"the index says {name} {found!r}, the plan {right!r}"


def check_stored_sample(
    file: BinaryIO, size: int, places: Sequence[Place], planned: Row | None, expected: Expected
) -> Generator[Told, None, SampleRecord | None]:
    """One sample of a tar: how its members are stored, then what they say.

    Args:
        file: the tar.
        size: of the tar.
        places: of the sample's members.
        planned: its row of the plan; null where it was not planned, which is told elsewhere.
        expected: what holds for the whole dataset.

    Returns:
        Its record, where that can be read.
    """
    beyond = [place.name for place in places if place.start < 0 or place.length < 0 or place.end > size]
    if beyond:
        yield places[0].key, f"{', '.join(beyond)} beyond the end of the tar, by the index"
        return None
    members = {}
    for place in places:
        file.seek(place.start)
        stored = file.read(place.end - place.start)
        yield from with_key(place.key, check_member(stored, place))
        members[place.name] = stored[BLOCK : BLOCK + place.length]
    if planned is None:
        return None
    key = planned["key"]
    try:
        sample = decode_checked(members, expected)
        yield from with_key(key, check_sample(sample, planned, expected))
        return sample.record
    except InputError as error:
        yield key, str(error)
    except Exception as error:  # As in `check_shard`, but known to be of this sample.
        yield key, f"cannot be read ({first_line(error)})"
    return None


def check_counts(record: Row, samples: Sequence[SampleRecord]) -> Iterator[str]:
    """What a commit record counts in its samples."""
    masks = dict(Counter(kind for sample in samples for kind in sample.mask_kinds))
    if masks != record["masks"]:
        yield f"its commit record counts masks {record['masks']}, its samples have {masks}"
    padded = sum(sample.padded for sample in samples)
    if padded != record["padded_views"]:
        yield f"its commit record counts {number_of(record['padded_views'], 'padded view')}, its samples have {padded}"


def find_duplicates(hashes: Mapping[str, UInt64[np.ndarray, " samples"]], folder: Path) -> Iterator[Finding]:
    """Keys that are in more than one shard.

    Args:
        hashes: shard -> hashes of its keys.
        folder: of the dataset: strings are read for those hashes alone that are there twice.
    """
    together = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes.values()]))
    twice = np.unique(together[1:][together[1:] == together[:-1]])
    first: dict[str, str] = {}
    for shard, own in hashes.items():
        if not np.isin(own, twice).any():
            continue
        keys = pq.read_table(folder / "shards" / f"{shard}.index.parquet", columns=["key"])["key"].to_pylist()
        for key in np.array(keys, object)[np.isin(key_hashes(keys), twice)]:
            if first.setdefault(key, shard) != shard:
                problem = (
                    f"the same key is in {first[key]} too, so the plan is wrong; remove selection.json and run the build again"
                )
                yield Finding(problem, "select", shard, key)


def key_hashes(keys: Sequence[str]) -> UInt64[np.ndarray, " samples"]:
    """64 bits of each key: enough to find those that may be there twice, in memory that holds many millions of them."""
    return hash_column(pa.array(keys, pa.string()), "key")


def with_key(key: str | None, problems: Iterator[str]) -> Iterator[Told]:
    """Sentences as what is told of one sample."""
    return ((key, problem) for problem in problems)


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
