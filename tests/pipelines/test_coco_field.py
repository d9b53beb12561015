"""COCO as the field's tools write it: every box is read, none is read wrong, and what is no box says so."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.annotations.object_masks import compress_mask
from pipelines.config import BuildSettings, ReferenceSettings, SelectionSettings, SourceSettings
from pipelines.selection.objects import Selection, select_objects
from pipelines.selection.rules import below
from tests.coco_files import CATEGORIES, annotation, boxes_of, image, opened, photos_of, without, write

POLYGON = [4, 5, 24, 5, 24, 15, 4, 15]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "boxes.json"


def settings_of(file: Path, photos: Path, **source: Any) -> BuildSettings:
    return BuildSettings(
        out=file.parent / "out",
        source=SourceSettings(kind="coco", annotations=file, photos=photos, **source),
        selection=SelectionSettings(reject_flags=("group_of",)),
    )


def photo(path: Path, width: int = 40, height: int = 20, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), (90, 120, 30)).save(path, exif=exif)
    return path


def sound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert [row["problem"] for row in rows] == [None] * len(rows), rows
    return rows


# Ids and flags.


@pytest.mark.parametrize(("image_id", "category_id"), [("7", "3"), (7.0, 3.0), (" 7 ", "3.0"), (7, " 3")])
def test_an_id_may_be_text_on_either_side(file, image_id, category_id):
    categories = [{"id": "1", "name": "person"}, {"id": "3", "name": "car", "supercategory": "vehicle"}]
    for images, classes in (([image(7)], categories), ([image("7")], CATEGORIES)):
        source = opened(write(file, [annotation(1, image_id=image_id, category_id=category_id)], images, classes))
        (row,) = sound(boxes_of(source))
        assert (row["photo_id"], row["label"], source.class_names[row["label"]]) == ("7", "3", "car")
        assert below(["vehicle"], source, "include_labels") == {"supercategory:vehicle", "3"} | ({"6"} & set(source.class_names))


@pytest.mark.parametrize("missing", ["absent", None, "", float("nan"), [1]])
def test_an_annotation_needs_no_id(file, missing):
    """It is known by its place in the list."""
    nameless = without(annotation(1), "id") if missing == "absent" else annotation(missing)
    rows = sound(boxes_of(opened(write(file, [nameless, nameless, annotation(1)]))))
    assert [row["row"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("said", "flag"),
    [
        (None, -1), ("", -1), (" ", -1), (float("nan"), -1), (-1, -1),
        ("0", 0), (0.0, 0), (False, 0), ("1", 1), (1.0, 1), (True, 1),
    ],
)  # fmt: skip
def test_iscrowd_as_tools_write_it(file, said, flag):
    (row,) = sound(boxes_of(opened(write(file, [annotation(1, iscrowd=said)]))))
    assert row["is_group_of"] == flag


@pytest.mark.parametrize("missing", ["absent", None, "", float("nan")])
def test_a_box_without_a_category_is_an_object(file, missing):
    one = without(annotation(1), "category_id") if missing == "absent" else annotation(1, category_id=missing)
    source = opened(write(file, [one, annotation(2)]))
    assert [row["label"] for row in sound(boxes_of(source))] == ["object", "3"]
    assert source.class_names["object"] == "object"
    assert source.read_notes() == ["boxes without a category are of the class `object`"]
    assert "object" not in opened(write(file, [annotation(2)])).class_names


@pytest.mark.parametrize("categories", ["absent", None, []])
def test_a_file_without_categories_has_one_class(file, categories):
    path = write(file, [annotation(1), annotation(2, category_id=9)], categories=categories)
    if categories == "absent":
        path.write_text(json.dumps(without(json.loads(path.read_text()), "categories")))
    source = opened(path)
    assert {row["label"] for row in sound(boxes_of(source))} == {"object"}
    assert source.class_names == {"object": "object"}
    assert source.read_notes() == ["there are no `categories`: all boxes are of the class `object`"]


def test_categories_as_tools_write_them(file):
    """Without a supercategory, with `none`, with digits for a name, with an id for all of a name, or twice alike."""
    categories = [
        {"id": 0, "name": "fruit-set", "supercategory": "none"},
        {"id": 1, "name": " apple ", "supercategory": "fruit-set", "synset": "apple.n.01", "frequency": "f"},
        {"id": 2, "name": 7, "supercategory": ""},
        {"id": 3, "supercategory": None},
        {"id": 1, "name": "apple"},
    ]
    source = opened(write(file, [annotation(1)], categories=categories))
    assert source.class_names == {"0": "fruit-set", "1": "apple", "2": "7", "3": "3"}
    categories.pop()
    assert opened(write(file, [annotation(1)], categories=categories)).subclasses == {"0": ("1",)}


@pytest.mark.parametrize("image_id", ["p1.jpg", "sub/ä 1.png", "5f2c-aa", "x" * 80])
def test_an_images_id_may_be_a_files_name(file, image_id):
    source = opened(write(file, [annotation(1, image_id=image_id)], [image(1, id=image_id)]))
    (row,), (listed,) = sound(boxes_of(source)), photos_of(source)
    assert re.fullmatch("[A-Za-z0-9_-]{1,64}", row["photo_id"])
    assert row["photo_id"] == listed["photo_id"] == {"p1.jpg": "p1", "5f2c-aa": "5f2c-aa"}.get(image_id, row["photo_id"])


def test_an_annotation_may_name_its_photo_by_the_files_name(file):
    annotations = [annotation(1, image_id="a.jpg"), annotation(2, image_id="b.jpg")]
    images = [image(1, file_name="a.jpg"), image(2, file_name="b.jpg"), image(3, file_name="b.jpg")]
    write(file, annotations, images)
    # b.jpg is of two images: one photo, or, where they are kept apart, nobody knows which.
    for choice, second in (("drop", ("2", None)), ("report", ("b", "unknown_photo"))):
        rows = boxes_of(opened(file, same_photo=choice))
        assert [(row["photo_id"], row["problem"]) for row in rows] == [("1", None), second]


# Boxes and outlines.


@pytest.mark.parametrize("box", [["4", "5", "20", "10"], [4.0, 5, 20.0, 10], ["4.0", " 5 ", "2e1", "10"]])
def test_numbers_may_be_text(file, box):
    (row,) = sound(boxes_of(opened(write(file, [annotation(1, bbox=box)]))))
    assert (row["x_min"], row["x_max"], row["y_min"], row["y_max"]) == (0.1, 0.6, 0.25, 0.75)


@pytest.mark.parametrize(
    "outline",
    [
        [POLYGON],
        POLYGON,  # One flat list, as VIA writes it.
        [POLYGON, [6, 6, 7, 7]],  # A sliver of two points, as mask tracing leaves it.
        [[5, 5], POLYGON, []],
    ],
)
def test_outlines_as_tools_write_them(file, outline):
    (row,) = sound(boxes_of(opened(write(file, [annotation(1, segmentation=outline)]))))
    decoded = coco_mask.decode({"size": [20, 40], "counts": row["segmentation"]})
    assert decoded.sum() == decoded[5:15, 4:24].sum() == 200


@pytest.mark.parametrize("nothing", [[[4, 5, 24, 15]], [4, 5], "", [[], []], None, {}])
def test_points_and_lines_are_no_object_mask(file, nothing):
    """Of four numbers pycocotools would make a box."""
    source = opened(write(file, [annotation(1, segmentation=nothing)]))
    (row,) = sound(boxes_of(source))
    assert (row["segmentation"], source.read_notes()) == (None, [])


def test_what_was_found_is_said_where_the_plan_is_printed(file, tmp_path):
    """And that references cannot be cut out, where this was asked for."""
    annotations = [annotation(1, segmentation=[POLYGON]), annotation(2, bbox=[1, 1, 30, 15], segmentation=[[1, 2, 3]])]
    settings = settings_of(write(file, annotations), tmp_path).model_copy(
        update={"references": ReferenceSettings(background="grey")}
    )
    selection = select_objects(settings, tmp_path / "out")
    assert isinstance(selection, Selection)
    assert (selection.objects, selection.objects_with_outline) == (2, 1)
    first, *others = selection.notes
    assert first.startswith(
        "outlines that cannot be used: 1; their boxes are taken without one; for example boxes.json, annotation 2"
    )
    assert any(note.startswith("1 of 2 objects have no outline: references.background: grey leaves") for note in others)


def test_other_keys_and_line_ends_do_not_matter(file):
    """Key points, areas that are missing or no number, and what other tools add; CRLF and a byte order mark."""
    more = {
        "keypoints": [1, 2, 2],
        "num_keypoints": 1,
        "area": float("nan"),
        "iscrowd": None,
        "attributes": {"occluded": False},
        "isfake": 0,
    }
    path = write(file, [annotation(1, **more)], [image(7, date_captured=0, license=None, extra={"a": [1]})], info=None)
    text = json.dumps(json.loads(path.read_text()), indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    sound(boxes_of(opened(path)))


def test_annotations_may_be_null(file):
    assert boxes_of(opened(write(file, None))) == []


def test_an_image_that_stands_twice_is_one_photo_if_only_its_size_is_rounded(file):
    source = opened(write(file, [annotation(1)], [image(7), image(7, width=40.004, height=21, license=3)]))
    assert [(row["width"], row["height"]) for row in photos_of(source)] == [(40, 20)]


# Sizes.


@pytest.mark.parametrize("said", [{}, {"width": None, "height": None}, {"width": -1, "height": -1}, {"width": 0, "height": "x"}])
def test_a_size_that_is_not_given_is_read_from_the_photo(file, tmp_path, said):
    photo(tmp_path / "photos" / "7.jpg", 80, 50)
    bare = {"id": 7, "file_name": "7.jpg", **said}
    source = opened(write(file, [annotation(1, segmentation=[POLYGON])], [bare]), tmp_path / "photos")
    (row,), (listed,) = sound(boxes_of(source)), photos_of(source)
    assert (row["x_min"], row["y_max"]) == (4 / 80, 15 / 50)
    assert (listed["width"], listed["height"]) == (80, 50)
    assert compress_mask([POLYGON], 80, 50) == row["segmentation"]
    assert len(source.read_elsewhere()) == 1, "the boxes depend on the photo's header, so the plan's fingerprint does"


@pytest.mark.parametrize("said", [("40", "20"), (40.0, 20.0), (39.9999, 20.00001)])
def test_a_size_may_be_text_or_rounded(file, said):
    source = opened(write(file, [annotation(1)], [image(7, width=said[0], height=said[1])]))
    sound(boxes_of(source))
    assert [(row["width"], row["height"]) for row in photos_of(source)] == [(40, 20)]
    assert source.read_elsewhere() == {}, "nothing depends on the photos: a plan without them is the same"


def test_sizes_of_photos_that_are_still_to_be_fetched_must_be_given(file, tmp_path):
    """A plan that changed when photos come would be refused in the middle of a build."""
    photo(tmp_path / "photos" / "7.jpg")
    path = write(file, [annotation(1), annotation(2, image_id=8)], [image(7, width=None), image(8)])
    crawl = {"sources": (str(tmp_path / "photos"),)}
    settings = settings_of(path, tmp_path / "store").model_copy(
        update={"crawl": BuildSettings.model_fields["crawl"].default.model_copy(update=crawl)}
    )
    rows = boxes_of(open_source(settings))
    assert [row["problem"] for row in rows] == ["unknown_photo", None]
    assert "write their sizes into the annotations" in rows[0]["detail"]


# Folders of several files.


def roboflow(place: Path, folder: str, count: int = 3) -> None:
    """As Roboflow exports: photos beside their file, both kinds of ids from 0, and a root that bears the dataset's name."""
    categories = [
        {"id": 0, "name": "things-x1yz", "supercategory": "none"},
        {"id": 1, "name": "ball", "supercategory": "things-x1yz"},
        {"id": 2, "name": "box", "supercategory": "things-x1yz"},
    ]
    images = [image(number, file_name=f"{folder}{number}_jpg.rf.0a{number}.jpg") for number in range(count)]
    annotations = [annotation(number, image_id=number, category_id=1 + number % 2) for number in range(count)]
    for entry in images:
        photo(place / folder / entry["file_name"])
    write(place / folder / "_annotations.coco.json", annotations, images, categories)


