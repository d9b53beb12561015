"""What a training takes in memory at its peak, counted before it starts: on the device, and in the CPU's memory.

    settings ──▶ one step on tensors without content ──every storage as it comes and goes──▶ peak of forward and backward pass
             └─▶ sizes of weights, moments, masters, average ──▶ what is there all the time

A step is run as the trainer runs it, checkpointing, autocast and all, by tensors that know their sizes alone; so nothing is left
to a rule of thumb. Not counted: what kernels need inside (cuDNN's workspaces), what the allocator cannot use, and CUDA itself:
count on a tenth more.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pbe_core.autoencoder import Autoencoder
from pbe_train.checkpoints.networks import unloaded_model, unloaded_vae, vae_sizes
from pbe_train.config import TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel
from pbe_train.model.pipeline import DECODED_AT_ONCE
from pbe_train.training.optimizer import cast_weights
from pbe_train.training.tiered_adamw import moment_bytes, temporary_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training takes, at one batch a rank."""

    trained: int
    """Weights that are trained, a number of them and not of bytes."""
    weights: int
    """All weights, frozen ones included."""
    gradients: int
    moments: int
    """AdamW's two."""
    masters: int
    """fp32 copies of bf16 weights, on the CPU."""
    average: int
    """The moving average of the weights, if one is kept."""
    painting: int
    """The VAE's weights, which pictures during training are decoded with."""
    working: int
    """The peak of forward and backward pass above the weights: activations, casts, and gradients as they come."""
    step: int
    """The optimizer's step above weights, gradients and moments."""
    showing: int
    """The peak of pictures and held-out loss, when there are no gradients: the VAE's decoder, and the weights that the average
    takes the place of."""
    checkpoint: int
    """Of a checkpoint: weights, their average, and moments."""
    optimizer_on_cpu: bool
    average_on_cpu: bool

    @property
    def kept(self) -> int:
        """What is on the device all the time."""
        moments = 0 if self.optimizer_on_cpu else self.moments
        return self.weights + moments + (0 if self.average_on_cpu else self.average) + self.painting

    @property
    def device(self) -> int:
        """The peak on the device."""
        return self.kept + max(self.working, self.gradients + self.step, self.showing)

    @property
    def host(self) -> int:
        """Of the CPU's memory, beside what any program takes; a checkpoint that is being written comes on top."""
        return self.masters + (self.moments if self.optimizer_on_cpu else 0) + (self.average if self.average_on_cpu else 0)


def training_memory(
    settings: TrainSettings, cells: int, batches: Sequence[int], *, bf16: bool, gpu: bool = True
) -> dict[int, TrainingMemory]:
    """Batch of a rank -> what a training of these settings takes.

    Args:
        settings: of the training.
        cells: side of the latent.
        batches: samples that a rank computes at once.
        bf16: whether forward and backward pass are under bf16 autocast.
        gpu: whether autocast has the rules of GPUs, which compute normalisations in fp32, or those of CPUs.

    Raises:
        InputError: a network whose sizes are not known.
    """
    state, on_cpu = settings.optimizer.state, settings.optimizer.place == "cpu"
    with torch.device("meta"):
        model = unloaded_model(settings.model, settings.lora).train()
    mode = FakeTensorMode()
    _make_fake(model, mode)
    with mode, torch.device("cpu"):
        trained = model.trained()
        masters = cast_weights(model, settings, "bf16")
        if settings.model.channels_last:
            for parameter in model.unet.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        counts = [parameter.numel() for parameter in trained.values()]
        width = 2 if settings.model.weights == "bf16" else 4
        plain = width == 4 and state == "fp32" and not on_cpu
        paints, averages = settings.pictures.every > 0, settings.ema_decay > 0
        vae = unloaded_vae(settings.model.vae)
        aside = width * sum(counts) if averages and settings.ema_place == "device" else 0
        kept = sum(map(_bytes, model.kept().values()))
        counted = TrainingMemory(
            trained=sum(counts),
            weights=sum(map(_bytes, (*model.parameters(), *model.buffers()))),
            gradients=width * sum(counts),
            moments=moment_bytes(counts, state),
            masters=sum(map(_bytes, masters.values())),
            average=4 * sum(counts) * averages,
            painting=sum(map(_bytes, vae.state_dict().values())) * paints,
            working=0,
            step=0 if plain else temporary_bytes(trained.values(), settings.optimizer),
            showing=aside + (_decoding(vae, cells, width == 2) if paints else 0),
            checkpoint=_checkpoint(kept, sum(counts), settings) + moment_bytes(counts, state),
            optimizer_on_cpu=on_cpu,
            average_on_cpu=settings.ema_place == "cpu",
        )
        return {batch: replace(counted, working=_working(model, settings, cells, batch, bf16, gpu)) for batch in batches}


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Tensors on `meta` as such without content that know their device, in place: autocast leaves those on `meta` alone.

    Under this mode itself peft could not put in its layers, since it moves them.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = FakeTensor(mode, weight.detach(), torch.device("cpu"))
            setattr(module, name, nn.Parameter(fake, requires_grad=weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, FakeTensor(mode, buffer, torch.device("cpu")))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this block, the bytes of all storages that operations make, for as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and look at what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            weakref.finalize(storage, self._drop, place, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _working(model: PaintByExampleModel, settings: TrainSettings, cells: int, batch: int, bf16: bool, gpu: bool) -> int:
    """Bytes above the weights at the peak of a micro-batch; where there are several, of one that finds gradients there."""
    channels, side = vae_sizes(settings.model.vae).latent_channels, model.conditioner.model.config.image_size
    live = LiveBytes()
    # Weights were there before: what the mode sees of them is not counted.
    live._known |= {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with live, _norms_as_on_gpus(model, bf16 and gpu):
        if settings.accumulation > 1:
            for parameter in model.trained().values():
                parameter.grad = torch.zeros_like(parameter)
        # What a batch brings, and what noise_losses makes of it.
        noisy, noise, latent, masked = (torch.empty(batch, channels, cells, cells) for _ in range(4))
        mask_channel, reference = torch.empty(batch, 1, cells, cells), torch.empty(batch, 3, side, side)
        timestep, dropped = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = model(noisy, masked, mask_channel, timestep, reference, dropped)
            losses = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        torch.autograd.backward(losses.mean())
        del latent
    for parameter in model.trained().values():
        parameter.grad = None
    return live.peak


def _decoding(vae: Autoencoder, cells: int, bf16: bool) -> int:
    """Bytes that the VAE takes to decode as many views as pictures during training do at once."""
    live = LiveBytes()
    with live, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        vae.decode(torch.empty(DECODED_AT_ONCE, vae.sizes.latent_channels, cells, cells))
    return live.peak


def _checkpoint(kept: int, trained: int, settings: TrainSettings) -> int:
    """Bytes of weights and average in a checkpoint: of weights that take `kept`, `trained` of them in fp32 where copies are."""
    short = 2 * trained if settings.model.weights == "bf16" else 0
    weights = kept + (short if settings.optimizer.place == "cpu" else 0)
    return weights + (kept + short) * (settings.ema_decay > 0)


@contextmanager
def _norms_as_on_gpus(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside this block normalisations get fp32 and give it, as CUDA's autocast has it; the CPU's leaves them in bf16."""
    kinds = (nn.GroupNorm, nn.LayerNorm)
    norms = [module for module in model.modules() if wanted and isinstance(module, kinds)]
    hooks = [norm.register_forward_pre_hook(lambda _, given: (given[0].float(),)) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
