"""Label Studio's JSON as it comes: shapes, which annotation of a task counts, names of photos, and masks of its brush."""

import json
from pathlib import Path

import numpy as np
import pytest

from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.annotations.brush import unpack_brush
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings
from pipelines.dataset.samples import decode_segmentation
from tests.format_files import HEIGHT, WIDTH, TrueBox, photo, region, task, write

CAT = TrueBox("cat", 16, 12, 80, 60)
# What label-studio-sdk 2.1.2 writes (`mask2rle`) of a mask of 8 x 6 px whose rows 1 to 3 and columns 2 to 5 are set.
BRUSH = [0, 0, 0, 192, 57, 27, 254, 39, 0, 191, 255, 124, 2, 255, 253, 240, 11, 255, 249, 28, 0]


def source_of(folder: Path, tasks: object, **source: object) -> Source:
    write(folder / "export.json", tasks if isinstance(tasks, str) else json.dumps(tasks))
    source = {"splits": ("train",), "validation_share": 0, "annotations": folder, "photos": folder / "photos", **source}
    return open_source(BuildSettings(out=folder / "out", source={"kind": "label_studio", **source}))


def rows(source: Source) -> list[dict]:
    return [row for batch in source.read_boxes() for row in batch.to_pylist()]


def edges(row: dict) -> list[float]:
    return [row["x_min"] * WIDTH, row["y_min"] * HEIGHT, row["x_max"] * WIDTH, row["y_max"] * HEIGHT]


def shape(kind: str, value: dict, **more: object) -> dict:
    return {**region(CAT), "type": kind, "value": {**value, kind: ["cat"]}, **more}


@pytest.fixture
def folder(tmp_path) -> Path:
    photo(tmp_path / "photos" / "a.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("one", "found"),
    [
        (region(CAT), [16, 12, 80, 60]),
        # Turned about its top left corner, clockwise, in px: not in %, of which across and down have other lengths.
        (shape("rectanglelabels", {"x": 50, "y": 50, "width": 25, "height": 25, "rotation": 90}), [50, 60, 80, 100]),
        (shape("rectanglelabels", {"x": 50, "y": 50, "width": 25, "height": 25, "rotation": 180}), [40, 30, 80, 60]),
        (shape("rectanglelabels", {"x": 10, "y": 50, "width": 25, "height": 25, "rotation": 90}), [0, 60, 16, 100]),
        (shape("ellipselabels", {"x": 50, "y": 50, "radiusX": 25, "radiusY": 10, "rotation": 0}), [40, 48, 120, 72]),
        (shape("ellipselabels", {"x": 50, "y": 50, "radiusX": 25, "radiusY": 10, "rotation": 90}), [68, 20, 92, 100]),
        (shape("polygonlabels", {"points": [[10, 10], [50, 10], [30, 50]]}), [16, 12, 80, 60]),
        (shape("rectangle", {"x": 10, "y": 10, "width": 40, "height": 40}), [16, 12, 80, 60]),
    ],
)
def test_shapes(one, found, folder):
    (row,) = rows(source_of(folder, [task("a.jpg", [one])]))
    assert row["problem"] is None, row["detail"]
    assert edges(row) == pytest.approx(found)
    assert bool(row["segmentation"]) == ("points" in one["value"])
    assert row["label"] == ("object" if one["type"] == "rectangle" else "cat")


def test_a_brush_mask_is_a_box_and_its_px(folder):
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:6] = True
    assert (unpack_brush(BRUSH, 8, 6) == mask).all()
    photo(folder / "photos" / "b.jpg")
    one = shape("brushlabels", {"format": "rle", "rle": BRUSH}, original_width=8, original_height=6)
    (row,) = rows(source_of(folder, [task("b.jpg", [one])], frame="stored"))
    assert [row[edge] for edge in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx([2 / 8, 1 / 6, 6 / 8, 4 / 6])
    assert (decode_segmentation(row["segmentation"], 8, 6) == mask).all()


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (BRUSH[:-6], "cut off"),
        (BRUSH[:3], "cut off"),
        ([0, 0, 0, 4, *BRUSH[4:]], "4 values of 8 bits"),
        ("x", "no list of bytes"),
    ],
)
def test_a_brush_mask_that_is_none_costs_itself(packed, says, folder):
    one = shape("brushlabels", {"format": "rle", "rle": packed}, original_width=8, original_height=6)
    bad, good = rows(source_of(folder, [task("a.jpg", [one, {**region(CAT), "id": "other"}])], frame="stored"))
    assert (bad["problem"], good["problem"]) == ("bad_row", None)
    assert says in bad["detail"]


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        ({"x": "a", "y": 1, "width": 2, "height": 2}, "bad_number", "`x` is 'a', no finite number"),
        ({"points": [[1, 2], [3, 4]]}, "bad_number", "expected [x, y] of three or more"),
        ({"points": [[1, 2], [3, 4], [5, None]]}, "bad_number", "`points` is None"),
        ({"x": 80, "y": 10, "width": 40, "height": 10}, "outside_photo", "x_max: 192, and the photo is 160 px wide"),
    ],
)
def test_a_region_that_cannot_be_read_costs_itself(value, reason, says, folder):
    bad, good = rows(source_of(folder, [task("a.jpg", [shape("labels", value), {**region(CAT), "id": "other"}])]))
    assert (bad["problem"], bad["row"], good["problem"], good["row"]) == (reason, 1, None, 2)
    assert says in bad["detail"]


