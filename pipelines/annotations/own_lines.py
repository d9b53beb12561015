"""What the lines of own boxes say: columns by any of their usual names, and cells; see `own_boxes`.

    file or folder ──read_head──▶ columns, first lines, note ──read_lines──▶ lines ──text_of, label_of, ...──▶ cells

Nothing here knows of photos: a cell that cannot be read raises `RowProblem`, a file that cannot be raises `InputError`.
"""

import csv
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.csv_files import (
    Line,
    count_rows,
    csv_line,
    json_line,
    parquet_columns,
    parquet_lines,
    parsed_lines,
    raw_lines,
)
from pipelines.annotations.groups import photos_below
from pipelines.annotations.own_masks import COLUMNS as MASK_COLUMNS
from pipelines.annotations.source import (
    RowProblem,
    as_number,
    is_text,
    shown,
)
from pipelines.config import SPLITS

CORNERS = ("x_min", "y_min", "x_max", "y_max")
_REQUIRED = ("photo", *CORNERS)
REFERENCE = tuple(f"reference_{name}" for name in _REQUIRED)
REFERENCE_MASKS = tuple(f"reference_{name}" for name in MASK_COLUMNS)
_COLUMNS = (
    *(*_REQUIRED, "label", "split", "width", "height", "url", "author", "licence", *MASK_COLUMNS),
    *("group", *REFERENCE, *REFERENCE_MASKS),
)
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
    "segmentation": "segmentation",
    "mask": "mask maskpath maskfile maskfilename",
}
_COLUMN_OF = {word: column for column, words in _MEANING.items() for word in words.split()}
_COLUMN_OF |= {f"target{word}": column for word, column in _COLUMN_OF.items() if column in _REQUIRED}
_COLUMN_OF |= {
    f"{prefix}{word}": f"reference_{column}"
    for word, column in _COLUMN_OF.items()
    for prefix in ("reference", "ref")
    if column in (*_REQUIRED, *MASK_COLUMNS) and not word.startswith("target")
}
_COLUMN_OF |= dict.fromkeys(("group", "groupid", "instance", "instanceid"), "group")
# Some count the corners from 0: then x1 is the right edge.
_FROM_ZERO = {"x0": "x_min", "y0": "y_min", "x1": "x_max", "y1": "y_max"}
# Neither place nor class of a box; the first two are what pandas writes for its row numbers.
_NOT_READ = re.compile(r"|unnamed\d*|index|id|annotationid|boxid|area|iscrowd|confidence|score|depth|filesize|trackerid")
# Numbers beside the names that count; alone they may be what is meant.
_BESIDE = dict.fromkeys(("imageid", "imgid", "photoid"), "photo") | dict.fromkeys(("classid", "categoryid", "labelid"), "label")
# Rows that are looked at before anything else, for columns and unit.
_HEAD_ROWS = 1000
_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
# Rounding makes fractions of a little more than 1; boxes that end before 1.5 px are none.
_LARGEST_FRACTION = 1.5
# Fractions written with four decimals, where the photo's size, and so the length of 1 px, is not known.
FRACTION_SLACK = 1e-4
# pandas makes floats of whole numbers where a cell of their column is empty.
_FLOAT_OF_WHOLE = re.compile(r"-?\d+\.0")


@dataclass(frozen=True)
class _Columns:
    """What the names in a header, or the keys of JSON objects, mean."""

    names: tuple[str, ...]  # As they stand.
    columns: tuple[str | None, ...]  # Ours, one for each; null for what is not read.
    unknown: tuple[str, ...]  # Names of unknown meaning.

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

    def problem(self, required: Sequence[str] = _REQUIRED) -> str | None:
        """What is wrong with the names, all of it, with the way out; null if nothing is."""
        parts = []
        for column in _COLUMNS:
            alike = [name for name, meant in zip(self.names, self.columns, strict=True) if meant == column]
            if len(alike) > 1:
                parts.append(f"columns {', '.join(alike)} all mean `{column}`; keep one of them")
        if self.unknown:
            parts.append(f"no column is called {', '.join(repr(name[:40]) for name in self.unknown)}")
        missing = [column for column in required if column not in self.columns]
        if missing:
            parts.append(f"column {', '.join(missing)} is missing")
        if self.unknown or missing:
            parts.append(f"names are {', '.join(_COLUMNS)}, in a CSV's first line, divided by commas (docs/own-data.md)")
        return "; ".join(parts) or None


