"""What Ctrl-C does to a crawl."""

import contextlib
import os
import signal
import sys
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether a person, or the machine, wants the crawl to end: Ctrl-C, SIGTERM, a closed terminal. A context manager.

    While photos are in flight (`gently`) it is noted, and the crawl ends in good order. Else, and the second time, it raises
    `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.gently = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = {number: old for number, old in handlers.items() if old != signal.SIG_IGN}  # nohup ignores SIGHUP.
        # What a handler raises gets lost where Python runs it within a callback, as when it forks; here it leaves a byte.
        self._arrived, self._arrives = os.pipe()
        for end in (self._arrived, self._arrives):
            os.set_blocking(end, False)
        self._woken_before = signal.set_wakeup_fd(self._arrives, warn_on_full_buffer=False)
        # Of what got lost Python prints a traceback, which tells nobody anything. While it starts, Ray's own handler is there.
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._tell_unraisable
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        sys.unraisablehook = self._unraisable_before
        os.close(self._arrived)
        os.close(self._arrives)

    def _tell_unraisable(self, unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, (KeyboardInterrupt, SystemExit)):
            self._unraisable_before(unraisable)

    def listen(self) -> None:
        """Hear signals, also where somebody else has put a handler meanwhile, and what that one may have lost."""
        for number in self._before:
            signal.signal(number, self._hear)
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._arrived, 100):
                if number in self._before:
                    self._hear(number, None)

    def _hear(self, number: int, _: Any) -> None:
        again, self.signal = self.signal, self.signal or number
        if again or not self.gently:
            raise KeyboardInterrupt
        print("\nstopping: keeping what has come (once more to stop at once)", file=sys.stderr, flush=True)
