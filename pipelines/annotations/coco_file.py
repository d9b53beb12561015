"""COCO's files: which hold the boxes of which split, and what is in one: photos and categories by id, annotations as they stand.

A folder holds a file for each split: instances_train2017.json as COCO publishes it (photos in train2017), or
train/_annotations.coco.json as Roboflow exports it (photos beside it), or a name with the split's word in it, lvis_v1_train.json.
One file of any name may be given itself, and a hash divides its photos.

Format: https://cocodataset.org/#format-data, as the field's tools write it: ids may be numbers or text, an image may lack its
size, its name may stand in another key or in `coco_url` alone (LVIS v1), and there may be no categories.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.rle import decode_counts
from pipelines.annotations.source import as_number, is_text, photo_id_of, shown
from pipelines.config import SourceSettings

_WORDS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
BESIDE_PHOTOS = "_annotations.coco.json"
# Files of the same photos that hold no boxes of objects, or the same boxes again.
_OTHERS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
_NAMES = ("file_name", "filename", "path", "coco_url")
_URLS = ("coco_url", "flickr_url", "url")  # The first is the file itself.
_NO_SUPERCATEGORY = ("none", "null")  # As Roboflow writes of its root.
_FREQUENCIES = ("r", "c", "f")
_INT32 = 2**31 - 1
# Of one annotation, in px. pycocotools draws polygons at five times the photo's scale, point by point, in 32-bit numbers that it
# does not check; COCO's longest outlines have some 10,000 px.
MAX_OUTLINE = 1_000_000
MAX_COORDINATE = 100_000_000
# The most px of a photo with object masks. The limit keeps what pycocotools 2.0.11 writes within the memory that it reserves:
# enough where at most two of a mask's runs have 2**24 px or more.
MAX_MASKED_PHOTO = 3 * 2**24
# Sizes come out of divisions; farther from a whole number they are no sizes.
_ROUNDING = 0.01


@dataclass(frozen=True)
class CocoFile:
    """A file of COCO's format."""

    path: Path
    split: str | None
    """Of its photos; null where a hash of each photo decides."""
    folder: str
    """What stands before each file name, below the photo folder: empty, or with a / at its end."""


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
    other_names: tuple[str, ...] = ()
    """LVIS: its synonyms and its WordNet synset."""
    frequency: str | None = None
    """LVIS: `r`, `c` or `f`, of how many photos of its training split it is in: up to 10, up to 100, or more."""


@dataclass(frozen=True)
class Instances:
    """The contents of a file; photos and categories by their ids, as text."""

    photos: dict[str, Photo]
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


def coco_files(settings: SourceSettings, roots: Sequence[Path], elsewhere: bool) -> list[CocoFile]:
    """The files to read: the one that the settings name, or one for each split from the folder that they name.

    Args:
        settings: of the source.
        roots: folders of photos.
        elsewhere: photos are in none of these, but where COCO publishes them, by train2017 and val2017.

    Raises:
        InputError: no file for a split, or more than one.
    """
    place = settings.annotations
    if place.is_file():
        return [CocoFile(place, None, photo_folder(place, roots, elsewhere))]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder; set build.source.annotations to COCO's JSON, or to a folder with it")
    paths = {split: _of_split(place, split) for split in settings.splits}
    return [CocoFile(path, split, photo_folder(path, roots, elsewhere)) for split, path in paths.items()]


def read_instances(path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]) -> Instances:
    """All that is in a file, plain or gzipped.

    Args:
        path: of the file.
        path_of: a photo's name as the file has it -> its path below the photo folder; raises ValueError.
        id_of: an image's id as text, and the photo's path -> the photo's id.

    Raises:
        InputError: the file is not JSON, is cut off, or is not in COCO's format of objects; an id that stands for two things.
    """
    document = parse_json(path)
    lists: dict[str, Any] = {"categories": None, **document}
    lists |= {key: [] for key in ("annotations", "categories") if key in lists and lists[key] is None}
    if missing := [key for key in ("images", "annotations", "categories") if not isinstance(lists.get(key), list)]:
        raise InputError(f"{path}: no list `{missing[0]}` in it (found: {shown(list(document))}); take an instances_*.json")
    entries = [annotation for annotation in lists["annotations"] if isinstance(annotation, dict)]
    if entries and not any("bbox" in annotation for annotation in entries):
        what = (
            "COCO's panoptic format, read with source.kind: coco_panoptic"
            if "segments_info" in entries[0]
            else f"the first one has {shown(list(entries[0]))}"
        )
        raise InputError(f"{path}: no annotation has a `bbox` ({what}); take the instances_*.json of the same photos")
    return instances_of(lists, path, path_of, id_of)


