"""Contact sheets of a dataset, of samples at random or by class; and a sheet of masks alone."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from pbe_core.dataset_reader import Classes, read_classes, read_dataset, read_sample, take_rows
from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle, whole_photo
from pbe_core.images.decode import decode_photo
from pbe_core.images.sheets import Picture, sheet, tint
from pbe_core.randomness import generator
from pbe_core.sample_codec import Sample
from pbe_core.words import number_of
from pipelines.geometry import bessel_polygon, extend_box, fill_outline, square_window
from pipelines.inspection.sample_pictures import (
    cut_recorded_view,
    photo_with_box,
    photos_of,
    reference_with_outline,
    view_with_box,
    view_with_mask,
    views_of,
)


def contact_sheet(dataset: Path, photos: Path | None, count: int = 12, seed: int = 0, vae: str | None = None) -> Picture:
    """Rows of photo with box and window, view under each mask, reference; for a random choice of samples.

    Args:
        dataset: its folder.
        photos: the photo folder or photo store; without it the first column is the view with the box, from the dataset alone.
        count: samples to show.
        seed: which random choice.
        vae: where the dataset's VAE is, if not where the build had it; needed without photos only.

    Raises:
        InputError: no dataset there, a damaged sample, a photo that is not there any more; or no photos, and no VAE.
    """
    info = read_dataset(dataset)
    total = pq.read_metadata(dataset / "index.parquet").num_rows
    chosen = generator(seed, "preview").choice(total, min(count, total), replace=False)
    samples = _read_samples(dataset, chosen.tolist())
    if photos:
        both = zip(photos_of(samples, info, photos), samples, strict=True)
        shown = [(photo_with_box(photo, sample.record), cut_recorded_view(photo, sample)) for photo, sample in both]
    else:
        own = zip(views_of(samples, info, vae), samples, strict=True)
        shown = [(view_with_box(view, sample.record), view) for view, sample in own]
    rows, captions = [], []
    for sample, (first, view) in zip(samples, shown, strict=True):
        record = sample.record
        masked = [tint(view, mask) for mask in sample.masks]
        rows.append([first, *masked, decode_photo(sample.reference, frame="stored")])
        notes = ["padded"] * record.padded
        if not photos:
            notes.append(origin_of_views([sample]))
        captions.append(f"{record.split}  {record.key}  {record.label_name}  ({', '.join([*record.mask_kinds, *notes])})")
    masks = [f"view, mask {number}" for number in range(info.masks_per_view)]
    return sheet(rows, ["photo: box, window" if photos else "view: box", *masks, "reference"], captions, cell=200)


def class_sheet(
    dataset: Path,
    photos: Path | None = None,
    labels: Sequence[str] = (),
    count: int = 12,
    each: int = 4,
    seed: int = 0,
    vae: str | None = None,
) -> Picture:
    """One row for each class: views with box and first mask beside their references, for a random choice of its samples.

    Without photos, captions say what the views are.

    Args:
        dataset: its folder.
        photos: as in `contact_sheet`; the views are cut from them.
        labels: names or ids of classes; by default the `count` classes that have most samples.
        count: number of classes.
        each: samples of each class; all, if it has fewer.
        seed: which random choice.
        vae: as in `contact_sheet`.

    Raises:
        InputError: as in `contact_sheet`, or no sample is of one of these classes.
    """
    info = read_dataset(dataset)
    classes = read_classes(dataset)
    places = find_classes(dataset, classes, labels) if labels else classes.by_frequency()[:count]
    samples: list[Sample] = []
    captions = []
    for place in places:
        own = np.flatnonzero(classes.codes == place)
        # By the class's name: the choice does not depend on which other classes are shown.
        random = generator(seed, "preview", classes.labels[place])
        chosen = _read_samples(dataset, random.choice(own, min(each, len(own)), replace=False).tolist())
        samples += chosen
        notes = [] if photos else [f"({origin_of_views(chosen)})"]
        captions.append("  ".join([classes.names[place], classes.labels[place], number_of(len(own), "sample"), *notes]))
    if photos:
        views = list(map(cut_recorded_view, photos_of(samples, info, photos), samples))
    else:
        views = views_of(samples, info, vae)
    by_label: dict[str, list[Picture]] = {classes.labels[place]: [] for place in places}
    for sample, view in zip(samples, views, strict=True):
        by_label[sample.record.label] += [view_with_mask(view, sample, 0), reference_with_outline(sample)]
    rows = list(by_label.values())
    longest = max(len(row) for row in rows) // 2
    return sheet(rows, ["view: box, mask 0", "reference"] * longest, captions, cell=160)


def origin_of_views(samples: Sequence[Sample]) -> str:
    """What views are that are shown without photos; a decoded latent is softer than its photo."""
    origins = {"decoded latent" if sample.view is None else "view.jpg" for sample in samples}
    return "views: " + " or ".join(sorted(origins, reverse=True))


def find_classes(dataset: Path, classes: Classes, labels: Sequence[str]) -> list[int]:
    """Places of classes that are named by their name, in any case, or their id; a name may mean several.

    Raises:
        InputError: no sample is of such a class.
    """
    found: list[int] = []
    for label in labels:
        folded = label.strip().casefold()
        pairs = enumerate(zip(classes.labels, classes.names, strict=True))
        places = [place for place, (own, name) in pairs if folded in (own.casefold(), name.casefold())]
        if not places:
            near = difflib.get_close_matches(label.strip(), [*classes.names, *classes.labels], n=3)
            meant = f" (did you mean {', '.join(near)}?)" if near else ""
            raise InputError(f"{dataset / 'index.parquet'}: no sample is of a class `{label.strip()}`{meant}")
        found += places
    return list(dict.fromkeys(found))


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
        window = square_window(extended, width, height, "published", 0.6, random)
        bessel = number % 2 == 1
        polygon = bessel_polygon(box, extended, 20, (1, 5), random) if bessel else extended.corners()
        cell = np.full((size, size, 3), 60, np.uint8)
        cell[fill_outline("bessel" if bessel else "box", window.to_view(polygon, size), size)] = (255, 120, 160)
        corners = np.round(window.to_view(box.corners(), size)).astype(np.int32)
        cells.append(cv2.polylines(cell, [corners], True, (255, 255, 255), 1))
    rows = [cells[start : start + columns] for start in range(0, count, columns)]
    return sheet(rows, cell=size)


def _read_samples(dataset: Path, places: list[int]) -> list[Sample]:
    """The samples at places of the index, in its order."""
    return [read_sample(dataset, row) for row in take_rows(dataset / "index.parquet", places)]
