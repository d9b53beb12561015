"""One CSV or JSON Lines file, line by line: what is wrong with a line is a value, what is wrong with the file an error."""

import codecs
import csv
import difflib
import gzip
import itertools
import json
import math
import re
import reprlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.annotations.rows import RowProblem, is_text
from schemas.errors import InputError

CORNERS = ("x_min", "y_min", "x_max", "y_max")
REQUIRED = ("photo", *CORNERS)
OPTIONAL = ("label", "split", "width", "height", "url", "author", "licence")
COLUMNS = (*REQUIRED, *OPTIONAL)
# Rows that are looked at before anything else, for columns and unit.
HEAD_ROWS = 1000
_NAMES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
# Rounding makes fractions of a little more than 1; boxes that end before 1.5 px are none.
_LARGEST_FRACTION = 1.5


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file, as values by column."""

    number: int  # Of the line in the file, from 1.
    values: dict[str, Any]  # By column; null where nothing is given.
    problem: str | None = None  # Why it cannot be read.


def read_head(path: Path) -> tuple[Sequence[str], list[Line]]:
    """The columns, and the first rows."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; set build.source.annotations to your CSV or JSON Lines file (docs/own-data.md)")
    if not path.name.endswith(_NAMES):
        hint = " (JSON Lines: an object on each line, no list around them)" if ".json" in path.name else ""
        raise InputError(f"{path}: its name must end in one of {', '.join(_NAMES)}{hint}; see docs/own-data.md")
    _, first = next(_raw_lines(path), (0, b""))
    if not first:
        raise InputError(f"{path}: this file is empty; see docs/own-data.md for what belongs in it")
    if b"\0" in first:
        raise InputError(f"{path}, line 1: this is no UTF-8 text (UTF-16?); save the file as UTF-8")
    if not is_json(path):
        columns: Sequence[str] = _header(path, first)
        head = list(itertools.islice(read_lines(path, columns), HEAD_ROWS))
        if not head:
            raise InputError(f"{path}: no row below the header; add a line for each box")
        return columns, head
    if first.lstrip().startswith(b"["):
        raise InputError(f"{path}, line 1: a JSON list; write one object on each line, with no list around them (jq -c '.[]')")
    head = list(itertools.islice(read_lines(path, COLUMNS), HEAD_ROWS))
    if all(line.problem for line in head):
        raise InputError(
            f"{path}, line {head[0].number}: {head[0].problem}; write one object with {', '.join(REQUIRED)} on each line"
        )
    columns = [name for name in COLUMNS if any(line.values.get(name) is not None for line in head)]
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise InputError(f"{path}: no line has the key {', '.join(missing)}; each needs {', '.join(REQUIRED)} (docs/own-data.md)")
    return columns, head


