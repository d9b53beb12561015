"""Samples before their latents: a plan row and its photo -> view, masks, reference and record.

Every draw goes by names (seed, object, view, mask), so a sample is the same whatever was packed before it, and where.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pycocotools.mask
from jaxtyping import Bool, UInt8

from pbe_core.images.crop import Rectangle, Window, cut_view, is_padded, whole_photo
from pbe_core.images.decode import PhotoError
from pbe_core.randomness import generator
from pbe_core.sample_codec import jpeg_bytes
from pbe_core.words import number_of
from pipelines.annotations.mask_files import MaskError, is_place, read_mask
from pipelines.annotations.photo_names import same_shape
from pipelines.config import BuildSettings, SourceSettings
from pipelines.dataset.plan_shards import PlanRow
from pipelines.geometry import (
    POINTS_PER_EDGE,
    bessel_polygon,
    box_in_photo,
    cut_reference,
    cut_reference_mask,
    extend_box,
    fill_outline,
    grey_background,
    reference_window,
    turned,
    view_window,
)
from pipelines.photos import read_photo
from pipelines.selection.rules import above_max_aspect, below_min_side
from schemas.outcomes import OUTCOMES, PHOTO_ERRORS
from schemas.sample import LostReference, MaskKind, ReferenceRecord, SampleRecord

Polygon = tuple[tuple[float, float], ...]
Photo = tuple[UInt8[np.ndarray, "height width 3"], str]
"""Pixels, and the SHA-256 of the file."""
# Of ref.jpg and view.jpg.
JPEG_QUALITY = 95

# Codes of failures of the photo, not of what is cut from it.
OF_PHOTOS = frozenset({*PHOTO_ERRORS, *OUTCOMES, "not_crawled", "changed"})


@dataclass(frozen=True)
class Prepared:
    """A sample that lacks only its latents."""

    record: SampleRecord
    view: UInt8[np.ndarray, "height width 3"]
    masks: Bool[np.ndarray, "masks height width"]
    reference: bytes
    others: tuple[bytes, ...] = ()
    """References from other photos, in the order of the record's `references`."""


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be made, and why: a code of `schemas.tables.FAILURE_CODES`."""

    key: str
    split: str
    photo_id: str
    file_name: str | None
    code: str
    detail: str


def prepare_photo(
    rows: list[PlanRow], settings: BuildSettings, shape: tuple[int, int] | None = None, photos: "Photos | None" = None
) -> list[Prepared | Failure]:
    """All samples of one photo, decoded once. A photo that cannot be used costs its own samples, nothing else.

    Args:
        rows: of the plan, all of one photo.
        settings: of the build.
        shape: as of `prepare_sample`.
        photos: where the photos of references are read, which may be those of other rows and of other shards.
    """
    try:
        photo, sha256 = read_photo(vars(rows[0]), settings.source)
    except PhotoError as error:
        return [failure_of(row, error.code, error.detail) for row in rows]
    photos = photos or Photos(settings)
    prepared = (prepare_sample(row, photo, sha256, settings, shape) for row in rows)
    return [add_references(row, sample, settings, photos) for row, sample in zip(rows, prepared, strict=True)]


def prepare_sample(
    row: PlanRow,
    photo: UInt8[np.ndarray, "height width 3"],
    photo_sha256: str,
    settings: BuildSettings,
    shape: tuple[int, int] | None = None,
) -> Prepared | Failure:
    """Cut and draw everything of one plan row. A pure function of its arguments and, where it has one, of its mask's file.

    Args:
        row: of the plan; its box is in the frame of the photo before it was turned.
        photo: turned by the row's `rotation` already.
        photo_sha256: of the photo's file.
        settings: of the build.
        shape: width and height of the view, px: that of the row's shard; by default a square of `views.size`.

    The first mask's extended box is what the view must hold, as published; further masks extend on their own, inside the view.
    """
    height, width = photo.shape[:2]
    names = (settings.seed, row.object_id, "view", row.view)
    frame = whole_photo(width, height)
    rotation = row.rotation or 0
    stored = (height, width) if rotation % 180 else (width, height)
    box = turned(box_in_photo(vars(row), *stored), *stored, rotation)
    failure = unfit((row.width, row.height), *stored, box, settings)
    if failure:
        return failure_of(row, *failure)
    extended = extend_box(box, frame, settings.masks.max_extension, generator(*names, "mask", 0, "extension"))
    views = settings.views
    shape = shape or (views.size, views.size)
    least = views.least_side(shape)
    window = view_window(extended, width, height, shape, views.zoom, views.max_zoom, generator(*names, "window"), least)
    if window.side < least:
        detail = f"a window of {window.width}x{window.height} px for a view of {shape[0]}x{shape[1]} px"
        return failure_of(row, "enlarged", detail)
    padded = is_padded(window, width, height)
    if padded and views.no_square == "reject":
        detail = f"extended box {extended.width:.0f}x{extended.height:.0f} px in a photo of {width}x{height} px"
        return failure_of(row, "no_square", detail)
    kinds, polygons, masks = zip(*_draw_masks(box, extended, window, frame, names, settings, shape), strict=True)
    crop = reference_window(box, width, height, settings.references.padding)
    try:
        reference, reference_mask = cut_out(vars(row), photo, crop, settings)
    except _Unfit as unusable:
        return failure_of(row, *unusable.args)
    box_in_view = window.to_view(box.corners(), shape)
    record = SampleRecord(
        key=row.key,
        object_id=row.object_id,
        split=row.split,
        photo_id=row.photo_id,
        file_name=row.file_name,
        rotation=rotation,
        photo_size=(width, height),
        photo_sha256=photo_sha256,
        label=row.label,
        label_name=row.label_name,
        box=(box.x_min, box.y_min, box.x_max, box.y_max),
        window=window.numbers(),
        box_in_view=(*box_in_view[0].tolist(), *box_in_view[2].tolist()),
        padded=padded,
        mask_kinds=kinds,
        mask_polygons=polygons,
        reference_window=crop,
        reference_mask=reference_mask,
        url=row.url,
        author=row.author,
        licence=row.licence,
        seed=settings.seed,
        group=row.group,
    )
    view = cut_view(photo, window, shape, views.resize)
    return Prepared(record, view, np.stack(masks), jpeg_bytes(reference, JPEG_QUALITY))


def _draw_masks(
    box: Rectangle,
    extended: Rectangle,
    window: Window,
    frame: Rectangle,
    names: tuple[str | int, ...],
    settings: BuildSettings,
    shape: tuple[int, int],
) -> Iterator[tuple[MaskKind, Polygon, Bool[np.ndarray, "height width"]]]:
    """The K masks of a view, the first from the extended box that the view was made for."""
    visible = window.rectangle().intersection(frame)
    for number in range(settings.masks.per_view):
        if number:
            random = generator(*names, "mask", number, "extension")
            extended = extend_box(box, frame, settings.masks.max_extension, random).intersection(visible)
        yield draw_mask(box, extended, window, visible, settings, generator(*names, "mask", number, "shape"), shape)


def cut_out(
    row: Mapping[str, Any], photo: UInt8[np.ndarray, "height width 3"], crop: tuple[int, int, int, int], settings: BuildSettings
) -> tuple[UInt8[np.ndarray, "side_y side_x 3"], str | None]:
    """A reference's pixels, and its mask as run lengths: null where the source does not know the object's outline.

    Args:
        row: of the plan, or one of its `references`: segmentation, width, height, rotation.
        photo: turned by `rotation` already.
        crop: the reference's window, photo px.
        settings: of the build.

    Raises:
        _Unfit: the file of the object's mask cannot be used, or covers too little of the reference.
    """
    cut = settings.references
    reference = cut_reference(photo, crop, cut.side, cut.max_side, cut.resize)
    stored = _object_mask(row, settings.source)
    if stored is None:
        return reference, None
    upright = np.rot90(stored, (row["rotation"] or 0) // 90)
    in_file = is_place(row["segmentation"])
    if in_file and not same_shape(upright.shape[::-1], photo.shape[1::-1]):
        sizes = f"{upright.shape[1]}x{upright.shape[0]} px, the photo {photo.shape[1]}x{photo.shape[0]}"
        raise _Unfit("bad_mask", f"the object's mask has {sizes}: it is of another photo, or turned otherwise")
    mask = cut_reference_mask(upright, photo.shape[1::-1], crop, reference.shape[1::-1], cut.resize)
    if cut.background != "grey":
        return reference, encode_segmentation(mask)
    least = settings.selection.min_object_share
    if in_file and least is not None and mask.mean() < least:
        raise _Unfit("reference_too_empty", f"the object's mask covers {mask.mean():.3f} of the reference")
    return grey_background(reference, mask), encode_segmentation(mask)


class _Unfit(Exception):
    """Code and detail of why a sample cannot be made."""


def _object_mask(row: Mapping[str, Any], source: SourceSettings) -> Bool[np.ndarray, "height width"] | None:
    """The object's pixels over the whole photo as it was before it was turned, at the size of the annotations, where known."""
    if row["segmentation"] is not None and is_place(row["segmentation"]):
        try:
            return read_mask(row["segmentation"], source)
        except MaskError as error:
            raise _Unfit("bad_mask", str(error)) from None
    if row["segmentation"] is None or row["width"] is None or row["height"] is None:
        return None
    return decode_segmentation(row["segmentation"], row["width"], row["height"])


