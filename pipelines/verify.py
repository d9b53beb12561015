"""Read a dataset from end to end and say what is wrong with it, by shard and sample.

    python pipelines/verify.py DATASET                every byte; exit status 1 if anything is wrong
    python pipelines/verify.py DATASET --sample 200   a quick look: all records and tables, but 200 samples only
    python pipelines/verify.py DATASET --repair       and take the records of bad shards away: the next build makes those again

The checks are in pipelines/dataset/verify.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder, sync
from pbe_core.words import number_of
from pipelines.dataset.verify import Finding, Verified, verify_dataset


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dataset", type=Path, help="folder of the dataset")
    parser.add_argument("--sample", type=int, metavar="N", help="a quick look: read no more than N samples, hash no tar")
    parser.add_argument(
        "--repair", action="store_true", help="take the commit records of bad shards away; nothing else is removed"
    )
    given = parser.parse_args()
    if given.sample is not None and given.sample < 1:
        raise InputError(f"--sample {given.sample}: must be 1 or more")
    verified = verify_dataset(given.dataset, given.sample)
    for finding in sorted(verified.findings, key=lambda finding: finding.shard or ""):
        print(finding)
    print(f"{given.dataset}: {summary(verified, quick=given.sample is not None)}")
    if given.repair and verified.findings and not verified.url:
        with lock_folder(given.dataset, "a build is at work in this folder; wait for it, then verify again"):
            for shard in repair(given.dataset, verified.findings):
                print(f"{shard}: its commit record was removed")
        if not (given.dataset / "dataset.json").exists():
            print("dataset.json was removed: the dataset is not finished until it is built again")
    way_out = what_next(given.dataset, verified, given.repair)
    if way_out:
        print(f"next: {way_out}")
    return bool(verified.findings)


def summary(verified: Verified, quick: bool) -> str:
    """What was looked at, and what came of it, in one line."""
    looked = f"{number_of(verified.samples, 'sample')} in {number_of(verified.shards, 'shard')}"
    if quick:
        looked = f"a quick look at {verified.samples:,} of {number_of(verified.of_samples, 'sample')}, no tar was hashed"
    if not verified.findings:
        return f"{looked}: nothing wrong was seen" if quick else f"{looked}, all of them whole"
    bad = {finding.shard for finding in verified.findings if finding.shard}
    looked = looked if verified.shards else "the shards were not looked at"
    return f"{number_of(len(verified.findings), 'finding')}, {number_of(len(bad), 'bad shard')} ({looked})"


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


def what_next(folder: Path, verified: Verified, repaired: bool) -> str | None:
    """How to get a whole dataset again; null where only files are to be removed, as their findings say."""
    repairs = {finding.repair for finding in verified.findings}
    if "plan" in repairs:
        return "put the plan right as said above, then verify again; until then no shard is touched"
    if not repairs & {"pack", "finalize"}:
        return None
    if verified.url:
        return (
            f"this is a copy of {verified.url}, not repaired here: run the command that built it with --verify-existing, which "
            f"makes damaged shards there anew, then copy it to {folder} again"
        )
    build = f"the command that built it (python pipelines/build.py ... --out {folder}), which makes only what is missing"
    return build if repaired else f"this with --repair, then {build}"


if __name__ == "__main__":
    run_program(main)