def test_roboflows_folder_is_one_dataset_with_its_splits(tmp_path):
    for folder in ("train", "valid", "test"):
        roboflow(tmp_path, folder)
    source = opened(tmp_path, tmp_path, splits=("train", "validation", "test"))
    rows, listed = sound(boxes_of(source)), photos_of(source)
    assert [row["split"] for row in rows] == ["train"] * 3 + ["validation"] * 3 + ["test"] * 3
    assert len({row["photo_id"] for row in rows}) == 9
    assert {row["photo_id"] for row in rows} == {row["photo_id"] for row in listed}
    assert all((tmp_path / row["file_name"]).is_file() for row in listed)
    assert below(["things-x1yz"], source, "include_labels") == {"0", "1", "2"}
    held_out = {(row["photo_id"], row["file_name"]) for row in listed if row["split"] == "validation"}
    for alone in (
        opened(tmp_path / "valid" / "_annotations.coco.json", tmp_path),
        opened(tmp_path, tmp_path, splits=("validation",)),
    ):
        assert {(row["photo_id"], row["file_name"]) for row in photos_of(alone)} == held_out, "whatever else is read"


def test_a_split_that_roboflow_did_not_export_is_named(tmp_path):
    roboflow(tmp_path, "train")
    with pytest.raises(InputError, match=r"no file valid/_annotations.coco.json .*take `validation` out of build.source.splits"):
        opened(tmp_path, tmp_path)
    assert len(boxes_of(opened(tmp_path, tmp_path, splits=("train",)))) == 3