def add_references(row: PlanRow, sample: Prepared | Failure, settings: BuildSettings, photos: "Photos") -> Prepared | Failure:
    """The sample with its references from other photos, cut as its own is.

    One that cannot be cut is recorded with a code. The sample fails only where it has none of those that were planned, and
    `references.alone` is `reject`.
    """
    if isinstance(sample, Failure) or not row.references:
        return sample
    cuts = [cut_from_another(each, row.split, settings, photos) for each in row.references]
    made = [cut for cut in cuts if not isinstance(cut, LostReference)]
    lost = [cut for cut in cuts if isinstance(cut, LostReference)]
    if not made and settings.references.alone == "reject":
        first = lost[0]
        return failure_of(
            row, "no_reference", f"of {number_of(len(lost), 'photo')}, the first {first.photo_id}: {first.code}, {first.detail}"
        )
    told = {"references": tuple(record for record, _ in made), "lost_references": tuple(lost)}
    return replace(sample, record=sample.record.model_copy(update=told), others=tuple(data for _, data in made))


def cut_from_another(
    told: Mapping[str, Any], split: str, settings: BuildSettings, photos: "Photos"
) -> tuple[ReferenceRecord, bytes] | LostReference:
    """A reference from another photo as a JPEG, with its record; or why there is none.

    Args:
        told: one of a plan row's `references`.
        split: of the row.
        settings: of the build.
        photos: where the photo is read.
    """

    def lost(code: str, detail: str) -> LostReference:
        return LostReference(photo_id=told["photo_id"], file_name=told["file_name"], code=code, detail=detail)

    try:
        photo, sha256 = photos.read({**told, "split": split})
    except PhotoError as error:
        return lost(error.code, error.detail)
    height, width = photo.shape[:2]
    rotation = told["rotation"] or 0
    stored = (height, width) if rotation % 180 else (width, height)
    box = turned(box_in_photo(told, *stored), *stored, rotation)
    if failure := unfit((told["width"], told["height"]), *stored, box, settings):
        return lost(*failure)
    crop = reference_window(box, width, height, settings.references.padding)
    try:
        pixels, mask = cut_out(told, photo, crop, settings)
    except _Unfit as unusable:
        return lost(*unusable.args)
    record = ReferenceRecord(
        **{name: told[name] for name in ("photo_id", "file_name", "url", "author", "licence")},
        rotation=rotation,
        photo_size=(width, height),
        photo_sha256=sha256,
        box=(box.x_min, box.y_min, box.x_max, box.y_max),
        window=crop,
        mask=mask,
    )
    return record, jpeg_bytes(pixels, JPEG_QUALITY)


