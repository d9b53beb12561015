"""Errors that are the user's to mend: one sentence with the cause and the way out, and no traceback."""

import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

INTERRUPTED = "interrupted: what was finished is kept, and the same command goes on from there"
_SECONDS_APART = 5.0
# Each file in these folders with a `__main__` part is an entry, which calls `run_program`.
ENTRIES = tuple(Path(__file__).resolve().parents[1] / name for name in ("pipelines", "pbe_train"))


class InputError(Exception):
    """Something outside the program is wrong: a file, a setting, a checkpoint.

    The message names the file (and row or key) and says what to do about it, on one line.
    """


class Terminated(KeyboardInterrupt):
    """A SIGTERM, by which batch systems and clouds say that they take the machine away."""


class NetworkError(OSError):
    """What lies behind a URL cannot be reached, read or written. The message names the URL and the cause, on one line."""


def machine_error(error: OSError) -> str | None:
    """A full or read-only disk, or a network that fails, in words, with its place where known; null for what may be a defect."""
    if isinstance(error, NetworkError | ConnectionError | TimeoutError):
        return str(error).partition("\n")[0] or type(error).__name__
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return None
    # Not the file's name: temporary ones differ with each attempt.
    place = f": {Path(error.filename).parent}" if isinstance(error.filename, str) else ""
    return f"{os.strerror(error.errno)}{place}"


def run_program(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit with its status; an `InputError` is one line and status 2, a full disk or no network status 1.

    Where nobody reads on in the pipe that it prints into (`... | head`), it ends without a word, with status 141, as others do.
    Anything else is a defect of ours and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) is _end_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            status = main()
        except SystemExit:  # After --help.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread(1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # At its end Python prints again what could not be printed.
            status = 141  # 128 + SIGPIPE.
        elif said := machine_error(error):
            print(
                f"error: {said}; what was finished is kept: mend that, and the same command goes on from there", file=sys.stderr
            )
            status = 1
        else:
            raise
    except KeyboardInterrupt as stop:
        print(INTERRUPTED, file=sys.stderr)
        status = 143 if isinstance(stop, Terminated) else 130
    sys.exit(status or 0)


def end_on_interrupt() -> None:
    """While an entry's imports load, which takes seconds, Ctrl-C ends it with one line; from `run_program` on that one does.

    Called when `pbe_core` is imported, which each entry does first. Without effect in any other program that imports it.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program and Path(program).resolve().parent in ENTRIES and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_now)


def heed_sigterm() -> None:
    """From now on SIGTERM ends a program as Ctrl-C does, with status 143, if this is called in its main thread.

    For a program that has started Ray, which would end it by an abort, with a page of addresses. The same stop may arrive more
    than once, from who signals every process of a job and from a launcher that hands it on: on its way out it disturbs nothing.
    """
    came: list[float] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        if not came or time.monotonic() - came[-1] > _SECONDS_APART:
            came.append(time.monotonic())
            raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


def _end_now(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


def _is_unread(descriptor: int) -> bool:
    """Whether a descriptor is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
