import csv
import io
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from pbe_core.images import decode as photos
from pbe_core.images.containers import codestream_parts
from pbe_core.images.decode import PhotoError, check_photo, decode_photo, photo_size
from pbe_core.settings import REPOSITORY


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(message: str, data: bytes, decoders=(decode_photo, check_photo), **how: object) -> None:
    for decode in decoders:
        with pytest.raises(PhotoError, match=message):
            decode(data, **{"frame": "stored", **how})


def four_colours() -> np.ndarray:
    """40 x 20 px, another colour in each quarter."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, :20] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return pixels


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, before: bytes = b"IDAT") -> bytes:
    """The four colours, with these chunks before another one."""
    data = encoded(Image.fromarray(four_colours()))
    place = data.index(before) - 4
    return data[:place] + b"".join(chunks) + data[place:]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 77), 77),
        (Image.fromarray(np.full((2, 3), 257 * 99, np.uint16)), 99),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 0)), 255),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("P", (3, 2), 0), 0),
    ],
)
def test_every_mode_becomes_rgb(image, expected):
    photo = decode_photo(encoded(image), frame="stored")
    assert photo.shape == (2, 3, 3)
    assert (photo == expected).all()


# How a photo is shown that is stored upright and says 1 to 8.
SHOWN = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
LOSSLESS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "TIFF": {},
    "TIFF, packed": {"compression": "tiff_lzw"},
    "TIFF, JPEG": {"compression": "jpeg", "quality": 100},
    "TIFF, pages": {"save_all": True, "append_images": [Image.new("L", (9, 9))]},
    "TIFF, CMYK": {},
    "TIFF, 16 bits": {},
}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("orientation", SHOWN)
def test_each_frame_is_what_it_says_in_every_format(kind, orientation, tmp_path):
    """Pillow turns TIFF whatever is asked; boxes on the pixels as stored would lie elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, image = four_colours(), Image.fromarray(four_colours())
    if kind == "TIFF, CMYK":
        image = image.convert("CMYK")
    elif kind == "TIFF, 16 bits":
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    data, path = encoded(image, kind.partition(",")[0], exif=exif, **LOSSLESS[kind]), tmp_path / "photo"
    path.write_bytes(data)
    for frame, expected in (("stored", pixels), ("exif", SHOWN[orientation](pixels))):
        decoded = decode_photo(data, frame=frame)
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).max() <= (8 if kind == "JPEG" else 2), frame
        assert photo_size(data, frame=frame) == photo_size(path, frame=frame) == expected.shape[1::-1]
        facts = check_photo(data, frame=frame)
        assert (facts.width, facts.height) == (40, 20)
        assert facts.exif_orientation in ({1, None} if orientation == 1 else {orientation})


def test_a_png_may_say_behind_its_pixels_how_it_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    late = png(chunk(b"eXIf", exif.tobytes()[6:]), before=b"IEND")
    assert decode_photo(late, frame="exif").shape == (40, 20, 3)
    assert photo_size(late, frame="exif") == (20, 40)


def test_the_header_alone_tells_the_size_and_has_the_errors_of_a_photo(tmp_path):
    """A photo that is damaged further on has a size all the same, so asking for it did not decode it."""
    data = encoded(Image.effect_noise((640, 480), 90).convert("RGB"), "JPEG")[:2000]
    assert photo_size(data, frame="exif", max_pixels=640 * 480) == (640, 480)
    refused("decode_error", data)
    refused("too_many_pixels: 640x480 px, more than 307,199", data, (photo_size, decode_photo), max_pixels=640 * 480 - 1)
    for path in (tmp_path / "none.jpg", tmp_path):
        refused("missing", path, [photo_size])


