"""What a run says about itself: losses by diffusion time, held-out losses, hangs, lack of memory."""

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
from pbe_train.config import TIMESTEPS
from pbe_train.data.training_dataset import choose_timestep
from pbe_train.model.pipeline import RunIdentity
from pbe_train.train import train
from pbe_train.training import progress as progress_module
from pbe_train.training.distributed import Distributed
from pbe_train.training.metrics import Metrics
from pbe_train.training.progress import HELD_OUT, PICTURES, Progress, Spent, time_left
from pbe_train.training.setup import out_of_memory
from pbe_train.training.validation import make_validation
from pbe_train.training.watchdog import Watchdog
from tests.pbe_train.small_world import World

IDENTITY = RunIdentity(
    dataset_fingerprint="x",
    dataset_samples="x",
    precision="fp32",
    vae_sha256="x",
    encoder_sha256="x",
    unet={},
    latent_channels=4,
    scaling_factor=1.0,
    view_size=32,
)
ONE = Distributed(0, 1, torch.device("cpu"))


def test_losses_are_told_apart_by_diffusion_time():
    metrics = Metrics(ONE.device)
    metrics.add_losses(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 249, 999]))
    metrics.add_losses(torch.tensor([float("nan"), 4.0]), torch.tensor([500, 750]))
    for step in (6, 7):
        metrics.add_step(step, torch.tensor(step / 2), torch.tensor(step == 7))
    pending = metrics.collect(ONE)
    assert pending.ready()
    assert pending.losses() == {"loss": 4.0, "loss_q1": 2.0, "loss_q4": 6.0}
    assert pending.gradient_norm() == 3.5
    assert pending.nonfinite_steps() == [7]
    # From here on, another window.
    metrics.add_losses(torch.tensor([float("inf")]), torch.tensor([3]))
    metrics.add_step(8, torch.tensor(1.0), torch.tensor(False))
    assert math.isnan(metrics.collect(ONE).losses()["loss"])


def test_a_window_that_was_cut_by_a_stop_is_made_whole():
    whole, first, second = (Metrics(ONE.device) for _ in range(3))
    for step in range(6):
        losses, timestep = torch.rand(3), torch.randint(TIMESTEPS, (3,))
        for metrics in (whole, first if step < 4 else second):
            if step == 4 and metrics is second:
                second.restore([json.loads(json.dumps(first.state()))], ONE)
            metrics.add_losses(losses, timestep)
            metrics.add_step(step, losses.sum(), losses[0] > 0.5)
    expected, found = whole.collect(ONE), second.collect(ONE)
    assert found.losses() == expected.losses()
    assert (found.steps, found.gradient_norm(), found.nonfinite_steps()) == (
        expected.steps,
        expected.gradient_norm(),
        expected.nonfinite_steps(),
    )


def test_the_held_out_loss_is_that_of_the_same_samples_noise_and_times(world: World, tmp_path: Path):
    """Whatever the training drew before, on any number of ranks; and it tells one model from another."""
    settings = world.settings(tmp_path)
    first, second = (build_model(settings.model, 4).eval() for _ in range(2))
    losses = []
    for _ in range(2):
        torch.manual_seed(len(losses))
        validation = make_validation(settings, ONE, 32)
        assert validation is not None
        assert validation.samples == 12
        losses.append(validation.loss(first, ONE, "fp32"))
    assert losses[0] == losses[1] != validation.loss(second, ONE, "fp32")
    # Each of three ranks has its share of them, and all of them together are the same.
    shares = [make_validation(settings, Distributed(rank, 3, ONE.device), 32) for rank in range(3)]
    total = sum(share.loss(first, ONE, "fp32") for share in shares if share)
    assert total == pytest.approx(losses[0], rel=1e-5)


def test_the_held_out_loss_is_in_the_metrics_and_a_split_that_is_not_there_is_told(world: World, tmp_path: Path, capsys):
    train(world.settings(tmp_path / "run", "--validation.every=4", "--steps=6"), ONE)
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 6]
    train(world.settings(tmp_path / "other", "--validation.split=nowhere", "--steps=1"), ONE)
    assert "no samples in a split `nowhere`" in capsys.readouterr().out


