"""Read a dataset from end to end and say what is wrong with it, by shard and sample.

    python pipelines/verify.py DATASET                every byte; exit status 1 if anything is wrong
    python pipelines/verify.py DATASET --sample 200   a quick look: all records and tables, but 200 samples only
    python pipelines/verify.py DATASET --repair       and take the records of bad shards away: the next build makes those again

The checks are in pipelines/dataset/: verify_tables.py, verify_dataset.py and verify_samples.py, from the folder down to a sample.
"""

import argparse
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder, sync
from pbe_core.progress import Progress
from pbe_core.randomness import generator
from pbe_core.words import number_of
from pipelines.dataset.plan_shards import planned_shards
from pipelines.dataset.samples import Row
from pipelines.dataset.verify_dataset import Finding, check_shard, find_duplicates
from pipelines.dataset.verify_samples import Expected, expected_of
from pipelines.dataset.verify_tables import (
    Unreadable,
    attempt,
    check_failures,
    check_folder,
    check_index,
    check_plan,
    check_plan_record,
    check_selected,
    check_shard_records,
    check_sizes,
    check_totals,
    counted,
    read_records,
    reading,
)
from pipelines.dataset.write_plan import PLAN_RECORD, accepted_fingerprints
from pipelines.threads import in_order
from schemas.dataset import DatasetInfo

SHOWN = 20
"""Findings that are kept and printed of one shard, and of all that is no shard; the rest are counted."""
PLAN_MENDS = {"select", "freeze"}
"""Where the plan itself is hurt, nobody knows what the shards should hold."""


@dataclass
class Verified:
    """What came of looking at a dataset."""

    findings: list[Finding] = field(default_factory=list)
    more: Counter[str] = field(default_factory=Counter)
    """Shard -> findings beyond the first `SHOWN`."""
    shards: int = 0
    """Shards that were looked at."""
    samples: int = 0
    """Samples that were read and checked in full."""
    of_samples: int = 0
    """Samples in these shards."""


@dataclass(frozen=True)
class Plan:
    """What a dataset should be, by its own word."""

    info: DatasetInfo
    expected: Expected
    shards: dict[str, int]
    """Shard -> planned samples."""


def verify_dataset(folder: Path, sample: int | None = None, threads: int = 2) -> Verified:
    """Check everything that a dataset folder says of itself.

    Args:
        folder: of the dataset.
        sample: so many samples are read, chosen at random but always the same ones; null reads all, and hashes all files.
        threads: shards that are read at once.

    Raises:
        InputError: no dataset is there, its build is not finished, or it is of another format version.
    """
    with Progress("checking the plan"):
        try:
            plan = read_plan(folder)
        except Unreadable as error:
            return Verified([error.finding])
        verified = Verified(list(_check_plan(folder, plan)))
    if any(finding.mend in PLAN_MENDS for finding in verified.findings):
        return verified
    shards = list(plan.shards)
    with Progress("checking the records"):
        records = read_records(folder, shards)
        verified.findings += _check_sealed(folder, plan, records)
    samples = [records[shard]["samples"] if shard in records else 0 for shard in shards]
    sizes = [records[shard]["bytes"] if shard in records else 0 for shard in shards]
    chosen: Sequence[frozenset[int] | None] = [None] * len(shards) if sample is None else choose(samples, sample)
    keys = {}
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress("verifying", sum(sizes), "B") as progress,
    ):
        work = zip(shards, _planned_rows(folder), chosen, strict=True)
        checked = in_order(pool, lambda item: check_shard(folder, plan.expected, *item), work, ahead=2 * threads)
        for shard, size, one in zip(shards, sizes, checked, strict=True):
            verified.findings += one.findings[:SHOWN]
            verified.more[shard] += max(0, len(one.findings) - SHOWN)
            keys[shard] = one.keys
            verified.samples += one.samples
            verified.of_samples += len(one.keys)
            verified.shards += 1
            progress.update(size)
    with Progress("comparing the keys"):
        verified.findings += attempt(lambda: find_duplicates(keys, folder), "index.parquet", "seal")
    return verified


