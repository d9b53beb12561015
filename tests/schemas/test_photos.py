import csv
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from schemas.photos import PhotoError, check_photo, decode_photo, photo_size


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned_jpeg() -> tuple[bytes, np.ndarray]:
    """A 40x20 JPEG whose EXIF asks for a quarter turn, and its stored pixels."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = (200, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0, exif=exif.tobytes()), pixels


def test_the_frame_decides_about_exif():
    data, pixels = turned_jpeg()
    stored, turned = decode_photo(data, frame="stored"), decode_photo(data, frame="exif")
    assert np.abs(stored.astype(int) - pixels).max() <= 8
    assert turned.shape == (40, 20, 3)
    assert np.array_equal(turned, np.rot90(stored, -1))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 77), (77, 77, 77)),
        (Image.fromarray(np.full((2, 3), 257 * 99, np.uint16)), (99, 99, 99)),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("P", (3, 2), 0).convert("P"), (0, 0, 0)),
    ],
    ids=["grey", "16 bit", "transparent", "opaque", "palette"],
)
def test_every_mode_becomes_rgb(image, expected):
    photo = decode_photo(encoded(image), frame="stored")
    assert photo.shape == (2, 3, 3)
    assert (photo == expected).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 6, 8])
@pytest.mark.parametrize("frame", ["stored", "exif"])
def test_the_size_is_that_of_the_decoded_photo(kind, orientation, frame, tmp_path):
    """Boxes in px are divided by it: where it were not turned with the photo, they would lie elsewhere."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (40, 20)), kind, exif=exif)
    height, width, _ = decode_photo(data, frame=frame).shape
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert photo_size(data, frame=frame) == photo_size(path, frame=frame) == (width, height)


def test_a_png_may_say_behind_its_pixels_how_it_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (40, 20)), exif=exif)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    late = data[:start] + data[start + len(chunk) : end] + chunk + data[end:]
    assert decode_photo(late, frame="exif").shape == (40, 20, 3)
    assert photo_size(late, frame="exif") == (20, 40)


def test_the_header_alone_tells_the_size():
    """A photo that is damaged further on has a size all the same, so asking for it did not decode it."""
    data = encoded(Image.effect_noise((640, 480), 90).convert("RGB"), "JPEG")[:2000]
    assert photo_size(data, frame="exif") == (640, 480)
    with pytest.raises(PhotoError, match="decode_error"):
        decode_photo(data, frame="exif")


def test_a_size_has_the_errors_of_a_photo(tmp_path):
    data = encoded(Image.new("RGB", (40, 20)), "JPEG")
    assert photo_size(data, frame="exif", max_pixels=800) == (40, 20)
    with pytest.raises(PhotoError, match="too_many_pixels: 40x20 px, more than 799"):
        photo_size(data, frame="exif", max_pixels=799)
    with pytest.raises(PhotoError, match="not_an_image"):
        photo_size(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", frame="stored")
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(PhotoError, match="missing"):
            photo_size(path, frame="stored")


def test_limits_are_checked_before_decoding():
    """The header announces 30,000 x 30,000 px over three bytes of content: decoding first would fail otherwise or take 2.7 GB."""
    header = encoded(Image.new("1", (1, 1)), "PPM").replace(b"1 1", b"30000 30000")
    with pytest.raises(PhotoError, match="too_many_pixels"):
        decode_photo(header, frame="stored")


def test_postscript_is_never_run():
    """Pillow hands EPS to Ghostscript, which executes it."""
    with pytest.raises(PhotoError) as caught:
        decode_photo(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", frame="stored")
    assert caught.value.code == "not_an_image"


def test_a_machine_out_of_memory_is_no_bad_photo(monkeypatch):
    def exhausted(*_: object) -> None:
        raise MemoryError

    data = encoded(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image.Image, "tobytes", exhausted)
    with pytest.raises(MemoryError):
        decode_photo(data, frame="stored")


def test_a_truncated_jpeg_is_an_error_and_no_grey_pixels():
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    with pytest.raises(PhotoError) as caught:
        decode_photo(data[: len(data) // 2], frame="stored")
    assert caught.value.code == "decode_error"


def test_hostile_files_give_pixels_or_a_code(real_data):
    """Against what Pillow does with each file: what cannot be opened or loaded is coded, the rest decodes."""
    folder = real_data / "hostile_images"
    rows = list(csv.DictReader((folder / "expected.csv").open()))
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if row["kind"] == "bomb" or (row["pillow_open"] == "ok" and row["pillow_load"] == "ok"):
            continue
        with pytest.raises(PhotoError) as caught:
            decode_photo(data, frame="exif")
        assert caught.value.code == ("not_an_image" if row["pillow_open"] != "ok" else "decode_error"), row["file"]
    bomb = next(row for row in rows if row["kind"] == "bomb")
    with pytest.raises(PhotoError, match="too_many_pixels"):
        decode_photo((folder / bomb["file"]).read_bytes(), frame="exif")
    fine = [row for row in rows if row["kind"] != "bomb" and row["pillow_open"] == "ok" and row["pillow_load"] == "ok"]
    assert len(fine) >= 10
    for row in fine:
        photo = decode_photo((folder / row["file"]).read_bytes(), frame="exif")
        assert photo.shape[2] == 3, row["file"]
        assert photo.dtype == np.uint8, row["file"]
        for frame in ("exif", "stored"):
            height, width, _ = decode_photo((folder / row["file"]).read_bytes(), frame=frame).shape
            assert photo_size(folder / row["file"], frame=frame) == (width, height), row["file"]


def test_the_same_photo_gives_the_same_words_each_time():
    """Failures are a part of a shard's record, whose bytes must not depend on an address in memory."""
    details = set()
    for _ in range(3):
        with pytest.raises(PhotoError) as caught:
            decode_photo(b"no photo at all", frame="stored")
        details.add(caught.value.detail)
    assert len(details) == 1
    assert "0x" not in details.pop()


def test_a_progressive_photo_may_not_repeat_its_scans_without_end():
    """A few hundred bytes of scan are a pass over all pixels: a megabyte of them would take minutes."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scans = data.count(b"\xff\xda")
    assert 5 < scans < 20
    check_photo(data, frame="stored")
    last = data.rindex(b"\xff\xda")
    refinement = data[last:-2]
    bomb = data[:-2] + refinement * 101 + b"\xff\xd9"
    for decode in (check_photo, decode_photo):
        with pytest.raises(PhotoError, match=f"decode_error: a JPEG of {scans + 101} scans"):
            decode(bomb, frame="stored")


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
