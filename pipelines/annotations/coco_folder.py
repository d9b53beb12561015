"""Which files of COCO's format hold the boxes of which split, and where below the photo folder the photos of each are.

A folder holds a file for each split: instances_train2017.json as COCO publishes it (photos in train2017), or
train/_annotations.coco.json as Roboflow exports it (photos beside it), or a name with the split's word in it, lvis_v1_train.json.
One file of any name may be given itself, and a hash divides its photos.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pbe_core.errors import InputError
from pipelines.config import SourceSettings

_WORDS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
BESIDE_PHOTOS = "_annotations.coco.json"
# Files of the same photos that hold no boxes of objects, or the same boxes again.
_OTHERS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")


@dataclass(frozen=True)
class CocoFile:
    """A file of COCO's format."""

    path: Path
    split: str | None
    """Of its photos; null where a hash of each photo decides."""
    folder: str
    """What stands before each file name, below the photo folder: empty, or with a / at its end."""


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
        return [CocoFile(place, None, _photo_folder(place, roots, elsewhere))]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder; set build.source.annotations to COCO's JSON, or to a folder with it")
    paths = {split: _of_split(place, split) for split in settings.splits}
    return [CocoFile(path, split, _photo_folder(path, roots, elsewhere)) for split, path in paths.items()]


def _of_split(place: Path, split: str) -> Path:
    word = _WORDS[split][0]
    beside = sorted(place.glob(f"*/{BESIDE_PHOTOS}"))
    ways = {
        f"instances_{word}*.json": sorted([*place.glob(f"instances_{word}*.json"), *place.glob(f"instances_{word}*.json.gz")]),
        f"{'valid' if split == 'validation' else word}/{BESIDE_PHOTOS}": [
            path for path in beside if path.parent.name.casefold() in _WORDS[split]
        ],
        f"*{word}*.json": sorted(path for path in _with_boxes(place) if _word_of(path, split)),
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


def _with_boxes(place: Path) -> Iterator[Path]:
    for path in place.iterdir():
        if path.name.endswith((".json", ".json.gz")) and not any(other in path.name for other in _OTHERS):
            yield path


def _word_of(path: Path, split: str) -> str | None:
    """The word of a file's name that says its split, with a year where one stands there: train2017."""
    words = re.split(r"[^A-Za-z0-9]+", path.name.partition(".json")[0])
    return next((word for word in words if re.sub(r"\d+$", "", word.casefold()) in _WORDS[split]), None)


def _photo_folder(path: Path, roots: Sequence[Path], elsewhere: bool) -> str:
    name = path.name.partition(".")[0]
    published = name.removeprefix("instances_") if name.startswith("instances_") else ""
    if published and elsewhere:
        return f"{published}/"
    words = [word for split in _WORDS if (word := _word_of(path, split))]
    folders = [path.parent.name] if path.name == BESIDE_PHOTOS else [published, *words]
    for folder in filter(None, folders):
        if any((root / folder).is_dir() for root in roots):
            return f"{folder}/"
    return ""
