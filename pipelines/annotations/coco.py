"""COCO: instances_*.json, with outlines (polygons or RLE) and a class hierarchy of two levels.

    instances_train2017.json ──▶ images      ──▶ PHOTOS
                                 annotations ──▶ BOXES, outlines as compressed RLE
                                 categories  ──▶ class names, supercategories

Format: https://cocodataset.org/#format-data. A box is [x, y, width, height] in px of the photo as stored: the stored pixels
are what COCO's annotators saw, whatever EXIF may say.

Python's parser cannot stream JSON, so a file is in memory as a whole while it is read, and takes 6.4 times its size (measured
on 100 MB with outlines; COCO's train2017, 450 MB: about 2.9 GB). It is parsed anew for each use, in 2.3 s per 100 MB: by opening
(categories may stand at its end), for the boxes, for the photos. Nothing is kept between them, and of two files one at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.annotations.coco_file import Category, Instances, identifier, read_instances, whole_number
from pipelines.annotations.outlines import compress_outline
from pipelines.annotations.rows import UNKNOWN_FLAGS, RowProblem, clip_overshoot, in_batches, shown
from pipelines.annotations.source import Source
from pipelines.annotations.splits import assign_splits
from pipelines.config import SourceSettings
from schemas.errors import InputError
from schemas.tables import BOXES, PHOTOS

_SPLIT_NAMES = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class _File:
    path: Path
    split: str | None  # None: by a hash of the photo.
    folder: str  # What stands before each file name, below the photo folder.


def open_coco(settings: SourceSettings, seed: int, roots: Sequence[Path] = (), elsewhere: bool = False) -> Source:
    """Open COCO's annotations: a folder with a file for each split, or one file whose photos are divided by a hash of their ids.

    Ids of photos are COCO's image ids; boxes of photos that are not listed count under the first of `settings.splits`. File
    names lie below the photo folder: those of instances_train2017.json in its folder train2017, if there is one. Class ids are
    category ids. A supercategory is a class above its categories, with the id `supercategory:vehicle` and the name `vehicle`;
    where a category bears that name, as `person` does, it stands for both.

    Args:
        settings: of the source.
        seed: of the hash that divides photos.
        roots: folders of photos; `settings.photos` by default.
        elsewhere: photos are in none of these, but where COCO publishes them, by train2017 and val2017.

    Raises:
        InputError: no file for a split, or more than one; a file that is not JSON, is cut off, or is not in COCO's format; an id
            that stands for two things.
    """
    files = _files(settings, roots or [settings.photos], elsewhere)
    categories: dict[str, Category] = {}
    homes: dict[str, Path] = {}
    rows = 0
    for file in files:
        instances = read_instances(file.path, file.folder)
        rows += len(instances.annotations)
        for photo_id in instances.photos:
            if photo_id in homes:
                raise InputError(
                    f"{file.path}: image id {photo_id} is in {homes[photo_id].name} too: one photo would be in two splits, or "
                    f"two photos would share an id; leave it in one file, or number the images of all files through"
                )
            homes[photo_id] = file.path
        for class_id, category in instances.categories.items():
            if categories.setdefault(class_id, category).name != category.name:
                raise InputError(
                    f"{file.path}: category {class_id} is `{category.name}`, in another file "
                    f"`{categories[class_id].name}`; give categories the same ids in all files"
                )
        del instances  # Or two files would be in memory while the next one is parsed.
    class_names, subclasses = class_hierarchy(categories, settings.annotations)
    return Source(
        name=str(settings.annotations),
        files=tuple(file.path for file in files),
        frame="stored",
        read_boxes=lambda: (batch for file in files for batch in _read_boxes(file, settings, seed)),
        read_photos=lambda: (batch for file in files for batch in _read_photos(file, settings, seed)),
        listed_splits=frozenset(settings.splits),
        class_names=class_names,
        subclasses=subclasses,
        rows=rows,
    )


def class_hierarchy(categories: Mapping[str, Category], place: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Class id -> name and class id -> ids directly below it, supercategories included.

    Raises:
        InputError: supercategories go in a circle.
    """
    names = {class_id: category.name for class_id, category in categories.items()}
    first = {name.casefold(): class_id for class_id, name in reversed(names.items())}
    below: dict[str, list[str]] = {}
    for class_id, category in categories.items():
        above = category.supercategory
        if above is None or first.get(above.casefold()) == class_id:
            continue
        parent = first.get(above.casefold(), f"supercategory:{above}")
        names.setdefault(parent, above)
        below.setdefault(parent, []).append(class_id)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        circle = " -> ".join(names[class_id] for class_id in error.args[1])
        raise InputError(f"{place}: supercategories go in a circle: {circle}; mend one of these `supercategory` keys") from None
    return names, {class_id: tuple(members) for class_id, members in below.items()}


