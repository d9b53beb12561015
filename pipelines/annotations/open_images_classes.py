"""Open Images' classes: their names, and which lies below which.

The class hierarchy is there in two layouts: since V4 nodes are ids, {"LabelName": "/m/...", "Subcategory": [...], "Part": [...]};
the one of V2 and V3 (https://github.com/openimages/dataset, assets/bbox_hierarchy.json) has names, {"name": "Fruit", "children":
[...]}, and parts (a person's hand) stand among the children.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.csv_files import open_text

_HEADERS = (["LabelName", "DisplayName"], ["id", "name"])  # V7 has one, older versions have not.


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
                if cells in _HEADERS or not any(cells):
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(cells) != 2:
                    raise InputError(
                        f"{where}: {number_of(len(cells), 'cell')}, expected 2, a class id and a name; is it another file?"
                    )
                label, name = cells
                if names.setdefault(label, name) != name:
                    raise InputError(f"{where}: class {label} has two names, {names[label]} and {name}; keep one")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8, or get the file again") from None
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
    passed_over: Mapping[Path, str] = field(default_factory=dict)
    """Candidates that are not read, and why."""


def find_hierarchy(paths: Sequence[Path], published: Sequence[str], names: Mapping[str, str]) -> Hierarchy:
    """The first class hierarchy that can be read.

    Args:
        paths: candidates, in the order in which they are to be tried.
        published: names without suffix under which hierarchies are published; a damaged one is an error.
        names: class id -> name.

    Raises:
        InputError: a file with a published name is not what it says.
    """
    passed_over: dict[Path, str] = {}
    for place, path in enumerate(paths):
        stem = path.name.partition(".")[0]
        try:
            below, special = read_hierarchy(path, names)
        except NoHierarchyError as error:
            if stem in published:
                raise InputError(
                    f"{path}: not Open Images' class hierarchy ({error}); get the file again, or take it away"
                ) from None
            passed_over[path] = f"no class hierarchy: {error}"
            continue
        passed_over |= dict.fromkeys(paths[place + 1 :], f"{path.name} is read for it")
        note = None if stem in published[:2] else f"class hierarchy: {path}{special}"
        return Hierarchy(path, below, note, passed_over)
    return Hierarchy(passed_over=passed_over)


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
