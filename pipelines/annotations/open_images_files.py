"""Which files of a folder are Open Images' annotations, and what stands in those of the classes.

Names are those of its versions, its challenges and common tools: the download pages of V1 to V7 and of the challenges of 2018 and
2019 (https://storage.googleapis.com/openimages/web/), the README of V1 to V3 (https://github.com/openimages/dataset), whose
archives hold a folder for each split, and CVAT's exports. A file of a split may lie in the folder itself or in its subfolder of
the split's name. Of several names for the same thing the first that is there is read; docs/selection.md has the list.

The class hierarchy is there in two layouts: since V4 nodes are ids, {"LabelName": "/m/...", "Subcategory": [...], "Part": [...]};
the one of V2 and V3 (assets/bbox_hierarchy.json) has names, {"name": "Fruit", "children": [...]}, and parts (a person's hand)
stand among the children.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.csv_files import open_text, read_header
from pipelines.annotations.own_table import is_own_table

# A split's boxes: its file, or parts of it, whose names go on after this. Two of the first group are two answers to one question.
BOX_NAMES = ("{}-annotations-bbox", "oidv6-{}-annotations-bbox")
# Read where none of the above is there.
OTHER_BOX_NAMES = ("annotations-human-bbox", "challenge-2019-{}-detection-bbox", "challenge-2018-{}-annotations-bbox")
METADATA_NAMES = (
    "{}-images-boxable-with-rotation",
    "{}-images-with-rotation",
    "oidv6-{}-images-with-labels-with-rotation",
    "{}-images-with-labels-with-rotation",
    "{}-image_ids_and_rotation",
    "{}-images-boxable",
    "{}-images-with-labels",
    "{}-images",
    "images",
)
# One file for all splits, with a column that says whose a photo is; read for the splits that have none of the above.
ALL_METADATA_NAME = "image_ids_and_rotation"
CLASS_NAMES = (
    "class-descriptions-boxable",
    "oidv7-class-descriptions-boxable",
    "oidv6-class-descriptions-boxable",
    "challenge-2019-classes-description-500",
    "challenge-2018-class-descriptions-500",
    "oidv7-class-descriptions",
    "oidv6-class-descriptions",
    "class-descriptions",
)
# Tried before any other JSON with `hierarchy` in its name, such as the bbox_hierarchy.json of V2 and V3.
HIERARCHY_NAMES = (
    "bbox_labels_600_hierarchy",
    "oidv7-bbox-labels-600-hierarchy",
    "bbox_labels_500_hierarchy",
    "challenge-2019-label500-hierarchy",
)
DOCS = "docs/selection.md#files-of-open-images"
_TABLES = (".csv", ".csv.gz", ".tsv", ".json", ".json.gz", ".jsonl", ".parquet")
# Names in one line; a folder may hold thousands of JSON files of another tool.
_SHOWN = 30
_CLASS_HEADERS = (["LabelName", "DisplayName"], ["id", "name"])  # V7 has one, older versions have not.


@dataclass(frozen=True)
class Files:
    """What was found in a folder."""

    folder: Path
    boxes: dict[str, list[Path]]
    """By split."""
    metadata: dict[str, Path]
    """By split, for those that have a file of their own."""
    all_metadata: Path | None
    """The file that serves the other splits."""
    classes: Path | None
    hierarchies: list[Path]
    """In the order in which they are to be tried."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them, but for the hierarchies."""
        found = [*(path for paths in self.boxes.values() for path in paths), *self.metadata.values()]
        return tuple(path for path in (*found, self.all_metadata, self.classes) if path is not None)

    def name_of(self, path: Path) -> str:
        """What to call a file in tables and messages: its path below the folder."""
        return path.relative_to(self.folder).as_posix()