def _files(settings: SourceSettings, roots: Sequence[Path], elsewhere: bool) -> list[_File]:
    place = settings.annotations
    if place.is_file():
        return [_File(place, None, _photo_folder(place, roots, elsewhere))]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder; set build.source.annotations to COCO's JSON, or to a folder with it")
    files = []
    for split in settings.splits:
        pattern = f"instances_{_SPLIT_NAMES[split]}*.json"
        found = sorted([*place.glob(pattern), *place.glob(f"{pattern}.gz")])
        if not found:
            raise InputError(
                f"{place}: no file {pattern} (or .json.gz) for the split {split}; put it there, take `{split}` out of "
                f"build.source.splits, or set build.source.annotations to one JSON file"
            )
        if len(found) > 1:
            raise InputError(
                f"{place}: {' and '.join(path.name for path in found)} are both {pattern}, the split {split}; "
                f"leave one of them in this folder"
            )
        files.append(_File(found[0], split, _photo_folder(found[0], roots, elsewhere)))
    return files


def _photo_folder(path: Path, roots: Sequence[Path], elsewhere: bool) -> str:
    name = path.name.partition(".")[0]
    folder = name.removeprefix("instances_")
    if not folder or folder == name:
        return ""
    return f"{folder}/" if elsewhere or any((root / folder).is_dir() for root in roots) else ""


def _read_boxes(file: _File, settings: SourceSettings, seed: int) -> Iterator[pa.RecordBatch]:
    """Stream one file's boxes: about 18,000 a second with outlines, on one core."""
    instances = read_instances(file.path, file.folder)
    rows = _boxes(file, instances, _splits(file, instances, settings, seed), settings.splits[0])
    yield from in_batches((row for row in rows if row["split"] in settings.splits), BOXES)


def _read_photos(file: _File, settings: SourceSettings, seed: int) -> Iterator[pa.RecordBatch]:
    """Stream one file's photos, those with no box too. One without a usable file name is left out: its boxes are bad rows."""
    instances = read_instances(file.path, file.folder)
    splits = _splits(file, instances, settings, seed)
    rows = (
        {
            "split": splits[photo_id],
            "photo_id": photo_id,
            "file_name": photo.file_name,
            "width": photo.width,
            "height": photo.height,
            "url": photo.url,
            "licence": photo.licence,
        }
        for photo_id, photo in instances.photos.items()
        if photo.file_name is not None and splits[photo_id] in settings.splits
    )
    yield from in_batches(rows, PHOTOS)


def _splits(file: _File, instances: Instances, settings: SourceSettings, seed: int) -> dict[str, str]:
    """The split of each photo."""
    if file.split:
        return dict.fromkeys(instances.photos, file.split)
    assigned = assign_splits(list(instances.photos), seed, settings.validation_share)
    return dict(zip(instances.photos, assigned, strict=True))


