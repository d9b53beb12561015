import io

import pytest
from PIL import Image

from pbe_core.images.decode import PhotoError, check_photo, decode_photo, photo_size
from pbe_core.images.kinds import ACCEPTED, HEAD_BYTES, kind_of
from pbe_core.settings import REPOSITORY


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


OTHER_PICTURES = {
    "HEIC": box(b"ftyp", b"heic\0\0\0\0mif1heic"),
    "HEIF": box(b"ftyp", b"mif1\0\0\0\0mif1heix"),
    "raw format": box(b"ftyp", b"crx \0\0\0\1crx isom"),
    "raw format, Canon": b"II*\0\x10\0\0\0CR\2\0",
    "raw format, Fuji": b"FUJIFILMCCD-RAW 0201",
    "raw format, Panasonic": b"IIU\0\x18\0\0\0",
    "video": box(b"ftyp", b"isom\0\0\2\0isomavc1mp41"),
    "video, without a header": box(b"wide", b"") + box(b"mdat", bytes(9)),
    "video, AVI": b"RIFF\x24\0\0\0AVI LIST",
    "video, WebM": b"\x1aE\xdf\xa3\1\0\0\0",
    "JPEG XL": b"\xff\x0a\xfa\x1f",
    "JPEG XL, in its container": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG XR": b"II\xbc\1\x20\0\0\0",
    "JPEG-LS": b"\xff\xd8\xff\xf7\0\x0b",
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "Photoshop": b"8BPS\0\1",
    "SVG": b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "SVG, alone": b"\xef\xbb\xbf<svg viewBox='0 0 9 9'></svg>",
    "QOI": b"qoif\0\0\0\1",
    "DICOM": bytes(128) + b"DICM",
    "OpenEXR": b"\x76\x2f\x31\x01",
}
NO_PICTURES = {
    "an HTML page": b"\n<!DOCTYPE html>\n<html><svg></svg></html>",
    "an HTML page, without a type": b"<html lang='en'><head>",
    "an XML document": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "an empty file": b"",
    "zero bytes alone": bytes(5000),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a ZIP archive": b"PK\3\4",
    "no picture in any known format": b'{"error": "not found"}',
    "no picture in any known format, but text": b"BMW, P1 is great, GIF is said so, PNG likewise: free of charge",
    "no picture in any known format, but P1": b"P1 is great",
    "no picture in any known format, but free": b"Get free photos",
}


@pytest.mark.parametrize("name", [*OTHER_PICTURES, *NO_PICTURES])
def test_what_is_not_read_is_called_by_its_name(name, tmp_path):
    path, data = tmp_path / "photo.jpg", (OTHER_PICTURES | NO_PICTURES)[name]
    path.write_bytes(data)
    called = name.partition(",")[0]
    unsupported = f"unsupported_format: .*{called}.*; formats that are read: JPEG, PNG"
    message = unsupported if name in OTHER_PICTURES else f"not_an_image: {called}"
    for decode in (decode_photo, check_photo, photo_size):
        with pytest.raises(PhotoError, match=message):
            decode(data, frame="stored")
    with pytest.raises(PhotoError, match=message):
        photo_size(path, frame="exif")


@pytest.mark.parametrize("kind", ACCEPTED, ids=[kind.name for kind in ACCEPTED])
def test_a_damaged_photo_is_a_photo_that_is_damaged(kind):
    """Of an accepted format, and broken behind the bytes that say so: not "no image"."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(
        file, kind.pillow, **({"sizes": [(64, 64)]} if kind.name == "ICO" else {})
    )
    data = file.getvalue()
    assert kind_of(data[:HEAD_BYTES]) == kind
    assert check_photo(data, frame="stored").format == kind.extension
    start = 16 if kind.name in ("AVIF", "WebP", "JPEG 2000", "BMP") else 8
    for damaged in (data[: start + 4], data[:start] + bytes(200), data[: start + 10] + b"\xa5" * 300):
        codes = set()
        for decode in (decode_photo, check_photo):
            with pytest.raises(PhotoError) as caught:
                decode(damaged, frame="stored")
            codes.add(caught.value.code)
        assert codes <= {"decode_error", "too_many_pixels"}, caught.value


def test_the_docs_have_the_list():
    page = (REPOSITORY / "docs" / "own-data.md").read_text()
    for kind in ACCEPTED:
        assert f"| {kind.name} |" in page, f"{kind.name} is missing from the table of formats"
