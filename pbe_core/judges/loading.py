"""What judges share: a file of weights is read without running it, and fills a network only if it is that network's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.weight_files import COUNTERS, check_finite, weights_format
from pbe_core.words import number_of


@dataclass(frozen=True)
class LoadedNetwork:
    """A network on the CPU, in float32, and how pictures are prepared for it."""

    network: nn.Module
    """Prepared pictures [n, 3, size, size] -> features [n, width]."""
    prepare: Callable[[AnyPhoto], Float32[np.ndarray, "3 size size"]]
    preparation: str
    input_size: int
    width: int
    sha256: str
    encoder_hashes: frozenset[str] = frozenset()


def read_tensors(where: str) -> dict[str, Tensor]:
    """The named tensors of a file (.safetensors, or a state dict that PyTorch saved), but for counters of training steps.

    Raises:
        InputError: no such file, a damaged one, one of another kind, or one that only code could read.
    """
    path = Path(where).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder; name the file' if path.is_dir() else 'no such file'}")
    if weights_format(path) == "safetensors":
        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: a safetensors file that is damaged or cut short ({error})") from None
    else:
        try:
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # Whatever a reader of a stranger's bytes raises is the file's.
            cause = " ".join(str(error).split())[:160] or type(error).__name__
            raise InputError(f"{path}: no state dict of tensors alone, damaged, or cut short ({cause})") from None
    named = content if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no named tensors; give a state dict")
    return {name: value for name, value in tensors.items() if not name.endswith(COUNTERS)}


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str, what: str) -> None:
    """Give a network (which may be on `meta`) these tensors, in float32: exactly those that it has.

    Raises:
        InputError: the tensors are of another architecture, with how they differ, or a number in them is not finite.
    """
    own = {name: value for name, value in network.state_dict().items() if not name.endswith(COUNTERS)}
    missing = [name for name in own if name not in tensors]
    shared = [name for name in own if name in tensors]
    others = [
        f"{name}: {_shape(tensors[name])}, not {_shape(own[name])}" for name in shared if tensors[name].shape != own[name].shape
    ]
    unknown = sorted(tensors.keys() - own.keys())
    faults = [
        f"{number_of(len(found), 'tensor')} {how}, first {found[0]}"
        for found, how in ((missing, "missing"), (others, "of another shape"), (unknown, "too many"))
        if found
    ]
    if faults:
        raise InputError(f"{where}: not the weights of {what}: {'; '.join(faults)}")
    check_finite(tensors, where)
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False, assign=True)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
