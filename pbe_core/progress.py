"""How far a long piece of work is: on a terminal a bar that is drawn each second, in a file or a pipe a line each half minute.

    with Progress("packing", total=4000, unit="samples") as progress:
        progress.update(3)                   # three more
    with Progress("reading the model"):      # nothing to count: how long it has taken so far
        ...

A thread draws, so that signs of life come while one item takes long. Work of less than a second shows nothing on a terminal, and
work of less than half a minute nothing in a file. Everything goes to stderr.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pbe_core.words import duration, noun

DRAW_SECONDS = 1.0
"""Between two drawings of the bar on a terminal."""
LINE_SECONDS = 30.0
"""Between two lines in a file or a pipe."""
# tqdm's own, but for a rate that stays one where it is below 1, and does not turn into seconds for each.
_COUNTED = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class Beat:
    """Calls a function again and again, from a thread, until the end of a `with` block.

    Args:
        seconds: between two calls, and before the first one.
        act: the function.
    """

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        self.seconds, self.act = seconds, act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Beat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self.seconds):
            self.act()


_silenced = threading.Event()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Show no progress and print no line of it within: for all but one of several processes that do the same."""
    _silenced.set()
    try:
        yield
    finally:
        _silenced.clear()


def print_line(text: str) -> None:
    """Print a line to stderr, above any bar that is there, if anybody still reads it."""
    if _silenced.is_set():
        return
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


class Progress:
    """The progress of one piece of work, shown from the beginning to the end of a `with` block. Threads may share it.

    Args:
        doing: what is being done, as `packing`.
        total: how many there are to do; null where that is not known.
        unit: what is counted, in the plural; `B` for bytes; empty where nothing is.
        done: how many were done before; they do not count for the rate.
    """

    def __init__(self, doing: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        self.doing, self.unit = doing, unit
        self.total = total
        self.done = done
        self.before = done
        self.at_hand: float = 0
        self.status = ""
        self.began = time.monotonic()
        self._lock = threading.RLock()
        self._bar: Any = None  # Of tqdm, on a terminal.
        self._lines = 0

    def __enter__(self) -> "Progress":
        self.begin()
        # A terminal that says that it has no columns, as without a screen behind it, would show an empty bar.
        on_terminal = not _silenced.is_set() and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        if on_terminal:
            self._bar = tqdm(
                desc=self.doing,
                total=self.total,
                initial=self.done,
                unit=self.unit if self.unit == "B" else f" {self.unit}",
                unit_scale=self.unit == "B" or (self.total or 0) >= 1e6,
                bar_format=_COUNTED if self.total else None if self.unit else "{desc}: {elapsed}{postfix}",
                leave=bool(self.unit),
                delay=DRAW_SECONDS,
                smoothing=0,
                mininterval=0,
                miniters=0,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        self._beat = Beat(DRAW_SECONDS if on_terminal else LINE_SECONDS, self._show)
        self._beat.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._beat.__exit__()
        with self._lock:
            self.status, self.at_hand = "", 0
            if self._bar is not None:
                self._draw(self._bar)
                self._bar.close()
            elif self._lines and kind is None:
                print_line(self.summary())

    def begin(self) -> None:
        """Start the clock anew: what came before, such as waiting for a cluster, counts neither for the rate nor for the time."""
        with self._lock:
            self.began = time.monotonic()
            self.before = self.done
            if self._bar is not None:
                self._bar.start_t = self._bar.last_print_t = time.time()
                self._bar.initial = self.done

    def update(self, more: float = 1) -> None:
        """So many more are done."""
        with self._lock:
            self.done += more

    def set(self, done: float, total: float | None = None) -> None:
        """So many are done in all, those of before included; of so many, where that has become known or changed."""
        with self._lock:
            self.done = done
            self.total = self.total if total is None else total

    def partly(self, at_hand: float) -> None:
        """So many are done of pieces of work that are not finished: shown, and counted anew each time."""
        with self._lock:
            self.at_hand = at_hand

    def say(self, status: str) -> None:
        """What holds the work up, or which step of it is at hand: shown beside the numbers until something else is said."""
        with self._lock:
            self.status = status

    def note(self, text: str) -> None:
        """Print a line of its own, which stays."""
        with self._lock:
            print_line(text)

    def line(self) -> str:
        """The state in one line, as `packing: 120 of 4,000 samples (3%), 0.8 samples/s, 1 h 20 min left`."""
        with self._lock:
            seconds = time.monotonic() - self.began
            done = self.done + self.at_hand
            rate = (done - self.before) / max(seconds, 1e-9)
            parts = [f"{self._amount(done)} of {self._amount(self.total)} {noun(self.total, self.unit)}"] if self.total else []
            if self.total:
                parts[0] = f"{parts[0].removesuffix(' B')} ({done / self.total:.0%})"
            elif self.unit:
                parts.append(f"{self._amount(done)} {noun(done, self.unit)}".removesuffix(" B"))
            if rate > 0 and self.unit:
                parts.append(f"{self._rate(rate)}/s")
            if rate > 0 and self.total:
                parts.append(f"{duration(max(0.0, self.total - done) / rate)} left")
            else:
                parts.append(duration(seconds))
            return f"{self.doing}: {', '.join([*parts, *filter(None, [self.status])])}"

    def summary(self) -> str:
        """What was done and how long it took, in one line."""
        amount = f"{self._amount(self.done)} {noun(self.done, self.unit)}".removesuffix(" B")
        return f"{self.doing}: {f'{amount} in ' if self.unit else ''}{duration(time.monotonic() - self.began)}"

    def _show(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._draw(self._bar)
            elif not _silenced.is_set():
                self._lines += 1
                print_line(self.line())

    def _draw(self, bar: Any) -> None:
        bar.n, bar.total = self.done + self.at_hand, self.total
        bar.last_print_n = min(bar.last_print_n, bar.n)  # tqdm draws no bar that goes back, as where a worker was lost.
        bar.set_postfix_str(self.status, refresh=False)
        bar.update(0)

    def _amount(self, number: float | None) -> str:
        number = number or 0
        return str(tqdm.format_sizeof(number, "B")) if self.unit == "B" else f"{number:,.0f}"

    def _rate(self, rate: float) -> str:
        if self.unit == "B":
            return str(tqdm.format_sizeof(rate, "B"))
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{shown} {self.unit if shown != '1' else noun(1, self.unit)}"
