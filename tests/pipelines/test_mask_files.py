"""PNGs of object masks: found by name in zips and folders, read by their places, and what is wrong with one told in words."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.annotations import mask_files
from pipelines.annotations.mask_files import (
    MaskError,
    MaskFiles,
    is_place,
    mask_pixels,
    place_of,
    read_mask,
    read_place,
    segment_ids,
)
from pipelines.config import SourceSettings
from tests.mask_files import ellipse, huge_png, png

PIXELS = ellipse(0.1, 0.2, 0.9, 0.8, 40, 30)


def source(folder: Path) -> SourceSettings:
    return SourceSettings(annotations=folder, photos=folder / "photos")


@pytest.fixture
def zips(tmp_path) -> list[Path]:
    """Ten PNGs in two zips, packed and not, some in folders, one behind a comment, beside what is no PNG."""
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"masks-{number}.zip")
        with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED if number else zipfile.ZIP_STORED) as archive:
            archive.writestr("readme.txt", "no mask" * 100)
            for place in range(5):
                data = png(np.roll(PIXELS, 5 * number + place, axis=1))
                archive.writestr(f"{'inner/' if place % 2 else ''}m{5 * number + place}.png", data)
            archive.comment = b"x" * 300
    return paths


def test_members_of_zips_are_found_and_read_without_the_zips_list(zips, tmp_path, monkeypatch):
    files = MaskFiles.of(tmp_path, zips)
    assert len(files) == 10
    places = files.find([*(f"m{number}.png" for number in range(10)), "gone.png", None])
    assert places[10:] == [None, None]
    monkeypatch.delattr(zipfile, "ZipFile")
    for number, place in enumerate(places[:10]):
        assert is_place(place)
        assert np.array_equal(read_mask(place, source(tmp_path)), np.roll(PIXELS, number, axis=1))


def test_zips_larger_than_4_gb_are_read(tmp_path):
    """The entry of a member beyond 4 GB is in the zip's list alone; here the part before it is a hole in the file."""
    path = tmp_path / "masks.zip"
    with path.open("wb") as file:
        file.seek((1 << 32) + 99)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.png", png(PIXELS))
    (place,) = MaskFiles.of(tmp_path, [path]).find(["a.png"])
    assert "4294967395" in str(place)
    assert np.array_equal(read_mask(str(place), source(tmp_path)), PIXELS)


def test_of_two_pngs_of_one_name_that_of_the_first_place_counts(tmp_path):
    for name, length in (("a", 1), ("b", 2)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("m.png", png(PIXELS)[:length])
    (tmp_path / "m.png").write_bytes(b"")
    paths = [tmp_path / "a.zip", tmp_path / "b.zip", tmp_path]
    assert '"a.zip"' in str(MaskFiles.of(tmp_path, paths).find(["m.png"])[0])
    assert MaskFiles.of(tmp_path, paths[::-1]).find(["m.png"]) == [place_of("annotations", "m.png")]
    assert MaskFiles.of(tmp_path, paths).digest() != MaskFiles.of(tmp_path, paths[1:]).digest()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), "cannot be read .No such file"),
        (lambda path: path.write_bytes(b"PK"), "not there any more; was the zip replaced"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"m5.png", b"m8.png")), "m8.png lies there now"),
        (lambda path: path.write_bytes(re.sub(b"m5.png.", b"m5.png\xff", path.read_bytes(), flags=re.DOTALL)), "damaged"),
    ],
    ids=["gone", "short", "another", "damaged"],
)
def test_a_zip_that_changed_is_told(change, problem, zips, tmp_path):
    (place,) = MaskFiles.of(tmp_path, zips).find(["m5.png"])
    change(zips[1])
    with pytest.raises(MaskError, match=problem):
        read_mask(str(place), source(tmp_path))


def test_no_more_is_unpacked_than_a_mask_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_files, "MAX_FILE_BYTES", 5000)
    data = bytes(5001)
    (tmp_path / "b.png").write_bytes(data)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
            archive.writestr("a.png", data)
        (place,) = MaskFiles.of(tmp_path, [tmp_path / "z.zip"]).find(["a.png"])
        with pytest.raises(MaskError, match="more than 5,000 bytes"):
            read_place(str(place), tmp_path, tmp_path)
    with pytest.raises(MaskError, match="more than 5,000 bytes"):
        read_place(place_of("annotations", "b.png"), tmp_path, tmp_path)


@pytest.mark.parametrize("path", ["../a.png", "a/../../a.png", "/etc/hostname"])
def test_no_place_leads_out_of_its_folder(path, tmp_path):
    with pytest.raises(MaskError, match="leads out of"):
        read_place(place_of("photos", path), tmp_path, tmp_path)


def test_places_count_from_the_photos_or_from_the_tables_folder(tmp_path):
    for folder in ("photos", "tables"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.png").write_bytes(folder.encode())
    table = tmp_path / "tables" / "boxes.csv"
    table.write_text("")
    for annotations in (table, table.parent):
        assert read_place(place_of("annotations", "m.png"), annotations, tmp_path / "photos") == b"tables"
        assert read_place(place_of("photos", "m.png"), annotations, tmp_path / "photos") == b"photos"


def palette() -> bytes:
    image = Image.fromarray(PIXELS.astype(np.uint8) * 3, "P")
    image.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 128, 0, 0])
    return png(image)


def transparent(alpha: int) -> bytes:
    """Black, and `alpha` at the object alone."""
    pixels = np.zeros((*PIXELS.shape, 4), np.uint8)
    pixels[PIXELS, 3] = alpha
    return png(pixels)


@pytest.mark.parametrize(
    "data",
    [
        png(PIXELS),
        png(PIXELS.astype(np.uint8)),
        png(PIXELS.astype(np.uint8) * 255),
        png(PIXELS.astype(np.uint16) * 700),
        png(np.where(PIXELS[..., None], np.uint8((0, 0, 200)), np.uint8(0))),
        png(
            np.concatenate([np.repeat(PIXELS[..., None], 3, axis=2) * np.uint8(9), np.full((*PIXELS.shape, 1), 255, np.uint8)], 2)
        ),
        transparent(255),
        transparent(40),
        palette(),
    ],
    ids=["1 bit", "0 and 1", "0 and 255", "16 bits", "colours", "opaque", "transparent", "translucent", "palette"],
)
def test_what_is_not_black_or_transparent_is_the_object(data):
    assert np.array_equal(mask_pixels(data), PIXELS)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no PNG but an empty file"),
        (b"GIF89a" + bytes(99), "no PNG but GIF"),
        (huge_png(), "20000x20000 px, more than"),
        (png(PIXELS)[:50], r"\w"),
    ],
    ids=["empty", "gif", "huge", "cut"],
)
def test_what_is_no_mask_is_told(data, problem):
    for read in (mask_pixels, segment_ids):
        with pytest.raises(MaskError, match=problem):
            read(data)


def test_numbers_of_segments_take_three_bytes_the_lowest_first():
    """As panopticapi's rgb2id has it."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    ids = segment_ids(png(colours))
    wide = colours.astype(int)
    assert np.array_equal(ids, wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2])
