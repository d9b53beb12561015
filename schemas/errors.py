"""Errors that are the user's to mend: one sentence with the cause and the way out, and no traceback."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Something outside the program is wrong: a file, a setting, a checkpoint.

    The message names the file (and row or key) and says what to do about it, on one line.
    """


def run_program(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit with its status; an `InputError` becomes one line on stderr and status 2.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        status = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, and the same command goes on from there", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.exit(status or 0)