def test_a_machine_out_of_memory_is_no_bad_photo(monkeypatch):
    def exhausted(*_: object) -> None:
        raise MemoryError

    data = encoded(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(MemoryError):
        decode_photo(data, frame="stored")


def test_large_photos_are_the_pixels_that_pillow_decodes():
    """Pillow holds those of more than 4 megapixels in several pieces, unless it is told otherwise."""
    noise = Image.effect_noise((100, 90), 60).convert("RGB").resize((2600, 2100), Image.Resampling.NEAREST)
    data = encoded(noise, "JPEG")
    assert (decode_photo(data, frame="stored") == np.array(Image.open(io.BytesIO(data)))).all()


def test_pictures_that_lie_in_pieces_are_taken_too():
    """As those of more than 4 megapixels do that a program made before it loaded this one."""
    piece = Image.core.get_block_size()
    Image.core.set_block_size(1 << 16)
    try:
        picture = Image.effect_noise((300, 200), 60).convert("RGB")
    finally:
        Image.core.set_block_size(piece)
    assert (decode_photo(picture, frame="stored") == np.array(picture)).all()


def test_hostile_files_give_pixels_or_a_code(real_data):
    """Against what Pillow does with each file: what cannot be opened or loaded is damaged, the rest decodes."""
    folder = real_data / "hostile_images"
    fine = 0
    for row in csv.DictReader((folder / "expected.csv").open()):
        data = (folder / row["file"]).read_bytes()
        if row["kind"] != "bomb" and row["pillow_open"] == row["pillow_load"] == "ok":
            fine += 1
            for frame in ("exif", "stored"):
                photo = decode_photo(data, frame=frame)
                assert (photo.shape[2], photo.dtype) == (3, np.uint8), row["file"]
                assert photo_size(folder / row["file"], frame=frame) == photo.shape[1::-1], row["file"]
        else:
            with pytest.raises(PhotoError) as caught:
                decode_photo(data, frame="exif")
            assert caught.value.code == ("too_many_pixels" if row["kind"] == "bomb" else "decode_error"), row["file"]
    assert fine >= 10


LONG = zlib.compress(bytes(2**21), 9)  # Twice what Pillow unpacks.


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "long",
    [
        chunk(b"zTXt", b"Comment\0\0" + LONG),
        chunk(b"iTXt", b"Comment\0\1\0en\0Kommentar\0" + LONG),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        chunk(b"iCCP", b"profile\0\0" + LONG),
    ],
    ids=["zTXt", "iTXt", "XMP", "profile"],
)
def test_a_png_may_have_long_texts_and_profiles(long, before, tmp_path):
    """Nothing of them is needed, however many there are."""
    data, path = png(*[long] * 40, before=before), tmp_path / "photo.png"  # Pillow takes 64 MB of texts.
    path.write_bytes(data)
    for frame in ("stored", "exif"):
        assert np.array_equal(decode_photo(data, frame=frame), four_colours())
        assert check_photo(data, frame=frame).format == "png"
        assert photo_size(data, frame=frame) == photo_size(path, frame=frame) == (40, 20)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt"])
