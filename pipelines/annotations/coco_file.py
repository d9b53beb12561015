"""One file of COCO's, instances_*.json, in memory: photos and categories by id, and annotations as they stand.

Format: https://cocodataset.org/#format-data, as the field's tools write it: ids may be numbers or text, an image may lack its
size, its name may stand in another key or in `coco_url` alone (LVIS v1), and there may be no categories.
"""

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from pbe_core.errors import InputError
from pipelines.annotations.boxes import photo_id_of
from pipelines.annotations.lines import number_of
from pipelines.annotations.rows import is_text, shown

_NAMES = ("file_name", "filename", "path", "coco_url")
_URLS = ("coco_url", "flickr_url", "url")  # The first is the file itself.
_NO_SUPERCATEGORY = ("none", "null")  # As Roboflow writes of its root.
_INT32 = 2**31 - 1
# Sizes come out of divisions; farther from a whole number they are no sizes.
_ROUNDING = 0.01


@dataclass(frozen=True, slots=True)
class Photo:
    """An entry of `images`."""

    photo_id: str
    name: Any  # As it stands.
    file_name: str | None  # Below the photo folder.
    size: tuple[int, int] | None  # Width and height in px.
    url: str | None
    licence: str | None
    problem: str | None  # Why its boxes cannot be used.


@dataclass(frozen=True)
class Category:
    """An entry of `categories`."""

    name: str
    supercategory: str | None


@dataclass(frozen=True)
class Instances:
    """The contents of a file; photos and categories by their ids, as text."""

    photos: dict[str, Photo]
    nameless: int  # Entries of `images` without an id.
    annotations: list[Any]
    categories: dict[str, Category]

    def photo_of(self, image_id: str) -> Photo | None:
        """The photo of an annotation's `image_id`; some tools write the image's file name there."""
        return self.photos.get(image_id) or self._by_name.get(image_id)

    @cached_property
    def _by_name(self) -> dict[str, Photo]:
        named: dict[str, list[Photo]] = {}
        for photo in self.photos.values():
            if is_text(photo.name):
                named.setdefault(photo.name, []).append(photo)
        return {name: photos[0] for name, photos in named.items() if len({photo.photo_id for photo in photos}) == 1}


def read_instances(path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]) -> Instances:
    """All that is in a file, plain or gzipped.

    Args:
        path: of the file.
        path_of: a photo's name as the file has it -> its path below the photo folder; raises ValueError.
        id_of: an image's id as text, and the photo's path -> the photo's id.

    Raises:
        InputError: the file is not JSON, is cut off, or is not in COCO's format of objects; an id that stands for two things.
    """
    document = _parse(path)
    _check_format(document, path)
    photos, nameless = _photos(document, path, path_of, id_of)
    return Instances(photos, nameless, document["annotations"] or [], _categories(document.get("categories") or [], path))


def _parse(path: Path) -> Any:
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error}); save it as UTF-8, or, if it is compressed, name it .json.gz"
        ) from None
    except (EOFError, zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError.
        raise InputError(f"{path}: cannot be read ({error}); if it is there, get it again: it was damaged or cut off") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = not text.rstrip().endswith("}")
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); "
            f"the file {'is empty or was cut off' if cut else 'is damaged there'}: get it again"
        ) from None
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, thousands of brackets.
        raise InputError(f"{path}: JSON that cannot be read ({error}); no COCO file has such contents: get it again") from None


def _check_format(document: Any, path: Path) -> None:
    if not isinstance(document, dict):
        raise InputError(
            f"{path}, line 1: a JSON {'list' if isinstance(document, list) else 'value'}, expected an object with images, "
            f"annotations, categories; results of a detector have this form, annotations have not: take an instances_*.json"
        )
    lists = {
        "images": isinstance(document.get("images"), list),
        "annotations": "annotations" in document and isinstance(document["annotations"], list | NoneType),
        "categories": isinstance(document.get("categories"), list | NoneType),
    }
    for key, is_there in lists.items():
        if not is_there:
            raise InputError(
                f"{path}: no list `{key}` in it (found: {reprlib.repr(list(document))}), so it is not COCO's format of objects; "
                f"lists of photos alone have this form: take an instances_*.json"
            )
    annotations = document["annotations"] or []
    first = next((annotation for annotation in annotations if isinstance(annotation, dict)), None)
    if first is None or any(isinstance(annotation, dict) and "bbox" in annotation for annotation in annotations):
        return
    if "segments_info" in first:
        kind = "it is in COCO's panoptic format, masks of whole photos in PNG files"
    else:
        kind = f"the first one has {reprlib.repr(list(first))}, as captions or labels of whole photos have"
    raise InputError(f"{path}: no annotation has a `bbox`; {kind}; take the instances_*.json of the same photos")


