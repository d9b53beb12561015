"""JPEGs that stop before their end mark: is that all they lack, or do they lack pixels?

Cameras and servers write photos without the last two bytes, which all viewers show. Pillow refuses them, and cannot be asked how
far it came: with an end mark behind it, it decodes any part of a photo, and what is missing is grey. So it is asked another way:

    photo ─┬─ end mark ────────────────▶ pixels ─┐
           ├─ some bits ─ end mark ────▶ pixels ─┼─ all the same: nothing was missing that the bits could fill
           └─ other bits ─ ... ────────▶ pixels ─┘
"""

import hashlib
import io
import re
from collections.abc import Iterator

from PIL import Image

END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = b"\xff\xda"
# Frames of each kind of JPEG but for DHT, JPG and DAC, which have numbers between theirs.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_COEFFICIENTS = 64
_MARK = re.compile(rb"\xff+([^\x00\xff])")
_WITHOUT_CONTENT = frozenset((0x01, *range(0xD0, 0xD9)))  # Restart marks, and the start of the photo.
_PADDING = 4096


def lacks_end_mark(data: bytes) -> bool:
    """Whether no end mark follows a JPEG's scans. Previews within it have their own, and so may what follows it."""
    if data.endswith(END_OF_IMAGE) or data.rfind(END_OF_IMAGE) > data.rfind(_START_OF_SCAN):
        return False
    return not any(code == END_OF_IMAGE[1] for code, _ in _segments(data))


def with_end_mark(data: bytes) -> bytes | None:
    """The same JPEG with an end mark; None if it lacks pixels, too.

    Decodes the photo some times; its size is to be checked before.

    Raises:
        Exception: whatever Pillow raises for a damaged photo.
    """
    return next((bare + END_OF_IMAGE for bare in _without_padding(data) if _has_all_pixels(bare)), None)


def _has_all_pixels(data: bytes) -> bool:
    if not _has_all_scans(data):
        return False
    first, *others = _tails()
    pixels = _decoded(data + first + END_OF_IMAGE)
    return all(_decoded(data + tail + END_OF_IMAGE) == pixels for tail in others)


def _without_padding(data: bytes) -> list[bytes]:
    """What may be the photo's own bytes, which half an end mark may follow, or the zeros of a download that stopped.

    A few zero bytes are a scan's own, more often than not: plain areas are coded by them.
    """
    bare = data.rstrip(b"\0")
    if len(data) - len(bare) < _PADDING:
        return [data.rstrip(b"\xff")]
    return [bare + bytes(zeros) for zeros in range(bare.endswith(b"\xff"), 4)]


def _tails() -> list[bytes]:
    """What could stand where data are missing: nothing, bits, other bits, and such bits after each restart mark."""
    words = [hashlib.sha512(bytes((number,))).digest().replace(b"\xff", b"\0") for number in range(4)]
    marked = [b"".join(bytes((0xFF, 0xD0 + (first + n) % 8)) + word for n in range(8)) for first, word in enumerate(words)]
    return [b"", *words[:2], *marked]


def _decoded(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return hashlib.sha256(image.tobytes()).digest()


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans bring each component's coefficients to their last bit: a progressive photo may stop between two.

    Source: ITU-T T.81, B.2.2, B.2.3 and G.1.1.1.
    """
    precise: dict[int, list[bool]] = {}
    for code, body in _segments(data):
        if code in _FRAMES and len(body) >= 6:
            precise = {component: [False] * _COEFFICIENTS for component in body[6 : 6 + 3 * body[5] : 3]}
        elif code == _START_OF_SCAN[1]:
            if len(body) < 1 or len(body) < 4 + 2 * body[0]:
                return False
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            for component in body[1 : 1 + 2 * body[0] : 2]:
                if component in precise and first <= last < _COEFFICIENTS:
                    precise[component][first : last + 1] = [bits & 15 == 0] * (last + 1 - first)
    return bool(precise) and all(all(found) for found in precise.values())


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Code and content of each segment, up to the end mark; a scan's data are passed over."""
    place = 2
    while mark := _MARK.search(data, place):
        code, place = mark[1][0], mark.end()
        if code == END_OF_IMAGE[1]:
            yield code, b""
            return
        if code not in _WITHOUT_CONTENT:
            length = int.from_bytes(data[place : place + 2], "big")
            yield code, data[place + 2 : place + length]
            place += length
