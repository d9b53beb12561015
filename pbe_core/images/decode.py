"""The one decoder: bytes of a photo -> RGB array. Every use of a photo's pixels goes through here.

    bytes ──photo_kinds──▶ accepted? ──▶ limits, from the header ──▶ end mark? ──▶ pixels ──▶ frame ──▶ RGB

Limits are checked before any pixel is decoded. Whatever the decoder raises becomes a coded `PhotoError`.
"""

import contextlib
import errno
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pbe_core.images.containers import codestream_parts, count_scans, icon_picture, lacks_end_mark, lean_png, with_end_mark
from pbe_core.images.kinds import HEAD_BYTES, ICO, JPEG, JPEG_2000, PNG, TIFF, Kind, accepted_names, kind_of

# Limits are ours and checked from the header; Pillow's own would warn first and raise only at twice the number.
Image.MAX_IMAGE_PIXELS = None
# A photo lies in one piece, however large, and so its bytes can be taken as they lie. Pillow's own limit is 16 MB, 4 megapixels.
Image.core.set_block_size(1 << 30)  # type: ignore[attr-defined]
# Pillow warns of damaged metadata, with its own path, once a process. What matters of it is told by a photo's code.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Workers decode side by side; a photo that took a thread on each CPU would slow down the others.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

MAX_PIXELS = 100_000_000
# Each scan of a JPEG costs a pass over all pixels: this bounds the time that a photo takes. Encoders write about ten; previews
# within the photo have some of their own.
MAX_JPEG_SCANS = 100
# Each packet or code block of a JPEG 2000 costs OpenJPEG about 300 bytes: this bounds the memory that a photo takes. One of 100
# megapixels has some 100,000 of them, or a million in tiles of 64 px.
MAX_CODESTREAM_PARTS = 2_000_000
_TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_REDUCED, _SUB_PICTURES, _DNG_VERSION = 254, 330, 50706  # Tags of a TIFF.
Frame = Literal["stored", "exif"]
EndMark = Literal["accept", "refuse"]
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


