"""Stopping in good order: after SIGTERM or Ctrl-C a run finishes its step, saves it, and ends."""

import multiprocessing
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pbe_train.training.ranks import PATIENCE, Ranks

SECONDS_APART = 5
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the ranks are to stop. A context manager: inside it the first signal is noted, a later one ends the process.

    Batch systems signal every process of a job, and torchrun hands on what it hears: the same stop may be heard twice at once. So
    only what comes `SECONDS_APART` after the first counts as another one.

    A signal may reach one rank alone, or all of them at different steps, and they must stop after the same one. Each step sums up
    over the ranks whether one was asked to; the sum of a step is waited for in the next one, when it has long come.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.signal = 0
        self._heard = 0.0
        # Of the CPU, whatever the model is on: signals are the host's, and the device must not be waited for.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.count > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.signal:  # The program ends now, and the same stop may still be heard once more.
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal by which all ranks stop now, or 0; of several ranks, as of the step before. Each must call once a step."""
        if not self._group:
            return self.signal
        asked = torch.tensor([self.signal])
        before, self._asked = self._asked, (dist.all_reduce(asked, dist.ReduceOp.MAX, self._group, async_op=True), asked)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._heard = number, time.monotonic()
        elif time.monotonic() - self._heard > SECONDS_APART:
            # Loader processes leave stopping to this one; one that hangs would be waited for, without end, on the way out.
            for child in multiprocessing.active_children():
                child.kill()
            raise KeyboardInterrupt
