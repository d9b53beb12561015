"""The loop as users run it: what a run leaves, how it goes on, and what goes wrong."""

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
from PIL import Image
from safetensors.torch import load_file

from pbe_core.errors import InputError
from pbe_core.files import lock_folder
from pbe_core.settings import REPOSITORY
from pbe_core.vae import weights_sha256
from pbe_train import train as train_module
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.trainer_checkpoint import read_part, read_state
from pbe_train.config import TRAIN_SPLIT, OptimizerSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.training_dataset import TrainingDataset
from pbe_train.train import train
from pbe_train.training import validation
from pbe_train.training.distributed import Distributed
from pbe_train.training.optimizer import set_learning_rate
from pbe_train.training.progress import Progress
from pbe_train.training.validation import Pictures
from tests.pbe_train.small_world import World, make_dataset, make_vae

ONE = Distributed(0, 1, torch.device("cpu"))
STEPS = 4
"""Of the finished run."""


def run(world: World, out: Path, *options: str) -> None:
    torch.manual_seed(len(options))  # The run must not depend on the generator it finds.
    train(world.settings(out, f"--steps={STEPS}", "--log_every=1", "--validation.every=0", *options), ONE)


def start(world: World, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The program's main function, with its command line, in this process."""
    monkeypatch.setattr(Distributed, "start", lambda *_: ONE)
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(world.config), "--out", str(out), *options])
    return train_module.main()


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def weights(out: Path, step: int) -> list[str]:
    """Hashes of the weights, their average and the moments."""
    return [weights_sha256(load_file(checkpoint(out, step) / f"{part}.safetensors")) for part in ("model", "ema", "optimizer")]


def saved(out: Path) -> list[str]:
    return sorted(path.name.replace("step-0000000", "") for path in (out / "checkpoints").iterdir())


def metrics(out: Path, key: str = "loss") -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


