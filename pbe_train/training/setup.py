"""What the loop works on, made from the settings and, where there is one, from the newest checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch

from pbe_core.autoencoder import Autoencoder, allow_programs
from pbe_core.errors import InputError
from pbe_core.randomness import name_hash
from pbe_core.vae import weights_sha256
from pbe_core.words import number_of
from pbe_train.checkpoints.from_pretrained import init_from_pretrained
from pbe_train.checkpoints.load_report import LoadReport
from pbe_train.checkpoints.networks import build_model, load_dataset_vae
from pbe_train.checkpoints.trainer_checkpoint import (
    CheckpointState,
    check_resumable,
    find_checkpoint,
    list_checkpoints,
    read_state,
)
from pbe_train.config import TRAIN_SPLIT, TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import DevicePrefetcher, TrainingDataset, load_batches
from pbe_train.model.paint_model import PaintByExampleModel, prepare, with_lora
from pbe_train.model.pipeline import RunIdentity
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.cuda_graph import prepare_device
from pbe_train.training.distributed import Distributed
from pbe_train.training.flops import arithmetic_of, find_gpu, step_flops
from pbe_train.training.metrics import CorruptSamples, Metrics, NonfiniteSteps
from pbe_train.training.optimizer import EMA, cast_weights, make_optimizer, resume
from pbe_train.training.validation import make_validation


class Training:
    """What the loop works on, on one rank. `step` counts the steps done; only `train_step` changes it.

    Attributes:
        checkpoint: where the run goes on from, if anywhere.
        start: where the weights of a new run are from.
        parallel: the model whose gradients are averaged over the ranks.
        batches: those of `loader`, on the device.
    """

    def __init__(self, settings: TrainSettings, distributed: Distributed) -> None:
        """Open the dataset, find the checkpoint, make model, optimizer and loader, and put back what the checkpoint holds.

        Raises:
            InputError: dataset, networks, settings and checkpoint do not belong together, or the ranks do not see the same.
        """
        self.distributed = distributed
        if settings.cuda_graph:
            prepare_device(distributed.device)
        self.reader = reader = open_reader(settings, TRAIN_SPLIT)
        self.vae = load_dataset_vae(settings.model.vae, reader.folder, reader.info)
        self.checkpoint = find_checkpoint(settings.out, settings.resume)  # Every rank looks for itself.
        state = read_state(self.checkpoint) if self.checkpoint else None
        self.settings = settings = with_own_start(settings, state, distributed) if state else settings
        precision = distributed.choose_precision(settings.precision)
        check_agreement(distributed, self.checkpoint, state, reader, precision)

        model, self.start = make_model(settings, self.vae, state)
        if not state:
            check_halving(reader, len(model.unet.config["block_out_channels"]))
        self.identity = identify(model, reader, precision)  # Of the encoder in fp32, whatever it is cast to.
        masters = cast_weights(model, settings, precision)
        self.model = model = prepare(model, settings.model, distributed.device).train()
        if settings.model.compile:
            allow_programs(len(reader.info.buckets or ()))
        self.trained = model.trained()
        self.optimizer = make_optimizer(self.trained, settings.optimizer, settings.seed, masters, settings.cuda_graph)
        self.ema = (
            EMA(self.trained, settings.ema_decay, settings.ema_place, masters, settings.cuda_graph)
            if settings.ema_decay
            else None
        )
        self.schedule = training_schedule(settings.prediction)
        self.scaler = torch.amp.GradScaler(distributed.device.type, enabled=precision == "fp16")
        self.metrics, self.nonfinite = Metrics(distributed.device), NonfiniteSteps()
        self.corrupt = CorruptSamples(settings.loader.max_corrupt_samples)
        self.step = 0
        if self.checkpoint and state:
            check_resumable(self.checkpoint, state, settings, self.identity)
            resume(self.checkpoint, state, model, self.optimizer, self.ema)
            self.metrics.restore(state.measures, distributed)
            if state.scaler:
                self.scaler.load_state_dict(state.scaler)
            self.step = state.step

        reference_size = model.conditioner.model.config.image_size
        items = TrainingDataset(settings, reader, reference_size)
        self.loader = load_batches(items, self.step, distributed.world_size, distributed.rank)
        self.batches = DevicePrefetcher(self.loader, distributed.device)
        self.validation = make_validation(settings, reader, distributed, reference_size)
        self.parallel = distributed.wrap(model)

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is done after this one; 0 = never."""
        return every > 0 and (self.step % every == 0 or self.step == self.settings.steps)


