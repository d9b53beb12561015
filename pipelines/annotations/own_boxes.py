"""Your own boxes: one CSV, JSON Lines or Parquet file with a box on each line, or a folder of photos (docs/own-data.md).

    photo,x_min,y_min,x_max,y_max,label          ours
    image,xmin,ymin,xmax,ymax,label              VoTT and many others: read, with a note
    filename,width,height,class,xmin,...         TensorFlow's examples: read, with a note
    photo,x,y,width,height                       corner and size, or centre and size? refused
    ...,lable,name                               refused, all names at once
    photo,...,group                              boxes that show the same instance
    photo,...,reference_photo,reference_x_min,...    a table of pairs: what is shown, and where else it is seen

Line by line in Python: about 25,000 rows a second on one core, where the file gives the sizes of photos. Where it does not and
coordinates are px, each photo's header is read once, in 0.1 ms; a PNG takes 20 ms (`pbe_core.images.decode.photo_size`). Memory
holds a batch of rows and an entry of about 0.7 kB for each photo.
"""

import contextlib
import csv
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pbe_core.words import number_of
from pipelines.annotations.coco_file import is_given
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
from pipelines.annotations.groups import folder_of, photos_below, split_names
from pipelines.annotations.own_masks import COLUMNS as MASK_COLUMNS
from pipelines.annotations.own_masks import WITHOUT_MASKS, mask_place, outline_of
from pipelines.annotations.photo_names import PhotoNames, PhotoSizes
from pipelines.annotations.source import (
    ONLY_LABEL,
    UNKNOWN_FLAGS,
    RowProblem,
    Source,
    as_number,
    assign_splits,
    given,
    in_batches,
    is_text,
    photo_id_of,
    photo_places,
    place_box,
    shown,
    splits_are_their_own,
)
from pipelines.config import SPLITS, BuildSettings, SourceSettings
from schemas.tables import BOXES, COORDINATES, PHOTOS

