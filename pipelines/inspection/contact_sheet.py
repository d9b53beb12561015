"""Pictures of a dataset: sheets of samples at random or by class, a sheet of masks alone, all parts of one sample.

Functions that decode latents load PyTorch and diffusers, which takes seconds; the others do without.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from jaxtyping import UInt8

from pbe_core.dataset_reader import Classes, read_classes, read_dataset, read_sample, take_rows
from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle, Window, cut_view, whole_photo
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.images.sheets import PINK, WHITE, Colour, Picture, frame, outline, sheet, tint
from pbe_core.randomness import generator
from pbe_core.recorded_vae import decode_means, load_recorded_vae
from pbe_core.sample_codec import Sample
from pbe_core.words import number_of
from pipelines.config import SourceSettings
from pipelines.dataset.samples import decode_segmentation
from pipelines.geometry import bessel_polygon, extend_box, fill_outline, square_window
from pipelines.photos import read_photo
from pipelines.readers import READERS
from schemas.dataset import DatasetInfo
from schemas.sample import SampleRecord, other_reference


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
    samples = _read_samples(dataset, info, chosen.tolist())
    rows, captions = [], []
    for sample, (boxed, view) in zip(samples, _boxed_and_views(samples, info, photos, vae), strict=True):
        record = sample.record
        others = [decode_photo(other, frame="stored") for other in sample.others]
        rows.append(
            [boxed, *(tint(view, mask) for mask in sample.masks), decode_photo(sample.reference, frame="stored"), *others]
        )
        notes = [*record.mask_kinds, *["padded"] * record.padded, *([] if photos else [origin_of_views([sample])])]
        captions.append(f"{record.split}  {record.key}  {record.label_name}  ({', '.join(notes)})")
    masks = [f"view, mask {number}" for number in range(info.masks_per_view)]
    further = [f"other photo {number}" for number in range(1, max(len(sample.others) for sample in samples) + 1)]
    return sheet(rows, ["photo: box, window" if photos else "view: box", *masks, "reference", *further], captions, cell=200)


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
    samples: list[Sample] = []
    captions, rows = [], {}
    for place in find_classes(dataset, classes, labels) if labels else classes.by_frequency()[:count]:
        own = np.flatnonzero(classes.codes == place)
        # By the class's name: the choice does not depend on which other classes are shown.
        random = generator(seed, "preview", classes.labels[place])
        chosen = _read_samples(dataset, info, random.choice(own, min(each, len(own)), replace=False).tolist())
        samples += chosen
        notes = [] if photos else [f"({origin_of_views(chosen)})"]
        captions.append("  ".join([classes.names[place], classes.labels[place], number_of(len(own), "sample"), *notes]))
        rows[classes.labels[place]] = list[Picture]()
    for sample, (_, view) in zip(samples, _boxed_and_views(samples, info, photos, vae), strict=True):
        rows[sample.record.label] += [view_with_mask(view, sample, 0), reference_with_outline(sample)]
    longest = max(len(row) for row in rows.values()) // 2
    return sheet([*rows.values()], ["view: box, mask 0", "reference"] * longest, captions, cell=160)


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


def trace_sheet(sample: Sample, photo: Picture | None, decoded: Sequence[Picture] = ()) -> Picture:
    """All parts of a sample in one picture.

    Args:
        sample: the sample.
        photo: the one that it was cut from, as it was turned; its part is left out where it is not there.
        decoded: latent.npy, then masked.npy as the VAE decodes them; left out where there are none.
    """
    record = sample.record
    parts: list[tuple[str, Picture]] = []
    views: list[tuple[str, Picture]] = []
    if photo is not None:
        parts.append(("photo: box, window", photo_with_box(photo, record)))
        views.append(("view, cut from the photo", cut_recorded_view(photo, sample)))
    if sample.view is not None:
        views.append(("view.jpg", decode_photo(sample.view, frame="stored")))
    if decoded:
        views.append(("latent.npy, decoded", decoded[0]))
    outlined = ", outlined" if record.reference_mask is not None else ""
    parts += [*views, (f"ref.jpg{outlined}", reference_with_outline(sample))]
    for number, other in enumerate(sample.others, start=1):
        parts.append((other_reference(number), decode_photo(other, frame="stored")))
    rows, captions = [parts], [f"{record.key}  {record.label_name}  {record.split}"]
    for number, (kind, mask) in enumerate(zip(record.mask_kinds, sample.masks, strict=True)):
        row: list[tuple[str, Picture]] = [("mask.json", np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255)]
        if views:
            row.append((f"{views[0][0]}: box, region", view_with_mask(views[0][1], sample, number)))
        if decoded:
            row.append(("masked.npy, decoded", decoded[1 + number]))
        rows.append(row)
        captions.append(f"mask {number}: {kind}, {mask.mean():.0%} of the view")
    return sheet(
        [[picture for _, picture in row] for row in rows],
        captions=captions,
        titles=[[title for title, _ in row] for row in rows],
        cell=min(512, max(256, *sample.masks.shape[1:])),
    )


def photo_source(info: DatasetInfo, photos: Path | None = None) -> SourceSettings:
    """Where a dataset's photos are: where the build had them, or in another photo folder or photo store."""
    told = info.settings["source"]
    if told.get("kind", "open_images") not in READERS:
        # Made by a reader of somebody's own. Photos are read by the names in the records, as those of a COCO file are.
        told = {**told, "kind": "coco"}
    if photos is None or str(photos) == told["photos"]:
        return SourceSettings(**told)
    return SourceSettings(**{**told, "photos": photos})