def make_model(
    settings: TrainSettings, vae: Autoencoder, state: CheckpointState | None
) -> tuple[PaintByExampleModel, LoadReport | None]:
    """The model of a new run with its initial weights, and where these are from; or one for the weights of a checkpoint."""
    # The seed is set here, so that initial weights depend on nothing before it.
    torch.manual_seed(name_hash(settings.seed, "train", "weights", bits=32))
    if settings.lora:
        model, start = make_lora_model(settings, vae)
        return model, None if state else start
    if state:
        return build_model(settings.model, vae.sizes.latent_channels, state.identity.unet, state.identity.mask_channel), None
    return init_from_pretrained(settings, vae)


def check_halving(reader: ShardReader, levels: int) -> None:
    """Refuse buckets whose latents do not halve evenly down to the U-Net's lowest level: no edit could have their shapes.

    Squares are not asked: runs of such sizes have always been trained, as diffusers' U-Net takes odd latents.

    Raises:
        InputError: with the shapes, and what their sides must be multiples of.
    """
    info = reader.info
    step = info.vae.downsampling * 2 ** (levels - 1)
    if wrong := [f"{width}x{height}" for width, height in info.buckets or () if width % step or height % step]:
        raise InputError(
            f"{reader.folder}: views of {', '.join(wrong)} px do not halve evenly down to the U-Net's lowest of {levels} levels: "
            f"all sides must be multiples of {step} px; build it with other views.buckets, or give model.unet fewer levels"
        )


def make_lora_model(settings: TrainSettings, vae: Autoencoder) -> tuple[PaintByExampleModel, LoadReport]:
    """The base that a LoRA is trained beside, with a new LoRA, and where the base is from. Also a run that goes on needs both.

    Raises:
        InputError: there is no base, or one that paints by words.
    """
    assert settings.lora
    base = settings.model.pretrained
    wanted = "a LoRA is trained beside a whole Paint by Example model, released or a run of this trainer"
    if base is None:
        raise InputError(f"lora: {wanted}; name it by model.pretrained")
    model, start = init_from_pretrained(settings, vae)
    assert start
    if "conditioner" not in start.loaded:
        raise InputError(f"{start.source}: is a {start.kind.partition(',')[0]} model, which has no conditioner, and {wanted}")
    sha256 = weights_sha256(model.kept())
    # By a name of its own: what the base drew, and whether it drew, must not matter.
    torch.manual_seed(name_hash(settings.seed, "train", "lora", bits=32))
    with_lora(model, settings.lora, sha256)
    layers = number_of(len(model.kept()) // 2, "layer")
    new = f"a LoRA of rank {settings.lora.rank} in {layers}, which at first changes nothing"
    return model, replace(start, new=[*start.new, new])


def with_own_start(settings: TrainSettings, state: CheckpointState, distributed: Distributed) -> TrainSettings:
    """Settings that name the start which the run had, since that is what it was made of, and under whose licence it is.

    A LoRA's base is read again, from where it is now; whether it is the same, its hash tells.
    """
    had = state.settings["model"].get("pretrained")
    given = settings.model.pretrained
    if settings.lora and given is not None:
        return settings
    if given not in (None, had) and distributed.rank == 0:
        print(f"model.pretrained {given} is not read: this run began {f'from {had}' if had else 'from scratch'}", flush=True)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"pretrained": had})})


def check_agreement(
    distributed: Distributed, checkpoint: Path | None, state: CheckpointState | None, reader: ShardReader, precision: str
) -> None:
    """Refuse ranks that would train from different starts, on different data or in different arithmetic.

    On several machines paths may mislead, and cards may differ.

    Raises:
        InputError: with what each sort of rank has.
    """
    weights = state.files["model.safetensors"].sha256[:12] if state and "model.safetensors" in state.files else "new"
    dataset = f"{reader.info.fingerprint[:12]} (samples {reader.samples_hash()[:12]})"
    found = (state.step if state else 0, weights, dataset, precision)
    seen = distributed.gather(found)
    if len(set(seen)) > 1:
        shown = "; ".join(
            f"rank {seen.index(start)} starts at step {start[0]} (weights {start[1]}) on dataset {start[2]} in {start[3]}"
            for start in dict.fromkeys(seen)
        )
        raise InputError(
            f"{checkpoint or reader.folder}: the ranks do not see the same: {shown}; "
            "put `out` and `dataset` into folders that all machines share, and give --precision where the cards differ"
        )


