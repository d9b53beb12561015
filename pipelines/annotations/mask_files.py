"""Object masks that lie in files of their own: found by name when boxes are selected, read when their samples are packed.

    train-masks-6.zip: 677c….png ──┐
    masks/train/677c….png        ──┴─ MaskFiles: names alone ──▶ place, a text ──read_mask──▶ which pixels are the object's

Data sets have millions of masks, so none is decoded before a sample needs it: a table's `segmentation` then holds the place of a
PNG instead of run lengths. It begins with `png:`, which no run lengths do, and a list in JSON follows: the folder that it counts
from (`annotations`, `above`, which holds that one, or `photos`), the path below it, and for a member of a zip its name, where its
entry begins, and its packed bytes. So packing needs no list of a zip's members, 80 MB for each of Open Images' zips.

A zip's format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, section 4.3.7.
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64, UInt64
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.decode import MAX_PIXELS, PhotoError, load_photo
from pbe_core.images.kinds import HEAD_BYTES, PNG, kind_of
from pbe_core.randomness import hash_column, mix, name_hash
from pipelines.config import SourceSettings

PREFIX = "png:"
# A mask of 100 megapixels with one bit each has 12 MB unpacked.
MAX_FILE_BYTES = 64 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"
_STORED, _DEFLATED, _ENCRYPTED = 0, 8, 1


class MaskError(Exception):
    """A mask that cannot be used; says why, in words."""


# Finding.


@dataclass(frozen=True)
class MaskFiles:
    """All PNGs of some zips and folders, known by hashes of their base names: 32 bytes each."""

    root: Path
    """The folder of the annotations, from which places count."""
    containers: tuple[tuple[str, str], ...]
    """Zips and folders: the folder that each counts from, and its path below that."""
    _hashes: UInt64[np.ndarray, " masks"]  # Sorted.
    _container: Int64[np.ndarray, " masks"]
    _offset: Int64[np.ndarray, " masks"]  # Of the entry in its zip; -1 in a folder.
    _length: Int64[np.ndarray, " masks"]

    @classmethod
    def of(cls, root: Path, containers: Sequence[Path]) -> "MaskFiles":
        """Look through zips and folders; of two PNGs of one name, that of the first of them counts.

        Raises:
            InputError: a file is no zip, or is cut off.
        """
        parts = [(np.zeros(0, np.uint64), np.zeros((3, 0), np.int64))]
        for number, path in enumerate(containers):
            names, places = _in_zip(path) if path.is_file() else _in_folder(path)
            parts.append((hash_names(names), np.stack([np.full(len(names), number), *places])))
        hashes = np.concatenate([part for part, _ in parts])
        container, offset, length = np.concatenate([part for _, part in parts], axis=1)
        order = np.lexsort((offset, container, hashes))
        order = order[np.r_[True, np.diff(hashes[order]) > 0][: len(order)]]
        below = tuple(_below(root, path) for path in containers)
        return cls(root, below, hashes[order], container[order], offset[order], length[order])

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, names: Sequence[str | None]) -> list[str | None]:
        """The place of each PNG by its base name; null where it is not there."""
        wanted = hash_names(names)
        if not len(self):
            return [None] * len(names)
        rows = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        found = self._hashes[rows] == wanted
        return [
            self._place(int(row), name) if there and name is not None else None
            for row, there, name in zip(rows.tolist(), found.tolist(), names, strict=True)
        ]

    def _place(self, row: int, name: str) -> str:
        root, container = self.containers[self._container[row]]
        offset, length = int(self._offset[row]), int(self._length[row])
        if offset < 0:
            return place_of(root, f"{container}/{name}".removeprefix("./"))
        return place_of(root, container, name, offset, length)

    def digest(self) -> str:
        """A hash of the names that are there and of where they lie, whatever their order."""
        names = np.array([*(name_hash("container", *place) for place in self.containers), 0], np.uint64)
        mixed = self._hashes
        for part in (names[self._container], self._offset.astype(np.uint64), self._length.astype(np.uint64)):
            mixed = mix(mixed ^ part)
        return f"{len(self)} {int(np.bitwise_xor.reduce(mixed, initial=0)):016x}"


def hash_names(names: Sequence[str | None]) -> UInt64[np.ndarray, " names"]:
    """What PNGs are known by."""
    return hash_column(pa.array(names, pa.string()), "mask file")


def place_of(root: str, path: str, *member: str | int) -> str:
    """A place as tables hold it: folder that it counts from, path below it; of a zip's member its name, start and length."""
    return PREFIX + json.dumps([root, path, *member], separators=(",", ":"))


def is_place(segmentation: str | None) -> bool:
    """Whether a table's `segmentation` is the place of a PNG, and no run lengths."""
    return segmentation is not None and segmentation.startswith(PREFIX)


def _below(root: Path, path: Path) -> tuple[str, str]:
    if path.is_relative_to(root):
        return "annotations", path.relative_to(root).as_posix()
    return "above", path.relative_to(root.parent).as_posix()


