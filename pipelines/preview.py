"""Look at what was made: a contact sheet of a dataset, and of masks alone.

python pipelines/preview.py dataset DATASET --photos FOLDER --out sheet.png
python pipelines/preview.py masks --out masks.png
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from jaxtyping import UInt8

from pipelines.config import SourceSettings
from pipelines.geometry.masks import bessel_polygon, extend_box, rasterise
from pipelines.geometry.rectangles import Rectangle, whole_photo
from pipelines.geometry.views import Window, cut_view, square_window
from pipelines.photo_folder import read_photo
from schemas.dataset import read_dataset
from schemas.errors import InputError, run_program
from schemas.files import atomic_file
from schemas.photos import PhotoError, decode_photo
from schemas.pictures import Picture, sheet, tint
from schemas.randomness import generator
from schemas.sample import MEMBER_NAMES, Sample, decode_sample

_BOX_COLOUR = (255, 0, 96)


def read_samples(dataset: Path, count: int, seed: int = 0) -> list[Sample]:
    """A random choice of samples, decoded and validated, split by split in the order of the index.

    Raises:
        InputError: no dataset there, or a damaged sample.
    """
    read_dataset(dataset)
    table = pq.read_table(dataset / "index.parquet")
    chosen = generator(seed, "preview").choice(len(table), min(count, len(table)), replace=False)
    samples = []
    for row in table.take(np.sort(chosen)).to_pylist():
        path = dataset / "shards" / f"{row['shard']}.tar"
        with path.open("rb") as file:
            members = {}
            for name in MEMBER_NAMES:
                place = row[name.replace(".", "_")]
                if place is not None:
                    file.seek(place["offset"])
                    members[name] = file.read(place["length"])
        samples.append(decode_sample(members, f"{path}, key {row['key']}"))
    return samples


def contact_sheet(dataset: Path, photos: Path, count: int = 12, seed: int = 0) -> Picture:
    """Rows of photo with box and window, view under each mask, reference; for a random choice of samples.

    Raises:
        InputError: no dataset there, a damaged sample, or a photo that is not there any more.
    """
    rows, captions = [], []
    samples = read_samples(dataset, count, seed)
    source = SourceSettings(**{**read_dataset(dataset).settings["source"], "photos": photos})
    for sample in samples:
        record = sample.record
        try:
            photo, _ = read_photo(record.model_dump(), source)
        except PhotoError as error:
            raise InputError(f"{photos}: photo {record.photo_id} of the dataset cannot be shown: {error}") from None
        window = Window(*record.window)
        view = cut_view(photo, window, sample.masks.shape[-1])
        reference = decode_photo(sample.reference, frame="stored")
        masked = [tint(view, mask) for mask in sample.masks]
        rows.append([_with_outlines(photo, Rectangle(*record.box), window), *masked, reference])
        kinds = ", ".join(record.mask_kinds)
        captions.append(f"{record.split}  {record.key}  {record.label_name}  ({kinds}{', padded' if record.padded else ''})")
    masks = [f"view, mask {number}" for number in range(len(samples[0].masks))]
    return sheet(rows, ["photo: box, window", *masks, "reference"], captions, cell=200)


def mask_sheet(count: int = 64, size: int = 128, columns: int = 8, seed: int = 0) -> Picture:
    """Masks of random boxes in photos of random shape, half of them Bessel; the box outlined in white."""
    cells = []
    for number in range(count):
        random = generator(seed, "mask sheet", number)
        width, height = random.integers(400, 1024, 2).tolist()
        box_width, box_height = (random.uniform(0.15, 0.7, 2) * (width, height)).tolist()
        left, top = random.uniform(0, width - box_width), random.uniform(0, height - box_height)
        box = Rectangle(left, top, left + box_width, top + box_height)
        extended = extend_box(box, whole_photo(width, height), 0.4, random)
        window = square_window(extended, width, height, 0.6, random)
        polygon = bessel_polygon(box, extended, 20, (1, 5), random) if number % 2 else extended.corners()
        cell = np.full((size, size, 3), 60, np.uint8)
        cell[rasterise(window.to_view(polygon, size), size)] = (255, 120, 160)
        corners = np.round(window.to_view(box.corners(), size)).astype(np.int32)
        cells.append(cv2.polylines(cell, [corners], True, (255, 255, 255), 1))
    rows = [cells[start : start + columns] for start in range(0, count, columns)]
    return sheet(rows, cell=size)


def save_picture(picture: Picture, path: Path) -> None:
    """Write a PNG, wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def _with_outlines(photo: Picture, box: Rectangle, window: Window) -> UInt8[np.ndarray, "height width 3"]:
    """The photo with the box (red) and the view's window (white)."""
    drawn = photo.copy()
    thickness = max(1, max(photo.shape) // 200)
    for rectangle, colour in ((window.rectangle(), (255, 255, 255)), (box, _BOX_COLOUR)):
        x_min, y_min, x_max, y_max = rectangle.pixels()
        cv2.rectangle(drawn, (x_min, y_min), (x_max - 1, y_max - 1), colour, thickness)
    return drawn


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="what", required=True)
    dataset = commands.add_parser("dataset", help="photo with box, view under each mask, reference")
    dataset.add_argument("dataset", type=Path, help="folder of the dataset")
    dataset.add_argument("--photos", type=Path, required=True, help="folder of the photos it was built from")
    dataset.add_argument("--count", type=int, default=12, help="samples to show (default: %(default)s)")
    masks = commands.add_parser("masks", help="64 masks, box and Bessel in turn")
    for command in (dataset, masks):
        command.add_argument("--out", type=Path, required=True, help="PNG to write")
        command.add_argument("--seed", type=int, default=0, help="which random choice (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.what == "masks":
        picture = mask_sheet(seed=arguments.seed)
    else:
        picture = contact_sheet(arguments.dataset, arguments.photos, arguments.count, arguments.seed)
    save_picture(picture, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    run_program(main)
