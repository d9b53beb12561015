"""Open Images: box CSVs, class names, class hierarchy and photo metadata, under the names they are published with.

Format: https://storage.googleapis.com/openimages/web/download_v7.html. The CSV's order is XMin, XMax, YMin, YMax, fractions of
the stored photo, whatever its EXIF says; flags are 1, 0 or -1 (unknown). `Rotation` is the number of degrees counterclockwise by
which photo and boxes are to be turned, empty where nobody knows
(https://storage.googleapis.com/openimages/web/2018-05-17-rotation-information.html). Tables of other photos in this format may be
of photos as viewers show them (`source.frame: exif`), but then have no `Rotation`, which counts from the stored photo.

Names are those of its versions, its challenges and common tools: the download pages of V1 to V7 and of the challenges of 2018 and
2019 (https://storage.googleapis.com/openimages/web/), the README of V1 to V3 (https://github.com/openimages/dataset), whose
archives hold a folder for each split, and CVAT's exports. A file of a split may lie in the folder itself or in its subfolder of
the split's name. Of several names for the same thing the first that is there is read; docs/selection.md has the list.
"""

import base64
import csv
import functools
import gzip
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.csv_files import CsvRows, check_header, count_rows, raw_lines, stream_csv
from pipelines.annotations.open_images_masks import WITHOUT_MASKS, find_masks
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings, SourceSettings
from schemas.tables import BOXES, COORDINATES, FLAGS, PHOTOS, WORD, one_word

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
_CLASS_HEADERS = (["LabelName", "DisplayName"], ["id", "name"])  # V7 has one, older versions have not.
_TABLES = (".csv", ".csv.gz", ".tsv", ".json", ".json.gz", ".jsonl", ".parquet")
# Names in one line; a folder may hold thousands of JSON files of another tool.
_SHOWN = 30

_EDGES = dict(zip(("XMin", "XMax", "YMin", "YMax"), COORDINATES, strict=True))
# The training boxes of V2 and V3 have no flags, those of the challenges one.
_FLAGS = dict(zip(("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"), FLAGS, strict=True))
_BOX_COLUMNS = {"ImageID": "photo_id", "LabelName": "label", **_EDGES, **_FLAGS}
_BOX_TYPES = {**dict.fromkeys(_BOX_COLUMNS, pa.float64()), "ImageID": pa.string(), "LabelName": WORD}
_BOX_CSV = "Open Images' box CSV (boxes of your own: --source.kind boxes, docs/own-data.md)"
_BOXES_NEED = ("ImageID", "LabelName", *_EDGES)
_METADATA_COLUMNS = {
    "ImageID": ("photo_id", pa.string()),
    "OriginalURL": ("url", pa.string()),
    "Author": ("author", pa.string()),
    "License": ("licence", WORD),
    "Rotation": ("rotation", pa.float64()),
    "OriginalMD5": ("original_md5", pa.string()),
    "OriginalSize": ("original_bytes", pa.float64()),
    "Thumbnail300KURL": ("thumbnail_url", pa.string()),
    "Subset": ("split", WORD),
}
# The oldest mirrors have these columns alone.
_METADATA_NEEDS = ("ImageID", "OriginalURL", "License", "Author")
_NO_MD5 = base64.b64encode(bytes(16)).decode()
_LOOKED_AT = 1000


def open_source(settings: BuildSettings) -> Source:
    """Open Images' annotations of a build: see `open_open_images`."""
    return open_open_images(settings.source)


def open_open_images(settings: SourceSettings) -> Source:
    """Find the files, check their headers and first rows.

    Raises:
        InputError: a file is missing, is there twice, or is not what its name says; photos would be turned twice.
    """
    files = _find_files(settings.annotations, settings.splits)
    names = _read_class_names(files.classes) if files.classes else {}
    hierarchy, subclasses = _find_hierarchy(files.hierarchies, names)
    for path in filter(None, (*files.metadata.values(), files.all_metadata)):
        if "Rotation" in _metadata_header(path, path == files.all_metadata) and settings.photo_frame == "exif":
            raise InputError(
                f"{path}: its column Rotation turns the photos as stored, and source.frame: exif would turn them too; leave "
                f"source.frame out, or take the column out of the file"
            )
    boxes = [path for paths in files.boxes.values() for path in paths]
    notes = _missing_flags(files, boxes)
    if hierarchy and hierarchy.name.partition(".")[0] not in HIERARCHY_NAMES[:2]:
        notes.insert(0, f"class hierarchy: {hierarchy}")
    masks, more = find_masks(files.folder, settings.splits, lambda split, of: _first(_places(files.folder, split, of)))
    notes += more
    tables = (*boxes, *files.metadata.values(), files.all_metadata, files.classes, hierarchy, *masks.tables.values())
    read = tuple(path for path in tables if path)
    if left := sorted(path.name for path in files.folder.iterdir() if _is_table(path) and path not in read):
        shown = ", ".join(left[:_SHOWN]) + (f" and {number_of(len(left) - _SHOWN, 'other')}" if len(left) > _SHOWN else "")
        notes.append(f"{files.folder}: not read: {shown}; names that are read: {DOCS}")
    return Source(
        name=str(settings.annotations),
        files=read,
        frame=settings.photo_frame,
        read_boxes=functools.partial(_read_all_boxes, files),
        read_photos=functools.partial(_read_all_photos, files),
        listed_splits=frozenset(files.boxes if files.all_metadata else files.metadata),
        class_names=names,
        subclasses=subclasses,
        rows=sum(map(count_rows, boxes)),
        notes=tuple(notes),
        read_masks=masks.read if masks.tables else None,
        no_masks="" if masks.tables else WITHOUT_MASKS,
        read_elsewhere=masks.hashes,
        read_notes=masks.notes,
    )