@pytest.fixture(autouse=True, scope="module")
def few_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "PAINTED", 2)
        patch.setattr(validation, "SAMPLING_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with pictures, and a checkpoint each 2."""
    out = tmp_path_factory.mktemp("run")
    run(world, out, "--checkpoint_every=2", "--pictures.every=4")
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """One's own copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_leaves_what_it_promises(finished: Path):
    assert saved(finished) == ["2", "4"]
    assert [step for step, _ in metrics(finished)] == [1, 2, 3, 4]
    assert list((finished / "tensorboard").glob("events*"))
    assert yaml.safe_load((finished / "settings.yaml").read_text())["train"]["global_batch"] == 4
    # Two rows and five columns: source, masked, reference, two guidance scales.
    assert Image.open(finished / "pictures" / "step-00000004.png").width == 5 * 166 + 6


def test_a_short_run_learns(world: World, tmp_path: Path):
    """The loss falls far below 1, that of a model that predicts 0 always; mere shrinking of the output would not get there."""
    run(world, tmp_path, "--steps=45", "--log_every=15", "--optimizer.learning_rate=5e-3", "--global_batch=8")
    assert metrics(tmp_path)[-1][1] < 0.6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_goes_on_bit_for_bit(world: World, tmp_path: Path, monkeypatch, precision: str):
    """From a checkpoint in the middle of a line of metrics, after a skipped step, which AdamW does not count. Where the weights
    of the start lay says nothing any more. The scale of fp16's loss grows by what happened before: it is kept.
    """
    whole = train_module.noise_losses

    def breaking_at(wanted: int, first: int) -> None:
        steps = iter(range(first, 99))
        monkeypatch.setattr(
            train_module, "noise_losses", lambda *given: whole(*given) * (math.inf if next(steps) == wanted else 1)
        )

    options, (calm, stopped) = ["--log_every=4", f"--precision={precision}"], (tmp_path / "calm", tmp_path / "stopped")
    breaking_at(1, 0)
    run(world, calm, *options, "--steps=6")
    breaking_at(1, 0)
    run(world, stopped, *options, "--steps=3")
    state = read_state(checkpoint(stopped, 3))
    assert (state.step, state.optimizer_step) == (3, 2)
    breaking_at(1, 3)
    run(world, stopped, *options, "--steps=6", f"--model.pretrained={tmp_path / 'nowhere'}")
    assert weights(stopped, 6) == weights(calm, 6)
    assert read_state(checkpoint(stopped, 6)).scaler == read_state(checkpoint(calm, 6)).scaler
    assert metrics(calm, "nonfinite_steps")[0] == (4, 1)
    assert metrics(stopped)[-1] == metrics(calm)[-1]


def test_a_run_that_went_back_goes_on_from_its_new_branch(world: World, finished: Path, copied: Path, capsys):
    """Lines beyond the checkpoint are dropped; checkpoints of the branch that was left stay, even if only one is kept."""
    left = (checkpoint(copied, 4) / "state.json").stat().st_ino
    back = f"--resume={checkpoint(copied, 2)}"
    run(world, copied, back, "--steps=3", "--keep_last=1")
    assert saved(copied) == ["3", "left-4"]
    assert "step-00000004: this run went back to before it; set aside" in capsys.readouterr().out
    run(world, copied, "--keep_last=1")
    assert f"going on from {checkpoint(copied, 3)}" in capsys.readouterr().out
    assert weights(copied, 4) == weights(finished, 4)
    assert metrics(copied) == metrics(finished)
    assert saved(copied) == ["4", "left-4"]
    # Another branch that comes to the same step; the first one that was left is still there.
    shutil.copytree(checkpoint(finished, 2), checkpoint(copied, 2))
    run(world, copied, back)
    assert saved(copied) == ["2", "4", "left-4", "left-4-2"]
    assert (copied / "checkpoints" / "left-step-00000004" / "state.json").stat().st_ino == left


@pytest.mark.parametrize("place", ["own checkpoint", "other run"])
def test_the_same_command_goes_on_with_the_branch_that_it_began(world: World, finished: Path, tmp_path: Path, capsys, place: str):
    """Also with `--resume PATH`, as a batch system that starts a job again gives it; nothing that was reached is set aside."""
    out = tmp_path / "run"
    source = finished
    if place == "own checkpoint":
        shutil.copytree(finished, out)
        source = checkpoint(out, 2)
    run(world, out, f"--resume={source}", "--steps=5")
    before = saved(out)
    run(world, out, f"--resume={source}", "--steps=6")
    assert f"going on from {checkpoint(out, 5)}" in capsys.readouterr().out
    assert set(before) - {"2", "4"} <= set(saved(out))
    run(world, tmp_path / "straight", "--steps=6")
    assert weights(out, 6) == weights(tmp_path / "straight", 6)


def without_block_headers(log: bytes) -> bytes:
    """The records of a LevelDB log, as W&B's files are behind their first 7 bytes: one may be cut anywhere, where a block ends.

    Blocks have 32 KiB; a piece has its checksum, its length and its kind before it (7 bytes), and less than that at a block's end
    is filling.
    """
    found, place = [], 7
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length = int.from_bytes(log[place + 4 : place + 6], "little")
        found.append(log[place + 7 : place + 7 + length])
        place += 7 + length
    return b"".join(found)


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
        time.sleep(1.1 * (1 - first))  # Its folders are named after the second.
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (tmp_path / "wandb.txt").read_text().strip()
    assert [file.stem for file in files] == [f"run-{name}"] * 2
    written = b"".join(without_block_headers(file.read_bytes()) for file in files)
    assert all(text in written for text in (b"validation_loss", b"0.1875", b"1.1875", b"global_batch", b"paint"))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/pictures*.png"))) == 2

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"train\.wandb: the package is not installed"):
        Progress(settings, 0)


def test_the_rest_of_a_torn_line_and_of_an_earlier_start_is_dropped(world: World, tmp_path: Path):
    """A machine that stops may leave half a line; a run that starts at step 0 again shows one curve, not two."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (tmp_path / "tensorboard").mkdir()
    old = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    old.touch()
    for first, kept in ((1, [(1, 1.0)]), (0, [])):
        Progress(world.settings(tmp_path), first).close()
        assert metrics(tmp_path) == kept
        assert old.exists() == (first == 1)


@pytest.mark.parametrize(
    ("warmup", "cooldown", "step", "rate"),
    [
        *((4, 0, 0, 0.1), (4, 0, 1, 0.2), (4, 0, 3, 0.4), (4, 0, 4, 0.4), (4, 0, 1999, 0.4), (0, 0, 0, 0.4)),
        *((4, 0.25, 1, 0.2), (4, 0.25, 1500, 0.4), (4, 0.25, 1750, 0.2), (4, 0.25, 1999, 0.0008)),
        *((2000, 1, 1, 0.0004), (2000, 1, 1000, 0.2), (2000, 1, 1999, 0.0002)),
    ],
)
def test_the_learning_rate_rises_stays_and_falls_at_the_end(warmup: int, cooldown: float, step: int, rate: float):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    settings = OptimizerSettings(learning_rate=0.4, warmup_steps=warmup, cooldown=cooldown)
    set_learning_rate(optimizer, settings, step, steps=2000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_errors_are_one_line_and_status_2(world: World, tmp_path: Path):
    """The program by its path, from another folder; the error is a loader's, whose other processes are not waited for."""
    shutil.copytree(world.dataset, tmp_path / "dataset")
    for path in (tmp_path / "dataset").glob("shards/train*.tar"):
        os.truncate(path, 6000)
    options = ["--config", str(world.config), "--dataset", str(tmp_path / "dataset"), "--out", str(tmp_path / "run")]
    command = [sys.executable, str(REPOSITORY / "pbe_train" / "train.py"), *options, "--loader.workers=2"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, env=hidden)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path}/dataset/shards/train-00000")
    assert " is damaged " in done.stderr


class OtherRank(Distributed):
    """A rank among two, of which the other found no checkpoint, or has a card that computes otherwise."""

    other: tuple[object, ...]

    def gather(self, value):
        return [value, tuple(one if other is None else other for one, other in zip(value, self.other, strict=True))]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((0, "new", None, None), r"rank 0 starts at step 4 .* rank 1 starts at step 0 \(weights new\).* all machines share"),
        ((None, None, None, "fp16"), r"rank 0 .* in fp32; rank 1 .* in fp16; .* give --precision where the cards differ"),
    ],
)
def test_ranks_that_do_not_see_the_same_are_refused(world: World, finished: Path, monkeypatch, other, message: str):
    """As on two machines whose `out` is not shared, or whose cards differ."""
    monkeypatch.setattr(OtherRank, "other", other, raising=False)
    with pytest.raises(InputError, match=message):
        train(world.settings(finished, "--steps=7"), OtherRank(0, 1, torch.device("cpu")))


