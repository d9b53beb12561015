"""A table of one's own boxes, CSV or JSON Lines, line by line: what its columns mean, and the values of each line by column.

    photo,x_min,y_min,x_max,y_max,label          ours
    image,xmin,ymin,xmax,ymax,label              VoTT and many others: read, with a note
    filename,width,height,class,xmin,...         TensorFlow's examples: read, with a note
    photo,x,y,width,height                       corner and size, or centre and size? refused
    ...,lable,name                               refused, all names at once

What is wrong with a line is a value, what is wrong with the file an error.
"""

import codecs
import csv
import difflib
import functools
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.words import noun, number_of
from pipelines.annotations.csv_files import letters, open_bytes
from pipelines.annotations.source import as_number

CORNERS = ("x_min", "y_min", "x_max", "y_max")
REQUIRED = ("photo", *CORNERS)
COLUMNS = (*REQUIRED, "label", "split", "width", "height", "url", "author", "licence")
_MEANING = {
    "photo": (
        "photo image img filename file filepath path imagepath imgpath imagename imgname imagefile imagefilename imgfilename "
        "photopath photoname"
    ),
    "x_min": "xmin x1 left xtl bboxxmin boxxmin bboxx1",
    "y_min": "ymin y1 top ytl bboxymin boxymin bboxy1",
    "x_max": "xmax x2 right xbr bboxxmax boxxmax bboxx2",
    "y_max": "ymax y2 bottom ybr bboxymax boxymax bboxy2",
    "label": "label class classname category categoryname labelname classlabel catname",
    "split": "split subset",
    "width": "width imagewidth imgwidth photowidth",
    "height": "height imageheight imgheight photoheight",
    "url": "url imageurl imgurl photourl",
    "author": "author",
    "licence": "licence license",
}
_COLUMN_OF = {word: column for column, words in _MEANING.items() for word in words.split()}
# Some count the corners from 0: then x1 is the right edge.
_FROM_ZERO = {"x0": "x_min", "y0": "y_min", "x1": "x_max", "y1": "y_max"}
# Neither place nor class of a box; the first two are what pandas writes for its row numbers.
_NOT_READ = re.compile(r"|unnamed\d*|index|id|annotationid|boxid|area|iscrowd|confidence|score|depth|filesize|trackerid")
# Numbers beside the names that count; alone they may be what is meant.
_BESIDE = dict.fromkeys(("imageid", "imgid", "photoid"), "photo") | dict.fromkeys(("classid", "categoryid", "labelid"), "label")
_OPEN_IMAGES = {"imageid", "labelname", "xmin"}
# Rows that are looked at before anything else, for columns and unit.
HEAD_ROWS = 1000
_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Rounding makes fractions of a little more than 1; boxes that end before 1.5 px are none.
_LARGEST_FRACTION = 1.5


