"""What a training step computes: FLOPs by part, and the peaks of the GPUs that do it.

A FLOP is a multiplication or an addition; only matrix products and convolutions are counted, as is usual. Recomputation of
activations is not: it is a way to save memory, not a part of what has to be computed. It is counted on shapes alone.

Peaks and memory of GPUs are those of their makers' datasheets, dense: where a datasheet has the figure with sparsity only, it is
halved here. `bf16` and `fp16` are products on tensor cores with sums in fp32, `tf32` the same for fp32 tensors, `fp32` the other
cores.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pbe_train.checkpoints.networks import unloaded_model, unloaded_vae, vae_sizes
from pbe_train.config import LoraSettings, ModelSettings, Precision
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


def step_flops(settings: ModelSettings, cells: int, lora: LoraSettings | None = None) -> StepFlops:
    """Count a step of a model of these settings.

    Args:
        settings: which networks, and how they are computed (the shortcut leaves arithmetic out).
        cells: side of the latent.
        lora: what is trained in place of all weights.

    Raises:
        InputError: a network whose sizes are not known.
    """
    # Plain attention is the same arithmetic; fused kernels compute parts of it twice in the backward pass, which is not counted.
    counted = settings.model_copy(update={"attention": "plain", "gradient_checkpointing": False})
    with torch.device("meta"):
        model = unloaded_model(counted, lora).train()
        noisy, masked, mask_channel, timestep, reference = _inputs(model, settings, cells, 1)
        with FlopCounterMode(display=False) as encoder:
            features = model.conditioner.features(reference)
        with FlopCounterMode(display=False) as conditioner:
            condition = model.conditioner.condense(features)
            if condition.requires_grad:  # Not beside a LoRA of the U-Net alone.
                torch.autograd.backward(condition.sum())
        condition = condition.detach().requires_grad_(condition.requires_grad)
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


def utilisation(flops_per_sample: float, samples_per_second: float, peak: float) -> float:
    """MFU: the share of a device's peak FLOP/s that went into the model's arithmetic.

    Source: Chowdhery et al., PaLM (2022), appendix B.
    """
    return flops_per_sample * samples_per_second / peak


def latent_cells(settings: ModelSettings, view: int) -> int:
    """Side of the latent of a view of so many px."""
    return view // vae_sizes(settings.vae).downsampling


def _inputs(
    model: PaintByExampleModel, settings: ModelSettings, cells: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = vae_sizes(settings.vae).latent_channels
    side = model.conditioner.model.config.image_size
    noisy, masked = torch.empty(batch, channels, cells, cells), torch.empty(batch, channels, cells, cells)
    mask_channel = torch.empty(batch, 1, cells, cells)
    return noisy, masked, mask_channel, torch.zeros(batch, dtype=torch.long), torch.empty(batch, 3, side, side)


Arithmetic = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    known_as: str
    names: tuple[str, ...]
    """What torch.cuda.get_device_name() calls it."""
    memory_gb: int
    """In units of 10^9 bytes or of 2^30, as it is sold: what a program finds free is 1 to 8 % less than the latter."""
    teraflops: dict[Arithmetic, float]
    """Peak in 10^12 FLOP/s by arithmetic; one that is missing has no tensor cores for it."""


_A100: dict[Arithmetic, float] = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
_HOPPER: dict[Arithmetic, float] = {"fp32": 67.0, "tf32": 989 / 2, "bf16": 1979 / 2, "fp16": 1979 / 2}

GPUS = (
    # https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    Gpu("V100 SXM2 16GB", ("Tesla V100-SXM2-16GB",), 16, {"fp32": 15.7, "fp16": 125.0}),
    Gpu("V100 SXM2 32GB", ("Tesla V100-SXM2-32GB",), 32, {"fp32": 15.7, "fp16": 125.0}),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    Gpu("A100 80GB", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 80, _A100),
    # https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf, table 1
    Gpu("A100 40GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB", "A100-PCIE-40GB"), 40, _A100),
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    Gpu("H100 SXM", ("NVIDIA H100 80GB HBM3",), 80, _HOPPER),
    Gpu("H100 PCIe", ("NVIDIA H100 PCIe",), 80, {"fp32": 51.0, "tf32": 756 / 2, "bf16": 1513 / 2, "fp16": 1513 / 2}),
    # https://resources.nvidia.com/en-us-data-center-overview-mc/en-us-data-center-overview/hpc-datasheet-sc23-h200
    Gpu("H200", ("NVIDIA H200",), 141, _HOPPER),
    # https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet
    Gpu("L4", ("NVIDIA L4",), 24, {"fp32": 30.3, "tf32": 120 / 2, "bf16": 242 / 2, "fp16": 242 / 2}),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    Gpu("L40S", ("NVIDIA L40S",), 48, {"fp32": 91.6, "tf32": 183.0, "bf16": 362.05, "fp16": 362.05}),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A
    Gpu("RTX 4090", ("NVIDIA GeForce RTX 4090",), 24, {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}),
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf, appendix A
    Gpu("RTX 3090", ("NVIDIA GeForce RTX 3090",), 24, {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0}),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf
    Gpu("T4", ("Tesla T4",), 16, {"fp32": 8.1, "fp16": 65.0}),
)


def find_gpu(name: str) -> Gpu | None:
    """The kind of GPU that torch.cuda.get_device_name() calls so; None for one that is not in the table, CPUs among them."""
    return next((gpu for gpu in GPUS if name in gpu.names), None)


def arithmetic_of(gpu: Gpu, precision: Precision, tf32: bool = False) -> Arithmetic:
    """What the GPU's fastest cores do in a training of this precision; fp32 where none of them does it.

    `auto` is bf16, or fp16 on a GPU that lacks it, as `Distributed.choose_precision` has it.

    Args:
        gpu: which one.
        precision: of forward and backward pass.
        tf32: whether fp32 tensors may go through TF32, where it is. PyTorch lets convolutions do so; the trainer does not.
    """
    wanted: dict[str, tuple[Arithmetic, ...]] = {
        "auto": ("bf16", "fp16"),
        "fp32": ("tf32",) if tf32 else (),
        "bf16": ("bf16",),
        "fp16": ("fp16",),
    }
    return next((arithmetic for arithmetic in wanted[precision] if arithmetic in gpu.teraflops), "fp32")
