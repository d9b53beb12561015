"""Train Paint by Example: `torchrun [--nproc-per-node N] pbe_train/train.py [--config FILE] [--key value ...]`.

Also as plain `python pbe_train/train.py`, in one process. Everything is a function of the settings and the step number, so a run
that was stopped goes on from its newest checkpoint when the same command is given again, on any number of ranks.
"""

import json
import re
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

from pbe_core.settings import dump_settings, help_first, load_settings, preset
from pbe_train.config import TrainSettings

if __name__ == "__main__":  # PyTorch and its libraries take seconds to load: not for --help.
    help_first(TrainSettings, "train", __doc__, preset("tiny"))

import torch
from torch import nn

from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder, sweep
from pbe_core.machine import make_room_for_multiprocessing
from pbe_core.progress import Progress as Work
from pbe_core.randomness import name_hash
from pbe_core.vae import weights_sha256
from pbe_core.words import noun, number_of
from pbe_train.checkpoints.checkpoint_writer import CheckpointWriter
from pbe_train.checkpoints.init_from_pretrained import start_model
from pbe_train.checkpoints.load_report import write_account
from pbe_train.checkpoints.networks import build_model, load_dataset_vae
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, check_resumable, find_checkpoint, read_state, sweep_partial
from pbe_train.data.damage import DamageBook
from pbe_train.data.items import Items, load_batches
from pbe_train.data.prefetch import OnDevice
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.shards import ShardReader
from pbe_train.model.diffusion import noise_losses
from pbe_train.model.identity import RunIdentity
from pbe_train.model.paint_model import PaintByExampleModel
from pbe_train.model.pipeline import Run
from pbe_train.model.preparing import prepare, uncompiled
from pbe_train.model.schedulers import make_scheduler, training_schedule
from pbe_train.training.checks import check_agreement, check_weights, out_of_memory
from pbe_train.training.devices import arithmetic_of, find_gpu
from pbe_train.training.ema import MovingAverage
from pbe_train.training.flops import step_flops
from pbe_train.training.measures import Measures, Reading
from pbe_train.training.optimizer import make_optimizer, optimizer_step, parts_of, resume, set_learning_rate, step_unless
from pbe_train.training.pictures import Pictures
from pbe_train.training.progress import HELD_OUT, PICTURES, Progress, Timed, during
from pbe_train.training.ranks import Ranks
from pbe_train.training.skipped import SkippedSteps
from pbe_train.training.stopping import Stop
from pbe_train.training.validation import Validation
from pbe_train.training.watchdog import Watchdog

IN_USE = "another training is writing to this folder; wait until it has ended, or give another --out"
# Below this scale a gradient of fp16 that overflows is not the scale's fault: it is tried down to here, and then counts.
LEAST_SCALE = 1.0


def main() -> int:
    """Read the settings and train; returns the exit status."""
    make_room_for_multiprocessing()
    settings = load_settings(TrainSettings, "train", default_config=preset("tiny"))
    ranks = Ranks.start(settings.threads, settings.precision)
    try:
        # One at a time in a folder; the other ranks leave as soon as rank 0 does.
        with lock_folder(settings.out, IN_USE) if ranks.rank == 0 else nullcontext():
            if ranks.rank == 0:  # Also where all steps are done, and no further checkpoint is written.
                sweep(settings.out)
                sweep_partial(settings.out)
            stopped_by = train(settings, ranks)
    except torch.OutOfMemoryError as error:
        raise InputError(out_of_memory(error, settings, ranks)) from None
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        if ranks.lost_peer(error):
            raise InputError(f"rank {ranks.rank}: another rank has left; its own message says why ({cause})") from None
        if re.match(r"DataLoader worker \(pid", cause):
            raise InputError(f"rank {ranks.rank}: {cause}; was memory short? Then lower --loader.workers") from None
        raise
    ranks.stop()
    return 128 + stopped_by if stopped_by else 0


def train(settings: TrainSettings, ranks: Ranks) -> int:
    """The whole run, from data to final checkpoint. Returns the signal that stopped it, or 0."""
    with ExitStack() as shown:
        if ranks.rank == 0:
            shown.enter_context(Work("getting ready"))
        return train_shown(settings, ranks, shown)