def check_weights(run: Training) -> None:
    """Stop a run whose weights broke, before they are saved; they are the same on all ranks.

    Raises:
        InputError: a weight is not finite.
    """
    if not torch.stack(torch._foreach_norm(list(run.trained.values()))).sum().isfinite():
        out, saved = run.settings.out, list_checkpoints(run.settings.out)
        kept = f"{saved[-1].name} is from before that and kept" if saved else "no checkpoint was written"
        raise InputError(
            f"{out}: weights became infinite or not a number by step {run.step} ({kept}); the same settings would come here "
            "again: start a new run with another --out and a lower --optimizer.learning_rate"
        )


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
        buckets=reader.info.buckets,
        vae_normalisation=reader.info.vae.normalisation,
        mask_channel=model.mask_channel,
        base_sha256=model.base_sha256,
    )


def flops_of(run: Training) -> tuple[float, float] | None:
    """FLOP/s of all GPUs at their peak, and FLOPs of a sample; None on a device whose peak is not known."""
    gpu = find_gpu(torch.cuda.get_device_name()) if run.distributed.device.type == "cuda" else None
    if not gpu:
        return None
    peak = gpu.teraflops[arithmetic_of(gpu, run.settings.precision)] * 1e12
    cells = run.reader.info.view_size // run.reader.info.vae.downsampling
    flops = step_flops(run.settings.model, cells, run.settings.lora)
    return peak * run.distributed.world_size, flops.total


def describe(run: Training) -> str:
    """What is about to happen, in three lines."""
    settings, ranks, reader = run.settings, run.distributed.world_size, run.reader
    samples, parameters = sum(reader.counts), sum(parameter.numel() for parameter in run.trained.values())
    epochs = settings.steps * settings.global_batch / samples
    return (
        f"dataset {settings.shown_dataset}: {number_of(samples, 'sample')} in {number_of(len(reader.shards), 'shard')}; "
        f"{number_of(settings.steps, 'step')}: {epochs:.1f} epochs\n"
        f"model: {parameters / 1e6:.1f} M trained parameters, on {number_of(ranks, 'rank')} of {run.distributed.device.type}\n"
        + (f"going on from {run.checkpoint}" if run.checkpoint else f"new run in {settings.out}")
    )


def out_of_memory(error: Exception, settings: TrainSettings, distributed: Distributed) -> str:
    """What to tell a person whose GPU is too small, and what helps."""
    size, parts = settings.global_batch // (distributed.world_size * settings.accumulation), 2 * settings.accumulation
    model, optimizer = settings.model, settings.optimizer
    plain = optimizer.state == "fp32" and optimizer.place == "device"
    helps = {
        f"--accumulation {parts} (halves the batch of {size} that a GPU holds; the training is the same)": size % 2 == 0,
        "--model.gradient_checkpointing true (a third more arithmetic)": not model.gradient_checkpointing,
        "--cuda_graph false (pictures and held-out loss then take the memory that a step has left)": settings.cuda_graph,
        "--ema_place cpu (the same average, in the CPU's memory)": settings.ema_decay > 0 and settings.ema_place == "device",
        "--precision bf16": settings.precision == "fp32",
        "for a new run, --optimizer.state 8bit or --optimizer.place cpu": plain,
        "for a new run, --model.weights bf16 --precision bf16": model.weights == "fp32",
        """for a new run, --model.train '["attentions", "conditioner"]'""": not model.train,
        "more GPUs, or larger ones": True,
    }
    what = "; ".join(way for way, applies in helps.items() if applies)
    first = str(error).partition("\n")[0]
    said = f"rank {distributed.rank} is out of memory ({first}); what helps: {what}"
    return f"{said}; `pbe cost` counts what is needed, and docs/training.md has tables"
