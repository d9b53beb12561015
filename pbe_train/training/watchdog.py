"""A thread that says which rank hangs, and in what, when no step ends for a long time."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watchdog:
    """Says, on stderr, that this rank has not gone on for `seconds`: in which phase it is, what it waits for, and its stack.

    Ranks wait for one another in `gradients` and `ranks`: the one that is in another phase is the one that hangs. Says it once
    for each step. A context manager.

    Args:
        rank: number of this process among all.
        seconds: without a sign of life; 0 = never.
        owed: says which loader process owes the next batch, and of which samples.
    """

    def __init__(self, rank: int, seconds: float, owed: Callable[[], str]) -> None:
        self.rank = rank
        self.seconds = seconds
        self.owed = owed
        self.step = 0
        self.phase = "start"
        self.alive = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds:
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
        told = None
        while not self._over.wait(self.seconds / 4):
            still = time.monotonic() - self.alive
            if still > self.seconds and told != (self.step, self.phase):
                told = self.step, self.phase
                print(self.report(still), file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    def report(self, seconds: float) -> str:
        """What is to be told of a rank that hangs for so long."""
        waits = f": it waits for {self.owed()}" if self.phase == "data" else ""
        return f"rank {self.rank} has been in `{self.phase}` of step {self.step + 1} for {seconds:.0f} s{waits}"
