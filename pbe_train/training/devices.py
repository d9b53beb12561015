"""GPUs that one may train on: memory and peak arithmetic, as their makers state them.

Peaks are dense: where a datasheet has the figure with sparsity only, it is halved here. `bf16` and `fp16` are products on tensor
cores with sums in fp32, `tf32` the same for fp32 tensors, `fp32` the other cores.
"""

from dataclasses import dataclass
from typing import Literal

from pbe_train.config import Precision

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
    Gpu(
        "RTX 3090", ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"), 24, {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0}
    ),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf
    Gpu("T4", ("Tesla T4",), 16, {"fp32": 8.1, "fp16": 65.0}),
)


def find_gpu(name: str) -> Gpu | None:
    """The kind of GPU that torch.cuda.get_device_name() calls so; None for one that is not in the table, CPUs among them."""
    return next((gpu for gpu in GPUS if name in gpu.names), None)


def arithmetic_of(gpu: Gpu, precision: Precision, tf32: bool = False) -> Arithmetic:
    """What the GPU's fastest cores do in a training of this precision; fp32 where none of them does it.

    `auto` is bf16, or fp16 on a GPU that lacks it, as `Ranks.choose_precision` has it.

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
