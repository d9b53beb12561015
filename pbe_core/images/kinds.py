"""What a file is, told by its first bytes: a picture of an accepted format, a picture of another one, or no picture.

    first bytes ──kind_of──▶ accepted: JPEG, PNG, ...   another picture: HEIC, PDF, ...   none: an HTML page, an empty file, ...

The tables below are the whole list (docs/own-data.md shows it). Nothing is decoded here, and no name or Content-Type is believed.
"""

import re
from typing import NamedTuple

HEAD_BYTES = 1024
"""How much of a file's beginning `kind_of` looks at."""


class Kind(NamedTuple):
    """What a file is."""

    name: str
    """As people call it, for messages."""
    pillow: str = ""
    """Pillow's name of an accepted format; empty for all else."""
    extension: str = ""
    """Of a file of an accepted format, without a dot."""
    media_type: str = ""
    """Likewise, as web servers call it."""
    is_picture: bool = True
    """Whether it shows something at all; `PhotoError` distinguishes `unsupported_format` and `not_an_image` by it."""


JPEG = Kind("JPEG", "JPEG", "jpeg", "image/jpeg")
PNG = Kind("PNG", "PNG", "png", "image/png")
WEBP = Kind("WebP", "WEBP", "webp", "image/webp")
AVIF = Kind("AVIF", "AVIF", "avif", "image/avif")
TIFF = Kind("TIFF", "TIFF", "tiff", "image/tiff")
JPEG_2000 = Kind("JPEG 2000", "JPEG2000", "jp2", "image/jp2")
GIF = Kind("GIF", "GIF", "gif", "image/gif")
BMP = Kind("BMP", "BMP", "bmp", "image/bmp")
PNM = Kind("PNM", "PPM", "ppm", "image/x-portable-anymap")
ICO = Kind("ICO", "ICO", "ico", "image/x-icon")
ACCEPTED = (JPEG, PNG, WEBP, AVIF, TIFF, JPEG_2000, GIF, BMP, PNM, ICO)

_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # In its container, or bare.
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
_RAW = "a camera's raw format"
_VIDEO = "video"
# Offset, bytes there, name.
_OTHER_PICTURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"%PDF-", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"8BPS", "Photoshop (PSD)"),
    (0, b"gimp xcf", "GIMP (XCF)"),
    (0, b"FUJIFILMCCD-RAW", _RAW),
    (0, b"IIRO", _RAW),
    (0, b"IIRS", _RAW),
    (0, b"MMOR", _RAW),
    (0, b"IIU\0", _RAW),
    (0, b"FOVb", _RAW),
    (0, b"\0MRM", _RAW),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "DDS"),
    (0, b"icns", "ICNS"),
    (0, b"\0\0\2\0", "a Windows cursor (CUR)"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (0, b"\x8aMNG", "MNG"),
    (0, b"\x8bJNG", "JNG"),
    (0, b"\xabKTX ", "KTX"),
    (0, b"/* XPM */", "XPM"),
    (0, b"PF\n", "PFM"),
    (0, b"Pf\n", "PFM"),
    (0, b"P7\n", "PAM"),
    (0, b"\x1aE\xdf\xa3", _VIDEO),  # WebM and Matroska.
    (0, b"\0\0\1\xba", _VIDEO),
    (0, b"\0\0\1\xb3", _VIDEO),
    (0, b"FLV\1", _VIDEO),
    (0, b"OggS", _VIDEO),
)
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` gets the file itself"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
)


def kind_of(head: bytes) -> Kind:
    """What a file is, by its first `HEAD_BYTES` bytes, or by all of them if it is shorter."""
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if head.startswith(b"RIFF") and head[8:11] == b"AVI":
        return Kind(_VIDEO)
    if head[4:8] in (b"moov", b"mdat") or (head[:1] == b"\0" and head[4:8] in (b"wide", b"free", b"skip", b"pnot")):
        return Kind(_VIDEO)  # QuickTime without a header.
    if head.startswith(b"II*\0") and head[8:10] == b"CR":  # Canon's CR2.
        return Kind(_RAW)
    for offset, mark, name in _OTHER_PICTURES:
        if head.startswith(mark, offset):
            return Kind(name)
    return _accepted(head) or _no_picture(head)


def accepted_names() -> str:
    """The accepted formats, for messages."""
    *names, last = (kind.name for kind in ACCEPTED)
    return f"{', '.join(names)} and {last}"


def _accepted(head: bytes) -> Kind | None:
    """The accepted format that a file seems to be of. Of two letters alone nothing is concluded: text may begin with them."""
    if head.startswith(b"BM"):
        return BMP if int.from_bytes(head[14:18], "little") in _BMP_HEADERS or len(head) < 18 else None
    if re.match(rb"P[1-6]\s*(#|\s\d)|P0CMYK\s|Py(P|RGBA|CMYK)\s", head):
        return PNM
    for kind, found in (
        (JPEG, head.startswith(b"\xff\xd8")),
        (PNG, head.startswith(b"\x89PNG")),
        (WEBP, head.startswith(b"RIFF") and head[8:12] == b"WEBP"),
        (GIF, head.startswith(b"GIF8")),
        (TIFF, head.startswith(_TIFF)),
        (JPEG_2000, head.startswith(_JPEG_2000)),
        (ICO, head.startswith(b"\0\0\1\0") and head[4:6] != b"\0\0"),
    ):
        if found:
            return kind
    return None


def _of_brands(head: bytes) -> Kind:
    """AVIF, HEIC and videos share a container, which begins with the list of the brands that it follows (ISO/IEC 14496-12)."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[place : place + 4] for place in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return AVIF
    if b"crx " in brands:
        return Kind(_RAW)
    return Kind("HEIC/HEIF") if brands & _HEIF_BRANDS else Kind(_VIDEO)


def _no_picture(head: bytes) -> Kind:
    """What else it is; of a vector drawing, a picture all the same."""
    if not head.strip(b"\0"):
        return Kind("zero bytes alone" if head else "an empty file", is_picture=False)
    for mark, name in _OTHER_FILES:
        if head.startswith(mark):
            return Kind(name, is_picture=False)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text.startswith(b"<"):
        return Kind("no picture in any known format", is_picture=False)
    if re.search(rb"<(!doctype )?(html|head|body)", text):
        return Kind("an HTML page", is_picture=False)
    return Kind("SVG") if b"<svg" in text else Kind("an XML document", is_picture=False)
