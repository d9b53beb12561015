"""Your own boxes: one CSV or JSON Lines file with a box on each line (docs/own-data.md).

    photo,x_min,y_min,x_max,y_max,label
    cats/IMG 1.jpg,120,80,560,430,cat

Line by line in Python: about 25,000 rows a second on one core, where the file gives the sizes of photos. Where it does not and
coordinates are px, each photo's header is read once, in 0.1 ms; a PNG takes 20 ms (`pbe_core.images.decode.photo_size`). Memory
holds a batch of rows and an entry of about 0.7 kB for each photo.
"""

import contextlib
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pipelines.annotations.csv_files import count_rows
from pipelines.annotations.own_table import CORNERS, Line, check_unit, is_json, read_head, read_lines
from pipelines.annotations.photo_names import PhotoNames, PhotoSizes
from pipelines.annotations.source import (
    ONLY_LABEL,
    UNKNOWN_FLAGS,
    RowProblem,
    Source,
    as_number,
    assign_splits,
    clip_overshoot,
    given,
    in_batches,
    is_text,
    photo_id_of,
    shown,
    splits_are_their_own,
)
from pipelines.config import SPLITS, SourceSettings
from schemas.tables import BOXES, PHOTOS

# Fractions written with four decimals, where the photo's size, and so the length of 1 px, is not known.
_FRACTION_SLACK = 1e-4
# pandas makes floats of whole numbers where a cell of their column is empty.
_FLOAT_OF_WHOLE = re.compile(r"-?\d+\.0")


def open_boxes(settings: SourceSettings, seed: int, here: bool = True) -> Source:
    """Open one CSV or JSON Lines file, gzipped or not, with a box on each line.

    Coordinates are px or fractions as `settings.unit` says, x right and y down from the top left corner of the photo in
    `settings.photo_frame`. Photos' names lead to files below the photo folder as `PhotoNames` reads them. Without labels every
    box is an `object`. Without a column `split`, a hash of the photo's id decides; rows whose photo is not known count under the
    first of `settings.splits`.

    Args:
        settings: of the source.
        seed: of the build.
        here: whether photos must lie in the photo folder; else they are in a photo store, or still to be fetched.

    Raises:
        InputError: the file cannot be read as UTF-8 text with a header or with objects, has a column of another name, has no
            rows, or its first rows do not look like `settings.unit`; a setting that its columns leave without effect.
    """
    path = settings.annotations
    head = read_head(path)
    check_unit(path, settings.unit or "pixel", head.lines)
    if "split" in head.columns and "validation_share" in given(settings):
        raise splits_are_their_own(str(path))
    roots = [settings.photos]
    reader = _Reader(path, settings, seed, head.columns, PhotoNames(roots, here), PhotoSizes(settings, roots, here))
    return Source(
        name=str(path),
        files=(path,),
        frame=settings.photo_frame,
        read_boxes=reader.read_boxes,
        read_photos=reader.read_photos,
        class_names={} if "label" in head.columns else {ONLY_LABEL: ONLY_LABEL},
        read_elsewhere=reader.hash_photos,
        read_notes=reader.names.notes,
        rows=count_rows(path),
        notes=(f"{path}: {head.note}",) if head.note else (),
    )


