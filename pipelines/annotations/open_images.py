"""Open Images: box CSVs, class names, class hierarchy and photo metadata, under the names they are published with.

Format: https://storage.googleapis.com/openimages/web/download_v7.html. The CSV's order is XMin, XMax, YMin, YMax, fractions of
the stored photo, whatever its EXIF says; flags are 1, 0 or -1 (unknown). `Rotation` is the number of degrees counterclockwise by
which photo and boxes are to be turned, empty where nobody knows
(https://storage.googleapis.com/openimages/web/2018-05-17-rotation-information.html). Tables of other photos in this format may be
of photos as viewers show them (`source.frame: exif`), but then have no `Rotation`, which counts from the stored photo.
"""

import base64
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.csv_files import CsvRows, check_header, count_rows, read_header, stream_csv
from pipelines.annotations.open_images_files import (
    Files,
    find_files,
    find_hierarchy,
    own_boxes_hint,
    read_class_names,
    unread_tables,
)
from pipelines.annotations.source import Source
from pipelines.config import SourceSettings
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
# The training boxes of V2 and V3 have no flags, those of the challenges one.
_FLAG_COLUMNS = tuple(name for name, target in BOX_COLUMNS.items() if target in FLAGS)
_BOX_COLUMNS_NEEDED = tuple(name for name in BOX_COLUMNS if name not in _FLAG_COLUMNS)
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
_METADATA = "Open Images' photo metadata"
_NO_MD5 = base64.b64encode(bytes(16)).decode()
_LOOKED_AT = 1000


def open_open_images(settings: SourceSettings) -> Source:
    """Find the files, check their headers and first rows.

    Raises:
        InputError: a file is missing, is there twice, or is not what its name says; photos would be turned twice.
    """
    files = find_files(settings.annotations, settings.splits)
    names = read_class_names(files.classes) if files.classes else {}
    hierarchy = find_hierarchy(files.hierarchies, names)
    _check_metadata(files, settings)
    notes = [hierarchy.note, *_check_boxes(files, names), unread_tables(files, hierarchy.path)]
    return Source(
        name=str(settings.annotations),
        files=tuple(path for path in (*files.paths, hierarchy.path) if path is not None),
        frame=settings.photo_frame,
        read_boxes=functools.partial(_read_all_boxes, files),
        read_photos=functools.partial(_read_all_photos, files),
        listed_splits=frozenset(files.boxes if files.all_metadata else files.metadata),
        class_names=names,
        subclasses=hierarchy.below,
        rows=sum(count_rows(path) for paths in files.boxes.values() for path in paths),
        notes=tuple(note for note in notes if note),
    )


def _check_metadata(files: Files, settings: SourceSettings) -> None:
    tables = [(path, check_header(path, _METADATA_NEEDED, _METADATA)) for path in files.metadata.values()]
    if files.all_metadata:
        needed = (*_METADATA_NEEDED, "Subset")
        tables.append((files.all_metadata, check_header(files.all_metadata, needed, f"{_METADATA} of all splits")))
    for path, header in tables:
        if settings.photo_frame == "exif" and "Rotation" in header:
            raise InputError(
                f"{path}: its column Rotation turns the photos as stored, and source.frame: exif would turn them too; leave "
                f"source.frame out, or take the column out of the file"
            )


def _check_boxes(files: Files, names: Mapping[str, str]) -> list[str]:
    """Look at the headers and first rows of the box CSVs; returns what a user should know about them."""
    without: dict[tuple[str, ...], list[str]] = {}
    for path in (path for paths in files.boxes.values() for path in paths):
        present = _check_boxes_header(path)
        without.setdefault(tuple(name for name in _FLAG_COLUMNS if name not in present), []).append(files.name_of(path))
        _check_first_rows(path, names, files.classes)
    return [
        f"{', '.join(tables)}: no column {', '.join(flags)}, which are unknown (-1) then"
        for flags, tables in without.items()
        if flags
    ]


def _check_boxes_header(path: Path) -> list[str]:
    """The header of a box CSV.

    Raises:
        InputError: a column is missing; where the table is boxes of one's own, the message says how to read it.
    """
    present = read_header(path)
    if not set(_BOX_COLUMNS_NEEDED) & set(present) and (own := own_boxes_hint(path)):
        raise InputError(f"{path}, line 1: {own}")
    return check_header(path, _BOX_COLUMNS_NEEDED, "Open Images' box CSV", _FLAG_COLUMNS)


