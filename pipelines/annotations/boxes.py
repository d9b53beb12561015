"""Your own boxes: one CSV or JSON Lines file with a box on each line (docs/own-data.md).

    photo,x_min,y_min,x_max,y_max,label
    cats/IMG 1.jpg,120,80,560,430,cat

Line by line in Python: about 25,000 rows a second on one core, where the file says how large photos are. Where it does not and
coordinates are px, each photo's header is read once, in 0.1 ms; a PNG takes 20 ms (`schemas.photos.photo_size`). Memory holds
a batch of rows and an entry of about 0.7 kB for each photo.
"""

import codecs
import contextlib
import csv
import difflib
import gzip
import hashlib
import itertools
import json
import math
import posixpath
import re
import reprlib
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.annotations.csv_files import count_rows
from pipelines.annotations.rows import UNKNOWN_FLAGS, RowProblem, clip_overshoot, file_name_problem, in_batches, is_text
from pipelines.annotations.source import Source
from pipelines.annotations.splits import assign_splits
from pipelines.config import SPLITS, SourceSettings
from schemas.errors import InputError
from schemas.photos import PhotoError, photo_size
from schemas.randomness import name_hash
from schemas.tables import BOXES, PHOTOS

CORNERS = ("x_min", "y_min", "x_max", "y_max")
REQUIRED = ("photo", *CORNERS)
OPTIONAL = ("label", "split", "width", "height", "url", "author", "licence")
COLUMNS = (*REQUIRED, *OPTIONAL)
# Of every box, where there is no column of labels.
ONLY_LABEL = "object"
# Rows that are looked at before anything else, for columns and unit.
HEAD_ROWS = 1000
_NAMES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
# Rounding makes fractions of a little more than 1; boxes that end before 1.5 px are none.
_LARGEST_FRACTION = 1.5
# Fractions written with four decimals, where the photo's size, and so the length of 1 px, is not known.
_FRACTION_SLACK = 1e-4


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # Of the line in the file, from 1.
    values: dict[str, Any]  # By column; null where nothing is given.
    problem: str | None = None  # Why it cannot be read.


@dataclass(slots=True)
class _Photo:
    photo_id: str
    line: int  # Where it stands first.
    split: str | None = None
    width: int | None = None
    height: int | None = None
    url: str | None = None
    author: str | None = None
    licence: str | None = None


@dataclass
class _Photos:
    """What the lines read so far say about each photo."""

    by_name: dict[str, _Photo] = field(default_factory=dict)
    name_of: dict[str, str] = field(default_factory=dict)  # By photo id.

    def of(self, line: _Line, columns: Sequence[str]) -> tuple[str, _Photo]:
        """The photo of a line: its file name, and what is known about it.

        Raises:
            RowProblem: `bad_row`, if the line cannot be read, or says something else about the photo than a line above it.
        """
        if line.problem:
            raise RowProblem("bad_row", f": {line.problem}")
        name = _text(line, "photo")
        if name not in self.by_name:
            wrong = file_name_problem(name)
            if name is None or wrong:
                raise RowProblem("bad_row", f", column photo: {reprlib.repr(name)} {wrong}")
            name = posixpath.normpath(name)  # ./a.jpg is a.jpg.
        split = _text(line, "split")
        if "split" in columns and split not in SPLITS:
            raise RowProblem("bad_row", f", column split: {reprlib.repr(split)} is none of {', '.join(SPLITS)}")
        said = {"split": split, "width": _side(line, "width"), "height": _side(line, "height")}
        if (said["width"] is None) != (said["height"] is None):
            raise RowProblem("bad_row", ", column width: of width and height only one is there")
        texts = {column: _text(line, column) for column in ("url", "author", "licence")}

        photo = self.by_name.get(name)
        if photo is None:
            photo = _Photo(photo_id_of(name), line.number)
            if self.name_of.setdefault(photo.photo_id, name) != name:
                other = self.name_of[photo.photo_id]
                raise RowProblem("bad_row", f", column photo: {name!r} and {other!r} get the same id; rename one of the files")
            self.by_name[name] = photo
        for column, value in said.items():
            before = getattr(photo, column)
            if None not in (before, value) and before != value:
                raise RowProblem(
                    "bad_row", f", column {column}: {value!r}, but {before!r} in line {photo.line} for the same photo"
                )
        for column, value in {**said, **texts}.items():
            if value is not None and getattr(photo, column) is None:
                setattr(photo, column, value)
        return name, photo


