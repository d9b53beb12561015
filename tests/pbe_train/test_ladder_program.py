"""The ladder of ablations end to end on the small world: runs that were killed, that fail, that another process has."""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pbe_core.files import lock_folder
from pbe_train import ablations
from pbe_train.ladder import runs as runs_module
from pbe_train.ladder.intervals import difference, estimate
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.conftest import Done, call_program
from tests.html_page import Page
from tests.pbe_train.ladder_world import PAIRS, LadderWorld, make_ladder_world, make_start
from tests.pbe_train.programs import start
from tests.pbe_train.small_world import World


@pytest.fixture(scope="module")
def small(world: World, tmp_path_factory: pytest.TempPathFactory) -> LadderWorld:
    return make_ladder_world(world, tmp_path_factory.mktemp("ladder"))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings come from a process that has imported the trainer; the names of the runs that were started."""
    started: list[str] = []

    class Forked(subprocess.Popen):
        _child_created = False  # Of a process that this class has not started itself, it leaves all to the methods below.

        def __init__(self, command: Sequence[str], log: Path) -> None:
            started.append(log.stem)
            self.process = start(command[command.index("pbe_train.train") + 1 :], log)

        def poll(self) -> int | None:
            return self.process.exitcode

        def terminate(self) -> None:
            self.process.terminate()

        def wait(self) -> None:
            self.process.join()

    monkeypatch.setattr(runs_module, "start_program", Forked)
    return started


def call(small: LadderWorld, out: Path, *more: str) -> Done:
    return call_program(ablations.main, *small.options(out, "--arms", "bottleneck", "guidance", "--seeds", "2", *more))


def test_end_to_end(small: LadderWorld, forked: list[str], tmp_path: Path):
    """One run was killed before, one fails and is mended: no run is trained twice, and the table says who is missing."""
    out = tmp_path / "ladder"
    begun = small.world.settings(
        out / "runs" / "guidance-seed0", f"--model.pretrained={small.start}", "--steps=3", "--keep_last=1"
    )
    train(begun, Distributed(0, 1, torch.device("cpu")))  # What a killed run leaves, and more.
    damaged = out / "runs" / "bottleneck-seed1" / "checkpoints" / "step-00000002"
    damaged.mkdir(parents=True)
    (damaged / "state.json").write_text("{")
    done = call(small, out)
    assert done.returncode == 1, done.stderr
    assert "error: bottleneck-seed1: " in done.stderr
    assert "state.json" in done.stderr
    assert sorted(forked) == ["bottleneck-seed0", "bottleneck-seed1", "guidance-seed0", "guidance-seed1"]
    assert "going on from" in (out / "runs" / "guidance-seed0.log").read_text()
    assert "Without bottleneck-seed1." in (out / "table.md").read_text()
    content = json.loads((out / "ablations.json").read_text())
    assert [arm["seeds"] for arm in content["arms"]] == [[0], [0, 1]]
    assert content["steps"][0]["differences"]["seam"]["verdict"] == "not told apart", "one seed in common"

    (damaged / "state.json").unlink()
    damaged.rmdir()
    forked.clear()
    done = call(small, out)
    assert done.returncode == 0, done.stderr
    assert forked == ["bottleneck-seed1"]
    check_result(out)

    forked.clear()
    for options, cause in (
        (["--steps", "7"], "steps 6, now 7"),
        (["--optimizer.learning_rate", "1e-2"], "optimizer.learning_rate 0.001, now 0.01"),
        (["--model.pretrained", str(make_start(small.world, tmp_path / "other", seed=1)), "--only", "train"], "start's weights"),
        (["--model.pretrained", str(make_start(small.world, tmp_path / "same")), "--only", "train"], None),
        (["--guidance", "3"], "pictures were made with guidance 5.0, now 3.0"),
    ):
        done = call(small, out, *options)
        if cause:
            assert done.returncode == 2, done.stderr
            assert f"error: {out}" in done.stderr
            assert cause in done.stderr
        else:  # The same weights at another place.
            assert done.returncode == 0, done.stderr
    assert not forked


def check_result(out: Path) -> None:
    """What the files say agrees with the evaluation's own scores, and with the arithmetic of the numbers that they hold."""
    content = json.loads((out / "ablations.json").read_text())
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    own = {row["name"]: row["set_scores"] | row["pair_scores"] for row in evaluation["rows"]}
    names = {"recognised (eye)", "DINO-I (eye)", "FD (eye)", "KID (eye)", "copying", "seam"}
    assert set(content["numbers"]) == names
    assert len(content["ids"]) == PAIRS
    assert [(arm["name"], arm["guidance"], arm["seeds"]) for arm in content["arms"]] == [
        ("bottleneck", 1, [0, 1]),
        ("guidance", 5, [0, 1]),
    ]
    for score in names:
        stacked = {}
        for arm in content["arms"]:
            rows = [content["numbers"][score][f"{arm['name']}-seed{seed}"] for seed in arm["seeds"]]
            stacked[arm["name"]] = np.array(rows, np.float64)
            for seed, row in zip(arm["seeds"], stacked[arm["name"]], strict=True):
                assert np.nanmean(row) == pytest.approx(own[f"{arm['name']}-seed{seed}"][score]["value"], rel=1e-4, abs=1e-6), (
                    score
                )
            found = estimate(stacked[arm["name"]])
            assert arm["scores"][score]["value"] == pytest.approx(found.value, rel=1e-4, abs=1e-6)
            assert arm["scores"][score]["by_seed"] == pytest.approx(found.by_seed, rel=1e-4, abs=1e-6)
        told = content["steps"][0]["differences"][score]
        found, _ = difference(stacked["guidance"], stacked["bottleneck"], "up")
        assert [told["value"], told["low"], told["high"]] == pytest.approx(
            [found.value, found.low, found.high], rel=1e-3, abs=1e-5
        )
    assert content["judges"][0]["name"] == "eye"
    assert content["settings"]["condition_dropout"] == 0.2
    assert {"torch", "python"} <= set(content["versions"])
    table = (out / "table.md").read_text()
    assert "| + bottleneck | 2 |" in table
    assert "| *copy-paste* |  |" in table
    assert "Without" not in table
    page = Page((out / "index.html").read_text())
    assert "".join(page.text).count("not told apart") >= 2
    assert page.tags["svg"] == 1
    assert "evaluation/index.html" in page.values("href")
    assert "pbe app --dataset FOLDER" in "".join(page.text)
    assert (out / "ablations.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_another_process_trains_is_waited_for(small: LadderWorld, forked: list[str], tmp_path: Path, monkeypatch):
    """As the runs of a ladder that was killed: its own lock is free, and the trainer's is not."""
    out, waits = tmp_path / "ladder", []
    held = lock_folder(out / "runs" / "baseline-seed0", "held")
    held.__enter__()
    monkeypatch.setattr(runs_module, "LOOK_AGAIN_SECONDS", 0.0)

    def sleep(seconds: float) -> None:
        waits.append(list(forked))
        if len(waits) == 3:
            held.__exit__(None, None, None)
        time_sleep(seconds)

    time_sleep = time.sleep
    monkeypatch.setattr(runs_module.time, "sleep", sleep)
    done = call_program(ablations.main, *small.options(out, "--arms", "baseline", "--seeds", "1", "--only", "train"))
    assert done.returncode == 0, done.stderr
    assert waits[:3] == [[], [], []]
    assert forked == ["baseline-seed0"]
