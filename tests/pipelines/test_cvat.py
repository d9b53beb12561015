"""CVAT's XML as it comes: shapes, subsets, what is outside, and files of its other exports."""

from pathlib import Path

import numpy as np
import pytest

from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings
from pipelines.dataset.samples import decode_segmentation
from tests.format_files import HEIGHT, WIDTH, cvat_xml, photo, write

BOX = '<box label="cat" occluded="1" xtl="20.00" ytl="30.00" xbr="100.00" ybr="60.00" z_order="0"/>'


def source_of(folder: Path, text: str, **source: object) -> Source:
    write(folder / "annotations.xml", text)
    source = {"splits": ("train",), "validation_share": 0, "annotations": folder, "photos": folder / "images", **source}
    return open_source(BuildSettings(out=folder / "out", source={"kind": "cvat", **source}))


def one_image(folder: Path, shapes: str, more: str = "") -> Source:
    photo(folder / "images" / "a.jpg")
    return source_of(folder, cvat_xml(f'<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}" {more}>{shapes}</image>'))


def rows(source: Source) -> list[dict]:
    return [row for batch in source.read_boxes() for row in batch.to_pylist()]


def edges(row: dict) -> list[float]:
    return [row["x_min"] * WIDTH, row["y_min"] * HEIGHT, row["x_max"] * WIDTH, row["y_max"] * HEIGHT]


@pytest.mark.parametrize(
    ("shape", "found", "outline"),
    [
        (BOX, [20, 30, 100, 60], False),
        # Turned about its middle, clockwise.
        (BOX.replace("/>", ' rotation="90.00"/>'), [45, 5, 75, 85], False),
        (BOX.replace('xbr="100', 'rotation="45" xbr="40').replace("20.0", "0.0"), [0, 20.2513, 44.7487, 69.7487], False),
        ('<polygon label="cat" points="20.00,30.00;100.00,30.00;60.00,60.00"/>', [20, 30, 100, 60], True),
        ('<ellipse label="cat" cx="80.00" cy="60.00" rx="40.00" ry="10.00"/>', [40, 50, 120, 70], False),
        ('<ellipse label="cat" cx="80.00" cy="60.00" rx="40.00" ry="10.00" rotation="90.00"/>', [70, 20, 90, 100], False),
        ('<mask label="cat" rle="1, 2, 1, 0, 1, 3, 4" left="20" top="30" width="4" height="3"/>', [21, 30, 24, 32], True),
    ],
)  # fmt: skip
def test_shapes(shape, found, outline, tmp_path):
    (row,) = rows(one_image(tmp_path, shape))
    assert (row["problem"], row["label"]) == (None, "cat"), row["detail"]
    assert edges(row) == pytest.approx(found, abs=1e-3)
    assert bool(row["segmentation"]) == outline


def test_a_masks_px_are_row_by_row_and_begin_with_those_that_are_not_the_object(tmp_path):
    """As CVAT 2 writes them, the last run left out or not."""
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[30:33, 20:24] = [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    for runs in ("1, 2, 2, 3", "1, 2, 2, 3, 4", "1,2,2,3,4"):
        (row,) = rows(one_image(tmp_path, f'<mask label="x" rle="{runs}" left="20" top="30" width="4" height="3"/>'))
        assert (decode_segmentation(row["segmentation"], WIDTH, HEIGHT) == expected).all()


@pytest.mark.parametrize(
    ("shape", "reason", "says"),
    [
        (BOX.replace("20.00", "x"), "bad_number", "`xtl` of a box is 'x', no finite number"),
        (BOX.replace(' xtl="20.00"', ""), "bad_number", "`xtl` of a box is None"),
        (BOX.replace("100.00", "300.00"), "outside_photo", "x_max: 300, and the photo is 160 px wide"),
        ('<polygon label="x" points="1,2;3,4"/>', "bad_number", "expected x,y;x,y;x,y of three or more"),
        ('<mask label="x" rle="1, b" left="0" top="0" width="4" height="3"/>', "bad_number", "expected whole numbers"),
        (
            '<mask label="x" rle="1, 22" left="0" top="0" width="4" height="3"/>',
            "bad_number",
            "sums up to 23 px, its area is 4 x 3",
        ),
        ('<mask label="x" rle="12" left="0" top="0" width="4" height="3"/>', "empty_box", "a mask without a px"),
    ],
)
def test_a_shape_that_cannot_be_read_costs_itself(shape, reason, says, tmp_path):
    bad, good = rows(one_image(tmp_path, shape + BOX))
    assert (bad["problem"], bad["row"], good["problem"], good["row"]) == (reason, 1, None, 2)
    assert says in bad["detail"]


def test_flags_and_shapes_that_are_no_boxes(tmp_path):
    others = '<points label="x" points="1,2"/><polyline label="x" points="1,2;3,4"/><tag label="x"/><skeleton label="x"/>'
    source = one_image(
        tmp_path, BOX + others + BOX.replace('occluded="1"', 'occluded="0" outside="1"') + BOX.replace(' occluded="1"', "")
    )
    assert [(row["row"], row["is_occluded"]) for row in rows(source)] == [(1, 1), (7, -1)]
    (note,) = [note for note in source.read_notes() if "no boxes" in note]
    assert "1 box outside of its frame, 1 points, 1 polyline, 1 skeleton, 1 tag" in note


def test_subsets_are_splits_where_they_are_called_like_some(tmp_path):
    """In any case; others are divided by a hash. Files of subsets, as datumaro writes them, likewise."""
    images = ""
    for name, subset in (("a", "Train"), ("b", "VAL"), ("c", "test"), ("d", "batch 7")):
        photo(tmp_path / "images" / f"{name}.jpg")
        images += f'<image id="0" name="{name}.jpg" subset="{subset}" width="{WIDTH}" height="{HEIGHT}">{BOX}</image>'
    source = source_of(tmp_path, cvat_xml(images), splits=("train", "validation", "test"))
    found = {row["photo_id"]: row["split"] for row in rows(source)}
    assert found == {"a": "train", "b": "validation", "c": "test", "d": "train"}
    (tmp_path / "annotations.xml").unlink()
    for subset, name in (("train", "a"), ("val", "b")):
        image = f'<image id="0" name="{name}.jpg" width="{WIDTH}" height="{HEIGHT}">{BOX}</image>'
        write(tmp_path / f"{subset}.xml", cvat_xml(image))
    settings = {"kind": "cvat", "annotations": tmp_path, "photos": tmp_path / "images"}
    source = open_source(BuildSettings(out=tmp_path / "out", source=settings))
    assert {row["photo_id"]: row["split"] for row in rows(source)} == {"a": "train", "b": "validation"}


def test_an_image_without_a_size_is_measured(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    (row,) = rows(source_of(tmp_path, cvat_xml(f'<image name="a.jpg">{BOX}</image>')))
    assert edges(row) == pytest.approx([20, 30, 100, 60])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<annotation/>", "begins with <annotation>, expected CVAT's <annotations> (VOC's XML: source.kind: voc)"),
        (cvat_xml("<track id='0' label='cat'/>"), "`CVAT for video`; export `CVAT for images`"),
        (cvat_xml("<image"), "is no XML that can be read"),
        ("<!DOCTYPE annotations><annotations/>", "declares a document type"),
        (cvat_xml(""), "no photo with boxes here"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(text, says, tmp_path):
    with pytest.raises(InputError) as caught:
        source_of(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
