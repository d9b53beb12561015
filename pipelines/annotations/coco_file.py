"""One file of COCO's, instances_*.json, in memory: photos and categories by id, and annotations as they stand.

Format: https://cocodataset.org/#format-data.
"""

import gzip
import json
import reprlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.annotations.rows import file_name_problem, is_text, shown
from schemas.errors import InputError

_KEYS = ("images", "annotations", "categories")
_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Photo:
    """An entry of `images`."""

    file_name: str | None
    width: int | None
    height: int | None
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


def read_instances(path: Path, folder: str) -> Instances:
    """All that is in a file, plain or gzipped.

    Args:
        path: of the file.
        folder: what stands before each file name of a photo.

    Raises:
        InputError: the file is not JSON, is cut off, or is not in COCO's format; an id that stands for two things.
    """
    document = _parse(path)
    if not isinstance(document, dict):
        raise InputError(
            f"{path}, line 1: a JSON {'list' if isinstance(document, list) else 'value'}, expected an object with "
            f"{', '.join(_KEYS)}; results of a detector have this form, annotations have not: take an instances_*.json"
        )
    for key in _KEYS:
        if not isinstance(document.get(key), list):
            raise InputError(
                f"{path}: no list `{key}` in it (found: {reprlib.repr(list(document))}), so it is not COCO's format of objects; "
                f"captions and lists of photos alone have this form: take an instances_*.json"
            )
    photos, nameless = _photos(document, path, folder)
    return Instances(photos, nameless, document["annotations"], _categories(document["categories"], path))


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


def _photos(document: dict[str, Any], path: Path, folder: str) -> tuple[dict[str, Photo], int]:
    """Photos by id, and the number of entries that have none."""
    entries = document["licenses"] if isinstance(document.get("licenses"), list) else []
    licences = {identifier(entry.get("id")): _text(entry.get("url")) for entry in entries if isinstance(entry, dict)}
    licences[None] = None
    photos: dict[str, Photo] = {}
    nameless = 0
    for number, entry in enumerate(document["images"], start=1):
        photo_id = identifier(entry.get("id")) if isinstance(entry, dict) else None
        if photo_id is None:
            nameless += 1
            continue
        photo = _photo(entry, photo_id, folder, licences)
        if photos.setdefault(photo_id, photo) != photo:
            raise InputError(
                f"{path}: image id {photo_id} stands twice in `images`, the second time, entry {number}, with other contents; "
                f"each image needs an id of its own (was the file put together from two? then number them through)"
            )
    return photos, nameless


def _photo(entry: dict[str, Any], photo_id: str, folder: str, licences: Mapping[str | None, str | None]) -> Photo:
    problem = None
    width, height = whole_number(entry.get("width")), whole_number(entry.get("height"))
    if width is None or height is None or not (0 < width <= _INT32 and 0 < height <= _INT32):
        sizes = f"{shown(entry.get('width'))} x {shown(entry.get('height'))}"
        problem = f"its image, id {photo_id}, has `width` x `height` {sizes}, expected whole numbers of px"
        width = height = None
    file_name = entry.get("file_name")
    wrong = file_name_problem(file_name)
    if wrong:
        problem = f"its image, id {photo_id}, has `file_name` {shown(file_name)}, which {wrong}"
    return Photo(
        file_name=None if wrong else f"{folder}{file_name}",
        width=width,
        height=height,
        url=_text(entry.get("coco_url")) or _text(entry.get("flickr_url")),  # The first is the file itself.
        licence=licences.get(identifier(entry.get("license"))),
        problem=problem,
    )


def _categories(entries: Sequence[Any], path: Path) -> dict[str, Category]:
    categories: dict[str, Category] = {}
    for number, entry in enumerate(entries, start=1):
        class_id = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        name = _text(entry.get("name")) if isinstance(entry, dict) else None
        if class_id is None or name is None:
            raise InputError(
                f"{path}: entry {number} of `categories` is {shown(entry)}, expected a whole number `id` and a `name`; mend it"
            )
        if str(class_id) in categories:
            raise InputError(
                f"{path}: category id {class_id} stands twice in `categories`, as `{categories[str(class_id)].name}` and, "
                f"entry {number}, as `{name}`; each category needs an id of its own"
            )
        categories[str(class_id)] = Category(name, _text(entry.get("supercategory")))
    return categories


def whole_number(value: Any) -> int | None:
    """A whole number; some writers make floats of ids and sizes, 5.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def identifier(value: Any) -> str | None:
    """An id as text; a number and its digits are the same one."""
    number = whole_number(value)
    return _text(value) if number is None else str(number)


def _text(value: Any) -> str | None:
    return value if is_text(value) and value else None
