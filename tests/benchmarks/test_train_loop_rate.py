"""The benchmark of the loop: its figures fit each other, and both ways train the same. Rates themselves are never asserted."""

import json
import sys

import pytest

import pbe_train.train
from benchmarks.train_loop import BARE, GOALS, LOOP, Turn, findings_of, main, rows_of
from pbe_core.errors import InputError

OPTIONS = ["train_loop", "--turns", "1", "--line", "1", "--global_batch=4", "--loader.workers=0"]


def test_a_turn(dataset, tmp_path, monkeypatch):
    """That it ends well says more: the weights of both ways were the same after it."""
    path = tmp_path / "results" / "train_loop.json"
    monkeypatch.setattr(pbe_train.train, "Progress", pbe_train.train.Progress)  # The benchmark has one of its own.
    monkeypatch.setattr(sys, "argv", [*OPTIONS, "--steps", "2", "--dataset", str(dataset), "--results", str(path)])
    main()
    result = json.loads(path.read_text())
    ways = {row["way"]: row for row in result["ways"]}
    assert list(ways) == [LOOP, BARE]
    for row in ways.values():
        assert row["seconds_per_step"] > 0
        assert row["cpu_seconds_per_step"] == pytest.approx(sum(row["turns"]), abs=1e-4)
    assert 0 < ways[LOOP]["waiting"] < 1
    assert ways[BARE]["waiting"] == 0
    assert [one["what"] for one in result["shares"]] == list(GOALS)
    assert (result["turns"], result["timed_steps"], len(result["weights_sha256"])) == (1, 1, 64)


def test_shares_are_medians_of_what_turns_say():
    """A turn that was disturbed as a whole, in both ways, does not count."""
    loop = [Turn(9.0, 2.2, 0.5), Turn(1.0, 1.1, 0.25), Turn(1.0, 1.3, 0.0)]
    waiting, overhead = findings_of({LOOP: loop, BARE: [Turn(1.0, cpu, 0.0) for cpu in (2.0, 1.0, 1.0)]})
    assert waiting.share == 0.25
    assert overhead.share == pytest.approx(0.1)
    row = rows_of({LOOP: loop})[0]
    assert (row.seconds_per_step, row.cpu_seconds_per_step, row.waiting) == (1.0, 1.3, 0.25)


def test_turns_without_a_timed_step_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", [*OPTIONS, "--steps", "1"])
    with pytest.raises(InputError, match="--steps 1: must be a multiple of --line 1, at least twice that"):
        main()
