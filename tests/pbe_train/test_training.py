"""The loop as users run it: torchrun, resuming, and what goes wrong."""

import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.distributed import DistBackendError

from pbe_core.errors import InputError
from pbe_core.files import lock_folder
from pbe_core.vae import weights_sha256
from pbe_train import train as train_module
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.trainer_checkpoint import read_part, read_state
from pbe_train.config import OptimizerSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.training_dataset import TrainingDataset
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pbe_train.training.optimizer import set_learning_rate
from pbe_train.training.progress import Progress
from pbe_train.training.validation import Pictures
from tests.pbe_train.small_world import World, make_dataset, make_vae

REPOSITORY = Path(__file__).resolve().parents[2]


def run(world: World, out: Path, *options: str) -> None:
    torch.manual_seed(len(options))  # The run must not depend on the generator it finds.
    train(world.settings(out, *options), Distributed(0, 1, torch.device("cpu")))


def weights(out: Path, step: int, part: str = "model") -> str:
    return weights_sha256(load_file(out / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors"))


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(out) if "loss" in line]


def metrics(out: Path) -> list[dict[str, float]]:
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with pictures and a checkpoint each 3."""
    out = tmp_path_factory.mktemp("run")
    pictures = ["--pictures.every=6", "--pictures.count=2", "--pictures.sampling_steps=2"]
    run(world, out, "--checkpoint_every=3", "--log_every=1", *pictures)
    return out


def test_a_run_leaves_what_it_promises(finished: Path):
    from PIL import Image

    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert [step for step, _ in losses(finished)] == [1, 2, 3, 4, 5, 6]
    assert list((finished / "tensorboard").glob("events*"))
    assert yaml.safe_load((finished / "settings.yaml").read_text())["train"]["global_batch"] == 4
    # Two rows and five columns: source, masked, reference, two guidance scales.
    assert Image.open(finished / "pictures" / "step-00000006.png").width == 5 * 166 + 6


def test_a_stopped_run_goes_on_bit_for_bit(world: World, finished: Path, tmp_path: Path):
    """6 steps straight = 3 steps, stop, 3 steps: weights, their average, moments and losses."""
    run(world, tmp_path, "--steps=3", "--log_every=1")
    run(world, tmp_path, "--steps=6", "--log_every=1")
    for part in ("model", "ema", "optimizer"):
        assert weights(tmp_path, 6, part) == weights(finished, 6, part), part
    assert losses(tmp_path) == losses(finished)


def test_half_precision_goes_on_bit_for_bit_too(world: World, tmp_path: Path):
    """With fp16 the loss is scaled, and the scale grows by what happened before: it is kept."""
    options = ["--precision=fp16", "--log_every=1"]
    run(world, tmp_path / "straight", *options, "--steps=6")
    run(world, tmp_path / "stopped", *options, "--steps=3")
    run(world, tmp_path / "stopped", *options, "--steps=6")
    for part in ("model", "ema", "optimizer"):
        assert weights(tmp_path / "stopped", 6, part) == weights(tmp_path / "straight", 6, part), part
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    last = read_state(tmp_path / "stopped" / "checkpoints" / "step-00000006")
    assert last.scaler["_growth_tracker"] == 6, "steps since the scale was last changed, over the stop"


def test_lines_beyond_the_checkpoint_are_dropped(world: World, finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    run(world, out, "--log_every=1", f"--resume={out / 'checkpoints' / 'step-00000003'}")
    assert losses(out) == losses(finished)


def test_metrics_go_to_weights_and_biases_where_it_is_asked_for(world: World, tmp_path: Path, monkeypatch):
    """Its own program, offline: what it would send lies in its file. A training that goes on goes on with the same run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    settings = world.settings(tmp_path, "--wandb", "paint")
    for first in (0, 1):
        progress = Progress(settings, first)
        progress.add(first + 1, {"validation_loss": 0.1875 + first})
        progress.show(first + 1, np.full((4, 4, 3), 200, np.uint8))
        progress.close()
        time.sleep(1.1)  # Its folders are named after the second.
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (tmp_path / "wandb.txt").read_text().strip()
    assert {file.stem for file in files} == {f"run-{name}"}
    written = b"".join(file.read_bytes() for file in files)
    for text in (b"validation_loss", b"0.1875", b"1.1875", b"global_batch", b"paint"):
        assert text in written
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/pictures*.png"))) == 2
    Progress(world.settings(tmp_path), 2).close()
    assert sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")) == files

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"train\.wandb: the package is not installed; pip install wandb"):
        Progress(settings, 0)


