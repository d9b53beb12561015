"""What the readers share that go through their files row by row in Python: problems of a row, batches, names of photos' files."""

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa

from schemas.tables import FLAGS

BATCH_ROWS = 20_000
# Sources other than Open Images say nothing about most flags, and an unknown is not a zero.
UNKNOWN_FLAGS = dict.fromkeys(FLAGS, -1)


class RowProblem(Exception):
    """What is wrong with a row by itself. `reason` is a key of `schemas.tables.REJECT_REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def in_batches(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows -> record batches of at most `BATCH_ROWS`; a column that a row does not name is null there."""
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH_ROWS)):
        columns = [pa.array([row.get(field.name) for row in batch], field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def clip_overshoot(low: float, high: float, end: float, slack: float) -> tuple[float, float]:
    """An interval that may reach beyond [0, end] by `slack` on each side, by rounding, cut to it; what is farther out stays."""
    if -slack <= low < 0:
        low = 0.0
    if end < high <= end + slack:
        high = float(end)
    return low, high


def is_text(value: Any) -> bool:
    """Whether this is text that a table can hold: JSON may name halves of surrogate pairs, which are no characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_name_problem(name: Any) -> str | None:
    """Why this cannot be a file's path below the photo folder; null if it can.

    Annotations come from strangers: a name must not lead out of the folder.
    """
    if not is_text(name) or not name:
        return "is empty or no text"
    if "\\" in name:
        return "has a backslash; write / between folders"
    if "\0" in name:
        return "has a NUL character"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "is absolute; write it relative to the photo folder"
    parts = name.split("/")
    if ".." in parts or all(part in ("", ".") for part in parts):
        return "leads out of the photo folder"
    return None


def shown(value: Any) -> str:
    """A value for a message, however long or deep it is."""
    return reprlib.repr(value)
