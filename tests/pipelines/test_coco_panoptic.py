"""COCO's panoptic format: JSON and PNGs as published, in folders and zips, to shards, with every segment accounted for."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.rle import decode_pixels
from pbe_core.settings import load_settings, preset
from pipelines.annotations import coco_panoptic, open_source
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings
from tests.coco_files import boxes_of
from tests.conftest import VAE, run_build
from tests.mask_files import HEIGHT, WIDTH, build_samples, check_reference, ellipse, photo_of, png, save_photo

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 3, "name": "car", "supercategory": "vehicle", "isthing": 1, "color": [0, 0, 142]},
    {"id": 187, "name": "sky-other-merged", "supercategory": "sky", "isthing": 0, "color": [70, 130, 180]},
]
LEFT, RIGHT = (0.05, 0.1, 0.45, 0.9), (0.55, 0.2, 0.95, 0.7)
# Numbers that take one, two and three bytes.
NUMBERS = {"left": 200 + 256 * 17, "right": 65536 * 90 + 5, "sky": 9}


def covered(side: str) -> np.ndarray:
    return ellipse(*(LEFT if side == "left" else RIGHT), WIDTH, HEIGHT)


def colours(ids: np.ndarray) -> np.ndarray:
    """As panopticapi's `id2rgb`."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


def segment(side: str, **changes: Any) -> dict[str, Any]:
    """Without what is `...`."""
    rows, columns = np.nonzero(covered(side) if side != "sky" else np.ones((HEIGHT, WIDTH)))
    x, y = int(columns.min()), int(rows.min())
    entry = {
        "id": NUMBERS[side],
        "category_id": {"left": 1, "right": 3, "sky": 187}[side],
        "iscrowd": 0,
        "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
        "area": len(rows),
        **changes,
    }
    return {key: value for key, value in entry.items() if value is not ...}


def write(folder: Path, split: str, segments: dict[int, list[Any]], zipped: bool = False, **more: Any) -> Path:
    """A split as COCO publishes it: `panoptic_<split>2017.json`, and PNGs in the folder or zip of its name."""
    path = folder / f"panoptic_{split}2017.json"
    folder.mkdir(exist_ok=True)
    ids = np.where(covered("left"), NUMBERS["left"], np.where(covered("right"), NUMBERS["right"], NUMBERS["sky"]))
    data = png(colours(ids))
    names = {number: f"{number:012}" for number in segments}
    document = {
        "info": {},
        "licenses": [{"id": 1, "url": "https://l/"}],
        "images": [
            {"id": n, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT, "license": 1} for n, name in names.items()
        ],
        "annotations": [{"image_id": n, "file_name": f"{name}.png", "segments_info": segments[n]} for n, name in names.items()],
        "categories": CATEGORIES,
        **more,
    }
    path.write_text(json.dumps(document))
    if zipped:
        with zipfile.ZipFile(folder / f"{path.stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{path.stem}/", b"")
            for name in names.values():
                archive.writestr(f"{path.stem}/{name}.png", data)
    else:
        (folder / path.stem).mkdir(exist_ok=True)
        for name in names.values():
            (folder / path.stem / f"{name}.png").write_bytes(data)
    return path


def save_photos(folder: Path, split: str, numbers: list[int]) -> None:
    for number in numbers:
        save_photo(folder / f"{split}2017" / f"{number:012}.jpg", photo_of(covered("left"), covered("right")))


def opened(path: Path, **source: Any) -> Source:
    given = {"kind": "coco_panoptic", "annotations": path, "photos": path.parent, **source}
    options = [text for name, value in given.items() for text in (f"--source.{name}", str(value))]
    return open_source(load_settings(BuildSettings, "build", options, preset("coco")))


