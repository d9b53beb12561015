"""An annotation of COCO's -> a row of `BOXES`, or what is wrong with it."""

from collections.abc import Callable, Mapping
from typing import Any

from pbe_core.images.decode import PhotoError
from pbe_core.words import noun
from pipelines.annotations.boxes import ONLY_LABEL
from pipelines.annotations.coco_file import Category, Instances, Photo, identifier, is_given, plain_id
from pipelines.annotations.lines import number_of
from pipelines.annotations.outlines import compress_outline
from pipelines.annotations.rows import RowProblem, clip_overshoot, shown

# Of coordinates in px: what is farther out is no place in a photo.
_LARGEST = 1e300


def fill_row(
    row: dict[str, Any],
    annotation: dict[str, Any],
    photo: Photo | None,
    instances: Instances,
    size_of: Callable[[Photo], tuple[int, int]],
) -> str | None:
    """Put into a row what its annotation says.

    Args:
        row: split, file and row are there. What is read before a problem is found stays in it.
        annotation: as it stands in the file.
        photo: of the annotation, if the file lists it.
        instances: the file.
        size_of: a photo's width and height in px; raises PhotoError.

    Returns:
        Why the annotation's outline cannot be used, where it cannot: the box is good without it.

    Raises:
        RowProblem: the first one in the order of `REJECT_REASONS`.
    """
    image_id = identifier(annotation.get("image_id"))
    if image_id is not None:
        row["photo_id"] = photo.photo_id if photo else plain_id(image_id)
    label = row["label"] = label_of(annotation, instances.categories)
    if image_id is None:
        raise RowProblem("bad_row", f"`image_id` {_is_what(annotation, 'image_id')}, expected a number or text")
    if label is None:
        raise RowProblem("bad_row", f"`category_id` {_is_what(annotation, 'category_id')}, expected a number or text")
    x, y, width, height = _box(annotation, photo)
    size = unknown = None
    try:
        size = size_of(photo) if photo else None
    except PhotoError as error:
        unknown = f"the size of its image, {shown(photo and photo.name)}, is not given and cannot be read ({error})"
    if size:
        _place(row, (x, y, x + width, y + height), size, annotation)
    if width <= 0 or height <= 0:
        raise RowProblem("empty_box", f"`bbox` is {shown(annotation['bbox'])}: width and height must be positive")
    row["is_group_of"] = _crowd(annotation.get("iscrowd"))
    if label != ONLY_LABEL and label not in instances.categories:
        raise RowProblem("unknown_label", f"`category_id` {label} is not in `categories`")
    if photo is None:
        nameless = instances.nameless
        have = f"{noun(nameless, 'entries')} {'has' if nameless == 1 else 'have'}"
        more = f" (where {nameless} {have} no id)" if nameless else ""
        raise RowProblem("unknown_photo", f"`image_id` {image_id} is not in `images`{more}")
    if unknown or size is None:
        raise RowProblem("unknown_photo", str(unknown))
    try:
        row["segmentation"] = compress_outline(annotation.get("segmentation"), *size)
    except ValueError as error:
        return f"`segmentation` {error}"
    return None


def label_of(annotation: dict[str, Any], categories: Mapping[str, Category]) -> str | None:
    """The class id of an annotation; `object` where it or its file names none; nothing where there is something else."""
    category_id = annotation.get("category_id")
    return identifier(category_id) if categories and is_given(category_id) else ONLY_LABEL


def _box(annotation: dict[str, Any], photo: Photo | None) -> list[float]:
    """Left, top, width and height in px."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise RowProblem("bad_row", f"`bbox` {_is_what(annotation, 'bbox')}, expected [x, y, width, height]")
    if photo and photo.problem:
        raise RowProblem("bad_row", photo.problem)
    numbers = [value for value in map(number_of, box) if value is not None and abs(value) < _LARGEST]
    if len(numbers) != 4:
        raise RowProblem("bad_number", f"`bbox` is {shown(box)}, expected four finite numbers")
    return numbers


def _place(
    row: dict[str, Any], corners: tuple[float, float, float, float], size: tuple[int, int], annotation: dict[str, Any]
) -> None:
    """The box as fractions of its photo."""
    width, height = size
    x_min, x_max = clip_overshoot(corners[0], corners[2], width, 1)
    y_min, y_max = clip_overshoot(corners[1], corners[3], height, 1)
    row.update(x_min=x_min / width, x_max=x_max / width, y_min=y_min / height, y_max=y_max / height)
    if min(x_min, y_min) < 0 or x_max > width or y_max > height:
        raise RowProblem("outside_photo", f"`bbox` {shown(annotation['bbox'])} reaches beyond its photo of {width}x{height} px")


def _crowd(value: Any) -> int:
    """COCO's `iscrowd` as a flag: 1, 0, or -1 where it is not given."""
    if not is_given(value):
        return -1
    number = number_of(int(value) if isinstance(value, bool) else value)
    if number not in (0, 1, -1):
        raise RowProblem("bad_flag", f"`iscrowd` is {shown(value)}, expected 0 or 1")
    return int(number)


def _is_what(annotation: dict[str, Any], key: str) -> str:
    return f"is {shown(annotation[key])}" if key in annotation else "is missing"
