"""Train Paint by Example: `torchrun [--nproc-per-node N] pbe_train/train.py [--config FILE] [--key value ...]`.

Also as plain `python pbe_train/train.py`, in one process. Everything is a function of the settings and the step number, so a run
that was stopped goes on from its newest checkpoint when the same command is given again, on any number of ranks.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from pbe_train.config import OptimizerSettings, TrainSettings
from pbe_train.data.damage import DamageBook
from pbe_train.data.items import Batch, Items, load_batches
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.shards import ShardReader
from pbe_train.diffusion import make_scheduler, noise_loss, training_schedule
from pbe_train.editing.sampling import Run
from pbe_train.networks.loading import load_dataset_vae
from pbe_train.networks.model import PaintByExampleModel, build_model
from pbe_train.networks.preparing import laid_out_as, prepare, uncompiled
from pbe_train.training.checkpoint import (
    CheckpointState,
    RunIdentity,
    check_resumable,
    find_checkpoint,
    list_checkpoints,
    read_part,
    read_state,
    save_checkpoint,
)
from pbe_train.training.ema import MovingAverage, copy_values
from pbe_train.training.pictures import Pictures
from pbe_train.training.progress import Progress, Timed
from pbe_train.training.ranks import Ranks
from schemas.errors import InputError, run_program
from schemas.randomness import name_hash
from schemas.settings import dump_settings, load_settings, preset
from schemas.weights import weights_sha256

# AdamW's running means of the gradient and of its square.
MOMENTS = ("exp_avg", "exp_avg_sq")


def main() -> None:
    """Read the settings and train."""
    settings = load_settings(TrainSettings, "train", default_config=preset("tiny"))
    ranks = Ranks.start(settings.threads, settings.precision)
    train(settings, ranks)
    ranks.stop()


def train(settings: TrainSettings, ranks: Ranks) -> None:
    """The whole run, from data to final checkpoint."""
    # Data, and a check that it and the networks belong together.
    reader = open_reader(settings)
    vae = load_dataset_vae(settings.model.vae, reader.folder, reader.info)
    make_scheduler(settings.pictures.scheduler, settings.prediction)

    # Go on from a checkpoint, if there is one; every rank looks for itself.
    checkpoint = find_checkpoint(settings.out, settings.resume)
    state = read_state(checkpoint) if checkpoint else None
    check_agreement(ranks, checkpoint, state, reader)

    # Model, optimizer, moving average. The seed is set here, so that initial weights depend on nothing before it.
    torch.manual_seed(name_hash(settings.seed, "train", "weights", bits=32))
    unet = state.identity.unet if state else None
    model = prepare(build_model(settings.model, reader.info.vae.latent_channels, unet), settings.model, ranks.device).train()
    trained, kept = model.trained(), model.kept()
    optimizer = make_optimizer(trained, settings.optimizer)
    average = MovingAverage(trained, settings.ema_decay) if settings.ema_decay else None
    identity = identify(model, reader)

    step = 0
    if checkpoint and state:
        check_resumable(checkpoint, state, settings, identity)
        resume(checkpoint, state, kept, trained, optimizer, average)
        step = state.step
    items = Items(settings, reader, model.conditioner.model.config.image_size)
    loaded = load_batches(items, step, ranks.count, ranks.rank)
    batches, damage = Timed(loaded), DamageBook(settings.loader.most_replaced)

    progress = pictures = None
    if ranks.rank == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "settings.yaml").write_text(dump_settings(settings, "train"), encoding="utf-8")
        print(describe(settings, reader, trained, ranks, checkpoint), flush=True)
        progress = Progress(settings.out, step, settings.steps)
        pictures = Pictures(Run(model, vae.to(ranks.device), settings, identity, step)) if settings.pictures.every else None

    # The loop.
    schedule = training_schedule(settings.prediction)
    parallel = ranks.wrap(model)
    losses: list[torch.Tensor] = []
    finite = torch.ones((), device=ranks.device)  # 0 after the first step that was not; read only when something is written.
    logged_step, logged_time = step, time.monotonic()
    while step < settings.steps:
        for part in range(settings.accumulation):
            batch = Batch(*(tensor.to(ranks.device, non_blocking=True) for tensor in next(batches)))
            with ranks.hold_gradients(parallel, hold=part < settings.accumulation - 1):
                with ranks.autocast(settings.precision):
                    loss = noise_loss(parallel, schedule, batch)
                torch.autograd.backward(loss / settings.accumulation)
            losses.append(loss.detach())
            finite *= loss.detach().isfinite()
        gradient_norm = nn.utils.clip_grad_norm_(trained.values(), settings.optimizer.gradient_clip or float("inf"))
        finite *= gradient_norm.isfinite()
        set_learning_rate(optimizer, settings.optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if average:
            average.update(step)

        last = step == settings.steps
        saves, logs = step % settings.checkpoint_every == 0 or last, step % settings.log_every == 0 or last
        if saves or logs:
            check_finite(ranks, settings, step, finite, trained)
        if logs:
            # All ranks keep the same book, so that beyond the limit all of them stop here.
            for line in damage.add(one for some in ranks.gather(loaded.take_replaced()) for one in some):
                if progress:
                    print(line, file=sys.stderr, flush=True)
            loss_mean = float(ranks.mean(torch.stack(losses).mean()))
            losses.clear()
            seconds = time.monotonic() - logged_time
            if progress:
                progress.log(
                    step,
                    {
                        "loss": loss_mean,
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "gradient_norm": float(gradient_norm),
                        "samples_per_second": (step - logged_step) * settings.global_batch / seconds,
                        "data_wait": batches.take_seconds() / seconds,
                    },
                )
            logged_step, logged_time = step, time.monotonic()
        if progress:
            progress.advance()
            if pictures and (step % settings.pictures.every == 0 or last):
                with uncompiled() if settings.model.compile else nullcontext():
                    progress.show(step, pictures.draw(step, average))
            if saves:
                save(step, settings, identity, kept, trained, optimizer, average)

    finish(settings, ranks, kept, progress, reader.folder)


def make_optimizer(trained: dict[str, nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over everything that is trained."""
    return torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int) -> None:
    """Linear warm-up, then constant; `step` counts from 0."""
    share = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share