def instances_of(
    document: Mapping[str, Any], path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]
) -> Instances:
    """What is in a file with the lists `images`, `annotations` and `categories`. Arguments are those of `read_instances`."""
    photos = _photos(document, path, path_of, id_of)
    return Instances(photos, document["annotations"], _categories(document["categories"], path))


def annotation_ids(path: Path) -> list[int | None]:
    """The `id` of each entry of a file's `annotations`, in their order; null where it is missing or no whole number.

    Raises:
        InputError: the file is no JSON object that can be read.
    """
    entries = parse_json(path).get("annotations")
    words = [identifier(entry.get("id")) if isinstance(entry, dict) else None for entry in entries or ()]
    return [int(word) if word and re.fullmatch(r"[0-9]{1,18}", word) else None for word in words]


def parse_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, plain or gzipped. Raises InputError: there is none, or it is cut off."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            document = json.load(file)
    except (EOFError, zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError.
        raise InputError(f"{path}: the file is damaged or cut off ({error}); get it again") from None
    except (ValueError, RecursionError) as error:  # Also no UTF-8; a number of thousands of digits, thousands of brackets.
        raise InputError(f"{path}: not JSON in UTF-8 that can be read, or cut off ({error}); get it again") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: no JSON object with images, annotations and categories; take an instances_*.json")
    return document


def _photos(
    document: Mapping[str, Any], path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]
) -> dict[str, Photo]:
    """Photos by id; an entry without one is of no annotation."""
    entries = document["licenses"] if isinstance(document.get("licenses"), list) else []
    licences = {identifier(entry.get("id")): _text(entry.get("url")) for entry in entries if isinstance(entry, dict)}
    licences[None] = None
    photos: dict[str, Photo] = {}
    with_id: dict[str, Photo] = {}
    for number, entry in enumerate(document["images"], start=1):
        image_id = identifier(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is None:
            continue
        key = next((key for key in _NAMES if is_given(entry.get(key))), "file_name")
        name, file_name, problem = entry.get(key), None, None
        try:
            file_name = path_of(name)
        except ValueError as error:
            problem = f"its image, id {image_id}, has `{key}` {shown(name)}, which {error}"
        width, height = _side(entry.get("width")), _side(entry.get("height"))
        photo = Photo(
            photo_id=id_of(image_id, file_name),
            name=name,
            file_name=file_name,
            size=(width, height) if width and height else None,
            url=next(filter(None, (_text(entry.get(url)) for url in _URLS)), None),
            licence=licences.get(identifier(entry.get("license"))),
            problem=problem,
        )
        first = photos.setdefault(image_id, photo)
        if first is not photo and not _one_photo(first, photo):
            raise InputError(
                f"{path}: image id {image_id} stands twice in `images`, the second time, entry {number}, with other contents; "
                f"number the images through"
            )
        if with_id.setdefault(photo.photo_id, photo).file_name != photo.file_name:
            raise InputError(f"{path}: image id {image_id} and another one get the same id, {photo.photo_id}; rename one of them")
    return photos


def _one_photo(first: Photo, second: Photo) -> bool:
    """Whether two entries of one id are of one photo: it has one name, and sizes may differ by rounding."""
    sizes = zip(first.size or (), second.size or (), strict=False)
    return first.file_name == second.file_name and all(abs(a - b) <= 1 for a, b in sizes)


def _categories(entries: Sequence[Any], path: Path) -> dict[str, Category]:
    categories: dict[str, Category] = {}
    for number, entry in enumerate(entries, start=1):
        class_id = identifier(entry.get("id")) if isinstance(entry, dict) else None
        if class_id is None:
            raise InputError(f"{path}: entry {number} of `categories` is {shown(entry)}, expected an `id` and a `name`")
        # Digits are names of classes in some sets; a class without a name is called by its id.
        name = identifier(entry.get("name")) or class_id
        if class_id in categories and categories[class_id].name != name:
            raise InputError(
                f"{path}: category id {class_id} stands twice in `categories`, as `{categories[class_id].name}` and, "
                f"entry {number}, as `{name}`; each category needs an id of its own"
            )
        above = _text(entry.get("supercategory"))
        synonyms = entry["synonyms"] if isinstance(entry.get("synonyms"), list) else []
        others = dict.fromkeys(word for word in map(_text, (*synonyms, entry.get("synset"))) if word and word != name)
        frequency = _text(entry.get("frequency"))
        categories[class_id] = Category(
            name,
            None if above and above.casefold() in _NO_SUPERCATEGORY else above,
            tuple(others),
            frequency if frequency in _FREQUENCIES else None,
        )
    return categories


def is_given(value: Any) -> bool:
    """Whether a key has a value: tools write null, empty text or NaN where they have none."""
    return not (value is None or value == "" or value != value or (isinstance(value, str) and not value.strip()))


def identifier(value: Any) -> str | None:
    """An id as text: a number and its digits are the same one, as are 5 and 5.0. Nothing where this is no id."""
    if type(value) is int:
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    word = _text(value)
    if word and word.endswith(".0") and word[:-2].isdecimal():
        return word[:-2]
    return word


def _side(value: Any) -> int | None:
    """A photo's width or height in px; nothing where this is none, as -1 or 0."""
    number = as_number(value)
    if number is None or not 0 < (whole := round(number)) <= _INT32 or abs(number - whole) > _ROUNDING:
        return None
    return whole


def _text(value: Any) -> str | None:
    """Text without spaces around it; nothing where this is none, or empty."""
    return value.strip() or None if is_text(value) else None


def plain_id(image_id: str) -> str:
    """The id of a photo by its image's id, which may be a file's name or a path."""
    return image_id if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", image_id) else photo_id_of(image_id)


def _of_split(place: Path, split: str) -> Path:
    word = _WORDS[split][0]
    beside = sorted(place.glob(f"*/{BESIDE_PHOTOS}"))
    ways = {
        f"instances_{word}*.json": sorted([*place.glob(f"instances_{word}*.json"), *place.glob(f"instances_{word}*.json.gz")]),
        f"{'valid' if split == 'validation' else word}/{BESIDE_PHOTOS}": [
            path for path in beside if path.parent.name.casefold() in _WORDS[split]
        ],
        f"*{word}*.json": sorted(path for path in place.iterdir() if _has_boxes(path) and split_word(path, split)),
    }
    for pattern, found in ways.items():
        if len(found) > 1:
            names = " and ".join(path.relative_to(place).as_posix() for path in found)
            raise InputError(f"{place}: {names} are both {pattern}, the split {split}; leave one of them in this folder")
        if found:
            return found[0]
    pattern = list(ways)[1 if beside else 0]
    raise InputError(
        f"{place}: no file {pattern} (or .json.gz) for the split {split}; put it there, take `{split}` out of "
        f"build.source.splits, or set build.source.annotations to one JSON file"
    )


def _has_boxes(path: Path) -> bool:
    return path.name.endswith((".json", ".json.gz")) and not any(other in path.name for other in _OTHERS)


def split_word(path: Path, split: str) -> str | None:
    """The word for the split in a file's name, with its year if it has one: train2017."""
    words = re.split(r"[^A-Za-z0-9]+", path.name.partition(".json")[0])
    return next((word for word in words if re.sub(r"\d+$", "", word.casefold()) in _WORDS[split]), None)


def photo_folder(path: Path, roots: Sequence[Path], elsewhere: bool) -> str:
    """What stands before the names of a file's photos, below the photo folder: empty, or with a / at its end."""
    name = path.name.partition(".")[0]
    published = name.removeprefix("instances_") if name.startswith("instances_") else ""
    if published and elsewhere:
        return f"{published}/"
    words = [word for split in _WORDS if (word := split_word(path, split))]
    folders = [path.parent.name] if path.name == BESIDE_PHOTOS else [published, *words]
    for folder in filter(None, folders):
        if any((root / folder).is_dir() for root in roots):
            return f"{folder}/"
    return ""


# Object masks.


def compress_mask(segmentation: Any, width: int, height: int) -> str | None:
    """Polygons or RLE of a photo of `width` x `height` px -> compressed RLE; null where there is none (missing or empty).

    Polygons are lists of x, y, or one such list by itself. Points and lines (two or four numbers), which tools leave beside good
    polygons, cover nothing and are passed over; pycocotools would take four numbers for a box.

    All numbers are checked before pycocotools sees them: it trusts them, and goes out of bounds in memory where they are wrong.

    Raises:
        ValueError: with what is wrong, in words.
    """
    if isinstance(segmentation, list):
        parts = segmentation if any(isinstance(part, list) for part in segmentation) else [segmentation]
        segmentation = [part for part in parts if not isinstance(part, list) or len(part) not in (0, 2, 4)]
    if segmentation in (None, "", {}, []):
        return None
    if width * height > MAX_MASKED_PHOTO:
        raise ValueError(f"is of a photo of {width}x{height} px, more than {MAX_MASKED_PHOTO:,}")
    if isinstance(segmentation, dict):
        counts = _run_lengths(segmentation, width, height)
        encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    elif isinstance(segmentation, list):
        polygons = [_polygon(part) for part in segmentation]
        length = sum(map(_length, polygons))
        if length > MAX_OUTLINE:
            raise ValueError(f"is {length:,.0f} px long, more than {MAX_OUTLINE:,}")
        encoded = coco_mask.merge(coco_mask.frPyObjects([polygon.ravel() for polygon in polygons], height, width))
    else:
        raise ValueError(f"is {shown(segmentation)}, expected polygons or RLE")
    if coco_mask.area(encoded) == 0:
        raise ValueError("covers no pixel")
    return str(encoded["counts"], "ascii")


def mask_areas(masks: Sequence[str]) -> Float64[np.ndarray, " masks"]:
    """How many px each mask covers: compressed RLE of a whole photo, whatever its size."""
    # The area is that of the runs: the size beside them is not looked at.
    runs = [{"size": [1, 1], "counts": counts} for counts in masks]
    # pycocotools 2.0.11 keeps the number of masks in 8 bits, which numpy 2 refuses above 255.
    areas = [coco_mask.area(runs[start : start + 255]) for start in range(0, len(runs), 255)]
    return np.concatenate(areas).astype(np.float64)


def _length(polygon: Float64[np.ndarray, "points 2"]) -> float:
    """How many px pycocotools draws, along the longer axis of each side."""
    # Not np.roll: this is a tenth of all the time that reading takes.
    sides = np.abs(polygon[1:] - polygon[:-1]).max(axis=1).sum() + np.abs(polygon[0] - polygon[-1]).max()
    return float(sides)


def _run_lengths(segmentation: dict[str, Any], width: int, height: int) -> Int64[np.ndarray, " runs"]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"has `size` {shown(size)}, the photo [{height}, {width}]")
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count <= width * height for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError(f"has `counts` {shown(counts)}, expected text, or whole numbers from 0 to {width * height}")
    if runs.min(initial=0) < 0 or runs.sum() != width * height:
        raise ValueError(f"has `counts` that sum up to {runs.sum()}, or go below 0; the photo has {width * height} px")
    return runs


def _polygon(polygon: Any) -> Float64[np.ndarray, "points 2"]:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"has a polygon {shown(polygon)}, expected x, y of three points or more")
    if set(map(type, polygon)) <= {int, float} and max(polygon) <= MAX_COORDINATE and min(polygon) >= -MAX_COORDINATE:
        points = np.array(polygon, np.float64).reshape(-1, 2)
        if not np.isnan(points).any():
            return points
    raise ValueError(f"has a polygon {shown(polygon)}, expected numbers of px")