def _photos(
    document: dict[str, Any], path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]
) -> tuple[dict[str, Photo], int]:
    """Photos by id, and the number of entries that have none."""
    entries = document["licenses"] if isinstance(document.get("licenses"), list) else []
    licences = {identifier(entry.get("id")): clean_text(entry.get("url")) for entry in entries if isinstance(entry, dict)}
    licences[None] = None
    photos: dict[str, Photo] = {}
    with_id: dict[str, Photo] = {}
    nameless = 0
    for number, entry in enumerate(document["images"], start=1):
        image_id = identifier(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is None:
            nameless += 1
            continue
        photo = _photo(entry, image_id, path_of, id_of, licences)
        first = photos.setdefault(image_id, photo)
        if first is not photo and not _one_photo(first, photo):
            raise InputError(
                f"{path}: image id {image_id} stands twice in `images`, the second time, entry {number}, with other contents; "
                f"each image needs an id of its own (was the file put together from two? then number them through)"
            )
        if with_id.setdefault(photo.photo_id, photo).file_name != photo.file_name:
            raise InputError(f"{path}: image id {image_id} and another one get the same id, {photo.photo_id}; rename one of them")
    return photos, nameless


def _photo(
    entry: dict[str, Any],
    image_id: str,
    path_of: Callable[[Any], str],
    id_of: Callable[[str, str | None], str],
    licences: Mapping[str | None, str | None],
) -> Photo:
    key = next((key for key in _NAMES if is_given(entry.get(key))), "file_name")
    file_name = problem = None
    try:
        file_name = path_of(entry.get(key))
    except ValueError as error:
        problem = f"its image, id {image_id}, has `{key}` {shown(entry.get(key))}, which {error}"
    width, height = side(entry.get("width")), side(entry.get("height"))
    return Photo(
        photo_id=id_of(image_id, file_name),
        name=entry.get(key),
        file_name=file_name,
        size=(width, height) if width and height else None,
        url=next(filter(None, (clean_text(entry.get(url)) for url in _URLS)), None),
        licence=licences.get(identifier(entry.get("license"))),
        problem=problem,
    )


def _one_photo(first: Photo, second: Photo) -> bool:
    """Whether two entries of one id are of one photo: it has one name, and sizes may differ by rounding."""
    sizes = zip(first.size or (), second.size or (), strict=False)
    return first.file_name == second.file_name and all(abs(a - b) <= 1 for a, b in sizes)


def _categories(entries: Sequence[Any], path: Path) -> dict[str, Category]:
    categories: dict[str, Category] = {}
    for number, entry in enumerate(entries, start=1):
        class_id = identifier(entry.get("id")) if isinstance(entry, dict) else None
        if class_id is None:
            raise InputError(f"{path}: entry {number} of `categories` is {shown(entry)}, expected an `id` and a `name`; mend it")
        # Digits are names of classes in some sets; a class without a name is called by its id.
        name = identifier(entry.get("name")) or class_id
        if class_id in categories and categories[class_id].name != name:
            raise InputError(
                f"{path}: category id {class_id} stands twice in `categories`, as `{categories[class_id].name}` and, "
                f"entry {number}, as `{name}`; each category needs an id of its own"
            )
        above = clean_text(entry.get("supercategory"))
        categories[class_id] = Category(name, None if above and above.casefold() in _NO_SUPERCATEGORY else above)
    return categories


def is_given(value: Any) -> bool:
    """Whether a key says anything: tools write null, empty text or NaN where there is nothing to say."""
    return not (value is None or value == "" or value != value or (isinstance(value, str) and not value.strip()))


def identifier(value: Any) -> str | None:
    """An id as text: a number and its digits are the same one, as are 5 and 5.0. Nothing where this is no id."""
    if type(value) is int:
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    word = clean_text(value)
    if word and word.endswith(".0") and word[:-2].isdecimal():
        return word[:-2]
    return word


def side(value: Any) -> int | None:
    """A photo's width or height in px; nothing where this is none, as -1 or 0."""
    number = number_of(value)
    if number is None or not 0 < (whole := round(number)) <= _INT32 or abs(number - whole) > _ROUNDING:
        return None
    return whole


def clean_text(value: Any) -> str | None:
    """Text without spaces around it; nothing where this is none, or empty."""
    return value.strip() or None if is_text(value) else None


def plain_id(image_id: str) -> str:
    """The id of a photo by its image's id, which may be a file's name or a path."""
    return image_id if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", image_id) else photo_id_of(image_id)
