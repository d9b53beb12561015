"""Errors that are the user's to mend: one sentence with the cause and the way out, and no traceback."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(Exception):
    """Something outside the program is wrong: a file, a setting, a checkpoint.

    The message names the file (and row or key) and says what to do about it, on one line.
    """


def machine_error(error: OSError) -> str | None:
    """A full or read-only disk in words, with its folder where that is known; null for what may be a defect of ours."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return None
    # Not the file's name: temporary ones differ with each attempt.
    place = f": {Path(error.filename).parent}" if isinstance(error.filename, str) else ""
    return f"{os.strerror(error.errno)}{place}"


def run_program(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit with its status; an `InputError` becomes one line on stderr and status 2, a full disk status 1.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        status = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        if not (said := machine_error(error)):
            raise
        print(f"error: {said}; what was finished is kept: mend that, and the same command goes on from there", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, and the same command goes on from there", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.exit(status or 0)