def test_the_rest_of_a_torn_line_and_of_an_earlier_start_is_dropped(world: World, tmp_path: Path):
    """A machine that stops may leave half a line; a run that starts at step 0 again shows one curve, not two."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (tmp_path / "tensorboard").mkdir()
    old = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    old.touch()
    settings = world.settings(tmp_path)
    Progress(settings, 1).close()
    assert losses(tmp_path) == [(1, 1.0)]
    assert old.exists()
    Progress(settings, 0).close()
    assert losses(tmp_path) == []
    assert not old.exists()


def test_the_learning_rate_rises_to_its_value_and_stays():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    rates = []
    for step in (0, 1, 3, 4, 1000):
        set_learning_rate(optimizer, OptimizerSettings(learning_rate=0.4, warmup_steps=4), step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])
    set_learning_rate(optimizer, OptimizerSettings(learning_rate=0.4, warmup_steps=0), 0)
    assert optimizer.param_groups[0]["lr"] == 0.4


def test_a_short_run_learns(world: World, tmp_path: Path):
    """The loss falls far below 1, that of a model that predicts 0 always; mere shrinking of the output would not get there."""
    run(world, tmp_path, "--steps=100", "--log_every=20", "--optimizer.learning_rate=3e-3", "--global_batch=8")
    assert losses(tmp_path)[-1][1] < 0.5


def launch(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """train.py by path, from another folder; under torchrun if `ranks`."""
    program = str(REPOSITORY / "pbe_train" / "train.py")
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0", "--standalone"]
    # On the CPU everywhere: two ranks need two GPUs, and sums on a GPU are others than those of the runs in this process.
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, program, *arguments], capture_output=True, text=True, cwd="/", check=False, env=hidden)


def test_two_ranks_train_one_model(world: World, tmp_path: Path):
    """20 steps under torchrun with accumulation; the ranks hold equal weights, and those of one rank up to rounding."""
    options = ["--steps=20", "--global_batch=8", "--ema_decay=0", "--log_every=1", "--optimizer.gradient_clip=0.1"]
    config = ["--config", str(world.config), "--out", str(tmp_path / "two")]
    done = launch(*config, *options, "--accumulation=2", "--loader.workers=1", ranks=2)
    assert done.returncode == 0, done.stderr
    hashes = json.loads((tmp_path / "two" / "finished.json").read_text())["weights_sha256"]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1] == weights(tmp_path / "two", 20)

    run(world, tmp_path / "one", *options)
    # AdamW and the clip hide a wrong scale of the gradient; its norm before the clip does not.
    for key in ("loss", "gradient_norm"):
        first = [metrics(tmp_path / name)[0][key] for name in ("one", "two")]
        assert first[0] == pytest.approx(first[1], rel=1e-4), key
    one, two = (load_file(tmp_path / name / "checkpoints/step-00000020/model.safetensors") for name in ("one", "two"))
    # AdamW divides by the gradient's size, so that rounding of gradients near zero shows as a step of the learning rate.
    apart = [float((one[name] - two[name]).abs().mean()) for name in one]
    assert max(apart) < 1e-3


class OtherRank(Distributed):
    """A rank among two, of which the other found no checkpoint, or has a card that computes otherwise."""

    other: tuple[object, ...]

    def gather(self, value):
        return [value, tuple(one if other is None else other for one, other in zip(value, self.other, strict=True))]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((0, "new", None, None), r"rank 0 starts at step 6 .* rank 1 starts at step 0 \(weights new\).* all machines share"),
        ((None, None, None, "fp16"), r"rank 0 .* in fp32; rank 1 .* in fp16; .* give --precision where the cards differ"),
    ],
)
def test_ranks_that_do_not_see_the_same_are_refused(world: World, finished: Path, monkeypatch, other, message: str):
    """As on two machines whose `out` is not shared, or whose cards differ."""
    monkeypatch.setattr(OtherRank, "other", other, raising=False)
    with pytest.raises(InputError, match=message):
        train(world.settings(finished, "--steps=7"), OtherRank(0, 1, torch.device("cpu")))


def test_a_run_keeps_the_precision_that_auto_was(world: World, finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    run(world, tmp_path / "run", "--precision=fp32", "--steps=7", "--log_every=1")
    with pytest.raises(InputError, match=r"was trained otherwise: precision 'fp32' -> 'bf16'\."):
        run(world, tmp_path / "run", "--precision=bf16", "--steps=8", "--log_every=1")


def test_a_rank_whose_peer_has_left_says_so_in_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other errors of a run of several ranks keep their traceback."""
    said = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(world.config), "--out", str(tmp_path)])
    full = "NCCL error: unhandled system error. Error while creating shared memory segment: No space left on device"
    cases = ((2, said, InputError), (1, said, RuntimeError), (2, "mat1 and mat2", RuntimeError), (2, full, DistBackendError))
    for ranks, text, expected in cases:
        monkeypatch.setattr(Distributed, "start", lambda *_, count=ranks: Distributed(1, count, torch.device("cpu")))

        def fail(*_, text: str = text, kind=RuntimeError if expected is InputError else expected):
            raise kind(text)

        monkeypatch.setattr(train_module, "train", fail)
        told = f"^rank 1: another rank has left; its own message says why \\({re.escape(said)}\\)$"
        message = told if expected is InputError else re.escape(text)
        with pytest.raises(expected, match=message):
            train_module.main()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"--nproc-per-node 2: this machine shows 1 GPU"):
        Distributed.start(1, "auto")