@dataclass(frozen=True)
class Columns:
    """What the names in a header, or the keys of JSON objects, mean."""

    names: tuple[str, ...]
    """As they stand."""
    columns: tuple[str | None, ...]
    """Ours, one for each; null for what is not read."""
    unknown: tuple[str, ...]
    """Names of unknown meaning."""

    @property
    def note(self) -> str | None:
        """What a user should know; null where all names are ours."""
        pairs = list(zip(self.names, self.columns, strict=True))
        other = [f"{name} as {column}" for name, column in pairs if column and name != column]
        left = [name for name, column in pairs if name and column is None and name not in self.unknown]
        if nameless := self.names.count(""):
            left.insert(0, "a column without a name" if nameless == 1 else f"{nameless} columns without names")
        parts = [f"read {', '.join(other)}" if other else "", f"not read: {', '.join(left)}" if left else ""]
        return "; ".join(part for part in parts if part) or None

    def problem(self, complete: bool = True) -> str | None:
        """What is wrong with the names, all of it, with the way out; null if nothing is.

        Args:
            complete: whether these are all; an object of JSON Lines may leave out what others have.
        """
        words = {letters(name) for name in self.names}
        missing = [column for column in REQUIRED if column not in self.columns] if complete else []
        if missing and words >= _OPEN_IMAGES:
            return "a table of Open Images: set source.kind: open_images and source.annotations to the folder that holds it"
        parts = []
        for column in COLUMNS:
            alike = [name for name, meant in zip(self.names, self.columns, strict=True) if meant == column]
            if len(alike) > 1:
                parts.append(f"columns {', '.join(alike)} all mean `{column}`; keep one of them")
        if self.unknown:
            parts.append(f"no column is called {', '.join(f'{name[:40]!r}{_hint(name)}' for name in self.unknown)}")
        if missing:
            parts.append(f"column {', '.join(missing)} is missing (found: {', '.join(self.names)})")
        if self.unknown or missing:
            parts.append(f"columns are {', '.join(COLUMNS)}; rename or take out the others")
        if set(missing) & set(CORNERS):
            parts.append("boxes that are not given as edges: docs/own-data.md#boxes-of-another-form")
        if not parts and ("width" in self.columns) != ("height" in self.columns):
            parts.append("of width and height only one is there; give both or none")
        return "; ".join(parts) or None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file, as values by column."""

    number: int  # Of the line in the file, from 1; lines with nothing in them count.
    values: Mapping[str | None, Any]  # By column, under None what is not read; null where nothing is given.
    problem: str | None = None  # Why it cannot be read.


@dataclass(frozen=True)
class Head:
    """The columns and the first rows of a file."""

    columns: Sequence[str | None]
    """Of a CSV, one for each cell, null where it is not read; of JSON Lines, those that are in use."""
    lines: list[Line]
    """The first rows."""
    note: str | None
    """Which names of columns mean what, where they are not ours."""


def columns_of(names: tuple[str, ...]) -> Columns:
    """What names mean: one alone may mean nothing that is sure, beside others it does."""
    words = [letters(name) for name in names]
    known = _COLUMN_OF | _FROM_ZERO if {"x0", "y0"} <= set(words) else _COLUMN_OF
    columns = tuple(known.get(word) for word in words)
    unknown = tuple(
        name
        for name, word, column in zip(names, words, columns, strict=True)
        if column is None and not _NOT_READ.fullmatch(word) and (word not in _BESIDE or _BESIDE[word] not in columns)
    )
    return Columns(names, columns, unknown)


def is_own_table(header: Sequence[str]) -> bool:
    """Whether a CSV's header seems to be that of boxes of one's own."""
    is_published = {letters(name) for name in header} >= _OPEN_IMAGES
    return not is_published and len({*CORNERS} & {*columns_of(tuple(header)).columns}) >= 2


def read_head(path: Path) -> Head:
    """The columns, and the first rows.

    Raises:
        InputError: there is no such file, it is none of ours, or there is nothing in it.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; set build.source.annotations to your CSV or JSON Lines file (docs/own-data.md)")
    if not path.name.endswith(_SUFFIXES):
        coco = "; COCO's format is read with source.kind: coco" if ".json" in path.name else ""
        raise InputError(f"{path}: its name must end in one of {', '.join(_SUFFIXES)} (docs/own-data.md){coco}")
    number, first = next(_raw_lines(path), (0, b""))
    if not first.strip(b"\0\r\n"):
        raise InputError(f"{path}: this file is empty, or holds nothing but zero bytes; get it again")
    if b"\0" in first:
        raise InputError(f"{path}, line {number}: this is no UTF-8 text (UTF-16?); save the file as UTF-8")
    head = _json_head(path, number, first) if is_json(path) else _csv_head(path, number, first)
    # An empty cell among others is a problem of its row; a table without any other is no table.
    if not any(line.problem or any(value not in (None, "") for value in line.values.values()) for line in head.lines):
        raise InputError(f"{path}: all cells of the first {number_of(len(head.lines), 'row')} are empty; get the file again")
    return head


def check_unit(path: Path, unit: str, head: Sequence[Line]) -> None:
    """Compare the declared unit with the first rows.

    Raises:
        InputError: they look like the other one.
    """
    corners = ([as_number(line.values.get(name)) for name in CORNERS] for line in head)
    numbers = [[value for value in row if value is not None] for row in corners]
    largest = [max(row) for row in numbers if len(row) == len(CORNERS)]
    beyond = sum(value > _LARGEST_FRACTION for value in largest)
    other = "pixel" if unit == "fraction" and 2 * beyond > len(largest) else None
    other = "fraction" if unit == "pixel" and largest and not beyond else other
    if other:
        raise InputError(
            f"{path}: of the first {number_of(len(largest), 'row')} {beyond or 'none'} {'has' if beyond < 2 else 'have'} a "
            f"coordinate above {_LARGEST_FRACTION}: the file seems to be in {other}s; set source.unit: {other}"
        )