def test_files_that_number_their_images_anew_hold_different_photos(tmp_path):
    """Ids come from paths then, and from the split where all photos lie in one folder."""
    write(tmp_path / "instances_train.json", [annotation(1, image_id=1)], [image(1, file_name="a.jpg")])
    write(tmp_path / "instances_val.json", [annotation(1, image_id=1)], [image(1, file_name="b.jpg")])
    flat = sound(boxes_of(opened(tmp_path)))
    assert [row["photo_id"].rpartition("-")[0] for row in flat] == ["train-a", "validation-b"]
    for folder, name in (("train", "a.jpg"), ("val", "b.jpg")):
        photo(tmp_path / "photos" / folder / name)
    source = opened(tmp_path, tmp_path / "photos")
    assert [row["file_name"] for row in photos_of(source)] == ["train/a.jpg", "val/b.jpg"]
    assert [row["photo_id"].rpartition("-")[0] for row in sound(boxes_of(source))] == ["train-a", "val-b"]


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("lvis_v1_train.json", "lvis_v1_val.json"), ("lvis_v1_image_info_test_dev.json",)),
        (("zhiyuan_objv2_train.json", "zhiyuan_objv2_val.json.gz"), ()),
        (("train2014.json", "valid.json"), ("captions_train2014.json", "person_keypoints_val2014.json", "cat.json")),
    ],
)
def test_a_folder_of_other_names_is_read_by_the_splits_word(tmp_path, names, others):
    for number, name in enumerate(names):
        path = write(tmp_path / name, [annotation(1, image_id=number)], [image(number)])
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    for name in others:
        (tmp_path / name).write_text("no JSON at all")
    assert [(row["split"], row["photo_id"]) for row in boxes_of(opened(tmp_path))] == [("train", "0"), ("validation", "1")]
    (tmp_path / "old_train.json").write_text("{}")
    with pytest.raises(InputError, match=r"are both \*train\*.json, the split train; leave one of them in this folder"):
        opened(tmp_path)