def test_damaged_samples_are_replaced_told_and_bounded(world: World, tmp_path: Path, capsys):
    shutil.copytree(world.dataset, tmp_path / "dataset")
    tar = tmp_path / "dataset" / "shards" / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    damaged = [f"--dataset={tmp_path / 'dataset'}", "--loader.on_corrupt=replace", "--log_every=1"]
    run(world, tmp_path / "run", *damaged)
    told = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("replaced: shard train-000001, sample train")
    ]
    assert len(told) == len(set(told)) == 8, "six steps are an epoch, and the shard has eight samples"
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match=r"3 samples are damaged, more than loader\.max_corrupt_samples 2, in train-000001\.tar"):
        run(world, tmp_path / "other", *damaged, "--loader.max_corrupt_samples=2")


def test_a_checkpoint_names_what_has_no_effect_too(world: World, finished: Path, tmp_path: Path):
    """As released weights do: queries of the attention to the one token. Nothing moves them, and a resumed run has them again."""
    folder = finished / "checkpoints"
    first, last = (load_file(folder / f"step-0000000{step}" / "model.safetensors") for step in (3, 6))
    average, moments = (load_file(folder / "step-00000006" / f"{part}.safetensors") for part in ("ema", "optimizer"))
    still = [
        name for name in last if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight")) and "attn" in name
    ]
    assert still
    assert last.keys() == average.keys()
    for name in still:
        assert torch.equal(first[name], last[name])
        assert torch.equal(average[name], last[name])
        assert f"exp_avg.{name}" not in moments


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    """Step 4 of 6; also where its loss looks well."""
    whole, steps = train_module.noise_losses, iter(range(99))

    def noise_losses(model, schedule, batch):
        losses = whole(model, schedule, batch)
        if next(steps) % 6 != 3:
            return losses
        # The value of the root's term is 0, its gradient infinity times 0.
        if broken == "gradient":
            return losses + (model.unet.conv_in.bias * 0).sqrt().sum() * 0
        return losses * torch.tensor([1, 1, math.nan, 1])

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    options = ["--log_every=2", "--checkpoint_every=1", "--keep_last=9"]
    run(world, tmp_path / "run", *options)
    assert [line["nonfinite_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 1, 0]
    assert all(loss < 10 for _, loss in losses(tmp_path / "run"))
    for part in ("model", "optimizer"):
        assert weights(tmp_path / "run", 3, part) == weights(tmp_path / "run", 4, part) != weights(tmp_path / "run", 5, part)

    with pytest.raises(InputError, match=r"more than max_nonfinite_steps 0: from step 4 to step 4, whose") as caught:
        run(world, tmp_path / "other", *options, "--max_nonfinite_steps=0")
    settings = world.settings(tmp_path / "other")
    keys = TrainingDataset(settings, open_reader(settings), 32).keys(3)
    named = f"samples with infinite losses were {keys[2]};" if broken == "loss" else f"and whose samples were {', '.join(keys)};"
    assert named in str(caught.value)
    assert "lower --optimizer.learning_rate" in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_goes_on_bit_for_bit_after_a_skipped_step(world: World, tmp_path: Path, monkeypatch, precision: str):
    """AdamW does not count such a step, so that its count is not the run's; and its infinite gradient waits for its line."""
    whole = train_module.noise_losses

    def breaking_at(wanted: int, first: int) -> None:
        steps = iter(range(first, 99))
        monkeypatch.setattr(
            train_module, "noise_losses", lambda *given: whole(*given) * (math.inf if next(steps) == wanted else 1)
        )

    options = ["--log_every=4", f"--precision={precision}"]
    breaking_at(1, 0)
    run(world, tmp_path / "straight", *options, "--steps=8")
    breaking_at(1, 0)
    # A checkpoint in the middle of a line, which the skipped step is a part of.
    run(world, tmp_path / "stopped", *options, "--steps=4", "--checkpoint_every=3")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000004")
    state = read_state(tmp_path / "stopped" / "checkpoints" / "step-00000003")
    assert (state.step, state.optimizer_step) == (3, 2)
    breaking_at(1, 3)
    run(world, tmp_path / "stopped", *options, "--steps=8")
    for part in ("model", "ema", "optimizer"):
        assert weights(tmp_path / "stopped", 8, part) == weights(tmp_path / "straight", 8, part), part
    assert [line["nonfinite_steps"] for line in metrics(tmp_path / "straight") if "loss" in line] == [1, 0]


def test_a_gradient_of_fp16_that_overflows_is_no_fault(world: World, tmp_path: Path, monkeypatch):
    """The scale of the loss grows until one does; only where it has shrunk to nothing, the steps that are skipped count."""
    whole, steps = train_module.noise_losses, iter(range(99))
    always = False

    def noise_losses(*given):
        return whole(*given) * (math.inf if always or next(steps) == 2 else 1)

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    options = ["--precision=fp16", "--max_nonfinite_steps=0", "--log_every=1"]
    run(world, tmp_path / "once", *options)
    assert [line["nonfinite_steps"] for line in metrics(tmp_path / "once") if "loss" in line] == [0, 0, 1, 0, 0, 0]
    always = True
    with pytest.raises(InputError, match="more than max_nonfinite_steps 0: from step 1 to step 16"):  # 65536 is 2^16.
        run(world, tmp_path / "always", *options, "--steps=40")


def test_weights_that_broke_are_never_saved(world: World, tmp_path: Path):
    """A learning rate so high that a step with a finite gradient makes infinite weights."""
    with pytest.raises(
        InputError, match=r"not a number by step 2 \(no checkpoint was written\).*lower --optimizer\.learning_rate"
    ):
        run(world, tmp_path, "--checkpoint_every=2", "--optimizer.learning_rate=1e38", "--optimizer.warmup_steps=0")
    assert not (tmp_path / "checkpoints").exists()


def test_errors_are_one_line_and_status_2(world: World, tmp_path: Path):
    """Also one that comes from a loader's process, while the others are at work: none of them is waited for."""
    shutil.copytree(world.dataset, tmp_path / "dataset")
    for path in (tmp_path / "dataset").glob("shards/train*.tar"):
        os.truncate(path, 6000)
    folders = ["--dataset", str(tmp_path / "dataset"), "--out", str(tmp_path / "run")]
    done = launch("--config", str(world.config), *folders, "--loader.workers=2")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path}/dataset/shards/train-00000")
    assert " is damaged " in done.stderr


def test_another_vae_is_refused(world: World, tmp_path: Path):
    make_vae(tmp_path / "other", 1)
    with pytest.raises(InputError, match=r"dataset\.json: the latents were made by vae .* set model\.vae to that VAE"):
        run(world, tmp_path / "run", f"--model.vae={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global_batch=8"], r"was trained otherwise: global_batch 4 -> 8\."),
        (["--optimizer.learning_rate=0.5"], r"optimizer\.learning_rate 0\.001 -> 0\.5\."),
        (["--model.reference_geometry=pad"], r"model\.reference_geometry 'squash' -> 'pad'"),
        (["--augmentation.preset=strong"], r"augmentation\.preset 'paper' -> 'strong'"),
        (["--model.tokens=all"], r"model\.tokens 'class' -> 'all'"),
        (["--steps=5"], r"is at step 6 already"),
        (["--resume=never"], r"this run folder is in use"),
    ],
)
def test_a_run_is_not_continued_as_another(world: World, finished: Path, options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        run(world, finished, *options)


def test_a_checkpoint_of_the_version_before_is_read_with_the_names_of_today(world: World, finished: Path, tmp_path: Path):
    """By the trainer and for painting; a value that is another constant now makes another run."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "checkpoints" / "step-00000006" / "state.json"
    state = json.loads(path.read_text())
    settings = state["settings"]
    for key, name in {"guidance_dropout": "condition_dropout", "checkpoints_kept": "keep_last"}.items():
        settings[key] = settings.pop(name)
    settings["loader"]["on_damage"] = settings["loader"].pop("on_corrupt")
    settings["watchdog_minutes"] = 3.0
    settings["pictures"]["guidance"] = [2.0]
    settings["augmentation"]["flip"] = 0.5
    settings["optimizer"]["betas"] = [0.9, 0.999]
    path.write_text(json.dumps(state))
    assert load_run(out).settings.condition_dropout == 0.2
    run(world, out, "--steps=7")
    settings["optimizer"]["betas"] = [0.9, 0.99]
    path.write_text(json.dumps(state))
    shutil.rmtree(out / "checkpoints" / "step-00000007")
    with pytest.raises(InputError, match=r"was trained otherwise: optimizer\.betas"):
        run(world, out, "--steps=7")
    with pytest.raises(InputError, match=r"settings\.optimizer\.betas: .* another version"):
        load_run(out)


def test_a_folder_that_is_no_checkpoint_is_never_to_be_deleted(world: World, finished: Path, tmp_path: Path):
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    for folder in (precious, tmp_path / "step-00000001", tmp_path / "gone"):
        with pytest.raises(InputError, match=r"no checkpoint here; --resume takes auto, never, a run folder or") as caught:
            run(world, tmp_path / "run", f"--resume={folder}")
        assert "delete" not in str(caught.value)
    # A checkpoint under a name of its own, damaged: there is no checkpoint before it to go on from.
    shutil.copytree(finished / "checkpoints" / "step-00000006", tmp_path / "best")
    (tmp_path / "best" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="give another checkpoint"):
        run(world, tmp_path / "run", f"--resume={tmp_path / 'best'}")


def test_a_dataset_that_was_mended_is_another_one(world: World, finished: Path, tmp_path: Path):
    """Its fingerprint is that of the plan; with other samples in its shards, the order is another one."""
    make_dataset(
        tmp_path / "mended", AutoencoderKL.from_pretrained(world.vae), "vae", {"train": [5, 8, 6, 6], "validation": [12]}
    )
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(InputError, match="its dataset had other samples in its shards then") as caught:
        run(world, tmp_path / "run", f"--dataset={tmp_path / 'mended'}", "--steps=9")
    assert "fingerprint" not in str(caught.value)


def test_another_runs_checkpoint_is_not_continued_in_a_folder_that_is_in_use(world: World, finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(InputError, match=r"this run folder is in use, and --resume .* is another run's; give another --out"):
        run(world, tmp_path / "run", f"--resume={finished}", "--steps=9")
    assert saved(tmp_path / "run") == saved(finished)


def test_a_folder_takes_one_training_at_a_time(world: World, finished: Path, tmp_path: Path):
    with lock_folder(tmp_path / "run", "x"):
        done = launch("--config", str(world.config), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path / 'run'}: {train_module.IN_USE}"


def test_a_branch_that_was_left_is_kept_also_where_the_new_one_comes_to_the_same_step(
    world: World, finished: Path, tmp_path: Path
):
    shutil.copytree(finished, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    left = (checkpoints / "step-00000006" / "state.json").stat().st_ino
    for number in ("", "-2"):
        run(world, tmp_path / "run", f"--resume={checkpoints / 'step-00000003'}", "--checkpoint_every=9")
        assert (checkpoints / f"left-step-00000006{number}").is_dir()
        run(world, tmp_path / "run", "--steps=7", "--checkpoint_every=9")  # Else the same command would go on with its branch.
    assert (checkpoints / "left-step-00000006" / "state.json").stat().st_ino == left


def test_a_run_that_went_back_goes_on_from_its_new_branch(world: World, finished: Path, tmp_path: Path, capsys):
    """Even if only one checkpoint is kept: the one just written, whatever the branch that was left had reached."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    back = f"--resume={out / 'checkpoints' / 'step-00000003'}"
    run(world, out, back, "--steps=4", "--keep_last=1")
    assert saved(out) == ["left-step-00000006", "step-00000004"]
    assert "step-00000006: this run went back to before it; set aside" in capsys.readouterr().out
    run(world, out, "--steps=6", "--keep_last=1")
    assert f"going on from {out / 'checkpoints' / 'step-00000004'}" in capsys.readouterr().out
    assert weights(out, 6) == weights(finished, 6)


@pytest.mark.parametrize("place", ["own checkpoint", "other run"])
def test_the_same_command_goes_on_with_the_branch_that_it_began(world: World, finished: Path, tmp_path: Path, capsys, place: str):
    """Also with `--resume PATH`, as a batch system that starts a job again gives it; nothing that was reached is set aside."""
    out = tmp_path / "run"
    source = finished
    if place == "own checkpoint":
        shutil.copytree(finished, out)
        source = out / "checkpoints" / "step-00000003"
    run(world, out, f"--resume={source}", "--steps=7")
    before = saved(out)
    capsys.readouterr()
    run(world, out, f"--resume={source}", "--steps=8")
    assert f"going on from {out / 'checkpoints' / 'step-00000007'}" in capsys.readouterr().out
    assert set(before) - {"step-00000003", "step-00000006"} <= set(saved(out))
    run(world, tmp_path / "straight", "--steps=8")
    assert weights(out, 8) == weights(tmp_path / "straight", 8)


def test_pictures_that_cannot_be_drawn_cost_no_checkpoint(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a run without the memory for them would start from the same step again and again."""

    def draw(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pictures, "draw", draw)
    with pytest.raises(torch.OutOfMemoryError):
        run(world, tmp_path, "--pictures.every=3", "--checkpoint_every=3")
    assert saved(tmp_path) == ["step-00000003"]


def test_a_damaged_held_out_sample_is_left_out_of_pictures_where_damage_is_put_up_with(world: World, tmp_path: Path, capsys):
    shutil.copytree(world.dataset, tmp_path / "dataset")
    row = pq.read_table(tmp_path / "dataset" / "index.parquet", filters=[("shard", "==", "validation-000000")]).to_pylist()[0]
    with (tmp_path / "dataset" / "shards" / "validation-000000.tar").open("r+b") as tar:
        tar.seek(row["ref_jpg"]["offset"] + 20)
        tar.write(b"damage")
    options = [f"--dataset={tmp_path / 'dataset'}", "--validation.every=0", "--pictures.every=6", "--steps=1"]
    with pytest.raises(InputError, match=rf"sample {row['key']} is damaged"):
        run(world, tmp_path / "stop", *options)
    run(world, tmp_path / "replace", *options, "--loader.on_corrupt=replace")
    assert f"left out of the held-out samples: {tmp_path}/dataset/shards/validation-000000.tar: sample {row['key']}" in (
        capsys.readouterr().err
    )
    assert list((tmp_path / "replace" / "pictures").iterdir())


def test_a_loader_process_that_was_killed_is_told_in_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the system does that has no memory left."""
    whole = train_module.noise_losses

    def noise_losses(*given):
        for child in multiprocessing.active_children():
            child.kill()
        return whole(*given)

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    monkeypatch.setattr(Distributed, "start", lambda *_: Distributed(0, 1, torch.device("cpu")))
    options = ["--out", str(tmp_path), "--steps=60", "--loader.workers=1"]
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(world.config), *options])
    with pytest.raises(InputError, match=r"^rank 0: DataLoader worker .*; was memory short\? Then lower --loader\.workers$"):
        train_module.main()


