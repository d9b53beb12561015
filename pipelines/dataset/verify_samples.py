"""Checks of one sample: `SAMPLE_CHECKS` is the list. Each is a pure generator of sentences about one thing.

What a sample says is held against its row of the plan, against what `dataset.json` says of all samples, and against itself: masks
are drawn again from their outlines, pictures are decoded. Sizes are read from headers before anything is decoded, since the bytes
may be anything.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle, Resizing, Window, is_padded
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.images.rle import decode_counts
from pbe_core.sample_codec import Sample, decode_sample
from pbe_core.words import number_of
from pipelines.config import MaskSettings, ReferenceSettings, ViewSettings
from pipelines.dataset.samples import Row
from pipelines.geometry import box_in_photo, fill_box, fill_polygon, reference_size, turned
from schemas.dataset import DatasetInfo
from schemas.sample import SampleRecord

# Coordinates are computed in 64 bits, and may differ in the last of them between machines; outlines are rounded to 1/100 px.
_TOLERANCE = 1e-6
_ROUNDED = 0.011
# How masks of each kind are filled. Before 2026-11-30 box masks had the pixels on their outline too, as Bessel masks have.
_FILLS = {"box": (fill_box, fill_polygon), "bessel": (fill_polygon,)}


@dataclass(frozen=True)
class Expected:
    """What holds for a whole dataset."""

    fingerprint: str
    """Of its plan."""
    fingerprints: frozenset[str]
    """Those that commit records may have: that one, and those of the plans that it extends."""

    size: int
    """S, side of a view in px."""
    masks: int
    """K."""
    latent: tuple[int, int, int]
    """Shape of a latent: 2C, h, w."""
    points_per_edge: int
    """A quarter of the points of a Bessel mask's outline."""
    reference_sides: tuple[int, int]
    """Of a reference in px: the shorter and the longer side from which on it is shrunk."""
    reference_resizing: Resizing
    """How its size follows from its window's."""
    kept: tuple[str, ...]
    """Splits whose samples have view.jpg."""


def expected_of(info: DatasetInfo, fingerprints: frozenset[str]) -> Expected:
    """What `dataset.json` says of all samples.

    Args:
        info: its content.
        fingerprints: of the dataset's plan and of those that it extends.

    Raises:
        ValueError: it contradicts itself.
    """
    views = ViewSettings.model_validate(info.settings.get("views"))
    masks = MaskSettings.model_validate(info.settings.get("masks"))
    references = ReferenceSettings.model_validate(info.settings.get("references"))
    if (views.size, masks.per_view) != (info.view_size, info.masks_per_view):
        set_to = f"settings for {views.size} px with {masks.per_view}"
        raise ValueError(f"views of {info.view_size} px with {number_of(info.masks_per_view, 'mask')}, and {set_to}")
    if info.vae.downsampling < 1 or info.vae.latent_channels < 1 or info.view_size % info.vae.downsampling:
        raise ValueError(f"a VAE that makes one cell of {info.vae.downsampling} px, and views of {info.view_size} px")
    cells = info.view_size // info.vae.downsampling
    return Expected(
        fingerprint=info.fingerprint,
        fingerprints=fingerprints,
        size=views.size,
        masks=masks.per_view,
        latent=(2 * info.vae.latent_channels, cells, cells),
        points_per_edge=masks.points_per_edge,
        reference_sides=(references.side, references.max_side),
        reference_resizing=references.resize,
        kept=views.keep,
    )


def decode_checked(members: Mapping[str, bytes], expected: Expected) -> Sample:
    """The sample in its members.

    Raises:
        InputError: says what is wrong with them.
    """
    try:
        return decode_sample(members, "sample")
    except InputError as error:  # Its way out is for those who train; ours is told at the end.
        raise InputError(str(error).removeprefix("sample: ").partition("; build")[0].partition("; the shard")[0]) from None