def train_shown(settings: TrainSettings, ranks: Ranks, shown: ExitStack) -> int:
    """As `train`, whose progress is shown in `shown`."""
    # Data, and a check that it and the networks belong together.
    reader = open_reader(settings)
    vae = load_dataset_vae(settings.model.vae, reader.folder, reader.info)
    make_scheduler(settings.pictures.scheduler, settings.prediction)

    # Go on from a checkpoint, if there is one; every rank looks for itself.
    checkpoint = find_checkpoint(settings.out, settings.resume)
    state = read_state(checkpoint) if checkpoint else None
    if state:
        settings = with_its_start(settings, state, ranks)
    precision = ranks.choose_precision(settings.precision)
    check_agreement(ranks, checkpoint, state, reader, precision)

    # Model, optimizer, moving average. The seed is set here, so that initial weights depend on nothing before it.
    torch.manual_seed(name_hash(settings.seed, "train", "weights", bits=32))
    account = None
    if state:
        model = build_model(settings.model, reader.info.vae.latent_channels, state.identity.unet)
    else:
        model, account = start_model(settings, vae)
    model = prepare(model, settings.model, ranks.device).train()
    trained, kept = model.trained(), model.kept()
    optimizer = make_optimizer(trained, settings.optimizer)
    average = MovingAverage(trained, settings.ema_decay) if settings.ema_decay else None
    identity = identify(model, reader, precision)
    measures = Measures(ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")

    step = 0
    if checkpoint and state:
        check_resumable(checkpoint, state, settings, identity)
        resume(checkpoint, state, kept, trained, optimizer, average)
        measures.restore(state.measures, ranks)
        if state.scaler:
            scaler.load_state_dict(state.scaler)
        step = state.step
    reference_size = model.conditioner.model.config.image_size
    items = Items(settings, reader, reference_size)
    loaded = load_batches(items, step, ranks.count, ranks.rank)
    batches = Timed(OnDevice(loaded, ranks.device))
    validation = make_validation(settings, ranks, reference_size)

    progress = pictures = None
    shown.close()
    if ranks.rank == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "settings.yaml").write_text(dump_settings(settings, "train"), encoding="utf-8")
        print(describe(settings, reader, trained, ranks, checkpoint), flush=True)
        if account:
            write_account(account, settings.out)
            print(account.lines(), flush=True)
        every = {PICTURES: settings.pictures.every, HELD_OUT: settings.validation.every if validation else 0}
        progress = shown.enter_context(Progress(settings, step, flops_of(settings, reader, ranks), every))
        if settings.pictures.every:
            with progress.during("held-out samples"):
                pictures = Pictures(Run(model, vae.to(ranks.device), settings, identity, step))

    # The loop.
    schedule = training_schedule(settings.prediction)
    parallel = ranks.wrap(model)
    damage = DamageBook(settings.loader.most_replaced)
    skipped = SkippedSteps()
    asked: Asked | None = None
    stopping = 0
    with (
        CheckpointWriter(settings, identity, step) as writer,
        Stop(ranks) as stop,
        Watchdog(ranks.rank, 60 * settings.watchdog_minutes, loaded.owed) as watchdog,
    ):
        while step < settings.steps:
            for part in range(settings.accumulation):
                with watchdog.during("data", step):
                    batch = next(batches)
                with watchdog.during("gradients", step), ranks.hold_gradients(parallel, hold=part < settings.accumulation - 1):
                    with ranks.autocast(settings.precision):
                        losses = noise_losses(parallel, schedule, batch)
                    torch.autograd.backward(scaler.scale(losses.mean() / settings.accumulation))
                measures.add_losses(losses, batch.timestep)
            scaler.unscale_(optimizer)
            gradient_norm = nn.utils.clip_grad_norm_(trained.values(), settings.optimizer.gradient_clip or float("inf"))
            broken = ~gradient_norm.isfinite()
            set_learning_rate(optimizer, settings.optimizer, step)
            step_unless(broken, optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            measures.add_step(step, gradient_norm, broken)
            step += 1
            if progress:
                progress.advance()
            if average:
                average.update(step)

            with watchdog.during("ranks", step):
                stopping = stop.agreed()
            last = step == settings.steps or stopping > 0
            saves, logs = step % settings.checkpoint_every == 0 or last, step % settings.log_every == 0 or step == settings.steps
            if asked and logs:
                report(asked, progress, skipped)
            if logs:
                # All ranks know of the same steps here: of all before this line.
                if counts(scaler):
                    skipped.check(settings, loaded, ranks)
                rate = optimizer.param_groups[0]["lr"]
                asked = Asked(measures.read(ranks), rate, time.monotonic(), batches.take_seconds())
                if settings.loader.on_damage == "replace":
                    # All ranks keep the same book, so that beyond the limit all of them stop here.
                    for line in damage.add(one for some in ranks.gather(loaded.take_replaced()) for one in some):
                        if progress:
                            print(line, file=sys.stderr, flush=True)
            # Numbers may come some steps later; a checkpoint says that those before it were written.
            if asked and (saves or asked.reading.ready()):
                report(asked, progress, skipped)
                asked = None
            if saves and counts(scaler):
                skipped.check(settings, loaded, ranks)
            if validation and (step % settings.validation.every == 0 or step == settings.steps):
                with (
                    watchdog.during("validation", step),
                    average.in_place() if average else nullcontext(),
                    during(progress, HELD_OUT, len(validation.batches), "batches") as work,
                ):
                    loss = validation.loss(model, ranks, settings.precision, work)
                if progress:
                    progress.add(step, {"validation_loss": loss})
            if saves:
                check_weights(settings, step, trained)
                with watchdog.during("ranks", step):
                    states = ranks.gather(measures.state())
            if progress:
                writer.check()
                if saves:
                    with watchdog.during("checkpoint", step), progress.during("checkpoint") as work:
                        progress.flush()
                        parts, counted_steps = parts_of(kept, trained, optimizer, average), optimizer_step(optimizer)
                        work.say(f"{sum(tensor.nbytes for part in parts.values() for tensor in part.values()) / 1e9:.1f} GB")
                        writer.save(step, parts, counted_steps, states, scaler.state_dict(), last)
                # After the checkpoint: were there no memory for pictures, the run would never come past this step.
                if pictures and (step % settings.pictures.every == 0 or step == settings.steps):
                    with (
                        watchdog.during("pictures", step),
                        uncompiled() if settings.model.compile else nullcontext(),
                        progress.during(PICTURES, pictures.count(), "views") as work,
                    ):
                        progress.show(step, pictures.draw(step, average, work))
            if stopping:
                break
        with during(progress, "checkpoint"):
            writer.wait()
        if stopping:  # None leaves before all is on disk: torchrun ends the others as soon as one has left.
            ranks.gather(stopping)
    if step < settings.steps:
        if progress:
            progress.close()
            name = signal.Signals(stopping).name
            print(f"stopped by {name} after step {step}, which is saved; the same command goes on from there", file=sys.stderr)
        return stopping
    finish(settings, ranks, kept, progress, reader.folder, len(skipped.steps), len(damage.seen))
    return 0


def with_its_start(settings: TrainSettings, state: CheckpointState, ranks: Ranks) -> TrainSettings:
    """Settings that name the start which the run had, since that is what it was made of, and under whose licence it is."""
    had = state.settings["model"].get("pretrained")
    given = settings.model.pretrained
    if given not in (None, had) and ranks.rank == 0:
        print(f"model.pretrained {given} is not read: this run began {f'from {had}' if had else 'from scratch'}", flush=True)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"pretrained": had})})


