"""Views and references of real photos, beside those of the published code: how far zoomed in, how much is masked, how sharp.

    zoom        which share of the photo's short side views show, and which of the view masks cover: `views.zoom: published` and
                `free`, each with its distance (Kolmogorov-Smirnov) to the published code
    sharpness   gradient energy of views and references: the published code's and ours under both settings of `resize`, to those
                made without aliasing: views by area, references bilinear with antialias, both bilinear where they grow

Usage:  python -m benchmarks.views --real-data FOLDER
        python -m benchmarks.views --real-data FOLDER --results benchmarks/results/views.json
        prints two tables; writes them only where --results says so

FOLDER holds `open_images_mini` (Open Images' CSVs, photos in <split>/) and `coco_mini` (instances.json, photos in images/). Every
box that passes the paper's area rule is drawn equally often. The published way is written from its description, in
published_recipe.py, and draws for itself. Where no square of the photo's short side holds the extended box, or exactly one does,
it squashes the whole photo, and we do not: distances are those between all other draws, by the same test on both sides. Square
photos are left out too: under the published rule their views are the photo, both ways. `resize: antialiased` is cubic both ways,
which is sharper than area averaging and bilinear interpolation: its views show that, and not aliasing (docs/decisions.md).
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from scipy.stats import ks_2samp

from benchmarks import published_recipe
from benchmarks.machine import RESULTS, describe_versions, today
from pbe_core.errors import InputError, run_program
from pbe_core.images.crop import Rectangle, Resizing, Window, cut_view, whole_photo
from pbe_core.randomness import generator
from pbe_train.data.references import fit_reference
from pipelines.config import BuildSettings, MaskSettings, ReferenceSettings, SelectionSettings, SourceSettings, ViewSettings
from pipelines.dataset.samples import draw_mask
from pipelines.geometry import Zoom, box_in_photo, cut_reference, extend_box, reference_window, square_window
from pipelines.photos import read_photo
from pipelines.selection.objects import select_objects

DRAWS = 12
PUBLISHED = "published code"
PAPER = SelectionSettings(reject_flags=(), near_duplicate_iou=None)
PLAIN = "without aliasing"
WAYS: tuple[Resizing, ...] = ("published", "antialiased")
Photo = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Object:
    """An accepted box and its photo."""

    photo: Photo
    box: Rectangle
    """Photo px."""
    settings: BuildSettings


@dataclass(frozen=True)
class Draw:
    """One view of an object: what the distributions are made of."""

    squashed: bool
    """Whether the published code would squash the photo with this extended box."""
    square: bool
    """Whether the photo is square."""
    padded: bool
    """Whether no square holds the extended box."""
    side: float
    """Of the view / short side of the photo."""
    mask: float
    """Share of the view that is to be repainted."""


@dataclass(frozen=True)
class Zoomed:
    """One row of the first table: of draws that the published code does not squash, of photos that are not square."""

    way: str
    draws: int
    square: int
    """Draws of square photos, left out."""
    squashed: int
    """Draws that the published code squashes, or would squash, left out."""
    squashed_with_a_square: int
    """Those of them in which exactly one square holds the extended box."""
    compared: int
    side: dict[str, float]
    mask: dict[str, float]
    distance: dict[str, float] | None
    """Kolmogorov-Smirnov distance of `side` and `mask` to those of the published code."""


@dataclass(frozen=True)
class Sharpness:
    """One row of the second table: mean squared difference of neighbouring pixels, to that without aliasing."""

    what: str
    way: str
    pictures: int
    energy: float
    """Mean over the pictures of the ratio."""
    shrunk_pictures: int
    """Those that shrink along both axes."""
    energy_of_shrunk: float | None
    """The mean over these; null where there are none."""


def find_objects(folder: Path) -> list[Object]:
    """All objects of the photos here.

    Raises:
        InputError: a folder or a file in it is missing.
    """
    sources = {
        "open_images": SourceSettings(annotations=folder / "open_images_mini", photos=folder / "open_images_mini"),
        "coco": SourceSettings(
            kind="coco", annotations=folder / "coco_mini" / "instances.json", photos=folder / "coco_mini" / "images"
        ),
    }
    found = []
    for source in sources.values():
        with tempfile.TemporaryDirectory() as temporary:
            settings = BuildSettings(out=Path(temporary), source=source, selection=PAPER)
            select_objects(settings, settings.out)
            rows = pq.read_table(settings.out / "objects.parquet").to_pylist()
        photos: dict[str, Photo] = {}
        for row in rows:
            if row["photo_id"] not in photos:
                photos[row["photo_id"]] = read_photo(row, source)[0]
            photo = photos[row["photo_id"]]
            height, width = photo.shape[:2]
            found.append(Object(photo, box_in_photo(row, width, height), settings))
    return found


def draw_ours(zoom: Zoom) -> Callable[[Object, int], Draw]:
    """A way to draw the view and the first mask of an object, as a build does."""

    def draw(one: Object, number: int) -> Draw:
        height, width = one.photo.shape[:2]
        frame = whole_photo(width, height)
        names = ("benchmark", zoom, number)
        options, views = MaskSettings(), ViewSettings(zoom=zoom)
        extended = extend_box(one.box, frame, options.max_extension, generator(*names, "extension"))
        window = square_window(extended, width, height, views.zoom, views.max_zoom, generator(*names, "window"))
        visible = window.rectangle().intersection(frame)
        mask = draw_mask(one.box, extended, window, visible, one.settings, generator(*names, "shape"))[2]
        return describe(extended, width, height, window.side, float(mask.mean()))

    return draw


def draw_published(one: Object, number: int) -> Draw:
    """The same of the published code."""
    height, width = one.photo.shape[:2]
    random = Random(number)
    extended = published_recipe.extend_box(one.box, width, height, random)
    mask = published_recipe.draw_mask(one.box, extended, width, height, random)
    left, top, side = published_recipe.square_crop(extended, width, height, random) or (0, 0, max(width, height))
    shown = mask[:, top : top + side, left : left + side]
    return describe(extended, width, height, side, 1 - float(shown.mean()))


def describe(extended: Rectangle, width: int, height: int, side: int, mask: float) -> Draw:
    """A draw as the distributions know it."""
    x_min, y_min, x_max, y_max = published_recipe.whole_pixels(extended)
    short = min(width, height)
    squashed = published_recipe.square_crop(extended, width, height, Random(0)) is None
    return Draw(squashed, width == height, max(x_max - x_min, y_max - y_min) > short, side / short, mask)


def measure_zoom(objects: Sequence[Object], draws: int) -> list[Zoomed]:
    """The first table: each way draws every object so often."""
    ways = {PUBLISHED: draw_published, "zoom: published": draw_ours("published"), "zoom: free": draw_ours("free")}
    drawn = {
        way: [draw(one, place * draws + number) for place, one in enumerate(objects) for number in range(draws)]
        for way, draw in ways.items()
    }
    kept = {way: [one for one in many if not one.squashed and not one.square] for way, many in drawn.items()}

    def distances(way: str) -> dict[str, float]:
        return {
            name: round(float(ks_2samp(values(kept[way], name), values(kept[PUBLISHED], name)).statistic), 4)
            for name in ("side", "mask")
        }

    return [
        Zoomed(
            way,
            draws=len(many),
            square=sum(one.square for one in many),
            squashed=sum(one.squashed for one in many),
            squashed_with_a_square=sum(one.squashed and not one.padded for one in many),
            compared=len(kept[way]),
            side=summary(values(kept[way], "side")),
            mask=summary(values(kept[way], "mask")),
            distance=None if way == PUBLISHED else distances(way),
        )
        for way, many in drawn.items()
    ]


def values(draws: Sequence[Draw], name: str) -> list[float]:
    """One number of each draw."""
    return [getattr(one, name) for one in draws]


def summary(numbers: Sequence[float]) -> dict[str, float]:
    """What the table shows of a distribution."""
    low, middle = np.percentile(numbers, [5, 50])
    return {"mean": round(float(np.mean(numbers)), 4), "p5": round(float(low), 4), "median": round(float(middle), 4)}


def measure_sharpness(objects: Sequence[Object]) -> list[Sharpness]:
    """The second table: the same squares and crops, resized in each way."""
    ratios: dict[tuple[str, str], list[float]] = {}
    shrinks: dict[str, list[bool]] = {"view": [], "reference": []}
    for number, one in enumerate(objects):
        random = Random(number)
        height, width = one.photo.shape[:2]
        extended = published_recipe.extend_box(one.box, width, height, random)
        square = published_recipe.square_crop(extended, width, height, random)
        crop = reference_window(one.box, width, height, published_recipe.PADDING)
        pictures = {"reference": references(one, crop)}
        shrinks["reference"].append(min(crop[2] - crop[0], crop[3] - crop[1]) > published_recipe.REFERENCE)
        if square:
            pictures["view"] = views(one.photo, square)
            shrinks["view"].append(square[2] > published_recipe.VIEW)
        for what, ways in pictures.items():
            base = gradient_energy(ways.pop(PLAIN))
            for way, picture in ways.items():
                ratios.setdefault((what, way), []).append(gradient_energy(picture) / base)
    return [
        Sharpness(
            what,
            way,
            pictures=len(found),
            energy=round(float(np.mean(found)), 4),
            shrunk_pictures=sum(shrinks[what]),
            energy_of_shrunk=round(float(np.mean(np.array(found)[shrinks[what]])), 4) if any(shrinks[what]) else None,
        )
        for (what, way), found in ratios.items()
    ]


def views(photo: Photo, square: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A view in each way; in ours as builds make it."""
    left, top, side = square
    cut, size = np.ascontiguousarray(photo[top : top + side, left : left + side]), published_recipe.VIEW
    published = 255 * published_recipe.resized(published_recipe.to_tensor(cut)).permute(1, 2, 0).numpy()
    plain = cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    ours = {f"resize: {way}": cut_view(photo, Window(*square), size, way) for way in WAYS}
    return {PUBLISHED: published, **ours, PLAIN: plain}


