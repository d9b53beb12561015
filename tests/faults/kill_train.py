"""kill -9 of a training at random moments: the run must come out as if nothing had been.

    python -m tests.faults.kill_train --kills 20

A training of the tests' small world is killed again and again, each time started by the same command, with its checkpoints
written every step and two loader processes, whose orphans may still be at it when the next run begins. A run that comes to its
end before all kills are spent is compared, and the next one begins. Weights, moving average, optimizer and all lines of metrics
but their times must be those of a run that nothing disturbed. Prints the kills; status 1 if anything is wrong.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pbe_train.checkpoints.trainer_checkpoint import list_checkpoints
from tests.faults.kill_build import PATIENCE_SECONDS, wait_until
from tests.faults.marked import MarkedProcesses
from tests.pbe_train.small_world import make_world

# What a line of metrics says about the machine and not about the run.
TIMES = {"samples_per_second", "data_wait"}


@dataclass(frozen=True)
class Kill:
    """One kill."""

    run: int
    """Which run it hit, from 1."""
    step: int
    """Of its newest checkpoint then."""
    writing: bool
    """Whether another checkpoint was half written."""
    seconds: float
    """From the start of the process."""


@dataclass
class Report:
    """What became of the trainings."""

    steps: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    """Runs that came to their end, each hit at least once."""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0


def train_command(config: Path, out: Path, steps: int) -> list[str]:
    """The program as a user starts it, on the CPU: a GPU does not add up in the same order each time."""
    options = ["--steps", str(steps), "--checkpoint_every", "1", "--keep_last", "3", "--log_every", "3"]
    program = ["env", "CUDA_VISIBLE_DEVICES=", sys.executable, "pbe_train/train.py", "--config", str(config), "--out", str(out)]
    return [*program, *options, "--loader.workers", "2"]


def results(out: Path, steps: int) -> dict[str, bytes | str]:
    """The tensors of the last checkpoint, and the metrics without their times."""
    folder = out / "checkpoints" / f"step-{steps:08d}"
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    computed = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return {**{path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}, "metrics": json.dumps(computed)}


def problems_at_the_end(out: Path, steps: int, expected: dict[str, bytes | str]) -> Iterator[str]:
    """What a run that was hit may not leave."""
    found = results(out, steps)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield f"{out / name}: not that of an undisturbed run"
    for path in (out / "checkpoints").glob(".step-*.partial"):
        yield f"{path}: left over"


def kill_often(
    config: Path, folder: Path, kills: int, report: Report, expected: dict[str, bytes | str], rng: random.Random
) -> None:
    """Train until all kills are spent and the last run that was hit is done."""
    while len(report.kills) < kills and not report.problems:
        out = folder / f"run-{report.runs + 1}"
        hits = len(report.kills)
        with MarkedProcesses(train_command(config, out, report.steps), folder / f"{out.name}.txt") as runs:
            while True:
                process, started = runs.start(), time.monotonic()
                if len(report.kills) < kills and wait_for_moment(process, out, rng):
                    process.kill()
                    status = process.wait(PATIENCE_SECONDS)
                    if status == 0:  # It was faster.
                        break
                    writing = any((out / "checkpoints").glob(".step-*.partial"))
                    report.kills.append(Kill(report.runs + 1, newest(out), writing, time.monotonic() - started))
                elif process.wait(PATIENCE_SECONDS) == 0:
                    break
                else:
                    report.problems.append(f"a run ended with status {process.returncode}; its last words: {last_line(runs.log)}")
                    return
        if len(report.kills) > hits:
            report.runs += 1
        report.problems += problems_at_the_end(out, report.steps, expected)


def wait_for_moment(process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> bool:
    """Until some further steps are saved and a little later, or some seconds after the start; whether the run is still there."""
    if rng.random() < 0.15:
        moment = time.monotonic() + rng.uniform(0.5, 5)
        wait_until(lambda: process.poll() is not None or time.monotonic() > moment)
    else:
        enough = newest(out) + rng.randint(1, 2)
        wait_until(lambda: process.poll() is not None or newest(out) >= enough)
        time.sleep(rng.uniform(0, 0.1))
    return process.poll() is None


def newest(out: Path) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    saved = list_checkpoints(out)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def last_line(log: Path) -> str:
    """What a process said last."""
    return (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]


def run(kills: int, steps: int, seed: int, folder: Path) -> Report:
    """The undisturbed run, then those that are hit."""
    began = time.monotonic()
    config = make_world(folder / "world").config
    calm, report = folder / "calm", Report(steps)
    with MarkedProcesses(train_command(config, calm, steps), folder / "calm.txt") as runs:
        if runs.start().wait(PATIENCE_SECONDS):
            raise RuntimeError(runs.log.read_text(encoding="utf-8"))
    kill_often(config, folder, kills, report, results(calm, steps), random.Random(seed))
    report.seconds = time.monotonic() - began
    return report


def print_report(report: Report) -> None:
    """The kills, and what was wrong."""
    for kill in report.kills:
        half = ", another one half written" if kill.writing else ""
        print(f"run {kill.run}: checkpoint {kill.step} of {report.steps}{half}, {kill.seconds:.1f} s after the start")
    for problem in report.problems:
        print(f"WRONG: {problem}")
    if not report.problems:
        print(f"{len(report.kills)} kills: all {report.runs} runs left the bytes and the metrics of an undisturbed one")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-train-") as folder:
        report = run(given.kills, given.steps, given.seed, Path(folder))
        print_report(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