def _header(path: Path, data: bytes) -> list[str]:
    where = f"{path}, line 1"
    example = ",".join(REQUIRED)
    try:
        text = data.decode()
        names = [name.strip() for name in next(csv.reader([text], strict=True))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: the header cannot be read ({error}); save the file as CSV in UTF-8") from None
    if not set(names) & set(COLUMNS):
        if any(number_of(name) is not None for name in names):
            raise InputError(f"{where}: a header is missing; put the names of the columns there: {example}")
        if len(names) == 1 and (";" in text or "\t" in text):
            raise InputError(f"{where}: columns are not divided by commas; save the file as CSV with commas: {example}")
    for name in names:
        if name not in COLUMNS:
            raise InputError(f"{where}: {_no_such(name)}")
        if names.count(name) > 1:
            raise InputError(f"{where}: column `{name}` is there twice; take one of them out")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise InputError(
            f"{where}: column {', '.join(missing)} is missing (found: {', '.join(names)}); at least {example} are needed"
        )
    if ("width" in names) != ("height" in names):
        raise InputError(f"{where}: of width and height only one is there; give both or none")
    return names


def _no_such(name: str) -> str:
    close = difflib.get_close_matches(name.casefold(), COLUMNS, n=1, cutoff=0.6)
    hint = f" (did you mean `{close[0]}`?)" if close else ""
    return f"no column is called {name[:40]!r}{hint}; rename it or take it out: columns are {', '.join(COLUMNS)}"


def check_unit(path: Path, unit: str, head: Sequence[Line]) -> None:
    """Compare the declared unit with the first rows.

    Raises:
        InputError: they look like the other one.
    """
    corners = ([number_of(line.values.get(name)) for name in CORNERS] for line in head)
    numbers = [[value for value in row if value is not None] for row in corners]
    largest = [max(row) for row in numbers if len(row) == len(CORNERS)]
    beyond = sum(value > _LARGEST_FRACTION for value in largest)
    if unit == "fraction" and 2 * beyond > len(largest):
        raise InputError(
            f"{path}: of the first {len(largest):,} rows {beyond:,} have a coordinate above {_LARGEST_FRACTION}: "
            f"the file seems to be in pixels; set source.unit: pixel"
        )
    if unit == "pixel" and largest and not beyond:
        raise InputError(
            f"{path}: no coordinate of the first {len(largest):,} rows is above {_LARGEST_FRACTION}: "
            f"the file seems to be in fractions of the photo; set source.unit: fraction"
        )


def is_json(path: Path) -> bool:
    """Whether the file's name says JSON Lines; else it is CSV."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, each with its number."""
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if data.strip():
                    yield number, data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
    except (EOFError, zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError.
        raise InputError(
            f"{path}, after line {number}: cannot be read ({error}); it is damaged or cut off: get it again"
        ) from None


def read_lines(path: Path, columns: Sequence[str]) -> Iterator[Line]:
    """The lines below the header; one that cannot be read has a `problem`.

    Raises:
        InputError: the file is damaged, or ends in the middle of a line, or a JSON object has a key that is no column.
    """
    lines = _raw_lines(path)
    if not is_json(path):
        next(lines, None)
    whole = 0
    for number, data in lines:
        try:
            text = data.decode().strip("\r\n")
        except UnicodeDecodeError as error:
            yield Line(number, {}, f"no UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8")
            continue
        line = _json_line(path, number, text, columns) if is_json(path) else _csv_line(number, text, columns)
        if line.problem and whole and not data.endswith(b"\n"):
            raise InputError(
                f"{path}, line {number}: {line.problem}, and the file ends there without a line break: it seems to be cut off; "
                f"get it again"
            )
        whole += line.problem is None
        yield line


def _csv_line(number: int, text: str, columns: Sequence[str]) -> Line:
    # Each line by itself: a stray quote costs its line, and does not swallow those below it.
    try:
        cells = next(csv.reader([text], strict=True))
    except csv.Error as error:
        return Line(number, {}, f"not CSV ({error}): quotes in a cell are doubled, and no cell holds a line break")
    if len(cells) != len(columns):
        return Line(number, {}, f"{len(cells)} cells, the header has {len(columns)}")
    return Line(number, dict(zip(columns, cells, strict=True)))


def _json_line(path: Path, number: int, text: str, columns: Sequence[str]) -> Line:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return Line(number, {}, f"not JSON ({error.msg} at character {error.colno})")
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, thousands of brackets.
        return Line(number, {}, f"not JSON that can be read ({error})")
    if not isinstance(values, dict):
        return Line(number, {}, "no JSON object; write {...} on each line")
    for name, value in values.items():
        if name not in COLUMNS:
            raise InputError(f"{path}, line {number}: {_no_such(name)}")
        if name in ("label", "split") and name not in columns and value is not None:
            raise InputError(f"{path}, line {number}: the first `{name}`; give it on all lines from the first on")
    return Line(number, values)


def text_of(line: Line, column: str) -> str | None:
    """A cell as text; null where it is empty. Raises `RowProblem` for what is no text."""
    value = line.values.get(column)
    if value is None:
        return None
    if type(value) is int:
        return str(value)
    if not is_text(value):
        raise RowProblem("bad_row", f", column {column}: {reprlib.repr(value)} is no text")
    return value if value.strip() else None


def side_of(line: Line, column: str) -> int | None:
    """A photo's width or height in px; null where it is empty. Raises `RowProblem`."""
    value = line.values.get(column)
    if value is None or value == "":
        return None
    number = number_of(value)
    if number is None or not number.is_integer() or not 0 < number < 2**31:
        raise RowProblem("bad_row", f", column {column}: {reprlib.repr(value)} is no whole number of px above 0")
    return int(number)


def coordinate_of(line: Line, column: str) -> float:
    """An edge of a box. Raises `RowProblem` for what is no finite number."""
    value = line.values.get(column)
    number = number_of(value)
    if number is not None:
        return number
    if value is None or value == "":
        raise RowProblem("bad_number", f", column {column}: is empty")
    comma = " (write a decimal point, not a comma)" if isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value) else ""
    raise RowProblem("bad_number", f", column {column}: {reprlib.repr(value)} is not a finite number{comma}")


def number_of(value: Any) -> float | None:
    """A finite number, from text too; Python's own 1_000 is none."""
    if type(value) not in (str, int, float) or (type(value) is str and "_" in value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
