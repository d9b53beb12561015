"""Text files of any size, gzipped or not, line by line or as record batches: what is wrong with a row is a value, what is wrong
with the file an error.

    CSV ──Arrow, typed──▶ batches                     as long as every cell can be read as its column's type
     └───Python, line by line──▶ batches, problems    from the first batch on that holds one that cannot: 30 times slower

Rows are known by their lines in the file, empty lines included. Memory does not grow with the file.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.words import number_of

# A batch's memory is a few times this; larger blocks gain no speed.
_BLOCK_BYTES = 1 << 20
_BLOCK_LINES = 10_000
_HEAD_BYTES = 8 << 20
# A cell may hold an outline of thousands of points; Python's own limit is 131,072 characters.
csv.field_size_limit(1 << 24)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(?i:nan|inf|infinity)")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, as values by column."""

    number: int  # Of the line in the file, from 1; lines with nothing in them count.
    values: Mapping[Any, Any]  # By column, under None what is not read; null where nothing is given.
    problem: str | None = None  # Why it cannot be read.


@dataclass
class CsvRows:
    """A stretch of a file: rows that have the right number of cells, and what is wrong with single ones.

    `numbers` are the rows' lines less one, as the header is line 1; of a file that was read as `quoted`, where a row may take
    several lines, they count the rows below the header. Lines with nothing in them are no rows. `problems` maps a row to (column,
    what is wrong with it); the cell is null in `batch`. `broken` are rows that are not in `batch` at all.
    """

    batch: pa.RecordBatch
    numbers: np.ndarray
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)


def check_header(path: Path, required: Sequence[str], what: str) -> list[str]:
    """The header, if it has the required columns.

    Args:
        path: the CSV.
        required: names that must be there.
        what: what a message calls such a file.

    Raises:
        InputError: a column is missing, or a name is there twice.
    """
    present = read_header(path)
    if missing := [name for name in required if name not in present]:
        raise InputError(
            f"{path}, line 1: column {', '.join(missing)} is missing (found: {', '.join(present)[:120]}); expected {what} with "
            f"{', '.join(required)}, divided by commas"
        )
    if twice := [name for name in dict.fromkeys(present) if name and present.count(name) > 1]:
        raise InputError(f"{path}, line 1: column {', '.join(twice)} is there twice; take one of them away")
    return present


def read_header(path: Path) -> list[str]:
    """The column names in a CSV's first line; a byte order mark, quotes and spaces are taken off.

    Raises:
        InputError: the file is empty, is not UTF-8, or is a gzip that is cut off.
    """
    number, data = next(raw_lines(path), (1, b""))
    try:
        text = data.decode().strip() if number == 1 else ""
    except UnicodeDecodeError:
        raise InputError(f"{path}, line 1: this is no UTF-8 text (UTF-16?); save the file as UTF-8") from None
    if not text:
        raise InputError(f"{path}: the first line is empty")
    return [name.strip().strip('"') for name in text.split(",")]


