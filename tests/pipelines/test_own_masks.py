"""Object masks in a table of one's own boxes: run lengths, polygons and PNGs, px and fractions, and what is wrong with a row."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from pbe_core.images.rle import decode_pixels
from pipelines.annotations.mask_files import is_place
from pipelines.annotations.own_boxes import open_boxes
from pipelines.annotations.source import Source
from pipelines.config import SourceSettings
from tests.coco_files import boxes_of, photos_of
from tests.conftest import VAE, run_build
from tests.mask_files import HEIGHT, WIDTH, build_samples, check_reference, ellipse, huge_png, photo_of, png, save_photo

SIDES = ("x_min", "y_min", "x_max", "y_max")
BOX = (0.2, 0.15, 0.8, 0.85)
# An upright photo, and one that its EXIF turns by 90 degrees clockwise: boxes and masks are of photos as shown.
ORIENTATIONS = {"upright.jpg": 1, "turned.jpg": 6}


def shown_size(photo: str) -> tuple[int, int]:
    return (HEIGHT, WIDTH) if photo.startswith("turned") else (WIDTH, HEIGHT)


def object_in(size: tuple[int, int]) -> np.ndarray:
    return ellipse(*BOX, *size)


def run_lengths(pixels: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(pixels, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def polygon(size: tuple[int, int]) -> list[list[float]]:
    """The ellipse's outline, px."""
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    middle, half = np.array([0.5, 0.5]), np.array([0.3, 0.35])
    points = (middle + half * np.stack([np.cos(angles), np.sin(angles)], axis=1)) * size
    return [np.round(points, 2).ravel().tolist()]


def way(name: str, photo: str, folder: Path, unit: str) -> dict[str, Any]:
    """A mask as a table may give it."""
    size = shown_size(photo)
    if name == "polygon":
        scale = np.array(size) if unit == "fraction" else np.ones(2)
        return {"segmentation": [(np.array(part).reshape(-1, 2) / scale).ravel().tolist() for part in polygon(size)]}
    if name == "rle":
        return {"segmentation": run_lengths(object_in(size))}
    if name == "none":
        return {}
    place = {"below": folder / "photos" / "masks", "beside": folder}[name]
    place.mkdir(exist_ok=True)
    larger = (size[0] * 3, size[1] * 3)
    pixels = object_in(larger if name == "below" else size)
    stem = f"{Path(photo).stem}-{name}.png"
    (place / stem).write_bytes(png(pixels if name == "below" else pixels.astype(np.uint8) * 200))
    return {"mask": f"masks\\{stem}" if name == "below" else str(place / stem) if photo.startswith("turned") else stem}


@pytest.fixture
def folder(tmp_path) -> Path:
    for photo, orientation in ORIENTATIONS.items():
        for copy in ("polygon", "rle", "below", "beside", "none"):
            pixels = photo_of(object_in(shown_size(photo)))
            stored = np.rot90(pixels) if orientation == 6 else pixels
            save_photo(tmp_path / "photos" / f"{Path(photo).stem}-{copy}.jpg", stored, orientation)
    return tmp_path


