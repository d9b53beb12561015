"""Selection: boxes -> objects + rejects, each reject with the first rule that it breaks. Vectorised over record batches.

Rules look at one box at a time, in this order: malformed rows, flags, area. A box that stands twice in the source is one object;
the second row is rejected as a duplicate.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, UInt64

from pipelines.config import SelectionSettings
from schemas.randomness import name_hash
from schemas.tables import BOXES, FLAGS, OBJECTS, REJECTS

# Ids become file names and sample keys, so no separators and no dots.
PHOTO_ID = r"^[A-Za-z0-9_-]{1,64}$"
_COORDINATES = ("x_min", "x_max", "y_min", "y_max")


@dataclass(frozen=True)
class Selected:
    """A batch divided: accepted rows (columns of `OBJECTS`, without metadata of the photo) and rejected ones (`REJECTS`)."""

    objects: pa.Table
    rejects: pa.Table


def select(boxes: pa.RecordBatch, settings: SelectionSettings) -> Selected:
    """Divide boxes by the rules that look at one box alone (all but `duplicate`). accepted + rejected = read."""
    coordinates = {name: _float(boxes.column(name)) for name in _COORDINATES}
    x_min, x_max, y_min, y_max = (coordinates[name] for name in _COORDINATES)
    # Comparisons with NaN (also a null cell) are false, so what is not a number is not inside.
    proper = (x_min >= 0) & (x_min < x_max) & (x_max <= 1) & (y_min >= 0) & (y_min < y_max) & (y_max <= 1)
    area = (x_max - x_min) * (y_max - y_min)
    flags = {name: pc.fill_null(boxes.column(name), -2).to_numpy(zero_copy_only=False) for name in FLAGS}

    broken: list[tuple[str, Bool[np.ndarray, " boxes"]]] = [
        ("bad_photo_id", ~_true(pc.match_substring_regex(boxes.column("photo_id"), PHOTO_ID))),
        ("bad_box", ~proper | ~_true(pc.is_valid(boxes.column("label")))),
        ("bad_flag", np.any([(values < -1) | (values > 1) for values in flags.values()], axis=0)),
        *[(flag, flags[f"is_{flag}"] == 1) for flag in settings.reject_flags],
    ]
    if settings.unknown_flags == "reject" and settings.reject_flags:
        broken.append(("unknown_flag", np.any([flags[f"is_{flag}"] == -1 for flag in settings.reject_flags], axis=0)))
    broken += [("too_small", area < settings.min_area), ("too_large", area > settings.max_area)]

    names = np.array(["", *(name for name, _ in broken)])
    violations = np.stack([np.zeros(len(boxes), bool), *(rows for _, rows in broken)])
    reason = names[violations.argmax(axis=0)]  # argmax finds the first rule; row 0, "", where none is broken.
    accepted = reason == ""

    table = pa.Table.from_batches([boxes])
    objects = table.filter(pa.array(accepted)).append_column("area_share", pa.array(area[accepted]))
    rejects = table.filter(pa.array(~accepted)).append_column("reason", pa.array(reason[~accepted], pa.string()))
    return Selected(objects.append_column("object_id", object_ids(objects)), rejects)


def object_ids(boxes: pa.Table) -> pa.Array:
    """`<photo_id>-<12 hex digits>`, the digits a hash of label and coordinates: no row order or selection changes them."""
    labels = boxes["label"].combine_chunks().dictionary_encode()
    hashes = np.array([name_hash("label", label) for label in labels.dictionary.to_pylist()], np.uint64)
    mixed = hashes[labels.indices.to_numpy()] if len(boxes) else np.zeros(0, np.uint64)
    for name in _COORDINATES:
        mixed = _mix(mixed ^ boxes[name].to_numpy().astype("<f8").view(np.uint64))
    digits = np.frombuffer(b"0123456789abcdef", "S1")
    nibbles = (mixed[:, None] >> (np.arange(12, dtype=np.uint64) * np.uint64(4))) & np.uint64(15)
    text = digits[nibbles.astype(np.int64)].view("S12").reshape(-1).astype(str)
    return pc.binary_join_element_wise(boxes["photo_id"].combine_chunks(), pa.array(text, pa.string()), "-")


def drop_duplicates(objects: pa.Table) -> Selected:
    """Keep the first row of each object id (in file and row order); the others become rejects."""
    ordered = objects.sort_by([("file", "ascending"), ("row", "ascending")])
    ids = ordered["object_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.zeros(len(ordered), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    kept = ordered.filter(pa.array(first)).sort_by([("split", "ascending"), ("object_id", "ascending")])
    again = ordered.filter(pa.array(~first))
    rejects = again.select(BOXES.names).append_column("reason", pa.repeat("duplicate", len(again)))
    return Selected(kept, rejects)


def with_names(objects: pa.Table, class_names: dict[str, str]) -> pa.Table:
    """Add `label_name`; the class id where there is no name."""
    labels = objects["label"].combine_chunks().dictionary_encode()
    names = pa.array([class_names.get(label) or label for label in labels.dictionary.to_pylist()], pa.string())
    return objects.append_column("label_name", names.take(labels.indices))


def empty_selection() -> Selected:
    """No boxes at all, with the columns that `select` gives."""
    boxes = pa.RecordBatch.from_pylist([], schema=BOXES)
    return select(boxes, SelectionSettings())


def as_objects(objects: pa.Table) -> pa.Table:
    """Cast to `OBJECTS`; columns that the source does not have become null."""
    columns = {name: objects[name] for name in objects.column_names}
    for field in OBJECTS:
        if field.name not in columns:
            columns[field.name] = pa.nulls(len(objects), field.type)
    return pa.table([columns[name] for name in OBJECTS.names], names=OBJECTS.names).cast(OBJECTS)


def as_rejects(rejects: pa.Table) -> pa.Table:
    """Cast to `REJECTS`; what a malformed row lacks stays null, so the columns of the box are nullable here."""
    return rejects.select(REJECTS.names).cast(REJECTS)


def _mix(values: UInt64[np.ndarray, " boxes"]) -> UInt64[np.ndarray, " boxes"]:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): a bijection in which every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _float(column: pa.Array) -> np.ndarray:
    values: np.ndarray = pc.fill_null(column, float("nan")).to_numpy(zero_copy_only=False)
    return values


def _true(column: pa.Array) -> np.ndarray:
    values: np.ndarray = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
    return values
