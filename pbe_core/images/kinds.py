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
_OTHER_PICTURES: dict[str, tuple[bytes, ...]] = {
    _RAW: (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM"),
    # WebM and Matroska, MPEG, Flash, Ogg.
    _VIDEO: (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1", b"OggS"),
    "JPEG-LS": (b"\xff\xd8\xff\xf7",),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG XR": (b"II\xbc",),
    "PDF": (b"%PDF-",),
    "PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "Photoshop (PSD)": (b"8BPS",),
    "GIMP (XCF)": (b"gimp xcf",),
    "QOI": (b"qoif",),
    "DDS": (b"DDS ",),
    "ICNS": (b"icns",),
    "a Windows cursor (CUR)": (b"\0\0\2\0",),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
    "Radiance HDR": (b"#?RADIANCE", b"#?RGBE"),
    "FITS": (b"SIMPLE  =",),
    "SGI": (b"\x01\xda",),
    "Sun raster": (b"\x59\xa6\x6a\x95",),
    "a Windows metafile (WMF)": (b"\xd7\xcd\xc6\x9a",),
    "DjVu": (b"AT&TFORM",),
    "BPG": (b"BPG\xfb",),
    "FLIF": (b"FLIF",),
    "MNG": (b"\x8aMNG",),
    "JNG": (b"\x8bJNG",),
    "KTX": (b"\xabKTX ",),
    "XPM": (b"/* XPM */",),
    "PFM": (b"PF\n", b"Pf\n"),
    "PAM": (b"P7\n",),
}
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
    if head.startswith(b"DICM", 128):
        return Kind("DICOM")
    for name, marks in _OTHER_PICTURES.items():
        if head.startswith(marks):
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
