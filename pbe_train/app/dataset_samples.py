"""Everything about one sample: its facts, and its pictures as JPEG or PNG bytes.

    row of the index ──members, CRC-32──▶ json ──▶ facts, photo with its window        where the photo can be had
                                      ──▶ view.jpg, masks, ref.jpg                      as they are
                                      ──▶ ref.jpg ──augmentation──▶ draws               as the trainer makes them
                                      ──▶ latents ──VAE──▶ decoded                      loads PyTorch and the VAE

Pictures are decoded by the project's own codec and written anew: no byte of a shard reaches a browser as it is.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from pydantic import ValidationError

from pbe_core.dataset_reader import member_places
from pbe_core.errors import InputError
from pbe_core.images.crop import Window, cut_view
from pbe_core.images.decode import MAX_PIXELS, PhotoError, decode_jpeg, decode_photo
from pbe_core.images.rle import decode_pixels
from pbe_core.leave_out import is_id
from pbe_core.photo_files import read_photo_bytes
from pbe_core.sample_codec import decode_array, decode_masks, jpeg_bytes
from pbe_core.storage import is_url
from pbe_train.app.dataset_folder import DatasetFolder, Row
from pbe_train.app.dataset_torch import Draw, TorchProcess, augment, decode
from schemas.sample import SampleRecord, other_reference

Picture = UInt8[np.ndarray, "_ _ 3"]
TILE = 160
"""Side of the square that a tile's picture fits, px."""
MOST_OF_PHOTO = 1600
"""Longer side, px, of photos as they are shown."""
QUALITY = 88
TINT = (226, 92, 35, 140)
"""Red, green, blue, opacity of a mask's region."""


@dataclass
class Sources:
    """What a dataset's pictures are made from beside its own files.

    Args:
        photos: folder or store, where photos are not where the build had them.
        storage: options of fsspec for a store behind a URL.
        vae: folder or hub id, where the VAE is not where the build had it.
    """

    photos: str | None = None
    storage: Mapping[str, Any] | None = None
    vae: str | None = None


# Long, and shown as pictures.
_NOT_TOLD: Any = {"mask_polygons": True, "reference_mask": True, "references": {"__all__": {"mask"}}}


