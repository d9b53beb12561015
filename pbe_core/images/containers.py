"""Files of formats that hold more than pixels, made ready for Pillow: what is not needed is left out, what is too much is found.

    PNG ──lean_png──▶ the same pixels without texts and colour profile, which are packed and may be long
    ICO ──icon_picture──▶ its largest picture alone: Pillow decodes an icon before one can ask how large it is
    JPEG 2000 ──codestream_parts──▶ how much memory its decoder will take for tables, which Pillow does not bound
    JPEG ──with_end_mark──▶ the same with its end mark, if that is all it lacks

Cameras and servers write JPEGs without the last two bytes, which all viewers show. Pillow refuses them, and does not say how far
it came: with an end mark behind it, it decodes any part of a photo, and what is missing is grey. So several ends are tried:

    photo ─┬─ end mark ────────────────▶ pixels ─┐
           ├─ some bits ─ end mark ────▶ pixels ─┼─ all the same: nothing was missing that the bits could fill
           └─ other bits ─ ... ────────▶ pixels ─┘

Pure functions of bytes. Each takes damaged files too: what is wrong with those is left for Pillow to say.
"""

import hashlib
import io
import re
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

# Of a text that may say how a photo is turned, and of a colour profile, those of printers have about 2 MB. Pillow's own is 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# The texts in which Pillow looks for an orientation.
_ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_ICON_ENTRY = struct.Struct("<4B2H2I")
END_OF_IMAGE = b"\xff\xd9"
START_OF_SCAN = b"\xff\xda"
"""Within a scan's own data, 0xFF is always followed by 0."""
# Frames of each kind of JPEG but for DHT, JPG and DAC, which have numbers between theirs.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_COEFFICIENTS = 64
_MARK = re.compile(rb"\xff+([^\x00\xff])")
_WITHOUT_CONTENT = frozenset((0x01, *range(0xD0, 0xD9)))  # Restart marks, and the start of the photo.
_PADDING = 4096


def lean_png(file: io.BytesIO | io.BufferedReader, header_only: bool = False) -> io.BytesIO:
    """A PNG without its colour profile and texts, but for those that may say how it is turned: one of each keyword.

    Args:
        file: the PNG, read from its beginning.
        header_only: stop where the pixels begin.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    lean = io.BytesIO()
    lean.write(file.read(len(_PNG_SIGNATURE)))
    wanted = set(_ORIENTATION_TEXTS)
    while len(head := file.read(8)) == 8 and not (header_only and head[4:] == b"IDAT"):
        # With the checksum. A length that lies must not allocate what it says.
        body = file.read(min(int.from_bytes(head[:4], "big") + 4, size - file.tell()))
        keyword = body[:80].partition(b"\0")[0]
        if head[4:] == b"iCCP" or (head[4:] in _PNG_TEXTS and keyword not in wanted):
            continue
        wanted.discard(keyword)
        lean.write(head + body)
        if head[4:] == b"IEND":
            break
    else:
        lean.write(head)
    lean.seek(0)
    return lean


def icon_picture(data: bytes) -> tuple[bytes, int] | None:
    """The largest picture of an icon file, of several as large the one with the most bits.

    Returns:
        The picture, a PNG or an icon file that holds nothing else, and how many px its header announces; None if there is none,
        or one lies beyond the file's end.
    """
    best = None
    for number in range(int.from_bytes(data[4:6], "little")):
        entry = data[6 + 16 * number : 22 + 16 * number]
        if len(entry) < 16:
            return None
        *_, bits, length, offset = _ICON_ENTRY.unpack(entry)
        header = data[offset : offset + 24]
        if len(header) < 24:
            return None
        is_png = header.startswith(_PNG_SIGNATURE)
        if is_png:
            width, height = struct.unpack(">2I", header[16:24])
        else:  # A bitmap without a file's header, and below its rows as many again of a mask.
            width, height = (abs(side) for side in struct.unpack("<2i", header[4:12]))
            height //= 2
            bits = int.from_bytes(header[14:16], "little")
        if best is None or (width * height, bits) > best[:2]:
            best = width * height, bits, is_png, entry, data[offset : offset + length]
    if best is None:
        return None
    pixels, _, is_png, entry, picture = best
    if is_png:
        return picture, pixels
    return b"\0\0\1\0\1\0" + entry[:12] + (22).to_bytes(4, "little") + picture, pixels


def codestream_parts(data: bytes) -> int:
    """How many packets and code blocks a JPEG 2000's headers ask its decoder to keep tables for; 0 if they cannot be read.

    Each costs OpenJPEG some hundred bytes before the first pixel is read, so that their number is checked first.

    Source: ISO/IEC 15444-1, annexes A.4 to A.6, B.6, B.7 and I.4.
    """
    size: tuple[int, ...] = ()
    most = 0
    try:
        for mark, body in _codestream_segments(data, _codestream_start(data) + 2):
            if mark == 0x51:  # Size.
                size = struct.unpack_from(">2x8IH", body)
            elif mark == 0x52 and size:  # How it is coded.
                layers = int.from_bytes(body[2:4], "big")
                most = max(most, _parts(size, body[5:], bool(body[0] & 1), layers))
            elif mark == 0x53 and size:  # How one component is coded otherwise.
                style = body[1:] if size[8] < 257 else body[2:]
                most = max(most, _parts(size, style[1:], bool(style[0] & 1), layers))
    except (IndexError, struct.error, UnboundLocalError, ZeroDivisionError):
        return 0
    return most


def _codestream_start(data: bytes) -> int:
    """Where the codestream begins: at the file's beginning, or in the first box `jp2c` of its container."""
    place = 0
    while data[place : place + 2] != b"\xff\x4f":
        length, name = struct.unpack_from(">I4s", data, place)
        content = place + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, content)
            content += 8
        if name == b"jp2c":
            return content
        place += max(length, 8)
    return place


