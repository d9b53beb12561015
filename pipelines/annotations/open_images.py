"""Open Images: box CSVs, class names and photo metadata, under the names they are published with.

Format: https://storage.googleapis.com/openimages/web/download_v7.html. The CSV's order is XMin, XMax, YMin, YMax, fractions of
the stored photo; flags are 1, 0 or -1 (unknown). Boxes are streamed: memory does not grow with the file.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from schemas.errors import InputError
from schemas.tables import BOXES

BOX_COLUMNS = {
    "ImageID": ("photo_id", pa.string()),
    "LabelName": ("label", pa.string()),
    "XMin": ("x_min", pa.float64()),
    "XMax": ("x_max", pa.float64()),
    "YMin": ("y_min", pa.float64()),
    "YMax": ("y_max", pa.float64()),
    "IsOccluded": ("is_occluded", pa.int8()),
    "IsTruncated": ("is_truncated", pa.int8()),
    "IsGroupOf": ("is_group_of", pa.int8()),
    "IsDepiction": ("is_depiction", pa.int8()),
    "IsInside": ("is_inside", pa.int8()),
}
METADATA_COLUMNS = {"ImageID": "photo_id", "OriginalURL": "url", "Author": "author", "License": "licence"}
_BOX_FILES = ("{}-annotations-bbox.csv", "oidv6-{}-annotations-bbox.csv")
_METADATA_FILES = ("{}-images-boxable-with-rotation.csv", "{}-images-with-rotation.csv")
_CLASS_FILES = ("class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv")


def annotation_files(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The box CSV of each split.

    Raises:
        InputError: the folder or a split's CSV is missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set build.source.annotations to the one that holds the box CSVs")
    files = {}
    for split in splits:
        found = _first(folder, [name.format(split) for name in _BOX_FILES])
        if found is None:
            raise InputError(
                f"{folder / _BOX_FILES[0].format(split)}: no such file; "
                f"put the split's box CSV there or take `{split}` out of build.source.splits"
            )
        files[split] = found
    return files


def metadata_files(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The photo metadata CSV of each split that has one; the older Open Images mirrors come without."""
    found = {split: _first(folder, [name.format(split) for name in _METADATA_FILES]) for split in splits}
    return {split: path for split, path in found.items() if path is not None}


def class_file(folder: Path) -> Path | None:
    """The file of class names, if there."""
    return _first(folder, list(_CLASS_FILES))


def read_boxes(path: Path, split: str) -> Iterator[pa.RecordBatch]:
    """Stream the boxes of one CSV as record batches of `schemas.tables.BOXES`.

    Empty cells become null and are the selection's to reject, by row.

    Raises:
        InputError: a column is missing, or a cell cannot be read as its column's type; names file and line.
    """
    _check_header(path, list(BOX_COLUMNS))
    row = 1
    options = pa_csv.ConvertOptions(
        include_columns=list(BOX_COLUMNS),
        column_types={name: kind for name, (_, kind) in BOX_COLUMNS.items()},
        strings_can_be_null=True,
        null_values=[""],
    )
    for batch in _stream(path, options):
        count = len(batch)
        columns = {target: batch.column(name) for name, (target, _) in BOX_COLUMNS.items()}
        columns["split"] = pa.repeat(split, count)
        columns["file"] = pa.repeat(path.name, count)
        columns["row"] = pa.array(range(row, row + count), pa.int64())
        row += count
        yield pa.RecordBatch.from_arrays([columns[name] for name in BOXES.names], schema=BOXES)


def read_metadata(paths: Sequence[Path], photo_ids: pa.Array) -> pa.Table:
    """URL, author and licence of the given photos: columns photo_id, url, author, licence, one row per photo found.

    Raises:
        InputError: a column is missing.
    """
    options = pa_csv.ConvertOptions(
        include_columns=list(METADATA_COLUMNS),
        column_types=dict.fromkeys(METADATA_COLUMNS, pa.string()),
        strings_can_be_null=True,
        null_values=[""],  # Arrow's own list has "NA" and "null", which are authors' names too.
    )
    kept = [pa.table({name: pa.array([], pa.string()) for name in METADATA_COLUMNS})]
    for path in paths:
        _check_header(path, list(METADATA_COLUMNS))
        for batch in _stream(path, options, newlines_in_values=True):
            wanted = pc.is_in(batch.column("ImageID"), value_set=photo_ids)
            kept.append(pa.Table.from_batches([batch.filter(wanted)]))
    table = pa.concat_tables(kept).rename_columns(list(METADATA_COLUMNS.values()))
    first = [(name, "first", pc.ScalarAggregateOptions(skip_nulls=False)) for name in table.column_names[1:]]
    once = table.group_by("photo_id", use_threads=False).aggregate(first)
    return once.rename_columns(table.column_names)


def read_class_names(path: Path | None) -> dict[str, str]:
    """Class id -> name; empty without a file."""
    if path is None:
        return {}
    try:
        table = pa_csv.read_csv(path, read_options=pa_csv.ReadOptions(column_names=["label", "name"]))
    except pa.ArrowInvalid as error:
        message = str(error).splitlines()[0]
        raise InputError(f"{path}: {message}; expected a class id and a name on each line, without a header") from None
    return dict(zip(table["label"].to_pylist(), table["name"].to_pylist(), strict=True))


def _first(folder: Path, names: list[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _check_header(path: Path, required: list[str]) -> None:
    with path.open("rb") as file:
        header = file.readline(65536).decode("utf-8-sig", errors="replace").strip()
    present = [name.strip('"') for name in header.split(",")]
    missing = [name for name in required if name not in present]
    if missing:
        raise InputError(
            f"{path}, line 1: column {', '.join(missing)} is missing (found: {header[:120]}); "
            f"expected Open Images' CSV with at least {', '.join(required)}"
        )


def _stream(path: Path, options: pa_csv.ConvertOptions, newlines_in_values: bool = False) -> Iterator[pa.RecordBatch]:
    try:
        with pa_csv.open_csv(
            path, convert_options=options, parse_options=pa_csv.ParseOptions(newlines_in_values=newlines_in_values)
        ) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        found = _find_bad_cell(path, options.column_types)
        message = found or f"{path}: {str(error).splitlines()[0]}"
        raise InputError(f"{message}; mend the line, or get the file again if it was cut off") from None


def _find_bad_cell(path: Path, kinds: dict[str, pa.DataType]) -> str | None:
    """Where the first row is that Arrow cannot read, by reading again in plain Python: slow, but only on the way out."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = next(reader)
        for row in reader:
            if len(row) != len(header):
                return f"{path}, line {reader.line_num}: {len(row)} cells, the header has {len(header)}"
            for name, cell in zip(header, row, strict=True):
                kind = kinds.get(name)
                if kind is None or not cell or pa.types.is_string(kind):
                    continue
                try:
                    pa.scalar(cell).cast(kind)
                except pa.ArrowInvalid:
                    return f"{path}, line {reader.line_num}: {name} is {cell!r}, expected {kind}"
    return None