_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_REQUIRED = ("photo", *_CORNERS)
_REFERENCE = tuple(f"reference_{name}" for name in _REQUIRED)
_REFERENCE_MASKS = tuple(f"reference_{name}" for name in MASK_COLUMNS)
_COLUMNS = (
    *(*_REQUIRED, "label", "split", "width", "height", "url", "author", "licence", *MASK_COLUMNS),
    *("group", *_REFERENCE, *_REFERENCE_MASKS),
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
_FRACTION_SLACK = 1e-4
# pandas makes floats of whole numbers where a cell of their column is empty.
_FLOAT_OF_WHOLE = re.compile(r"-?\d+\.0")


def open_source(settings: BuildSettings) -> Source:
    """Own boxes of a build: see `open_boxes`."""
    return open_boxes(settings.source, settings.seed, photo_places(settings).here)


def open_boxes(settings: SourceSettings, seed: int, here: bool = True) -> Source:
    """Open one CSV or JSON Lines file, gzipped or not, or a Parquet file, with a box on each line; or a folder of photos.

    Coordinates are px or fractions as `settings.unit` says, x right and y down from the top left corner of the photo in
    `settings.photo_frame`. Photos' names lead to files below the photo folder as `PhotoNames` reads them. Without labels every
    box is an `object`. Without a column `split`, a hash of the photo's id decides; rows whose photo is not known count under the
    first of `settings.splits`. Photos that share an instance are in one split: then a hash of the instance's name decides.

    Of a folder, each photo in it is one box, the whole photo. Where columns name references, rows of the same box are one box,
    and their references are its.

    Args:
        settings: of the source.
        seed: of the build.
        here: whether photos must lie in the photo folder; else they are in a photo store, or still to be fetched.

    Raises:
        InputError: the file cannot be read as UTF-8 text with a header or with objects, has a column of another name, or its
            first rows do not look like `settings.unit`; a setting that its columns leave without effect.
    """
    path = settings.annotations
    if path.is_dir():
        settings = settings.model_copy(update={"unit": "fraction"})
    columns, first, note = _read_head(path)
    _check_unit(path, settings.unit or "pixel", first)
    if settings.unit == "pixel" and not here and not {"width", "height"} <= set(columns):
        raise InputError(
            f"{path}: boxes in px need the sizes of photos that are still to be crawled; add columns width and height, or write "
            f"the boxes as fractions (source.unit: fraction)"
        )
    if _REFERENCE[0] not in columns and any(name in columns for name in (*_REFERENCE[1:], *_REFERENCE_MASKS)):
        raise InputError(f"{path}: column {_REFERENCE[0]} is missing, of which the others tell the box (docs/own-data.md)")
    if settings.unit == "fraction" and "segmentation" in columns and not here and not {"width", "height"} <= set(columns):
        raise InputError(
            f"{path}: outlines need the sizes of photos that are still to be crawled; add columns width and height, or take the "
            f"column segmentation away"
        )
    if "split" in columns and "validation_share" in given(settings):
        raise splits_are_their_own(str(path))
    roots = [settings.photos]
    reader = _Reader(path, settings, seed, columns, PhotoNames(roots, here), PhotoSizes(settings, roots, here))
    return Source(
        name=str(path),
        files=() if path.is_dir() else (path,),
        frame=settings.photo_frame,
        read_boxes=reader.read_boxes,
        read_photos=reader.read_photos,
        class_names={} if "label" in columns else {ONLY_LABEL: ONLY_LABEL},
        read_elsewhere=reader.hash_photos,
        read_notes=reader.names.notes,
        rows=_count(path),
        groups=reader.grouped,
        notes=(f"{path}: {note}",) if note else (),
        no_masks="" if set(MASK_COLUMNS) & set(columns) else WITHOUT_MASKS,
    )


# Columns and lines.


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


def _columns_of(names: tuple[str, ...]) -> _Columns:
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


def _read_head(path: Path) -> tuple[Sequence[str | None], list[Line], str | None]:
    """The columns (of JSON Lines, those that are in use), the first rows, and a note where names of columns are not ours."""
    if path.is_dir():
        lines = list(itertools.islice(_read_lines(path, _REQUIRED), _HEAD_ROWS))
        if not lines:
            raise InputError(f"{path}: no photo in it; set build.source.annotations to a folder of photos, or to a file of boxes")
        return _REQUIRED, lines, None
    if not path.is_file():
        raise InputError(f"{path}: no such file; set build.source.annotations to your CSV or JSON Lines file (docs/own-data.md)")
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: its name must end in {', '.join(_SUFFIXES)}; COCO's format is read with source.kind: coco")
    if _is_parquet(path):
        return _parquet_head(path)
    number, first = next(raw_lines(path), (0, b""))
    if not first:
        raise InputError(f"{path}: this file is empty")
    if b"\0" in first:
        raise InputError(f"{path}, line {number}: this is no UTF-8 text (UTF-16?); save the file as UTF-8")
    trouble = None
    if _is_json(path):
        objects = list(itertools.islice(parsed_lines(path, json_line), _HEAD_ROWS))
        names = [str(key) for line in objects for key in line.values]
        trouble = None if names else objects[0].problem
    else:
        try:
            names = [cell.strip() for cell in next(csv.reader([first.decode()], strict=True, skipinitialspace=True))]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}, line {number}: no header of a CSV in UTF-8 ({error})") from None
    found = _columns_of(tuple(dict.fromkeys(names) if _is_json(path) else names))
    if problem := trouble or found.problem():
        raise InputError(f"{path}, line {number}: {problem}")
    lines = list(itertools.islice(_read_lines(path, _COLUMNS if _is_json(path) else found.columns), _HEAD_ROWS))
    used = [name for name in _COLUMNS if any(line.values.get(name) is not None for line in lines)]
    return used if _is_json(path) else found.columns, lines, found.note