def _codestream_segments(data: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """Mark and content of each segment in the main header and in those of the tile-parts."""
    next_part = 0
    while len(head := data[place : place + 4]) == 4 and head[0] == 0xFF and head[1] != 0xD9:
        if head[1] == 0x93:  # Here begin a tile-part's data.
            if next_part <= place:
                return
            place = next_part
            continue
        length = int.from_bytes(head[2:], "big")
        body = data[place + 4 : place + 2 + length]
        if head[1] == 0x90:  # A tile-part; of 0 bytes: up to the end.
            next_part = place + int.from_bytes(body[2:6], "big")
        yield head[1], body
        place += 2 + length


def _parts(size: tuple[int, ...], style: bytes, own_precincts: bool, layers: int) -> int:
    """Packets and code blocks of a codestream all of whose tiles and components are coded in this style."""
    right, bottom, left, top, tile_width, tile_height, _, _, components = size
    width, height = max(right - left, 0), max(bottom - top, 0)
    tiles = -(-width // tile_width) * -(-height // tile_height)
    levels, block_width, block_height = min(style[0], 32), (style[1] & 15) + 2, (style[2] & 15) + 2
    found = 0
    for level in range(levels + 1):
        precinct = style[5 + level] if own_precincts else 0xFF
        wide, high = precinct & 15, precinct >> 4
        # A code block lies in one precinct of one of the level's bands, which have half of its sides.
        smaller = level > 0
        block = min(block_width, max(wide - smaller, 0)), min(block_height, max(high - smaller, 0))
        shrunk = levels - level
        level_width, level_height = min(tile_width, width) >> shrunk, min(tile_height, height) >> shrunk
        packets = ((level_width >> wide) + 1) * ((level_height >> high) + 1) * layers
        found += packets + ((level_width >> block[0]) + 1) * ((level_height >> block[1]) + 1)
    return found * tiles * components


def count_scans(data: bytes) -> int:
    """How many scans a JPEG may have: those of previews within it are counted, too."""
    codes = np.frombuffer(data, np.uint8)
    # `data.count` takes eight times as long.
    return int(np.count_nonzero((codes[:-1] == START_OF_SCAN[0]) & (codes[1:] == START_OF_SCAN[1])))


def lacks_end_mark(data: bytes) -> bool:
    """Whether no end mark follows a JPEG's scans. Previews within it have their own, and so may what follows it."""
    if data.endswith(END_OF_IMAGE) or data.rfind(END_OF_IMAGE) > data.rfind(START_OF_SCAN):
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
        elif code == START_OF_SCAN[1]:
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
