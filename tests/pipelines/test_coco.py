"""COCO as COCO and the field's tools write it: every box is read, none is read wrong, and what is no box says so."""

import gzip
import json
import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.rle import decode_counts, decode_pixels
from pipelines.annotations import coco, coco_file, open_source
from pipelines.annotations.coco_file import MAX_OUTLINE, compress_mask
from pipelines.annotations.source import assign_splits
from pipelines.config import BuildSettings, CrawlSettings, ReferenceSettings, SelectionSettings, SourceSettings
from pipelines.selection.objects import Selection, select_objects
from pipelines.selection.rules import below
from tests.coco_files import CATEGORIES, annotation, boxes_of, image, opened, photos_of, write

POLYGON = [4, 5, 24, 5, 24, 15, 4, 15]
NAN = float("nan")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "boxes.json"


def photo(path: Path, width: int = 40, height: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 30)).save(path)


def sound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert [row["problem"] for row in rows] == [None] * len(rows), rows
    return rows


PLAIN = {
    "photo_id": "7", "label": "3", "x_min": 0.1, "x_max": 0.6, "y_min": 0.25, "y_max": 0.75, "is_group_of": 0,
    "is_occluded": -1, "is_truncated": -1, "is_depiction": -1, "is_inside": -1, "segmentation": None,
    "split": "train", "file": "boxes.json", "row": 1, "problem": None, "detail": None, "group": None, "references": None,
}  # fmt: skip
MASK = compress_mask([POLYGON], 40, 20)


@pytest.mark.parametrize(
    ("box", "entry", "differs"),
    [
        ({}, {}, {}),
        # Ids are numbers or text on either side, and an annotation needs none.
        ({"image_id": "7", "category_id": "3"}, {}, {}),
        ({"image_id": 7.0, "category_id": 3.0}, {}, {}),
        ({"image_id": " 7 ", "category_id": "3.0"}, {"id": "7"}, {}),
        *[({"id": no_id}, {}, {}) for no_id in (..., None, "", NAN, [1])],
        *[({"image_id": name}, {"id": name}, {"photo_id": name[:5]}) for name in ("5f-aa", "photo.jpg")],
        ({"image_id": "a.jpg"}, {"file_name": "a.jpg"}, {}),  # Some tools write the file's name there.
        # A box without a category is an object.
        *[({"category_id": nothing}, {}, {"label": "object"}) for nothing in (..., None, "", NAN)],
        *[({"iscrowd": nothing}, {}, {"is_group_of": -1}) for nothing in (..., None, "", " ", NAN, -1)],
        *[({"iscrowd": no}, {}, {}) for no in ("0", 0.0, False)],
        *[({"iscrowd": yes}, {}, {"is_group_of": 1}) for yes in ("1", 1.0, True)],
        *[({"bbox": box}, {}, {}) for box in (["4", "5", "20", "10"], ["4.0", " 5 ", "2e1", 10.0])],
        # A px beyond the edge is rounding.
        ({"bbox": [-1, -0.5, 42, 21.5]}, {}, {"x_min": 0, "x_max": 1, "y_min": 0, "y_max": 1}),
        *[({}, {"width": width, "height": height}, {}) for width, height in (("40", "20"), (39.9999, 20.00001))],
        # Outlines: several polygons, one flat list, a sliver or point that mask tracing leaves; points alone are no mask.
        ({"segmentation": [POLYGON]}, {}, {"segmentation": MASK}),
        ({"segmentation": POLYGON}, {}, {"segmentation": MASK}),
        ({"segmentation": [POLYGON, [6, 6, 7, 7]]}, {}, {"segmentation": MASK}),
        ({"segmentation": [[5, 5], POLYGON, []]}, {}, {"segmentation": MASK}),
        *[({"segmentation": nothing}, {}, {}) for nothing in ([[4, 5, 24, 15]], [4, 5], "", [[], []], None, {})],
        # Other keys do not matter.
        ({"keypoints": [1, 2, 2], "area": NAN, "attributes": {"occluded": False}}, {"date_captured": 0, "license": None}, {}),
        # JSON can name half of a surrogate pair, no table can hold it.
        ({"id": "\ud800"}, {"coco_url": "\ud800"}, {}),
    ],
)  # fmt: skip
def test_an_annotation_becomes_a_row(file, box, entry, differs):
    source = opened(write(file, [annotation(1, **box)], [image(7, **entry)]))
    assert boxes_of(source) == [{**PLAIN, **differs}]
    (listed,) = photos_of(source)
    assert (listed["photo_id"], listed["width"], listed["height"]) == (differs.get("photo_id", "7"), 40, 20)
    assert source.read_elsewhere() == {}, "nothing depends on the photos: a plan without them is the same"
    assert source.read_notes() == (["boxes without a category are of the class `object`"] if "label" in differs else [])