def test_texts_that_turn_a_png_are_kept(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    keyword, text = b"Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()
    content = {
        b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>'),
        b"zTXt": keyword + b"\0\0" + zlib.compress(text),
        b"tEXt": keyword + b"\0" + text,
    }
    turned = png(chunk(kind, content[kind]), chunk(b"zTXt", b"Comment\0\0" + LONG))
    assert np.array_equal(decode_photo(turned, frame="exif"), SHOWN[6](four_colours()))
    assert photo_size(turned, frame="exif") == (20, 40)
    assert check_photo(turned, frame="stored").exif_orientation == 6


JPEGS = {
    "plain": {},
    "all colours": {"subsampling": 0, "quality": 95},
    "own tables": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
    "progressive, restarts": {"progressive": True, "restart_marker_rows": 1},
}


def noisy(options: dict[str, object], mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (8, 12, 3), np.uint8)
    # Both plain and detailed areas, and a size that is no multiple of a block's.
    return encoded(Image.fromarray(pixels).resize((93, 61), Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_that_lacks_only_its_end_mark_has_all_its_pixels(options, mode):
    data = noisy(options, mode)
    expected = decode_photo(data, frame="stored")
    # Phones append videos, in which anything may look like a frame or a scan.
    video = b"ftypmp42" + b"\xff\xc0\0\x11" + bytes(15) + b"\xff\xda" * 3 + bytes(100)
    assert np.array_equal(decode_photo(data + video, frame="stored", missing_end_mark="refuse"), expected)
    for cut in (data[:-2], data[:-1], data[:-2] + bytes(5000)):
        assert np.array_equal(decode_photo(cut, frame="stored"), expected)
        check_photo(cut, frame="exif")
        refused(r"no_end_mark: .* source\.missing_end_mark: accept takes it", cut, missing_end_mark="refuse")


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_that_lacks_pixels_is_damaged(options):
    """Wherever it is cut: within a block, before a restart mark, between two scans; also where zeros fill it up."""
    data = noisy(options)
    begin = data.index(b"\xff\xda")
    marks = [match.start() + begin for match in re.finditer(rb"\xff[\xc4\xd0-\xd7\xda]", data[begin:]) if match.start()]
    places = [*np.linspace(begin + 20, len(data) - 6, 25, dtype=int), *marks[:: max(1, len(marks) // 10)]]
    for place in places:
        refused("decode_error", data[:place])
    refused("decode_error", data[: len(data) // 2] + bytes(5000))


def raw_like(tags: dict[int, object]) -> bytes:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        directory.tagtype[number] = 1 if number == 50706 else 4
        directory[number] = value
    return encoded(Image.new("RGB", (16, 16)), "TIFF", tiffinfo=directory)


def test_a_cameras_raw_file_is_not_taken_for_its_thumbnail():
    for tags in ({50706: bytes((1, 4, 0, 0))}, {254: 1, 330: 8}):  # DNG; a small copy first.
        refused(r"unsupported_format: .*raw format", raw_like(tags), (decode_photo, check_photo, photo_size))
    assert decode_photo(raw_like({254: 1}), frame="stored").shape == (16, 16, 3), "nothing says that there is another picture"


def test_a_tile_is_not_larger_than_a_photo_may_be():
    """A header alone, of a photo of 16 x 16 px in one tile."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: 48, 323: 32, 324: 8, 325: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert photo_size(data, frame="stored", max_pixels=1536) == (16, 16)
    refused("too_many_pixels: tiles of 1,536 px", data, [photo_size], max_pixels=1535)


GREEN = Image.new("RGB", (64, 64), (10, 200, 30))
CLEAR = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
GREY = Image.new("L", (64, 64), 90)
SIZES = {"sizes": [(16, 16), (64, 64)]}


@pytest.mark.parametrize(
    ("kind", "image", "options", "expected"),
    [
        ("AVIF", GREEN, {"quality": 100, "subsampling": "4:4:4"}, (10, 200, 30)),
        ("AVIF", CLEAR, {}, 255),
        ("AVIF", GREY, {}, 90),
        ("AVIF", GREY, {"save_all": True, "append_images": [Image.new("L", (64, 64))]}, 90),
        ("JPEG2000", GREEN, {}, (10, 200, 30)),
        ("JPEG2000", GREEN, {"no_jp2": True, "tile_size": (32, 32)}, (10, 200, 30)),
        ("JPEG2000", Image.new("LA", (64, 64), (0, 0)), {}, 255),
        ("JPEG2000", Image.fromarray(np.full((64, 64), 257 * 99, np.uint16)), {}, 99),
        ("ICO", GREEN, SIZES, (10, 200, 30)),
        ("ICO", GREEN, {**SIZES, "bitmap_format": "bmp"}, (10, 200, 30)),
        ("ICO", CLEAR, {"sizes": [(64, 64)], "bitmap_format": "bmp"}, 255),
    ],
)
def test_avif_jpeg_2000_and_icons_are_photos(kind, image, options, expected, tmp_path):
    data = encoded(image, kind, **options)
    photo = decode_photo(data, frame="stored")
    assert photo.shape == (64, 64, 3)
    assert np.abs(photo.astype(int) - expected).max() <= 2
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert photo_size(path, frame="exif") == (64, 64)
    assert check_photo(data, frame="exif").format == {"AVIF": "avif", "JPEG2000": "jp2", "ICO": "ico"}[kind]
    refused("too_many_pixels", data, (decode_photo, check_photo, photo_size), max_pixels=64 * 64 - 1)
    for cut in (len(data) // 2, 40):
        refused("decode_error", data[:cut])


def icon(*pictures: tuple[int, bytes]) -> bytes:
    """An icon file of pictures with their sides in its list, where 0 is 256."""
    entries, place = b"", 6 + 16 * len(pictures)
    for side, picture in pictures:
        entries += struct.pack("<4B2H2I", side, side, 0, 0, 1, 32, len(picture), place)
        place += len(picture)
    return struct.pack("<3H", 0, 1, len(pictures)) + entries + b"".join(picture for _, picture in pictures)


def test_the_largest_picture_of_an_icon_is_taken():
    """By its own header: the list's numbers end at 256, and of two as large the one with more colours is better."""
    small, large = encoded(Image.new("RGB", (16, 16), "red")), encoded(Image.new("RGB", (300, 300), "blue"))
    data = icon((16, small), (0, large))
    assert decode_photo(data, frame="stored").shape == (300, 300, 3)
    assert photo_size(data, frame="stored") == (300, 300)
    deep, shallow = Image.new("RGB", (32, 32), "blue"), Image.new("RGB", (32, 32), "red").quantize(2)
    both = encoded(shallow, "ICO", sizes=[(32, 32)], bitmap_format="bmp", append_images=[deep])
    assert tuple(decode_photo(both, frame="stored")[0, 0]) == (0, 0, 255)


def test_an_icon_is_measured_before_pillow_decodes_it():
    """It decodes an icon while it opens it, and asks no limit of what is in there. Here a header is all there is."""
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s2I5B", 13, b"IHDR", 300, 300, 8, 2, 0, 0, 0) + bytes(4)
    data = icon((0, header))
    refused("too_many_pixels: an icon of 90,000 px", data, (decode_photo, check_photo, photo_size), max_pixels=89_999)


def test_a_jpeg_2000_may_not_ask_for_more_tables_than_we_allow(monkeypatch):
    """The limit bounds the memory that its decoder takes before the first pixel; here it is below what an ordinary file needs."""
    data = encoded(Image.new("RGB", (256, 256)), "JPEG2000", codeblock_size=(4, 4))
    parts = codestream_parts(data)
    # 64 x 64 blocks of 3 components, and a third as many of the smaller resolutions.
    assert 64 * 64 * 3 < parts < 2 * 64 * 64 * 3
    check_photo(data, frame="stored")
    monkeypatch.setattr(photos, "MAX_CODESTREAM_PARTS", parts - 1)
    refused(r"decode_error: a JPEG 2000 of .* it takes too much memory", data)
    bare = encoded(Image.new("RGB", (256, 256)), "JPEG2000", codeblock_size=(4, 4), no_jp2=True)
    assert codestream_parts(bare) == parts
    # Precincts of 2 x 2 px in a photo of 100 x 100: headers alone.
    size = struct.pack(">2s2H8IH3s", b"\xff\x51", 41, 0, 100, 100, 0, 0, 100, 100, 0, 0, 1, b"\7\1\1")
    style = struct.pack(">2sH2BHB5B6B", b"\xff\x52", 18, 1, 0, 1, 0, 5, 4, 4, 0, 1, *[0x11] * 6)
    assert codestream_parts(b"\xff\x4f" + size + style) > 50 * 50
    assert codestream_parts(b"\xff\x4f" + size) == codestream_parts(b"\xff\x4f\xff\x51") == codestream_parts(b"") == 0


SILENT = """
import io, sys
from PIL import Image
from pbe_core.images.decode import PhotoError, check_photo, decode_photo
def encoded(image, kind, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()
palette = Image.new("P", (4, 4))
palette.putpalette([0, 0, 0, 9, 9, 9])
exif = Image.Exif()
exif[0x0110] = "a model with a long name"
exif[0x8769] = {0x9286: b"comment " * 9}
small = Image.new("RGB", (16, 16))
tiff = encoded(small, "TIFF")
damaged = encoded(palette, "PNG", transparency=bytes((0, 128))), encoded(small, "JPEG", exif=exif.tobytes()[:60])
for data in (*damaged, tiff[:-20], tiff[:60]):
    for frame in ("stored", "exif"):
        for decode in (decode_photo, check_photo):
            try:
                decode(data, frame=frame)
            except PhotoError as error:
                print(error.code)
"""


def test_damaged_photos_say_nothing_on_the_terminal():
    """Pillow warns of damaged metadata with its own path; what matters of it is a photo's code."""
    command = [sys.executable, "-W", "always", "-c", SILENT]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"decode_error"}
    assert done.stderr == ""


def test_the_same_photo_gives_the_same_words_each_time():
    """Failures are a part of a shard's record, whose bytes must not depend on an address in memory."""
    with pytest.raises(PhotoError) as caught:
        decode_photo(b"\xff\xd8 and no more", frame="stored")
    assert "0x" not in caught.value.detail


def test_a_jpeg_may_have_so_many_scans(monkeypatch):
    """Each is a pass over all pixels: the limit bounds the time. Here it is below what an ordinary progressive photo has."""
    data = encoded(Image.fromarray(four_colours()), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    assert 5 < scans < 20
    monkeypatch.setattr(photos, "MAX_JPEG_SCANS", scans)
    check_photo(data, frame="stored")
    monkeypatch.setattr(photos, "MAX_JPEG_SCANS", scans - 1)
    refused(f"decode_error: a JPEG of {scans} scans", data)


def test_what_is_checked_is_what_can_be_decoded(real_data):
    """`check_photo` says yes to just those photos that `decode_photo` takes, whole and cut off at any place."""
    random = np.random.default_rng(0)
    for path in sorted((real_data / "hostile_images").iterdir()):
        whole = path.read_bytes()
        for data in (whole, *(whole[: random.integers(1, len(whole))] for _ in range(5))):
            for frame in ("stored", "exif"):
                assert _outcome(check_photo, data, frame) == _outcome(decode_photo, data, frame), path.name


@pytest.mark.parametrize("options", [{}, {"keep_rgb": True}, {"progressive": True, "subsampling": 2}, {"subsampling": 0}])
def test_a_damaged_jpeg_is_found_by_a_check_that_makes_no_colours(options):
    """Bytes changed anywhere, also within the colours' part, give the same words as decoding."""
    random = np.random.default_rng(7)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (40, 56, 3), np.uint8)).save(file, "JPEG", **options)
    codes = Counter()
    for _ in range(300):
        data = bytearray(file.getvalue())
        for place in random.integers(0, len(data), random.integers(1, 20)):
            data[place] = random.integers(0, 256)
        codes[_outcome(check_photo, bytes(data), "stored")] += 1
        assert _outcome(check_photo, bytes(data), "stored") == _outcome(decode_photo, bytes(data), "stored")
    assert codes["ok"] > 20
    assert codes["decode_error"] > 20


def _outcome(function, data, frame):
    try:
        function(data, frame=frame)
    except PhotoError as error:
        return error.code
    return "ok"
