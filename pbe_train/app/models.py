"""Which models an app offers: those that it was given, or what lies about here.

Nothing is loaded: the painting process does that when somebody wants one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pbe_core.errors import InputError

FINISHED = "tiny_world/weights/model"
"""The finished tiny model: looked for here, and then where this package is."""
FINISHED_NOTE = (
    "Knows its own small drawn world alone: into a real photo it paints soft blots in the reference's colours. "
    "A model for real photos is given with pbe app --model."
)


class Choice(NamedTuple):
    """A model that one may choose."""

    id: str
    """Of letters, digits and hyphens; the only part of it that a browser may send."""
    name: str
    source: str
    """Folder, file or hub id, as `PaintByExample.from_pretrained` takes it."""
    given: bool = True
    """Whether somebody named it; otherwise it was found."""

    @property
    def note(self) -> str:
        """What people should know before they judge by what it paints."""
        return FINISHED_NOTE if Path(self.source).parts[-3:] == Path(FINISHED).parts else ""


Facts = dict[str, Any]
GONE = "a file of this edit is gone from the server's folder for temporary files, which somebody has emptied"


def find_models(given: Sequence[str]) -> list[Choice]:
    """The models to offer, the first one the default.

    Args:
        given: `NAME=SOURCE` or a source each; where there is none, runs/* with a checkpoint and the finished tiny model.

    Raises:
        InputError: two of the same name.
    """
    pairs = [split_name(each) for each in given] or [
        ("tiny world", FINISHED),
        *((run.name, str(run)) for run in find_runs(Path("runs"))),
    ]
    choices: list[Choice] = []
    for name, source in pairs:
        if any(name == choice.name for choice in choices):
            raise InputError(f"--model {name}={source}: there is a model of this name already; give another name")
        base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"
        taken = {choice.id for choice in choices}
        id = next(id for id in (base, *(f"{base}-{number}" for number in range(2, len(pairs) + 2))) if id not in taken)
        choices.append(Choice(id, name, source, bool(given)))
    return choices


def split_name(given: str) -> tuple[str, str]:
    """`NAME=SOURCE`, or a source alone, which is called by its last part."""
    name, equals, source = given.partition("=")
    if Path(given).expanduser().exists():
        name, source = "", given
    if equals and name and source:
        return name, source
    return Path(given).name or given, given


def find_runs(folder: Path) -> list[Path]:
    """Runs in a folder that hold a checkpoint, newest first."""
    found = [run for run in folder.glob("*") if any((run / "checkpoints").glob("step-*/state.json"))]
    return sorted(found, key=lambda run: -run.stat().st_mtime)