def references(one: Object, crop: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """A reference in each way, as the encoder sees it; in ours as build and trainer make it, but for the JPEG between them."""
    limits, size = ReferenceSettings(), published_recipe.REFERENCE
    stored = {way: cut_reference(one.photo, crop, limits.side, limits.max_side, way) for way in WAYS}
    x_min, y_min, x_max, y_max = crop
    return {
        PUBLISHED: published_recipe.cut_reference(one.photo, one.box),
        **{f"resize: {way}": fit_reference(picture, size, "squash") for way, picture in stored.items()},
        PLAIN: fit_reference(np.ascontiguousarray(one.photo[y_min:y_max, x_min:x_max]), size, "squash"),
    }


def gradient_energy(picture: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels, along both axes."""
    numbers = picture.astype(np.float64)
    return float(sum((np.diff(numbers, axis=axis) ** 2).mean() for axis in (0, 1)))


def print_tables(zoomed: Sequence[Zoomed], sharpness: Sequence[Sharpness]) -> None:
    """Both tables."""
    first = Table(
        "way", "draws", "square", "squashed", "one square", "compared", "side", "5th", "mask", "median", "KS side", "KS mask"
    )
    for one in zoomed:
        counts = (one.draws, one.square, one.squashed, one.squashed_with_a_square, one.compared)
        shares = (one.side["mean"], one.side["p5"], one.mask["mean"], one.mask["median"])
        distance = [f"{one.distance[name]:.3f}" for name in ("side", "mask")] if one.distance else ["", ""]
        first.add_row(one.way, *(f"{count:,}" for count in counts), *(f"{share:.3f}" for share in shares), *distance)
    second = Table("what", "way", "pictures", "energy", "that shrink", "energy")
    for each in sharpness:
        gain = [f"{100 * (ratio - 1):+.1f} %" if ratio else "" for ratio in (each.energy, each.energy_of_shrunk)]
        second.add_row(each.what, each.way, f"{each.pictures:,}", gain[0], f"{each.shrunk_pictures:,}", gain[1])
    console = Console(width=130)
    console.print(first)
    console.print(second)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-data", type=Path, required=True, help="folder with open_images_mini and coco_mini")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of each object and way (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"file to write, as {RESULTS.name}/views.json (default: none)")
    given = parser.parse_args()
    if given.draws < 1:
        raise InputError(f"--draws {given.draws}: at least 1")
    if not published_recipe.is_installed():
        raise InputError("the published way needs the package bezier: pip install bezier")
    objects = find_objects(given.real_data)
    zoomed, sharpness = measure_zoom(objects, given.draws), measure_sharpness(objects)
    print_tables(zoomed, sharpness)
    if given.results:
        result: dict[str, Any] = {
            "date": today(),
            "versions": describe_versions(["numpy", "opencv-python-headless", "torch"]),
            "objects": len(objects),
            "zoom": [asdict(one) for one in zoomed],
            "sharpness": [asdict(one) for one in sharpness],
        }
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