def check_sizes(settings: SourceSettings) -> None:
    """Make sure that the file itself gives the sizes of its photos, where they are still to be fetched.

    Raises:
        InputError: boxes are in px, and the file has no columns for it.
    """
    columns = read_head(settings.annotations).columns
    if settings.unit == "pixel" and not {"width", "height"} <= set(columns):
        raise InputError(
            f"{settings.annotations}: boxes in px need the sizes of photos that are still to be crawled; add columns width and "
            f"height, or write the boxes as fractions (source.unit: fraction)"
        )


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
    """What is known about each photo from the lines read so far."""

    names: PhotoNames
    by_name: dict[str, _Photo] = field(default_factory=dict)  # By its path below the photo folder.
    path_of: dict[str | None, str] = field(default_factory=dict)  # Of names that are written otherwise.
    name_of: dict[str, str] = field(default_factory=dict)  # By photo id.

    def of(self, line: Line, columns: Sequence[str | None]) -> tuple[str, _Photo]:
        """The photo of a line: its file name, and what is known about it.

        Raises:
            RowProblem: `bad_row`, if the line cannot be read, or contradicts a line above it about the photo.
        """
        if line.problem:
            raise RowProblem("bad_row", f": {line.problem}")
        name = _text_of(line, "photo")
        if name is None or name not in self.by_name:
            name = self.path_of.get(name) or self._find(name)
        split = _split_of(line)
        if "split" in columns and split is None:
            raise RowProblem("bad_row", ", column split: is empty")
        fixed = {"split": split, "width": _side_of(line, "width"), "height": _side_of(line, "height")}
        if (fixed["width"] is None) != (fixed["height"] is None):
            raise RowProblem("bad_row", ", column width: of width and height only one is there")
        texts = {column: _text_of(line, column) for column in ("url", "author", "licence")}

        photo = self.by_name.get(name)
        if photo is None:
            photo = _Photo(photo_id_of(name), line.number)
            if self.name_of.setdefault(photo.photo_id, name) != name:
                other = self.name_of[photo.photo_id]
                raise RowProblem("bad_row", f", column photo: {name!r} and {other!r} get the same id; rename one of the files")
            self.by_name[name] = photo
        for column, value in fixed.items():
            before = getattr(photo, column)
            if None not in (before, value) and before != value:
                raise RowProblem(
                    "bad_row", f", column {column}: {value!r}, but {before!r} in line {photo.line} for the same photo"
                )
        for column, value in {**fixed, **texts}.items():
            if value is not None and getattr(photo, column) is None:
                setattr(photo, column, value)
        return name, photo

    def _find(self, name: str | None) -> str:
        try:
            path = self.names.path_of(name)
        except ValueError as error:
            raise RowProblem("bad_row", f", column photo: {shown(name)} {error}") from None
        if path != name:
            self.path_of[name] = path
        return path


@dataclass
class _Reader:
    path: Path
    settings: SourceSettings
    seed: int
    columns: Sequence[str | None]
    names: PhotoNames
    sizes: PhotoSizes

    def read_boxes(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._of_wanted_splits(self._boxes()), BOXES)

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._of_wanted_splits(self._photo_rows()), PHOTOS)

    def hash_photos(self) -> dict[str, str]:
        """Hashes of the photos' sizes and paths, as far as they depend on what lies in the photo folder: what comes or goes there
        changes them.
        """
        photos = self._all_photos()
        hashes = {"paths of photos": repr(sorted(photos))} if self.names.moved else {}
        if self.settings.unit == "pixel":
            sizes: list[tuple[str, str]] = []
            for name, photo in sorted(photos.items()):
                try:
                    sizes.append((name, str(self._size(name, photo))))
                except PhotoError as error:
                    sizes.append((name, error.code))
            hashes["sizes of photos"] = repr(sizes)
        return {what: hashlib.sha256(text.encode()).hexdigest() for what, text in hashes.items()}

    def _boxes(self) -> Iterator[dict[str, Any]]:
        photos = _Photos(self.names)
        above = 0 if is_json(self.path) else 1
        for line in read_lines(self.path, self.columns):
            row = {**UNKNOWN_FLAGS, "file": self.path.name, "row": line.number - above}
            try:
                self._fill(row, line, photos)
            except RowProblem as problem:
                row.update(problem=problem.reason, detail=f"{self.path.name}, line {line.number}{problem}")
            yield row

    def _photo_rows(self) -> Iterator[dict[str, Any]]:
        for name, photo in self._all_photos().items():
            with contextlib.suppress(PhotoError):  # Its boxes are rows with this problem.
                width, height = self._size(name, photo) if self.settings.unit == "pixel" else (photo.width, photo.height)
                known = {key: getattr(photo, key) for key in ("photo_id", "split", "url", "author", "licence")}
                yield {**known, "file_name": name, "width": width, "height": height}

    def _all_photos(self) -> dict[str, _Photo]:
        """By file name; a line that cannot be read is among the boxes, with its problem."""
        photos = _Photos(self.names)
        for line in read_lines(self.path, self.columns):
            with contextlib.suppress(RowProblem):
                photos.of(line, self.columns)
        return photos.by_name

    def _fill(self, row: dict[str, Any], line: Line, photos: _Photos) -> None:
        """Fill the row from the line, up to its first problem in the order of `REJECT_REASONS`, which is raised."""
        name, photo = photos.of(line, self.columns)
        row["photo_id"], row["split"] = photo.photo_id, photo.split
        row["label"] = _label_of(line) if "label" in self.columns else ONLY_LABEL
        x_min, y_min, x_max, y_max = [_coordinate_of(line, column) for column in CORNERS]
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
        return self.sizes.of(photo.photo_id, photo.split or "", name, None)

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