class Asked(NamedTuple):
    """A line of metrics that is to be written when its numbers have come."""

    reading: Reading
    learning_rate: float
    at: float
    """When it was asked for, in s of time.monotonic."""
    waited: float
    """Seconds for data, since the line before."""


def counts(scaler: torch.amp.GradScaler) -> bool:
    """Whether steps that were skipped are a fault; waits for the device where the loss is scaled.

    The scale of fp16 grows until a gradient overflows, once in a while: that is how it is found.
    """
    return not scaler.is_enabled() or scaler.get_scale() < LEAST_SCALE


def report(asked: Asked, progress: Progress | None, skipped: SkippedSteps) -> None:
    """Write a line of metrics, and note which of its steps were skipped."""
    reading = asked.reading
    skipped.add(reading)
    if progress:
        figures = {**reading.losses(), "gradient_norm": reading.gradient_norm(), "skipped_steps": len(reading.skipped())}
        progress.log(reading.steps[-1] + 1, figures | {"learning_rate": asked.learning_rate}, asked.at, asked.waited)


def identify(model: PaintByExampleModel, reader: ShardReader, precision: str) -> RunIdentity:
    """What this run trains on and with."""
    return RunIdentity(
        dataset_fingerprint=reader.info.fingerprint,
        dataset_samples=reader.samples_hash(),
        precision=precision,
        vae_sha256=reader.info.vae.sha256,
        encoder_sha256=weights_sha256(model.conditioner.model.state_dict()),
        unet={key: value for key, value in model.unet.config.items() if not key.startswith("_")},
        latent_channels=reader.info.vae.latent_channels,
        scaling_factor=reader.info.vae.scaling_factor,
        view_size=reader.info.view_size,
    )


