"""What a run says about itself: losses by diffusion time, held-out losses, hangs, lack of memory; checkpoints on bad disks."""

import errno
import io
import json
import math
import shutil
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import pytest
import tenacity
import torch
from safetensors import SafetensorError

from pbe_core.errors import InputError, machine_error
from pbe_train import train as train_module
from pbe_train.checkpoints import trainer_checkpoint as checkpoint
from pbe_train.checkpoints.networks import build_model
from pbe_train.checkpoints.trainer_checkpoint import CheckpointWriter
from pbe_train.config import TIMESTEPS, TRAIN_SPLIT
from pbe_train.data.remote_shards import open_reader
from pbe_train.model.pipeline import RunIdentity
from pbe_train.train import train
from pbe_train.training import progress as progress_module
from pbe_train.training import validation
from pbe_train.training.distributed import Distributed, Watchdog
from pbe_train.training.metrics import Metrics
from pbe_train.training.progress import Progress
from pbe_train.training.setup import out_of_memory
from pbe_train.training.validation import make_validation
from tests.pbe_train.small_world import World

HASHES = dict.fromkeys(("dataset_fingerprint", "dataset_samples", "vae_sha256", "encoder_sha256"), "x")
IDENTITY = RunIdentity(**HASHES, precision="fp32", unet={}, latent_channels=4, scaling_factor=1.0, view_size=32)
ONE = Distributed(0, 1, torch.device("cpu"))
WEIGHTS = {"model": {"weight": torch.zeros(1)}}


@pytest.fixture(autouse=True)
def few_pictures_and_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "PAINTED", 1)
    monkeypatch.setattr(validation, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(checkpoint._save_in_the_end.retry, "wait", tenacity.wait_none())


def test_losses_are_told_apart_by_diffusion_time():
    """And a line of metrics that a stop has cut is made whole."""
    metrics, resumed = Metrics(ONE.device), Metrics(ONE.device)
    metrics.add_losses(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 249, 999]))
    metrics.add_step(6, torch.tensor(3.0), torch.tensor(False))
    resumed.restore([json.loads(json.dumps(metrics.state()))], ONE)
    for each in (metrics, resumed):
        each.add_losses(torch.tensor([float("nan"), 4.0]), torch.tensor([500, 750]))
        each.add_step(7, torch.tensor(3.5), torch.tensor(True))
        pending = each.collect(ONE)
        assert pending.ready()
        assert pending.losses() == {"loss": 4.0, "loss_q1": 2.0, "loss_q4": 6.0}
        assert (pending.steps, pending.gradient_norm(), pending.nonfinite_steps()) == ([6, 7], 3.5, [7])
    # From here on, another line.
    metrics.add_losses(torch.tensor([float("inf")]), torch.tensor([3]))
    metrics.add_step(8, torch.tensor(1.0), torch.tensor(False))
    assert math.isnan(metrics.collect(ONE).losses()["loss"])


