"""The processes that train together: joining, summing, gathering, stopping after the same step, and saying which one hangs.

Under torchrun there are several processes, one a rank; otherwise there is one.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pbe_core.errors import InputError
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pbe_train.model.paint_model import PaintByExampleModel

# Pictures and checkpoints are made by rank 0 while the others wait: minutes at full size.
PATIENCE = timedelta(hours=1)
SECONDS_APART = 5
"""After the first signal; a later one ends the process at once."""
SILENCE_SECONDS = 15 * 60
"""Without a sign of life, after which a process says what it is doing."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Distributed:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, threads: int | None, precision: str, recorded: bool = False) -> "Distributed":
        """Join the others (NCCL on GPUs, gloo on CPUs), choose the device, share out the CPU threads.

        Args:
            threads: of the CPU, for this process; null = its share of them.
            precision: of the run.
            recorded: whether steps are to be recorded as CUDA graphs.

        Raises:
            InputError: more processes on this machine than GPUs.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                shows = f"this machine shows {number_of(gpus, 'GPU')} and each process needs one"
                raise InputError(
                    f"--nproc-per-node {local_count}: {shows}; start {gpus}, or train on the CPU (CUDA_VISIBLE_DEVICES=)"
                )
            torch.cuda.set_device(device)
            # What autocast leaves in fp32 may use TF32; who asks for fp32 gets it, also of convolutions.
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
            torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_count))
        if recorded:
            # PyTorch asks for it before the ranks' first word: NCCL's thread must not look at what is being recorded.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        if world_size > 1:
            with Progress("waiting for the other processes") if rank == 0 else nullcontext():
                # torchrun's ranks of a second start would find the addresses of the first ones in the store that they share.
                store, rank, world_size = next(rendezvous("env://", timeout=PATIENCE))
                store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
                backend = "nccl" if cuda else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        return cls(rank, world_size, device)

    def stop(self) -> None:
        """Leave the others, after a run that went well; after a failure torchrun ends them."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def wrap(self, model: PaintByExampleModel) -> DistributedDataParallel | PaintByExampleModel:
        """The model with its gradients averaged over the ranks."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def hold_gradients(self, model: DistributedDataParallel | PaintByExampleModel, hold: bool) -> AbstractContextManager[None]:
        """Keep gradients local inside the block where `hold`; for all micro-batches of a step but the last."""
        return model.no_sync() if hold and isinstance(model, DistributedDataParallel) else nullcontext()

    def lost_peer(self, error: RuntimeError) -> bool:
        """Whether an error says that another rank has left, which then has its own message."""
        lost = ("Connection closed by", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted")
        return self.world_size > 1 and any(word in str(error) for word in lost)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in its place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """The arithmetic of forward and backward pass that `TrainSettings.precision` asks for."""
        chosen = self.choose_precision(precision)
        return torch.autocast(self.device.type, _HALVES[chosen]) if chosen in _HALVES else nullcontext()

    def choose_precision(self, precision: str) -> str:
        """What `auto` means here: bf16 on a GPU that has it, fp16 on another one, fp32 on the CPU."""
        if precision != "auto":
            return precision
        if self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class Stop:
    """Whether the ranks are to stop. A context manager: inside it the first signal is noted, a later one ends the process.

    After SIGTERM or Ctrl-C a run finishes its step, saves it, and ends. Batch systems signal every process of a job, and torchrun
    hands each signal on: the same stop may arrive twice at once. So only a signal that comes `SECONDS_APART` after the first
    counts as another one.

    A signal may reach one rank alone, or all of them at different steps, and they must stop after the same one. Each step sums up
    over the ranks whether one was asked to; the sum of a step is waited for in the next one, when it is there already.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.signal = 0
        self._arrived = 0.0
        # Of the CPU, whatever the model is on: signals are the host's, and the device must not be waited for.
        alone = distributed.world_size == 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=PATIENCE)
        self._sum: tuple[Any, torch.Tensor] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.signal:  # The program ends now, and the same stop may still arrive once more.
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal by which all ranks stop now, or 0; of several ranks, as of the step before. Each must call once a step."""
        if not self._group:
            return self.signal
        asked = torch.tensor([self.signal])
        before, self._sum = self._sum, (dist.all_reduce(asked, dist.ReduceOp.MAX, self._group, async_op=True), asked)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._arrived = number, time.monotonic()
        elif time.monotonic() - self._arrived > SECONDS_APART:
            # Loader processes ignore these signals; one that hangs would be waited for, without end, on the way out.
            for child in multiprocessing.active_children():
                child.kill()
            raise KeyboardInterrupt


class Watchdog:
    """Prints, on stderr, that this rank has not gone on for `seconds`: its phase, what it waits for, and its stack.

    Ranks wait for one another in `gradients` and `ranks`: the one that is in another phase is the one that hangs. Printed once
    for each phase of a step. A context manager.

    Args:
        rank: number of this process among all.
        awaited: names the loader process that makes the next batch, and the samples of that batch.
        seconds: without a sign of life.
    """

    def __init__(self, rank: int, awaited: Callable[[], str], seconds: float = SILENCE_SECONDS) -> None:
        self.rank = rank
        self.awaited = awaited
        self.seconds = seconds
        self.step = 0
        self.phase = "start"
        self.alive = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def during(self, phase: str, step: int) -> Iterator[None]:
        """What the process does inside the block; a sign of life at its begin and its end."""
        self.phase, self.step, self.alive = phase, step, time.monotonic()
        yield
        self.phase, self.alive = "between", time.monotonic()

    def _watch(self) -> None:
        printed = None
        while not self._over.wait(self.seconds / 4):
            still = time.monotonic() - self.alive
            if still > self.seconds and printed != (self.step, self.phase):
                printed = self.step, self.phase
                print(self.report(still), file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    def report(self, seconds: float) -> str:
        """The line for a rank that hangs for so long."""
        waits = f": it waits for {self.awaited()}" if self.phase == "data" else ""
        return f"rank {self.rank} has been in `{self.phase}` of step {self.step + 1} for {seconds:.0f} s{waits}"