def check_names(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """What the record repeats of the plan."""
    record = sample.record
    for name in ("key", "object_id", "split", "photo_id", "file_name", "label", "label_name", "url", "author", "licence"):
        if getattr(record, name) != planned[name]:
            yield f"its record says {name} {getattr(record, name)!r}, the plan {planned[name]!r}"
    if record.rotation != (planned["rotation"] or 0):
        yield f"its record says rotation {record.rotation}, the plan {planned['rotation']}"
    if not re.fullmatch("[0-9a-f]{64}", record.photo_sha256):
        yield f"photo_sha256 {record.photo_sha256!r} is no SHA-256"


def check_shapes(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """Arrays as large as `dataset.json` says."""
    if sample.latent.shape != expected.latent:
        yield f"latent.npy is {list(sample.latent.shape)}, dataset.json says {list(expected.latent)}"
    if sample.masks.shape != (expected.masks, expected.size, expected.size):
        yield f"mask.json holds {list(sample.masks.shape)}, dataset.json says {[expected.masks, expected.size, expected.size]}"


def check_box(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """The object's box, in the photo as planned, and in the view as the window says."""
    record = sample.record
    width, height = record.photo_size
    stored = (height, width) if record.rotation % 180 else (width, height)
    box = turned(box_in_photo(planned, *stored), *stored, record.rotation)
    if not _close(record.box, (box.x_min, box.y_min, box.x_max, box.y_max)):
        yield f"box {_shown(record.box)} is not the planned one in a photo of {width}x{height} px"
    if record.window[2] < 1:
        yield f"window {list(record.window)} has no side"
        return
    window = Window(*record.window)
    if not window.rectangle().holds(Rectangle(*record.box)):
        yield f"window {list(record.window)} does not hold the box"
    if record.padded != is_padded(window, width, height):
        yield f"padded is {record.padded}, and window {list(record.window)} lies so in a photo of {width}x{height} px"
    corners = window.to_view(Rectangle(*record.box).corners(), expected.size)
    if not _close(record.box_in_view, (*corners[0].tolist(), *corners[2].tolist())):
        yield f"box_in_view {_shown(record.box_in_view)} is not where the window shows the box"


def check_masks(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """Each mask is its outline, drawn again; each outline is of its kind."""
    record = sample.record
    for number, (kind, points, mask) in enumerate(zip(record.mask_kinds, record.mask_polygons, sample.masks, strict=True)):
        due = 4 if kind == "box" else 4 * expected.points_per_edge
        if len(points) != due:
            yield f"mask {number} is of kind {kind}, and its outline has {number_of(len(points), 'point')}, not {due}"
            continue
        polygon = np.array(points, np.float64)
        if not np.isfinite(polygon).all():
            yield f"the outline of mask {number} has a point that is not finite"
            continue
        if not any(np.array_equal(fill(polygon, expected.size), mask) for fill in _FILLS[kind]):
            yield f"mask {number} is not what its outline encloses"
        if kind == "box" and not _is_box_around(polygon, record):
            yield f"mask {number} is of kind box, and its outline is no rectangle around the object's box"


def check_reference(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """The reference's place in the photo, its pixels, and those of them that are the object's."""
    record = sample.record
    x_min, y_min, x_max, y_max = record.reference_window
    photo = Rectangle(0, 0, *record.photo_size)
    window = Rectangle(x_min, y_min, x_max, y_max)
    if x_min >= x_max or y_min >= y_max or not photo.holds(window):
        size = "x".join(map(str, record.photo_size))
        yield f"reference_window {list(record.reference_window)} lies not in a photo of {size} px"
        return
    if not window.holds(Rectangle(*record.box).intersection(photo)):
        yield f"reference_window {list(record.reference_window)} does not hold the box"
    width, height = reference_size(x_max - x_min, y_max - y_min, *expected.reference_sides, expected.reference_resizing)
    yield from _check_picture("ref.jpg", sample.reference, width, height)
    if (record.reference_mask is None) != (planned["segmentation"] is None):
        yield f"it has {'no' if record.reference_mask is None else 'a'} reference_mask, unlike the plan"
    if record.reference_mask is not None:
        try:
            runs = decode_counts(record.reference_mask)
        except ValueError as error:
            yield f"reference_mask {error}"
            return
        if runs.min(initial=0) < 0 or runs.sum() != width * height:
            yield f"reference_mask is of {runs.sum()} px, the reference has {width}x{height}"


def check_view(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """The view itself, in those splits that keep it."""
    split = planned["split"]
    if sample.view is None:
        if split in expected.kept:
            yield f"member view.jpg is missing, and {split} keeps its views"
    elif split not in expected.kept:
        yield f"member view.jpg is there, and {split} does not keep its views"
    else:
        yield from _check_picture("view.jpg", sample.view, expected.size, expected.size)


SAMPLE_CHECKS: tuple[Callable[[Sample, Row, Expected], Iterator[str]], ...] = (
    check_names,
    check_shapes,
    check_box,
    check_masks,
    check_reference,
    check_view,
)


def check_sample(sample: Sample, planned: Row, expected: Expected) -> Iterator[str]:
    """All that can be wrong with a sample that could be decoded.

    Args:
        sample: it.
        planned: its row of the plan.
        expected: what holds for all samples.
    """
    for check in SAMPLE_CHECKS:
        yield from check(sample, planned, expected)


def _check_picture(name: str, data: bytes, width: int, height: int) -> Iterator[str]:
    if not data.startswith(b"\xff\xd8"):
        yield f"member {name} is no JPEG"
        return
    try:
        picture = decode_photo(data, frame="stored", max_pixels=4 * width * height)
    except PhotoError as error:
        yield f"member {name} cannot be decoded ({error})"
        return
    if picture.shape[:2] != (height, width):
        yield f"member {name} has {picture.shape[1]}x{picture.shape[0]} px, its record says {width}x{height}"


def _is_box_around(polygon: np.ndarray, record: SampleRecord) -> bool:
    """Whether an outline in view px is an upright rectangle that holds the object's box."""
    (left, top), (right, bottom) = polygon[0], polygon[2]
    x_min, y_min, x_max, y_max = record.box_in_view
    upright = np.array_equal(polygon, Rectangle(left, top, right, bottom).corners())
    return upright and bool(
        left <= x_min + _ROUNDED and top <= y_min + _ROUNDED and right >= x_max - _ROUNDED and bottom >= y_max - _ROUNDED
    )


def _close(found: tuple[float, ...], right: tuple[float, ...]) -> bool:
    return all(abs(one - other) <= _TOLERANCE for one, other in zip(found, right, strict=True))


def _shown(numbers: tuple[float, ...]) -> str:
    return str([round(number, 2) for number in numbers])