def test_the_held_out_loss_is_that_of_the_same_samples_noise_and_times(world: World, tmp_path: Path):
    """Whatever the training drew before, on any number of ranks; and it tells one model from another."""
    settings = world.settings(tmp_path)
    reader = open_reader(settings, TRAIN_SPLIT)
    first, second = (build_model(settings.model, 4).eval() for _ in range(2))
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        fixed = make_validation(settings, reader, ONE, 32)
        assert fixed is not None
        assert fixed.samples == 12
        losses.append(fixed.loss(first, ONE, "fp32"))
    # One diffusion time of each part of the range, so that the loss tells models apart.
    times = torch.cat([batch.timestep for batch in fixed.batches])
    assert sorted((times * 12 // TIMESTEPS).tolist()) == list(range(12))
    assert losses[0] == losses[1] != fixed.loss(second, ONE, "fp32")
    # Each of three ranks has its share of them, and all of them together are the same.
    shares = [make_validation(settings, reader, Distributed(rank, 3, ONE.device), 32) for rank in range(3)]
    total = sum(share.loss(first, ONE, "fp32") for share in shares if share)
    assert total == pytest.approx(losses[0], rel=1e-5)


def test_a_dataset_without_held_out_samples_is_told(world: World, tmp_path: Path, capsys):
    dataset = shutil.copytree(world.dataset, tmp_path / "dataset")
    info = json.loads((dataset / "dataset.json").read_text())
    del info["splits"]["validation"]
    (dataset / "dataset.json").write_text(json.dumps(info))
    train(world.settings(tmp_path / "run", f"--dataset={dataset}", "--pictures.every=1", "--steps=1"), ONE)
    told = capsys.readouterr().out
    assert "no samples in a split `validation`: no loss of held-out samples" in told
    assert "pictures show samples of `train`" in told


class Lines(io.StringIO):
    """A file that tells when a line of it holds some words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.said = words, threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.words in self.getvalue():
            self.said.set()
        return written


@pytest.mark.parametrize(
    ("steps", "words"), [(0, "step 1/4  no step is done yet"), (1, " s left"), (1, "step 2/4  pictures: 3 of 12 views (25%)")]
)
def test_a_file_has_signs_of_life_whatever_is_being_done(world: World, tmp_path: Path, monkeypatch, steps: int, words: str):
    monkeypatch.setattr(progress_module, "DRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    with redirect_stderr(Lines(words)) as file, Progress(world.settings(tmp_path, "--steps=4"), 1) as progress:
        for _ in range(steps):
            progress.advance()
        if "pictures" in words:
            with progress.during("pictures", 12, "views") as work:
                work.update(3)
                assert file.said.wait(600)
        assert file.said.wait(600)
    progress.close()


def test_all_that_takes_long_between_steps_is_shown_and_counted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []

    class Kept(Progress):
        @contextmanager
        def during(self, kind, total=None, unit=""):
            with super().during(kind, total, unit) as work:
                yield work
            shown.append((self.step, kind, work.done, total, unit))

    monkeypatch.setattr(train_module, "Progress", Kept)
    train(world.settings(tmp_path, "--steps=3", "--pictures.every=2", "--validation.every=2", "--checkpoint_every=2"), ONE)
    each = [("held-out loss", 3, 3, "batches"), ("checkpoint", 0, None, ""), ("pictures", 2, 2, "views")]
    assert shown == [
        (0, "held-out samples", 0, None, ""),
        *((step, *what) for step in (2, 3) for what in each),
        (3, "checkpoint", 0, None, ""),  # Until the last one is on disk.
        (3, "comparing weights", 0, None, ""),
    ]
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 3]


def test_a_rank_that_hangs_says_in_what(capfd, monkeypatch):
    now, looks = [0.0], []

    def clock() -> float:
        looks.append(threading.current_thread().name)
        return now[0]

    def wait_for_looks(count: int) -> None:
        until = looks.count("watchdog") + count
        while looks.count("watchdog") < until:
            time.sleep(0.01)

    monkeypatch.setattr("pbe_train.training.distributed.time", SimpleNamespace(monotonic=clock))
    with Watchdog(3, lambda: "worker 1, which makes a and b", 0.2) as watchdog:
        for _ in range(4):
            with watchdog.during("gradients", 6):
                now[0] += 0.15
                wait_for_looks(1)
        assert "rank" not in capfd.readouterr().err, "it goes on"
        with watchdog.during("data", 7):
            now[0] += 9
            wait_for_looks(3)
    told = capfd.readouterr().err
    assert told.count("rank 3 has been in `data` of step 8 for 9 s: it waits for worker 1, which makes a and b") == 1
    assert "test_a_rank_that_hangs_says_in_what" in told, "its stack"


def test_lack_of_memory_in_a_step_ends_with_what_helps(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lack(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train_module, "noise_losses", lack)
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(world.config), "--out", str(tmp_path), "--precision=fp32"])
    with pytest.raises(
        InputError, match=r"^rank 0 is out of memory \(CUDA .*--accumulation 2 .*gradient_checkpointing.*ema_place cpu.*bf16"
    ):
        train_module.main()
    # What saves memory already is not named, nor can a batch of one be halved.
    small = world.settings(tmp_path, "--optimizer.state=8bit", "--ema_place=cpu")
    said = out_of_memory(torch.OutOfMemoryError("x"), small, ONE)
    assert "--model.weights bf16" in said
    assert not any(word in said for word in ("ema_place", "8bit"))
    assert "--accumulation" not in out_of_memory(torch.OutOfMemoryError("x"), world.settings(tmp_path, "--accumulation=4"), ONE)


@pytest.fixture
def no_folder(tmp_path: Path) -> Path:
    """A file where the run's folder should be."""
    (tmp_path / "run").write_text("in the way")
    return tmp_path / "run"


def test_a_checkpoint_that_the_disk_refuses_is_tried_again(world: World, no_folder: Path, monkeypatch, capsys):
    before = checkpoint.save_checkpoint

    def at_last(*given):
        if capsys.readouterr().err.count("step 1 could not be written"):
            no_folder.unlink()
        return before(*given)

    monkeypatch.setattr(checkpoint, "save_checkpoint", at_last)
    with CheckpointWriter(world.settings(no_folder), IDENTITY, 0) as writer:
        writer.save(1, WEIGHTS, 1)
    assert [path.name for path in checkpoint.list_checkpoints(no_folder)] == ["step-00000001"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(world: World, no_folder: Path, capsys):
    writer = CheckpointWriter(world.settings(no_folder), IDENTITY, 0)
    writer.check()
    writer.save(1, WEIGHTS, 1)
    while not writer._writing.done():
        time.sleep(0.01)
    with pytest.raises(OSError, match="run"):
        writer.check()
    assert capsys.readouterr().err.count("checkpoint of step 1 could not be written") == checkpoint.ATTEMPTS
    # What else went wrong is not hidden by it.
    with CheckpointWriter(world.settings(no_folder), IDENTITY, 0) as writer:
        writer.save(1, WEIGHTS, 1)
        writer.__exit__(InputError)
    assert "Not a directory" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_checkpoint_and_is_called_so(world: World, tmp_path: Path, monkeypatch):
    """What safetensors says of it stands in its text alone."""
    found = []

    def full(tensors, path):
        path.write_bytes(b"the first half")
        found.append(list((tmp_path / "checkpoints").iterdir()))
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    writer = CheckpointWriter(world.settings(tmp_path), IDENTITY, 0)
    with pytest.raises(OSError, match="No space left") as caught:
        writer.save(1, WEIGHTS, 1, last=True)
    assert machine_error(caught.value) == f"No space left on device: {tmp_path}"
    assert [len(folders) for folders in found] == [1] * checkpoint.ATTEMPTS
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_old_checkpoint_that_cannot_be_removed_harms_no_new_one(world: World, tmp_path: Path, monkeypatch, capsys):
    """On NFS a file that somebody reads stays, and its folder with it. The next checkpoint tries again."""
    settings = world.settings(tmp_path, "--keep_last=1")
    remove, refused = shutil.rmtree, []

    def rmtree(path, ignore_errors=False):
        if not ignore_errors and not refused:
            refused.append(path)
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    with CheckpointWriter(settings, IDENTITY, 0) as writer:
        for step in (1, 2):
            writer.save(step, WEIGHTS, step)
    assert "step-00000002: is written; an older checkpoint could not be removed" in capsys.readouterr().err
    with CheckpointWriter(settings, IDENTITY, 2) as writer:
        writer.save(3, WEIGHTS, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_checkpoint_holds_the_weights_of_its_step_though_training_goes_on(world: World, tmp_path: Path, monkeypatch):
    seen = []
    go_on = threading.Event()

    def write_slowly(*given):
        assert go_on.wait(600), "it is written in the background"
        seen.append(given)
        return tmp_path

    monkeypatch.setattr(checkpoint, "save_checkpoint", write_slowly)
    weight, measures = torch.zeros(1), [{"sums": [1.0]}]
    writer = CheckpointWriter(world.settings(tmp_path), IDENTITY, 0)
    writer.save(1, {"model": {"weight": weight}}, 1, measures)
    weight += 1
    go_on.set()
    writer.wait()
    writer.save(2, {"model": {"weight": weight}}, 2, last=True)
    assert seen[1][4]["model"]["weight"] is weight, "nothing changes it any more"
    assert seen[0][1] == 1
    assert seen[0][4]["model"]["weight"].tolist() == [0.0]
    assert seen[0][6] == measures
