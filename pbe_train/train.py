"""Train Paint by Example: `torchrun [--nproc-per-node N] pbe_train/train.py [--config FILE] [--key value ...]`.

Also as plain `python pbe_train/train.py`, in one process. Everything is a function of the settings and the step number, so a run
that was stopped goes on from its newest checkpoint when the same command is given again, on any number of ranks.

After each step the hooks follow, in this order on all ranks (`Hooks`):

    stop        do all ranks stop after this step? Then it counts as one that is saved
    log         a line of metrics, once its numbers are here: some steps later, or before a checkpoint, which says that the lines
                before it are written. Too many steps whose gradient is not finite, or corrupt samples, end the run here
    validate    the loss of held-out samples: the last line of a step
    save        the checkpoint; weights that are not finite end the run before it
    paint       pictures: after the checkpoint, since a run without the memory for them would never come past this step
"""

import json
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

from pbe_core.settings import dump_settings, help_first, load_settings, preset
from pbe_train.config import TrainSettings

if __name__ == "__main__":  # PyTorch and its libraries take seconds to load: not for --help.
    help_first(TrainSettings, "train", __doc__, preset("tiny"))

import torch

from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder, sweep
from pbe_core.machine import make_room_for_multiprocessing
from pbe_core.progress import Progress as Work
from pbe_core.vae import weights_sha256
from pbe_core.words import noun, number_of
from pbe_train.checkpoints.load_report import write_report
from pbe_train.checkpoints.trainer_checkpoint import CheckpointWriter, sweep_partial
from pbe_train.data.training_dataset import Batch
from pbe_train.model.diffusion import noise_losses
from pbe_train.model.paint_model import uncompiled
from pbe_train.model.pipeline import Run
from pbe_train.training.cuda_graph import Computed, RepeatedStep, Step
from pbe_train.training.distributed import Distributed, Stop, Watchdog
from pbe_train.training.metrics import PendingMetrics
from pbe_train.training.optimizer import (
    clip_gradients,
    learning_rate,
    optimizer_step,
    parts_of,
    set_learning_rate,
    step_unless,
    weights_of,
)
from pbe_train.training.progress import Progress, during
from pbe_train.training.setup import Training, check_weights, describe, flops_of, out_of_memory
from pbe_train.training.validation import Pictures

IN_USE = "another training is writing to this folder; wait until it has ended, or give another --out"
# Below this scale a gradient of fp16 that overflows is not the scale's fault: it is tried down to here, and then counts.
LEAST_SCALE = 1.0


def main() -> int:
    """Read the settings and train; returns the exit status."""
    make_room_for_multiprocessing()
    settings = load_settings(TrainSettings, "train", default_config=preset("tiny"))
    distributed = Distributed.start(settings.threads, settings.precision, settings.cuda_graph)
    rank = distributed.rank
    try:
        # One at a time in a folder; the other ranks leave as soon as rank 0 does.
        with lock_folder(settings.out, IN_USE) if rank == 0 else nullcontext():
            if rank == 0:  # Also where all steps are done, and no further checkpoint is written.
                sweep(settings.out)
                sweep_partial(settings.out)
            stopped_by = train(settings, distributed)
    except torch.OutOfMemoryError as error:
        raise InputError(out_of_memory(error, settings, distributed)) from None
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        if distributed.lost_peer(error):
            raise InputError(f"rank {rank}: another rank has left; its own message says why ({cause})") from None
        if re.match(r"DataLoader worker \(pid", cause):
            raise InputError(f"rank {rank}: {cause}; was memory short? Then lower --loader.workers") from None
        raise
    distributed.stop()
    return 128 + stopped_by if stopped_by else 0


def train(settings: TrainSettings, distributed: Distributed) -> int:
    """The whole run, from data to final checkpoint. Returns the signal that stopped it, or 0."""
    with Work("getting ready") if distributed.rank == 0 else nullcontext():
        run = Training(settings, distributed)
    with ExitStack() as stack:
        progress = stack.enter_context(announce(run)) if distributed.rank == 0 else None
        pictures = make_pictures(run, progress)
        with (
            CheckpointWriter(run.settings, run.identity, run.step) as writer,
            Stop(distributed) as stop,
            Watchdog(distributed.rank, run.loader.describe_next) as watchdog,
        ):
            hooks = Hooks(run, progress, pictures, writer, watchdog, stop)
            step: Step = partial(compute, run, watchdog)
            if run.settings.cuda_graph:
                step = RepeatedStep(step, distributed.world_size)
            while run.step < run.settings.steps and not hooks.stopped_by:
                train_step(run, step, watchdog)
                hooks.after_step()
            with during(progress, "checkpoint"):
                writer.wait()
            if hooks.stopped_by:  # None leaves before all is on disk: torchrun ends the others as soon as one has left.
                distributed.gather(hooks.stopped_by)
        if run.step < run.settings.steps:
            if progress:
                progress.close()
                saved = f"stopped by {signal.Signals(hooks.stopped_by).name} after step {run.step}, which is saved"
                print(f"{saved}; the same command goes on from there", file=sys.stderr)
            return hooks.stopped_by
        finish(run, progress)
    return 0


