"""The ladder of ablations: what differs between its arms, and the program end to end on the small world, with runs that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pbe_core.errors import InputError
from pbe_core.files import lock_folder
from pbe_core.settings import REPOSITORY, load_settings, preset
from pbe_train import ablations
from pbe_train.checkpoints.from_pretrained import init_from_pretrained
from pbe_train.checkpoints.networks import STABLE_DIFFUSION, load_vae, unet_config
from pbe_train.config import TrainSettings, UNetSettings
from pbe_train.ladder import runs as runs_module
from pbe_train.ladder.arms import ARMS, choose_arms, flat, settings_of, sizes_of, with_sizes_of_start
from pbe_train.ladder.intervals import difference, estimate
from pbe_train.ladder.runs import is_in_use
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.conftest import Done, call_program
from tests.html_page import Page
from tests.pbe_train.ladder_world import LABELS, PAIRS, LadderWorld, make_ladder_world, make_start
from tests.pbe_train.programs import start
from tests.pbe_train.small_world import World

# Of each run by what it is, whatever the preset says.
OF_RUNS = {"out", "seed", "keep_last", "pictures.every"}


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


def of_arms(settings: TrainSettings) -> list[TrainSettings]:
    settings = with_sizes_of_start(settings)
    return [settings_of(arm, settings, 1, Path("runs") / arm.name) for arm in ARMS]


@pytest.mark.parametrize("name", ["small", "open_images"])
def test_each_arm_has_one_setting_more_and_the_last_is_the_preset(name: str, small: LadderWorld):
    given = ["--config", str(preset(name) if name == "open_images" else small.world.config)]
    more = [] if name == "open_images" else [f"--model.pretrained={small.start}"]
    settings = load_settings(TrainSettings, "train", [*given, *more])
    arms = [flat(one.model_dump(mode="json")) for one in of_arms(settings)]
    keys = [arm.key for arm in ARMS[1:]]
    assert keys == ["model.pretrained", "augmentation.preset", "model.tokens", "condition_dropout"]
    for place, (before, arm) in enumerate(pairwise(arms)):
        assert [key for key in arm if arm[key] != before[key] and key != "out"] == [keys[place]]
    whole = flat(settings.model_dump(mode="json"))
    assert {key for key in whole if whole[key] != arms[-1][key]} <= OF_RUNS
    assert [arms[0][key] for key in keys] == [None, "none", "all", 0]


def test_without_a_prior_only_the_weights_differ(small: LadderWorld):
    """Whatever sizes the preset names for a U-Net from scratch."""
    options = [f"--model.pretrained={small.start}", "--model.unet.layers_per_block=2"]
    scratch, begun, *_ = of_arms(small.world.settings(Path("unused"), *options))
    models = [init_from_pretrained(one, load_vae(str(small.world.vae)))[0] for one in (scratch, begun)]
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    same = torch.equal(*(model.unet.conv_out.weight for model in models))
    assert not same


def test_sizes_of_a_start():
    assert sizes_of(unet_config(STABLE_DIFFUSION), "here") == UNetSettings()
    config = {**unet_config(STABLE_DIFFUSION), "attention_head_dim": [8, 8, 8, 8], "sample_size": 64}
    assert sizes_of(config, "here") == UNetSettings()
    for change, cause in (
        ({"attention_head_dim": [5, 10, 20, 20]}, "attention_head_dim"),
        ({"use_linear_projection": True}, "use_linear_projection True, not False"),
        ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
    ):
        with pytest.raises(InputError, match=f"here: no U-Net from scratch has its sizes.*{cause}"):
            sizes_of({**config, **change}, "here")


def test_an_arm_that_adds_nothing_is_refused(small: LadderWorld):
    whole = [f"--model.pretrained={small.start}"]
    settings = small.world.settings(Path("unused"), *whole)
    assert choose_arms([], settings) == list(ARMS)
    assert [arm.name for arm in choose_arms(["guidance", "prior"], settings)] == ["prior", "guidance"]
    for options, names, cause in (
        ([], [], r"`\+ prior` adds model.pretrained.*--model.pretrained FOLDER.*--arms baseline augmentation"),
        ([*whole, "--augmentation.preset=none"], [], "--augmentation.preset paper"),
        ([*whole, "--condition_dropout=0"], ["guidance"], "adds condition_dropout"),
        (whole, ["gidance"], "--arms gidance: no such arm; there are baseline, prior"),
    ):
        with pytest.raises(InputError, match=cause):
            choose_arms(names, small.world.settings(Path("unused"), *options))
    assert choose_arms(["baseline"], small.world.settings(Path("unused")))


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
    assert (out / "ablations.png").read_bytes()[:4] == b"\x89PNG"


def test_ctrl_c_and_sigterm_save_the_runs_and_the_same_command_goes_on(small: LadderWorld, tmp_path: Path):
    """The real command, whose run would never come to its end."""
    out = tmp_path / "ladder"
    options = small.options(out, "--arms", "baseline", "--seeds", "1", "--steps", "1000000", "--only", "train")
    command = [sys.executable, "-m", "pbe_train.ablations", *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        metrics = out / "runs" / "baseline-seed0" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        assert is_in_use(metrics.parent)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on from there" in said
    assert not is_in_use(metrics.parent)
    assert list((metrics.parent / "checkpoints").glob("step-*"))
    assert "is saved" in (out / "runs" / "baseline-seed0.log").read_text()


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


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--seed", "3"], "--seed: each run gets its own"),
        (["--seeds", "0"], "--seeds 0: must be 1 or more"),
        (["--only", "evaluate", "--launch", "torchrun"], "torchrun ... --only evaluate"),
        (["--only", "evaluate"], "no run is finished"),
        (["--optimiser.learning_rate", "1"], "did you mean"),
        (["--judge", "eye:dinov3=there"], "dinov3"),
    ],
)
def test_what_is_wrong_is_one_line(options: list[str], cause: str, small: LadderWorld, forked: list[str], tmp_path: Path):
    done = call_program(ablations.main, *small.options(tmp_path / "ladder", *options))
    assert done.returncode == 2
    assert cause in done.stderr
    assert done.stderr.count("error:") == 1
    assert not forked


def test_quick_asks_less_and_what_is_given_counts():
    given = ["--pairs", "p", "--judge", "clip=c"]
    options, trainer = ablations.parse_options([*given, "--quick", "--count", "50", "--dataset", "d", "--ema_decay=0.9"])
    assert (options.steps, options.seeds, options.count) == (40, 2, 50)
    assert options.out.name == "ablations-quick"
    assert trainer == ["--dataset", "d", "--ema_decay=0.9"]
    options, _ = ablations.parse_options(given)
    assert (options.steps, options.seeds, options.count, options.sampling_steps) == (None, 3, None, 25)
    assert LABELS >= 8, "else nobody is recognised among eight"
