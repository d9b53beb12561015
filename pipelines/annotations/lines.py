"""One CSV or JSON Lines file, line by line: what is wrong with a line is a value, what is wrong with the file an error."""

import codecs
import csv
import functools
import gzip
import itertools
import json
import math
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.words import noun
from pipelines.annotations.column_names import COLUMNS, CORNERS, REQUIRED, columns_of, header_for, problem_of
from pipelines.annotations.rows import RowProblem, is_text
from pipelines.config import SPLITS

# Rows that are looked at before anything else, for columns and unit.
HEAD_ROWS = 1000
_NAMES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
# Rounding makes fractions of a little more than 1; boxes that end before 1.5 px are none.
_LARGEST_FRACTION = 1.5
# pandas makes floats of whole numbers where a cell of their column is empty.
_FLOAT_OF_WHOLE = re.compile(r"-?\d+\.0")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file, as values by column."""

    number: int  # Of the line in the file, from 1; lines with nothing in them count.
    values: Mapping[str | None, Any]  # By column, under None what is not read; null where nothing is given.
    problem: str | None = None  # Why it cannot be read.


@dataclass(frozen=True)
class Head:
    """What a look at the beginning of a file tells."""

    columns: Sequence[str | None]
    """Of a CSV, one for each cell, null where it is not read; of JSON Lines, those that are in use."""
    lines: list[Line]
    """The first rows."""
    note: str | None
    """Which names of columns mean what, where they are not ours."""


def read_head(path: Path) -> Head:
    """The columns, and the first rows.

    Raises:
        InputError: there is no such file, it is none of ours, or there is nothing in it.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; set build.source.annotations to your CSV or JSON Lines file (docs/own-data.md)")
    if not path.name.endswith(_NAMES):
        raise InputError(f"{path}: its name must end in one of {', '.join(_NAMES)}{_kind_hint(path)}; see docs/own-data.md")
    number, first = next(_raw_lines(path), (0, b""))
    if not first:
        raise InputError(f"{path}: this file is empty; see docs/own-data.md for what belongs in it")
    if not first.strip(b"\0\r\n"):
        raise InputError(f"{path}: this file holds nothing but zero bytes; get it again")
    if b"\0" in first:
        raise InputError(f"{path}, line {number}: this is no UTF-8 text (UTF-16?); save the file as UTF-8")
    return _json_head(path, number, first) if is_json(path) else _csv_head(path, number, first)


def _check_not_empty(path: Path, lines: Sequence[Line]) -> None:
    """An empty cell among others is a problem of its row; a table without any other is no table.

    Raises:
        InputError: no line has anything in any cell.
    """
    if not any(line.problem or any(value not in (None, "") for value in line.values.values()) for line in lines):
        which = "the first " if len(lines) == HEAD_ROWS else ""
        raise InputError(f"{path}: all cells of {which}{len(lines):,} {noun(len(lines), 'rows')} are empty; get the file again")


def _kind_hint(path: Path) -> str:
    if ".json" not in path.name:
        return ""
    return (
        " (JSON Lines: an object on each line, no list around them; annotations in COCO's format are read with source.kind: coco)"
    )