def test_a_rank_whose_peer_has_left_says_so_in_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other errors of a run of several ranks keep their traceback."""
    said = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(world.config), "--out", str(tmp_path)])
    for ranks, text, expected in ((2, said, InputError), (1, said, RuntimeError), (2, "NCCL error: no space", RuntimeError)):
        monkeypatch.setattr(Distributed, "start", lambda *_, count=ranks: Distributed(1, count, torch.device("cpu")))

        def fail(*_, text: str = text):
            raise RuntimeError(text)

        monkeypatch.setattr(train_module, "train", fail)
        told = f"^rank 1: another rank has left; its own message says why \\({re.escape(said)}\\)$"
        with pytest.raises(expected, match=told if expected is InputError else re.escape(text)):
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
    os.truncate(tmp_path / "dataset" / "shards" / "train-000001.tar", 6000)
    damaged = [f"--dataset={tmp_path / 'dataset'}", "--loader.on_corrupt=replace", "--steps=6"]
    run(world, tmp_path / "run", *damaged)
    told = re.findall("^replaced: shard train-000001, sample train.*$", capsys.readouterr().err, re.MULTILINE)
    assert len(told) == len(set(told)) == 8, "six steps are an epoch, and the shard has eight samples"
    assert [step for step, _ in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(
        InputError, match=r"3 samples are damaged, more than loader\.max_corrupt_samples 2, in train-000001\.tar \(3\): train"
    ):
        run(world, tmp_path / "other", *damaged, "--loader.max_corrupt_samples=2")


def test_a_checkpoint_names_what_has_no_effect_too(finished: Path):
    """As released weights do: queries of the attention to the one token. Nothing moves them, and a resumed run has them again."""
    first, last = (load_file(checkpoint(finished, step) / "model.safetensors") for step in (2, 4))
    average, moments = (load_file(checkpoint(finished, 4) / f"{part}.safetensors") for part in ("ema", "optimizer"))
    still = [name for name in last if re.search(r"attn2\.to_[qk]\.weight$|transformer_blocks\.\d\.norm2\.weight$", name)]
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
    """Step 2 of 3; also where its loss looks well."""
    whole, steps = train_module.noise_losses, iter(range(99))

    def noise_losses(model, schedule, batch):
        losses = whole(model, schedule, batch)
        if next(steps) % 3 != 1:
            return losses
        # The value of the root's term is 0, its gradient infinity times 0.
        if broken == "gradient":
            return losses + (model.unet.conv_in.bias * 0).sqrt().sum() * 0
        return losses * torch.tensor([1, 1, math.nan, 1])

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    options = ["--steps=3", "--checkpoint_every=1"]
    run(world, tmp_path / "run", *options)
    assert metrics(tmp_path / "run", "nonfinite_steps") == [(1, 0), (2, 1), (3, 0)]
    assert all(loss < 10 for _, loss in metrics(tmp_path / "run"))
    one, two, three = (weights(tmp_path / "run", step) for step in (1, 2, 3))
    assert (one[0], one[2]) == (two[0], two[2])
    assert two[0] != three[0]

    with pytest.raises(InputError, match=r"more than max_nonfinite_steps 0: from step 2 to step 2, whose") as caught:
        run(world, tmp_path / "other", *options, "--max_nonfinite_steps=0")
    settings = world.settings(tmp_path / "other")
    keys = TrainingDataset(settings, open_reader(settings, TRAIN_SPLIT), 32).keys(1)
    named = f"samples with infinite losses were {keys[2]};" if broken == "loss" else f"and whose samples were {', '.join(keys)};"
    assert named in str(caught.value)


def test_a_gradient_of_fp16_that_overflows_is_no_fault(world: World, tmp_path: Path, monkeypatch):
    """The scale of the loss grows until one does; only where it has shrunk to nothing, the steps that are skipped count."""
    whole, steps = train_module.noise_losses, iter(range(99))
    always = False

    def noise_losses(*given):
        return whole(*given) * (math.inf if always or next(steps) == 1 else 1)

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    options = ["--precision=fp16", "--max_nonfinite_steps=0"]
    run(world, tmp_path / "once", *options, "--steps=3")
    assert metrics(tmp_path / "once", "nonfinite_steps") == [(1, 0), (2, 1), (3, 0)]
    always = True
    with pytest.raises(InputError, match="more than max_nonfinite_steps 0: from step 1 to step 16"):  # 65536 is 2^16.
        run(world, tmp_path / "always", *options, "--steps=40")


def test_weights_that_broke_are_never_saved(world: World, tmp_path: Path):
    """A learning rate so high that a step with a finite gradient makes infinite weights."""
    options = ["--checkpoint_every=2", "--optimizer.learning_rate=1e38", "--optimizer.warmup_steps=0"]
    with pytest.raises(InputError, match=r"not a number by step 2 \(no checkpoint was written\)"):
        run(world, tmp_path, *options)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global_batch=8"], r"was trained otherwise: global_batch 4 -> 8\."),
        (["--optimizer.learning_rate=0.5"], r"optimizer\.learning_rate 0\.001 -> 0\.5\."),
        (["--model.reference_geometry=pad"], r"model\.reference_geometry 'squash' -> 'pad'"),
        (["--augmentation.preset=strong"], r"augmentation\.preset 'paper' -> 'strong'"),
        (["--model.tokens=all"], r"model\.tokens 'class' -> 'all'"),
        (["--precision=bf16"], r"was trained otherwise: precision 'fp32' -> 'bf16'\."),
        (["--steps=3"], r"is at step 4 already"),
        (["--resume=never"], r"this run folder is in use"),
        (["--accumulation=3"], "global_batch 4 cannot be cut evenly into 1 rank x 3 micro-batches"),
    ],
)
def test_a_run_is_not_continued_as_another(world: World, finished: Path, options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        run(world, finished, *options)


def test_a_checkpoint_of_the_version_before_is_read_with_the_names_of_today(world: World, copied: Path):
    """By the trainer and for painting; a value that is another constant now makes another run."""
    path = checkpoint(copied, 4) / "state.json"
    state = json.loads(path.read_text())
    settings = state["settings"]
    for key, name in {"guidance_dropout": "condition_dropout", "checkpoints_kept": "keep_last"}.items():
        settings[key] = settings.pop(name)
    settings["loader"]["on_damage"] = settings["loader"].pop("on_corrupt")
    settings |= {"watchdog_minutes": 3.0, "split": "train", "timesteps": "uniform"}
    settings["pictures"] |= {"guidance": [2.0], "count": 6}
    settings["augmentation"]["flip"] = 0.5
    settings["optimizer"]["betas"] = [0.9, 0.999]
    path.write_text(json.dumps(state))
    assert load_run(copied).settings.condition_dropout == 0.2
    run(world, copied, "--steps=5")
    settings["timesteps"] = "stratified"
    path.write_text(json.dumps(state))
    shutil.rmtree(checkpoint(copied, 5))
    with pytest.raises(InputError, match=r"was trained otherwise: timesteps"):
        run(world, copied, "--steps=5")
    with pytest.raises(InputError, match=r"settings\.timesteps: .* another version"):
        load_run(copied)


def test_a_folder_that_is_no_checkpoint_of_this_run_is_refused_and_never_to_be_deleted(
    world: World, finished: Path, copied: Path
):
    before = saved(copied)
    with pytest.raises(InputError, match=r"this run folder is in use, and --resume .* is another run's; give another --out"):
        run(world, copied, f"--resume={finished}", "--steps=9")
    assert saved(copied) == before
    precious = copied.parent / "precious"
    (precious / "sub").mkdir(parents=True)
    for folder in (precious, copied.parent / "step-00000001", copied.parent / "gone"):
        with pytest.raises(InputError, match=r"no checkpoint here; --resume takes auto, never, a run folder or") as caught:
            run(world, copied.parent / "new", f"--resume={folder}")
        assert "delete" not in str(caught.value)
    # A checkpoint under a name of its own, damaged: there is no checkpoint before it to go on from.
    best = shutil.copytree(checkpoint(finished, 4), copied.parent / "best")
    (best / "model.safetensors").unlink()
    with pytest.raises(InputError, match="give another checkpoint"):
        run(world, copied.parent / "new", f"--resume={best}")


def test_another_vae_or_dataset_is_refused(world: World, copied: Path, tmp_path: Path):
    make_vae(tmp_path / "other", 1)
    with pytest.raises(InputError, match=r"dataset\.json: the latents were made by vae .* set model\.vae to that VAE"):
        run(world, tmp_path / "new", f"--model.vae={tmp_path / 'other'}")
    # The fingerprint is that of the plan; with other samples in its shards, the order is another one.
    make_dataset(tmp_path / "mended", AutoencoderKL.from_pretrained(world.vae), "vae", {"train": [5, 8, 6, 6], "validation": [2]})
    with pytest.raises(InputError, match="its dataset had other samples in its shards then") as caught:
        run(world, copied, f"--dataset={tmp_path / 'mended'}", "--steps=9")
    assert "fingerprint" not in str(caught.value)


def test_a_folder_takes_one_training_at_a_time(world: World, tmp_path: Path, monkeypatch):
    with lock_folder(tmp_path, "x"), pytest.raises(InputError, match=train_module.IN_USE):
        start(world, tmp_path, monkeypatch)


def test_pictures_that_cannot_be_drawn_cost_no_checkpoint(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a run without the memory for them would start from the same step again and again."""

    def draw(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pictures, "draw", draw)
    with pytest.raises(torch.OutOfMemoryError):
        run(world, tmp_path, "--pictures.every=2", "--checkpoint_every=2")
    assert saved(tmp_path) == ["2"]


