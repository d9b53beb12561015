"""kill -9 of a build, at random moments and at each of its atomic writes: the shards must come out as if nothing had been.

    python -m tests.faults.kill_build --kills 20

Four targets, each hit so often: the program that builds (every other time the next run begins while the processes of the
one before may still be at it), a packing process, the raylet, Ray's own process on each node, and whichever process is about to
give a file its name (kill_writes.py: each such place once, also where these are more). A program that is killed is started again;
it survives the others. In the end every shard must have the SHA-256 of an undisturbed build by one worker, nothing
that was recorded may have been made again, and nothing may lie about. Prints the kills; status 1 if anything is wrong.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.settings import REPOSITORY
from tests.conftest import build_options
from tests.faults.marked import MarkedProcesses
from tiny_world.make_photos import make_world

# Only what will never come is given up: how fast a machine is says nothing about a build.
PATIENCE_SECONDS = 1800
SAMPLES_PER_SHARD = 4
ATOMIC_WRITE = "atomic write"
TARGETS = {"program": "pipelines/build.py", "packing process": "ray::PackingActor", "raylet": "raylet/raylet", ATOMIC_WRITE: ""}


@dataclass(frozen=True)
class Kill:
    """One kill."""

    target: str
    recorded: int | None
    """Shards that were done then; null where that is not looked at."""
    seconds: float | None
    """From the start of the run; likewise."""
    status: int | None
    """Of the run that was hit; null where it went on."""


@dataclass
class Report:
    """What became of the builds."""

    shards: int = 0
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    """Shard's file -> its hash, the same in all builds."""
    seconds: float = 0


def report_of(calm: Path) -> Report:
    """A report without kills; `calm` is what an undisturbed build made."""
    return Report(shards=len(recorded(calm)), sha256=hashes_of(calm))


def build_command(photos: Path, out: Path, actors: int, samples: int = SAMPLES_PER_SHARD) -> list[str]:
    """A build of the tiny world, in small shards."""
    ray = ["--ray.cpus_per_actor", "0.25", "--ray.actors", str(actors), "--ray.attempts", "10"]
    options = [*build_options(photos, out), *ray, "--shards.samples", str(samples)]
    return [sys.executable, "pipelines/build.py", "--config", "configs/tiny.yaml", *options]