def _csv_head(path: Path, number: int, data: bytes) -> Head:
    where = f"{path}, line {number}"
    example = ",".join(REQUIRED)
    try:
        text = data.decode()
        cells = [cell.strip() for cell in next(csv.reader([text], strict=True, skipinitialspace=True))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: the header cannot be read ({error}); save the file as CSV in UTF-8") from None
    found = columns_of(tuple(cells))
    if not set(CORNERS) & set(found.columns):
        if len(cells) == 1 and (";" in text or "\t" in text):
            raise InputError(f"{where}: columns are not divided by commas; save the file as CSV with commas: {example}")
        header = header_for(cells, [number_of(cell) is not None for cell in cells])
        if header:
            raise InputError(f"{where}: a header is missing; {header}")
    if problem := problem_of(found):
        raise InputError(f"{where}: {problem}")
    lines = list(itertools.islice(read_lines(path, found.columns), HEAD_ROWS))
    if not lines:
        raise InputError(f"{path}: no row below the header; add a line for each box")
    _check_not_empty(path, lines)
    return Head(found.columns, lines, found.note)


def _json_head(path: Path, number: int, data: bytes) -> Head:
    if data.lstrip().startswith(b"["):
        raise InputError(
            f"{path}, line {number}: a JSON list; write one object on each line, with no list around them (jq -c '.[]')"
        )
    objects = list(itertools.islice(_objects(path), HEAD_ROWS))
    if all(line.problem for line in objects):
        raise InputError(
            f"{path}, line {objects[0].number}: {objects[0].problem}; write one object with {', '.join(REQUIRED)} on each line"
        )
    _check_not_empty(path, objects)
    found = columns_of(tuple(dict.fromkeys(str(key) for line in objects for key in line.values)))
    # Not the first wrong key alone: all of them, in one message.
    if problem := problem_of(found):
        wrong = {*found.unknown, *itertools.chain.from_iterable(found.twice.values())}
        first = next((line.number for line in objects if wrong & line.values.keys()), objects[0].number)
        raise InputError(f"{path}, line {first}: {problem}")
    lines = list(itertools.islice(read_lines(path, COLUMNS), HEAD_ROWS))
    columns = [name for name in COLUMNS if any(line.values.get(name) is not None for line in lines)]
    return Head(columns, lines, found.note)


def check_unit(path: Path, unit: str, head: Sequence[Line]) -> None:
    """Compare the declared unit with the first rows.

    Raises:
        InputError: they look like the other one.
    """
    corners = ([number_of(line.values.get(name)) for name in CORNERS] for line in head)
    numbers = [[value for value in row if value is not None] for row in corners]
    largest = [max(row) for row in numbers if len(row) == len(CORNERS)]
    first = f"{len(largest):,} {noun(len(largest), 'rows')}"
    beyond = sum(value > _LARGEST_FRACTION for value in largest)
    if unit == "fraction" and 2 * beyond > len(largest):
        raise InputError(
            f"{path}: of the first {first} {beyond:,} {'has' if beyond == 1 else 'have'} a coordinate above {_LARGEST_FRACTION}: "
            f"the file seems to be in pixels; set source.unit: pixel"
        )
    if unit == "pixel" and largest and not beyond:
        raise InputError(
            f"{path}: no coordinate of the first {first} is above {_LARGEST_FRACTION}: "
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


def read_lines(path: Path, columns: Sequence[str | None]) -> Iterator[Line]:
    """The lines below the header; one that cannot be read has a `problem`.

    Args:
        path: of the file.
        columns: of its head.

    Raises:
        InputError: the file is damaged, or ends in the middle of a line, or a JSON object has a key that is no column.
    """
    if not is_json(path):
        yield from _whole(path, lambda number, text: _csv_line(number, text, columns))
        return
    for line in _objects(path):
        yield _by_column(path, line, columns)


def _objects(path: Path) -> Iterator[Line]:
    """The lines of a JSON Lines file, their values by the keys as they stand."""
    return _whole(path, _json_line)


def _whole(path: Path, parse: Callable[[int, str], Line]) -> Iterator[Line]:
    """The lines below the header, parsed.

    Raises:
        InputError: the file is damaged, or ends in the middle of a line.
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
        line = parse(number, text)
        if line.problem and whole and not data.endswith(b"\n"):
            raise InputError(
                f"{path}, line {number}: {line.problem}, and the file ends there without a line break: it seems to be cut off; "
                f"get it again"
            )
        whole += line.problem is None
        yield line


def _csv_line(number: int, text: str, columns: Sequence[str | None]) -> Line:
    # Each line by itself: a stray quote costs its line, and does not swallow those below it.
    try:
        cells = next(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:
        return Line(number, {}, f"not CSV ({error}): quotes in a cell are doubled, and no cell holds a line break")
    if len(cells) != len(columns):
        return Line(number, {}, f"{len(cells)} {noun(len(cells), 'cells')}, the header has {len(columns)}")
    return Line(number, {column: cell.strip() for column, cell in zip(columns, cells, strict=True)})


def _json_line(number: int, text: str) -> Line:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return Line(number, {}, f"not JSON ({error.msg} at character {error.colno})")
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, thousands of brackets.
        return Line(number, {}, f"not JSON that can be read ({error})")
    if not isinstance(values, dict):
        return Line(number, {}, "no JSON object; write {...} on each line")
    return Line(number, {key: value.strip() if isinstance(value, str) else value for key, value in values.items()})


@functools.lru_cache(maxsize=1024)
def _meaning_of(keys: tuple[str, ...]) -> tuple[Sequence[str | None], str | None]:
    """What the keys of an object mean, and what is wrong with them: most lines have the same ones."""
    found = columns_of(keys)
    return found.columns, problem_of(found, complete=False)


def _by_column(path: Path, line: Line, columns: Sequence[str | None]) -> Line:
    """A line of JSON Lines, its values by column.

    Raises:
        InputError: a key that is no column; or the first that decides about all lines.
    """
    meant, problem = _meaning_of(tuple(line.values))
    if problem:
        raise InputError(f"{path}, line {line.number}: {problem}")
    values = dict(zip(meant, line.values.values(), strict=True))
    for name in ("label", "split"):
        if name not in columns and values.get(name) is not None:
            raise InputError(f"{path}, line {line.number}: the first `{name}`; give it on all lines from the first on")
    return Line(line.number, values, line.problem)


def text_of(line: Line, column: str) -> str | None:
    """A cell as text, without spaces around it; null where it is empty. Raises `RowProblem` for what is no text."""
    value = line.values.get(column)
    if value is None or value == "" or value != value:  # NaN is how pandas says that there is nothing.
        return None
    if type(value) is int:
        return str(value)
    if not is_text(value):
        raise RowProblem("bad_row", f", column {column}: {reprlib.repr(value)} is no text")
    return str(value)


def label_of(line: Line) -> str | None:
    """The label as text; null where it is empty. The number 2 is the label `2`, also where it was written as 2.0.

    Raises:
        RowProblem: it is neither text nor a number.
    """
    value = line.values.get("label")
    if type(value) is float and math.isfinite(value):
        value = str(value)
    if isinstance(value, str) and _FLOAT_OF_WHOLE.fullmatch(value):
        return value[:-2]
    return value if isinstance(value, str) and is_text(value) and value else text_of(line, "label")


def split_of(line: Line) -> str | None:
    """The split that a line names, in any case; null where it is empty. Raises `RowProblem` for what is no split."""
    split = text_of(line, "split")
    if split is None:
        return None
    word = split.casefold()
    word = {"val": "validation", "valid": "validation"}.get(word, word)
    if word not in SPLITS:
        raise RowProblem("bad_row", f", column split: {reprlib.repr(split)} is none of {', '.join(SPLITS)}")
    return word


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