# Files.


@dataclass(frozen=True)
class _Files:
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


def _find_files(folder: Path, splits: Sequence[str]) -> _Files:
    """The files that are to be read for some splits."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; set build.source.annotations to the one that holds the box CSVs ({DOCS}). Boxes of your "
            f"own are read with source.kind: boxes (docs/own-data.md), COCO's format with source.kind: coco (docs/coco.md)"
        )
    metadata = {split: _first(_places(folder, split, METADATA_NAMES)) for split in splits}
    own = {split: path for split, path in metadata.items() if path}
    hierarchies = [folder / f"{name}.json{packed}" for name in HIERARCHY_NAMES for packed in ("", ".gz")]
    others = sorted({*folder.glob("*hierarchy*.json"), *folder.glob("*hierarchy*.json.gz")} - set(hierarchies))
    return _Files(
        folder=folder,
        boxes={split: _find_boxes(folder, split) for split in splits},
        metadata=own,
        all_metadata=_first(_both(folder / ALL_METADATA_NAME)) if len(own) < len(splits) else None,
        classes=_first(path for name in CLASS_NAMES for path in _both(folder / name)),
        hierarchies=[path for path in (*hierarchies, *others) if path.is_file()],
    )


def _find_boxes(folder: Path, split: str) -> list[Path]:
    """The box CSVs of a split: one, or several whose names go on after the published one; gzipped or not."""
    parts = [sorted(filter(_is_csv, folder.glob(f"{name.format(split)}*.csv*"))) for name in BOX_NAMES]
    found = [paths for paths in parts if paths]
    if not found and (inside := _first(_places(folder, split, (*BOX_NAMES, *OTHER_BOX_NAMES)))):
        found = [[inside]]
    if not found:
        raise InputError(
            f"{folder / BOX_NAMES[0].format(split)}.csv: no such file; put the split's box CSV there or take `{split}` out of "
            f"build.source.splits; other names that are read: {DOCS}"
        )
    twice = [path for path in found[0] if path.with_name(f"{path.name}.gz") in found[0]]
    if len(found) > 1 or twice:
        two = [found[0][0], found[1][0]] if len(found) > 1 else [twice[0], twice[0].with_name(f"{twice[0].name}.gz")]
        raise InputError(f"{folder}: both {two[0].name} and {two[1].name} are there; move one of them away")
    return found[0]


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


def _first(paths: Iterator[Path]) -> Path | None:
    return next(filter(Path.is_file, paths), None)


def _is_csv(path: Path) -> bool:
    return path.name.endswith((".csv", ".csv.gz")) and path.is_file()


def _is_table(path: Path) -> bool:
    return path.name.casefold().endswith(_TABLES) and not path.name.startswith(".") and path.is_file()


# Classes.


def _read_class_names(path: Path) -> dict[str, str]:
    """Class id -> name."""
    names: dict[str, str] = {}
    for number, data in raw_lines(path):
        where = f"{path}, line {number}"
        try:
            cells = [cell.strip() for cell in next(csv.reader([data.decode()]))]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{where}: no CSV in UTF-8 ({error}); get the file again") from None
        if cells in _CLASS_HEADERS or not any(cells):
            continue
        if len(cells) != 2:
            raise InputError(f"{where}: {number_of(len(cells), 'cell')}, expected 2, a class id and a name")
        label, name = cells
        if names.setdefault(label, name) != name:
            raise InputError(f"{where}: class {label} has two names, {names[label]} and {name}; keep one")
    return names


def _find_hierarchy(paths: Sequence[Path], names: Mapping[str, str]) -> tuple[Path | None, dict[str, tuple[str, ...]]]:
    """The first class hierarchy that can be read, if any, and its content: class id -> ids of the classes directly below."""
    for path in paths:
        try:
            return path, _read_hierarchy(path, names)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError, EOFError) as error:
            if path.name.partition(".")[0] in HIERARCHY_NAMES:
                raise InputError(f"{path}: not Open Images' class hierarchy ({error}); get the file again") from None
    return None, {}


def _read_hierarchy(path: Path, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Class id -> ids of the classes directly below it, from JSON in one of two layouts; any error says that it is neither.

    Since V4 nodes are ids, {"LabelName": "/m/...", "Subcategory": [...], "Part": [...]}; parts (a hand) are not below. The
    layout of V2 and V3 has names, {"name": "Fruit", "children": [...]}, and parts stand among the children. A group that is no
    class (`Entity`) is known by the word in the file.
    """
    root = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    key, children = ("name", "children") if "children" in root else ("LabelName", "Subcategory")
    ids: dict[str, list[str]] = {}
    for label, name in names.items() if key == "name" else ():
        ids.setdefault(name.casefold(), []).append(label)
    below: dict[str, tuple[str, ...]] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        inner = node.get(children, [])
        found = [label for child in inner for label in _ids_of(child[key], ids)]
        for label in _ids_of(node[key], ids):  # A node may stand in several places.
            known = below.get(label, ())
            below[label] = (*known, *dict.fromkeys(child for child in found if child not in known))
        stack += [*inner, *node.get("Part", [])]  # Parts have classes below them too.
    if key == "name" and not below.keys() & names.keys():
        raise ValueError("none of its names is the name of a class in the class list")
    return below