def test_what_is_known_about_photos(file):
    """The file itself rather than its page; the licence's address; a photo without a box is there too, one without an id not."""
    licences = [{"id": 4, "url": "http://l/by", "name": "BY"}, {"url": "http://l/nobody"}]
    images = [
        image(7, license=4, coco_url="http://c/7.jpg", flickr_url="http://f/7"),
        image(8, license=9, flickr_url="http://f/8"),
    ]
    images += [image(9), image(9, width=40.004, height=21), image(1, id=...), "no object"]
    source = opened(write(file, [annotation(1)], images, licenses=licences))
    rows = {row["photo_id"]: row for row in photos_of(source)}
    assert [rows[name]["url"] for name in "789"] == ["http://c/7.jpg", "http://f/8", None]
    assert [rows[name]["licence"] for name in "789"] == ["http://l/by", None, None]
    assert (rows["9"]["file_name"], rows["9"]["width"], rows["9"]["height"]) == ("000000000009.jpg", 40, 20)
    assert (source.frame, source.rows, source.files) == ("stored", 1, (file,))


@pytest.mark.parametrize(
    ("wrong", "reason", "detail"),
    [
        (["a", "list"], "bad_row", r"annotation 2: is \['a', 'list'\]"),
        (annotation(5, image_id=...), "bad_row", r"annotation 2 \(id 5\): `image_id` is None"),
        (annotation(5, image_id=[7]), "bad_row", r"`image_id` is \[7\]"),
        (annotation(5, category_id=2.5), "bad_row", "`category_id` is 2.5"),
        (annotation(5, bbox=...), "bad_row", "`bbox` is None"),
        (annotation(5, bbox=[1, 2, 3]), "bad_row", r"`bbox` is \[1, 2, 3\]"),
        (annotation(5, image_id=9), "bad_row", "its image, id 9, has `file_name` '../9.jpg', which leads out"),
        (annotation(5, bbox=[1, 2, "3,5", 4]), "bad_number", "'3,5'"),
        (annotation(5, bbox=[1, 2, None, 4]), "bad_number", "None"),
        (annotation(5, bbox=[1, 2, NAN, 4]), "bad_number", "nan"),
        (annotation(5, bbox=[1, 2, True, 4]), "bad_number", "True"),
        (annotation(5, bbox=[10**400, 2, 3, 4]), "bad_number", "finite"),
        (annotation(5, bbox=[1, 12, 3, -4]), "empty_box", "y_max: 8, not more than y_min, 12"),
        (annotation(5, bbox=[30, 2, 11.5, 4]), "outside_photo", "x_max: 41.5, and the photo is 40 px wide"),
        (annotation(5, iscrowd="yes"), "bad_flag", "`iscrowd` is 'yes'"),
        (annotation(5, image_id=99), "unknown_photo", "`image_id` 99 is not in `images`"),
        (annotation(5, image_id=8), "unknown_photo", r"'000000000008.jpg', is not given and .*missing"),
    ],
)
def test_a_malformed_annotation_costs_itself_alone(file, wrong, reason, detail):
    """It keeps its place in the list, and those around it are read."""
    images = [image(7), image(8, width=None), image(9, file_name="../9.jpg")]
    rows = boxes_of(opened(write(file, [annotation(1), wrong, annotation(2)], images)))
    assert [(row["problem"], row["row"]) for row in rows] == [(None, 1), (reason, 2), (None, 3)]
    assert rows[1]["split"] == "train"
    assert re.search(detail, rows[1]["detail"]), rows[1]["detail"]


@pytest.mark.parametrize("name", ["/etc/x.jpg", "C:\\..\\x.jpg", "a/../../x.jpg", "..", "", "a\0.jpg", None, 5, "\ud800.jpg"])
def test_a_photo_outside_its_folder_is_no_photo(file, name):
    source = opened(write(file, [annotation(1)], [image(7, file_name=name)]))
    assert boxes_of(source)[0]["problem"] == "bad_row"
    assert photos_of(source) == []


@pytest.mark.parametrize("height", [..., 0, -1, 2.5, "x", None, 2**31, NAN])
def test_a_size_that_is_not_given_is_read_from_the_photo(file, tmp_path, height):
    """Where there is no header either, the photo is listed, and its boxes are not used."""
    path = write(file, [annotation(1, segmentation=[POLYGON])], [image(7, file_name="7.jpg", height=height)])
    source = opened(path, tmp_path / "photos")
    assert boxes_of(source)[0]["problem"] == "unknown_photo"
    assert [(row["width"], row["height"]) for row in photos_of(source)] == [(None, None)]
    photo(tmp_path / "photos" / "7.jpg", 80, 50)
    source = opened(path, tmp_path / "photos")
    (row,) = sound(boxes_of(source))
    assert (row["x_min"], row["y_max"], row["segmentation"]) == (4 / 80, 15 / 50, compress_mask([POLYGON], 80, 50))
    assert [(row["width"], row["height"]) for row in photos_of(source)] == [(80, 50)]
    assert len(source.read_elsewhere()) == 1, "the boxes depend on the photo's header, so the plan's fingerprint does"