class Samples:
    """Samples of one dataset. Threads may share it."""

    def __init__(self, folder: DatasetFolder, sources: Sources, torch: TorchProcess) -> None:
        self.folder = folder
        self.sources = sources
        self.torch = torch

    def describe(self, row: Row) -> dict[str, Any]:
        """The facts of a sample, as JSON has them: its record, its place, its members' sizes and checksums."""
        record = self.record(row)
        members = member_places(row)
        masks = decode_masks(self.folder.members(row, ["mask.json"])["mask.json"])
        return {
            "record": record.model_dump(mode="json", exclude=_NOT_TOLD),
            "outline": record.reference_mask is not None,
            "link": record.url if is_web(record.url) else None,
            "licence_link": record.licence if is_web(record.licence) else None,
            "shard": row["shard"],
            "position": row["position"],
            "share": round(_area(record.box) / max(1, record.photo_size[0] * record.photo_size[1]), 5),
            "mask_shares": [round(float(mask.mean()), 4) for mask in masks],
            "members": {name: {**place, "crc32": f"{place['crc32']:08x}"} for name, place in members.items()},
            "view_shape": self.folder.info.view_shape(row["shard"]),
            "view_kept": "view.jpg" in members,
        }

    def record(self, row: Row) -> SampleRecord:
        """The `json` of a sample. Raises InputError where it is damaged."""
        data = self.folder.members(row, ["json"])["json"]
        try:
            return SampleRecord.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{_where(row)}: json: {where}: {first['msg']}; build the shard again") from None

    def tile(self, row: Row) -> bytes:
        """The reference, small."""
        return jpeg_bytes(shrink(self._reference(row), TILE), QUALITY)

    def reference(self, row: Row, number: int = 0) -> bytes:
        """The reference; or that of a number from 1 on, from another photo. Raises InputError: there is no such one."""
        if not 0 <= number <= len(row.get("refs_jpg") or ()):
            raise InputError(
                f"{_where(row)}: no reference {number} from another photo; there are {len(row.get('refs_jpg') or ())}"
            )
        return jpeg_bytes(self._reference(row, number), QUALITY)

    def view(self, row: Row) -> tuple[bytes, str]:
        """The view, and what it is from: view.jpg; where the build kept none, the photo, or else its latent, decoded."""
        data = self.folder.members(row, ["view.jpg"])["view.jpg"] if row["view_jpg"] else None
        if data is not None:
            return jpeg_bytes(_decoded(data, row, "view.jpg"), QUALITY), "view.jpg"
        record = self.record(row)
        try:
            photo = self._photo(record)
        except (InputError, PhotoError):
            return self.latent(row, None), "latent"
        return jpeg_bytes(cut_view(photo, Window(*record.window), self.folder.info.view_shape(row["shard"])), QUALITY), "photo"

    def mask(self, row: Row, number: int) -> bytes:
        """A mask as a PNG to lay over the view: its region is tinted, the rest clear."""
        masks = decode_masks(self.folder.members(row, ["mask.json"])["mask.json"])
        if not 0 <= number < len(masks):
            raise InputError(f"{_where(row)}: no mask {number}; there are {len(masks)}, from 0")
        return tinted_png(masks[number])

    def photo(self, row: Row) -> bytes:
        """The photo in the frame of the box, of at most `MOST_OF_PHOTO` px.

        Raises:
            InputError: it cannot be had here, or is another one than the sample was cut from.
        """
        try:
            return jpeg_bytes(shrink(self._photo(self.record(row)), MOST_OF_PHOTO), QUALITY)
        except PhotoError as error:
            raise InputError(f"the photo is not here ({error}); --photos says where photos are") from None

    def photo_of_reject(self, row: Row) -> bytes:
        """The photo of a rejected box, as it is stored, of at most `MOST_OF_PHOTO` px. Raises InputError: it cannot be had."""
        if row["photo_id"] is None or row["split"] is None:
            raise InputError("the row does not say which photo it is of")
        if not is_id("photo", row["photo_id"]):
            raise InputError("no photo has such an id")
        try:
            # Which file a photo is where the source names files, is told of accepted boxes alone.
            return jpeg_bytes(shrink(self._decode(self.read_photo_file({**row, "file_name": None})), MOST_OF_PHOTO), QUALITY)
        except PhotoError as error:
            raise InputError(f"the photo is not here ({error}); --photos says where photos are") from None

    def latent(self, row: Row, mask: int | None) -> bytes:
        """What the VAE makes of the view's latent, or of that under a mask. Loads the VAE on first use.

        Raises:
            InputError: the VAE cannot be loaded, or is another one; or there is no such mask.
        """
        name = "latent.npy" if mask is None else "masked.npy"
        try:
            latents = decode_array(self.folder.members(row, [name])[name])
        except ValueError as error:
            raise InputError(f"{_where(row)}: {name} is damaged ({error}); build the shard again") from None
        chosen = latents[None] if mask is None else latents[mask : mask + 1]
        if mask is not None and not 0 <= mask < len(latents):
            raise InputError(f"{_where(row)}: no mask {mask}; there are {len(latents)}, from 0")
        return jpeg_bytes(self.torch.call(decode, self.folder.info, self.sources.vae, chosen.copy()), QUALITY)

    def draw(self, row: Row, draw: Draw) -> bytes:
        """The reference as a training would show it to the encoder, were this sample in this slot of this step.

        Raises:
            InputError: references of this dataset cannot be padded, or the sample is damaged.
        """
        if draw.geometry == "pad" and self.folder.info.settings.get("references", {}).get("resize") == "published":
            raise InputError(
                f"{self.folder.name}: references are stored squashed to squares (references.resize: published), so that padding "
                "has no aspect to keep; choose squash"
            )
        reference = self._reference(row)
        counts = self.record(row).reference_mask if draw.preset == "strong" else None
        try:
            outline = None if counts is None else decode_pixels(counts, *reference.shape[:2])
        except ValueError as error:
            raise InputError(f"{_where(row)}: reference_mask: {error}; build the shard again") from None
        return jpeg_bytes(self.torch.call(augment, reference, outline, draw), QUALITY)

    def _reference(self, row: Row, number: int = 0) -> Picture:
        name = other_reference(number) if number else "ref.jpg"
        return _decoded(self.folder.members(row, [name])[name], row, name)

    def _photo(self, record: SampleRecord) -> Picture:
        """The photo that a sample was cut from, turned as it was.

        Raises:
            PhotoError: it cannot be read or decoded.
            InputError: the dataset does not say where photos are, or it is another photo.
        """
        data = self.read_photo_file(record.model_dump())
        if hashlib.sha256(data).hexdigest() != record.photo_sha256:
            raise InputError("another photo lies there now than the sample was cut from (SHA-256)")
        return np.ascontiguousarray(np.rot90(self._decode(data), record.rotation // 90))

    def _decode(self, data: bytes) -> Picture:
        """A photo in the frame of its boxes."""
        told = self.folder.info.settings.get("source", {})
        return decode_photo(data, frame=frame_of(told), max_pixels=min(MAX_PIXELS, told.get("max_photo_pixels", MAX_PIXELS)))

    def read_photo_file(self, row: Mapping[str, Any]) -> bytes:
        """A photo's file, where the build or `--photos` has it. Raises PhotoError, or InputError: it is not said where."""
        place = self.sources.photos or self.folder.info.settings.get("source", {}).get("photos")
        if not place:
            raise InputError("the dataset does not say where its photos are; --photos does")
        if not is_url(place):
            return read_photo_bytes(row, Path(place))
        tables = Path.home() / ".cache" / "paint-by-example" / hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16]
        return read_photo_bytes(row, tables, place, self.sources.storage or {})


def frame_of(source: Mapping[str, Any]) -> Literal["stored", "exif"]:
    """The frame of the boxes, from the settings of a build's source: as given, or what its kind has."""
    frame = source.get("frame") or ("exif" if source.get("kind") == "boxes" else "stored")
    return "exif" if frame == "exif" else "stored"


def is_web(text: str | None) -> bool:
    """Whether a text of a stranger may be a link."""
    return text is not None and text.lower().startswith(("http://", "https://"))


def shrink(picture: Picture, most: int) -> Picture:
    """A picture whose longer side is at most so many px."""
    height, width = picture.shape[:2]
    scale = most / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller: Picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return smaller


def tinted_png(mask: Bool[np.ndarray, "height width"]) -> bytes:
    """A PNG with the colour `TINT` where the mask is, and nothing elsewhere."""
    red, green, blue, opacity = TINT
    picture = np.zeros((*mask.shape, 4), np.uint8)
    picture[mask] = (blue, green, red, opacity)  # OpenCV's order.
    return cv2.imencode(".png", picture)[1].tobytes()


def _decoded(data: bytes, row: Row, name: str) -> Picture:
    try:
        return decode_jpeg(data)
    except PhotoError as error:
        raise InputError(f"{_where(row)}: {name} is damaged ({error}); build the shard again") from None


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _where(row: Row) -> str:
    return f"shards/{row['shard']}.tar, key {row['key']}"