def open_boxes(settings: SourceSettings, seed: int) -> Source:
    """Open one CSV or JSON Lines file, gzipped or not, with a box on each line.

    Coordinates are px or fractions as `settings.unit` says, x right and y down from the top left corner of the photo in
    `settings.frame`. Labels are taken as they stand; without them every box is an `object`. Without a column `split`, a hash of
    the photo's id decides; rows whose photo is not known count under the first of `settings.splits`.

    Raises:
        InputError: the file cannot be read as UTF-8 text with a header or with objects, has a column of another name, has no
            rows, or its first rows do not look like `settings.unit`.
    """
    path = settings.annotations
    columns, head = _head(path)
    _check_unit(path, settings.unit or "pixel", head)
    reader = _Reader(path, settings, seed, columns)
    return Source(
        name=str(path),
        files=(path,),
        frame=settings.frame,
        read_boxes=reader.read_boxes,
        read_photos=reader.read_photos,
        class_names={} if "label" in columns else {ONLY_LABEL: ONLY_LABEL},
        read_elsewhere=reader.hash_sizes,
        rows=count_rows(path),
    )


def _check_pixels(edges: Mapping[str, float], end: float, way: str) -> None:
    """Raises a problem in the words of the file, px, where the selection would speak of fractions."""
    (low, start), (high, stop) = edges.items()
    for name, value in edges.items():
        if not 0 <= value <= end:
            raise RowProblem("outside_photo", f", column {name}: {value:g}, and the photo is {end:g} px {way}")
    if start >= stop:
        hint = f"; is {high} a {'width' if high == 'x_max' else 'height'}?" if start > stop else ""
        raise RowProblem("empty_box", f", column {high}: {stop:g}, not more than {low}, {start:g}{hint}")


def photo_id_of(file_name: str) -> str:
    """The id of a photo, a pure function of its path below the photo folder.

    For `<stem>.jpg`, where the stem can be an id, it is the stem; for any other path the last 40 characters of it in ASCII and,
    so that ids differ where paths do, 8 hex digits of a hash of it all.
    """
    plain = re.fullmatch(r"([A-Za-z0-9_-]{1,64})\.jpg", file_name)
    if plain:
        return plain[1]
    text = unicodedata.normalize("NFKD", re.sub(r"\.[^./]*$", "", file_name)).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[-40:].strip("-")
    return f"{slug or 'photo'}-{name_hash('photo', file_name, bits=32):08x}"


