"""Label Studio's brush masks: packed runs of an RGBA picture's bytes, of which alpha says where the brush was.

Format: https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack. A stream of bits, from the highest of each byte down:

    32 bits      how many values there are: width * height * 4
    5 bits       bits of a value, less 1
    4 x 4 bits   four sizes of run lengths, in bits, less 1
    then runs    1 bit: a run of one value, or single ones; 2 bits: which size; so many bits: length, less 1; the value, or values
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from pipelines.annotations.coco_file import MAX_MASKED_PHOTO

_BITS_OF_VALUE = 8


def unpack_brush(packed: Any, width: int, height: int) -> Bool[np.ndarray, "height width"]:
    """Where the brush was, in a photo of `width` x `height` px.

    Args:
        packed: bytes as Label Studio writes them, 0 to 255.
        width: of the photo.
        height: of the photo.

    Raises:
        ValueError: these are no such bytes, are cut off, or are of another size; with what is wrong, in words.
    """
    if not isinstance(packed, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in packed):
        raise ValueError("has an `rle` that is no list of bytes")
    if not 0 < width * height <= MAX_MASKED_PHOTO:
        raise ValueError(f"is of a photo of {width}x{height} px, more than {MAX_MASKED_PHOTO:,}")
    bits = _Bits(np.unpackbits(np.array(packed, np.uint8)))
    values, size = bits.read(32), bits.read(5) + 1
    if values != width * height * 4 or size != _BITS_OF_VALUE:
        raise ValueError(f"has an `rle` of {values:,} values of {size} bits, the photo {width}x{height} x 4 of 8")
    lengths = [bits.read(4) + 1 for _ in range(4)]
    pixels = np.zeros(values, np.uint8)
    place = 0
    while place < values:
        one_value = bits.read(1)
        end = place + 1 + bits.read(lengths[bits.read(2)])
        if end > values:
            raise ValueError("has an `rle` whose runs are longer than the photo")
        pixels[place:end] = bits.read(size) if one_value else bits.read_bytes(end - place)
        place = end
    return pixels.reshape(height, width, 4)[..., 3] > 0


class _Bits:
    """A stream of bits."""

    def __init__(self, bits: UInt8[np.ndarray, " bits"]) -> None:
        self._bits, self._place = bits, 0

    def read(self, count: int) -> int:
        """A number of `count` bits."""
        number = 0
        for bit in self._take(count).tolist():
            number = number << 1 | bit
        return number

    def read_bytes(self, count: int) -> UInt8[np.ndarray, " count"]:
        return np.packbits(self._take(8 * count))

    def _take(self, count: int) -> UInt8[np.ndarray, " bits"]:
        if self._place + count > len(self._bits):
            raise ValueError("has an `rle` that is cut off")
        self._place += count
        return self._bits[self._place - count : self._place]
