"""A folder of real photos, which painted pictures are compared with as a set: in the published test, COCO's test2017."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_train.evaluation.pair_sets import file_hashes

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class RealPhotos:
    """Photos of a folder, sorted by name; with `size`, each as its central square of that side.

    `fingerprint` is a hash of their names and contents.
    """

    folder: Path
    names: tuple[str, ...]
    size: int | None
    fingerprint: str

    def read(self, number: int) -> AnyPhoto:
        """A photo.

        Raises:
            InputError: it cannot be decoded.
        """
        path = self.folder / self.names[number]
        try:
            photo = decode_photo(path.read_bytes(), frame="exif")
        except PhotoError as error:
            raise InputError(f"{path}: {error}; remove it from the real photos, or mend it") from None
        return photo if self.size is None else central_square(photo, self.size)

    @property
    def recipe(self) -> str:
        """What decides which pixels are compared, for people."""
        cut = "as they are" if self.size is None else f"short side to {self.size} px (Pillow, bilinear), central square"
        return f"{len(self.names)} photos {self.fingerprint[:12]}, {cut}"


def open_real_photos(folder: Path, size: int | None) -> RealPhotos:
    """The photos of a folder and of those in it.

    Args:
        folder: with photos.
        size: side of the squares that are compared with, in px, as in the published test; null: photos as they are.

    Raises:
        InputError: no photos there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of real photos")
    # Names that begin with a dot are those of programs: thumbnails, and what copies leave behind.
    inside = (path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    paths = sorted(path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < 2:
        raise InputError(f"{folder}: {len(paths)} photos there; a set needs two at least, better thousands")
    names = tuple(str(path.relative_to(folder)) for path in paths)
    hashes = file_hashes(paths, "hashing the real photos")
    lines = "\n".join(f"{name} {found}" for name, found in zip(names, hashes, strict=True))
    return RealPhotos(folder, names, size, hashlib.sha256(lines.encode()).hexdigest())


def central_square(photo: AnyPhoto, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The central square of a photo whose short side is brought to `size` px.

    Source: the published test's `create_square_gt_for_fid.py`, whose resizing is Pillow's bilinear one.
    """
    height, width = photo.shape[:2]
    short = min(height, width)
    # Whole numbers as torchvision rounds them: down for the long side, to the nearest, halves to even, for the corner.
    resized = Image.fromarray(photo).resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
