"""YOLO: a text file for each photo, a line for each box, and a file that says which photos and classes there are.

    data.yaml ──▶ classes, splits ──▶ photos, their label files ──▶ rows: class x y width height   of a box's middle, fractions
                                                                        class x1 y1 x2 y2 x3 y3 ... of an outline

    Ultralytics   data.yaml, images/train/a.jpg, labels/train/a.txt; or lists of photos, train.txt
    Roboflow      data.yaml, train/images/a.jpg, train/labels/a.txt, valid/...
    Darknet       obj.data, obj.names, train.txt, obj_train_data/a.jpg and a.txt side by side
    others        a folder with classes.txt: Label Studio's images/ and labels/, or LabelImg's, all in one

Format: https://docs.ultralytics.com/datasets/detect/, .../segment/, .../obb/, .../pose/ and https://github.com/AlexeyAB/darknet.
Photos are those as viewers show them, as Ultralytics measures them. Names in yaml are text: `no` is a class, not false.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.per_photo import Box, PhotoBoxes, bounds, open_photos
from pipelines.annotations.source import RowProblem, Source, as_number, photo_places, shown
from pipelines.annotations.yolo_files import Entry, list_photos
from pipelines.config import BuildSettings

_YAML = (".yaml", ".yml")
_CLASS_FILES = ("classes.txt", "obj.names", "data.names", "classes.names", "_darknet.labels")
_TASKS = ("detect", "segment", "obb", "pose")
_WHOLE = re.compile(r"\+?[0-9]{1,9}(\.0*)?")


@dataclass(frozen=True)
class DataFile:
    """What data.yaml says, or obj.data, or the names of files where there is neither."""

    path: Path | None
    root: Path
    """From which paths count."""
    splits: Mapping[str, Sequence[str]]
    """Split -> folders and lists of photos; empty where there are no splits."""
    names: Mapping[str, str]
    """Class number -> name; empty where nobody says."""
    task: str = ""
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def open_source(settings: BuildSettings) -> Source:
    """Open YOLO's annotations: a data.yaml, an obj.data, or a folder with one of these, or with classes.txt alone.

    Class ids are the numbers in label files, their names those of data.yaml. A photo without a label file, or with an empty one,
    has no boxes. Splits are those of data.yaml; where it names the same photos for two of them, or none, a hash divides.

    Raises:
        InputError: no such file; a data.yaml that is none; no photo; a setting that these files leave without effect.
    """
    data = find_data(settings.source.annotations)
    listing = list_photos(data.root, data.splits, photo_places(settings), settings.source.splits)
    reader = _Reader(listing.entries, data)
    return open_photos(
        settings,
        reader.read,
        [*data.files, *listing.files],
        class_names=data.names,
        many_files=lambda: ((entry.label_name, entry.label) for entry in listing.entries if entry.label),
        notes=(*data.notes, *listing.notes, *reader.look_through()),
        read_notes=reader.notes,
    )


def find_data(place: Path) -> DataFile:
    """Find and read what says which photos and classes there are.

    Args:
        place: data.yaml, obj.data, or a folder.

    Raises:
        InputError: there is nothing; more than one; or it cannot be read.
    """
    if place.is_file():
        if place.suffix in _YAML:
            return _of_yaml(place)
        if place.suffix == ".data":
            return _of_darknet(place)
        raise InputError(f"{place}: expected YOLO's data.yaml, Darknet's obj.data, or the folder that holds one of them")
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder; set build.source.annotations to data.yaml, or to its folder")
    yamls = sorted(path for path in place.iterdir() if path.suffix in _YAML)
    named = [path for path in yamls if path.name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")]
    found = (named or yamls)[:2]
    if len(found) > 1 and not named:
        raise InputError(f"{place}: {found[0].name} and {found[1].name}: set build.source.annotations to one of them")
    if found:
        return _of_yaml(found[0])
    if darknet := sorted(place.glob("*.data")):
        return _of_darknet(darknet[0])
    names = [place / name for name in _CLASS_FILES if (place / name).is_file()]
    for below in ("labels", "train", "obj_train_data"):
        names += [place / below / name for name in _CLASS_FILES if (place / below / name).is_file()]
    note = () if names else (f"{place}: no data.yaml, obj.data or classes.txt: classes are called by their numbers",)
    return DataFile(None, place, {}, _read_names(names[0]) if names else {}, notes=note, files=tuple(names[:1]))


def _of_yaml(path: Path) -> DataFile:
    """Keys path, train, val, test, names, nc, kpt_shape, task; all others are passed over."""
    try:
        # All that is no list and no mapping stays text.
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: no YAML in UTF-8 that can be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys train, val and names; found {type(content).__name__}")
    splits: dict[str, list[str]] = {}
    for key, split in (("train", "train"), ("val", "validation"), ("valid", "validation"), ("test", "test")):
        value = content.get(key)
        places = [value] if isinstance(value, str) else value or []
        if not isinstance(places, list) or not all(isinstance(text, str) for text in places):
            raise InputError(
                f"{path}: `{key}` is {shown(value)}, expected a folder, a list of photos (.txt), or several of these"
            )
        if places := [text.strip() for text in places if text.strip() not in ("", "null", "~")]:
            splits.setdefault(split, places)
    names, notes = _names_of(content.get("names"), path), []
    if names and str(content.get("nc", len(names))).strip() not in ("", str(len(names))):
        notes.append(f"{path}: nc is {shown(content['nc'])}, and there are {number_of(len(names), 'name')}; the names count")
    if not names:
        notes.append(f"{path}: no `names`: classes are called by their numbers")
    task = str(content.get("task") or ("pose" if content.get("kpt_shape") else ""))
    if task not in ("", *_TASKS):
        raise InputError(f"{path}: `task` is {shown(task)}, expected one of {', '.join(_TASKS)}")
    root = path.parent
    above = str(content.get("path") or "").strip()
    # Where Ultralytics keeps its datasets is not known here: a path that leads nowhere is the folder of the file.
    if above and (path.parent / above).is_dir():
        root = path.parent / above
    return DataFile(path, root, splits, names, task, tuple(notes), (path,))


def _names_of(value: Any, path: Path) -> dict[str, str]:
    if value in (None, "", [], {}):
        return {}
    if isinstance(value, str):  # As some write it: names: [cat, dog] in quotes, or a file of names.
        inside = value.strip().strip("[]")
        value = [name.strip().strip("'\"") for name in inside.split(",")]
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    names: dict[str, str] = {}
    for key, name in pairs:
        number = str(key).strip()
        if not number.isdecimal() or not isinstance(name, str):
            raise InputError(f"{path}: `names` has {shown(key)}: {shown(name)}, expected numbers and names of classes")
        names[str(int(number))] = name.strip() or number
    return names


def _of_darknet(path: Path) -> DataFile:
    """Lines `key = value`: train, valid, names."""
    try:
        lines = [line.partition("=") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
    values = {key.strip(): value.strip() for key, sign, value in lines if sign}
    keys = (("train", "train"), ("valid", "validation"), ("val", "validation"), ("test", "test"))
    splits = {split: [values[key]] for key, split in keys if values.get(key)}
    named = [path.parent / Path(values["names"]).name] if "names" in values else []
    found = [file for file in (*named, *(path.parent / name for name in _CLASS_FILES)) if file.is_file()]
    if not found:
        raise InputError(f"{path}: no file of class names ({values.get('names', 'obj.names')}) beside it; put it there")
    return DataFile(path, path.parent, splits, _read_names(found[0]), files=(path, found[0]))


def _read_names(path: Path) -> dict[str, str]:
    """Class number -> name: a name on each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
    return {str(number): line.strip() or str(number) for number, line in enumerate(lines)}


