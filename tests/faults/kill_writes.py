"""kill -9 at every place where a program gives a file its name, once each: nothing may be left of it, and the result be the same.

    python -m tests.faults.kill_writes                   # all programs
    python -m tests.faults.kill_writes --program train

An undisturbed run tells the places: all renames in its folder, by whichever of its processes (at_rename/sitecustomize.py). Then
the same command runs again and again, and dies at one place after the other, just before the rename. A last run ends undisturbed.
Prints the places; status 1 if anything is left over, or if what came out is not what came out of the undisturbed run.
"""

import argparse
import hashlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.crawling.tables import verify_store
from tests.crawl_world import crawl_command, crawl_options
from tests.faults.kill_build import build_command, hashes_of
from tests.faults.kill_train import train_command
from tests.faults.marked import MarkedProcesses
from tests.pbe_train.small_world import make_world as make_small_world
from tests.pbe_train.test_resume import what_was_computed as train_results
from tiny_world.make_photos import make_world

HOOK = Path(__file__).parent / "at_rename"
LEFT_OVER = re.compile(r"\..*\.(tmp|partial|old|part)")
# A place to which so many runs in a fresh folder do not come is given up.
FRESH_STARTS = 2
_STEPS = 5


@dataclass(frozen=True)
class Program:
    """A program that writes into one folder."""

    command: list[str]
    folder: Path
    """Where all that it writes lies."""
    result: Callable[[], object]
    """What must be the same whatever was killed."""


@dataclass(frozen=True)
class Death:
    """One process that was killed."""

    place: str
    worker: bool
    """Whether it was one that the program has started; the program itself goes on then."""


@dataclass
class Report:
    """What became of one program."""

    deaths: list[Death] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0


def left_over(folder: Path) -> Iterator[str]:
    """What a killed writer may not leave for ever."""
    for path in sorted(folder.rglob(".*")):
        if LEFT_OVER.fullmatch(path.name):
            yield f"{path}: left over"