def test_what_lies_between_steps_counts_for_the_time_that_is_left():
    """What was not done so far is named and not guessed; what follows on the last step is still to come after it."""
    every = {PICTURES: 100, HELD_OUT: 40}
    assert time_left(10, 250, 2.0, every, {}) == (480.0, [PICTURES, HELD_OUT])
    spent = {HELD_OUT: Spent(times=2, seconds=20.0, step=80)}
    # Held-out losses after 120, 160, 200, 240 and 250.
    assert time_left(90, 250, 2.0, every, spent) == (320.0 + 5 * 10, [PICTURES])
    spent[PICTURES] = Spent(1, 300.0, 100)
    assert time_left(100, 250, 2.0, every, spent) == (300.0 + 5 * 10 + 2 * 300, [])
    # Those of this step itself are painted when its line has been written.
    assert time_left(200, 250, 2.0, every, spent) == (100.0 + 3 * 10 + 2 * 300, [])
    assert time_left(250, 250, 2.0, every, spent) == (10.0 + 300, [])
    spent = {HELD_OUT: Spent(7, 70.0, 250), PICTURES: Spent(3, 900.0, 250)}
    assert time_left(250, 250, 2.0, every, spent) == (0.0, [])


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


def test_a_file_has_signs_of_life_whatever_is_being_done(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_module, "DRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    settings = world.settings(tmp_path, "--steps=4")
    for words in (
        "step 1/4  no step is done yet",
        "min left + pictures",
        "step 2/4  pictures: 3 of 12 views (25%)",
    ):
        with redirect_stderr(Lines(words)) as file, Progress(settings, 1, every={PICTURES: 2, HELD_OUT: 0}) as progress:
            if "min left" in words:
                progress.advance()
            elif "pictures" in words:
                progress.advance()
                with progress.during(PICTURES, 12, "views") as work:
                    work.update(3)
                    assert file.said.wait(100)
            assert file.said.wait(100)
        progress.close()


def test_all_that_takes_long_between_steps_is_shown_and_counted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pictures at the end took minutes, after a line that said that none were left."""
    shown = []

    class Kept(Progress):
        @contextmanager
        def during(self, kind, total=None, unit=""):
            with super().during(kind, total, unit) as work:
                yield work
            shown.append((self.step, kind, work.done, total, unit))

    monkeypatch.setattr(train_module, "Progress", Kept)
    every = ["--steps=3", "--pictures.every=2", "--validation.every=2", "--pictures.sampling_steps=2", "--checkpoint_every=2"]
    train(world.settings(tmp_path, *every), ONE)
    each = [(HELD_OUT, 3, 3, "batches"), ("checkpoint", 0, None, ""), (PICTURES, 12, 12, "views")]
    assert shown == [
        (0, "held-out samples", 0, None, ""),
        *((step, *what) for step in (2, 3) for what in each),
        (3, "checkpoint", 0, None, ""),  # Until the last one is on disk.
        (3, "comparing weights", 0, None, ""),
    ]


def test_stratified_times_are_one_of_each_part():
    for step in range(5):
        times = [choose_timestep(0, step, slot, 8) for slot in range(8)]
        assert sorted(time * 8 // TIMESTEPS for time in times) == list(range(8))
    assert times != [choose_timestep(0, 5, slot, 8) for slot in range(8)]
    assert all(0 <= choose_timestep(0, step, 0, 1000) < TIMESTEPS for step in range(50))


def test_a_rank_that_hangs_says_in_what(capfd, monkeypatch):
    now, looks = [0.0], []

    def clock() -> float:
        looks.append(threading.current_thread().name)
        return now[0]

    def wait_for_looks(count: int) -> None:
        until = looks.count("watchdog") + count
        while looks.count("watchdog") < until:
            time.sleep(0.01)

    monkeypatch.setattr("pbe_train.training.watchdog.time", SimpleNamespace(monotonic=clock))
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
    with pytest.raises(InputError, match=r"^rank 0 is out of memory \(CUDA .*: --accumulation 2 .* batch of 4 ") as caught:
        train_module.main()
    assert "--model.gradient_checkpointing true" in str(caught.value)
    assert "--precision bf16" in str(caught.value)
    # A batch of one cannot be halved.
    said = out_of_memory(torch.OutOfMemoryError("x"), world.settings(tmp_path, "--accumulation=4"), ONE)
    assert "--accumulation" not in said


def test_a_checkpoint_that_the_disk_refuses_is_tried_again(world: World, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint._save_in_the_end.retry, "wait", tenacity.wait_none())
    settings = world.settings(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder should be")
    before = checkpoint.save_checkpoint

    def at_last(*given):
        if capsys.readouterr().err.count("step 1 could not be written"):
            (tmp_path / "run").unlink()
        return before(*given)

    monkeypatch.setattr(checkpoint, "save_checkpoint", at_last)
    with CheckpointWriter(settings, IDENTITY, 0) as writer:
        writer.save(1, {"model": {"weight": torch.zeros(1)}}, 1)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000001"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(world: World, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint._save_in_the_end.retry, "wait", tenacity.wait_none())
    settings = world.settings(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder should be")
    writer = CheckpointWriter(settings, IDENTITY, 0)
    writer.check()
    writer.save(1, {"model": {"weight": torch.zeros(1)}}, 1)
    while not writer._writing.done():
        time.sleep(0.01)
    with pytest.raises(OSError, match="run"):
        writer.check()
    assert capsys.readouterr().err.count("checkpoint of step 1 could not be written") == checkpoint.ATTEMPTS
    # What else went wrong is not hidden by it.
    with CheckpointWriter(settings, IDENTITY, 0) as writer:
        writer.save(1, {"model": {"weight": torch.zeros(1)}}, 1)
        writer.__exit__(InputError)
    assert "Not a directory" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_checkpoint_and_is_called_so(world: World, tmp_path: Path, monkeypatch, capsys):
    """What safetensors says of it stands in its text alone."""
    monkeypatch.setattr(checkpoint._save_in_the_end.retry, "wait", tenacity.wait_none())
    found = []

    def full(tensors, path):
        path.write_bytes(b"the first half")
        found.append(list((tmp_path / "checkpoints").iterdir()))
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer = CheckpointWriter(world.settings(tmp_path), IDENTITY, 0)
    with pytest.raises(OSError, match="No space left") as caught:
        writer.save(1, {"model": {"weight": torch.zeros(1)}}, 1, last=True)
    assert machine_error(caught.value) == f"No space left on device: {tmp_path}"
    assert [len(folders) for folders in found] == [1] * checkpoint.ATTEMPTS
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_old_checkpoint_that_cannot_be_removed_harms_no_new_one(world: World, tmp_path: Path, monkeypatch, capsys):
    """On NFS a file that somebody reads stays, and its folder with it. The next checkpoint tries again."""
    settings, weight = world.settings(tmp_path, "--keep_last=1"), {"model": {"weight": torch.zeros(1)}}
    remove, refused = shutil.rmtree, []

    def rmtree(path, ignore_errors=False):
        if not ignore_errors and not refused:
            refused.append(path)
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    with CheckpointWriter(settings, IDENTITY, 0) as writer:
        for step in (1, 2):
            writer.save(step, weight, step)
    assert "step-00000002: is written; an older checkpoint could not be removed" in capsys.readouterr().err
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002"]
    with CheckpointWriter(settings, IDENTITY, 2) as writer:
        writer.save(3, weight, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_checkpoint_holds_the_weights_of_its_step_though_training_goes_on(world: World, tmp_path: Path, monkeypatch):
    seen = []
    go_on = threading.Event()

    def write_slowly(*given):
        assert go_on.wait(100), "it is written in the background"
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