# Names of files.


def test_lvis_names_its_photos_by_their_url(file, tmp_path):
    """Where photos lie as COCO's archives unpack, and where one of its folders is the photo folder."""
    bare = without(
        image(7, coco_url="http://images.cocodataset.org/train2017/000000000007.jpg", flickr_url="http://f/x.jpg"), "file_name"
    )
    path = write(file, [without(annotation(1), "iscrowd")], [bare])
    assert photos_of(opened(path))[0]["file_name"] == "train2017/000000000007.jpg"
    photo(tmp_path / "coco" / "train2017" / "000000000007.jpg")
    for folder, name in (("coco", "train2017/000000000007.jpg"), ("coco/train2017", "000000000007.jpg")):
        source = opened(path, tmp_path / folder)
        sound(boxes_of(source))
        assert photos_of(source)[0]["file_name"] == name
        assert photos_of(source)[0]["url"] == bare["coco_url"]


@pytest.mark.parametrize("key", ["filename", "path"])
def test_the_name_may_stand_in_another_key(file, key):
    bare = without(image(7), "file_name")
    source = opened(write(file, [annotation(1)], [{**bare, key: "a\\b.jpg", "file_name": None}]))
    sound(boxes_of(source))
    assert photos_of(source)[0]["file_name"] == "a/b.jpg"


