"""Read a dataset from end to end and say what is wrong with it, by shard and sample.

    python pipelines/verify.py DATASET                every byte; exit status 1 if anything is wrong
    python pipelines/verify.py DATASET --sample 200   a quick look: all records and tables, but 200 samples only
    python pipelines/verify.py DATASET --repair       and take the records of bad shards away: the next build makes those again

The checks are in pipelines/dataset/verify.py.
"""

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder, sync
from pbe_core.words import number_of
from pipelines.dataset.verify import SHOWN, Finding, Verified, verify_dataset


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
    url = _uploaded_to(given.dataset)
    if given.repair and url:
        raise InputError(f"{given.dataset}: --repair does nothing for a copy of {url}; {_repair_there(given.dataset, url)}")
    verified = verify_dataset(given.dataset, given.sample, given.threads)
    for line in lines(verified):
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
    way_out = what_next(given.dataset, verified, given.repair, url)
    if way_out:
        print(f"next: {way_out}")
    return 1


def lines(verified: Verified) -> Iterator[str]:
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


def repair(folder: Path, findings: Sequence[Finding]) -> list[str]:
    """Take away what the next build is to make again: the records of bad shards, and dataset.json; nothing else goes.

    Returns:
        The shards that the next build packs again. None, and nothing was touched, where the plan itself is wrong.
    """
    repairs = {finding.repair for finding in findings}
    if "plan" in repairs or not repairs & {"pack", "finalize"}:
        return []
    # First of all: from here on this is no finished dataset, whatever stops us.
    (folder / "dataset.json").unlink(missing_ok=True)
    sync(folder)
    bad = sorted({finding.shard for finding in findings if finding.repair == "pack" and finding.shard})
    for shard in bad:
        (folder / "shards" / f"{shard}.json").unlink(missing_ok=True)
    if bad and (folder / "shards").is_dir():
        sync(folder / "shards")
    return bad


def what_next(folder: Path, verified: Verified, repaired: bool, url: str | None) -> str | None:
    """How to get a whole dataset again; null where only files are to be removed, as their findings say."""
    build = f"the command that built it (python pipelines/build.py ... --out {folder}), which makes only what is missing"
    repairs = {finding.repair for finding in verified.findings}
    if "plan" in repairs:
        return "put the plan right as said above, then verify again; until then no shard is touched"
    if not repairs & {"pack", "finalize"}:
        return None
    if url:
        return _repair_there(folder, url)
    return build if repaired else f"this with --repair, then {build}"


def _uploaded_to(folder: Path) -> str | None:
    """The URL where the build of this dataset keeps it; null where that is this folder, or dataset.json cannot be read."""
    try:
        url: str | None = read_dataset(folder).settings.get("upload")
    except InputError:  # `verify_dataset` says what is wrong with it.
        return None
    return url


def _repair_there(folder: Path, url: str) -> str:
    return (
        f"run the command that built it with --verify-existing, which reads the shards at {url} and makes the damaged ones anew, "
        f"then copy it to {folder} again"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    run_program(main)
