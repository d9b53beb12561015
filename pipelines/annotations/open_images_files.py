"""Which files of a folder are Open Images' annotations: the names that its versions, its challenges and common tools give them.

Names: the download pages of V1 to V7 and of the challenges of 2018 and 2019 (https://storage.googleapis.com/openimages/web/), the
README of V1 to V3 (https://github.com/openimages/dataset), whose archives hold a folder for each split, and CVAT's exports. A
file of a split may lie in the folder itself or in its subfolder of the split's name. Of several names for the same thing the
first that is there is read; docs/selection.md has the list, and a test compares the two.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.column_names import own_table
from pipelines.annotations.csv_files import read_header
from pipelines.config import SPLITS

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
_OF_SPLITS = ((*BOX_NAMES, *OTHER_BOX_NAMES), METADATA_NAMES)
_TABLE = re.compile(r"\.(csv|tsv|json|jsonl|ndjson|parquet|feather|arrow|xlsx?|ods)(\.(gz|bz2|xz|zst|zip|7z))?$", re.IGNORECASE)
DOCS = "docs/selection.md#files-of-open-images"
# Names in one line; a folder may hold thousands of JSON files of another tool.
_SHOWN = 30


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
        boxes={split: find_boxes(folder, split) for split in splits},
        metadata=own,
        all_metadata=_first(_both(folder / ALL_METADATA_NAME)) if len(own) < len(splits) else None,
        classes=_first(path for name in CLASS_NAMES for path in _both(folder / name)),
        hierarchies=[path for path in (*hierarchies, *others) if path.is_file()],
    )


def find_boxes(folder: Path, split: str) -> list[Path]:
    """The box CSVs of a split: one, or several whose names go on after the published one; gzipped or not.

    Raises:
        InputError: there is none, or they are there under two published names, or both gzipped and not.
    """
    found = {name: _parts(folder, name.format(split)) for name in BOX_NAMES}
    present = [paths for paths in found.values() if paths]
    if len(present) > 1:
        raise InputError(
            f"{folder}: both {present[0][0].name} and {present[1][0].name} are there; move away the one that is not meant"
        )
    if not present:
        inside = _first(_places(folder, split, (*BOX_NAMES, *OTHER_BOX_NAMES)))
        present = [[inside]] if inside else []
    if not present:
        there = sorted(_tables(folder))
        shown = f" (tables that are there: {_listed([path.name for path in there])})" if there else ""
        own = next(filter(None, map(own_boxes, there[:_SHOWN])), None)
        raise InputError(
            f"{folder / BOX_NAMES[0].format(split)}.csv: no such file{shown}; put the split's box CSV there or take `{split}` "
            f"out of build.source.splits; other names that are read: {DOCS}{f'. {own}' if own else ''}"
        )
    for path in present[0]:
        if path.with_name(f"{path.name}.gz") in present[0]:
            raise InputError(f"{path}: it is there gzipped too ({path.name}.gz); move one of the two away, or boxes count twice")
    return present[0]


def own_boxes(path: Path) -> str | None:
    """For a CSV that seems to be boxes of one's own: that it is, and how to read it. Null for any other file."""
    if not path.name.endswith((".csv", ".csv.gz")):
        return None
    try:
        meant = own_table(read_header(path))
    except InputError:
        return None
    return meant and (
        f"{path.name} is no table of Open Images but one of boxes of your own ({meant}); read it with --source.kind boxes "
        f"--source.unit pixel (or fraction) --source.annotations {path} (docs/own-data.md)"
    )


def unread_tables(files: Files, hierarchy: Path | None, reasons: Mapping[Path, str]) -> str | None:
    """One line that names the tables in the folder that are not read, each with a reason where that is plain; null if none is.

    Args:
        files: those that are read.
        hierarchy: the class hierarchy that is read.
        reasons: why others are not.
    """
    read = {*files.paths, hierarchy}
    left = [path for path in sorted(_tables(files.folder)) if path not in read]
    if not left:
        return None
    told = [f"{path.name} ({why})" if (why := reasons.get(path) or _why_left(path, files)) else path.name for path in left]
    return f"{files.folder}: not read: {_listed(told)}; names that are read: {DOCS}"


def _why_left(path: Path, files: Files) -> str | None:
    """Why a file with a name that is known is not read."""
    stem = path.name.partition(".")[0]
    roles: list[tuple[Sequence[str], Path | None]] = [
        (CLASS_NAMES, files.classes),
        ((ALL_METADATA_NAME,), next(iter(files.metadata.values()), None)),
    ]
    for split in SPLITS:
        boxes, metadata = ([name.format(split) for name in names if "{}" in name] for names in _OF_SPLITS)
        if split not in files.boxes and stem in (*boxes, *metadata):
            return f"of {split}, which is not in source.splits"
        roles += [(boxes, next(iter(files.boxes.get(split, ())), None)), (metadata, files.metadata.get(split))]
    chosen = next((chosen for names, chosen in roles if chosen and stem in names), None)
    if chosen:
        return f"{chosen.name} is read for it"
    known = any(stem in names for names, _ in roles)
    return "neither .csv nor .csv.gz" if known and not path.name.endswith((".csv", ".csv.gz")) else None


def _no_folder(folder: Path) -> str:
    if not folder.is_file():
        return f"{folder}: no such folder; set build.source.annotations to the one that holds the box CSVs"
    if ".json" in folder.name:
        return f"{folder}: a file; annotations in COCO's format are read with source.kind: coco (docs/coco.md)"
    if own := own_boxes(folder):
        return f"{folder}: a file; {own}"
    return f"{folder}: a file; set build.source.annotations to the folder that holds Open Images' tables ({DOCS})"


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


def _tables(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if _TABLE.search(path.name) and not path.name.startswith(".") and path.is_file():
            yield path


def _first(paths: Iterator[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {number_of(len(names) - _SHOWN, 'other')}"
