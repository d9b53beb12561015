"""A small dataset for other people's tools: photos as users have them, and boxes as annotators draw them.

Boxes are drawn on photos as viewers show them. `world_exif.json` has them in that frame, `world_stored.json` on the pixels as
stored: they differ in the one photo that EXIF turns.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("cat", "traffic light", "Köter")
# The photo is stored lying on its side; viewers turn it by 90 degrees clockwise.
TURNED = 6
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class TrueBox:
    """A box; edges in px from the photo's top left corner, and the outline, where there is one, as its corners."""

    label: str
    edges: tuple[float, float, float, float]  # Left, top, right, bottom.
    polygon: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class TruePhoto:
    """A photo; the size in px, in the frame of its boxes."""

    name: str  # Below the photo folder.
    width: int
    height: int
    boxes: tuple[TrueBox, ...]
    orientation: int = 1


def make_world(folder: Path, turned: bool = True) -> list[TruePhoto]:
    """Write the photos into `folder/photos`, and what is on them beside it.

    Args:
        folder: to make.
        turned: whether one of them is turned by EXIF; else it is left out.

    Returns:
        The photos, in the frame of viewers.
    """
    photos = [photo for photo in _photos() if turned or photo.orientation == 1]
    random = np.random.default_rng(5)
    for photo in photos:
        path = folder / "photos" / photo.name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (photo.height, photo.width) if photo.orientation == TURNED else (photo.width, photo.height)
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if photo.orientation != 1:
            exif[ORIENTATION_TAG] = photo.orientation
        picture.save(path, exif=exif)
    write(folder / "world_exif.json", photos)
    write(folder / "world_stored.json", [as_stored(photo) for photo in photos])
    return photos


def write(path: Path, photos: list[TruePhoto]) -> None:
    """The photos and boxes as JSON that needs none of our code to be read."""
    path.write_text(json.dumps({"labels": LABELS, "photos": [asdict(photo) for photo in photos]}, indent=1), encoding="utf-8")


def as_stored(photo: TruePhoto) -> TruePhoto:
    """The same photo and boxes on the pixels as they lie in the file."""
    if photo.orientation != TURNED:
        return photo
    stored_height = photo.width
    boxes = []
    for box in photo.boxes:
        left, top, right, bottom = box.edges
        polygon = tuple((y, stored_height - x) for x, y in box.polygon)
        boxes.append(TrueBox(box.label, (top, stored_height - right, bottom, stored_height - left), polygon))
    return TruePhoto(photo.name, photo.height, photo.width, tuple(boxes), photo.orientation)


def _photos() -> list[TruePhoto]:
    cat, light, dog = LABELS
    edges = (
        TrueBox(cat, (0, 0, 640, 480)),
        TrueBox(light, (0, 100, 120, 300)),
        TrueBox(light, (500.5, 0, 640, 77.25)),
        TrueBox(dog, (320, 240, 640, 480)),
    )
    fractions = (
        _outlined(cat, 10.125, 20.5, 110.75, 220.375),
        TrueBox(dog, (33.333, 44.444, 222.222, 333.667)),
        TrueBox(cat, (200.1, 5.7, 331.9, 499.3)),
    )
    small = (TrueBox(light, (7, 9, 8, 10)), TrueBox(light, (100.25, 60.25, 103.5, 62.75)), _outlined(dog, 40, 40, 90, 100))
    row = tuple(TrueBox(LABELS[place % 3], (20 * place, 10 * place, 20 * place + 15, 10 * place + 25.5)) for place in range(12))
    phone = (TrueBox(cat, (10, 20, 100, 300)), _outlined(dog, 150.5, 200.25, 299, 380))
    return [
        TruePhoto("0001.jpg", 640, 480, edges),
        TruePhoto("street scene/bus 1.jpg", 333, 501, fractions),
        TruePhoto("straße/Ärger é.jpg", 161, 120, small),
        TruePhoto("a/b/row.png", 400, 300, row),
        TruePhoto("a/empty.jpg", 200, 100, ()),
        TruePhoto("a/phone.jpg", 300, 400, phone, TURNED),
        TruePhoto("last.jpeg", 97, 61, (TrueBox(cat, (1, 2, 96, 60)),)),
    ]


def _outlined(label: str, left: float, top: float, right: float, bottom: float) -> TrueBox:
    """A box with an outline that touches all its edges: a hexagon."""
    middle, third = (top + bottom) / 2, (right - left) / 4
    inner = left + third, right - third
    corners = ((left, middle), (inner[0], top), (inner[1], top), (right, middle), (inner[1], bottom), (inner[0], bottom))
    return TrueBox(label, (left, top, right, bottom), corners)