def test_a_resumed_run_needs_no_prior(world: World, finished: Path, tmp_path: Path):
    """Its weights are in the checkpoint; where the prior lay says nothing any more."""
    shutil.copytree(finished, tmp_path / "run")
    run(world, tmp_path / "run", "--steps=6", f"--model.pretrained={tmp_path / 'nowhere'}")


def test_a_checkpoint_of_another_model_is_refused(finished: Path):
    """By name and shape of each tensor, no more and no fewer."""
    folder = finished / "checkpoints" / "step-00000006"
    state, held = read_state(folder), load_file(folder / "model.safetensors")
    read_part(folder, state, "model", held)
    name = min(held)
    fewer = {key: value for key, value in held.items() if key != name}
    for expected in (fewer, {**held, "more": held[name]}, {**held, name: held[name][None]}):
        with pytest.raises(InputError, match=r"model\.safetensors: does not fit the model of its settings"):
            read_part(folder, state, "model", expected)


def test_pictures_of_a_run_without_dropout_are_not_guided(world: World, tmp_path: Path, capsys):
    from PIL import Image

    pictures = ["--pictures.every=1", "--pictures.count=1", "--pictures.sampling_steps=1"]
    run(world, tmp_path, "--steps=1", "--condition_dropout=0", *pictures)
    assert Image.open(tmp_path / "pictures" / "step-00000001.png").width == 4 * 166 + 6
    assert "pictures are painted with guidance 1 alone" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no state", "no file", "short file", "other bytes"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(world: World, finished: Path, tmp_path: Path, damage: str):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    folder = out / "checkpoints" / "step-00000006"
    file = folder / ("state.json" if damage == "no state" else "optimizer.safetensors")
    data = bytearray(file.read_bytes())
    if damage in ("no state", "no file"):
        file.unlink()
    elif damage == "short file":
        file.write_bytes(data[:-100])
    else:
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        run(world, out, "--steps=7")
    assert str(caught.value).startswith(str(file))
    assert f"delete {folder} to go on" in str(caught.value)
    shutil.rmtree(folder)
    run(world, out, "--steps=6")
    assert weights(out, 6) == weights(finished, 6)


def test_a_finished_run_that_is_started_again_clears_away_what_a_killed_one_left(
    world: World, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Half removed after its last checkpoint was there: no further checkpoint is written that would see to it."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "checkpoints" / ".step-00000001.partial").mkdir()
    (out / f".metrics.jsonl.{'0' * 32}.tmp").touch()
    monkeypatch.setattr(Distributed, "start", lambda *_: Distributed(0, 1, torch.device("cpu")))
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(world.config), "--out", str(out), "--checkpoint_every=3"])
    assert train_module.main() == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert not list(out.glob(".*.tmp"))


def test_only_the_newest_checkpoints_are_kept(world: World, tmp_path: Path):
    run(world, tmp_path, "--checkpoint_every=1", "--keep_last=2", "--steps=4")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_an_uneven_batch_is_refused(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="global_batch 4 cannot be cut evenly into 1 rank x 3 micro-batches"):
        run(world, tmp_path, "--accumulation=3")
    assert not list(tmp_path.iterdir())