def test_sizes_of_photos_that_are_still_to_be_fetched_must_be_given(file, tmp_path):
    """A plan that changed when photos come would be refused in the middle of a build."""
    photo(tmp_path / "photos" / "000000000007.jpg")
    path = write(file, [annotation(1), annotation(2, image_id=8)], [image(7, width=None), image(8)])
    source = SourceSettings(kind="coco", annotations=path, photos=tmp_path / "store")
    crawl = CrawlSettings(sources=(str(tmp_path / "photos"),))
    rows = boxes_of(open_source(BuildSettings(out=tmp_path / "out", source=source, crawl=crawl)))
    assert [row["problem"] for row in rows] == ["unknown_photo", None]
    assert "write their sizes into the annotations" in rows[0]["detail"]


# Object masks.


@given(x=st.integers(0, 39), y=st.integers(0, 19), data=st.data())
def test_a_rectangles_outline_covers_its_px(x, y, data):
    """The frame (x right, y down, column by column) and the size are right, or some rectangle would come out elsewhere."""
    width, height = data.draw(st.integers(1, 40 - x)), data.draw(st.integers(1, 20 - y))
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    expected = np.zeros((20, 40), bool)
    expected[y : y + height, x : x + width] = True
    assert np.array_equal(decode_pixels(compress_mask([polygon], 40, 20), 20, 40), expected)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_pixels_and_runs_are_those_of_pycocotools(height, width, seed):
    """Columns first; of masks that begin inside and outside, and of one without a pixel; both ways to write RLE."""
    pixels = np.random.default_rng(seed).random((height, width)) < seed % 4 / 3
    text = coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode()
    assert np.array_equal(decode_pixels(text, height, width), pixels)
    for counts in (text, decode_counts(text).tolist()) if pixels.any() else ():
        assert compress_mask({"size": [height, width], "counts": counts}, width, height) == text


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=20))
def test_lengths_of_runs_survive_compression(runs):
    """Differences to the number before the last, signs and numbers of many digits."""
    encoded = coco_mask.frPyObjects({"size": [1, 1], "counts": runs}, 1, 1)
    assert decode_counts(encoded["counts"].decode()).tolist() == runs


@pytest.mark.parametrize(("text", "problem"), [("", "is of 0 px"), ("4", "is of 4 px"), ("03M", "below 0"), ("é", "characters")])
def test_runs_that_are_not_the_pictures_are_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        decode_pixels(text, 2, 3)


def rle(counts: Any, size: Any = (20, 40)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "detail"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "three points or more"),
        ([[1, 2, 3, 4, 5, 6], "no polygon"], "'no polygon'"),
        ([[1, 2, 3, 4, 5, "6"]], "expected numbers of px"),
        ([[NAN, 2, 3, 4, 5, 6]], "expected numbers of px"),
        ([[1, 2, 3, 4, 5, 1e12]], "expected numbers of px"),
        ([[1, 2, 3, 4, 5, -(10**400)]], "expected numbers of px"),
        ([[0, 0, 1e7, 0, 0, 1e7]], "is 30,000,000 px long, more than 1,000,000"),
        ([[100, 100, 110, 100, 110, 110]], "covers no pixel"),
        ("polygon", "expected polygons or RLE"),
        (rle([400, 400], (40, 20)), r"has `size` \[40, 20\], the photo \[20, 40\]"),
        (rle(None), "has `counts` None"),
        (rle([400, 400.0]), "expected text, or whole numbers"),
        (rle([400, -1, 401]), "expected text, or whole numbers"),
        (rle([2**70]), "expected text, or whole numbers"),
        (rle([400, 399]), "sum up to 799"),
        (rle(""), "sum up to 0"),
        (rle([800]), "covers no pixel"),
        (rle("0P"), "are cut off"),  # A digit that says that more follow: pycocotools reads on behind the text.
        (rle("o" * 7 + "0"), "a number beyond 32 bits"),
        (rle("0\0"), "characters that RLE does not use"),
        (rle("0nnnnn3"), "sum up to"),  # One run of 120 million px, which pycocotools writes into a mask of 800.
        (rle("Tl0lL"), "sum up to 800, or go below 0"),  # 900 px outside, then -100 inside.
    ],
)
def test_a_hostile_outline_costs_itself_and_not_its_box(segmentation, detail, file):
    with pytest.raises(ValueError, match=detail):
        compress_mask(segmentation, 40, 20)
    source = opened(write(file, [annotation(3, segmentation=segmentation)]))
    for _ in range(2):  # Each reading counts anew.
        assert sound(boxes_of(source))[0]["segmentation"] is None
    (note,) = source.read_notes()
    assert note.startswith("outlines that cannot be used: 1; their boxes are taken without one")


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.integers(-9, 50), st.none())
COUNTS = st.one_of(st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=12), st.lists(NUMBERS, max_size=5))