def test_published_files_build_with_the_masks_of_their_pngs(tmp_path):
    """Things are objects, crowds are group_of, stuff is left out and counted; PNGs lie in a folder, and for val in a zip."""
    everything = [segment("left"), segment("right"), segment("sky")]
    write(tmp_path / "a", "train", {9: everything, 25: [segment("left", iscrowd=1), segment("right", bbox=...)]})
    write(tmp_path / "a", "val", {30: everything}, zipped=True)
    (tmp_path / "a" / "instances_val2017.json").write_text("{}")
    save_photos(tmp_path / "photos", "train", [9, 25])
    save_photos(tmp_path / "photos", "val", [30])
    out = tmp_path / "out"
    options = [
        "--source.kind",
        "coco_panoptic",
        "--source.annotations",
        str(tmp_path / "a"),
        "--out",
        str(out),
        "--latents.vae",
        VAE,
    ]
    run_build(*options, "--source.photos", str(tmp_path / "photos"), "--references.background", "grey")
    samples = build_samples(out)
    assert {photo: len(found) for photo, found in samples.items()} == {"9": 2, "25": 1, "30": 2}
    for found in samples.values():
        for sample in found:
            side = "left" if sample.record.label_name == "person" else "right"
            assert (side == "left") == (sample.record.box[0] < WIDTH / 2)
            check_reference(sample, covered(side))
    (reject,) = pq.read_table(out / "rejects.parquet").to_pylist()
    assert (reject["reason"], reject["photo_id"]) == ("group_of", "25")
    assert "segments of stuff (`isthing` 0), which has no instances, are left out: 2" in (out / "selection.json").read_text()


@pytest.mark.parametrize("ahead", [1, 8])
def test_each_segment_gets_its_own_pixels_whatever_is_decoded_ahead(ahead, tmp_path, monkeypatch):
    """And the box of its pixels, where the file gives none: within it, both are the same."""
    monkeypatch.setattr(coco_panoptic, "_AHEAD", ahead)
    numbers = range(1, 12)
    path = write(tmp_path, "val", {n: [segment("right", bbox=...), segment("left")] for n in numbers})
    for number in numbers:  # Photo n's objects lie n px lower.
        name = tmp_path / "panoptic_val2017" / f"{number:012}.png"
        Image.fromarray(np.roll(np.asarray(Image.open(name)), number, axis=0)).save(name)
    source = opened(path)
    rows = boxes_of(source)
    assert rows == boxes_of(source), "each reading starts anew"
    assert source.rows == len(rows) == 22
    assert [row["problem"] for row in rows] == [None] * 22
    for row in rows:
        side = "left" if row["label"] == "1" else "right"
        moved = np.roll(covered(side), int(row["photo_id"]), axis=0)
        assert np.array_equal(decode_pixels(row["segmentation"], HEIGHT, WIDTH), moved)
        if side == "right":
            y, x = np.nonzero(moved)
            box = (x.min() / WIDTH, (x.max() + 1) / WIDTH, y.min() / HEIGHT, (y.max() + 1) / HEIGHT)
            assert [row[name] for name in ("x_min", "x_max", "y_min", "y_max")] == pytest.approx(box)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (segment("left", id=77), r"segment 1 \(id 77\): its PNG has no pixel of segment 77"),
        (segment("left", id="x"), r"segment 1 \(id 'x'\): `id` is 'x', expected the number of a segment"),
        ("text", "segment 1: is 'text', expected an object"),
        (segment("left", bbox=[1, 2]), r"`bbox` is \[1, 2\], expected \[x, y, width, height\]"),
        (segment("left", category_id=...), "`category_id`"),
    ],
)
def test_what_is_wrong_with_a_segment_is_told_of_it_alone(entry, problem, tmp_path):
    bad, good = boxes_of(opened(write(tmp_path, "val", {9: [entry, segment("right")]})))
    assert bad["problem"] == "bad_row" or bad["label"] == "object"
    assert good["problem"] is None
    if bad["problem"]:
        assert re.search(problem, bad["detail"]), bad["detail"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "its PNG: .*000000000009.png cannot be read"),
        (b"GIF89a" + bytes(50), "its PNG: it is no PNG but GIF"),
        (png(np.zeros((HEIGHT, WIDTH), np.uint8)), "its PNG: its pixels are L, expected RGB"),
        (png(colours(np.zeros((20, 30), np.int64))), "its PNG has 30x20 px, the photo 160x120"),
        (png(colours(np.zeros((HEIGHT, WIDTH), np.int64)))[:-40], "its PNG: "),
    ],
    ids=["missing", "gif", "grey", "size", "damaged"],
)
def test_a_png_that_cannot_be_used_costs_its_own_segments(data, problem, tmp_path):
    path = write(tmp_path, "val", {9: [segment("left"), segment("right")], 10: [segment("left")]})
    name = tmp_path / "panoptic_val2017" / f"{9:012}.png"
    name.unlink() if data is None else name.write_bytes(data)
    rows = boxes_of(opened(path))
    assert [row["problem"] for row in rows] == ["bad_row", "bad_row", None]
    assert all(re.search(problem, row["detail"]) for row in rows[:2]), rows[0]["detail"]