def train_step(run: Training, step: Step, watchdog: Watchdog) -> None:
    """One step of the optimizer, over all micro-batches. The host does not wait for the device."""
    set_learning_rate(run.optimizer, run.settings.optimizer, run.step, run.settings.steps)
    if run.ema:
        run.ema.set_decay(run.step + 1)
    computed = step(micro_batches(run, watchdog))
    for losses, timesteps in zip(computed.losses, computed.timesteps, strict=True):
        run.metrics.add_losses(losses, timesteps)
    run.metrics.add_step(run.step, computed.gradient_norm, computed.nonfinite)
    run.step += 1


def micro_batches(run: Training, watchdog: Watchdog) -> Iterator[Batch]:
    """Those of a step, as they come."""
    for _ in range(run.settings.accumulation):
        with watchdog.during("data", run.step):
            batch = next(run.batches)
        yield batch


def compute(run: Training, watchdog: Watchdog, batches: Iterable[Batch]) -> Computed:
    """All that the device computes in a step. It may be recorded: what changes from step to step comes in tensors alone."""
    settings, optimizer, parts = run.settings, run.optimizer, run.settings.accumulation
    all_losses, timesteps = [], []
    for part, batch in enumerate(batches):
        with watchdog.during("gradients", run.step), run.distributed.hold_gradients(run.parallel, hold=part < parts - 1):
            with run.distributed.autocast(settings.precision):
                losses = noise_losses(run.parallel, run.schedule, batch)
            torch.autograd.backward(run.scaler.scale(losses.mean() / parts))
        all_losses.append(losses.detach())
        timesteps.append(batch.timestep)
    run.scaler.unscale_(optimizer)
    gradient_norm = clip_gradients(run.trained, settings.optimizer.gradient_clip).detach()
    nonfinite = ~gradient_norm.isfinite()
    step_unless(nonfinite, optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.average_in()
    return Computed(all_losses, timesteps, gradient_norm, nonfinite)


@dataclass
class Hooks:
    """What follows on a step; the order is that of `after_step`, and the module's text says why. All ranks call all of them."""

    run: Training
    progress: Progress | None
    pictures: Pictures | None
    writer: CheckpointWriter
    watchdog: Watchdog
    stop: Stop
    stopped_by: int = 0
    """The signal that ends the run after this step, or 0."""
    _pending: PendingMetrics | None = None

    def after_step(self) -> None:
        """All of them, in their order."""
        run, settings = self.run, self.run.settings
        if self.progress:
            self.progress.advance()
        with self.watchdog.during("ranks", run.step):
            self.stopped_by = self.stop.agreed()
        saves = run.is_due(settings.checkpoint_every) or self.stopped_by > 0
        self.log(saves)
        if run.validation and run.is_due(settings.validation.every):
            self.validate()
        self.writer.check()
        if saves:
            self.save()
        if self.pictures and run.is_due(settings.pictures.every):
            self.paint()

    def log(self, saves: bool) -> None:
        """Collect a line's numbers each `log_every` steps, and write it when they are here, or the step is saved."""
        run = self.run
        if run.is_due(run.settings.log_every):
            self._write_line()
            # All ranks know of the same steps here: of all before this line.
            self._check_nonfinite()
            rate = learning_rate(run.settings.optimizer, run.step - 1, run.settings.steps)
            self._pending = run.metrics.collect(run.distributed, rate, run.batches.take_seconds())
            if run.settings.loader.on_corrupt == "replace":
                # All ranks count the same samples, so that beyond the limit all of them stop here.
                found = run.distributed.gather(run.loader.take_replaced())
                for line in run.corrupt.add(one for some in found for one in some):
                    if self.progress:
                        print(line, file=sys.stderr, flush=True)
        if self._pending and (saves or self._pending.ready()):
            self._write_line()
        if saves:
            self._check_nonfinite()

    def _write_line(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            self.run.nonfinite.add(pending)
            if self.progress:
                self.progress.log(pending.steps[-1] + 1, pending.figures(), pending.time, pending.data_wait)

    def _check_nonfinite(self) -> None:
        # With fp16 the scale grows until a gradient overflows, once in a while: that is how it is found. Waits for the device.
        run = self.run
        if not run.scaler.is_enabled() or run.scaler.get_scale() < LEAST_SCALE:
            run.nonfinite.check(run.settings, run.loader, run.distributed)

    def validate(self) -> None:
        """Measure the loss of held-out samples, by the averaged weights where there are any."""
        run, validation = self.run, self.run.validation
        assert validation
        with (
            self.watchdog.during("validation", run.step),
            run.ema.in_place() if run.ema else nullcontext(),
            during(self.progress, "held-out loss", len(validation.batches), "batches") as work,
        ):
            loss = validation.loss(run.model, run.distributed, run.settings.precision, work)
        if self.progress:
            self.progress.add(run.step, {"validation_loss": loss})

    def save(self) -> None:
        """Copy all that a resumed run needs; it is written while training goes on."""
        run = self.run
        check_weights(run)
        with self.watchdog.during("ranks", run.step):
            states = run.distributed.gather(run.metrics.state())
        if self.progress:
            with self.watchdog.during("checkpoint", run.step), self.progress.during("checkpoint") as work:
                self.progress.flush()
                parts, counted = parts_of(run.model, run.optimizer, run.ema), optimizer_step(run.optimizer)
                work.say(f"{sum(tensor.nbytes for part in parts.values() for tensor in part.values()) / 1e9:.1f} GB")
                last = run.step == run.settings.steps or self.stopped_by > 0
                self.writer.save(run.step, parts, counted, states, run.scaler.state_dict(), last)

    def paint(self) -> None:
        """Pictures of held-out samples; on rank 0, while the others wait."""
        run = self.run
        assert self.pictures
        assert self.progress
        with (
            self.watchdog.during("pictures", run.step),
            uncompiled() if run.settings.model.compile else nullcontext(),
            self.progress.during("pictures", self.pictures.count(), "views") as work,
        ):
            self.progress.show(run.step, self.pictures.draw(run.step, run.ema, work))


def announce(run: Training) -> Progress:
    """Write the settings into the run folder and say what is about to happen; rank 0 only."""
    settings = run.settings
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "settings.yaml").write_text(dump_settings(settings, "train"), encoding="utf-8")
    print(describe(run), flush=True)
    if run.start:
        write_report(run.start, settings.out)
        print(run.start.lines(), flush=True)
    return Progress(settings, run.step, flops_of(run))


def make_pictures(run: Training, progress: Progress | None) -> Pictures | None:
    """The samples that are painted during training; on rank 0, where the settings want them."""
    if not progress or not run.settings.pictures.every:
        return None
    with progress.during("held-out samples"):
        vae = run.vae.to(run.distributed.device)
        return Pictures(Run(run.model, vae, run.settings, run.identity, run.step), run.reader)


def finish(run: Training, progress: Progress | None) -> None:
    """Check that all ranks hold the same weights, and say what was done and where things are."""
    settings = run.settings
    with during(progress, "comparing weights"):
        hashes = run.distributed.gather(weights_sha256(weights_of(run.model, run.optimizer)))
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the ranks' weights differ after step {settings.steps}: {[value[:12] for value in hashes]}")
    if progress:
        progress.close()
        progress.summary(len(run.nonfinite.steps), len(run.corrupt.seen))
        record = {"step": settings.steps, "weights_sha256": hashes}
        (settings.out / "finished.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        ranks = number_of(run.distributed.world_size, "rank")
        print(f"done: {settings.steps} {noun(settings.steps, 'steps')}, weights {hashes[0][:12]} on {ranks}")
        print(f"checkpoints: {settings.out / 'checkpoints'}, metrics: tensorboard --logdir {settings.out / 'tensorboard'}")
        model, dataset = shlex.quote(str(settings.out)), shlex.quote(settings.shown_dataset)
        options = " --storage '...'" if settings.storage else ""
        print(f"next: python -m pbe_train.demo --model {model} --dataset {dataset}{options} --out demo.png")


if __name__ == "__main__":
    run_program(main)
