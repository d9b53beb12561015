"""Open Images: box CSVs, class names, class hierarchy and photo metadata, under the names they are published with.

Format: https://storage.googleapis.com/openimages/web/download_v7.html. The CSV's order is XMin, XMax, YMin, YMax, fractions of
the stored photo, whatever its EXIF says; flags are 1, 0 or -1 (unknown). `Rotation` is the number of degrees counterclockwise by
which photo and boxes are to be turned, empty where nobody knows
(https://storage.googleapis.com/openimages/web/2018-05-17-rotation-information.html). Tables of other photos in this format may be
of photos as viewers show them (`source.frame: exif`), but then have no `Rotation`, which counts from the stored photo.
"""

import csv
import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.annotations.csv_files import CsvRows, check_header, count_rows, read_header, stream_csv
from pipelines.annotations.source import Source
from pipelines.config import SourceSettings
from schemas.errors import InputError
from schemas.tables import BOXES, COORDINATES, FLAGS, PHOTOS, WORD, one_word

BOX_COLUMNS = {
    "ImageID": "photo_id",
    "LabelName": "label",
    "XMin": "x_min",
    "XMax": "x_max",
    "YMin": "y_min",
    "YMax": "y_max",
    "IsOccluded": "is_occluded",
    "IsTruncated": "is_truncated",
    "IsGroupOf": "is_group_of",
    "IsDepiction": "is_depiction",
    "IsInside": "is_inside",
}
METADATA_COLUMNS = {
    "ImageID": ("photo_id", pa.string()),
    "OriginalURL": ("url", pa.string()),
    "Author": ("author", pa.string()),
    "License": ("licence", WORD),
    "Rotation": ("rotation", pa.float64()),
    "OriginalMD5": ("original_md5", pa.string()),
    "OriginalSize": ("original_bytes", pa.float64()),
    "Thumbnail300KURL": ("thumbnail_url", pa.string()),
}
# The oldest mirrors have the first four columns alone.
_METADATA_NEEDED = ("ImageID", "OriginalURL", "License", "Author")
_BOX_FILES = ("{}-annotations-bbox", "oidv6-{}-annotations-bbox")
_METADATA_FILES = (
    "{}-images-boxable-with-rotation",
    "{}-images-with-rotation",
    "oidv6-{}-images-with-labels-with-rotation",
)
_CLASS_FILES = ("class-descriptions-boxable", "oidv7-class-descriptions-boxable")
_HIERARCHY_FILES = ("bbox_labels_600_hierarchy.json", "oidv7-bbox-labels-600-hierarchy.json")
_LOOKED_AT = 1000


def open_open_images(settings: SourceSettings) -> Source:
    """Find the files, check their headers and first rows.

    Raises:
        InputError: a file is missing, is there twice, or is not what its name says; photos would be turned twice.
    """
    folder = settings.annotations
    boxes = box_files(folder, settings.splits)
    metadata = metadata_files(folder, settings.splits)
    class_file = _only(folder, "class names", [f"{name}.csv*" for name in _CLASS_FILES])
    hierarchy_file = _only(folder, "class hierarchy", list(_HIERARCHY_FILES))
    names = read_class_names(class_file) if class_file else {}
    hierarchy = read_hierarchy(hierarchy_file) if hierarchy_file else {}
    for path in metadata.values():
        check_header(path, _METADATA_NEEDED, "Open Images' photo metadata")
        if settings.photo_frame == "exif" and "Rotation" in read_header(path):
            raise InputError(
                f"{path}: its column Rotation turns photos and boxes from the pixels as stored, and source.frame: exif would "
                f"turn the photos too; leave source.frame out, or take the column out of the file"
            )
    for path in (path for paths in boxes.values() for path in paths):
        check_header(path, list(BOX_COLUMNS), "Open Images' box CSV")
        _check_first_rows(path, names, class_file)
    inputs = [*(path for paths in boxes.values() for path in paths), *metadata.values(), class_file, hierarchy_file]
    return Source(
        name=str(folder),
        files=tuple(path for path in inputs if path is not None),
        frame=settings.photo_frame,
        read_boxes=functools.partial(_read_all_boxes, boxes),
        read_photos=functools.partial(_read_all_photos, metadata),
        listed_splits=frozenset(metadata),
        class_names=names,
        subclasses=hierarchy,
        rows=sum(count_rows(path) for paths in boxes.values() for path in paths),
    )