def test_an_absolute_name_that_leads_nowhere_costs_its_photo_and_says_the_way_out(file, tmp_path):
    photo(tmp_path / "photos" / "a" / "1.jpg")
    images = [image(7, file_name="C:\\set\\1.jpg"), image(8, file_name="/data/2.jpg")]
    source = opened(write(file, [annotation(1), annotation(2, image_id=8)], images), tmp_path / "photos")
    first, second = boxes_of(source)
    assert first["problem"] is None
    assert photos_of(source)[0]["file_name"] == "a/1.jpg"
    assert second["problem"] == "bad_row"
    assert second["detail"].startswith("annotation 2 (id 2): its image, id 8, has `file_name` '/data/2.jpg', which is absolute")
    assert source.read_notes() == ["photos that were found by their base names: 1; for example C:/set/1.jpg as a/1.jpg"]
    assert len(source.read_elsewhere()) == 1


def test_a_whole_selection_of_what_a_tool_on_windows_wrote(tmp_path):
    """result.json says images\\p1.jpg, and the photo folder is that folder itself; no sizes, ids as text, flat outlines."""
    photo(tmp_path / "images" / "p1.jpg", 60, 40)
    bare = {"id": "1", "file_name": "images\\p1.jpg"}
    box = {"image_id": "1", "category_id": "3", "bbox": [6, 4, 30, 20], "segmentation": [6, 4, 36, 4, 36, 24, 6, 24]}
    path = write(tmp_path / "result.json", [box], [bare])
    select_objects(settings_of(path, tmp_path / "images", validation_share=0.0), tmp_path / "out")
    (row,) = pq.read_table(tmp_path / "out" / "objects.parquet").to_pylist()
    assert (row["file_name"], row["width"], row["height"], row["label_name"]) == ("p1.jpg", 60, 40, "car")
    assert np.allclose([row["x_min"], row["y_min"], row["x_max"], row["y_max"]], [0.1, 0.1, 0.6, 0.6])


# Several images of one file: one photo, which has the boxes of all of them.