def stream_csv(path: Path, columns: Mapping[str, pa.DataType], *, quoted: bool = False) -> Iterator[CsvRows]:
    """Stream some columns of a CSV.

    Args:
        path: the file; gzip if its name ends in .gz.
        columns: those wanted, with their types: string, `WORD` or float64. Spaces around cells are taken off; empty cells become
            null.
        quoted: whether a cell in quotes may hold commas and line breaks, as titles do; such a file must be sound as a whole. If
            not, a line is a row and nothing else: a stray quote then cannot swallow the rows behind it, and quotes around text
            are taken off.

    Raises:
        InputError: the file is cut off in the middle, or cannot be read at all.
    """
    convert = pa_csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict(columns),
        strings_can_be_null=True,
        null_values=[""],  # Arrow's own list has "NA" and "null", which are people's names too.
    )
    # The names that we read, not those that Arrow would: without quotes and spaces around them.
    read = pa_csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=read_header(path), skip_rows=1)
    # A line with nothing in it must count where lines are counted: Arrow then makes a row of empty cells of it.
    parse = pa_csv.ParseOptions(newlines_in_values=quoted, ignore_empty_lines=quoted, quote_char='"' if quoted else False)
    done = 0
    try:
        with (
            pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as file,
            pa_csv.open_csv(file, read, parse, convert) as reader,
        ):
            for batch in reader:
                trimmed = _trimmed(batch, quoted)
                if not quoted and _has_empty_row(trimmed):
                    break
                yield CsvRows(trimmed, np.arange(done + 1, done + 1 + len(batch)))
                done += len(batch)
            else:
                return
    except pa.ArrowInvalid as error:
        if quoted:
            raise InputError(f"{path}, after row {done} below the header: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise _cut_off(path, done + 1, error) from None
    # All lines until here are rows, so their numbers are their places.
    yield from _line_by_line(path, columns, after=done + 1)


def parsed_lines(path: Path, parse: Callable[[int, str], Line], after: int = 0) -> Iterator[Line]:
    """The lines that have something in them, each parsed by itself; one that cannot be read has a `problem`.

    Args:
        path: of the file.
        parse: a line's number and text, without its end -> the line.
        after: so many lines are left out.

    Raises:
        InputError: the file is damaged, ends in the middle of a line, or has empty cells alone.
    """
    whole = filled = after > 1
    empty = 0
    for number, data in raw_lines(path):
        if number <= after:
            continue
        try:
            line = parse(number, data.decode().strip("\r\n"))
        except UnicodeDecodeError as error:
            line = Line(number, {}, f"no UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8")
        if line.problem and whole and not data.endswith(b"\n"):
            raise InputError(f"{path}, line {number}: {line.problem}, and the file ends there: it was cut off; get it again")
        whole |= line.problem is None
        filled = filled or line.problem is not None or any(value not in (None, "") for value in line.values.values())
        empty += not filled
        yield line
    if empty and not filled:
        raise InputError(f"{path}: all cells of {number_of(empty, 'row')} are empty; get the file again")


def csv_line(columns: Sequence[str | None], number: int, text: str) -> Line:
    """A line of a CSV as values by column; null in `columns` for what is not read."""
    # Each line by itself: a stray quote costs its line, and does not swallow those below it.
    try:
        cells = next(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:
        return Line(number, {}, f"not CSV ({error}): quotes in a cell are doubled, and no cell holds a line break")
    if len(cells) != len(columns):
        return Line(number, {}, f"{number_of(len(cells), 'cell')}, the header has {len(columns)}")
    return Line(number, {column: cell.strip() for column, cell in zip(columns, cells, strict=True)})


def json_line(number: int, text: str) -> Line:
    """An object of JSON Lines as values by key; spaces around text are taken off."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # Also a number of thousands of digits, thousands of brackets.
        return Line(number, {}, f"not JSON that can be read ({error})")
    if not isinstance(values, dict):
        return Line(number, {}, "no JSON object")
    return Line(number, {key: value.strip() if isinstance(value, str) else value for key, value in values.items()})


def parquet_columns(path: Path) -> tuple[str, ...]:
    """The names of a Parquet file's columns. Raises InputError: it is none."""
    try:
        return tuple(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: no Parquet file that can be read ({' '.join(str(error).split())[:120]})") from None


def parquet_lines(path: Path, columns: Sequence[str | None]) -> Iterator[Line]:
    """The rows of a Parquet file as values by column, numbered from 1; spaces around text are taken off.

    Args:
        path: of the file.
        columns: what each of its columns means; null for what is not read.

    Raises:
        InputError: the file is damaged.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name, column in zip(file.schema_arrow.names, columns, strict=True) if column]
            meant = [column for column in columns if column]
            for batch in file.iter_batches(_BLOCK_LINES, columns=names):
                for cells in zip(*(batch[name].to_pylist() for name in names), strict=True):
                    number += 1
                    values = (cell.strip() if isinstance(cell, str) else cell for cell in cells)
                    yield Line(number, dict(zip(meant, values, strict=True)))
    except (OSError, pa.ArrowException) as error:
        raise _cut_off(path, number, error) from None


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that have something in them, each with its number; a byte order mark is taken off.

    Raises:
        InputError: the file is damaged.
    """
    number = 0
    try:
        with _open_bytes(path) as file:
            for number, data in enumerate(file, start=1):
                line = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError.
        raise _cut_off(path, number, error) from None


def count_rows(path: Path) -> int:
    """About how many rows a file has, from its size and its first megabytes."""
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            lines = file.read(_HEAD_BYTES).count(b"\n")
            return round(lines * path.stat().st_size / max(1, raw.tell()))
    except (EOFError, zlib.error, OSError) as error:
        raise _cut_off(path, 0, error) from None


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _cut_off(path: Path, line: int, error: Exception) -> InputError:
    return InputError(f"{path}, after line {line}: the file is damaged or cut off ({error}); get it again")


def _has_empty_row(batch: pa.RecordBatch) -> bool:
    """Whether a row has nothing in it: a line of commas, or no row at all."""
    if any(column.null_count == 0 for column in batch.columns):
        return False
    return bool(np.logical_and.reduce([column.is_null().to_numpy(zero_copy_only=False) for column in batch.columns]).any())


def _trimmed(batch: pa.RecordBatch, quoted: bool) -> pa.RecordBatch:
    """Text without the spaces around it and, where Arrow has not taken them off, the quotes."""
    arrays = []
    for column in batch.columns:
        words = column.dictionary if pa.types.is_dictionary(column.type) else column
        if pa.types.is_string(words.type) and _may_need_trimming(words):
            words = pc.utf8_trim_whitespace(words)
            if not quoted:
                words = pc.utf8_trim_whitespace(pc.utf8_trim(words, '"'))
            words = pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)
            column = words.take(column.indices).dictionary_encode() if pa.types.is_dictionary(column.type) else words
        arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _may_need_trimming(text: pa.Array) -> bool:
    """Whether there is a space or a quote anywhere: a look at the bytes, which is many times faster than trimming."""
    letters = np.frombuffer(text.buffers()[2] or b"", np.uint8)
    return bool((letters <= ord('"')).any())


def _line_by_line(path: Path, columns: Mapping[str, pa.DataType], after: int) -> Iterator[CsvRows]:
    header = read_header(path)
    places = {name: header.index(name) for name in columns}

    def parse(number: int, text: str) -> Line:
        cells = text.split(",")
        if len(cells) != len(header):
            return Line(number, {}, f"{number_of(len(cells), 'cell')}, the header has {len(header)}")
        return Line(number, {name: cells[place].strip().strip('"').strip() or None for name, place in places.items()})

    lines = parsed_lines(path, parse, after)
    while block := list(islice(lines, _BLOCK_LINES)):
        problems: dict[int, tuple[str, str]] = {}
        sound = [line for line in block if not line.problem]
        arrays = []
        for name, kind in columns.items():
            cells = [line.values[name] for line in sound]
            if pa.types.is_floating(kind):
                for place, cell in enumerate(cells):
                    if cell is not None and not _NUMBER.fullmatch(cell):
                        problems.setdefault(sound[place].number - 1, (name, f"{name} is {cell[:40]!r}, not a number"))
                        cells[place] = None
                cells = [cell and float(cell) for cell in cells]
            arrays.append(pa.array(cells, kind))
        batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
        broken = {line.number - 1: line.problem for line in block if line.problem}
        yield CsvRows(batch, np.array([line.number - 1 for line in sound], np.int64), problems, broken)