@dataclass
class _Reader:
    path: Path
    settings: SourceSettings
    seed: int
    columns: Sequence[str]
    # By each photo's header, or why it cannot be read; kept, as the boxes of a photo and the photos all ask.
    sizes: dict[str, tuple[int, int] | PhotoError] = field(default_factory=dict)

    def read_boxes(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._of_wanted_splits(self._boxes()), BOXES)

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._of_wanted_splits(self._photo_rows()), PHOTOS)

    def hash_sizes(self) -> dict[str, str]:
        """A hash of the photos' sizes, as far as boxes depend on what their files say: a photo that comes or goes changes it."""
        if self.settings.unit != "pixel":
            return {}
        photos = _Photos()
        for line in _lines(self.path, self.columns):
            with contextlib.suppress(RowProblem):
                photos.of(line, self.columns)
        sizes: list[tuple[str, str]] = []
        for name, photo in sorted(photos.by_name.items()):
            try:
                sizes.append((name, str(self._size(name, photo))))
            except PhotoError as error:
                sizes.append((name, error.code))
        return {"sizes of photos": hashlib.sha256(repr(sizes).encode()).hexdigest()}

    def _boxes(self) -> Iterator[dict[str, Any]]:
        photos = _Photos()
        above = 0 if _is_json(self.path) else 1
        for line in _lines(self.path, self.columns):
            row = {**UNKNOWN_FLAGS, "file": self.path.name, "row": line.number - above}
            try:
                self._fill(row, line, photos)
            except RowProblem as problem:
                row.update(problem=problem.reason, detail=f"{self.path.name}, line {line.number}{problem}")
            yield row

    def _photo_rows(self) -> Iterator[dict[str, Any]]:
        photos = _Photos()
        for line in _lines(self.path, self.columns):
            # A line that cannot be read is there among the boxes, with its problem; so are the boxes of a photo without a size.
            with contextlib.suppress(RowProblem):
                photos.of(line, self.columns)
        for name, photo in photos.by_name.items():
            with contextlib.suppress(PhotoError):
                width, height = self._size(name, photo) if self.settings.unit == "pixel" else (photo.width, photo.height)
                known = {key: getattr(photo, key) for key in ("photo_id", "split", "url", "author", "licence")}
                yield {**known, "file_name": name, "width": width, "height": height}

    def _fill(self, row: dict[str, Any], line: _Line, photos: _Photos) -> None:
        """Put into the row what the line says, or, up to there, raise the first problem in the order of `REJECT_REASONS`."""
        name, photo = photos.of(line, self.columns)
        row["photo_id"], row["split"] = photo.photo_id, photo.split
        row["label"] = _text(line, "label") if "label" in self.columns else ONLY_LABEL
        x_min, y_min, x_max, y_max = [_coordinate(line, column) for column in CORNERS]
        if self.settings.unit == "pixel":
            try:
                end_x, end_y = self._size(name, photo)
            except PhotoError as error:
                raise RowProblem("unknown_photo", f", column photo: the size of {name!r} cannot be read ({error})") from None
            slack_x = slack_y = 1.0
        else:
            end_x = end_y = 1
            slack_x = 1 / photo.width if photo.width else _FRACTION_SLACK
            slack_y = 1 / photo.height if photo.height else _FRACTION_SLACK
        x_min, x_max = clip_overshoot(x_min, x_max, end_x, slack_x)
        y_min, y_max = clip_overshoot(y_min, y_max, end_y, slack_y)
        row.update(x_min=x_min / end_x, x_max=x_max / end_x, y_min=y_min / end_y, y_max=y_max / end_y)
        if self.settings.unit == "pixel":
            _check_pixels({"x_min": x_min, "x_max": x_max}, end_x, "wide")
            _check_pixels({"y_min": y_min, "y_max": y_max}, end_y, "high")

    def _size(self, name: str, photo: _Photo) -> tuple[int, int]:
        if photo.width and photo.height:
            return photo.width, photo.height
        if name not in self.sizes:
            limit = self.settings.max_photo_pixels
            try:
                self.sizes[name] = photo_size(self.settings.photos / name, frame=self.settings.frame, max_pixels=limit)
            except PhotoError as error:
                self.sizes[name] = error
        size = self.sizes[name]
        if isinstance(size, PhotoError):
            raise PhotoError(size.code, size.detail)
        return size

    def _of_wanted_splits(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of `settings.splits`; those without a split get theirs first, many at once."""
        while batch := list(itertools.islice(rows, 1000)):
            undecided = [row for row in batch if row.get("split") is None and "photo_id" in row]
            splits = assign_splits([row["photo_id"] for row in undecided], self.seed, self.settings.validation_share)
            for row, split in zip(undecided, splits, strict=True):
                row["split"] = split
            for row in batch:
                if row.setdefault("split", self.settings.splits[0]) in self.settings.splits:
                    yield row


def _head(path: Path) -> tuple[Sequence[str], list[_Line]]:
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
    if not _is_json(path):
        columns: Sequence[str] = _header(path, first)
        head = list(itertools.islice(_lines(path, columns), HEAD_ROWS))
        if not head:
            raise InputError(f"{path}: no row below the header; add a line for each box")
        return columns, head
    if first.lstrip().startswith(b"["):
        raise InputError(f"{path}, line 1: a JSON list; write one object on each line, with no list around them (jq -c '.[]')")
    head = list(itertools.islice(_lines(path, COLUMNS), HEAD_ROWS))
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
        if any(_number(name) is not None for name in names):
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


def _check_unit(path: Path, unit: str, head: Sequence[_Line]) -> None:
    corners = ([_number(line.values.get(name)) for name in CORNERS] for line in head)
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


def _is_json(path: Path) -> bool:
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


def _lines(path: Path, columns: Sequence[str]) -> Iterator[_Line]:
    lines = _raw_lines(path)
    if not _is_json(path):
        next(lines, None)
    for number, data in lines:
        try:
            text = data.decode().strip("\r\n")
        except UnicodeDecodeError as error:
            yield _Line(number, {}, f"no UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8")
            continue
        yield _json_line(path, number, text, columns) if _is_json(path) else _csv_line(number, text, columns)


def _csv_line(number: int, text: str, columns: Sequence[str]) -> _Line:
    # Each line by itself: a stray quote costs its line, and does not swallow those below it.
    try:
        cells = next(csv.reader([text], strict=True))
    except csv.Error as error:
        return _Line(number, {}, f"not CSV ({error}): quotes in a cell are doubled, and no cell holds a line break")
    if len(cells) != len(columns):
        return _Line(number, {}, f"{len(cells)} cells, the header has {len(columns)}")
    return _Line(number, dict(zip(columns, cells, strict=True)))


def _json_line(path: Path, number: int, text: str, columns: Sequence[str]) -> _Line:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return _Line(number, {}, f"not JSON ({error.msg} at character {error.colno})")
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, thousands of brackets.
        return _Line(number, {}, f"not JSON that can be read ({error})")
    if not isinstance(values, dict):
        return _Line(number, {}, "no JSON object; write {...} on each line")
    for name, value in values.items():
        if name not in COLUMNS:
            raise InputError(f"{path}, line {number}: {_no_such(name)}")
        if name in ("label", "split") and name not in columns and value is not None:
            raise InputError(f"{path}, line {number}: the first `{name}`; give it on all lines from the first on")
    return _Line(number, values)


def _text(line: _Line, column: str) -> str | None:
    value = line.values.get(column)
    if value is None:
        return None
    if type(value) is int:
        return str(value)
    if not is_text(value):
        raise RowProblem("bad_row", f", column {column}: {reprlib.repr(value)} is no text")
    return value if value.strip() else None


def _side(line: _Line, column: str) -> int | None:
    value = line.values.get(column)
    if value is None or value == "":
        return None
    number = _number(value)
    if number is None or not number.is_integer() or not 0 < number < 2**31:
        raise RowProblem("bad_row", f", column {column}: {reprlib.repr(value)} is no whole number of px above 0")
    return int(number)


def _coordinate(line: _Line, column: str) -> float:
    value = line.values.get(column)
    number = _number(value)
    if number is not None:
        return number
    if value is None or value == "":
        raise RowProblem("bad_number", f", column {column}: is empty")
    comma = " (write a decimal point, not a comma)" if isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value) else ""
    raise RowProblem("bad_number", f", column {column}: {reprlib.repr(value)} is not a finite number{comma}")


def _number(value: Any) -> float | None:
    """A finite number, from text too; Python's own 1_000 is none."""
    if type(value) not in (str, int, float) or (type(value) is str and "_" in value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