def test_what_is_wrong_with_files_stops_before_any_work(tmp_path):
    path = write(tmp_path / "a", "val", {9: [segment("left")]})
    with pytest.raises(InputError, match=r"no file panoptic_train\*\.json for the split train; put it there"):
        opened(tmp_path / "a")
    with pytest.raises(InputError, match=r"read with source\.kind: coco_panoptic"):
        opened(path, kind="coco")
    (tmp_path / "a" / "panoptic_val2017").rename(tmp_path / "a" / "elsewhere")
    with pytest.raises(InputError, match=r"neither its PNGs' folder .*panoptic_val2017 nor panoptic_val2017\.zip is there"):
        opened(path)
    (tmp_path / "a" / "panoptic_val2017.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"panoptic_val2017\.zip: no zip that can be read"):
        opened(path)
    (tmp_path / "a" / "panoptic_val2017.zip").unlink()
    instances = write(tmp_path / "b", "val", {9: []}, annotations=[{"id": 1, "image_id": 9, "bbox": [1, 2, 3, 4]}])
    with pytest.raises(InputError, match=r"no annotation has `segments_info` .* with source\.kind: coco"):
        opened(instances)


def test_the_pngs_are_part_of_the_fingerprint(tmp_path):
    for zipped in (False, True):
        source = opened(write(tmp_path / str(zipped), "val", {9: [segment("left")]}, zipped=zipped))
        before = source.read_elsewhere()
        assert before == source.read_elsewhere()
        again = opened(write(tmp_path / str(zipped), "val", {9: [segment("left")], 10: []}, zipped=zipped))
        assert again.read_elsewhere() != before


def test_where_no_class_is_of_things_all_are(tmp_path):
    """Datumaro writes `isthing` 0 of every class unless it is told which are things."""
    stuff = [{**category, "isthing": 0} for category in CATEGORIES]
    source = opened(write(tmp_path, "val", {9: [segment("left"), segment("sky")]}, categories=stuff))
    assert [row["problem"] for row in boxes_of(source)] == [None, None]
    assert any("no category is of things" in note for note in source.read_notes())
    silent = [{key: value for key, value in category.items() if key != "isthing"} for category in CATEGORIES]
    assert len(boxes_of(opened(write(tmp_path, "val", {9: [segment("left"), segment("sky")]}, categories=silent)))) == 2


def test_photos_that_exif_turns_are_cut_with_masks_of_what_viewers_show(tmp_path):
    """Sizes in the JSON are those of the PNG, upright; the photo lies on its side in its file."""
    path = write(tmp_path / "a", "val", {9: [segment("left"), segment("right")]})
    shown = photo_of(covered("left"), covered("right"))
    save_photo(tmp_path / "photos" / "val2017" / f"{9:012}.jpg", np.rot90(shown), orientation=6)
    options = ["--source.kind", "coco_panoptic", "--source.annotations", str(path), "--out", str(tmp_path / "out")]
    frame = ["--source.frame", "exif", "--references.background", "grey", "--latents.vae", VAE]
    run_build(*options, *frame, "--source.photos", str(tmp_path / "photos"), "--source.validation_share", "0")
    (found,) = build_samples(tmp_path / "out").values()
    for sample in found:
        check_reference(sample, covered("left" if sample.record.label_name == "person" else "right"))
    assert len(found) == 2