def _parquet_head(path: Path) -> tuple[Sequence[str | None], list[Line], str | None]:
    found = _columns_of(parquet_columns(path))
    if problem := found.problem():
        raise InputError(f"{path}: {problem}")
    lines = list(itertools.islice(parquet_lines(path, found.columns), _HEAD_ROWS))
    if not lines:
        raise InputError(f"{path}: this file is empty")
    return found.columns, lines, found.note


def _check_unit(path: Path, unit: str, head: Sequence[Line]) -> None:
    """Compare the declared unit with the first rows."""
    corners = ([as_number(line.values.get(name)) for name in _CORNERS] for line in head)
    whole = [[value for value in row if value is not None] for row in corners]
    largest = [max(row) for row in whole if len(row) == len(_CORNERS)]
    beyond = sum(value > _LARGEST_FRACTION for value in largest)
    other = "pixel" if unit == "fraction" and 2 * beyond > len(largest) else None
    other = "fraction" if unit == "pixel" and largest and not beyond else other
    if other:
        raise InputError(
            f"{path}: of the first {number_of(len(largest), 'row')} {beyond or 'none'} {'has' if beyond < 2 else 'have'} a "
            f"coordinate above {_LARGEST_FRACTION}: the file seems to be in {other}s; set source.unit: {other}"
        )


def _is_parquet(path: Path) -> bool:
    return path.name.endswith(".parquet")


def _count(path: Path) -> int:
    """About how many lines there are."""
    if path.is_dir():
        return sum(1 for _ in photos_below(path))
    return pq.read_metadata(path).num_rows if _is_parquet(path) else count_rows(path)