def _ids_of(word: str, ids: Mapping[str, Sequence[str]]) -> Sequence[str]:
    return ids.get(word.strip().casefold(), (word.strip(),))


# Boxes.


def _read_boxes(path: Path, split: str, file: str) -> Iterator[pa.RecordBatch]:
    """Batches of `BOXES`; empty cells are null, and the selection's to reject. Flags without a column are -1, unknown."""
    present = check_header(path, _BOXES_NEED, _BOX_CSV)
    for rows in stream_csv(path, {column: kind for column, kind in _BOX_TYPES.items() if column in present}):
        if len(rows.batch):
            yield _as_boxes(rows, split, file)
        if rows.broken:
            yield _placed({}, split, file, list(rows.broken), {number: ("", text) for number, text in rows.broken.items()})


def _read_all_boxes(files: _Files) -> Iterator[pa.RecordBatch]:
    for split, paths in files.boxes.items():
        for path in paths:
            yield from _read_boxes(path, split, path.relative_to(files.folder).as_posix())


def _missing_flags(files: _Files, boxes: Sequence[Path]) -> list[str]:
    """Look at the headers and first rows of the box CSVs; returns notes on columns of flags that they lack."""
    without: dict[str, list[str]] = {}
    for path in boxes:
        present = check_header(path, _BOXES_NEED, _BOX_CSV)
        absent = ", ".join(name for name in _FLAGS if name not in present)
        without.setdefault(absent, []).append(path.relative_to(files.folder).as_posix())
        for rows in stream_csv(path, dict.fromkeys(_EDGES, pa.float64())):
            first = rows.batch.slice(0, _LOOKED_AT)
            edges = np.array([column.to_numpy(zero_copy_only=False) for column in first.columns], np.float64)
            beyond = int((edges > 1).any(axis=0).sum())
            if 2 * beyond > len(first):
                raise InputError(
                    f"{path}: of the first {number_of(len(first), 'row')} {beyond} have edges above 1, no fractions; "
                    f"boxes in pixels are read with source.kind: boxes and source.unit: pixel (docs/own-data.md)"
                )
            break
    return [f"{', '.join(tables)}: no column {flags}, which are unknown (-1) then" for flags, tables in without.items() if flags]


def _as_boxes(rows: CsvRows, split: str, file: str) -> pa.RecordBatch:
    count, problems = len(rows.batch), dict(rows.problems)
    columns = {_BOX_COLUMNS[name]: rows.batch.column(name) for name in rows.batch.schema.names}
    for name in _FLAGS:
        target = _BOX_COLUMNS[name]
        columns[target] = _flags(name, columns.get(target, pa.nulls(count, pa.float64())), rows.numbers, problems)
    return _placed(columns, split, file, rows.numbers, problems)