def read_boxes(path: Path, split: str, name: str | None = None) -> Iterator[pa.RecordBatch]:
    """Stream the boxes of one CSV as record batches of `schemas.tables.BOXES`.

    Rows that cannot be read have a `problem`; empty cells are null, and the selection's to reject. Flags without a column are
    -1, unknown.

    Args:
        path: the CSV.
        split: of its photos.
        name: what to call the file; its own name by default.

    Raises:
        InputError: a column is missing, or the file is cut off.
    """
    present = _check_boxes_header(path)
    columns = {column: kind for column, kind in _box_types().items() if column in present}
    for rows in stream_csv(path, columns):
        yield _as_boxes(rows, split, name or path.name)


def read_photos(path: Path, splits: str | Collection[str]) -> Iterator[pa.RecordBatch]:
    """Stream a CSV of photo metadata as record batches of `schemas.tables.PHOTOS`.

    Args:
        path: the CSV.
        splits: the split of all its photos; or, of a file with a column `Subset`, those to read.

    Raises:
        InputError: a column is missing, a row cannot be read, or a Rotation is none of 0, 90, 180, 270 and empty.
    """
    targets = METADATA_COLUMNS if isinstance(splits, str) else {**METADATA_COLUMNS, "Subset": ("split", WORD)}
    needed = _METADATA_NEEDED if isinstance(splits, str) else (*_METADATA_NEEDED, "Subset")
    present = check_header(path, needed, _METADATA)
    columns = {name: kind for name, (_, kind) in targets.items() if name in present}
    for place, rows in enumerate(stream_csv(path, columns, quoted=True)):
        for number, text in [*rows.broken.items(), *((number, text) for number, (_, text) in rows.problems.items())]:
            raise _bad_row(path, number, text)
        if not place:
            _check_not_empty(path, rows)
        found = {targets[name][0]: rows.batch.column(name) for name in columns}
        if "rotation" in found:
            found["rotation"] = _rotation(found["rotation"], path, rows.numbers)
        if "original_md5" in found:
            # A hash of zeros means unknown; it must not make one photo of all.
            md5 = found["original_md5"]
            found["original_md5"] = pc.if_else(pc.equal(md5, _NO_MD5), pa.scalar(None, pa.string()), md5)
        if "original_bytes" in found:
            found["original_bytes"] = _sizes(found["original_bytes"], path, rows.numbers)
        count = len(rows.batch)
        if isinstance(splits, str):
            found["split"] = one_word(splits, count)
        else:
            chosen = pc.is_in(found["split"].cast(pa.string()), value_set=pa.array(sorted(splits), pa.string()))
            found = {name: column.filter(chosen) for name, column in found.items()}
            # The words of a filtered dictionary stay: those of other splits are to go.
            found["split"] = found["split"].cast(pa.string()).dictionary_encode().cast(WORD)
            count = len(found["split"])
        if count:
            yield _filled(found, PHOTOS, count)


def _read_all_boxes(files: Files) -> Iterator[pa.RecordBatch]:
    for split, paths in files.boxes.items():
        for path in paths:
            yield from read_boxes(path, split, files.name_of(path))


def _read_all_photos(files: Files) -> Iterator[pa.RecordBatch]:
    for split, path in files.metadata.items():
        yield from read_photos(path, split)
    if files.all_metadata:
        yield from read_photos(files.all_metadata, files.boxes.keys() - files.metadata.keys())


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
    present = rows.batch.schema.names
    columns: dict[str, pa.Array] = {target: rows.batch.column(name) for name, target in BOX_COLUMNS.items() if name in present}
    columns |= {"split": one_word(split, count), "file": one_word(file, count), "row": pa.array(rows.numbers, pa.int64())}
    problems = dict(rows.problems)
    for name in _FLAG_COLUMNS:
        target = BOX_COLUMNS[name]
        if name in present:
            columns[target] = _flags(name, columns[target], rows.numbers, problems)
        else:
            columns[target] = pa.array(np.full(count, -1, np.int8))
    if problems:
        found = [(number, problems.get(number)) for number in rows.numbers.tolist()]
        columns["problem"] = pa.array([problem and _reason(problem[0]) for _, problem in found], WORD)
        details = [problem and f"{file}, line {number + 1}: {problem[1]}" for number, problem in found]
        columns["detail"] = pa.array(details, pa.string())
    batch = _filled(columns, BOXES, count)
    if not rows.broken:
        return batch
    broken = {
        "split": one_word(split, len(rows.broken)),
        "file": one_word(file, len(rows.broken)),
        "row": pa.array(list(rows.broken), pa.int64()),
        "problem": one_word("bad_row", len(rows.broken)),
        "detail": pa.array([f"{file}, line {number + 1}: {text}" for number, text in rows.broken.items()], pa.string()),
    }
    both = pa.Table.from_batches([batch, _filled(broken, BOXES, len(rows.broken))]).unify_dictionaries().combine_chunks()
    return both.to_batches()[0]


