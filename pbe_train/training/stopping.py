"""Stopping in good order: after SIGTERM or Ctrl-C a run finishes its step, saves it, and ends."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pbe_train.training.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the ranks are to stop. A context manager: inside it the first signal is noted, the second one ends the process.

    A signal may reach one rank alone, or all of them at different steps, and they must stop after the same one. Each step sums up
    over the ranks whether one was asked to; the sum of a step is waited for in the next one, when it has long come.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.signal = 0
        # Of the CPU, whatever the model is on: signals are the host's, and the device must not be waited for.
        self._group = dist.new_group(backend="gloo") if ranks.count > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
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
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
