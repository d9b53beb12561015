"""A sample in a shard: one object in one view with its K masks. Members are adjacent in the tar and sorted by name."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer

MaskKind = Literal["box", "bessel"]
MASK_KINDS: tuple[MaskKind, ...] = ("box", "bessel")


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    name: str
    layout: str
    meaning: str
    optional: bool = False


MEMBERS = (
    Member("json", "UTF-8 JSON object", "where the sample comes from and how it was cut; fields below"),
    Member("latent.npy", "float16 [2C, h, w]", "VAE posterior of the view: mean, then standard deviation; not scaled"),
    Member(
        "mask.json",
        "UTF-8 JSON list",
        "the K masks, [S, S] or as high and wide as the view: COCO's RLEs, which `pycocotools.mask.decode` reads; 1 = repaint",
    ),
    Member("masked.npy", "float16 [K, 2C, h, w]", "VAE posterior of the view under each mask (mid grey, 0, where the mask is 1)"),
    Member(
        "ref.jpg",
        "JPEG RGB",
        "the reference: the object's box, padded and clipped to the photo; resized up by references.resize: published alone",
    ),
    Member(
        "view.jpg",
        "JPEG RGB",
        "the view itself, [S, S] or of its shard's shape; kept for the splits named in `views.keep` only",
        optional=True,
    ),
)
MEMBER_NAMES = tuple(member.name for member in MEMBERS)
OTHER_REFERENCE = Member(
    "ref_1.jpg",
    "JPEG RGB",
    "the same instance in another photo, cut as ref.jpg is; then ref_2.jpg and so on, in the order of `references` in json",
    optional=True,
)
_OTHER_REFERENCE = re.compile(r"ref_[1-9][0-9]*\.jpg")


def other_reference(number: int) -> str:
    """Name of the member that holds a reference from another photo; they count from 1."""
    return f"ref_{number}.jpg"


def is_member(name: str) -> bool:
    """Whether a sample may have a member of this name."""
    return name in MEMBER_NAMES or bool(_OTHER_REFERENCE.fullmatch(name))


class ReferenceRecord(BaseModel):
    """A reference from another photo."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    photo_id: str
    """The source's id of the photo."""
    file_name: str | None
    """The photo's file below the photo folder; null where the id alone tells it."""
    rotation: int
    """Degrees counterclockwise by which the stored photo was turned; all that follows is in the turned frame."""
    photo_size: tuple[int, int]
    """Width and height of the photo in px."""
    photo_sha256: str
    """SHA-256 of the photo's file, hex."""
    box: tuple[float, float, float, float]
    """The instance's box in px of that photo: x_min, y_min, x_max, y_max."""
    window: tuple[int, int, int, int]
    """The reference's rectangle in px of that photo: x_min, y_min, x_max, y_max."""
    mask: str | None
    """The instance's own pixels in the reference: COCO's compressed RLE at the reference's size; null if not known."""
    url: str | None
    """Where the photo was published."""
    author: str | None
    """The photo's author."""
    licence: str | None
    """The photo's licence."""


class LostReference(BaseModel):
    """A reference from another photo that was planned and could not be cut."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    photo_id: str
    """The source's id of the photo."""
    file_name: str | None
    """The photo's file, where the source names files."""
    code: str
    """What went wrong, as a code of failures."""
    detail: str
    """What went wrong, in words."""


_LEFT_OUT = ("group", "references", "lost_references")


class SampleRecord(BaseModel):
    """The `json` member of a sample."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    key: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Key of the sample, `<object_id>_<view>`."""
    object_id: str
    """The object."""
    split: str
    """Split of the photo."""
    photo_id: str
    """The source's id of the photo."""
    file_name: str | None
    """The photo's file below the photo folder; null where the id alone tells it."""
    rotation: int
    """Degrees counterclockwise by which the stored photo was turned; all that follows is in the turned frame."""
    photo_size: tuple[int, int]
    """Width and height of the photo in px."""
    photo_sha256: str
    """SHA-256 of the photo's file, hex."""
    label: str
    """Class id."""
    label_name: str
    """Class name."""
    box: tuple[float, float, float, float]
    """The object's box in photo px: x_min, y_min, x_max, y_max."""
    window: tuple[int, int, int] | tuple[int, int, int, int]
    """What the view shows, photo px: left, top, side (no square: width, height). May reach beyond the photo (then padded)."""
    box_in_view: tuple[float, float, float, float]
    """The object's box in view px: x_min, y_min, x_max, y_max."""
    padded: bool
    """Whether the view reaches beyond the photo and was filled by reflection."""
    mask_kinds: tuple[MaskKind, ...]
    """Kind of each of the K masks."""
    mask_polygons: tuple[tuple[tuple[float, float], ...], ...]
    """Outlines in view px, (x, y). A box mask has the pixels with centres inside, a Bessel mask also those on its outline."""
    reference_window: tuple[int, int, int, int]
    """The reference's rectangle in photo px: x_min, y_min, x_max, y_max."""
    reference_mask: str | None
    """The object's own pixels in the reference: COCO's compressed RLE at the size of ref.jpg; null if not known."""
    url: str | None
    """Where the photo was published."""
    author: str | None
    """The photo's author."""
    licence: str | None
    """The photo's licence."""
    seed: int
    """Seed of the build; with the key it determines window and masks."""
    group: str | None = None
    """The instance, as the source names it; left out where it does not."""
    references: tuple[ReferenceRecord, ...] = ()
    """What ref_1.jpg, ref_2.jpg, ... show; left out where there are none."""
    lost_references: tuple[LostReference, ...] = ()
    """Which of the planned ones could not be cut; left out where there are none."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Written as before there were these fields, so that what did not need them is the same bytes."""
        return {name: value for name, value in write(self).items() if value or name not in _LEFT_OUT}
