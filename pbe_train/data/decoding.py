"""Members of a sample -> what one training item needs of them, without the detours of the general decoders.

    latent.npy, masked.npy ──header compared──▶ a view of the bytes        (np.load parses the header as Python, and copies)
    mask.png ──inflate──▶ 1 bit a px ──the one mask that is used──▶ bool   (a PNG decoder makes 8 bits of all K masks)
    ref.jpg ──OpenCV──▶ RGB                                                (Pillow's bytes go through two more copies)
    json ──its one field──▶ bool                                           (the layout's record would check all of them)

Each function looks first whether the bytes are written as the pipeline writes them, and otherwise leaves them to the decoder of
`schemas`; results and errors are the same either way. Nothing here checks whether the bytes are those that were written: the
reader compares their CRC-32 before.
"""

import functools
import json
import math
import struct
import zlib

import cv2
import numpy as np
from jaxtyping import Bool, Float16, UInt8

from pbe_core.images.decode import MAX_PIXELS, decode_photo
from pbe_core.images.rle import decode_pixels
from pbe_core.sample_codec import decode_array, decode_masks, encode_array

# In float16 the exponent of infinities and NaN is all ones; the sign bit alone is -0.
_EXPONENT, _SIGN = np.uint16(0x7C00), np.uint16(0x8000)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Markers of a JPEG's segments, and how many colours it has. The tables are of Huffman codes, quantisation, restarts.
_BASELINE, _START_OF_SCAN, _JFIF, _TABLES, _COLOURS = 0xC0, 0xDA, 0xE0, (0xC4, 0xDB, 0xDD), 3


def decode_latents(data: bytes, shape: tuple[int, ...]) -> Float16[np.ndarray, "..."]:
    """The float16 array of this shape in the bytes of a `.npy` file; read-only.

    Raises:
        ValueError: no `.npy` file, or another shape or type.
    """
    header = _npy_header(shape)
    if data.startswith(header) and len(data) == len(header) + 2 * math.prod(shape):
        return np.frombuffer(data, np.float16, offset=len(header)).reshape(shape)
    array = decode_array(data)
    if array.dtype != np.float16 or array.shape != shape:
        raise ValueError(f"an array is {array.dtype} {list(array.shape)}, dataset.json asks for float16 {list(shape)}")
    return np.ascontiguousarray(array)


def latents_problem(posteriors: Float16[np.ndarray, "... two_channels height width"]) -> str | None:
    """What no VAE posterior (means, then standard deviations) can hold, as a sentence; None if all is well.

    The same as `schemas.sample.find_problem` says of latents, on the bits: numpy compares float16 one number at a time.
    """
    bits = posteriors.view(np.uint16)
    if ((bits & _EXPONENT) == _EXPONENT).any():
        return "a latent is not finite"
    if (bits[..., bits.shape[-3] // 2 :, :, :] > _SIGN).any():
        return "a standard deviation is negative"
    return None


def decode_mask(data: bytes, count: int, size: int, kind: int) -> Bool[np.ndarray, "size size"]:
    """Mask number `kind` of the K in the bytes of `mask.png`; True = editable region.

    Args:
        data: the PNG.
        count: K.
        size: side of a mask in px.
        kind: which one, 0..K-1.

    Raises:
        ValueError: no PNG, not K masks of this size, or one of them is empty.
    """
    rows = _bilevel_rows(data, count, size)
    if rows is not None:
        if not rows.any(axis=(1, 2)).all():
            raise ValueError("a mask is empty")
        unpacked: np.ndarray = np.unpackbits(rows[kind], axis=1).view(np.bool_)
        return unpacked
    masks = decode_masks(data)
    if masks.shape != (count, size, size):
        raise ValueError(f"masks are {list(masks.shape)}, which does not fit dataset.json")
    if not masks.any(axis=(1, 2)).all():
        raise ValueError("a mask is empty")
    one: np.ndarray = masks[kind]
    return one


def decode_reference(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB pixels, 0-255, of `ref.jpg`.

    Raises:
        PhotoError: it is no picture, or a damaged one.
    """
    if _is_plain_jpeg(data):
        pixels: np.ndarray | None = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        if pixels is not None:
            return pixels
    return decode_photo(data, frame="stored")


def decode_outline(data: bytes, height: int, width: int) -> Bool[np.ndarray, "{height} {width}"] | None:
    """Which pixels of the reference are the object's, of the bytes of `json`; None where that is not known.

    Args:
        data: the JSON.
        height: of the reference, px.
        width: as well.

    Raises:
        ValueError: no JSON object with that field, or the outline is not the reference's.
    """
    record = json.loads(data)
    if not isinstance(record, dict) or "reference_mask" not in record:
        raise ValueError("json has no field reference_mask")
    counts = record["reference_mask"]
    if counts is None:
        return None
    if not isinstance(counts, str):
        raise ValueError(f"reference_mask is no text but {type(counts).__name__}")
    try:
        return decode_pixels(counts, height, width)
    except ValueError as error:
        raise ValueError(f"reference_mask {error}") from None


@functools.lru_cache
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers of a float16 array of this shape."""
    return encode_array(np.zeros(shape, np.float16))[: -2 * math.prod(shape)]


def _bilevel_rows(data: bytes, count: int, size: int) -> UInt8[np.ndarray, "count size bytes"] | None:
    """The bits of K square masks, 8 px a byte; None where the PNG is not 1 bit deep, unfiltered and of this size."""
    header = struct.pack(">II5B", size, count * size, 1, 0, 0, 0, 0)
    if size % 8 or not data.startswith(_PNG_SIGNATURE + struct.pack(">I", len(header)) + b"IHDR" + header):
        return None
    place, compressed = len(_PNG_SIGNATURE), []
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IDAT":
            compressed.append(data[place + 8 : place + 8 + length])
        elif kind not in (b"IHDR", b"IEND"):
            return None
        place += 12 + length
    expected = count * size * (1 + size // 8)
    try:
        inflated = zlib.decompressobj().decompress(b"".join(compressed), expected + 1)
    except zlib.error:
        return None
    if len(inflated) != expected:
        return None
    rows = np.frombuffer(inflated, np.uint8).reshape(count, size, 1 + size // 8)
    # The first byte of each row is its filter; 0 is none.
    return None if rows[:, :, 0].any() else rows[:, :, 1:]


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a baseline JPEG with JFIF's colours in one scan: what OpenCV writes, and what every decoder reads alike."""
    if data[:2] != b"\xff\xd8":
        return False
    place, jfif, pixels = 2, False, 0
    while place + 10 <= len(data):
        mark, marker, length = struct.unpack_from(">BBH", data, place)
        if mark != 0xFF:
            return False
        if marker == _JFIF:
            jfif = True
        elif marker == _BASELINE:
            height, width, colours = struct.unpack_from(">HHB", data, place + 5)
            pixels = height * width if colours == _COLOURS else 0
        elif marker == _START_OF_SCAN:
            return jfif and 0 < pixels <= MAX_PIXELS and data[place + 4] == _COLOURS
        elif marker not in _TABLES:
            return False
        place += 2 + length
    return False