def find_files(folder: Path, splits: Sequence[str]) -> Files:
    """The files that are to be read for some splits.

    Raises:
        InputError: the folder or a split's boxes are missing, or boxes are there twice.
    """
    if not folder.is_dir():
        raise InputError(_no_folder(folder))
    metadata = {split: _first(_places(folder, split, METADATA_NAMES)) for split in splits}
    own = {split: path for split, path in metadata.items() if path is not None}
    hierarchies = [path for name in HIERARCHY_NAMES for path in (folder / f"{name}.json", folder / f"{name}.json.gz")]
    others = sorted({*folder.glob("*hierarchy*.json"), *folder.glob("*hierarchy*.json.gz")} - set(hierarchies))
    return Files(
        folder=folder,
        boxes={split: _find_boxes(folder, split) for split in splits},
        metadata=own,
        all_metadata=_first(_both(folder / ALL_METADATA_NAME)) if len(own) < len(splits) else None,
        classes=_first(path for name in CLASS_NAMES for path in _both(folder / name)),
        hierarchies=[path for path in (*hierarchies, *others) if path.is_file()],
    )


def unread_tables(files: Files, hierarchy: Path | None) -> str | None:
    """One line that names the tables in the folder that are not read; null if there are none."""
    left = [path.name for path in _tables_in(files.folder) if path not in {*files.paths, hierarchy}]
    return f"{files.folder}: not read: {_listed(left)}; names that are read: {DOCS}" if left else None


def own_boxes_hint(path: Path) -> str | None:
    """How to read a CSV that is no table of Open Images but one of boxes of one's own; null for any other file."""
    try:
        is_own = path.name.endswith((".csv", ".csv.gz")) and is_own_table(read_header(path))
    except InputError:
        return None
    read = f"--source.kind boxes --source.unit pixel (or fraction) --source.annotations {path}"
    return f"{path.name} seems to be boxes of your own; read it with {read} (docs/own-data.md)" if is_own else None


def read_class_names(path: Path) -> dict[str, str]:
    """Class id -> name.

    Raises:
        InputError: a line has not two cells, all are empty, or an id comes twice.
    """
    names: dict[str, str] = {}
    empty = 0
    try:
        with open_text(path) as file:
            reader = csv.reader(file)
            for row in reader:
                cells = [cell.strip() for cell in row]
                empty += bool(cells) and not any(cells)
                if cells in _CLASS_HEADERS or not any(cells):
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(cells) != 2:
                    raise InputError(f"{where}: {number_of(len(cells), 'cell')}, expected 2, a class id and a name")
                label, name = cells
                if names.setdefault(label, name) != name:
                    raise InputError(f"{where}: class {label} has two names, {names[label]} and {name}; keep one")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except (EOFError, OSError, zlib.error, csv.Error) as error:
        raise InputError(f"{path}: the file is cut off or damaged ({error}); get the file again") from None
    if empty and not names:
        raise InputError(f"{path}: all cells of {number_of(empty, 'row')} are empty; get the file again")
    return names


class NoHierarchyError(Exception):
    """A file is no class hierarchy in a layout that is read; the message says why."""


@dataclass(frozen=True)
class Hierarchy:
    """The class hierarchy that is read, if one is."""

    path: Path | None = None
    below: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class id -> ids of the classes directly below."""
    note: str | None = None
    """What a user should know about the choice."""


def find_hierarchy(paths: Sequence[Path], names: Mapping[str, str]) -> Hierarchy:
    """The first class hierarchy that can be read.

    Args:
        paths: candidates, in the order in which they are to be tried.
        names: class id -> name.

    Raises:
        InputError: a file with a published name is not what it says.
    """
    for path in paths:
        stem = path.name.partition(".")[0]
        try:
            below, special = read_hierarchy(path, names)
        except NoHierarchyError as error:
            if stem in HIERARCHY_NAMES:
                raise InputError(f"{path}: not Open Images' class hierarchy ({error}); get the file again") from None
            continue
        return Hierarchy(path, below, None if stem in HIERARCHY_NAMES[:2] else f"class hierarchy: {path}{special}")
    return Hierarchy()


def read_hierarchy(path: Path, names: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Class id -> ids of the classes directly below it, and what is special about the file, as the end of a sentence or nothing.

    Parts (`Part`: a hand of a person) are not below, where the layout tells them apart. A group that is no class (`Entity`) is
    known by the word in the file.

    Args:
        path: JSON in one of the two layouts, gzipped or not.
        names: class id -> name, for the layout that has names.

    Raises:
        NoHierarchyError: it is none of the two.
    """
    try:
        root = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        if "LabelName" in root:
            return _tree(root, "LabelName", "Subcategory", {}), ""
        if "name" in root and "children" in root:
            return _by_names(root, names)
        keys = ", ".join(sorted(root)[:6])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise NoHierarchyError(f"{type(error).__name__}: {error}") from None
    raise NoHierarchyError(f"its keys are {keys}, expected LabelName and Subcategory, or name and children")


