"""Put tensors into a network: all of them, or none."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pbe_core.errors import InputError
from pbe_train.checkpoints.key_mapping import Tensors


@torch.no_grad()
def fill(target: Mapping[str, Tensor], tensors: Tensors, where: str, part: str) -> None:
    """Copy all of `tensors` into all of `target`.

    Args:
        target: of one part of the model.
        tensors: of the same names and shapes, in any precision.
        where: file or folder of the tensors, for messages.
        part: what they are, for messages.

    Raises:
        InputError: a tensor is missing, is not expected or has another shape; nothing was copied then.
    """
    missing, unexpected = sorted(target.keys() - tensors.keys()), sorted(tensors.keys() - target.keys())
    reshaped = sorted(name for name in target.keys() & tensors.keys() if target[name].shape != tensors[name].shape)
    faults = [
        f"{len(names)} {what} ({_some(names)})" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if reshaped:
        shapes = [f"{name} {list(tensors[name].shape)}, not {list(target[name].shape)}" for name in reshaped]
        faults.append(f"{len(reshaped)} of another shape ({_some(shapes)})")
    if faults:
        raise InputError(
            f"{where}: the tensors of its {part} are not those of this model: {'; '.join(faults)}; "
            "get the file again, or give a model of this kind"
        )
    for name, tensor in tensors.items():
        target[name].copy_(tensor)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
