"""COCO's annotation ids: those of drawn objects, and the objects of given ones (COCOEE's `id_list.npy`).

Tables of boxes go without them, since tools may leave them out or repeat them; a row's place in its file leads to its id.
"""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe_core.errors import InputError
from pbe_core.id_list import LARGEST_ID, read_id_list
from pipelines.annotations.coco_file import annotation_ids
from pipelines.annotations.source import Source
from pipelines.pairing.draw import Row
from pipelines.selection.rules import box_identity, label_hashes, object_ids
from schemas.tables import COORDINATES

_NAMED = 5


def read_different_ids(path: Path) -> list[int]:
    """The ids of a list, in its order. Raises InputError as `read_id_list`, or where one stands there twice."""
    ids = read_id_list(path)
    if twice := [number for number, count in Counter(ids).items() if count > 1]:
        raise InputError(f"{path}: id {twice[0]} stands there twice, and a pair's files are named by it")
    return ids


def ids_by_row(source: Source) -> dict[tuple[str, int], int] | None:
    """File and row -> annotation id; nothing where ids are missing, repeated or no whole numbers, and so are no names."""
    if len({path.name for path in source.files}) < len(source.files):  # Roboflow's folders: a row does not tell its file.
        return None
    found: dict[tuple[str, int], int] = {}
    for path in source.files:
        for row, number in enumerate(annotation_ids(path), start=1):
            if number is None or not 0 <= number <= LARGEST_ID:
                return None
            found[path.name, row] = number
    return found if len(set(found.values())) == len(found) else None


def ids_of_objects(source: Source, wanted: Collection[str], by_row: dict[tuple[str, int], int]) -> dict[str, int]:
    """Object id -> annotation id, of the first box where one stands in a file twice. Reads all boxes once."""
    wanted = frozenset(wanted)
    found: dict[str, int] = {}
    for batch in source.read_boxes():
        good = batch.filter(pc.is_null(batch["problem"]))
        labels = label_hashes([label or "" for label in good["label"].to_pylist()])[:-1]
        edges = [good[name].to_numpy(zero_copy_only=False) + 0.0 for name in COORDINATES]
        names = object_ids(good["photo_id"], box_identity(labels, *edges)).to_pylist()
        places = zip(names, good["file"].to_pylist(), good["row"].to_pylist(), strict=True)
        for name, file, row in places:
            if name in wanted:
                found.setdefault(name, by_row[file, row])
    return found


def objects_of_ids(source: Source, ids: list[int], by_row: dict[tuple[str, int], int]) -> tuple[dict[int, Row], dict[int, str]]:
    """Annotation id -> a row as `objects.parquet` would have it; and -> why there is none: `no_such_annotation`, or its problem.

    No rule of selection is asked.

    Raises:
        InputError: not one of the ids is there.
    """
    wanted = set(ids)
    rows: dict[int, Row] = {}
    problems: dict[int, str] = {}
    for batch in source.read_boxes():
        places = zip(batch["file"].to_pylist(), batch["row"].to_pylist(), strict=True)
        for box in batch.filter(pa.array([by_row[place] in wanted for place in places], pa.bool_())).to_pylist():
            number = by_row[box["file"], box["row"]]
            if box["problem"]:
                problems[number] = box["problem"]
            else:
                rows[number] = box
    if not rows and not problems:
        raise InputError(
            f"{source.name}: none of the {len(ids):,} ids is an annotation's; COCOEE's are those of instances_val2017"
        )
    photos = {row["photo_id"] for row in rows.values()}
    known: dict[str, Any] = {}
    for batch in source.read_photos():
        known |= {photo["photo_id"]: photo for photo in batch.to_pylist() if photo["photo_id"] in photos}
    for number, row in rows.items():
        edges = [np.array([row[name]]) + 0.0 for name in COORDINATES]
        name = object_ids(pa.array([row["photo_id"]]), box_identity(label_hashes([row["label"]])[:-1], *edges))[0].as_py()
        label_name = source.class_names.get(row["label"]) or row["label"]
        rows[number] = {**known[row["photo_id"]], **row, "object_id": name, "label_name": label_name}
    return rows, problems | {number: "no_such_annotation" for number in ids if number not in rows.keys() | problems.keys()}


def some(ids: Collection[int]) -> str:
    """The first few ids, in words."""
    named = ", ".join(str(one) for one in list(ids)[:_NAMED])
    return named if len(ids) <= _NAMED else f"{named} and {len(ids) - _NAMED:,} more"