def read_plan(folder: Path) -> Plan:
    """What must be readable before anything can be checked.

    Raises:
        InputError: no dataset is there, its build is not finished, or it is of another format version.
        Unreadable: with the finding.
    """
    try:
        info = read_dataset(folder)
    except InputError as error:
        if not (folder / "dataset.json").is_file() or "format version" in str(error):
            raise
        raise Unreadable(Finding("dataset.json cannot be read; sealing makes it again", "seal")) from None
    url = info.settings.get("upload")
    if url and not any((folder / "shards").glob("*.tar")):
        raise InputError(f"{folder}: the shards of this dataset are at {url}; copy it to a folder to verify it")
    with reading(PLAN_RECORD, "freeze"):
        fingerprints = accepted_fingerprints(folder)
    with reading("dataset.json", "seal"):
        expected = expected_of(info, fingerprints)
    with reading("plan.parquet", "select"):
        shards = planned_shards(folder / "plan.parquet")
    return Plan(info, expected, shards)


def _check_plan(folder: Path, plan: Plan) -> Iterator[Finding]:
    """What was there before the first shard, and what should not be there at all."""
    yield from attempt(lambda: check_folder(folder, plan.shards), "the folder", "remove")
    yield from attempt(lambda: check_plan_record(folder, plan.info), PLAN_RECORD, "freeze")
    yield from check_selected(folder)
    yield from attempt(lambda: check_plan(folder, plan.shards), "plan.parquet or objects.parquet", "select")


def _check_sealed(folder: Path, plan: Plan, records: dict[str, Row]) -> Iterator[Finding]:
    """What was put together from the shards."""
    shards = list(plan.shards)
    counting = counted(records, plan.shards, plan.info.fingerprint)
    yield from attempt(lambda: check_sizes(folder, records, shards), "shards/sizes.json", "seal")
    yield from attempt(lambda: check_shard_records(folder, records, shards), "shard_records.parquet", "seal")
    yield from attempt(lambda: check_index(folder, records, shards), "index.parquet", "seal")
    yield from attempt(lambda: check_failures(folder, counting, shards), "failures.parquet", "seal")
    yield from attempt(lambda: check_totals(folder, plan.info, counting, plan.shards), "dataset.json", "seal")


def choose(counts: Sequence[int], sample: int) -> list[frozenset[int]]:
    """A random choice among all samples, the same each time: their places in each shard, where each has so many samples."""
    total = sum(counts)
    numbers = np.sort(generator(0, "verify").choice(total, min(sample, total), replace=False))
    ends = list(itertools.accumulate(counts))
    parts = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
    return [frozenset((part - (end - count)).tolist()) for part, end, count in zip(parts, ends, counts, strict=True)]


def repair(folder: Path, findings: Sequence[Finding]) -> list[str]:
    """Let the next build mend what it can: bad shards lose their commit records, the dataset its dataset.json; nothing else goes.

    Returns:
        The shards that the next build packs again. None, and nothing was touched, where the plan itself has to be mended first.
    """
    mends = {finding.mend for finding in findings}
    if mends & PLAN_MENDS or not mends & {"pack", "seal"}:
        return []
    # First of all: from here on this is no finished dataset, whatever stops us.
    (folder / "dataset.json").unlink(missing_ok=True)
    sync(folder)
    bad = sorted({finding.shard for finding in findings if finding.mend == "pack" and finding.shard})
    for shard in bad:
        (folder / "shards" / f"{shard}.json").unlink(missing_ok=True)
    if bad and (folder / "shards").is_dir():
        sync(folder / "shards")
    return bad


def check_repairable(folder: Path) -> None:
    """Make sure that a build would mend what `repair` takes away.

    Raises:
        InputError: the build looks elsewhere: this is a copy of a dataset that lies behind a URL.
    """
    url = _uploaded_to(folder)
    if url:
        raise InputError(f"{folder}: --repair does nothing for a copy of {url}; {_mend_there(folder, url)}")