def test_one_annotation_of_a_task_counts(folder):
    """Ground truth, else what was changed last; cancelled ones and predictions are not read, and each is told."""
    other = [region(TrueBox("dog", 0, 0, 50, 50))]
    new, old = {"updated_at": "2026-03-02T10:00:00Z"}, {"updated_at": "2026-03-01T10:00:00Z"}

    def annotated(*annotations: tuple[list, dict]) -> dict:
        made = [task("a.jpg", result, **more)["annotations"][0] for result, more in annotations]
        return {**task("a.jpg", []), "annotations": made}

    tasks = [
        annotated(([region(CAT)], new), (other, old)),
        annotated((other, new), ([region(CAT)], {**old, "ground_truth": True})),
        annotated(([region(CAT)], old), (other, {**new, "was_cancelled": True})),
        {**annotated(), "predictions": [{"result": other}]},
    ]
    source = source_of(folder, tasks)
    assert [row["label"] for row in rows(source)] == ["cat"] * 3
    assert source.read_notes()[:3] == [
        "boxes of other annotations of a task than the one that counts: 2",
        "annotations that were cancelled: 1; they are not read",
        "tasks with predictions alone: 1; these are not read",
    ]


def test_labels_of_a_region(folder):
    """Several are a box each; shape and label may be two entries of one region; lines and points are told, not read."""
    several = shape("rectanglelabels", {"x": 10, "y": 10, "width": 40, "height": 40})
    several["value"]["rectanglelabels"] = ["cat", "dog"]
    drawn = {**region(CAT), "id": "two", "type": "rectangle"}
    drawn["value"] = {key: value for key, value in drawn["value"].items() if key != "rectanglelabels"}
    named = {"id": "two", "type": "labels", "to_name": "image", "value": {**drawn["value"], "labels": ["bird"]}}
    point = {
        **region(CAT),
        "id": "three",
        "type": "keypointlabels",
        "value": {"x": 1, "y": 2, "width": 1, "keypointlabels": ["eye"]},
    }
    text = {"id": "four", "type": "textarea", "to_name": "image", "value": {"text": ["hello"]}}
    source = source_of(folder, [task("a.jpg", [several, drawn, named, point, text])])
    assert [row["label"] for row in rows(source)] == ["cat", "dog", "bird"]
    assert "regions that are no boxes (points, lines, texts): 2; they are not read" in source.read_notes()


def test_a_label_that_no_table_can_hold_costs_its_box(folder):
    """Half of a surrogate pair, which JSON may name, is no character."""
    odd = shape("rectanglelabels", {"x": 10, "y": 10, "width": 40, "height": 40})
    odd["value"]["rectanglelabels"] = ["\ud800"]
    found = rows(source_of(folder, [task("a.jpg", [odd, {**region(CAT), "id": "other"}])]))
    assert [(row["problem"], row["label"]) for row in found] == [("bad_row", None), (None, "cat")]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.jpg", "/data/upload/12/0a1b2c3d-a.jpg"),
        ("0a1b2c3d-a.jpg", "/data/upload/12/0a1b2c3d-a.jpg"),
        ("in/ä b.jpg", "/data/local-files/?d=photos/in/%C3%A4%20b.jpg"),
        ("in/a.jpg", "https://example.org/in/a.jpg"),
        ("in/a.jpg", "s3://bucket/in/a.jpg"),
        ("in/a.jpg", "in/a.jpg"),
    ],
)
def test_names_of_photos(file, name, tmp_path):
    photo(tmp_path / "photos" / file)
    source = source_of(tmp_path, [{**task("x", [region(CAT)]), "data": {"number": 5, "image": name}}])
    (row,) = [row for batch in source.read_photos() for row in batch.to_pylist()]
    assert (row["file_name"], row["width"], row["height"]) == (file, WIDTH, HEIGHT)
    assert [row["problem"] for row in rows(source)] == [None]


def test_a_photo_that_is_nowhere_costs_its_boxes(folder):
    found = rows(source_of(folder, [task("gone.jpg", [region(CAT)]), task("a.jpg", [region(CAT)])]))
    assert [row["problem"] for row in found] == ["unknown_photo", None]
    assert "no file 0a1b2c3d-gone.jpg is below" in found[0]["detail"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON in UTF-8 that can be read"),
        ('{"images": [], "annotations": [], "categories": []}', "this is COCO's format; set source.kind: coco"),
        ("[1, 2]", "expected a list of tasks"),
        ('[{"id": 1, "text": "hello", "label": []}]', "no task names an image"),
        ("[]", "no photo with boxes here"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(text, says, folder):
    with pytest.raises(InputError) as caught:
        source_of(folder, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