def _in_zip(path: Path) -> tuple[list[str], Int64[np.ndarray, "2 masks"]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [
                (os.path.basename(entry.filename), entry.header_offset, entry.compress_size)
                for entry in archive.infolist()
                if _is_png(entry.filename) and entry.compress_type in (_STORED, _DEFLATED) and not entry.flag_bits & _ENCRYPTED
            ]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: no zip that can be read, or cut off ({error}); get it again") from None
    return [name for name, *_ in entries], np.array([places for _, *places in entries], np.int64).reshape(-1, 2).T


def _in_folder(path: Path) -> tuple[list[str], Int64[np.ndarray, "2 masks"]]:
    with os.scandir(path) as found:
        names = sorted(entry.name for entry in found if _is_png(entry.name))
    return names, np.stack([np.full(len(names), -1), np.zeros(len(names), np.int64)])


def _is_png(name: str) -> bool:
    return name.casefold().endswith(".png")


# Reading.


def read_mask(place: str, source: SourceSettings) -> Bool[np.ndarray, "height width"]:
    """The object's pixels in a mask's PNG, at the PNG's own size.

    Args:
        place: as a table's `segmentation` holds it.
        source: where annotations and photos are, and the most px of a picture that is decoded.

    Raises:
        MaskError: the file is not there, is not what it was, or is no PNG that can be read.
    """
    return mask_pixels(read_place(place, source.annotations, source.photos), source.max_photo_pixels)


def read_place(place: str, annotations: Path, photos: Path) -> bytes:
    """The bytes of a PNG by its place.

    Args:
        place: as a table's `segmentation` holds it.
        annotations: the source's folder or file of annotations.
        photos: its photo folder.

    Raises:
        MaskError: it is not there, or is not what it was.
    """
    root, path, *member = json.loads(place.removeprefix(PREFIX))
    tables = annotations if annotations.is_dir() else annotations.parent
    folder = {"photos": photos, "annotations": tables, "above": tables.parent}[root]
    if ".." in path.split("/") or path.startswith("/"):
        raise MaskError(f"{path} leads out of {folder}")
    return read_file(folder / path) if not member else _read_member(folder / path, *member)


def read_file(path: Path) -> bytes:
    """A mask's file. Raises `MaskError`: it is not there, cannot be read, or is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MaskError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > MAX_FILE_BYTES:
        raise MaskError(f"{path} has more than {MAX_FILE_BYTES:,} bytes")
    return data


def _read_member(path: Path, name: str, offset: int, length: int) -> bytes:
    where = f"{name} in {path}"
    if length > MAX_FILE_BYTES:
        raise MaskError(f"{where} has more than {MAX_FILE_BYTES:,} bytes")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            head = file.read(_LOCAL_HEADER.size)
            if len(head) < _LOCAL_HEADER.size or head[:4] != _SIGNATURE:
                raise MaskError(f"{where}: not there any more; was the zip replaced? plan anew")
            *_, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(head)
            stored = file.read(name_length).decode("utf-8", "replace")
            file.seek(extra_length, os.SEEK_CUR)
            data = file.read(length)
    except OSError as error:
        raise MaskError(f"{path} cannot be read ({error.strerror})") from None
    if os.path.basename(stored) != name:
        raise MaskError(f"{where}: {stored} lies there now; was the zip replaced? plan anew")
    if method == _STORED:
        return data
    try:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        data = unpacker.decompress(data, MAX_FILE_BYTES)
    except zlib.error as error:
        raise MaskError(f"{where} is damaged ({error})") from None
    if unpacker.unconsumed_tail:
        raise MaskError(f"{where} has more than {MAX_FILE_BYTES:,} bytes")
    return data


def mask_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> Bool[np.ndarray, "height width"]:
    """Which pixels of a PNG are the object's: those that are not black or, where some are transparent, those that are not.

    Of a palette, those that are not its colour 0. A PNG's own orientation (EXIF) does not count.

    Raises:
        MaskError: it is no PNG, is damaged, or has too many pixels.
    """
    image = _open_png(data, max_pixels)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() == 0:
            shown: np.ndarray = alpha > 0
            return shown
        image = image.convert("RGB")
    pixels = np.atleast_3d(np.asarray(image))  # Of a palette, its numbers.
    mask: np.ndarray = np.any(pixels, axis=2)
    return mask


def segment_ids(data: bytes, max_pixels: int = MAX_PIXELS) -> Int32[np.ndarray, "height width"]:
    """The number of each pixel's segment in a panoptic PNG, R + 256 G + 65536 B.

    Raises:
        MaskError: it is no PNG of RGB, is damaged, or has too many pixels.
    Source: https://cocodataset.org/#format-data, panoptic segmentation.
    """
    image = _open_png(data, max_pixels)
    if image.mode not in ("RGB", "RGBA"):
        raise MaskError(f"its pixels are {image.mode}, expected RGB: numbers of segments are R + 256 G + 65536 B")
    red, green, blue = (np.asarray(image)[..., place].astype(np.int32) for place in range(3))
    ids: np.ndarray = red + (green << 8) + (blue << 16)
    return ids


def _open_png(data: bytes, max_pixels: int) -> Image.Image:
    kind = kind_of(data[:HEAD_BYTES])
    if kind != PNG:
        raise MaskError(f"it is no PNG but {kind.name}")
    try:
        return load_photo(data, frame="stored", max_pixels=max_pixels)
    except PhotoError as error:
        raise MaskError(error.detail) from None
