"""A step that the GPU repeats from a recording: the host launches one thing instead of thousands of kernels.

    batches ────────────copy──▶ buffers ─┐
    rate, decay ────────fill──▶ tensors ─┼─▶ [ forward, backward, clip, AdamW, average ] ──▶ losses, norm
    weights, moments, average ───────────┘            recorded as one CUDA graph

A CUDA graph repeats kernels on the memory that they had when they were recorded, and with the numbers of the host that they were
given then. So a step that is recorded takes all that changes from tensors that stay where they are, reads nothing on the host,
and what it leaves is gone with the next one.

Before a step is recorded, steps of its shape are computed as ever: libraries set themselves up, torch.compile compiles, DDP
arranges its buckets. These are steps of the run like any other, and recording computes nothing; so a run with recordings is the
run without them.

Source: PyTorch, CUDA semantics, "Whole-network capture" and "Usage with DistributedDataParallel".
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pbe_core.errors import InputError
from pbe_train.data.training_dataset import Batch

WARM_UP, WARM_UP_OF_RANKS = 3, 11
"""Steps of a shape before it is recorded; DDP takes times of its first ten, by events that no recording may hold."""


class Computed(NamedTuple):
    """What a step leaves beside weights, moments and average: tensors on the device."""

    losses: Sequence[Float[Tensor, " batch"]]
    """Of each micro-batch."""
    timesteps: Sequence[Int64[Tensor, " batch"]]
    """Theirs."""
    gradient_norm: Float[Tensor, ""]
    """Before clipping, over all ranks."""
    nonfinite: Bool[Tensor, ""]
    """Whether it was not finite, and the step changed nothing."""


Step = Callable[[Iterable[Batch]], Computed]
Result = TypeVar("Result")


def prepare_device(device: torch.device) -> None:
    """Make a stream of its own the current one, for the whole run; call it before anything is on the device.

    The default stream cannot be recorded, and DDP remembers the stream that it was made on.

    Raises:
        InputError: the device is no GPU.
    """
    if device.type != "cuda":
        raise InputError(
            "train.cuda_graph: only a GPU repeats recorded steps, and this run is on the CPU; set cuda_graph to false"
        )
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class RepeatedStep:
    """A step that is recorded, once for each shape of its batches, and then repeated; called as the step itself.

    Args:
        step: forward and backward pass, optimizer, average; takes batches of a shape always from the same memory.
        ranks: how many train together.
    """

    def __init__(self, step: Step, ranks: int) -> None:
        self.step = step
        self.warm_up = WARM_UP if ranks == 1 else WARM_UP_OF_RANKS
        self._shapes: dict[tuple[torch.Size, ...], _Shape] = {}
        self._pool: object | None = None

    def __call__(self, batches: Iterable[Batch]) -> Computed:
        """A step on these micro-batches; what it returns stays."""
        given = list(batches)
        shape = tuple(tensor.shape for batch in given for tensor in batch)
        if shape in self._shapes:
            own = self._shapes[shape]
            own.take(given)
        else:
            own = self._shapes[shape] = _Shape(given)
        if own.done < self.warm_up:
            own.done += 1
            return _copied(self.step(own.buffers))
        if own.recording is None:
            own.recording = Recording(partial(self.step, own.buffers), self._pool)
            # Recordings never run at the same time, and what one leaves is copied: they can share memory.
            self._pool = own.recording.pool
        return _copied(own.recording.replay())


class Recording(Generic[Result]):
    """A CUDA graph of a step; making it computes nothing.

    Args:
        step: reads nothing on the host; was called before on the current stream, which is not the default one.
        pool: memory of another recording, to share.
    """

    def __init__(self, step: Callable[[], Result], pool: object | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: the loader's thread that pins batches may go on meanwhile.
            with torch.cuda.graph(self._graph, pool, torch.cuda.current_stream(), "thread_local"):  # type: ignore[arg-type]
                self._computed = step()
        except RuntimeError as error:
            error.add_note("while a step was recorded (train.cuda_graph); with --cuda_graph false it is computed as ever")
            raise
        self.pool: object = self._graph.pool()

    def replay(self) -> Result:
        """Compute the step; what it returns is overwritten by the next one."""
        self._graph.replay()
        return self._computed


class _Shape:
    """Micro-batches of one shape: the memory that they are computed from, and the recording of their step."""

    def __init__(self, given: Sequence[Batch]) -> None:
        self.buffers = [Batch(*(tensor.clone() for tensor in batch)) for batch in given]
        self.recording: Recording[Computed] | None = None
        self.done = 0

    def take(self, given: Sequence[Batch]) -> None:
        for buffer, batch in zip(self.buffers, given, strict=True):
            for own, tensor in zip(buffer, batch, strict=True):
                own.copy_(tensor)


def _copied(computed: Computed) -> Computed:
    losses, timesteps = ([tensor.clone() for tensor in some] for some in (computed.losses, computed.timesteps))
    return Computed(losses, timesteps, computed.gradient_norm.clone(), computed.nonfinite.clone())