def columns_of(names: tuple[str, ...]) -> _Columns:
    """What names mean, by their letters and digits: one alone may mean nothing that is sure, beside others it does."""
    words = ["".join(letter for letter in name.casefold() if letter.isalnum()) for name in names]
    known = _COLUMN_OF | _FROM_ZERO if {"x0", "y0"} <= set(words) else _COLUMN_OF
    columns = tuple(known.get(word) for word in words)
    unknown = tuple(
        name
        for name, word, column in zip(names, words, columns, strict=True)
        if column is None and not _NOT_READ.fullmatch(word) and (word not in _BESIDE or _BESIDE[word] not in columns)
    )
    return _Columns(names, columns, unknown)


def read_head(path: Path) -> tuple[Sequence[str | None], list[Line], str | None]:
    """The columns (of JSON Lines, those that are in use), the first rows, and a note where names of columns are not ours."""
    if path.is_dir():
        lines = list(itertools.islice(read_lines(path, _REQUIRED), _HEAD_ROWS))
        if not lines:
            raise InputError(f"{path}: no photo in it; set build.source.annotations to a folder of photos, or to a file of boxes")
        return _REQUIRED, lines, None
    if not path.is_file():
        raise InputError(f"{path}: no such file; set build.source.annotations to your CSV or JSON Lines file (docs/own-data.md)")
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: its name must end in {', '.join(_SUFFIXES)}; COCO's format is read with source.kind: coco")
    if is_parquet(path):
        return _parquet_head(path)
    number, first = next(raw_lines(path), (0, b""))
    if not first:
        raise InputError(f"{path}: this file is empty")
    if b"\0" in first:
        raise InputError(f"{path}, line {number}: this is no UTF-8 text (UTF-16?); save the file as UTF-8")
    trouble = None
    if is_json(path):
        objects = list(itertools.islice(parsed_lines(path, json_line), _HEAD_ROWS))
        names = [str(key) for line in objects for key in line.values]
        trouble = None if names else objects[0].problem
    else:
        try:
            names = [cell.strip() for cell in next(csv.reader([first.decode()], strict=True, skipinitialspace=True))]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}, line {number}: no header of a CSV in UTF-8 ({error})") from None
    found = columns_of(tuple(dict.fromkeys(names) if is_json(path) else names))
    if problem := trouble or found.problem():
        raise InputError(f"{path}, line {number}: {problem}")
    lines = list(itertools.islice(read_lines(path, _COLUMNS if is_json(path) else found.columns), _HEAD_ROWS))
    used = [name for name in _COLUMNS if any(line.values.get(name) is not None for line in lines)]
    return used if is_json(path) else found.columns, lines, found.note


def _parquet_head(path: Path) -> tuple[Sequence[str | None], list[Line], str | None]:
    found = columns_of(parquet_columns(path))
    if problem := found.problem():
        raise InputError(f"{path}: {problem}")
    lines = list(itertools.islice(parquet_lines(path, found.columns), _HEAD_ROWS))
    if not lines:
        raise InputError(f"{path}: this file is empty")
    return found.columns, lines, found.note


def check_unit(path: Path, unit: str, head: Sequence[Line]) -> None:
    """Compare the declared unit with the first rows."""
    corners = ([as_number(line.values.get(name)) for name in CORNERS] for line in head)
    whole = [[value for value in row if value is not None] for row in corners]
    largest = [max(row) for row in whole if len(row) == len(CORNERS)]
    beyond = sum(value > _LARGEST_FRACTION for value in largest)
    other = "pixel" if unit == "fraction" and 2 * beyond > len(largest) else None
    other = "fraction" if unit == "pixel" and largest and not beyond else other
    if other:
        raise InputError(
            f"{path}: of the first {number_of(len(largest), 'row')} {beyond or 'none'} {'has' if beyond < 2 else 'have'} a "
            f"coordinate above {_LARGEST_FRACTION}: the file seems to be in {other}s; set source.unit: {other}"
        )


def is_parquet(path: Path) -> bool:
    """Whether the file is Parquet, by its name."""
    return path.name.endswith(".parquet")


