"""CSV files of any size as record batches, gzipped or not: what is wrong with a row is a value, what is wrong with the file an
error.

    file ──Arrow, typed──▶ batches           as long as every cell can be read as its column's type
      └────Arrow, as text──▶ batches, problems     from the first cell on that cannot: about three times slower

Rows are known by their lines in the file, empty lines included. Memory does not grow with the file.
"""

import contextlib
import functools
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pbe_core.errors import InputError
from pbe_core.words import number_of
from schemas.tables import WORD

# A batch's memory is a few times this; larger blocks gain no speed.
_BLOCK_BYTES = 1 << 20
_NUMBER = r"^\s*([+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(?i:nan|inf|infinity))\s*$"


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


def read_header(path: Path) -> list[str]:
    """The column names in a CSV's first line; a byte order mark and quotes are taken off.

    Raises:
        InputError: the file is empty, is not UTF-8, or is a gzip that is cut off.
    """
    try:
        with open_bytes(path) as file:
            line = file.readline(65536)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); get the file again") from None
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}, line 1: this file is UTF-16; save it as UTF-8")
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"{path}, line 1: this is no UTF-8 text; save it as UTF-8") from None
    if not text:
        raise InputError(f"{path}: the first line is empty")
    return [name.strip().strip('"') for name in text.split(",")]


def check_header(path: Path, required: Sequence[str], what: str, optional: Sequence[str] = ()) -> list[str]:
    """The header, if it has the required columns.

    Args:
        path: the CSV.
        required: names that must be there.
        what: what a message calls such a file.
        optional: names that may be missing, but not written otherwise.

    Raises:
        InputError: a column is missing, is there twice, or bears an optional name in another spelling.
    """
    present = read_header(path)
    if twice := [name for name in (*required, *optional) if present.count(name) > 1]:
        raise InputError(f"{path}, line 1: column {', '.join(twice)} is there twice; take one of them away")
    if missing := [name for name in required if name not in present]:
        raise InputError(
            f"{path}, line 1: column {', '.join(missing)} is missing (found: {', '.join(present)[:120]}); expected {what} with "
            f"{', '.join(required)}, divided by commas"
        )
    for name in present:
        meant = [right for right in optional if right != name and letters(right) == letters(name)]
        if meant:
            raise InputError(f"{path}, line 1: column {name} is not read under this name; call it {meant[0]}, or take it away")
    return present


def letters(name: str) -> str:
    """The letters and digits of a column's name, by which names are compared: `XMin`, `x_min` and `x-min` are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def stream_csv(path: Path, columns: Mapping[str, pa.DataType], *, quoted: bool = False) -> Iterator[CsvRows]:
    """Stream some columns of a CSV.

    Args:
        path: the file; gzip if its name ends in .gz.
        columns: those wanted, with their types: string, `WORD` or float64. Spaces around cells are taken off; empty cells become
            null.
        quoted: whether a cell in quotes may hold commas and line breaks, as titles do. If not, a line is a row and nothing
            else: a stray quote then cannot swallow the rows behind it, and quotes around text are taken off.

    Raises:
        InputError: the file is cut off in the middle, or cannot be read at all.
    """
    done = 0
    # A quoted file's empty lines are left out by Arrow; looking for them takes a pass over the file, and most have none.
    empty_lines = functools.cache(lambda: [] if quoted else _empty_lines(path))
    try:
        for batch in _typed(path, columns, quoted):
            yield _without_empty_lines(CsvRows(batch, np.arange(done + 1, done + 1 + len(batch))), empty_lines)
            done += len(batch)
    except pa.ArrowInvalid:
        # Some cell cannot be read. All lines until here were rows or empty, so their numbers are their places.
        for rows in _as_text(path, columns, quoted, skip=done):
            yield _without_empty_lines(rows, empty_lines)
    except OSError as error:
        raise _cut_off(path, error, done) from None


def open_text(path: Path) -> io.TextIOWrapper:
    """A file's text, gzipped or not, for Python's `csv`; a byte order mark is left out."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")