def _boxes(file: _File, instances: Instances, splits: Mapping[str, str], split_of_unknown: str) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for number, annotation in enumerate(instances.annotations, start=1):
        row = {**UNKNOWN_FLAGS, "split": file.split or split_of_unknown, "file": file.path.name, "row": number}
        try:
            _fill(row, annotation, instances, splits, seen)
        except RowProblem as problem:
            name = f"id {shown(annotation['id'])}" if isinstance(annotation, dict) and "id" in annotation else "no id"
            row.update(problem=problem.reason, detail=f"annotation {number} ({name}): {problem}")
        yield row


def _fill(row: dict[str, Any], annotation: Any, instances: Instances, splits: Mapping[str, str], seen: set[str]) -> None:
    """Put into the row what the annotation says, or, up to there, raise the first problem in the order of `REJECT_REASONS`."""
    if not isinstance(annotation, dict):
        raise RowProblem("bad_row", f"is {shown(annotation)}, expected an object")
    annotation_id = identifier(annotation.get("id"))
    photo_id = row["photo_id"] = identifier(annotation.get("image_id"))
    category_id = whole_number(annotation.get("category_id"))
    label = row["label"] = None if category_id is None else str(category_id)
    photo = instances.photos.get(photo_id) if photo_id else None
    if photo_id is not None and photo_id in splits:
        row["split"] = splits[photo_id]
    again = annotation_id in seen
    if annotation_id is not None:
        seen.add(annotation_id)

    for key, value in (("id", annotation_id), ("image_id", photo_id), ("category_id", label)):
        if value is None:
            raise RowProblem("bad_row", f"`{key}` {_is_what(annotation, key)}, expected a whole number")
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise RowProblem("bad_row", f"`bbox` {_is_what(annotation, 'bbox')}, expected [x, y, width, height]")
    if photo and photo.problem:
        raise RowProblem("bad_row", photo.problem)
    if not all(_is_number(value) for value in box):
        raise RowProblem("bad_number", f"`bbox` is {shown(box)}, expected four finite numbers")
    x, y, width, height = box
    if photo and photo.width and photo.height:
        x_min, x_max = clip_overshoot(x, x + width, photo.width, 1)
        y_min, y_max = clip_overshoot(y, y + height, photo.height, 1)
        row["x_min"], row["x_max"] = x_min / photo.width, x_max / photo.width
        row["y_min"], row["y_max"] = y_min / photo.height, y_max / photo.height
        if min(x_min, y_min) < 0 or x_max > photo.width or y_max > photo.height:
            size = f"{photo.width}x{photo.height}"
            raise RowProblem("outside_photo", f"`bbox` {shown(box)} reaches beyond its photo of {size} px")
    if width <= 0 or height <= 0:
        raise RowProblem("empty_box", f"`bbox` is {shown(box)}: width and height must be positive")
    crowd = annotation.get("iscrowd", -1)
    if crowd not in (0, 1, -1):
        raise RowProblem("bad_flag", f"`iscrowd` is {shown(crowd)}, expected 0 or 1")
    row["is_group_of"] = int(crowd)
    if photo and photo.width and photo.height:
        try:
            row["segmentation"] = compress_outline(annotation.get("segmentation"), photo.width, photo.height)
        except ValueError as error:
            raise RowProblem("bad_segmentation", f"`segmentation` {error}") from None
    if again:
        raise RowProblem("duplicate_id", f"`id` {annotation_id} is that of an annotation before it")
    if label not in instances.categories:
        raise RowProblem("unknown_label", f"`category_id` {label} is not in `categories`")
    if photo is None:
        more = f" (where {instances.nameless} entries have no id)" if instances.nameless else ""
        raise RowProblem("unknown_photo", f"`image_id` {photo_id} is not in `images`{more}")


def _is_number(value: Any) -> bool:
    # Python's whole numbers know no bound, and JSON has NaN and Infinity where Python wrote it.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_what(annotation: dict[str, Any], key: str) -> str:
    return f"is {shown(annotation[key])}" if key in annotation else "is missing"