def photo_with_box(photo: Picture, record: SampleRecord) -> Picture:
    """The photo with the box (pink) and the view's window (white)."""
    return frame(frame(photo, Window(*record.window).rectangle().pixels(), WHITE), Rectangle(*record.box).pixels())


def view_with_box(view: Picture, record: SampleRecord, colour: Colour = PINK) -> Picture:
    """The view with the box."""
    return frame(view, Rectangle(*record.box_in_view).pixels(), colour)


def view_with_mask(view: Picture, sample: Sample, number: int) -> Picture:
    """The view with one of its masks (pink) and the box (white)."""
    return view_with_box(tint(view, sample.masks[number]), sample.record, WHITE)


def reference_with_outline(sample: Sample) -> Picture:
    """The reference with the outline of the object's own pixels, where these are known."""
    reference = decode_photo(sample.reference, frame="stored")
    counts = sample.record.reference_mask
    if counts is None:
        return reference
    return outline(reference, decode_segmentation(counts, reference.shape[1], reference.shape[0]))


def _read_samples(dataset: Path, info: DatasetInfo, places: list[int]) -> list[Sample]:
    """The samples at places of the index, in its order."""
    return [read_sample(dataset, row, means_only=info.vae.deterministic) for row in take_rows(dataset / "index.parquet", places)]


def _boxed_and_views(
    samples: Sequence[Sample], info: DatasetInfo, photos: Path | None, vae: str | None
) -> Iterator[tuple[Picture, Picture]]:
    """The photo of each sample with box and window, and its view. Without photos, the view with the box takes the photo's place.

    A view without photos is view.jpg where the dataset keeps it, else decoded from its latent.
    """
    if photos is None:
        decoder = load_recorded_vae(info, vae) if any(sample.view is None for sample in samples) else None
        for sample in samples:
            if sample.view is not None:
                view = decode_photo(sample.view, frame="stored")
            else:
                assert decoder, "some sample has no view"
                view = decode_means(decoder, sample.latent[None])[0]
            yield view_with_box(view, sample.record), view
        return
    source = photo_source(info, photos)
    for sample in samples:
        try:
            photo, _ = read_photo(sample.record.model_dump(), source)
        except PhotoError as error:
            raise InputError(f"{photos}: photo {sample.record.photo_id} of the dataset cannot be shown: {error}") from None
        yield photo_with_box(photo, sample.record), cut_recorded_view(photo, sample)


def cut_recorded_view(photo: Picture, sample: Sample) -> UInt8[np.ndarray, "height width 3"]:
    """The view of a sample, cut from its photo once more, to be looked at: antialiased, whatever `views.resize` was."""
    return cut_view(photo, Window(*sample.record.window), sample.masks.shape[:0:-1])