def _uploaded_to(folder: Path) -> str | None:
    """The URL where the build of this dataset keeps it; null where that is this folder, or dataset.json cannot be read."""
    try:
        url: str | None = read_dataset(folder).settings.get("upload")
    except InputError:  # What is wrong with it is for `verify_dataset` to say.
        return None
    return url


def _mend_there(folder: Path, url: str) -> str:
    return (
        f"run the command that built it with --verify-existing, which reads the shards at {url} and makes the damaged ones anew, "
        f"then copy it to {folder} again"
    )


def _planned_rows(folder: Path) -> Iterator[list[Row]]:
    """The plan, shard by shard."""
    plan = pq.ParquetFile(folder / "plan.parquet")
    for group in range(plan.metadata.num_row_groups):
        yield plan.read_row_group(group).to_pylist()


def told(verified: Verified) -> Iterator[str]:
    """All findings as lines, shard by shard, no more than `SHOWN` of each."""
    places = itertools.groupby(sorted(verified.findings, key=lambda finding: finding.shard or ""), lambda finding: finding.shard)
    for shard, group in places:
        findings = list(group)
        yield from (str(finding) for finding in findings[:SHOWN])
        more = verified.more[shard or ""] + max(0, len(findings) - SHOWN)
        if more:
            yield f"{shard or 'the tables'}: and {more:,} more"


def summary(verified: Verified, sample: int | None) -> str:
    """What was looked at, and what came of it, in one line."""
    looked = f"{number_of(verified.samples, 'sample')} in {number_of(verified.shards, 'shard')}"
    if sample is not None:
        of_all = f"{number_of(verified.of_samples, 'sample')} in {number_of(verified.shards, 'shard')}"
        looked = f"a quick look at {verified.samples:,} of {of_all}, no tar was hashed"
    if not verified.findings:
        return f"{looked}, all of them whole" if sample is None else f"{looked}: nothing wrong was seen"
    bad = {finding.shard for finding in verified.findings if finding.shard}
    count = len(verified.findings) + verified.more.total()
    looked = looked if verified.shards else "the shards were not looked at"
    return f"{number_of(count, 'finding')}, {number_of(len(bad), 'bad shard')} ({looked})"


def what_next(folder: Path, verified: Verified, repaired: bool) -> Iterator[str]:
    """How to get a whole dataset again."""
    build = f"the command that built it (python pipelines/build.py ... --out {folder})"
    url = _uploaded_to(folder)
    mends = {finding.mend for finding in verified.findings}
    if mends & PLAN_MENDS:
        yield "next: mend the plan as said above, then verify again; until then no shard is touched"
    elif mends & {"pack", "seal"} and url:
        yield f"next: {_mend_there(folder, url)}"
    elif mends & {"pack", "seal"}:
        yield f"next: {build}; it makes what is missing" if repaired else f"next: this with --repair, then {build}"
    if "remove" in mends:
        yield "files that do not belong here are never removed by this program"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dataset", type=Path, help="folder of the dataset")
    parser.add_argument("--sample", type=_positive, metavar="N", help="a quick look: read N random samples, hash no tar")
    parser.add_argument(
        "--repair", action="store_true", help="take the commit records of bad shards away; nothing else is removed"
    )
    parser.add_argument(
        "--threads", type=_positive, default=min(8, os.cpu_count() or 1), help="shards read at once (default: %(default)s)"
    )
    given = parser.parse_args()
    if given.repair:
        check_repairable(given.dataset)
    verified = verify_dataset(given.dataset, given.sample, given.threads)
    for line in told(verified):
        print(line)
    print(f"{given.dataset}: {summary(verified, given.sample)}")
    if not verified.findings:
        return 0
    if given.repair:
        with lock_folder(given.dataset, "a build is at work in this folder; wait for it, then verify again"):
            bad = repair(given.dataset, verified.findings)
        for shard in bad:
            print(f"{shard}: its commit record was removed")
        if not (given.dataset / "dataset.json").exists():
            print("dataset.json was removed: the dataset is not finished until it is built again")
    for line in what_next(given.dataset, verified, given.repair):
        print(line)
    return 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    run_program(main)
