"""The benchmark of the loop: its figures fit each other, and both ways train the same. Rates themselves are never asserted."""

import json
import subprocess
import sys

import pytest

from benchmarks.train_loop import BARE, GOALS, LOOP, Turn, findings_of, rows_of
from pbe_core.settings import REPOSITORY

OPTIONS = ["--turns", "2", "--steps", "4", "--line", "2", "--global_batch=4"]


def start(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.train_loop", *OPTIONS, *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_two_turns(dataset, tmp_path):
    """That it ends well says more: the weights of both ways were the same after all turns."""
    path = tmp_path / "results" / "train_loop.json"
    done = start("--dataset", str(dataset), "--results", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    ways = {row["way"]: row for row in result["ways"]}
    assert list(ways) == [LOOP, BARE]
    for row in ways.values():
        assert row["seconds_per_step"] > 0
        assert row["cpu_seconds_per_step"] == pytest.approx(sum(row["turns"]) / 2, abs=1e-4)
    assert 0 < ways[LOOP]["waiting"] < 1
    assert ways[BARE]["waiting"] == 0
    assert [one["what"] for one in result["shares"]] == list(GOALS)
    assert (result["turns"], result["timed_steps"], len(result["weights_sha256"])) == (2, 2, 64)


def test_shares_are_medians_of_what_turns_say():
    """A turn that was disturbed as a whole, in both ways, does not count."""
    loop, bare = (
        [Turn(9.0, 2.2, 0.5), Turn(1.0, 1.1, 0.25), Turn(1.0, 1.3, 0.0)],
        [Turn(1.0, cpu, 0.0) for cpu in (2.0, 1.0, 1.0)],
    )
    waiting, overhead = findings_of({LOOP: loop, BARE: bare})
    assert waiting.share == 0.25
    assert overhead.share == pytest.approx(0.1)
    row = rows_of({LOOP: loop})[0]
    assert (row.seconds_per_step, row.cpu_seconds_per_step, row.waiting) == (1.0, 1.3, 0.25)


def test_turns_without_a_timed_step_are_refused():
    done = start("--steps", "2")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --steps 2: must be a multiple of --line 2, at least twice that, in 1 turn or more"
