"""Pascal VOC's files as they come: where px count from, flags, photos under other names, masks that do not fit, odd XML."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.annotations.voc import _colours
from pipelines.annotations.xml_file import read_xml
from pipelines.config import BuildSettings
from pipelines.dataset.samples import decode_segmentation
from tests.format_files import HEIGHT, WIDTH, photo, write

SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
BOX = "<bndbox><xmin>20</xmin><ymin>30</ymin><xmax>100</xmax><ymax>60</ymax></bndbox>"
CAT = f"<object><name>cat</name>{BOX}</object>"


def source_of(folder: Path, photos: Path | None = None, **source: object) -> Source:
    source = {"splits": ("train",), "kind": "voc", "annotations": folder, "photos": photos or folder, **source}
    return open_source(BuildSettings(out=folder / "out", source=source))


def rows(source: Source) -> list[dict]:
    return [row for batch in source.read_boxes() for row in batch.to_pylist()]


def one_file(folder: Path, objects: str, size: str = SIZE, database: str = "Unknown", name: str = "a.jpg") -> Source:
    """A photo a.jpg and its XML."""
    photo(folder / "a.jpg")
    more = f"<filename>{name}</filename><source><database>{database}</database></source>"
    write(folder / "a.xml", f"<annotation>{more}{size}{objects}</annotation>")
    return source_of(folder, validation_share=0)


def edges(row: dict) -> list[float]:
    return [row["x_min"] * WIDTH, row["y_min"] * HEIGHT, row["x_max"] * WIDTH, row["y_max"] * HEIGHT]


@pytest.mark.parametrize(
    ("database", "left", "top"),
    [
        ("The VOC2007 Database", 19, 29), ("The VOC2012 Database", 19, 29), ("PASCAL VOC2010", 19, 29),
        ("Unknown", 20, 30), ("MyDatabase", 20, 30), ("roboflow.com", 20, 30), ("", 20, 30),
    ],
)  # fmt: skip
def test_px_count_from_one_where_the_file_is_vocs_own(database, left, top, tmp_path):
    """The devkit's: px 1 to 160 are all. Its xmax is the right edge then, as it is where edges count from 0."""
    source = one_file(tmp_path, CAT, database=database)
    (row,) = rows(source)
    assert edges(row) == pytest.approx([left, top, 100, 60])
    assert any("counted from 1: 1" in note for note in source.read_notes()) == (left == 19)


@pytest.mark.parametrize(
    "size", ["", "<size><width>0</width><height>0</height></size>", "<size><width/><height>9</height></size>"]
)
def test_a_size_that_is_missing_is_the_photos(size, tmp_path):
    (row,) = rows(one_file(tmp_path, CAT, size))
    assert edges(row) == pytest.approx([20, 30, 100, 60])


def test_flags(tmp_path):
    """Truncated and occluded are flags, if they are said; difficult is told in a note."""
    said = "<pose>Left</pose><truncated>1</truncated><occluded>0</occluded><difficult>1</difficult>"
    unsaid = "<truncated>Unspecified</truncated>"
    source = one_file(tmp_path, "".join(f"<object><name>x</name>{more}{BOX}</object>" for more in (said, unsaid)))
    found = [(row["is_truncated"], row["is_occluded"], row["is_group_of"]) for row in rows(source)]
    assert found == [(1, 0, -1), (-1, -1, -1)]
    assert any("marked as difficult: 1" in note for note in source.read_notes())


@pytest.mark.parametrize(
    ("objects", "reason", "says"),
    [
        (f"<object>{BOX}</object>", "bad_row", "object 1 has no <name>"),
        ("<object><name>x</name></object>", "bad_row", "an object without <bndbox>"),
        (CAT.replace("20", "2o"), "bad_number", "<xmin> is '2o', no finite number"),
        (CAT.replace("<xmax>100</xmax>", ""), "bad_number", "<xmax> is empty or missing"),
        (CAT.replace("100", "400"), "outside_photo", "x_max: 400, and the photo is 160 px wide"),
        (CAT.replace("100", "20"), "empty_box", "x_max: 20, not more than x_min, 20"),
    ],
)
def test_an_object_that_cannot_be_read_costs_itself(objects, reason, says, tmp_path):
    bad, good = rows(one_file(tmp_path, objects + CAT))
    assert (bad["problem"], bad["file"], bad["row"]) == (reason, "a.xml", 1)
    assert says in bad["detail"]
    assert (good["problem"], good["row"], good["label"]) == (None, 2, "cat")


def test_parts_of_an_object_are_no_objects_and_turned_boxes_and_outlines_are(tmp_path):
    part = f"<object><name>person</name>{BOX}<part><name>head</name>{BOX}</part></object>"
    turned = (
        "<object><name>x</name><robndbox><cx>80</cx><cy>60</cy><w>40</w><h>20</h><angle>1.5707963</angle></robndbox></object>"
    )
    outline = (
        "<object><name>y</name><polygon><x1>20</x1><y1>30</y1><x2>100</x2><y2>30</y2><x3>60</x3><y3>60</y3></polygon></object>"
    )
    found = rows(one_file(tmp_path, part + turned + outline))
    assert [row["label"] for row in found] == ["person", "x", "y"]
    assert edges(found[1]) == pytest.approx([70, 40, 90, 80], abs=1e-3)
    assert edges(found[2]) == pytest.approx([20, 30, 100, 60])
    assert [bool(row["segmentation"]) for row in found] == [False, False, True]


