"""Loaded by every Python process of a run whose PYTHONPATH leads here: notes each rename in a folder, and dies at one of them.

Renames are where a file that was written beside takes its name: just before, its temporary file is whole, and of no use. The
process kills itself there, with SIGKILL, so no program needs to know of it. Python's audit events tell of renames.

    PBE_RENAMED_IN  the folder whose renames count
    PBE_RENAMES     a folder: `seen` gets a line for each; the first process that comes to a place that a file in `due` holds
                    moves that file to `died`, adds its pid to it, and dies
"""

import contextlib
import os
import re
import signal
import sys

_ROOT, _NOTES = os.environ.get("PBE_RENAMED_IN", ""), os.environ.get("PBE_RENAMES", "")


def place_of(path: str) -> str:
    """A name for what is renamed, without what differs between two of a kind: `shards/train-N.tar`."""
    return re.sub(r"\d+", "N", re.sub(r"[0-9a-f]{12,}", "HEX", os.path.relpath(path, _ROOT)))


def _on_event(event: str, arguments: tuple[object, ...]) -> None:
    if event != "os.rename" or not isinstance(arguments[1], str | os.PathLike):
        return
    path = os.path.abspath(os.fspath(arguments[1]))
    if not path.startswith(f"{_ROOT}/"):
        return
    place = place_of(path)
    with open(f"{_NOTES}/seen", "a") as file:
        file.write(f"{place}\n")
    for name in sorted(os.listdir(f"{_NOTES}/due")):
        with contextlib.suppress(FileNotFoundError):
            with open(f"{_NOTES}/due/{name}") as file:
                if file.read() != place:
                    continue
            os.rename(f"{_NOTES}/due/{name}", f"{_NOTES}/died/{name}")  # Of two that come at once, one finds it.
            with open(f"{_NOTES}/died/{name}", "a") as file:
                file.write(f"\n{os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)


if _ROOT and _NOTES:
    sys.addaudithook(_on_event)