def _is_json(path: Path) -> bool:
    """Whether the file is JSON Lines, by its name; else it is CSV."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _read_lines(path: Path, columns: Sequence[str | None]) -> Iterator[Line]:
    """The lines below the header; a key of JSON that is no column is an error of the file."""
    if path.is_dir():
        for number, name in enumerate(photos_below(path), start=1):
            yield Line(number, dict(zip(_REQUIRED, (name, 0.0, 0.0, 1.0, 1.0), strict=True)))
        return
    if _is_parquet(path):
        yield from parquet_lines(path, columns)
        return
    if not _is_json(path):
        yield from parsed_lines(path, functools.partial(csv_line, columns), after=next(raw_lines(path))[0])
        return
    for line in parsed_lines(path, json_line):
        meant, problem = _meaning_of(tuple(line.values))
        values = dict(zip(meant, line.values.values(), strict=True))
        late = [
            name
            for name in ("label", "split", "group", *_REFERENCE, *_REFERENCE_MASKS)
            if name not in columns and values.get(name) is not None
        ]
        if problem or late:
            wrong = problem or f"the first `{late[0]}`; give it on all lines from the first on"
            raise InputError(f"{path}, line {line.number}: {wrong}")
        yield Line(line.number, values, line.problem)


@functools.lru_cache(maxsize=1024)
def _meaning_of(keys: tuple[str, ...]) -> tuple[Sequence[str | None], str | None]:
    """What the keys of an object mean, and what is wrong with them: most lines have the same ones."""
    found = _columns_of(keys)
    return found.columns, found.problem(required=())


# Rows and photos.


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
    outlined: bool = False  # Whether a line gives an outline, which counts in px.


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
            if (other := self.name_of.setdefault(photo.photo_id, name)) != name:
                raise RowProblem("bad_row", f", column photo: {name!r} and {other!r} get the same id; rename one of the files")
            self.by_name[name] = photo
        for column, value in {**fixed, **texts}.items():
            before = getattr(photo, column)
            if column in fixed and None not in (before, value) and before != value:
                raise RowProblem(
                    "bad_row", f", column {column}: {value!r}, but {before!r} in line {photo.line} for the same photo"
                )
            if before is None:
                setattr(photo, column, value)
        photo.outlined |= is_given(line.values.get("segmentation"))
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

    @property
    def paired(self) -> bool:
        """Whether lines name references."""
        return _REFERENCE[0] in self.columns

    @property
    def grouped(self) -> bool:
        """Whether it is known which boxes show the same instance."""
        return self.paired or "group" in self.columns or self.settings.group_by == "folder"

    def read_boxes(self) -> Iterator[pa.RecordBatch]:
        boxes = self._with_references() if self.paired else self._boxes()
        yield from in_batches(self._of_wanted_splits(boxes), BOXES)

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._of_wanted_splits(self._photo_rows()), PHOTOS)

    def hash_photos(self) -> dict[str, str]:
        """Hashes of the photos' sizes and paths, as far as they depend on what lies in the photo folder: what comes or goes there
        changes them.
        """
        photos = self._all_photos()
        hashes = {"paths of photos": repr(sorted(photos))} if self.names.moved or self.path.is_dir() else {}
        sized = [(name, photo) for name, photo in sorted(photos.items()) if self._is_sized(photo)]
        if sized or self.settings.unit == "pixel":
            sizes: list[tuple[str, str]] = []
            for name, photo in sized:
                try:
                    sizes.append((name, str(self._size(name, photo))))
                except PhotoError as error:
                    sizes.append((name, error.code))
            hashes["sizes of photos"] = repr(sizes)
        found = {what: hashlib.sha256(text.encode()).hexdigest() for what, text in hashes.items()}
        if "mask" in self.columns:
            digest = hashlib.sha256()
            for row in self._boxes():
                digest.update(repr((row["row"], row.get("segmentation"))).encode())
            found["places of masks"] = digest.hexdigest()
        return found

    def _boxes(self) -> Iterator[dict[str, Any]]:
        photos = _Photos(self.names)
        above = 1 if self.path.is_file() and not (_is_json(self.path) or _is_parquet(self.path)) else 0
        for line in _read_lines(self.path, self.columns):
            row = {**UNKNOWN_FLAGS, "file": self.path.name, "row": line.number - above}
            try:
                self._fill(row, line, photos)
            except RowProblem as problem:
                row.update(problem=problem.reason, detail=f"{self.path.name}, line {line.number}{problem}")
            yield row

    def _with_references(self) -> Iterator[dict[str, Any]]:
        """The boxes of a table of pairs, which may name several references of a box: one row each, where it is named first.

        Holds all of them: the last line may name a reference of the first one's box.
        """
        boxes: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self._boxes():
            if row.get("problem"):
                yield row
                continue
            first = boxes.setdefault(tuple(row[name] for name in ("photo_id", "split", "label", *COORDINATES)), row)
            if first is not row:
                more = [each for each in row["references"] or () if each not in (first["references"] or ())]
                first["references"] = [*(first["references"] or ()), *more] or None
                first["group"] = first["group"] or row["group"]
        yield from boxes.values()

    def _photo_rows(self) -> Iterator[dict[str, Any]]:
        for name, photo in self._all_photos().items():
            with contextlib.suppress(PhotoError):  # Its boxes are rows with this problem.
                width, height = self._size(name, photo) if self._is_sized(photo) else (photo.width, photo.height)
                known = {key: getattr(photo, key) for key in ("photo_id", "split", "url", "author", "licence")}
                yield {**known, "file_name": name, "width": width, "height": height}

    def _all_photos(self) -> dict[str, _Photo]:
        """By file name; a line that cannot be read is among the boxes, with its problem."""
        photos = _Photos(self.names)
        for line in _read_lines(self.path, self.columns):
            with contextlib.suppress(RowProblem):
                photos.of(line, self.columns)
                if self.paired:
                    photos.of(_reference_line(line), self.columns)
        return photos.by_name

    def _fill(self, row: dict[str, Any], line: Line, photos: _Photos) -> None:
        """Fill the row from the line, up to its first problem in the order of `REJECT_REASONS`, which is raised."""
        name, photo = photos.of(line, self.columns)
        row["photo_id"], row["split"] = photo.photo_id, photo.split
        row["label"] = _label_of(line) if "label" in self.columns else ONLY_LABEL
        edges = [_coordinate_of(line, column) for column in _CORNERS]
        size, slack = (1.0, 1.0), (_FRACTION_SLACK, _FRACTION_SLACK)
        if self.settings.unit == "pixel":
            try:
                size, slack = self._size(name, photo), (1.0, 1.0)
            except PhotoError as error:
                raise RowProblem("unknown_photo", f", column photo: the size of {name!r} cannot be read ({error})") from None
        elif photo.width and photo.height:
            slack = 1 / photo.width, 1 / photo.height
        try:
            place_box(row, edges, size, slack, self.settings.unit or "pixel")
        except RowProblem as problem:
            raise RowProblem(problem.reason, f", column {problem}") from None
        row["segmentation"] = self._mask(line, name, photo)
        row["group"] = self._group_of(name, line)
        if self.paired:
            row["references"] = self._references_of(line, photo, photos)

    def _group_of(self, name: str, line: Line) -> str | None:
        group = _label_of(line, "group") if "group" in self.columns else None
        if self.settings.group_by == "column":
            return group
        # Numbers of tracks start anew in each video.
        return "/".join(part for part in (folder_of(name), group) if part) or None

    def _references_of(self, line: Line, target: _Photo, photos: _Photos) -> list[dict[str, Any]] | None:
        """The reference that a line names, as `schemas.tables.REFERENCE` has it; null where its cells are empty.

        Raises:
            RowProblem: it cannot be read, or is the photo itself.
        """
        if all(line.values.get(name) in (None, "") for name in (*_REFERENCE, *_REFERENCE_MASKS)):
            return None
        named = _reference_line(line)
        name, photo = photos.of(named, self.columns)
        if photo is target:
            raise RowProblem("bad_row", f", column {_REFERENCE[0]}: is the photo itself; a reference is from another photo")
        box: dict[str, Any] = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}  # Without edges, the whole photo.
        if any(line.values.get(edge) not in (None, "") for edge in _REFERENCE[1:]):
            try:
                edges = [_coordinate_of(line, edge) for edge in _REFERENCE[1:]]
                size = (1.0, 1.0) if self.settings.unit == "fraction" else self._size(name, photo)
                place_box(
                    box, edges, size, (1.0, 1.0) if self.settings.unit == "pixel" else (_FRACTION_SLACK, _FRACTION_SLACK), "pixel"
                )
            except PhotoError as error:
                raise RowProblem(
                    "unknown_photo", f", column {_REFERENCE[0]}: the size of {name!r} cannot be read ({error})"
                ) from None
            except RowProblem as problem:
                raise RowProblem(problem.reason, f", reference: {str(problem).removeprefix(', ')}") from None
        try:
            mask = self._mask(named, name, photo)
        except RowProblem as problem:
            raise RowProblem(problem.reason, f", reference: {str(problem).removeprefix(', ')}") from None
        known = {key: getattr(photo, key) for key in ("photo_id", "width", "height", "url", "author", "licence")}
        if mask:
            known["width"], known["height"] = self._size(name, photo)  # Its outline is over so many px.
        return [{**known, **box, "segmentation": mask, "file_name": name, "rotation": None}]

    @functools.cached_property
    def _split_names(self) -> dict[str, str]:
        """Photo -> what decides its split, of photos that share an instance with others, or may."""
        return split_names(self._links()) if self.grouped else {}

    def _links(self) -> Iterator[tuple[str, str | None, str | None]]:
        """Of each line that can be read: its photo, its group and its reference's photo."""
        photos = _Photos(self.names)
        for line in _read_lines(self.path, self.columns):
            with contextlib.suppress(RowProblem):
                name, photo = photos.of(line, self.columns)
                group, other = self._group_of(name, line), None
                if self.paired and line.values.get(_REFERENCE[0]) not in (None, ""):
                    with contextlib.suppress(RowProblem):
                        other = photos.of(_reference_line(line), self.columns)[1].photo_id
                yield photo.photo_id, group, other

    def _mask(self, line: Line, name: str, photo: _Photo) -> str | None:
        """The object's mask, as a table's `segmentation` holds it."""
        outline, file = (line.values.get(column) for column in MASK_COLUMNS)
        if is_given(outline) and is_given(file):
            raise RowProblem("bad_row", ", column mask: there is a `segmentation` too; give one of them")
        known = (photo.width, photo.height) if photo.width and photo.height else None
        if is_given(file):
            return mask_place(file, self._size(name, photo) if self._is_sized(photo) else known, self.settings)
        if not is_given(outline):
            return None
        try:
            return outline_of(outline, self._size(name, photo), self.settings.unit or "pixel")
        except PhotoError as error:
            raise RowProblem("unknown_photo", f", column photo: the size of {name!r} cannot be read ({error})") from None

    def _is_sized(self, photo: _Photo) -> bool:
        """Whether the size of a photo must be known, as something is said about it in px."""
        return self.settings.unit == "pixel" or photo.outlined

    def _size(self, name: str, photo: _Photo) -> tuple[int, int]:
        if photo.width and photo.height:
            return photo.width, photo.height
        return self.sizes.of(photo.photo_id, photo.split or "", name, None)

    def _of_wanted_splits(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of `settings.splits`; those without a split get theirs first, many at once."""
        while batch := list(itertools.islice(rows, 1000)):
            undecided = [row for row in batch if row.get("split") is None and "photo_id" in row]
            names = [self._split_names.get(row["photo_id"], row["photo_id"]) for row in undecided] if self.grouped else []
            names = names or [row["photo_id"] for row in undecided]
            splits = assign_splits(names, self.seed, self.settings.validation_share)
            for row, split in zip(undecided, splits, strict=True):
                row["split"] = split
            for row in batch:
                if row.setdefault("split", self.settings.splits[0]) in self.settings.splits:
                    yield row


# Cells.


def _reference_line(line: Line) -> Line:
    """A line of a table of pairs as one about the reference's photo, of which it says no more than the name and the split."""
    told = {"photo": line.values.get(_REFERENCE[0]), "split": line.values.get("split")}
    masks = {name: line.values.get(column) for name, column in zip(MASK_COLUMNS, _REFERENCE_MASKS, strict=True)}
    return Line(line.number, told | masks, line.problem)


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


def _label_of(line: Line, column: str = "label") -> str | None:
    """The label, or group, as text; null where it is empty. The number 2 is `2`, also where it was written as 2.0."""
    value = line.values.get(column)
    if type(value) is float and math.isfinite(value):
        value = str(value)
    if isinstance(value, str) and _FLOAT_OF_WHOLE.fullmatch(value):
        return value[:-2]
    return value if isinstance(value, str) and is_text(value) and value else _text_of(line, column)


def _split_of(line: Line) -> str | None:
    """The split that a line names, in any case; null where it is empty."""
    split = _text_of(line, "split")
    if split is None:
        return None
    word = {"val": "validation", "valid": "validation"}.get(split.casefold(), split.casefold())
    if word not in SPLITS:
        raise RowProblem("bad_row", f", column split: {shown(split)} is none of {', '.join(SPLITS)}")
    return word


def _side_of(line: Line, column: str) -> int | None:
    """A photo's width or height in px; null where it is empty."""
    value = line.values.get(column)
    if value is None or value == "":
        return None
    number = as_number(value)
    if number is None or not number.is_integer() or not 0 < number < 2**31:
        raise RowProblem("bad_row", f", column {column}: {shown(value)} is no whole number of px above 0")
    return int(number)


def _coordinate_of(line: Line, column: str) -> float:
    """An edge of a box."""
    value = line.values.get(column)
    number = as_number(value)
    if number is None:
        wrong = "is empty" if value is None or value == "" else f"{shown(value)} is no finite number"
        raise RowProblem("bad_number", f", column {column}: {wrong}")
    return number