def is_json(path: Path) -> bool:
    """Whether the file is JSON Lines, by its name; else it is CSV."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def read_lines(path: Path, columns: Sequence[str | None]) -> Iterator[Line]:
    """The lines below the header; one that cannot be read has a `problem`.

    Args:
        path: of the file.
        columns: of its head.

    Raises:
        InputError: the file is damaged, or ends in the middle of a line, or a JSON object has a key that is no column.
    """
    if not is_json(path):
        yield from _parsed(path, lambda number, text: _csv_line(number, text, columns))
        return
    for line in _parsed(path, _json_line):
        meant, problem = _meaning_of(tuple(line.values))
        values = dict(zip(meant, line.values.values(), strict=True))
        late = [name for name in ("label", "split") if name not in columns and values.get(name) is not None]
        if problem or late:
            first = f"the first `{late[0]}`; give it on all lines from the first on" if late else ""
            raise InputError(f"{path}, line {line.number}: {problem or first}")
        yield Line(line.number, values, line.problem)


def _csv_head(path: Path, number: int, data: bytes) -> Head:
    where = f"{path}, line {number}"
    try:
        cells = [cell.strip() for cell in next(csv.reader([data.decode()], strict=True, skipinitialspace=True))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: the header cannot be read ({error}); save the file as CSV in UTF-8") from None
    found = columns_of(tuple(cells))
    if not set(CORNERS) & set(found.columns):
        if len(cells) == 1 and re.search("[;\t]", cells[0]):
            raise InputError(f"{where}: columns are not divided by commas; save the file as CSV with commas")
        if any(as_number(cell) is not None or cell.casefold().endswith(_PHOTOS) for cell in cells):
            columns = ", ".join(COLUMNS)
            raise InputError(f"{where}: a header is missing; put the names of the columns there, in their order: {columns}")
    if problem := found.problem():
        raise InputError(f"{where}: {problem}")
    lines = list(itertools.islice(read_lines(path, found.columns), HEAD_ROWS))
    if not lines:
        raise InputError(f"{path}: no row below the header; add a line for each box")
    return Head(found.columns, lines, found.note)


def _json_head(path: Path, number: int, data: bytes) -> Head:
    if data.lstrip().startswith(b"["):
        raise InputError(f"{path}, line {number}: a JSON list; write one object on each line (jq -c '.[]')")
    objects = list(itertools.islice(_parsed(path, _json_line), HEAD_ROWS))
    if all(line.problem for line in objects):
        columns = ", ".join(REQUIRED)
        raise InputError(f"{path}, line {objects[0].number}: {objects[0].problem}; write one object with {columns} on each line")
    if all(value in (None, "") for line in objects for value in line.values.values()):
        return Head((), objects, None)
    found = columns_of(tuple(dict.fromkeys(str(key) for line in objects for key in line.values)))
    if problem := found.problem():
        first = next((line.number for line in objects if set(found.unknown) & line.values.keys()), objects[0].number)
        raise InputError(f"{path}, line {first}: {problem}")
    lines = list(itertools.islice(read_lines(path, COLUMNS), HEAD_ROWS))
    return Head([name for name in COLUMNS if any(line.values.get(name) is not None for line in lines)], lines, found.note)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, each with its number."""
    number = 0
    try:
        with open_bytes(path) as file:
            for number, data in enumerate(file, start=1):
                if data.strip():
                    yield number, data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
    except (EOFError, zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError.
        raise InputError(f"{path}, after line {number}: the file is damaged or cut off ({error}); get it again") from None


def _parsed(path: Path, parse: Callable[[int, str], Line]) -> Iterator[Line]:
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
            raise InputError(f"{path}, line {number}: {line.problem}, and the file ends there: it was cut off; get it again")
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
    return found.columns, found.problem(complete=False)


def _hint(name: str) -> str:
    close = difflib.get_close_matches(letters(name), _COLUMN_OF, n=1, cutoff=0.6)
    return f" (did you mean `{_COLUMN_OF[close[0]]}`?)" if close else ""