def _flags(name: str, column: pa.Array, numbers: np.ndarray, problems: dict[int, tuple[str, str]]) -> pa.Array:
    """A column of flags as small integers; an empty cell is unknown, what is no flag becomes null and a problem of its row."""
    values = pc.fill_null(column, -1).to_numpy(zero_copy_only=False)
    wrong = ~np.isin(values, (1, 0, -1))
    for place in np.flatnonzero(wrong).tolist():
        problems.setdefault(int(numbers[place]), (name, f"{name} is {values[place]:g}, expected 1, 0 or -1"))
    unread = np.array([problems.get(number, ("",))[0] == name for number in numbers.tolist()], bool) if problems else wrong
    return pa.array(np.where(wrong, 0, values).astype(np.int8), mask=wrong | unread)


def _placed(
    columns: dict[str, pa.Array], split: str, file: str, numbers: Any, problems: Mapping[int, tuple[str, str]]
) -> pa.RecordBatch:
    """The columns with split, file and row, and with what is wrong with rows: their (column, text)."""
    columns |= {
        "split": one_word(split, len(numbers)),
        "file": one_word(file, len(numbers)),
        "row": pa.array(numbers, pa.int64()),
    }
    if problems:
        found = [(number, problems.get(number)) for number in numbers]
        columns["problem"] = pa.array([problem and _reason(problem[0]) for _, problem in found], WORD)
        details = [problem and f"{file}, line {number + 1}: {problem[1]}" for number, problem in found]
        columns["detail"] = pa.array(details, pa.string())
    return _filled(columns, BOXES)


def _reason(column: str) -> str:
    """The reason of a reject for a cell that cannot be read."""
    return "bad_flag" if column in _FLAGS else "bad_number" if column in _EDGES else "bad_row"


# Photos.


def _read_photos(path: Path, splits: str | Collection[str]) -> Iterator[pa.RecordBatch]:
    """Batches of `PHOTOS` of one split, or, of a file with a column `Subset`, of several."""
    one_split = splits if isinstance(splits, str) else None
    present = _metadata_header(path, of_all=one_split is None)
    wanted = [name for name in _METADATA_COLUMNS if name in present and (name != "Subset" or not one_split)]
    for rows in stream_csv(path, {name: _METADATA_COLUMNS[name][1] for name in wanted}, quoted=True):
        found = {_METADATA_COLUMNS[name][0]: rows.batch.column(name) for name in wanted}
        if "Rotation" in wanted:
            found["rotation"] = _integers(path, rows, "Rotation", pa.int16(), (0, 90, 180, 270))
        if "OriginalSize" in wanted:
            found["original_bytes"] = _integers(path, rows, "OriginalSize", pa.int64())
        if "OriginalMD5" in wanted:
            # A hash of zeros means unknown; it must not make one photo of all.
            md5 = found["original_md5"]
            found["original_md5"] = pc.if_else(pc.equal(md5, _NO_MD5), pa.scalar(None, pa.string()), md5)
        if one_split:
            found["split"] = one_word(one_split, len(rows.batch))
        else:
            chosen = pc.is_in(found["split"].cast(pa.string()), value_set=pa.array(sorted(splits), pa.string()))
            found = {name: column.filter(chosen) for name, column in found.items()}
            # The words of a filtered dictionary stay: those of other splits are to go.
            found["split"] = found["split"].cast(pa.string()).dictionary_encode().cast(WORD)
        if len(found["split"]):
            yield _filled(found, PHOTOS)


def _read_all_photos(files: _Files) -> Iterator[pa.RecordBatch]:
    for split, path in files.metadata.items():
        yield from _read_photos(path, split)
    if files.all_metadata:
        yield from _read_photos(files.all_metadata, files.boxes.keys() - files.metadata.keys())


def _metadata_header(path: Path, of_all: bool) -> list[str]:
    return check_header(path, (*_METADATA_NEEDS, *(["Subset"] if of_all else [])), "Open Images' photo metadata")


def _integers(path: Path, rows: CsvRows, name: str, kind: pa.DataType, allowed: Sequence[int] = ()) -> pa.Array:
    """A column of numbers as integers, any from 0 on or those that are allowed; an empty cell is unknown."""
    values = pc.fill_null(rows.batch.column(name), np.nan).to_numpy(zero_copy_only=False)
    unknown = np.isnan(values)
    right = np.isin(values, allowed) if allowed else (values >= 0) & (values < 2**53) & (values == np.floor(values))
    wrong = ~unknown & ~right
    if wrong.any():
        place = int(wrong.argmax())
        raise InputError(
            f"{path}, row {rows.numbers[place]} below the header: {name} is {values[place]:g}, not {allowed or 'a whole number'}"
        )
    return pa.array(np.where(unknown, 0, values).astype(kind.to_pandas_dtype()), kind, mask=unknown)


def _filled(columns: Mapping[str, pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    """Columns in the order of a schema; those that are not there are null."""
    count = len(columns["split"])
    arrays = [columns[field.name] if field.name in columns else pa.nulls(count, field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