class Photos:
    """Photos of references, the last few of which are kept: an object's neighbours in the plan often share them.

    Called from several threads. What is read depends on no other photo, so neither do the bytes of a shard.
    """

    def __init__(self, settings: BuildSettings, kept_bytes: int = 256_000_000) -> None:
        """Nothing is read yet. Photos of `kept_bytes` together stay in memory, of 12 megapixels some seven."""
        self._settings = settings
        self._room = kept_bytes
        self._photos: OrderedDict[tuple[str, str], Photo | PhotoError] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: Mapping[str, Any]) -> Photo:
        """As `pipelines.photos.read_photo`; raises `PhotoError` likewise."""
        name = row["split"], row["photo_id"]
        with self._lock:
            found = self._photos.get(name)
        if found is None:
            try:
                found = read_photo(row, self._settings.source)
            except PhotoError as error:
                found = error
            with self._lock:
                if name not in self._photos:  # Another thread may have read it meanwhile.
                    self._room -= _bytes_of(found)
                self._photos[name] = found
                while self._room < 0:
                    self._room += _bytes_of(self._photos.popitem(last=False)[1])
        if isinstance(found, PhotoError):
            raise PhotoError(found.code, found.detail)
        return found


def _bytes_of(found: Photo | PhotoError) -> int:
    return 0 if isinstance(found, PhotoError) else int(found[0].nbytes)


