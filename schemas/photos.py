"""The one decoder: bytes of a photo -> RGB array. Every use of a photo's pixels goes through here.

Limits are checked from the header, before any pixel is decoded. Whatever the decoder raises becomes a coded `PhotoError`.
"""

import errno
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

# Limits are ours and checked from the header; Pillow's own would warn first and raise only at twice the number.
Image.MAX_IMAGE_PIXELS = None

MAX_PIXELS = 100_000_000
# A progressive JPEG may repeat a tiny scan as often as it likes, and each one costs a pass over all pixels: a megabyte of them
# takes a core ten minutes. Encoders write about ten; photos within the photo (previews) have some of their own.
MAX_JPEG_SCANS = 100
_START_OF_SCAN = b"\xff\xda"  # Within a scan's own data, 0xFF is always followed by 0.
# What photos come as. Pillow knows more (EPS would start Ghostscript on the file's own program): nothing loaded may run code.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PHOTO_ERRORS = {
    "missing": "no file at the expected path",
    "unreadable": "the file's name is too long or leads in a circle, or the file may not be read or its disk fails",
    "not_an_image": "the bytes are none of the accepted image formats",
    "too_many_pixels": "the header announces more pixels than allowed",
    "decode_error": "the pixels cannot be decoded (damaged or truncated file)",
}
Frame = Literal["stored", "exif"]
# What systems say of one file. A full disk, or too many open files, is the machine's trouble and no photo's.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_OF_ONE_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EBADMSG)


class PhotoError(Exception):
    """A photo that cannot be used. `code` is a key of `PHOTO_ERRORS`, or, for photos of a store, of `FAILURE_CODES`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type["PhotoError"], tuple[str, str]]:
        return PhotoError, (self.code, self.detail)


def file_error(error: OSError, file: Path) -> PhotoError | OSError:
    """What to raise where a file cannot be read: a PhotoError `missing` or `unreadable`; the same if the file is not to blame."""
    if error.errno in _NOT_THERE:
        return PhotoError("missing", f"{error.strerror}: {file}")
    return PhotoError("unreadable", f"{error.strerror}: {file}") if error.errno in _OF_ONE_FILE else error


def decode_photo(data: bytes, *, frame: Frame, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a photo to RGB, 0-255.

    Args:
        data: the file's bytes.
        frame: `stored` ignores EXIF orientation (Open Images' boxes are in the stored frame); `exif` turns the photo as it says.
        max_pixels: refuse larger photos, judged by the header.

    Greyscale, palette and CMYK become RGB; 16-bit is scaled to 8; transparency lies over white; of an animation the first frame.

    Raises:
        PhotoError: with code `not_an_image`, `too_many_pixels` or `decode_error`.
    """
    image = _open(io.BytesIO(data), max_pixels)
    _check_scans(image, data)
    try:
        return _to_rgb(ImageOps.exif_transpose(image) if frame == "exif" else image)
    except MemoryError:
        raise
    except Exception as error:  # SyntaxError, ValueError, struct.error, ...: all mean that the file is damaged.
        raise PhotoError("decode_error", _first_line(error)) from None


def photo_of_image(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """What `decode_photo` makes of a picture's file, in frame `exif`, of a picture that Pillow has read already.

    Raises:
        PhotoError: with code `decode_error`.
    """
    if image.mode == "I":  # Of a file these are 16 bits; here nobody knows what is white.
        raise PhotoError("decode_error", "its pixels are 32-bit numbers; convert it to 8 or 16 bits")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        raise PhotoError("decode_error", _first_line(error)) from None


def photo_size(photo: bytes | Path, *, frame: Frame, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in px of what `decode_photo` makes of a photo, by its header: a photo may be damaged further on.

    Args:
        photo: the file's bytes, or the file, of which no more than the header is read.
        frame: as in `decode_photo`.
        max_pixels: likewise.

    In frame `exif`, Pillow decodes two kinds all the same: PNG that has no EXIF before its pixels, to look for it behind them,
    and TIFF, which it turns while it decodes.

    Raises:
        PhotoError: with code `missing` or `unreadable` (of a file), `not_an_image`, `too_many_pixels` or `decode_error`.
    """
    if isinstance(photo, Path):
        try:
            with photo.open("rb") as file:
                return _size(file, frame, max_pixels)
        except OSError as error:
            raise file_error(error, photo) from None
    return _size(io.BytesIO(photo), frame, max_pixels)


@dataclass(frozen=True)
class PhotoFacts:
    """What a whole photo is like."""

    width: int
    """In px, as stored."""
    height: int
    format: str
    """As Pillow calls it, in lower case: jpeg, png, ..."""
    exif_orientation: int | None
    """1 to 8; null where the photo has none, or one that cannot be read."""


def check_photo(data: bytes, *, frame: Frame, max_pixels: int = MAX_PIXELS) -> PhotoFacts:
    """Make sure that `decode_photo` will take a photo, in half of its time: all pixels are decoded, no array is made.

    Args:
        data: the file's bytes.
        frame: as in `decode_photo`.
        max_pixels: likewise.

    Raises:
        PhotoError: with code `not_an_image`, `too_many_pixels` or `decode_error`.
    """
    image = _open(io.BytesIO(data), max_pixels)
    _check_scans(image, data)
    width, height = image.size  # Before loading: of TIFF, that turns the photo.
    try:
        if frame == "exif" or image.mode not in ("RGB", "L"):
            _to_rgb(ImageOps.exif_transpose(image) if frame == "exif" else image)
        else:
            image.draft("L", None)  # Of a JPEG, all is decoded all the same, but colours need not be made of it.
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise PhotoError("decode_error", _first_line(error)) from None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Nothing that the boxes' frame depends on: there it has just been read.
        orientation = None
    known = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None
    return PhotoFacts(width, height, str(image.format).lower(), known)


def _size(file: io.BytesIO | io.BufferedReader, frame: Frame, max_pixels: int) -> tuple[int, int]:
    image = _open(file, max_pixels)
    if frame == "stored":
        return image.size
    try:
        if image.format == "TIFF":
            return ImageOps.exif_transpose(image).size
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except MemoryError:
        raise
    except Exception as error:
        raise PhotoError("decode_error", _first_line(error)) from None
    return (image.height, image.width) if turned else image.size


def _open(file: io.BytesIO | io.BufferedReader, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except MemoryError:  # The machine's trouble, not the photo's.
        raise
    except Exception as error:  # Pillow's plugins raise far more than OSError on hostile bytes.
        raise PhotoError("not_an_image", _first_line(error)) from None
    if image.width * image.height > max_pixels:
        raise PhotoError("too_many_pixels", f"{image.width}x{image.height} px, more than {max_pixels:,}")
    return image


def _check_scans(image: Image.Image, data: bytes) -> None:
    if image.format in ("JPEG", "MPO") and (scans := data.count(_START_OF_SCAN)) > MAX_JPEG_SCANS:
        raise PhotoError("decode_error", f"a JPEG of {scans:,} scans, more than {MAX_JPEG_SCANS}: it would take too long")


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit (and 32-bit holding 16) greyscale: convert("RGB") would clip at 255.
        grey = np.clip(np.asarray(image, np.int64), 0, 65535) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _first_line(error: Exception) -> str:
    # Pillow names the object that it reads from, with its address: the same photo must give the same words each time.
    text = re.sub(r"<_io\.\w+ (object at|name=)[^>]*>", "the file", f"{type(error).__name__}: {error}")
    return text.replace("cannot identify image file the file", "no picture in any of these formats").splitlines()[0][:200]