# Rows.


@dataclass
class _Reader:
    entries: Sequence[Entry]
    data: DataFile
    four_corners: bool = False
    """Whether all outlines have four points: then they are boxes that are turned, and no outlines."""
    with_more: int = 0
    """Rows with a number behind what is read, of the boxes that were last read."""

    def look_through(self) -> list[str]:
        """What the rows of all files together are; what a user should know about it."""
        lengths = {len(line.split()) for entry in self.entries for line in _lines(entry)[0]}
        longer = {length for length in lengths if length > 6}
        self.four_corners = self.data.task == "obb" or (self.data.task == "" and longer == {9})
        if self.four_corners and longer and self.data.task == "":
            return [
                "all outlines have four points, so they are read as oriented boxes: their upright bounds count, and there is no "
                "object mask (with `task: segment` in data.yaml they are outlines)"
            ]
        return []

    def read(self) -> Iterator[PhotoBoxes]:
        """All photos of the wanted splits, in the order of their names."""
        self.with_more = 0
        for entry in self.entries:
            lines, wrong = _lines(entry)
            boxes = [self._box(line, row, entry.problem) for row, line in enumerate(lines, start=1) if line.strip()]
            if wrong:
                boxes.append(Box(None, None, problem=RowProblem("bad_row", wrong)))
            yield PhotoBoxes(entry.photo, boxes, entry.label_name, split=entry.split)

    def notes(self) -> list[str]:
        """What a user should know about the rows that were last read."""
        if not self.with_more:
            return []
        return [
            f"rows with a number more than a box or outline takes (confidence, or a track): {self.with_more:,}; it is not read"
        ]

    def _box(self, line: str, number: int, problem: RowProblem | None) -> Box:
        cells, label = line.split(), None
        try:
            if problem:
                raise problem
            if len(cells) < 5:
                raise RowProblem(
                    "bad_row", f"{number_of(len(cells), 'number')} in {shown(line)}, expected class x y width height"
                )
            label = self._label(cells[0])
            values = [as_number(cell) for cell in cells[1:]]
            if None in values:
                raise RowProblem("bad_number", f"{shown(cells[1 + values.index(None)])} is no finite number")
            numbers = [float(value) for value in values if value is not None]
            return self._shape(label, numbers, number)
        except RowProblem as wrong:
            return Box(label, None, number, problem=wrong)

    def _shape(self, label: str, numbers: list[float], number: int) -> Box:
        if len(numbers) <= 5 or self.data.task == "pose":
            self.with_more += len(numbers) == 5
            x, y, width, height = numbers[:4]
            return Box(label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), number, "fraction")
        if len(numbers) % 2:
            self.with_more += 1
            numbers = numbers[:-1]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        if not all(-0.01 <= value <= 1.01 for value in numbers):
            raise RowProblem("outside_photo", f"an outline with {shown(max(numbers, key=abs))}, expected fractions of the photo")
        outline = None if self.four_corners else [numbers]
        return Box(label, bounds(points, 1, 1), number, "fraction", outline)

    def _label(self, cell: str) -> str:
        if _WHOLE.fullmatch(cell):
            return str(int(float(cell)))
        raise RowProblem("bad_row", f"{shown(cell)} is no number of a class")


def _lines(entry: Entry) -> tuple[list[str], str | None]:
    """The lines of a label file, or what is wrong with it."""
    if entry.label is None:
        return [], None
    try:
        return entry.label.read_text(encoding="utf-8-sig").splitlines(), None
    except UnicodeDecodeError:
        return [], "this is no UTF-8 text; save the file as UTF-8"
    except OSError as error:
        return [], f"the file cannot be read ({error.strerror})"
