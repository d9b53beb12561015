"""What `benchmarks/packing.py` packs: photos, drawn or found, under as many names as needed, with boxes made up from a seed."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import cv2
import numpy as np

from benchmarks.crawl import write_csv
from benchmarks.make_annotations import BOX_COLUMNS, BOX_FILE, CLASS_FILE
from pbe_core.errors import InputError

WIDTH, HEIGHT, JPEG_QUALITY = 1024, 768, 88
DRAWN_PHOTOS = 24
OBJECTS_PER_PHOTO = 4
"""Of those photos of Open Images in which a box passes the area rule, the mean is six."""
SIDES = (0.2, 0.75)
"""Shortest and longest side of a box, as a share of the photo's."""
LABEL = "/m/01yrx"


def draw_photo(number: int) -> bytes:
    """A JPEG with about as many bytes as one of Open Images of this size: soft light, textured patches, noise."""
    random = np.random.default_rng(number)
    photo = cv2.resize(random.uniform(30, 220, (6, 8, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    for _ in range(30):
        width, height = random.integers(40, 300, 2)
        left, top = random.integers(0, (WIDTH - width, HEIGHT - height))
        texture = cv2.resize(random.normal(0, 30, (height // 3, width // 3, 1)), (width, height))
        photo[top : top + height, left : left + width] = random.uniform(0, 255, 3) + texture[..., None]
    photo += random.normal(0, 5, (HEIGHT, WIDTH, 1))
    done, data = cv2.imencode(".jpg", photo.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done
    return bytes(data)


def draw_photos(folder: Path) -> list[Path]:
    """Draw photos into a new folder."""
    folder.mkdir()
    files = [folder / f"{number:02d}.jpg" for number in range(DRAWN_PHOTOS)]
    for number, file in enumerate(files):
        file.write_bytes(draw_photo(number))
    return files


def find_photos(folder: Path) -> list[Path]:
    """All JPEGs below a folder.

    Raises:
        InputError: there is none.
    """
    found = sorted(path.resolve() for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise InputError(f"{folder}: no .jpg below this folder; give another --photos, or none to have photos drawn")
    return found


def make_world(folder: Path, files: Sequence[Path], samples: int) -> None:
    """Annotations and photos as Open Images writes them, for so many samples; the photos are links to the files, in turn."""
    (folder / "train").mkdir(parents=True)
    random = Random(0)
    rows = []
    for number in range(-(-samples // OBJECTS_PER_PHOTO)):
        name = f"{number:016x}"
        (folder / "train" / f"{name}.jpg").symlink_to(files[number % len(files)])
        for _ in range(min(OBJECTS_PER_PHOTO, samples - len(rows))):
            width, height = random.uniform(*SIDES), random.uniform(*SIDES)
            left, top = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
            edges = {"XMin": left, "XMax": left + width, "YMin": top, "YMax": top + height}
            fixed = {key: f"{value:.6f}" for key, value in edges.items()}
            rows.append({"ImageID": name, "Source": "xclick", "LabelName": LABEL, "Confidence": 1, **fixed})
    write_csv(folder / f"{BOX_FILE}.csv", BOX_COLUMNS, rows)
    (folder / CLASS_FILE).write_text(f"{LABEL},Cat\n")