def _check_pixels(edges: Mapping[str, float], end: float, way: str) -> None:
    """Raises `RowProblem` in px, as the file has it; the selection would give fractions."""
    (low, start), (high, stop) = edges.items()
    for name, value in edges.items():
        if not 0 <= value <= end:
            raise RowProblem("outside_photo", f", column {name}: {value:g}, and the photo is {end:g} px {way}")
    if start >= stop:
        hint = f"; is {high} a {'width' if high == 'x_max' else 'height'}?" if start > stop else ""
        raise RowProblem("empty_box", f", column {high}: {stop:g}, not more than {low}, {start:g}{hint}")


def _text_of(line: Line, column: str) -> str | None:
    """A cell as text, without spaces around it; null where it is empty. Raises `RowProblem` for what is no text."""
    value = line.values.get(column)
    if value is None or value == "" or value != value:  # pandas writes NaN for an empty cell.
        return None
    if type(value) is int:
        return str(value)
    if not is_text(value):
        raise RowProblem("bad_row", f", column {column}: {shown(value)} is no text")
    return str(value)


def _label_of(line: Line) -> str | None:
    """The label as text; null where it is empty. The number 2 is the label `2`, also where it was written as 2.0.

    Raises:
        RowProblem: it is neither text nor a number.
    """
    value = line.values.get("label")
    if type(value) is float and math.isfinite(value):
        value = str(value)
    if isinstance(value, str) and _FLOAT_OF_WHOLE.fullmatch(value):
        return value[:-2]
    return value if isinstance(value, str) and is_text(value) and value else _text_of(line, "label")


def _split_of(line: Line) -> str | None:
    """The split that a line names, in any case; null where it is empty. Raises `RowProblem` for what is no split."""
    split = _text_of(line, "split")
    if split is None:
        return None
    word = split.casefold()
    word = {"val": "validation", "valid": "validation"}.get(word, word)
    if word not in SPLITS:
        raise RowProblem("bad_row", f", column split: {shown(split)} is none of {', '.join(SPLITS)}")
    return word


def _side_of(line: Line, column: str) -> int | None:
    """A photo's width or height in px; null where it is empty. Raises `RowProblem`."""
    value = line.values.get(column)
    if value is None or value == "":
        return None
    number = as_number(value)
    if number is None or not number.is_integer() or not 0 < number < 2**31:
        raise RowProblem("bad_row", f", column {column}: {shown(value)} is no whole number of px above 0")
    return int(number)


def _coordinate_of(line: Line, column: str) -> float:
    """An edge of a box. Raises `RowProblem` for what is no finite number."""
    value = line.values.get(column)
    number = as_number(value)
    if number is not None:
        return number
    if value is None or value == "":
        raise RowProblem("bad_number", f", column {column}: is empty")
    comma = " (write a decimal point, not a comma)" if isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value) else ""
    raise RowProblem("bad_number", f", column {column}: {shown(value)} is not a finite number{comma}")