def hashes_of(out: Path) -> dict[str, str]:
    """SHA-256 of each tar and each part of the index."""
    paths = [path for path in sorted((out / "shards").iterdir()) if path.suffix in (".tar", ".parquet")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def recorded(out: Path) -> dict[str, int]:
    """Commit records that are there -> when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("*-*.json")}


def problems_at_the_end(out: Path, expected: dict[str, str]) -> Iterator[str]:
    """What a build that was hit may not leave."""
    found = hashes_of(out)
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        yield f"{len(wrong)} files are not those of an undisturbed build, as {wrong[0]}"
    if imbalance := find_imbalance(read_dataset(out).books):
        yield f"the books do not balance: {imbalance}"
    for path in out.rglob("*.tmp"):
        yield f"{path}: left over"


def kill_often(targets: Sequence[str], kills: int, command: list[str], folder: Path, report: Report, rng: random.Random) -> None:
    """Build with two workers, hitting the targets in turns; the report holds the expected hashes, and gets the rest."""
    folder.mkdir(parents=True)
    out = folder / "dataset"
    hit, before, names = 0, dict[str, int](), ", ".join(targets)
    with MarkedProcesses(command, folder / "log.txt") as builds:
        while True:
            process = builds.start()
            started = time.monotonic()
            while hit < kills and wait_for_moment(process, out, rng):
                target = targets[hit % len(targets)]
                now = recorded(out)
                report.problems += [f"{target}: {name} was made again" for name in before if now.get(name) != before[name]]
                before = now
                victims = [process] if target == "program" else builds.alive(TARGETS[target])
                if not victims:
                    continue
                rng.choice(victims).kill()
                hit += 1
                status = process.wait(PATIENCE_SECONDS) if target == "program" else None
                report.kills.append(Kill(target, len(now), time.monotonic() - started, status))
                if status is not None:
                    break
            if process.poll() is None:
                process.wait(PATIENCE_SECONDS)
            if process.returncode == 0:
                report.problems += [f"{names}: {problem}" for problem in problems_at_the_end(out, report.sha256)]
                if hit >= kills or report.problems:
                    return
                shutil.rmtree(out)
                before = {}
            elif hit >= kills and report.kills[-1].target != "program":
                report.problems.append(f"{names}: the build ended with status {process.returncode}; see {builds.log}")
                return
            # Else the next run begins while the processes of this one may still be at it; not the last run, which nobody follows
            # that could take away what they leave.
            if hit % 2 or hit >= kills:
                wait_until(lambda: not builds.alive())


def kill_at_writes(kills: int, command: list[str], folder: Path, report: Report, places: Sequence[str] = ()) -> None:
    """Build with two workers, killing whoever is about to give a file its name; arguments as of `kill_often`.

    `places` are all that a build comes to, unless they are given.
    """
    from tests.faults.kill_writes import Program, kill_at_each

    out = folder / "dataset"
    program = Program(command, out, lambda: hashes_of(out))
    written = kill_at_each(program, folder / "notes", places, report.sha256, kills)
    report.kills += [Kill(f"{ATOMIC_WRITE}: {death.place}", None, None, None if death.worker else -9) for death in written.deaths]
    report.problems += [f"{ATOMIC_WRITE}: {problem}" for problem in (*written.problems, *problems_at_the_end(out, report.sha256))]


def wait_for_moment(process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> bool:
    """Until some further shards are done and a little later, or some seconds after the start; whether the run is still there."""
    if rng.random() < 0.2:
        moment = time.monotonic() + rng.uniform(0.5, 8)
        wait_until(lambda: process.poll() is not None or time.monotonic() > moment)
    else:
        enough = len(recorded(out)) + rng.randint(1, 3)
        wait_until(lambda: process.poll() is not None or len(recorded(out)) >= enough)
        time.sleep(rng.uniform(0, 0.2))
    return process.poll() is None


def wait_until(done: Callable[[], bool]) -> None:
    """Look every few milliseconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come")
        time.sleep(0.005)


def run(photos: int, kills: int, seed: int, folder: Path, targets: Sequence[str] = tuple(TARGETS)) -> Report:
    """Each target in turn, after an undisturbed build by one worker."""
    began = time.monotonic()
    world, calm = folder / "photos", folder / "calm"
    make_world(world, photos, photos // 4, 7, 1)
    done = subprocess.run(build_command(world, calm, 1), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    report, rng = report_of(calm), random.Random(seed)
    for target in targets:
        command = build_command(world, folder / target / "dataset", 2)
        if target == ATOMIC_WRITE:
            kill_at_writes(kills, command, folder / target, report)
        else:
            kill_often([target], kills, command, folder / target, report, rng)
    report.seconds = time.monotonic() - began
    return report


def print_report(report: Report) -> None:
    """The kills, and what was wrong."""
    for kill in report.kills:
        when = "" if kill.recorded is None else f", after {kill.recorded} of {report.shards} shards, {kill.seconds:.1f} s"
        print(f"{kill.target}: {'the build went on' if kill.status is None else f'status {kill.status}'}{when}")
    for problem in report.problems:
        print(f"WRONG: {problem}")
    if not report.problems:
        print(
            f"{len(report.kills)} kills: all {len(report.sha256)} files are those of an undisturbed build; {report.seconds:.0f} s"
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=100, help="photos of the tiny world (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="of each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--target", choices=tuple(TARGETS), action="append", help="only this one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-build-") as folder:
        report = run(given.photos, given.kills, given.seed, Path(folder), given.target or tuple(TARGETS))
        print_report(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