def kill_at_each(program: Program, notes: Path, places: Sequence[str] = (), expected: object = None, least: int = 0) -> Report:
    """Kill a program once at each place.

    Args:
        program: which; its folder is not there yet.
        notes: a new folder for what the processes say.
        places: where; by default wherever an undisturbed run comes.
        expected: the result; by default that of the undisturbed run.
        least: so many kills; where there are fewer places, each is hit several times.
    """
    began, report = time.monotonic(), Report()
    for folder in (notes / "due", notes / "died"):
        folder.mkdir(parents=True)
    environment = {"PBE_RENAMED_IN": str(program.folder), "PBE_RENAMES": str(notes), "PYTHONPATH": str(HOOK)}
    with MarkedProcesses(program.command, notes / "log.txt", environment) as runs:
        if not places:
            program.folder.mkdir(parents=True)
            if runs.start().wait():
                raise RuntimeError((notes / "log.txt").read_text())
            places = list(dict.fromkeys((notes / "seen").read_text().splitlines()))
            expected = expected or program.result()
            shutil.rmtree(program.folder)
        for _ in range(max(1, -(-least // len(places)))):
            die_at(places, program, notes, runs, report)
        # Processes that outlived their program may still write; the last run takes away what they leave.
        while runs.alive():
            time.sleep(0.05)
        status = runs.start().wait()
        report.runs += 1
        if status:
            report.problems.append(f"the last run ended with status {status}; see {notes / 'log.txt'}")
        elif program.result() != expected:
            report.problems.append("what came out is not what came out of an undisturbed run")
    report.problems += left_over(program.folder)
    report.seconds = time.monotonic() - began
    return report


def die_at(places: Sequence[str], program: Program, notes: Path, runs: MarkedProcesses, report: Report) -> None:
    """Run again and again, until a process has died at each of these places, or the program does not come to one any more."""
    for number, place in enumerate(places):
        (notes / "due" / f"{number:03d}").write_text(place)
    fresh = 0
    while any((notes / "due").iterdir()):
        program.folder.mkdir(parents=True, exist_ok=True)
        process = runs.start()
        status = process.wait()
        report.runs += 1
        died = sorted((notes / "died").iterdir())
        for path in died:
            place, pid = path.read_text().splitlines()
            report.deaths.append(Death(place, int(pid) != process.pid))
            path.unlink()
        if status == 0 and any((notes / "due").iterdir()):
            fresh += 1
            shutil.rmtree(program.folder)  # Who has done its work does not come there again.
        if fresh > FRESH_STARTS or (status and not died):
            missed = [path.read_text() for path in sorted((notes / "due").iterdir())]
            report.problems.append(f"no run came to {', '.join(missed)}; the last one ended with status {status}")
            return


def contents_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def make_programs(folder: Path) -> dict[str, Program]:
    """All programs that write what others go on from, each with its inputs, the smallest that show all places."""
    photos, world = folder / "photos", make_small_world(folder / "small")
    make_world(photos, 16, 6, 7, 1)
    built, crawled, surveyed, trained = (folder / name / "out" for name in ("build", "crawl", "survey", "train"))
    tables = ("objects.parquet", "rejects.parquet", "plan.parquet")
    build = build_command(photos, built, 2)
    local = {"crawl.photos_per_part": 4, "crawl.workers": 2, "source.splits": '["train", "validation"]'}
    options = crawl_options(photos, crawled, folder / "crawl-out", None, [str(photos)], local)
    of_survey = [*build[2:], "--source.survey", str(surveyed), "--out", str(folder / "survey-out")]
    # More steps than checkpoints are kept; and no block of its own before the U-Net, which makes diffusers' layout fit.
    train = [*train_command(world.config, trained, _STEPS), "--model.conditioner_blocks", "0"]
    exported = folder / "export"
    export = ["-m", "pbe_train.export", "--model", str(trained), "--out", str(exported / "model"), "--format", "diffusers"]
    return {
        "plan": Program(
            [sys.executable, "pipelines/plan.py", *build[2:], "--out", str(folder / "plan")],
            folder / "plan",
            lambda: contents_of(folder / "plan", tables),
        ),
        "build": Program(
            build, built, lambda: hashes_of(built) | contents_of(built, (*tables, "index.parquet", "failures.parquet"))
        ),
        "crawl": Program(crawl_command(options), crawled, lambda: store_of(crawled)),
        "survey": Program(
            [sys.executable, "pipelines/survey.py", *of_survey],
            surveyed,
            lambda: contents_of(surveyed, ("photos.parquet", "same_photos.parquet")),
        ),
        "train": Program(train, trained, lambda: train_results(trained, _STEPS)),
        "export": Program([sys.executable, *export], exported, lambda: weights_of(exported / "model")),
    }


def store_of(store: Path) -> object:
    """A photo store: its photos and what became of them, if all of it is whole."""
    problems, photos = verify_store(store)
    rows = pq.read_table(store / "status.parquet", columns=["key", "code"]).to_pylist()
    return problems, photos, rows


def weights_of(folder: Path) -> dict[str, str]:
    """SHA-256 of an export's files of weights."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.safetensors"))]
    return contents_of(folder, names)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", help="only this one: plan, build, crawl, survey, train, export")
    given = parser.parse_args()
    problems = []
    with tempfile.TemporaryDirectory(prefix="kill-writes-") as scratch:
        folder = Path(scratch)
        programs = make_programs(folder)
        for name in given.program or programs:
            if name == "export":  # It needs a run, and one export that it replaces.
                prepare_export(programs)
            report = kill_at_each(programs[name], folder / "notes" / name)
            for death in report.deaths:
                print(f"{name}: {death.place}: {'a worker' if death.worker else 'the program'} died")
            problems += [f"{name}: {problem}" for problem in report.problems]
            print(f"{name}: {len(report.deaths)} kills in {report.runs} runs, {report.seconds:.0f} s", file=sys.stderr)
    for problem in problems:
        print(f"WRONG: {problem}")
    if not problems:
        print("nothing is left over, and what came out is the same")
    return 1 if problems else 0


def prepare_export(programs: dict[str, Program]) -> None:
    """Train, if that has not been done."""
    train = programs["train"]
    if not train.folder.exists():
        with MarkedProcesses(train.command, train.folder.with_suffix(".txt")) as runs:
            train.folder.parent.mkdir(parents=True, exist_ok=True)
            if runs.start().wait():
                raise RuntimeError(runs.log.read_text())


if __name__ == "__main__":
    sys.exit(main())