def decode_photo(
    photo: bytes | Image.Image, *, frame: Frame, max_pixels: int = MAX_PIXELS, missing_end_mark: EndMark = "accept"
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a photo to RGB, 0-255.

    Args:
        photo: the file's bytes; or a picture that Pillow has opened, of which only `frame` is asked.
        frame: `stored` gives the pixels as they lie in the file (Open Images' boxes are in that frame); `exif` turns them as the
            file says: its EXIF, a TIFF's tag, an AVIF's `irot` and `imir`, or XMP where there is nothing else.
        max_pixels: refuse larger photos, judged by the header.
        missing_end_mark: what becomes of a JPEG that has all its pixels and lacks only its end mark.

    Greyscale, palette and CMYK become RGB; 16-bit is scaled to 8; transparency lies over white; of an animation the first frame,
    of several pages the first, of an icon the largest picture.

    Raises:
        PhotoError: with code `not_an_image`, `unsupported_format`, `too_many_pixels`, `no_end_mark` or `decode_error`.
    """
    image = load_photo(photo, frame=frame, max_pixels=max_pixels, missing_end_mark=missing_end_mark)
    if isinstance(photo, Image.Image) and photo.mode == "I":  # Of a file these are 16 bits; here nobody knows what is white.
        raise PhotoError("decode_error", "its pixels are 32-bit numbers; convert it to 8 or 16 bits")
    with _coded():
        return _to_rgb(image)


def load_photo(
    photo: bytes | Image.Image, *, frame: Frame, max_pixels: int = MAX_PIXELS, missing_end_mark: EndMark = "accept"
) -> Image.Image:
    """A photo as a picture of Pillow in its own mode, decoded and turned: what `decode_photo` makes RGB of.

    Args and errors are those of `decode_photo`.
    """
    image = photo if isinstance(photo, Image.Image) else _open_whole(photo, max_pixels, missing_end_mark)[0]
    with _coded():
        return _turned(image, frame)


def decode_jpeg(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """What `decode_photo` makes of a JPEG that `pbe_core.sample_codec.jpeg_bytes` wrote; OpenCV takes two thirds of its time.

    Raises:
        PhotoError: by the header, as `decode_photo`; no other format is read.
    """
    _, kind = _open(io.BytesIO(data), MAX_PIXELS, header_only=True)
    options = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), options) if kind == JPEG else None
    if pixels is None:
        raise PhotoError("decode_error", f"a damaged JPEG, or no JPEG but {kind.name}")
    return pixels


def photo_size(photo: bytes | Path, *, frame: Frame, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in px of what `decode_photo` makes of a photo, by its header: a photo may be damaged further on.

    Args:
        photo: the file's bytes, or the file, of which no more than the header is read.
        frame: as in `decode_photo`.
        max_pixels: likewise.

    Two kinds are read as a whole all the same: an icon, and in frame `exif` a PNG that has no EXIF before its pixels, to look for
    it behind them.

    Raises:
        PhotoError: with code `missing` or `unreadable` (of a file), `not_an_image`, `unsupported_format`, `too_many_pixels` or
            `decode_error`.
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
    """As the extension of a file's name: jpeg, png, jp2, ..."""
    exif_orientation: int | None
    """How it is to be turned, 1 to 8 as EXIF numbers it; null where the photo does not say, or what it says cannot be read."""


def check_photo(data: bytes, *, frame: Frame, max_pixels: int = MAX_PIXELS, missing_end_mark: EndMark = "accept") -> PhotoFacts:
    """Make sure that `decode_photo` will take a photo, in half of its time: all pixels are decoded, no array is made.

    Args and errors are those of `decode_photo`.
    """
    image, kind = _open_whole(data, max_pixels, missing_end_mark)
    with _coded():
        width, height = _stored_size(image)
        # Pillow turns a TIFF while it decodes it, and does not know any more that it did.
        orientation = _orientation(image) if kind == TIFF else None
        if frame == "exif" or image.mode not in ("RGB", "L"):
            _to_rgb(_turned(image, frame))
        else:
            image.draft("L", None)  # Of a JPEG, all is decoded all the same, but colours need not be made of it.
            image.load()
    if kind != TIFF:
        try:
            orientation = _orientation(image)
        except Exception:  # Nothing that the boxes' frame depends on: there it has just been read.
            orientation = None
    known = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None
    return PhotoFacts(width, height, kind.extension, known)


def _size(file: io.BytesIO | io.BufferedReader, frame: Frame, max_pixels: int) -> tuple[int, int]:
    image, _ = _open(file, max_pixels, header_only=frame == "stored")
    with _coded():
        width, height = _stored_size(image)
        sideways = frame == "exif" and _orientation(image) in (5, 6, 7, 8)
    return (height, width) if sideways else (width, height)


def _open_whole(data: bytes, max_pixels: int, missing_end_mark: EndMark) -> tuple[Image.Image, Kind]:
    """A photo that is opened, not decoded, after all checks that need its whole file."""
    image, kind = _open(io.BytesIO(data), max_pixels)
    if kind == JPEG:
        if (scans := count_scans(data)) > MAX_JPEG_SCANS:
            raise PhotoError("decode_error", f"a JPEG of {scans:,} scans, more than {MAX_JPEG_SCANS}: it would take too long")
        if lacks_end_mark(data):
            with _coded():
                ended = with_end_mark(data)
            if ended is None:
                raise PhotoError("decode_error", "the JPEG is cut short: pixels are missing, and its end mark")
            if missing_end_mark == "refuse":
                detail = "it lacks its end mark and no pixels; source.missing_end_mark: accept takes it"
                raise PhotoError("no_end_mark", detail)
            image, _ = _open(io.BytesIO(ended), max_pixels)
    elif kind == JPEG_2000 and (parts := codestream_parts(data)) > MAX_CODESTREAM_PARTS:
        detail = f"a JPEG 2000 of {parts:,} packets and code blocks, more than {MAX_CODESTREAM_PARTS:,}: it takes too much memory"
        raise PhotoError("decode_error", detail)
    return image, kind


def _open(file: io.BytesIO | io.BufferedReader, max_pixels: int, header_only: bool = False) -> tuple[Image.Image, Kind]:
    kind = kind_of(file.read(HEAD_BYTES))
    file.seek(0)
    if not kind.is_picture:
        raise PhotoError("not_an_image", kind.name)
    if not kind.pillow:
        raise PhotoError("unsupported_format", f"{kind.name}; formats that are read: {accepted_names()}")
    pillow = kind.pillow
    if kind == ICO:
        found = icon_picture(file.read())
        if not found:
            raise PhotoError("decode_error", "an icon file without a picture")
        picture, pixels = found
        if pixels > max_pixels:  # Pillow decodes an icon when it opens it.
            raise PhotoError("too_many_pixels", f"an icon of {pixels:,} px, more than {max_pixels:,}")
        pillow = kind_of(picture).pillow
        file = io.BytesIO(picture)
    if pillow == PNG.pillow:
        file = lean_png(file, header_only)
    try:
        image = Image.open(file, formats=(pillow,))
    except MemoryError:  # The machine's trouble, not the photo's.
        raise
    except Exception as error:  # Pillow's plugins raise far more than OSError on hostile bytes.
        raise PhotoError("decode_error", _first_line(error, kind)) from None
    if image.width * image.height > max_pixels:
        raise PhotoError("too_many_pixels", f"{image.width}x{image.height} px, more than {max_pixels:,}")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        with _coded():
            _check_tiff(image, max_pixels)
    return image, kind


def _check_tiff(image: TiffImagePlugin.TiffImageFile, max_pixels: int) -> None:
    tags = image.tag_v2
    if _DNG_VERSION in tags:
        raise PhotoError("unsupported_format", "a camera's raw format (DNG); export photos from it")
    if tags.get(_REDUCED, 0) & 1 and (_SUB_PICTURES in tags or image.is_animated):
        detail = "a TIFF that begins with a small copy of another picture, as cameras' raw formats do; export photos from it"
        raise PhotoError("unsupported_format", detail)
    width, height = tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0)
    # A tile is decoded as a whole, however little of it lies in the photo.
    if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
        raise PhotoError("too_many_pixels", f"tiles of {width * height:,} px, more than {max_pixels:,}")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Whose size is already that of the photo as turned.
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def _orientation(image: Image.Image) -> object:
    """What a photo says of how it is to be turned: 1 to 8, or something else that means nothing."""
    return image.getexif().get(ExifTags.Base.Orientation)


def _turned(image: Image.Image, frame: Frame) -> Image.Image:
    """A photo decoded and brought into a frame."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow turns it while it decodes it, asked or not.
        back = _TURNED_BACK.get(_orientation(image)) if frame == "stored" else None  # type: ignore[call-overload]
        image.load()
        return image if back is None else image.transpose(back)
    if frame == "exif":
        return ImageOps.exif_transpose(image)
    image.load()
    return image


@contextlib.contextmanager
def _coded() -> Iterator[None]:
    """Whatever the decoder raises becomes a PhotoError `decode_error`, but for want of memory, which is the machine's trouble."""
    try:
        yield
    except (PhotoError, MemoryError):
        raise
    except Exception as error:  # SyntaxError, ValueError, struct.error, ...: all mean that the file is damaged.
        raise PhotoError("decode_error", _first_line(error)) from None


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit (and 32-bit holding 16) greyscale: convert("RGB") would clip at 255.
        grey = np.clip(np.asarray(image, np.int64), 0, 65535) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    # Pillow holds four bytes a pixel. `np.array` has it pack them into pieces, join these, and copies that: for 8 megapixels it
    # takes longer than decoding.
    try:
        held = pa.array(image).flatten().to_numpy().reshape(image.height, image.width, 4)
    except ValueError:  # It lies in pieces: it is a picture that was made before the size of these was set above.
        return np.array(image)
    rgb: np.ndarray = cv2.cvtColor(held, cv2.COLOR_RGBA2RGB)
    return rgb


def _first_line(error: Exception, kind: Kind | None = None) -> str:
    if kind and isinstance(error, UnidentifiedImageError):  # Which says no more than an address in memory.
        return f"a damaged {kind.name}, or a variant of it that is not read"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
