"""Samples before their latents: a plan row and its photo -> view, masks, reference and record.

Every draw goes by names (seed, object, view, mask), so a sample is the same whatever was packed before it, and where.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from pipelines.config import BuildSettings
from pipelines.geometry import box_in_photo, whole_photo
from pipelines.masks import bessel_polygon, extend_box, rasterise
from pipelines.photo_folder import photo_path
from pipelines.references import cut_reference, reference_window
from pipelines.views import cut_view, is_padded, square_window
from schemas.photos import PhotoError, decode_photo
from schemas.randomness import generator
from schemas.sample import MaskKind, SampleRecord, jpeg_bytes

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A sample that lacks only its latents."""

    record: SampleRecord
    view: UInt8[np.ndarray, "size size 3"]
    masks: Bool[np.ndarray, "masks size size"]
    reference: bytes


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be made, and why: a code of `schemas.tables.FAILURE_CODES`."""

    key: str
    split: str
    photo_id: str
    code: str
    detail: str


def prepare_sample(
    row: Row, photo: UInt8[np.ndarray, "height width 3"], photo_sha256: str, settings: BuildSettings
) -> Prepared | Failure:
    """Cut and draw everything of one plan row. A pure function of its arguments.

    The first mask's extended box is what the view must hold, as published; further masks extend on their own, inside the view.
    """
    height, width = photo.shape[:2]
    names = (settings.seed, row["object_id"], "view", row["view"])
    frame = whole_photo(width, height)
    box = box_in_photo(row, width, height)
    options = settings.masks

    extended = extend_box(box, frame, options.max_extension, generator(*names, "mask", 0, "extension"))
    window = square_window(extended, width, height, settings.views.max_zoom, generator(*names, "window"))
    padded = is_padded(window, width, height)
    if padded and settings.views.no_square == "reject":
        detail = f"extended box {extended.width:.0f}x{extended.height:.0f} px in a photo of {width}x{height} px"
        return Failure(row["key"], row["split"], row["photo_id"], "no_square", detail)

    size = settings.views.size
    visible = window.rectangle().intersection(frame)
    kinds: list[MaskKind] = []
    polygons, masks = [], []
    for number in range(options.per_view):
        if number:
            extended = extend_box(box, frame, options.max_extension, generator(*names, "mask", number, "extension"))
            extended = extended.intersection(visible)
        random = generator(*names, "mask", number, "shape")
        if random.random() < options.bessel_share:
            kinds.append("bessel")
            polygon = bessel_polygon(box, extended, options.points_per_edge, options.jitter, random)
            polygon = np.clip(polygon, (visible.x_min, visible.y_min), (visible.x_max, visible.y_max))
        else:
            kinds.append("box")
            polygon = extended.corners()
        polygon = window.to_view(polygon, size)
        polygons.append(tuple((round(x, 2), round(y, 2)) for x, y in polygon.tolist()))
        masks.append(rasterise(np.array(polygons[-1]), size))

    crop = reference_window(box, width, height, settings.references.padding)
    reference = cut_reference(photo, crop, settings.references.max_side)
    box_in_view = window.to_view(box.corners(), size)
    record = SampleRecord(
        key=row["key"],
        object_id=row["object_id"],
        split=row["split"],
        photo_id=row["photo_id"],
        photo_size=(width, height),
        photo_sha256=photo_sha256,
        label=row["label"],
        label_name=row["label_name"],
        box=(box.x_min, box.y_min, box.x_max, box.y_max),
        window=(window.left, window.top, window.side),
        box_in_view=(*box_in_view[0].tolist(), *box_in_view[2].tolist()),
        padded=padded,
        mask_kinds=tuple(kinds),
        mask_polygons=tuple(polygons),
        reference_window=crop,
        url=row["url"],
        author=row["author"],
        licence=row["licence"],
        seed=settings.seed,
    )
    view = cut_view(photo, window, size)
    return Prepared(record, view, np.stack(masks), jpeg_bytes(reference, settings.references.jpeg_quality))


def read_photo(split: str, photo_id: str, settings: BuildSettings) -> tuple[UInt8[np.ndarray, "height width 3"], str]:
    """A photo's pixels (RGB, stored frame) and the SHA-256 of its file.

    Raises:
        PhotoError: it is missing or cannot be decoded.
    """
    data = photo_path(settings.source.photos, split, photo_id).read_bytes()
    photo = decode_photo(data, frame="stored", max_pixels=settings.source.max_photo_pixels)
    return photo, hashlib.sha256(data).hexdigest()


def prepare_photo(rows: list[Row], settings: BuildSettings) -> list[Prepared | Failure]:
    """All samples of one photo, decoded once. A photo that cannot be used costs its own samples, nothing else."""
    try:
        photo, sha256 = read_photo(rows[0]["split"], rows[0]["photo_id"], settings)
    except PhotoError as error:
        return [Failure(row["key"], row["split"], row["photo_id"], error.code, error.detail) for row in rows]
    return [prepare_sample(row, photo, sha256, settings) for row in rows]
