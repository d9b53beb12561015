"""What a pair is cut from its two photos, and whether these are one photo. Pure functions, but for `open_object`.

photo ┌───┬─────────────────┬────┐     the largest square in the middle, moved as little as holding the box takes
      │   │          ┌────┐ │    │     (a box that no square holds: the square's middle on the box's), resized to `size` px
      │   │          │box │ │    │     mask: the pixels whose centres lie in the box; what is outside the square is cut off
      └───┴──────────┴────┴─┴────┘
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from pbe_core.images.crop import Rectangle, Window, cut_view, whole_photo
from pbe_core.images.decode import PhotoError
from pipelines.config import BuildSettings
from pipelines.dataset.samples import unfit
from pipelines.geometry import box_in_photo, cut_reference, fill_box, reference_window, turned
from pipelines.photos import read_photo
from pipelines.selection.duplicates import ADDRESS, MAX_DETAIL_DISTANCE, MAX_DISTANCE, PerceptualHash, perceptual_hash

Photo = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Opened:
    """An object and its photo, decoded and turned upright."""

    row: Mapping[str, Any]
    photo: Photo
    box: Rectangle
    """Photo px."""
    sha256: str
    """Of the photo's file."""
    looks: PerceptualHash | None


def open_object(row: Mapping[str, Any], settings: BuildSettings) -> Opened:
    """Read the photo of an object.

    Args:
        row: of `schemas.tables.OBJECTS`.
        settings: where photos are, and the rules that only a photo can answer.

    Raises:
        PhotoError: the photo cannot be read, or the box does not fit it: a code of `schemas.tables.FAILURE_CODES`.
    """
    photo, sha256 = read_photo(row, settings.source)
    height, width = photo.shape[:2]
    rotation = row["rotation"] or 0
    stored = (height, width) if rotation % 180 else (width, height)
    box = turned(box_in_photo(row, *stored), *stored, rotation).intersection(whole_photo(width, height))
    if failure := unfit((row["width"], row["height"]), *stored, box, settings):
        raise PhotoError(*failure)
    return Opened(row, photo, box, sha256, perceptual_hash(photo))


def square_around(box: Rectangle, width: int, height: int) -> Window:
    """The square of a photo that a pair shows.

    Args:
        box: photo px, inside the photo.
        width: of the photo, px.
        height: likewise.

    Its side is the photo's shorter one: it lies inside the photo, and only the longer axis leaves a choice. It is in the middle,
    as the published script cuts real photos (`CenterCrop`), or as near to that as holding the box allows. Of a box that is longer
    than the square, the middle is in the square's, as far as the photo goes.
    """
    side = min(width, height)
    x_min, y_min, x_max, y_max = box.pixels()
    return Window(_start(x_min, x_max, width, side), _start(y_min, y_max, height, side), side)


def _start(low: int, high: int, length: int, side: int) -> int:
    if high - low > side:
        return min(max((low + high - side) // 2, 0), length - side)
    return min(max((length - side) // 2, high - side), low)


@dataclass(frozen=True)
class Target:
    """An object in the square of its photo."""

    photo: UInt8[np.ndarray, "size size 3"]
    mask: Bool[np.ndarray, "size size"]
    share: float
    """Of the square that the box covers, 0 to 1: by the box itself, so that it does not depend on the square's px."""
    whole: bool
    """Whether the square holds all of the box."""


def cut_target(opened: Opened, size: int) -> Target:
    """The square of a photo at `size` px, and what of it the object's box covers."""
    height, width = opened.photo.shape[:2]
    window = square_around(opened.box, width, height)
    shown = opened.box.intersection(window.rectangle())
    mask = fill_box(window.to_view(shown.corners(), size), size)
    share = shown.width * shown.height / window.side**2
    return Target(cut_view(opened.photo, window, size), mask, share, shown == opened.box)


def cut_object(opened: Opened, padding: int, size: int) -> UInt8[np.ndarray, "height2 width2 3"]:
    """The object as a reference: its box, padded as a build's references are, shrunk to `size` px where it is longer."""
    height, width = opened.photo.shape[:2]
    return cut_reference(opened.photo, reference_window(opened.box, width, height, padding), size, size)


def same_photo(one: Opened, other: Opened) -> bool:
    """Whether two objects are of one photo, by all that tells: id, file, URL, the file's bytes, what it shows.

    The limits of the perceptual hash are those of a survey (`pipelines/selection/duplicates.py`).
    """
    if one.sha256 == other.sha256 or same_in_tables(one.row, other.row):
        return True
    if one.looks is None or other.looks is None:
        return False
    coarse, detail = ((a ^ b).bit_count() for a, b in zip(one.looks, other.looks, strict=True))
    return coarse <= MAX_DISTANCE and detail <= MAX_DETAIL_DISTANCE


def same_in_tables(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows of objects are of one photo, by their words alone; an URL counts if it is an address of something."""
    same = {name for name in ("photo_id", "file_name", "url") if one[name] and one[name] == other[name]}
    return bool(same - {"url"}) or ("url" in same and re.match(ADDRESS, one["url"]) is not None)


def png_bytes(picture: np.ndarray) -> bytes:
    """A PNG of an RGB picture or, as grey, of a mask (True is 255)."""
    pixels = picture.astype(np.uint8) * 255 if picture.dtype == bool else picture[..., ::-1]
    return cv2.imencode(".png", pixels)[1].tobytes()