def test_a_damaged_held_out_sample_is_left_out_of_pictures_where_damage_is_put_up_with(world: World, tmp_path: Path, capsys):
    """And pictures of a run without dropout are not guided."""
    shutil.copytree(world.dataset, tmp_path / "dataset")
    row = pq.read_table(tmp_path / "dataset" / "index.parquet", filters=[("shard", "==", "validation-000000")]).to_pylist()[0]
    with (tmp_path / "dataset" / "shards" / "validation-000000.tar").open("r+b") as tar:
        tar.seek(row["ref_jpg"]["offset"] + 20)
        tar.write(b"damage")
    options = [f"--dataset={tmp_path / 'dataset'}", "--pictures.every=6", "--steps=1", "--condition_dropout=0"]
    with pytest.raises(InputError, match=rf"sample {row['key']} is damaged"):
        run(world, tmp_path / "stop", *options)
    run(world, tmp_path / "replace", *options, "--loader.on_corrupt=replace")
    told = capsys.readouterr()
    assert f"left out of the held-out samples: {tmp_path}/dataset/shards/validation-000000.tar: sample {row['key']}" in told.err
    assert "pictures are painted with guidance 1 alone" in told.out
    assert Image.open(tmp_path / "replace" / "pictures" / "step-00000001.png").width == 4 * 166 + 6