def select(annotations: Path, photos: Path, **source: Any) -> tuple[Selection, list[dict], list[dict], list[dict]]:
    """What the stage found; objects, rejects, and photos that are there under another id."""
    out = photos.parent / "out"
    settings = BuildSettings(
        out=out,
        source=SourceSettings(kind="coco", annotations=annotations, photos=photos, **source),
        selection=SelectionSettings(reject_flags=("group_of",)),
    )
    selection = select_objects(settings, out)
    assert selection.boxes == selection.objects + sum(selection.rejects.values())
    tables = [pq.read_table(out / f"{name}.parquet").to_pylist() for name in ("objects", "rejects", "same_photos")]
    return selection, *tables


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def test_images_of_one_file_are_one_photo_with_the_boxes_of_all(tmp_path, photos):
    """However the name is written; the shortest and smallest id is kept, whatever the order."""
    images = [image(10, file_name="./a/x.jpg"), image(2, file_name="a\\x.jpg"), image(3, file_name="a/x.jpg"), image(4)]
    annotations = [annotation(number, image_id=number, bbox=[number, 2, 12, 12]) for number in (10, 2, 3, 4)]
    for order in (images, images[::-1]):
        file = write(tmp_path / "boxes.json", annotations, order)
        assert [(row["photo_id"], row["x_min"]) for row in boxes_of(opened(file))] == [
            ("2", 10 / 40), ("2", 2 / 40), ("2", 3 / 40), ("4", 4 / 40),
        ]  # fmt: skip
        assert {row["photo_id"] for row in photos_of(opened(file))} == {"2", "4"}
        selection, objects, rejects, same = select(file, photos, splits=("train",), validation_share=0)
        assert sorted((row["photo_id"], round(row["x_min"] * 40)) for row in objects) == [("2", 2), ("2", 3), ("2", 10), ("4", 4)]
        assert not rejects
        assert [(row["photo_id"], row["kept_photo_id"], row["by"]) for row in same] == [
            ("10", "2", "file_name"), ("3", "2", "file_name"),
        ]  # fmt: skip
        assert selection.same_photos == {"file_name": 2, "across_splits": 0}
        assert any("the boxes of both are those of one photo, for example of images 2 and" in note for note in selection.notes)


def test_no_file_is_in_two_splits(tmp_path, photos):
    images = [image(number, file_name=f"{number % 20}.jpg") for number in range(60)]
    annotations = [annotation(number, image_id=number, bbox=[number % 7, 2, 12, 12]) for number in range(60)]
    file = write(tmp_path / "boxes.json", annotations, images)
    _, objects, rejects, same = select(file, photos, validation_share=0.3)
    splits = {
        name: {row["split"] for row in objects if row["file_name"] == name} for name in {row["file_name"] for row in objects}
    }
    assert len(splits) == 20
    assert all(len(own) == 1 for own in splits.values())
    assert {split for own in splits.values() for split in own} == {"train", "validation"}
    assert len(same) == 40
    assert len(objects) + len(rejects) == 60

    _, objects, rejects, same = select(file, photos, validation_share=0.3, same_photo="report")
    assert (len(objects), len(rejects), len(same)) == (60, 0, 40), "all are kept, and told"
    assert len({row["photo_id"] for row in objects}) == 60


def test_a_box_of_two_images_of_one_file_is_a_duplicate_of_itself(tmp_path, photos):
    """As tools write that give each annotator's work an image of its own."""
    images = [image(1, file_name="x.jpg"), image(2, file_name="x.jpg")]
    file = write(tmp_path / "boxes.json", [annotation(1, image_id=1), annotation(2, image_id=2)], images)
    selection, objects, _, _ = select(file, photos, splits=("train",), validation_share=0)
    assert (len(objects), selection.rejects) == (1, {"duplicate": 1})


@pytest.mark.parametrize("one_file", [True, False])
def test_a_file_of_both_jsons_is_held_out(tmp_path, photos, one_file):
    """Where it lies in the photo folder; a folder for each split holds two files of this name."""
    for place in ("",) if one_file else ("train", "validation"):
        (photos / place).mkdir(exist_ok=True)
        (photos / place / "x.jpg").write_bytes(b"")
    for number, word in enumerate(("train", "val"), 1):
        entries = [image(number, file_name="x.jpg"), image(number + 10)]
        own = [annotation(each["id"], image_id=each["id"]) for each in entries]
        write(tmp_path / "annotations" / f"instances_{word}.json", own, entries)
    _, objects, rejects, same = select(tmp_path / "annotations", photos)
    dropped = [("train", "1", "2")] if one_file else []
    assert [(row["split"], row["photo_id"], row["kept_photo_id"]) for row in same] == dropped
    assert [(row["split"], row["photo_id"], row["reason"]) for row in rejects] == [(*one[:2], "same_photo") for one in dropped]
    assert len(objects) == 4 - len(dropped)