def make_validation(settings: TrainSettings, ranks: Ranks, reference_size: int) -> Validation | None:
    """The held-out samples, if there are any and the settings want them."""
    if not settings.validation.every:
        return None
    splits = open_reader(settings).info.splits
    if settings.validation.split not in splits or not splits[settings.validation.split].samples:
        if ranks.rank == 0:
            print(f"no samples in a split `{settings.validation.split}`: no loss of held-out samples is measured", flush=True)
        return None
    return Validation(settings, ranks, reference_size)


def flops_of(settings: TrainSettings, reader: ShardReader, ranks: Ranks) -> tuple[float, float] | None:
    """FLOP/s of all GPUs at their peak, and FLOPs of a sample; None on a device whose peak is not known."""
    gpu = find_gpu(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else None
    if not gpu:
        return None
    peak = gpu.teraflops[arithmetic_of(gpu, settings.precision)] * 1e12
    flops = step_flops(settings.model, reader.info.view_size // reader.info.vae.downsampling)
    return peak * ranks.count, flops.total


def finish(
    settings: TrainSettings,
    ranks: Ranks,
    kept: dict[str, nn.Parameter],
    progress: Progress | None,
    dataset: Path,
    skipped: int,
    replaced: int,
) -> None:
    """Check that all ranks hold the same weights, and say what was done and where things are."""
    with during(progress, "comparing weights"):
        hashes = ranks.gather(weights_sha256(kept))
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the ranks' weights differ after step {settings.steps}: {[value[:12] for value in hashes]}")
    if progress:
        progress.close()
        progress.summary(skipped, replaced)
        record = {"step": settings.steps, "weights_sha256": hashes}
        (settings.out / "finished.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(
            f"done: {settings.steps} {noun(settings.steps, 'steps')}, weights {hashes[0][:12]} "
            f"on {number_of(ranks.count, 'rank')}"
        )
        print(f"checkpoints: {settings.out / 'checkpoints'}, metrics: tensorboard --logdir {settings.out / 'tensorboard'}")
        print(f"next: python -m pbe_train.demo --model {settings.out} --dataset {dataset} --out demo.png")


def describe(
    settings: TrainSettings, reader: ShardReader, trained: dict[str, nn.Parameter], ranks: Ranks, checkpoint: Path | None
) -> str:
    """What is about to happen, in three lines."""
    samples, parameters = sum(reader.counts), sum(parameter.numel() for parameter in trained.values())
    epochs = settings.steps * settings.global_batch / samples
    dataset = settings.model_dump(mode="json")["dataset"]  # A URL without its password.
    return (
        f"dataset {dataset}: {number_of(samples, 'sample')} in {number_of(len(reader.shards), 'shard')}; "
        f"{number_of(settings.steps, 'step')}: {epochs:.1f} epochs\n"
        f"model: {parameters / 1e6:.1f} M trained parameters, on {number_of(ranks.count, 'rank')} of {ranks.device.type}\n"
        + (f"going on from {checkpoint}" if checkpoint else f"new run in {settings.out}")
    )


if __name__ == "__main__":
    run_program(main)