def test_photos_under_other_names_than_the_xml_says(tmp_path):
    """By what the XML says, then by the XML's own name, then by its path; a photo that is nowhere costs its boxes."""
    for file in ("photos/right.png", "photos/a b/deep.jpg", "photos/renamed.jpg"):
        photo(tmp_path / file)
    said = {"one": "right.png", "renamed": "old.bmp", "two": "../../a b/deep.jpg", "gone": "gone.jpg"}
    for stem, name in said.items():
        write(tmp_path / "xml" / f"{stem}.xml", f"<annotation><filename>{name}</filename>{SIZE}{CAT}</annotation>")
    source = source_of(tmp_path / "xml", tmp_path / "photos", validation_share=0)
    found = {row["photo_id"]: row["file_name"] for batch in source.read_photos() for row in batch.to_pylist()}
    assert sorted(found.values()) == ["renamed.jpg", "right.png"]
    problems = {row["file"]: row["problem"] for row in rows(source)}
    assert problems == {"one.xml": None, "renamed.xml": None, "gone.xml": "unknown_photo", "two.xml": "bad_row"}


def test_a_mask_that_is_not_the_boxs_or_not_of_the_photo_is_left_out(tmp_path):
    """Datumaro numbers objects of the PNG otherwise than those of the XML, and writes colours: each mask must lie in its box."""
    root = tmp_path / "VOC"
    second = CAT.replace("20", "110").replace("100", "150")
    for name in ("a", "b", "c"):
        photo(root / "JPEGImages" / f"{name}.jpg")
        write(
            root / "Annotations" / f"{name}.xml", f"<annotation><filename>{name}.jpg</filename>{SIZE}{CAT}{second}</annotation>"
        )
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[30:60, 20:90] = 1
    numbers[30:60, 112:150] = 2
    numbers[30, 20:100] = 255
    masks = root / "SegmentationObject"
    masks.mkdir()
    colours = np.array([[code >> 16, code >> 8 & 255, code & 255] for code in _colours()], np.uint8)
    Image.fromarray(colours[numbers]).save(masks / "a.png")
    swapped = np.array([0, 2, 1], np.uint8)[np.where(numbers == 255, 0, numbers)]
    Image.fromarray(swapped).save(masks / "b.png")
    Image.fromarray(numbers[:-1]).save(masks / "c.png")
    source = source_of(root, validation_share=0)
    found = rows(source)
    assert [row["problem"] for row in found] == [None] * 6
    assert [bool(row["segmentation"]) for row in found] == [True, True, False, False, False, False]
    assert (decode_segmentation(found[0]["segmentation"], WIDTH, HEIGHT) == (numbers == 1)).all()
    (note,) = [note for note in source.read_notes() if "outlines that cannot be used: 4" in note]
    assert "lies outside its box" in note


def test_vocs_colours():
    """The first ones, as the devkit's page shows them."""
    assert [f"{code:06x}" for code in _colours()[:6]] == ["000000", "800000", "008000", "808000", "000080", "800080"]
    assert f"{_colours()[255]:06x}" == "e0e0c0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<annotation><object>", "is no XML that can be read"),
        ("<!DOCTYPE annotation [<!ENTITY a 'b'>]><annotation>&a;</annotation>", "declares a document type"),
        ("<a>" * 60 + "</a>" * 60, "more than 50 deep"),
        ("", "is no XML that can be read"),
        ("<?xml version='1.0' encoding='none'?><annotation/>", "is no XML that can be read"),
    ],
)
def test_xml_that_is_none_is_a_reject_and_opens_nothing(text, says, tmp_path):
    write(tmp_path / "bad.xml", text)
    with pytest.raises(ValueError, match=says):
        read_xml(tmp_path / "bad.xml")
    one_file(tmp_path, CAT)
    write(tmp_path / "other.xml", "<svg/>")
    bad = {row["file"]: row for row in rows(source_of(tmp_path, validation_share=0))}
    assert "begins with <svg>, expected <annotation>" in bad["other.xml"]["detail"]
    assert bad["a.xml"]["problem"] is None
    assert (bad["bad.xml"]["problem"], says in bad["bad.xml"]["detail"]) == ("bad_row", True)


def test_lists_say_which_photos_a_split_has(tmp_path):
    """Ids with a number behind them and in quotes; XML in no list is told; a list that is missing where another is there."""
    for name in ("a b", "c", "d"):
        photo(tmp_path / "JPEGImages" / f"{name}.jpg")
        write(tmp_path / "Annotations" / f"{name}.xml", f"<annotation><filename>{name}.jpg</filename>{SIZE}{CAT}</annotation>")
    photo(tmp_path / "JPEGImages" / "empty.jpg")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", '"a b"\nc  -1\nempty\n')
    source = source_of(tmp_path)
    names = [row["file_name"] for batch in source.read_photos() for row in batch.to_pylist()]
    assert names == ["JPEGImages/a b.jpg", "JPEGImages/c.jpg", "JPEGImages/empty.jpg"]
    assert len(rows(source)) == 2
    assert any("1 annotation file in no list" in note for note in source.notes)
    with pytest.raises(InputError, match=r"val.txt: no such list for the split validation"):
        source_of(tmp_path, splits=("train", "validation"))


def test_two_years_in_one_folder_are_two_datasets(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write(tmp_path / year / "Annotations" / "a.xml", "<annotation/>")
    with pytest.raises(InputError, match="VOC2007, VOC2012 are datasets of their own"):
        source_of(tmp_path)