@given(
    st.one_of(
        st.lists(st.lists(NUMBERS, max_size=9), max_size=3), st.builds(rle, COUNTS, st.sampled_from([(20, 40), (40, 20), (0, 0)]))
    )
)
def test_whatever_stands_there_gives_a_sound_mask_or_an_error(segmentation):
    """What comes out can be decoded by anyone: its runs fill the photo. A crash of pycocotools would end this process."""
    try:
        counts = compress_mask(segmentation, 40, 20)
    except ValueError:
        return
    if counts is not None:
        assert coco_mask.decode({"size": [20, 40], "counts": counts}).sum() == decode_pixels(counts, 20, 40).sum()


def test_limits_of_pycocotools(monkeypatch):
    """The longest allowed outline can be drawn; photos stay within the memory that it reserves, here a thousand px."""
    side = MAX_OUTLINE // 4
    assert decode_pixels(compress_mask([[0, 0, side, 0, side, side, 0, side]], 40, 20), 20, 40).all()
    monkeypatch.setattr(coco_file, "MAX_MASKED_PHOTO", 1000)
    for outline in (rle([300, 300, 401], (1001, 1)), [[0, 0, 1, 0, 1, 10, 0, 10]]):
        with pytest.raises(ValueError, match="more than 1,000"):
            compress_mask(outline, 1, 1001)
    assert decode_counts(compress_mask(rle([300, 300, 400], (1000, 1)), 1, 1000)).tolist() == [300, 300, 400]


def test_outlines_that_cannot_be_used_are_told_with_the_plan(file, tmp_path):
    """And that references cannot be cut out, where this was asked for."""
    annotations = [annotation(1, segmentation=[POLYGON]), annotation(2, bbox=[1, 1, 30, 15], segmentation=[[1, 2, 3]])]
    selection, *_ = select(write(file, annotations), tmp_path / "photos", references=ReferenceSettings(background="grey"))
    assert (selection.objects, selection.objects_with_outline) == (2, 1)
    assert "example boxes.json, annotation 2" in selection.notes[0]
    assert any(note.startswith("1 of 2 objects have no outline") for note in selection.notes)


# Classes.


# Roboflow's root is a category itself; a category may have no name, a number for one, or stand there twice alike.
ROOTED = [{"id": 0, "name": "Set", "supercategory": "none"}, {"id": 1, "name": " cat ", "supercategory": "set"}]
ROOTED += [{"id": 2, "name": 7, "supercategory": ""}, {"id": 3}, {"id": 1, "name": "cat", "supercategory": "SET"}]


@pytest.mark.parametrize(
    ("categories", "names", "above", "held"),
    [
        # `person` is one class, though category and supercategory both bear the name.
        (CATEGORIES, {"1": "person", "3": "car", "6": "bus", "supercategory:vehicle": "vehicle"}, "vehicle", {"3", "6"}),
        ([{**CATEGORIES[1], "id": "3"}], {"3": "car", "supercategory:vehicle": "vehicle"}, "vehicle", {"3"}),
        (ROOTED, {"0": "Set", "1": "cat", "2": "7", "3": "3"}, "set", {"0", "1"}),
    ],
)
def test_supercategories_are_classes_above_their_categories(file, categories, names, above, held):
    source = opened(write(file, [annotation(1)], categories=categories))
    assert source.class_names == names
    assert below([above], source, "include_labels") - {f"supercategory:{above}"} == held


@pytest.mark.parametrize("categories", [..., None, []])
def test_a_file_without_categories_has_one_class(file, categories):
    source = opened(write(file, [annotation(1), annotation(2, category_id=9)], categories=categories))
    assert {row["label"] for row in sound(boxes_of(source))} == {"object"} == set(source.class_names)
    assert source.read_notes() == ["there are no `categories`: all boxes are of the class `object`"]


# Files that are none, and ids that stand for two things.

