"""A thread that prints which rank hangs, and in what, when no step ends for a long time."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 15 * 60


class Watchdog:
    """Prints, on stderr, that this rank has not gone on for `seconds`: its phase, what it waits for, and its stack.

    Ranks wait for one another in `gradients` and `ranks`: the one that is in another phase is the one that hangs. Printed once
    for each phase of a step. A context manager.

    Args:
        rank: number of this process among all.
        awaited: names the loader process that makes the next batch, and the samples of that batch.
        seconds: without a sign of life.
    """

    def __init__(self, rank: int, awaited: Callable[[], str], seconds: float = SECONDS) -> None:
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
