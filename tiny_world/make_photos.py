"""Write a tiny world to a folder, exactly as Open Images lays out its files:

    OUT/train/<ImageID>.jpg                         OUT/validation/<ImageID>.jpg
    OUT/train-annotations-bbox.csv                  OUT/validation-annotations-bbox.csv
    OUT/train-images-boxable-with-rotation.csv      OUT/validation-images-boxable-with-rotation.csv
    OUT/class-descriptions-boxable.csv

With --groups also which individual each box shows, which that layout has no place for, as own boxes (docs/own-data.md): an
individual is seen in several scenes, each time in another pose, size and light, and a build can take its references from another.

    OUT/boxes.csv            photo,x_min,y_min,x_max,y_max,label,split,width,height,group

Usage:  python -m tiny_world.make_photos --out DIR --train 2000 --validation 150 --seed 0
"""

import argparse
import base64
import csv
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from tiny_world.kinds import KINDS, generator
from tiny_world.scenes import Box, Scene, boxes_of, plan_scene, render_scene

BOX_COLUMNS = [
    *("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"),
    *("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"),
]
PHOTO_COLUMNS = [
    *("ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title"),
    *("OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation"),
]
PHOTO_TABLES = {
    "train": "train-images-boxable-with-rotation.csv",
    "validation": "validation-images-boxable-with-rotation.csv",
}
JPEG_QUALITY = 92
# Open Images drew 90 % of its training boxes by hand ("xclick"), with flags; its "activemil" boxes have none: all are -1.
FLAGLESS_SHARE = 0.08

GROUPED_COLUMNS = ["photo", "x_min", "y_min", "x_max", "y_max", "label", "split", "width", "height", "group"]

Row = list[str]


def photo_id(seed: int, split: str, index: int) -> str:
    """Sixteen hexadecimal digits, as Open Images names its photos."""
    return hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=8).hexdigest()


def jpeg(photo: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encode RGB as JPEG without colour subsampling, which would smear small objects."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    written, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), quality + sampling)
    if not written:
        raise RuntimeError(f"this OpenCV could not encode a {photo.shape[1]}x{photo.shape[0]} photo as JPEG")
    return data.tobytes()


def box_row(image_id: str, box: Box, has_flags: bool) -> Row:
    """One line of the box CSV; without flags the five are unknown (-1), not false."""
    flags = [box.is_occluded, box.is_truncated, box.is_group, False, False] if has_flags else [-1] * 5
    edges = (f"{edge:.6f}" for edge in (box.x_min, box.x_max, box.y_min, box.y_max))
    source = "xclick" if has_flags else "activemil"
    return [image_id, source, KINDS[box.kind].mid, "1", *edges, *(str(int(flag)) for flag in flags)]


def photo_row(image_id: str, split: str, data: bytes) -> Row:
    """One line of the photo CSV. The digest is that of the file, in base64 as Open Images gives it."""
    url = f"tiny-world://{split}/{image_id}.jpg"
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    licence = "https://creativecommons.org/publicdomain/zero/1.0/"
    author = ["tiny-world://authors/generator", "tiny world generator", f"Tiny world {split} photo {image_id}"]
    return [image_id, split, url, url, licence, *author, str(len(data)), md5, "", "0.0"]


def grouped_rows(image_id: str, split: str, scene: Scene, boxes: list[Box], visible: list[np.ndarray]) -> list[Row]:
    """Lines of boxes.csv for one photo; none of a box around many individuals."""
    if scene.is_group:
        return []
    shown = [who for (who, _), seen in zip(scene.objects, visible, strict=True) if seen.any()]
    rows = []
    for who, box in zip(shown, boxes, strict=True):
        edges = (f"{edge:.6f}" for edge in (box.x_min, box.y_min, box.x_max, box.y_max))
        of_photo = split, str(scene.width), str(scene.height)
        rows.append([f"{split}/{image_id}.jpg", *edges, KINDS[box.kind].name, *of_photo, f"{split}-{who.kind}-{who.number}"])
    return rows


def make_photo(index: int, out: Path, split: str, seed: int) -> tuple[list[Row], Row, list[Row]]:
    """Paint and write one photo; returns its lines of the box CSV, its line of the photo CSV, and its lines of boxes.csv."""
    scene = plan_scene(seed, split, index)
    photo, visible, occluded, truncated = render_scene(scene)
    image_id = photo_id(seed, split, index)
    data = jpeg(photo)
    (out / split / f"{image_id}.jpg").write_bytes(data)
    has_flags = generator(seed, "flags", split, index).uniform() >= FLAGLESS_SHARE
    boxes = boxes_of(scene, visible, occluded, truncated)
    rows = [box_row(image_id, box, has_flags) for box in boxes]
    return rows, photo_row(image_id, split, data), grouped_rows(image_id, split, scene, boxes, visible)


def write_csv(path: Path, header: Row | None, rows: Iterable[Row]) -> None:
    """Write rows under a header, or without one, with plain line feeds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if header is not None:
            writer.writerow(header)
        writer.writerows(rows)


def photos_made(out: Path, split: str, count: int, seed: int, processes: int) -> Iterator[tuple[list[Row], Row, list[Row]]]:
    """The lines of every photo of a split, in the order of their index whatever the number of processes."""
    make = partial(make_photo, out=out, split=split, seed=seed)
    if processes == 1:
        yield from map(make, range(count))
    else:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(make, range(count), chunksize=16)


def make_world(
    out: str | Path, train_photos: int, validation_photos: int, seed: int, processes: int = 2, groups: bool = False
) -> None:
    """Write both splits and the class names; the same arguments give the same bytes, whatever `processes` is.

    With `groups` also boxes.csv, with the individual that each box shows.
    """
    out = Path(out)
    grouped: list[Row] = []
    for split, count in {"train": train_photos, "validation": validation_photos}.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        progress = tqdm(photos_made(out, split, count, seed, processes), f"{split} photos", count, unit="photo")
        made = sorted(progress, key=lambda rows: rows[1][0])
        write_csv(out / f"{split}-annotations-bbox.csv", BOX_COLUMNS, (row for boxes, _, _ in made for row in boxes))
        write_csv(out / PHOTO_TABLES[split], PHOTO_COLUMNS, (row for _, row, _ in made))
        grouped += [row for _, _, rows in made for row in rows]
    write_csv(out / "class-descriptions-boxable.csv", None, ([kind.mid, kind.name] for kind in KINDS))
    if groups:
        write_csv(out / "boxes.csv", GROUPED_COLUMNS, grouped)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="photos in the train split")
    parser.add_argument("--validation", type=int, default=150, help="photos in the validation split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--groups", action="store_true", help="also write boxes.csv, which says which individual a box shows")
    settings = parser.parse_args()
    make_world(settings.out, settings.train, settings.validation, settings.seed, settings.processes, settings.groups)


if __name__ == "__main__":
    main()