def box_files(folder: Path, splits: Sequence[str]) -> dict[str, list[Path]]:
    """The box CSVs of each split: one, or several whose names go on after `annotations-bbox`; gzipped or not.

    Raises:
        InputError: the folder or a split's CSV is missing, or a split is there under two published names.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set build.source.annotations to the one that holds the box CSVs")
    files = {}
    for split in splits:
        found = {name: _matching(folder, f"{name.format(split)}*.csv*") for name in _BOX_FILES}
        present = [paths for paths in found.values() if paths]
        if not present:
            raise InputError(
                f"{folder / _BOX_FILES[0].format(split)}.csv: no such file; "
                f"put the split's box CSV there or take `{split}` out of build.source.splits"
            )
        if len(present) > 1:
            raise InputError(
                f"{folder}: both {present[0][0].name} and {present[1][0].name} are there; move away the one that is not meant"
            )
        files[split] = _each_once(present[0])
    return files


def metadata_files(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The photo metadata CSV of each split that has one; some mirrors come without."""
    found = {
        split: _only(folder, "photo metadata", [f"{name.format(split)}.csv*" for name in _METADATA_FILES]) for split in splits
    }
    return {split: path for split, path in found.items() if path is not None}


def read_boxes(path: Path, split: str) -> Iterator[pa.RecordBatch]:
    """Stream the boxes of one CSV as record batches of `schemas.tables.BOXES`.

    Rows that cannot be read have a `problem`; empty cells are null, and the selection's to reject.

    Raises:
        InputError: a column is missing, or the file is cut off.
    """
    check_header(path, list(BOX_COLUMNS), "Open Images' box CSV")
    for rows in stream_csv(path, _box_types()):
        yield _as_boxes(rows, split, path.name)


def read_photos(path: Path, split: str) -> Iterator[pa.RecordBatch]:
    """Stream the photo metadata of one CSV as record batches of `schemas.tables.PHOTOS`.

    Raises:
        InputError: a column is missing, a row cannot be read, or a Rotation is none of 0, 90, 180, 270 and empty.
    """
    present = read_header(path)
    columns = {name: kind for name, (_, kind) in METADATA_COLUMNS.items() if name in present}
    check_header(path, _METADATA_NEEDED, "Open Images' photo metadata")
    for rows in stream_csv(path, columns, quoted=True):
        for number, text in [*rows.broken.items(), *((number, text) for number, (_, text) in rows.problems.items())]:
            raise InputError(f"{path}, row {number}: {text}; mend the row, or get the file again")
        found = {METADATA_COLUMNS[name][0]: rows.batch.column(name) for name in columns}
        if "rotation" in found:
            found["rotation"] = _rotation(found["rotation"], path, rows.numbers)
        if "original_bytes" in found:
            found["original_bytes"] = _sizes(found["original_bytes"], path, rows.numbers)
        found["split"] = one_word(split, len(rows.batch))
        yield _filled(found, PHOTOS, len(rows.batch))


def read_class_names(path: Path) -> dict[str, str]:
    """Class id -> name.

    Raises:
        InputError: a line has not two cells, or an id comes twice.
    """
    header = ["LabelName", "DisplayName"]  # V7 has one, older versions have not.
    names: dict[str, str] = {}
    try:
        with _open_text(path) as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row == header or not row:
                    continue
                if len(row) != 2:
                    raise InputError(
                        f"{path}, line {number}: {len(row)} cells, expected 2, a class id and a name; is it another file?"
                    )
                if names.setdefault(row[0], row[1]) != row[1]:
                    raise InputError(
                        f"{path}, line {number}: class {row[0]} has two names, {names[row[0]]} and {row[1]}; keep one"
                    )
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8, or get the file again") from None
    except (EOFError, OSError, zlib.error, csv.Error) as error:
        raise InputError(f"{path}: the file is cut off or damaged ({error}); get the file again") from None
    return names