# More levels than Python's parser takes, whose limit bounds its stack. Where a Python takes them, the file is no JSON either.
DEEP = sys.getrecursionlimit() + 10
WHOLE = json.dumps({"images": [image(7)], "annotations": [annotation(1)], "categories": CATEGORIES}, indent=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        (WHOLE[: WHOLE.index("iscrowd")], r"not JSON .*cut off .*line 21 column 4"),
        (b"\xff\xfe" + WHOLE.encode("utf-16-le"), "not JSON in UTF-8"),
        (gzip.compress(WHOLE.encode(), mtime=0), "not JSON in UTF-8"),
        ("[" * DEEP, "not JSON"),
        ('{"images": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "no JSON object"),
        ('{"images": []}', r"no list `annotations` in it \(found: \['images'\]\)"),
        ('{"images": [], "annotations": [], "categories": {}}', "no list `categories`"),
        ('{"annotations": [], "categories": []}', "no list `images`"),
        ('{"images": [], "annotations": [null, {"caption": "a car"}]}', "no annotation has a `bbox` .*caption"),
        ('{"images": [], "annotations": [{"segments_info": [{"bbox": [1]}]}]}', "no annotation has a `bbox` .*panoptic"),
        ({"images": [image(7), image(8), image(7, width=50)]}, "image id 7 stands twice in `images`, the second time, entry 3"),
        ({"images": [image(7), image(7, file_name="other.jpg")]}, "image id 7 stands twice"),
        ({"images": [image("p1"), image("p1.jpg")]}, "image id p1.jpg and another one get the same id, p1"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "lorry"}]}, "category id 3 .* as `car` and, entry 4, as `lorry`"),
        ({"categories": ["car"]}, "entry 1 of `categories` is 'car'"),
        ({"categories": [{"id": n, "name": f"{n}", "supercategory": f"{3 - n}"} for n in (1, 2)]}, "circle: "),
    ],
)
def test_a_file_that_is_not_coco_is_refused(file, content, message):
    if isinstance(content, dict):
        write(file, [annotation(1)], **content)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        opened(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [gzip.compress(WHOLE.encode(), mtime=0)[:-20], b"no gzip"])
def test_a_damaged_gzip_is_refused(tmp_path, packed):
    path = tmp_path / "boxes.json.gz"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"boxes.json.gz.*cut off"):
        opened(path)


def test_a_byte_order_mark_and_line_ends_do_not_matter(file):
    file.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert boxes_of(opened(file)) == [PLAIN]
    assert boxes_of(opened(write(file, None))) == [], "annotations may be null"


# Files and splits.


def test_each_split_has_its_file(tmp_path):
    """Photos lie in the folder of the file's name where there is one; a file may be compressed; other files do not matter."""
    with pytest.raises(InputError, match="no such file or folder"):
        opened(tmp_path / "nowhere")
    write(tmp_path / "instances_train2017.json", [annotation(1)])
    with pytest.raises(InputError, match=r"no file instances_val\*.json .* for the split validation; .*take `validation` out"):
        opened(tmp_path)
    plain = write(tmp_path / "plain.json", [annotation(1, image_id=8)], [image(8)])
    (tmp_path / "instances_val2017.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    (tmp_path / "captions_train2017.json").write_text("{}")
    (tmp_path / "photos" / "train2017").mkdir(parents=True)
    source = opened(tmp_path, tmp_path / "photos")
    assert [(row["split"], row["photo_id"], row["file"]) for row in boxes_of(source)] == [
        ("train", "7", "instances_train2017.json"), ("validation", "8", "instances_val2017.json.gz"),
    ]  # fmt: skip
    names = {row["split"]: row["file_name"] for row in photos_of(source)}
    assert names == {"train": "train2017/000000000007.jpg", "validation": "000000000008.jpg"}
    assert source.listed_splits == {"train", "validation"}
    assert [row["photo_id"] for row in boxes_of(opened(tmp_path, splits=("validation",)))] == ["8"]
    write(tmp_path / "instances_train2014.json", [annotation(1)])
    with pytest.raises(InputError, match=r"train2014.json and instances_train2017.json are both instances_train\*.json"):
        opened(tmp_path, splits=("train",))


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("lvis_v1_train.json", "lvis_v1_val.json"), ("lvis_v1_image_info_test_dev.json",)),
        (("zhiyuan_objv2_train.json", "zhiyuan_objv2_val.json.gz"), ()),
        (("v3det_2023_v1_train.json", "v3det_2023_v1_val.json"), ()),
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