def _by_names(root: dict[str, Any], names: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...]], str]:
    ids: dict[str, list[str]] = {}
    for label, name in names.items():
        ids.setdefault(name.casefold(), []).append(label)
    below = _tree(root, "name", "children", ids)
    if not below.keys() & names.keys():
        raise NoHierarchyError("none of its names is the name of a class in the class list")
    return below, ", in which a part (a person's hand) lies below its whole"


def _tree(root: dict[str, Any], key: str, children: str, ids: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """All nodes, by id; a node may stand in several places. Goes through parts too, as these have classes below them."""

    def ids_of(node: dict[str, Any]) -> Sequence[str]:
        word = node[key].strip()
        return ids.get(word.casefold(), (word,))

    below: dict[str, tuple[str, ...]] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        inner = node.get(children, [])
        found = [label for child in inner for label in ids_of(child)]
        for label in ids_of(node):
            known = below.get(label, ())
            below[label] = (*known, *dict.fromkeys(child for child in found if child not in known))
        stack += [*inner, *node.get("Part", [])]
    return below


def _find_boxes(folder: Path, split: str) -> list[Path]:
    """The box CSVs of a split: one, or several whose names go on after the published one; gzipped or not."""
    found = {name: _parts(folder, name.format(split)) for name in BOX_NAMES}
    present = [paths for paths in found.values() if paths]
    if len(present) > 1:
        raise InputError(f"{folder}: both {present[0][0].name} and {present[1][0].name} are there; move one of them away")
    if not present:
        inside = _first(_places(folder, split, (*BOX_NAMES, *OTHER_BOX_NAMES)))
        present = [[inside]] if inside else []
    if not present:
        there = _tables_in(folder)
        listed = f" (tables that are there: {_listed([path.name for path in there])})" if there else ""
        own = next(filter(None, map(own_boxes_hint, there[:_SHOWN])), None)
        raise InputError(
            f"{folder / BOX_NAMES[0].format(split)}.csv: no such file{listed}; put the split's box CSV there or take `{split}` "
            f"out of build.source.splits; other names that are read: {DOCS}{f'. {own}' if own else ''}"
        )
    for path in present[0]:
        if path.with_name(f"{path.name}.gz") in present[0]:
            raise InputError(f"{path}: it is there gzipped too ({path.name}.gz); move one of the two away, or boxes count twice")
    return present[0]


def _no_folder(folder: Path) -> str:
    if not folder.is_file():
        return f"{folder}: no such folder; set build.source.annotations to the one that holds the box CSVs"
    if ".json" in folder.name:
        return f"{folder}: a file; annotations in COCO's format are read with source.kind: coco (docs/coco.md)"
    own = own_boxes_hint(folder)
    return f"{folder}: a file; {own or f'set build.source.annotations to the folder that holds the tables ({DOCS})'}"


def _both(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}.csv")
    yield path.with_name(f"{path.name}.csv.gz")


def _places(folder: Path, split: str, names: Sequence[str]) -> Iterator[Path]:
    """Where a file of a split may lie; a name without the split's means something in the split's own folder alone."""
    for name in names:
        if "{}" in name:
            yield from _both(folder / name.format(split))
    for name in names:
        yield from _both(folder / split / name.format(split))


def _parts(folder: Path, name: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{name}*.csv*") if path.name.endswith((".csv", ".csv.gz")) and path.is_file())


def _tables_in(folder: Path) -> list[Path]:
    paths = (path for path in folder.iterdir() if path.name.casefold().endswith(_TABLES) and path.is_file())
    return sorted(path for path in paths if not path.name.startswith("."))


def _first(paths: Iterator[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_SHOWN])
    return listed if len(names) <= _SHOWN else f"{listed} and {number_of(len(names) - _SHOWN, 'other')}"