def count_lines(path: Path) -> int:
    """About how many lines there are."""
    if path.is_dir():
        return sum(1 for _ in photos_below(path))
    return pq.read_metadata(path).num_rows if is_parquet(path) else count_rows(path)


def is_json(path: Path) -> bool:
    """Whether the file is JSON Lines, by its name; else it is CSV."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def read_lines(path: Path, columns: Sequence[str | None]) -> Iterator[Line]:
    """The lines below the header; a key of JSON that is no column is an error of the file."""
    if path.is_dir():
        for number, name in enumerate(photos_below(path), start=1):
            yield Line(number, dict(zip(_REQUIRED, (name, 0.0, 0.0, 1.0, 1.0), strict=True)))
        return
    if is_parquet(path):
        yield from parquet_lines(path, columns)
        return
    if not is_json(path):
        yield from parsed_lines(path, functools.partial(csv_line, columns), after=next(raw_lines(path))[0])
        return
    for line in parsed_lines(path, json_line):
        meant, problem = _meaning_of(tuple(line.values))
        values = dict(zip(meant, line.values.values(), strict=True))
        late = [
            name
            for name in ("label", "split", "group", *REFERENCE, *REFERENCE_MASKS)
            if name not in columns and values.get(name) is not None
        ]
        if problem or late:
            wrong = problem or f"the first `{late[0]}`; give it on all lines from the first on"
            raise InputError(f"{path}, line {line.number}: {wrong}")
        yield Line(line.number, values, line.problem)


@functools.lru_cache(maxsize=1024)
def _meaning_of(keys: tuple[str, ...]) -> tuple[Sequence[str | None], str | None]:
    """What the keys of an object mean, and what is wrong with them: most lines have the same ones."""
    found = columns_of(keys)
    return found.columns, found.problem(required=())


# Cells.


def reference_line(line: Line) -> Line:
    """A line of a table of pairs as one about the reference's photo, of which it says no more than the name and the split."""
    told = {"photo": line.values.get(REFERENCE[0]), "split": line.values.get("split")}
    masks = {name: line.values.get(column) for name, column in zip(MASK_COLUMNS, REFERENCE_MASKS, strict=True)}
    return Line(line.number, told | masks, line.problem)


def text_of(line: Line, column: str) -> str | None:
    """A cell as text, without spaces around it; null where it is empty. Raises `RowProblem` for what is no text."""
    value = line.values.get(column)
    if value is None or value == "" or value != value:  # pandas writes NaN for an empty cell.
        return None
    if type(value) is int:
        return str(value)
    if not is_text(value):
        raise RowProblem("bad_row", f", column {column}: {shown(value)} is no text")
    return str(value)


def label_of(line: Line, column: str = "label") -> str | None:
    """The label, or group, as text; null where it is empty. The number 2 is `2`, also where it was written as 2.0."""
    value = line.values.get(column)
    if type(value) is float and math.isfinite(value):
        value = str(value)
    if isinstance(value, str) and _FLOAT_OF_WHOLE.fullmatch(value):
        return value[:-2]
    return value if isinstance(value, str) and is_text(value) and value else text_of(line, column)


def split_of(line: Line) -> str | None:
    """The split that a line names, in any case; null where it is empty."""
    split = text_of(line, "split")
    if split is None:
        return None
    word = {"val": "validation", "valid": "validation"}.get(split.casefold(), split.casefold())
    if word not in SPLITS:
        raise RowProblem("bad_row", f", column split: {shown(split)} is none of {', '.join(SPLITS)}")
    return word


def side_of(line: Line, column: str) -> int | None:
    """A photo's width or height in px; null where it is empty."""
    value = line.values.get(column)
    if value is None or value == "":
        return None
    number = as_number(value)
    if number is None or not number.is_integer() or not 0 < number < 2**31:
        raise RowProblem("bad_row", f", column {column}: {shown(value)} is no whole number of px above 0")
    return int(number)


def coordinate_of(line: Line, column: str) -> float:
    """An edge of a box."""
    value = line.values.get(column)
    number = as_number(value)
    if number is None:
        wrong = "is empty" if value is None or value == "" else f"{shown(value)} is no finite number"
        raise RowProblem("bad_number", f", column {column}: {wrong}")
    return number