def _open_text(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def read_hierarchy(path: Path) -> dict[str, tuple[str, ...]]:
    """Class id -> ids of the classes directly below it (`Subcategory`). Parts (`Part`: a hand of a person) are not below.

    Raises:
        InputError: not the published JSON.
    """
    try:
        root = json.loads(path.read_text(encoding="utf-8-sig"))
        children: dict[str, tuple[str, ...]] = {}
        stack = [root]
        while stack:
            node = stack.pop()
            below = node.get("Subcategory", [])
            known = children.get(node["LabelName"], ())
            children[node["LabelName"]] = (*known, *(child["LabelName"] for child in below if child["LabelName"] not in known))
            stack += [*below, *node.get("Part", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not Open Images' class hierarchy ({type(error).__name__}: {error}); get the file again, or take it away"
        ) from None
    return children


def _read_all_boxes(files: Mapping[str, Sequence[Path]]) -> Iterator[pa.RecordBatch]:
    for split, paths in files.items():
        for path in paths:
            yield from read_boxes(path, split)


def _read_all_photos(files: Mapping[str, Path]) -> Iterator[pa.RecordBatch]:
    for split, path in files.items():
        yield from read_photos(path, split)


def _box_types() -> dict[str, pa.DataType]:
    kinds = {
        "photo_id": pa.string(),
        "label": WORD,
        **dict.fromkeys(COORDINATES, pa.float64()),
        **dict.fromkeys(FLAGS, pa.float64()),
    }
    return {name: kinds[target] for name, target in BOX_COLUMNS.items()}


def _as_boxes(rows: CsvRows, split: str, file: str) -> pa.RecordBatch:
    count = len(rows.batch)
    columns: dict[str, pa.Array] = {target: rows.batch.column(name) for name, target in BOX_COLUMNS.items()}
    columns |= {"split": one_word(split, count), "file": one_word(file, count), "row": pa.array(rows.numbers, pa.int64())}
    problems = dict(rows.problems)
    for name, target in BOX_COLUMNS.items():
        if target in FLAGS:
            columns[target] = _flags(name, columns[target], rows.numbers, problems)
    if problems:
        found = [problems.get(number) for number in rows.numbers.tolist()]
        columns["problem"] = pa.array([problem and _reason(problem[0]) for problem in found], WORD)
        columns["detail"] = pa.array([problem and problem[1] for problem in found], pa.string())
    batch = _filled(columns, BOXES, count)
    if not rows.broken:
        return batch
    broken = {
        "split": one_word(split, len(rows.broken)),
        "file": one_word(file, len(rows.broken)),
        "row": pa.array(list(rows.broken), pa.int64()),
        "problem": one_word("bad_row", len(rows.broken)),
        "detail": pa.array(list(rows.broken.values()), pa.string()),
    }
    both = pa.Table.from_batches([batch, _filled(broken, BOXES, len(rows.broken))]).unify_dictionaries().combine_chunks()
    return both.to_batches()[0]


def _flags(name: str, column: pa.Array, numbers: np.ndarray, problems: dict[int, tuple[str, str]]) -> pa.Array:
    """A column of flags as small integers; what is no flag becomes null, and a problem of its row."""
    values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    wrong = ~np.isin(values, (1, 0, -1))
    for place in np.flatnonzero(wrong).tolist():
        problems.setdefault(int(numbers[place]), (name, f"{name} is {values[place]:g}, expected 1, 0 or -1"))
    missing = wrong | column.is_null().to_numpy(zero_copy_only=False)
    return pa.array(np.where(wrong, 0, values).astype(np.int8), mask=missing)


def _reason(column: str) -> str:
    """The reason of a reject for a cell that cannot be read."""
    target = BOX_COLUMNS[column]
    if target in FLAGS:
        return "bad_flag"
    return "bad_number" if target in COORDINATES else "bad_row"


def _check_first_rows(path: Path, names: Mapping[str, str], class_file: Path | None) -> None:
    """Look at a file's first rows for what is wrong with all of it.

    Raises:
        InputError: there is no row; most rows are in pixels; or no label is in the class file.
    """
    rows = next(stream_csv(path, _box_types()), None)
    if rows is None or not len(rows.batch):
        broken = rows.broken if rows else {}
        why = f" (line {min(broken) + 1}: {broken[min(broken)]})" if broken else ""
        raise InputError(f"{path}: no row can be read below the header{why}; get the file again, or change source.splits")
    first = rows.batch.slice(0, _LOOKED_AT)
    columns = [name for name, target in BOX_COLUMNS.items() if target in COORDINATES]
    above = np.stack([pc.fill_null(pc.greater(first.column(name), 1), False).to_numpy(zero_copy_only=False) for name in columns])
    if above.any(axis=0).mean() > 0.5:
        place = int(above.any(axis=0).argmax())
        name = columns[int(above[:, place].argmax())]
        cell = first.column(name)[place].as_py()
        raise InputError(
            f"{path}, line {int(rows.numbers[place]) + 1}: {name} is {cell:g}, not a fraction of the photo; in "
            f"{above.any(axis=0).sum()} of the first {len(first)} rows a coordinate is above 1: the file seems to be in pixels. "
            f"Boxes in pixels are read with source.kind: boxes and source.unit: pixel (docs/own-data.md)"
        )
    labels = first.column("LabelName").drop_null().unique().to_pylist()
    if names and labels and not any(label in names for label in labels):
        raise InputError(
            f"{path}, line {int(rows.numbers[0]) + 1}: LabelName is {labels[0]}; neither it nor any other label of the first "
            f"{len(first)} rows is in {class_file}: the two files do not belong together"
        )


def _rotation(column: pa.Array, path: Path, numbers: np.ndarray) -> pa.Array:
    values = pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
    wrong = ~(np.isnan(values) | np.isin(values, (0, 90, 180, 270)))
    if wrong.any():
        place = int(wrong.argmax())
        raise InputError(
            f"{path}, row {numbers[place]}: Rotation is {values[place]:g}, none of 0, 90, 180, 270 and empty; "
            f"mend the row, or get the file again"
        )
    return pa.array(np.nan_to_num(values).astype(np.int16), pa.int16(), mask=np.isnan(values))


def _sizes(column: pa.Array, path: Path, numbers: np.ndarray) -> pa.Array:
    values = pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    wrong = ~missing & ~((values >= 0) & (values < 2**53) & (values == np.floor(values)))
    if wrong.any():
        place = int(wrong.argmax())
        raise InputError(
            f"{path}, row {numbers[place]}: OriginalSize is {values[place]:g}, not a number of bytes; "
            f"mend the row, or get the file again"
        )
    return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)


def _filled(columns: Mapping[str, Any], schema: pa.Schema, count: int) -> pa.RecordBatch:
    """Columns in the order of a schema; those that are not there are null."""
    arrays = [columns[field.name] if field.name in columns else pa.nulls(count, field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _matching(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.name.endswith((".csv", ".csv.gz")) and path.is_file())


def _each_once(paths: list[Path]) -> list[Path]:
    """The paths, none of them as .csv and as .csv.gz.

    Raises:
        InputError: one is there both ways.
    """
    for path in paths:
        if path.with_name(f"{path.name}.gz") in paths:
            raise InputError(f"{path}: it is there gzipped too ({path.name}.gz); move one of the two away, or boxes count twice")
    return paths


def _only(folder: Path, what: str, patterns: list[str]) -> Path | None:
    """The one file of several published names that is there.

    Raises:
        InputError: more than one is.
    """
    found = [
        path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.name.endswith((".csv", ".csv.gz", ".json"))
    ]
    if len(found) > 1:
        raise InputError(f"{folder}: {found[0].name} and {found[1].name} are both {what}; move away the one that is not meant")
    return found[0] if found else None