def test_roboflows_folder_is_one_dataset_with_its_splits(tmp_path):
    """Photos beside their file, both kinds of ids from 0, and a root that bears the dataset's name."""
    categories = [{"id": 0, "name": "things", "supercategory": "none"}, {"id": 1, "name": "ball", "supercategory": "things"}]
    for folder in ("train", "valid"):
        images = [image(number, file_name=f"{folder}{number}_jpg.rf.0a{number}.jpg") for number in range(3)]
        annotations = [annotation(number, image_id=number, category_id=number % 2) for number in range(3)]
        for entry in images:
            photo(tmp_path / folder / entry["file_name"])
        write(tmp_path / folder / "_annotations.coco.json", annotations, images, categories)
    source = opened(tmp_path, tmp_path)
    rows, listed = sound(boxes_of(source)), photos_of(source)
    assert [row["split"] for row in rows] == ["train"] * 3 + ["validation"] * 3
    assert len({row["photo_id"] for row in rows} | {row["photo_id"] for row in listed}) == 6
    assert all((tmp_path / row["file_name"]).is_file() for row in listed)
    assert below(["things"], source, "include_labels") == {"0", "1"}
    held_out = {(row["photo_id"], row["file_name"]) for row in listed if row["split"] == "validation"}
    one_file = opened(tmp_path / "valid" / "_annotations.coco.json", tmp_path)
    for alone in (one_file, opened(tmp_path, tmp_path, splits=("validation",))):
        assert {(row["photo_id"], row["file_name"]) for row in photos_of(alone)} == held_out, "whatever else is read"
    with pytest.raises(InputError, match=r"no file test/_annotations.coco.json .*take `test` out of build.source.splits"):
        opened(tmp_path, tmp_path, splits=("test",))


def test_files_that_number_their_images_anew_hold_different_photos(tmp_path):
    """Ids come from paths then, and from the split where all photos lie in one folder. Of one file, they are one photo."""
    for word, name in (("train", "a.jpg"), ("val", "b.jpg")):
        write(tmp_path / f"instances_{word}.json", [annotation(1, image_id=1)], [image(1, file_name=name)])
    assert [row["photo_id"][:-9] for row in sound(boxes_of(opened(tmp_path)))] == ["train-a", "validation-b"]
    for place in ("train/a.jpg", "val/b.jpg"):
        photo(tmp_path / "photos" / place)
    source = opened(tmp_path, tmp_path / "photos")
    assert [row["file_name"] for row in photos_of(source)] == ["train/a.jpg", "val/b.jpg"]
    assert [row["photo_id"][:-9] for row in sound(boxes_of(source))] == ["train-a", "val-b"]
    write(tmp_path / "instances_val.json", [annotation(1, image_id=1)], [image(1, file_name="a.jpg")])
    with pytest.raises(InputError, match=r"instances_val.json: image id 1 is in instances_train.json too"):
        opened(tmp_path)
    write(tmp_path / "instances_val.json", [], [image(8)], [{"id": 3, "name": "lorry"}])
    with pytest.raises(InputError, match=r"category 3 is `lorry`, in another file `car`"):
        opened(tmp_path)


def test_one_file_is_divided_by_a_hash_of_the_photo(file):
    images = [image(number) for number in range(400)]
    path = write(file, [annotation(number, image_id=number) for number in range(400)], images)
    source = opened(path, seed=1, validation_share=0.25)
    splits = {row["photo_id"]: row["split"] for row in photos_of(source)}
    assert 60 < Counter(splits.values())["validation"] < 140
    assert {row["photo_id"]: row["split"] for row in boxes_of(source)} == splits
    assert splits == dict(zip(splits, assign_splits(list(splits), 1, 0.25), strict=True))
    only = opened(path, seed=1, validation_share=0.25, splits=("validation",))
    held_out = {name for name, split in splits.items() if split == "validation"}
    assert {row["photo_id"] for row in boxes_of(only)} == {row["photo_id"] for row in photos_of(only)} == held_out


@settings(max_examples=30)
@given(st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True), max_size=10), st.integers(0, 9), st.floats(0, 0.9))
def test_a_photos_split_depends_on_nothing_but_its_id(photo_ids, seed, share):
    """Not on the photos beside it; a larger share only adds to validation."""
    together = assign_splits(photo_ids, seed, share)
    assert together == [assign_splits([photo_id], seed, share)[0] for photo_id in photo_ids]
    more = assign_splits(photo_ids, seed, share + 0.1)
    assert all(after == "validation" for before, after in zip(together, more, strict=True) if before == "validation")


def test_splits_stay_what_they_are():
    """Of two versions of this code, one would validate on what the other one trained on."""
    splits = assign_splits([str(number) for number in range(12)], 0, 0.5)
    assert [number for number, split in enumerate(splits) if split == "validation"] == [2, 3, 6, 10]