def _flags(name: str, column: pa.Array, numbers: np.ndarray, problems: dict[int, tuple[str, str]]) -> pa.Array:
    """A column of flags as small integers; an empty cell is unknown, what is no flag becomes null and a problem of its row."""
    missing = np.array([number in problems and problems[number][0] == name for number in numbers.tolist()]) if problems else False
    values = pc.fill_null(column, -1).to_numpy(zero_copy_only=False)
    wrong = ~np.isin(values, (1, 0, -1))
    for place in np.flatnonzero(wrong).tolist():
        problems.setdefault(int(numbers[place]), (name, f"{name} is {values[place]:g}, expected 1, 0 or -1"))
    return pa.array(np.where(wrong, 0, values).astype(np.int8), mask=wrong | missing)


def _reason(column: str) -> str:
    """The reason of a reject for a cell that cannot be read."""
    target = BOX_COLUMNS[column]
    if target in FLAGS:
        return "bad_flag"
    return "bad_number" if target in COORDINATES else "bad_row"


def _check_first_rows(path: Path, names: Mapping[str, str], class_file: Path | None) -> None:
    """Look at a file's first rows for what is wrong with all of it.

    Raises:
        InputError: there is no row; all cells are empty; most rows are in pixels; or no label is in the class file.
    """
    columns = {name: kind for name, kind in _box_types().items() if name in read_header(path)}
    rows = next(stream_csv(path, columns), None)
    if rows is None or not len(rows.batch):
        broken = rows.broken if rows else {}
        why = f" (line {min(broken) + 1}: {broken[min(broken)]})" if broken else ""
        raise InputError(f"{path}: no row can be read below the header{why}")
    _check_not_empty(path, rows)
    first = rows.batch.slice(0, _LOOKED_AT)
    edges = [name for name, target in BOX_COLUMNS.items() if target in COORDINATES]
    above = np.stack([pc.fill_null(pc.greater(first.column(name), 1), False).to_numpy(zero_copy_only=False) for name in edges])
    if above.any(axis=0).mean() > 0.5:
        place = int(above.any(axis=0).argmax())
        name = edges[int(above[:, place].argmax())]
        cell = first.column(name)[place].as_py()
        raise InputError(
            f"{path}, line {int(rows.numbers[place]) + 1}: {name} is {cell:g}, not a fraction of the photo, as in "
            f"{above.any(axis=0).sum()} of the first {number_of(len(first), 'row')}; boxes in pixels are read with "
            f"source.kind: boxes and source.unit: pixel (docs/own-data.md)"
        )
    labels = first.column("LabelName").drop_null().unique().to_pylist()
    if names and labels and not any(label in names for label in labels):
        raise InputError(
            f"{path}, line {int(rows.numbers[0]) + 1}: no label of the first {number_of(len(first), 'row')} is in {class_file} "
            f"({labels[0]}, ...): the two files do not belong together"
        )


def _check_not_empty(path: Path, rows: CsvRows) -> None:
    """Look at a file's first rows for a table whose rows are there, and whose cells are not.

    Raises:
        InputError: no cell of a column that is read has anything in it.
    """
    if len(rows.batch) and not rows.problems and all(column.null_count == len(column) for column in rows.batch.columns):
        raise InputError(f"{path}: all cells of {number_of(len(rows.batch), 'row')} are empty; get the file again")


def _bad_row(path: Path, number: int, text: str) -> InputError:
    return InputError(f"{path}, row {number} below the header: {text}")


def _rotation(column: pa.Array, path: Path, numbers: np.ndarray) -> pa.Array:
    values = pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
    wrong = ~(np.isnan(values) | np.isin(values, (0, 90, 180, 270)))
    if wrong.any():
        place = int(wrong.argmax())
        raise _bad_row(path, int(numbers[place]), f"Rotation is {values[place]:g}, none of 0, 90, 180, 270 and empty")
    return pa.array(np.nan_to_num(values).astype(np.int16), pa.int16(), mask=np.isnan(values))


def _sizes(column: pa.Array, path: Path, numbers: np.ndarray) -> pa.Array:
    values = pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    wrong = ~missing & ~((values >= 0) & (values < 2**53) & (values == np.floor(values)))
    if wrong.any():
        place = int(wrong.argmax())
        raise _bad_row(path, int(numbers[place]), f"OriginalSize is {values[place]:g}, not a number of bytes")
    return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)


def _filled(columns: Mapping[str, Any], schema: pa.Schema, count: int) -> pa.RecordBatch:
    """Columns in the order of a schema; those that are not there are null."""
    arrays = [columns[field.name] if field.name in columns else pa.nulls(count, field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
