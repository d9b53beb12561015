"""A stand-in for a CUDA graph on a CPU: it repeats the operations of a step on the memory that they had when they were recorded.

As a graph does, it keeps what the host gave an operation for a number, calls no Python again, and overwrites what the step before
left. Only that recording already computes is different: the first replay then has nothing to do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pbe_train.training.cuda_graph import Computed

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    """Takes down the operations inside it. A number that the host reads from a tensor is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} reads a number on the host"
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.operations:
                given = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
                again = func(*args, **kwargs)
                for old, new in zip(tensors_in(made), tensors_in(again), strict=True):
                    if storage_of(old) not in given:  # Else a view, or changed in place.
                        old.detach().copy_(new)


class TapeRecording:
    """In the place of `Recording`."""

    made = 0

    def __init__(self, step: Callable[[], Computed], pool: object | None) -> None:
        TapeRecording.made += 1
        self._tape = Tape()
        with self._tape:
            self._computed = step()
        self.pool = "pool"
        self._fresh = True

    def replay(self) -> Computed:
        if not self._fresh:
            self._tape.replay()
        self._fresh = False
        return self._computed


def tensors_in(given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