def test_a_loader_process_that_was_killed_is_told_in_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the system does that has no memory left."""

    def noise_losses(*_):
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(100)  # PyTorch's handler of the signal that a child has ended raises here.

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    with pytest.raises(InputError, match=r"^rank 0: DataLoader worker .*; was memory short\? Then lower --loader\.workers$"):
        start(world, tmp_path, monkeypatch, "--steps=60", "--loader.workers=1")


def test_a_checkpoint_of_another_model_is_refused(finished: Path):
    """By name and shape of each tensor, no more and no fewer."""
    folder = checkpoint(finished, 4)
    state, held = read_state(folder), load_file(folder / "model.safetensors")
    read_part(folder, state, "model", held)
    name = min(held)
    fewer = {key: value for key, value in held.items() if key != name}
    for expected in (fewer, {**held, "more": held[name]}, {**held, name: held[name][None]}):
        with pytest.raises(InputError, match=r"model\.safetensors: does not fit the model of its settings"):
            read_part(folder, state, "model", expected)


def test_a_damaged_checkpoint_is_named_with_the_way_out(world: World, copied: Path, finished: Path):
    folder = checkpoint(copied, 4)
    for name, damage in (
        ("optimizer.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("optimizer.safetensors", lambda data: data[:-100]),
        ("optimizer.safetensors", None),
        ("state.json", None),
    ):
        file = folder / name
        if damage:
            file.write_bytes(damage((checkpoint(finished, 4) / name).read_bytes()))
        else:
            file.unlink()
        with pytest.raises(InputError, match=rf"^{re.escape(str(file))}.*delete {re.escape(str(folder))} to go on"):
            run(world, copied, "--steps=5")
    shutil.rmtree(folder)
    run(world, copied)
    assert weights(copied, 4) == weights(finished, 4)


def test_a_finished_run_that_is_started_again_clears_away_what_a_killed_one_left(world: World, copied: Path, monkeypatch):
    """Half removed after its last checkpoint was there: no further checkpoint is written that would see to it."""
    (copied / "checkpoints" / ".step-00000001.partial").mkdir()
    (copied / f".metrics.jsonl.{'0' * 32}.tmp").touch()
    options = [f"--steps={STEPS}", "--log_every=1", "--validation.every=0", "--checkpoint_every=2"]
    assert start(world, copied, monkeypatch, *options) == 0
    assert saved(copied) == ["2", "4"]
    assert not list(copied.glob(".*.tmp"))