def failure_of(row: PlanRow, code: str, detail: str) -> Failure:
    """The failure of a planned sample."""
    return Failure(row.key, row.split, row.photo_id, row.file_name, code, detail)


def draw_mask(
    box: Rectangle,
    extended: Rectangle,
    window: Window,
    visible: Rectangle,
    settings: BuildSettings,
    random: np.random.Generator,
    shape: tuple[int, int] | None = None,
) -> tuple[MaskKind, Polygon, Bool[np.ndarray, "height width"]]:
    """One edit region of a view: its kind, its outline in view px, to the hundredth, and the pixels in this outline.

    Args:
        box: the object's box, photo px.
        extended: the extended box, photo px, inside `visible`.
        window: what the view shows.
        visible: the part of it that lies in the photo, photo px; no outline goes beyond.
        settings: of the build.
        random: the source of kind and shape.
        shape: width and height of the view, px; by default a square of `views.size`.
    """
    options, size = settings.masks, shape or settings.views.size
    kind: MaskKind
    if random.random() < options.arbitrary_mask_prob:
        kind = "bessel"
        outline = bessel_polygon(box, extended, POINTS_PER_EDGE, options.jitter, random)
        outline = np.clip(outline, (visible.x_min, visible.y_min), (visible.x_max, visible.y_max))
    else:
        kind = "box"
        outline = extended.corners()
    polygon = np.round(window.to_view(outline, size), 2)
    return kind, tuple(map(tuple, polygon.tolist())), fill_outline(kind, polygon, size)


def unfit(
    told: tuple[int | None, int | None], width: int, height: int, box: Rectangle, settings: BuildSettings
) -> tuple[str, str] | None:
    """What only the photo itself tells: code and detail of why an object cannot be cut from it; None if it can.

    Args:
        told: width and height of the photo as the tables have it, px.
        width: of the photo, px, before it was turned.
        height: likewise.
        box: photo px.
        settings: its rules of selection that ask for px.
    """
    if told[0] is not None and told[1] is not None:
        # A smaller copy of the photo has the same shape; another frame, or another photo, has not.
        if not same_shape((told[0], told[1]), (width, height)):
            detail = f"the photo has {width}x{height} px, the annotations say {told[0]}x{told[1]}"
            turned = same_shape((told[1], told[0]), (width, height))
            other = "exif" if settings.source.photo_frame == "stored" else "stored"
            return "shape_mismatch", f"{detail}: turned by its EXIF? then set source.frame: {other}" if turned else detail
        return None
    shorter, longer = np.array([min(box.width, box.height)]), np.array([max(box.width, box.height)])
    if below_min_side(shorter, settings.selection).any():
        return "reference_too_small", f"{box.width:.0f}x{box.height:.0f} px"
    if above_max_aspect(shorter, longer, settings.selection).any():
        return "too_elongated", f"{box.width:.0f}x{box.height:.0f} px"
    return None


def decode_segmentation(counts: str, width: int, height: int) -> Bool[np.ndarray, "height width"]:
    """An object's own pixels from COCO's run lengths. The counts were checked when they were read; they sum to width * height."""
    pixels: np.ndarray = pycocotools.mask.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)
    return pixels


def encode_segmentation(pixels: Bool[np.ndarray, "height width"]) -> str:
    """COCO's run lengths of a mask, as pycocotools reads and writes them; its size is not in them."""
    counts: bytes = pycocotools.mask.encode(np.asfortranarray(pixels, np.uint8))["counts"]
    return counts.decode()
