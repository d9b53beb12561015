"""What a training step computes: FLOPs by part, and the memory that it takes, counted on shapes alone.

A FLOP is a multiplication or an addition; only matrix products and convolutions are counted, as is usual. Recomputation of
activations is not: it is a way to save memory, not a part of what has to be computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pbe_train.checkpoints.networks import unloaded_model, unloaded_vae, vae_config
from pbe_train.config import ModelSettings
from pbe_train.model.paint_model import PaintByExampleModel


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step, per sample."""

    unet_forward: float
    unet_backward: float
    conditioner: float
    """Forward and backward of what is trained between encoder and U-Net."""
    encoder: float
    """Forward of the frozen vision encoder."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.unet_forward + self.unet_backward + self.conditioner + self.encoder


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step takes on one device, activations as a linear function of the batch."""

    weights: int
    """All weights, frozen ones included, in fp32."""
    gradients: int
    moments: int
    """AdamW's two."""
    average: int
    """The moving average of the weights, if one is kept."""
    casts: int
    """Copies of the weights in the arithmetic's precision."""
    activations_per_sample: int
    """What the forward pass keeps for the backward pass."""

    def at(self, batch: int) -> int:
        """Bytes at a batch of so many samples."""
        fixed = self.weights + self.gradients + self.moments + self.average + self.casts
        return fixed + batch * self.activations_per_sample


def step_flops(settings: ModelSettings, cells: int) -> StepFlops:
    """Count a step of a model of these settings.

    Args:
        settings: which networks, and how they are computed (the shortcut leaves arithmetic out).
        cells: side of the latent.

    Raises:
        InputError: a network whose sizes are not known.
    """
    # Plain attention is the same arithmetic; fused kernels compute parts of it twice in the backward pass, which is not counted.
    counted = settings.model_copy(update={"attention": "plain", "gradient_checkpointing": False})
    with torch.device("meta"):
        model = unloaded_model(counted).train()
        noisy, masked, mask_channel, timestep, reference = _inputs(model, settings, cells, 1)
        with FlopCounterMode(display=False) as encoder:
            features = model.conditioner.features(reference)
        with FlopCounterMode(display=False) as conditioner:
            condition = model.conditioner.condense(features)
            torch.autograd.backward(condition.sum())
        condition = condition.detach().requires_grad_(True)
        with FlopCounterMode(display=False) as forward:
            predicted = model.predict(noisy, masked, mask_channel, timestep, condition)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(predicted.sum())
    return StepFlops(*(float(part.get_total_flops()) for part in (forward, backward, conditioner, encoder)))


def encode_flops(vae: str, view: int) -> float:
    """FLOPs of encoding one view of `view` x `view` px by a VAE."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unloaded_vae(vae).encode(torch.empty(1, 3, view, view))
    return float(counter.get_total_flops())


def step_memory(settings: ModelSettings, cells: int, *, bf16: bool, average: bool) -> StepMemory:
    """Count what a step keeps in memory.

    Weights, gradients, moments and average are exact. Activations are the tensors that a forward pass saves for the backward
    pass, each storage once; they are counted with the CPU's rules of autocast, those of GPUs keep some more in fp32. Not counted:
    workspaces of kernels, what the allocator cannot use, and the recomputation of gradient checkpointing.

    Args:
        settings: which networks, and how they are computed.
        cells: side of the latent.
        bf16: whether forward and backward pass are under bf16 autocast.
        average: whether a moving average is kept.
    """
    # Tensors without content, which still know their device: autocast looks at it, and leaves those on `meta` alone.
    with FakeTensorMode(), torch.device("cpu"):
        model = unloaded_model(settings).train()
        one, two = (_saved_bytes(model, settings, cells, batch, bf16) for batch in (1, 2))
        trained = sum(parameter.numel() for parameter in model.trained().values())
        whole = sum(parameter.numel() for parameter in model.parameters())
    return StepMemory(
        weights=4 * whole,
        gradients=4 * trained,
        moments=8 * trained,
        average=4 * trained * average,
        casts=2 * one - two,
        activations_per_sample=two - one,
    )


def utilisation(flops_per_sample: float, samples_per_second: float, peak: float) -> float:
    """MFU: the share of a device's peak FLOP/s that went into the model's arithmetic.

    Source: Chowdhery et al., PaLM (2022), appendix B.
    """
    return flops_per_sample * samples_per_second / peak


def latent_cells(settings: ModelSettings, view: int) -> int:
    """Side of the latent of a view of so many px."""
    return int(view // 2 ** (len(vae_config(settings.vae)["block_out_channels"]) - 1))


def _inputs(
    model: PaintByExampleModel, settings: ModelSettings, cells: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = vae_config(settings.vae)["latent_channels"]
    side = model.conditioner.model.config.image_size
    noisy, masked = torch.empty(batch, channels, cells, cells), torch.empty(batch, channels, cells, cells)
    mask_channel = torch.empty(batch, 1, cells, cells)
    return noisy, masked, mask_channel, torch.zeros(batch, dtype=torch.long), torch.empty(batch, 3, side, side)


def _saved_bytes(model: PaintByExampleModel, settings: ModelSettings, cells: int, batch: int, bf16: bool) -> int:
    """Bytes of all storages that a forward pass saves, those of the weights left out."""
    weights = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        # The tensor is held, so that no later storage can have the same address.
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    inputs = _inputs(model, settings, cells, batch)
    dropped = torch.zeros(batch, dtype=torch.bool)
    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        predicted = model(*inputs, dropped).float()
    del predicted
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)