def test_one_file_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Each takes several times its size: when one is parsed, nothing of those before may be left."""
    for number, split in enumerate(("train", "val")):
        write(tmp_path / f"instances_{split}.json", [annotation(1, image_id=number)], [image(number)])
    parsed: list[weakref.ref[Any]] = []
    load = coco.read_instances

    def watched(*arguments: Any) -> Any:
        assert not [instances for instances in parsed if instances() is not None]
        instances = load(*arguments)
        parsed.append(weakref.ref(instances))
        return instances

    monkeypatch.setattr(coco, "read_instances", watched)
    source = opened(tmp_path)
    assert len(boxes_of(source)) == len(photos_of(source)) == 2
    assert len(parsed) == 6


# Names of files; see test_photo_names.py.


def test_lvis_names_its_photos_by_their_url(file, tmp_path):
    """Where photos lie as COCO's archives unpack, and where one of its folders is the photo folder."""
    url = "http://images.cocodataset.org/train2017/000000000007.jpg"
    path = write(file, [annotation(1, iscrowd=...)], [image(7, file_name=..., coco_url=url, flickr_url="http://f/x.jpg")])
    photo(tmp_path / "coco" / "train2017" / "000000000007.jpg")
    for folder, name in (
        ("nowhere", "train2017/000000000007.jpg"), ("coco", "train2017/000000000007.jpg"), ("coco/train2017", "000000000007.jpg"),
    ):  # fmt: skip
        source = opened(path, tmp_path / folder)
        sound(boxes_of(source))
        assert [(row["file_name"], row["url"]) for row in photos_of(source)] == [(name, url)]


@pytest.mark.parametrize("key", ["file_name", "filename", "path"])
def test_the_name_may_stand_in_another_key(file, key):
    entry = {**image(7, file_name=None), key: "a\\b.jpg"}
    assert photos_of(opened(write(file, [annotation(1)], [entry])))[0]["file_name"] == "a/b.jpg"


def test_an_absolute_name_that_leads_nowhere_costs_its_photo_and_says_the_way_out(file, tmp_path):
    photo(tmp_path / "photos" / "a" / "1.jpg")
    images = [image(7, file_name="C:\\set\\1.jpg"), image(8, file_name="/data/2.jpg")]
    source = opened(write(file, [annotation(1), annotation(2, image_id=8)], images), tmp_path / "photos")
    assert [row["problem"] for row in boxes_of(source)] == [None, "bad_row"]
    assert "its image, id 8, has `file_name` '/data/2.jpg', which is absolute" in boxes_of(source)[1]["detail"]
    assert photos_of(source)[0]["file_name"] == "a/1.jpg"
    assert source.read_notes() == ["photos that were found by their base names: 1; for example C:/set/1.jpg as a/1.jpg"]
    assert len(source.read_elsewhere()) == 1


# A whole selection. Several images of one file are one photo, which has the boxes of all of them.


def select(
    annotations: Path, photos: Path, references: ReferenceSettings | None = None, **source: Any
) -> tuple[Selection, list[dict], list[dict], list[dict]]:
    """What the stage found; objects, rejects, and photos that are there under another id."""
    out = photos.parent / "out"
    settings = BuildSettings(
        out=out,
        source=SourceSettings(kind="coco", annotations=annotations, photos=photos, **source),
        selection=SelectionSettings(reject_flags=("group_of",)),
        references=references or ReferenceSettings(),
    )
    selection = select_objects(settings, out)
    assert selection.boxes == selection.objects + sum(selection.rejects.values())
    return selection, *(pq.read_table(out / f"{name}.parquet").to_pylist() for name in ("objects", "rejects", "same_photos"))


def test_a_whole_selection_of_what_a_tool_on_windows_wrote(tmp_path):
    """result.json says images\\p1.jpg, and the photo folder is that folder itself; no sizes, ids as text, flat outlines."""
    photo(tmp_path / "images" / "p1.jpg", 60, 40)
    box = {"image_id": "1", "category_id": "3", "bbox": [6, 4, 30, 20], "segmentation": [6, 4, 36, 4, 36, 24, 6, 24]}
    unlisted = {**box, "category_id": 9}
    path = write(tmp_path / "result.json", [box, unlisted], [{"id": "1", "file_name": "images\\p1.jpg"}])
    _, (row,), (reject,), _ = select(path, tmp_path / "images", validation_share=0.0)
    assert (row["file_name"], row["width"], row["height"], row["label_name"]) == ("p1.jpg", 60, 40, "car")
    assert np.allclose([row["x_min"], row["y_min"], row["x_max"], row["y_max"]], [0.1, 0.1, 0.6, 0.6])
    assert (reject["reason"], reject["label"]) == ("unknown_label", "9")