def table(folder: Path, suffix: str, unit: str) -> Path:
    rows = []
    for photo in ORIENTATIONS:
        for name in ("polygon", "rle", "below", "beside", "none"):
            scale = (1, 1) if unit == "fraction" else shown_size(photo)
            edges = {side: round(edge * scale[place % 2], 4) for place, (side, edge) in enumerate(zip(SIDES, BOX, strict=True))}
            rows.append({"photo": f"{Path(photo).stem}-{name}.jpg", **edges, **way(name, photo, folder, unit)})
    path = folder / f"boxes.{suffix}"
    with path.open("w", newline="") as file:
        if suffix == "jsonl":
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["photo", "x_min", "y_min", "x_max", "y_max", "segmentation", "mask"])
            writer.writeheader()
            writer.writerows({key: json.dumps(v) if key == "segmentation" else v for key, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize(("suffix", "unit"), [("csv", "pixel"), ("jsonl", "fraction")])
def test_every_way_of_giving_a_mask_cuts_the_same_reference(suffix, unit, folder):
    """On photos as shown, turned by their EXIF or not; a row without a mask keeps its background."""
    path = table(folder, suffix, unit)
    out = folder / "out"
    options = [
        "--source.kind",
        "boxes",
        "--source.unit",
        unit,
        "--source.annotations",
        str(path),
        "--source.validation_share",
        "0",
    ]
    places = ["--source.photos", str(folder / "photos"), "--out", str(out), "--latents.vae", VAE]
    run_build(*options, *places, "--references.background", "grey")
    samples = build_samples(out)
    assert len(samples) == 10
    for photo_id, (sample,) in samples.items():
        photo, name = photo_id.split("-")
        if name == "none":
            assert sample.record.reference_mask is None
        else:
            check_reference(sample, object_in(shown_size(photo)))
    objects = pq.read_table(out / "objects.parquet").to_pylist()
    assert {row["photo_id"].split("-")[1] for row in objects if is_place(row["segmentation"])} == {"below", "beside"}
    assert "2 of 10 objects have no outline" in (out / "selection.json").read_text()


def opened(path: Path, **settings: Any) -> Source:
    given = {"unit": "pixel", "annotations": path, "photos": path.parent / "photos", "splits": ("train",), **settings}
    return open_boxes(SourceSettings(kind="boxes", **given), 0)


ROW = {"photo": "upright-rle.jpg", "x_min": 32, "y_min": 18, "x_max": 128, "y_max": 102}


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "column segmentation: has a polygon"),
        (
            {"segmentation": {"size": [120, 99], "counts": "0"}},
            r"column segmentation: has `size` \[120, 99\], the photo \[120, 160\]",
        ),
        ({"segmentation": {"size": [120, 160], "counts": "png:[]"}}, "column segmentation: has `counts` with characters"),
        ({"segmentation": "{'size': [120, 160]}"}, "column segmentation: .* is no JSON .* write it with json.dumps"),
        ({"segmentation": 'png:["annotations","inside.png"]'}, "column segmentation: .* is no JSON"),
        ({"segmentation": '"png:x"'}, "column segmentation: is 'png:x', expected polygons or RLE"),
        ({"segmentation": 7}, "column segmentation: is 7, expected polygons or RLE"),
        ({"mask": "gone.png"}, "column mask: no file 'gone.png' below "),
        ({"mask": "../outside.png"}, "column mask: no file .* no mask may lie outside"),
        ({"mask": "/etc/hostname"}, "column mask: no file .* no mask may lie outside"),
        ({"mask": "a\0b.png"}, "column mask: no file"),
        ({"mask": 5}, "column mask: 5 is no text"),
        ({"mask": "upright-rle.jpg"}, "column mask: 'upright-rle.jpg' is no PNG but JPEG"),
        ({"mask": "square.png"}, "column mask: 'square.png' has 80x80 px, the photo 160x120"),
        ({"mask": "huge.png"}, "column mask: 'huge.png' cannot be read .*more than"),
        ({"mask": "inside.png", "segmentation": [[1, 2, 30, 4, 5, 60]]}, "column mask: there is a `segmentation` too"),
    ],
)
def test_what_is_wrong_with_a_mask_is_told_of_its_row_alone(cells, problem, folder):
    (folder.parent / "outside.png").write_bytes(png(np.ones((120, 160), bool)))
    (folder / "inside.png").write_bytes(png(np.ones((120, 160), bool)))
    (folder / "square.png").write_bytes(png(np.ones((80, 80), bool)))
    (folder / "huge.png").write_bytes(huge_png())
    path = folder / "boxes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW | cells, ROW | {"mask": "inside.png"})))
    bad, good = boxes_of(opened(path))
    assert bad["problem"] == "bad_row"
    assert bad["segmentation"] is None
    assert re.match(rf"boxes\.jsonl, line 1, {problem}", bad["detail"]), bad["detail"]
    assert (good["problem"], good["segmentation"]) == (None, 'png:["annotations","inside.png"]')


def test_outlines_in_px_need_the_photos_size_whatever_the_unit_of_boxes(folder):
    edges = dict(zip(SIDES, BOX, strict=True))
    path = folder / "boxes.jsonl"
    outlined = {"photo": "upright-rle.jpg", **edges, "segmentation": run_lengths(object_in((WIDTH, HEIGHT)))}
    path.write_text("".join(json.dumps(row) + "\n" for row in (outlined, {"photo": "upright-none.jpg", **edges})))
    source = opened(path, unit="fraction")
    first, second = boxes_of(source)
    assert np.array_equal(decode_pixels(first["segmentation"], HEIGHT, WIDTH), object_in((WIDTH, HEIGHT)))
    assert second["segmentation"] is None
    sizes = {row["file_name"]: (row["width"], row["height"]) for row in photos_of(source)}
    assert sizes == {"upright-rle.jpg": (WIDTH, HEIGHT), "upright-none.jpg": (None, None)}
    assert "sizes of photos" in source.read_elsewhere()
    path.write_text(path.read_text().replace("upright-rle", "gone"))
    assert [row["problem"] for row in boxes_of(opened(path, unit="fraction"))] == ["unknown_photo", None]


def test_a_long_outline_fits_into_a_cell(folder):
    """Python's csv refuses cells of more than 131,072 characters unless it is told otherwise."""
    points = np.random.default_rng(0).uniform(10, 100, (9000, 2)).round(6)
    path = folder / "boxes.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*ROW, "segmentation"], [*ROW.values(), json.dumps([points.ravel().tolist()])]])
    assert path.stat().st_size > 150_000
    (row,) = boxes_of(opened(path))
    assert row["problem"] is None
    assert decode_pixels(row["segmentation"], HEIGHT, WIDTH).any()


def test_the_places_of_masks_are_part_of_the_fingerprint(folder):
    (folder / "m.png").write_bytes(png(np.ones((120, 160), bool)))
    path = folder / "boxes.jsonl"
    path.write_text(json.dumps(ROW | {"mask": "m.png"}) + "\n")
    source = opened(path)
    before = source.read_elsewhere()
    (folder / "m.png").unlink()
    assert source.read_elsewhere()["places of masks"] != before["places of masks"]