def identify(model: PaintByExampleModel, reader: ShardReader) -> RunIdentity:
    """What this run trains on and with."""
    return RunIdentity(
        dataset_fingerprint=reader.info.fingerprint,
        vae_sha256=reader.info.vae.sha256,
        encoder_sha256=weights_sha256(model.conditioner.model.state_dict()),
        unet={key: value for key, value in model.unet.config.items() if not key.startswith("_")},
        latent_channels=reader.info.vae.latent_channels,
        scaling_factor=reader.info.vae.scaling_factor,
        view_size=reader.info.view_size,
    )


def save(
    step: int,
    settings: TrainSettings,
    identity: RunIdentity,
    kept: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
) -> Path:
    """Save all that a resumed run needs: weights, their average, the optimizer's moments.

    Weights and average name every parameter, also those that have no effect and are not trained: released weights have them.
    """
    moments = {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in MOMENTS for name, parameter in trained.items()}
    parts = {"model": kept, "optimizer": moments, **({"ema": {**kept, **average.average}} if average else {})}
    return save_checkpoint(settings.out, step, settings, identity, parts)


def resume(
    checkpoint: Path,
    state: CheckpointState,
    kept: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
) -> None:
    """Put everything back as `save` found it."""
    copy_values(read_part(checkpoint, state, "model", kept), kept)
    if average:
        averaged = read_part(checkpoint, state, "ema", kept)
        copy_values({name: averaged[name] for name in average.average}, average.average)
    expected = {f"{kind}.{name}": parameter for kind in MOMENTS for name, parameter in trained.items()}
    moments = read_part(checkpoint, state, "optimizer", expected)
    for name, parameter in trained.items():
        own = {kind: laid_out_as(parameter, moments[f"{kind}.{name}"]) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.step), device=parameter.device), **own}


def check_agreement(ranks: Ranks, checkpoint: Path | None, state: CheckpointState | None, reader: ShardReader) -> None:
    """Refuse ranks that would train from different starts or on different data: on several machines, paths may mislead.

    Raises:
        InputError: with what each sort of rank has.
    """
    weights = state.files["model.safetensors"].sha256[:12] if state and "model.safetensors" in state.files else "new"
    found = (state.step if state else 0, weights, reader.info.fingerprint[:12])
    seen = ranks.gather(found)
    if len(set(seen)) > 1:
        shown = "; ".join(
            f"rank {seen.index(start)} starts at step {start[0]} (weights {start[1]}) on dataset {start[2]}"
            for start in dict.fromkeys(seen)
        )
        raise InputError(
            f"{checkpoint or reader.folder}: the ranks do not see the same: {shown}; "
            "put `out` and `dataset` into folders that all machines share"
        )


def check_finite(
    ranks: Ranks, settings: TrainSettings, step: int, finite: torch.Tensor, trained: dict[str, nn.Parameter]
) -> None:
    """Stop a run whose numbers broke, before anything of it is written.

    Args:
        ranks: all of them must call.
        settings: of the run.
        step: steps done.
        finite: 1 while all losses and gradient norms were finite on this rank.
        trained: the weights.

    Raises:
        InputError: a loss, a gradient or a weight is not finite.
    """
    size = torch.stack(torch._foreach_norm(list(trained.values()))).sum()
    if float(ranks.mean(finite * size.isfinite())) < 1:
        saved = list_checkpoints(settings.out)
        kept = f"{saved[-1].name} is from before that and kept" if saved else "no checkpoint was written"
        raise InputError(
            f"{settings.out}: loss, gradient or weights became infinite or not a number by step {step} ({kept}); the same "
            "settings would come here again: start a new run with another --out and a lower --optimizer.learning_rate"
        )


def finish(
    settings: TrainSettings, ranks: Ranks, kept: dict[str, nn.Parameter], progress: Progress | None, dataset: Path
) -> None:
    """Check that all ranks hold the same weights, and say where things are."""
    hashes = ranks.gather(weights_sha256(kept))
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the ranks' weights differ after step {settings.steps}: {[value[:12] for value in hashes]}")
    if progress:
        progress.close()
        record = {"step": settings.steps, "weights_sha256": hashes}
        (settings.out / "finished.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"done: {settings.steps} steps, weights {hashes[0][:12]} on {ranks.count} rank(s)")
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
        f"dataset {dataset}: {samples:,} samples in {len(reader.shards)} shards; "
        f"{settings.steps:,} steps are {epochs:.1f} epochs\n"
        f"model: {parameters / 1e6:.1f} M trained parameters, on {ranks.count} rank(s) of {ranks.device.type}\n"
        + (f"going on from {checkpoint}" if checkpoint else f"new run in {settings.out}")
    )


if __name__ == "__main__":
    run_program(main)