def test_images_of_one_file_are_one_photo_with_the_boxes_of_all(tmp_path):
    """However the name is written; the shortest and smallest id is kept, whatever the order; equal boxes are one."""
    images = [image(10, file_name="./a/x.jpg"), image(2, file_name="a\\x.jpg"), image(3, file_name="a/x.jpg"), image(4)]
    annotations = [annotation(number, image_id=number, bbox=[number % 7, 2, 12, 12]) for number in (10, 2, 3, 4)]
    for order in (images, images[::-1]):
        file = write(tmp_path / "boxes.json", annotations, order)
        assert {row["photo_id"] for row in photos_of(opened(file))} == {"2", "4"}
        selection, objects, rejects, same = select(file, tmp_path / "photos", splits=("train",), validation_share=0)
        assert sorted((row["photo_id"], round(row["x_min"] * 40)) for row in objects) == [("2", 2), ("2", 3), ("4", 4)]
        assert [(row["photo_id"], row["reason"]) for row in rejects] == [("2", "duplicate")]
        found = [(row["photo_id"], row["kept_photo_id"], row["by"]) for row in same]
        assert found == [("10", "2", "file_name"), ("3", "2", "file_name")]
        assert selection.same_photos == {"file_name": 2, "across_splits": 0}
        assert any("the boxes of both are those of one photo, for example of images 2 and" in note for note in selection.notes)
    # An annotation may name its photo by the file's name: where images of it are kept apart, nobody knows which.
    write(file, [annotation(1, image_id="a/x.jpg")], [image(1, file_name="a/x.jpg"), image(2, file_name="a/x.jpg")])
    assert [boxes_of(opened(file, same_photo=choice))[0]["problem"] for choice in ("drop", "report")] == [None, "unknown_photo"]


def test_no_file_is_in_two_splits(tmp_path):
    images = [image(number, file_name=f"{number % 20}.jpg") for number in range(60)]
    annotations = [annotation(number, image_id=number, bbox=[number % 7, 2, 12, 12]) for number in range(60)]
    file = write(tmp_path / "boxes.json", annotations, images)
    _, objects, rejects, same = select(file, tmp_path / "photos", validation_share=0.3)
    splits = {(row["file_name"], row["split"]) for row in objects}
    assert len(splits) == 20 == len(dict(splits))
    assert set(dict(splits).values()) == {"train", "validation"}
    assert (len(objects) + len(rejects), len(same)) == (60, 40)
    _, objects, rejects, same = select(file, tmp_path / "photos", validation_share=0.3, same_photo="report")
    assert (len(objects), len(rejects), len(same)) == (60, 0, 40), "all are kept, and told"


@pytest.mark.parametrize("one_file", [True, False])
def test_a_file_of_both_jsons_is_held_out(tmp_path, one_file):
    """Where it lies in the photo folder; a folder for each split holds two files of this name."""
    for place in ("",) if one_file else ("train", "validation"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        (tmp_path / "photos" / place / "x.jpg").write_bytes(b"")
    for number, word in enumerate(("train", "val"), 1):
        entries = [image(number, file_name="x.jpg"), image(number + 10)]
        own = [annotation(each["id"], image_id=each["id"]) for each in entries]
        write(tmp_path / "annotations" / f"instances_{word}.json", own, entries)
    _, objects, rejects, same = select(tmp_path / "annotations", tmp_path / "photos")
    dropped = [("train", "1", "2")] if one_file else []
    assert [(row["split"], row["photo_id"], row["kept_photo_id"]) for row in same] == dropped
    assert [(row["split"], row["photo_id"], row["reason"]) for row in rejects] == [(*one[:2], "same_photo") for one in dropped]
    assert len(objects) == 4 - len(dropped)


def test_real_data(real_data):
    """48 photos and 492 annotations of COCO 2017, six of them crowds in RLE: all are sound, and each outline lies in its box."""
    folder = real_data / "coco_mini"
    source = opened(folder / "instances.json", folder / "images")
    rows, photos = sound(boxes_of(source)), {row["photo_id"]: row for row in photos_of(source)}
    assert (len(rows), len(photos), len(source.class_names)) == (492, 48, 80 + 11)
    assert Counter(row["is_group_of"] for row in rows) == {0: 486, 1: 6}
    assert all((folder / "images" / photo["file_name"]).is_file() for photo in photos.values())
    assert all(photo["licence"].startswith("http") for photo in photos.values())
    for row in rows:
        photo = photos[row["photo_id"]]
        x, y, width, height = coco_mask.toBbox({"size": [photo["height"], photo["width"]], "counts": row["segmentation"]})
        box = np.array([row["x_min"], row["y_min"], row["x_max"], row["y_max"]]) * ([photo["width"], photo["height"]] * 2)
        assert np.abs(box - (x, y, x + width, y + height)).max() < 4.5  # Rounding at the ends of polygons; 3.4 px at most.
    assert {"2", "3", "4", "5", "6", "7", "8", "9"} < below(["vehicle"], source, "include_labels")