def open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """A file's bytes, gzipped or not."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _without_empty_lines(rows: CsvRows, empty_lines: Callable[[], list[int]]) -> CsvRows:
    """The rows without those that are lines with nothing in them; `,,,` is a row, and its cells are empty."""
    columns = rows.batch.columns
    if any(column.null_count == 0 for column in columns):
        return rows
    empty = np.logical_and.reduce([column.is_null().to_numpy(zero_copy_only=False) for column in columns])
    if not empty.any():
        return rows
    no_row = empty & np.isin(rows.numbers + 1, empty_lines())
    rows.batch = rows.batch.filter(pa.array(~no_row))
    rows.numbers = rows.numbers[~no_row]
    return rows


def _empty_lines(path: Path) -> list[int]:
    """The numbers, from 1, of a file's lines that have nothing in them but spaces."""
    try:
        with open_bytes(path) as file:
            return [number for number, line in enumerate(file, 1) if not line.strip()]
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: the file is cut off or damaged ({error}); get the file again") from None


def count_rows(path: Path) -> int:
    """About how many rows a CSV has, from its size and its first megabyte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_BLOCK_BYTES)
    lines = head.count(b"\n")
    if path.suffix == ".gz":
        lines, rest = 0, head
        while rest:  # A gzip may have many members; zlib gives what it can of the last one, which is cut off.
            member = zlib.decompressobj(wbits=31)
            try:
                lines += member.decompress(rest).count(b"\n")
            except zlib.error as error:
                raise InputError(f"{path}: the file is damaged ({error}); get the file again") from None
            rest = member.unused_data
    return round(lines * size / max(1, len(head)))


def _typed(path: Path, columns: Mapping[str, pa.DataType], quoted: bool) -> Iterator[pa.RecordBatch]:
    with _open(path, columns, _parsing(quoted), threads=True) as reader:
        for batch in reader:
            yield _trimmed(batch, quoted)


def _parsing(quoted: bool, **options: Any) -> pa_csv.ParseOptions:
    # A line with nothing in it must count where lines are counted: Arrow then makes a row of empty cells of it.
    return pa_csv.ParseOptions(
        newlines_in_values=quoted, ignore_empty_lines=quoted, quote_char='"' if quoted else False, **options
    )


def _trimmed(batch: pa.RecordBatch, quoted: bool) -> pa.RecordBatch:
    """Text without the spaces around it and, where Arrow has not taken them off, the quotes."""
    arrays = []
    for column in batch.columns:
        words = column.dictionary if pa.types.is_dictionary(column.type) else column
        if pa.types.is_string(words.type) and _may_need_trimming(words):
            words = _trimmed_text(words, quoted)
            column = words.take(column.indices).dictionary_encode() if pa.types.is_dictionary(column.type) else words
        arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _trimmed_text(text: pa.Array, quoted: bool) -> pa.Array:
    text = pc.utf8_trim_whitespace(text)
    if not quoted:
        text = pc.utf8_trim_whitespace(pc.utf8_trim(text, '"'))
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _may_need_trimming(text: pa.Array) -> bool:
    """Whether there is a space or a quote anywhere: a look at the bytes, which is many times faster than trimming."""
    letters = np.frombuffer(text.buffers()[2] or b"", np.uint8)
    return bool((letters <= ord('"')).any())


def _as_text(path: Path, columns: Mapping[str, pa.DataType], quoted: bool, skip: int) -> Iterator[CsvRows]:
    """All cells as bytes first, so that one that cannot be read costs its row alone. Leaves out the first `skip` rows."""
    broken: dict[int, str] = {}
    latest = 0, ""

    def remember(row: pa_csv.InvalidRow) -> str:
        nonlocal latest
        # Without threads Arrow knows the number of the line; the header is line 1.
        number = row.number - 1
        if row.actual_columns == 1 and not row.text.strip():
            broken[number] = ""  # A line of spaces is no row, but counts as a line.
            return "skip"
        latest = number, f"{number_of(row.actual_columns, 'cell')}, the header has {row.expected_columns}"
        broken[number] = latest[1]
        return "skip"

    as_bytes = dict.fromkeys(columns, pa.binary())
    last = whole = 0
    try:
        with _open(path, as_bytes, _parsing(quoted, invalid_row_handler=remember), threads=False) as reader:
            for batch in reader:
                # A block may be nothing but broken rows.
                numbers = _numbers(last, len(batch), broken)
                whole = int(numbers[-1]) if len(numbers) else whole
                last = int(numbers[-1]) if len(numbers) else max(broken, default=last)
                here = {number: broken.pop(number) for number in sorted(broken) if number <= last}
                late = numbers > skip
                if late.any() or here:
                    rows = _converted(batch.filter(pa.array(late)), numbers[late], columns, quoted)
                    rows.broken = {number: text for number, text in here.items() if number > skip and text}
                    yield rows
    except OSError as error:
        raise _cut_off(path, error, last) from None
    except pa.ArrowInvalid as error:
        cause = " ".join(str(error).split())
        if "straddling" in cause:
            cause = f"a line after line {last + 1} is longer than {_BLOCK_BYTES:,} bytes"
        raise InputError(f"{path}: {cause}") from None
    number, text = latest
    if number > whole and not _ends_with_newline(path):
        raise InputError(
            f"{path}, line {number + 1}: {text}, and the file ends there without a line break: it seems to be cut off; "
            f"get the file again"
        )
    rest = {number: text for number, text in broken.items() if number > max(last, skip) and text}
    if rest:
        empty = pa.RecordBatch.from_arrays([pa.array([], kind) for kind in columns.values()], names=list(columns))
        yield CsvRows(empty, np.zeros(0, np.int64), broken=rest)


def _numbers(last: int, count: int, broken: Mapping[int, str]) -> np.ndarray:
    """Numbers of the next `count` whole rows after row `last`: those of broken rows are left out."""
    left_out = np.array(sorted(number for number in broken if number > last), np.int64)
    numbers = np.arange(last + 1, last + 1 + count + len(left_out))
    return numbers[~np.isin(numbers, left_out)][:count]


def _converted(batch: pa.RecordBatch, numbers: np.ndarray, columns: Mapping[str, pa.DataType], quoted: bool) -> CsvRows:
    problems: dict[int, tuple[str, str]] = {}
    arrays = []
    for name, kind in columns.items():
        text, not_text = _decoded(batch.column(name))
        text = _trimmed_text(text, quoted) if _may_need_trimming(text) else text
        for place in not_text:
            problems.setdefault(int(numbers[place]), (name, f"{name} is no UTF-8 text"))
        if kind == WORD or pa.types.is_string(kind):
            arrays.append(text.cast(kind))
            continue
        readable = pc.match_substring_regex(text, _NUMBER)
        unreadable = pc.fill_null(pc.invert(readable), False)
        for place in np.flatnonzero(unreadable.to_numpy(zero_copy_only=False)).tolist():
            cell = text[place].as_py()
            problems.setdefault(int(numbers[place]), (name, f"{name} is {cell[:40]!r}, not a number"))
        # Arrow's cast knows no plus sign.
        values = pc.utf8_ltrim(pc.utf8_trim_whitespace(text), "+")
        values = pc.if_else(pc.fill_null(readable, False), values, pa.scalar(None, pa.string()))
        arrays.append(values.cast(kind))
    return CsvRows(pa.RecordBatch.from_arrays(arrays, names=list(columns)), numbers, problems)


def _decoded(column: pa.Array) -> tuple[pa.Array, list[int]]:
    """Bytes as text, empty cells and what is no UTF-8 as null; and the places of the latter."""
    column = pc.if_else(pc.equal(pc.binary_length(column), 0), pa.scalar(None, pa.binary()), column)
    try:
        return column.cast(pa.string()), []
    except pa.ArrowInvalid:
        cells, wrong = [], []
        for place, data in enumerate(column.to_pylist()):
            try:
                cells.append(None if data is None else data.decode())
            except UnicodeDecodeError:
                cells.append(None)
                wrong.append(place)
        return pa.array(cells, pa.string()), wrong


@contextlib.contextmanager
def _open(
    path: Path, columns: Mapping[str, pa.DataType], parse: pa_csv.ParseOptions, threads: bool
) -> Iterator[pa_csv.CSVStreamingReader]:
    convert = pa_csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict(columns),
        strings_can_be_null=True,
        null_values=[""],  # Arrow's own list has "NA" and "null", which are people's names too.
    )
    # The names that we read, not those that Arrow would: without quotes and spaces around them.
    read = pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=threads, column_names=read_header(path), skip_rows=1)
    with (
        pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as file,
        pa_csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert) as reader,
    ):
        yield reader


def _cut_off(path: Path, error: OSError, row: int) -> InputError:
    return InputError(f"{path}, after line {row + 1}: the file is cut off or damaged ({error}); get the file again")


def _ends_with_newline(path: Path) -> bool:
    last = b""
    with open_bytes(path) as file:
        while block := file.read(_BLOCK_BYTES):
            last = block
    return last.endswith(b"\n")
