import gzip
import json
import re
import sys
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.rle import decode_counts, decode_pixels
from pbe_core.settings import load_settings, preset
from pbe_train.config import TrainSettings
from pipelines.annotations import coco, object_masks
from pipelines.annotations.object_masks import MAX_OUTLINE, compress_mask
from pipelines.annotations.source import assign_splits
from pipelines.config import BuildSettings
from pipelines.selection.rules import below
from tests.coco_files import CATEGORIES, annotation, boxes_of, image, opened, photos_of, without, write


@pytest.fixture
def file(tmp_path):
    return tmp_path / "boxes.json"


def test_px_become_fractions_and_what_coco_does_not_say_is_unknown(file):
    """x, width and y, height; a crowd is a group; the other flags are -1, never 0."""
    crowd = annotation(12, iscrowd=1, category_id=1)
    source = opened(write(file, [annotation(11), crowd, without(annotation(13), "iscrowd")]))
    first, second, third = boxes_of(source)
    assert (first["x_min"], first["x_max"], first["y_min"], first["y_max"]) == (0.1, 0.6, 0.25, 0.75)
    assert (first["photo_id"], first["label"], first["file"], first["problem"]) == ("7", "3", "boxes.json", None)
    assert [row["row"] for row in (first, second, third)] == [1, 2, 3]
    assert [row["is_group_of"] for row in (first, second, third)] == [0, 1, -1]
    assert {first[name] for name in ("is_occluded", "is_truncated", "is_depiction", "is_inside")} == {-1}
    assert source.frame == "stored"
    assert source.rows == 3
    assert source.files == (file,)


def test_what_is_known_about_photos(file):
    """The file itself rather than its page; the licence's address; a photo without a box is there too."""
    licences = [{"id": 4, "url": "http://l/by", "name": "BY"}, {"url": "http://l/nobody"}]
    images = [
        image(7, license=4, coco_url="http://c/7.jpg", flickr_url="http://f/7"),
        image(8, license=9, flickr_url="http://f/8"),
        image(9),
    ]
    rows = {row["photo_id"]: row for row in photos_of(opened(write(file, [annotation(1)], images, licenses=licences)))}
    assert [rows[name]["url"] for name in "789"] == ["http://c/7.jpg", "http://f/8", None]
    assert [rows[name]["licence"] for name in "789"] == ["http://l/by", None, None]
    assert (rows["9"]["file_name"], rows["9"]["width"], rows["9"]["height"]) == ("000000000009.jpg", 40, 20)
    unknown = ("rotation", "author", "original_md5", "original_bytes")
    assert {rows["7"][name] for name in unknown} == {None}


def test_a_px_beyond_the_edge_is_rounding_and_more_is_not(file):
    boxes = [[-1, -0.5, 42, 21.5], [-1.5, 0, 10, 10], [30, 0, 11.5, 21.5]]
    rows = boxes_of(opened(write(file, [annotation(number, bbox=box) for number, box in enumerate(boxes)])))
    assert [rows[0][name] for name in ("x_min", "x_max", "y_min", "y_max")] == [0, 1, 0, 1]
    assert rows[1]["x_min"] == -1.5 / 40
    assert (rows[2]["x_max"], rows[2]["y_max"]) == (41.5 / 40, 21.5 / 20)


@pytest.mark.parametrize(
    ("wrong", "reason", "detail"),
    [
        (["a", "list"], "bad_row", r"annotation 2 \(no id\): is \['a', 'list'\]"),
        (without(annotation(5), "image_id"), "bad_row", r"annotation 2 \(id 5\): `image_id` is missing"),
        (annotation(5, image_id=[7]), "bad_row", r"`image_id` is \[7\]"),
        (annotation(5, category_id=[3]), "bad_row", r"`category_id` is \[3\]"),
        (annotation(5, category_id=2.5), "bad_row", "`category_id` is 2.5"),
        (without(annotation(5), "bbox"), "bad_row", "`bbox` is missing"),
        (annotation(5, bbox=[1, 2, 3]), "bad_row", r"`bbox` is \[1, 2, 3\]"),
        (annotation(5, bbox={"x": 1}), "bad_row", "`bbox` is {'x': 1}"),
        (annotation(5, image_id=9), "bad_row", "its image, id 9, has `file_name` '../9.jpg', which leads out"),
        (annotation(5, bbox=[1, 2, "3,5", 4]), "bad_number", "'3,5'"),
        (annotation(5, bbox=[1, 2, None, 4]), "bad_number", "None"),
        (annotation(5, bbox=[1, 2, float("nan"), 4]), "bad_number", "nan"),
        (annotation(5, bbox=[1, 2, True, 4]), "bad_number", "True"),
        (annotation(5, bbox=[10**400, 2, 3, 4]), "bad_number", "finite"),
        (annotation(5, bbox=[1, 2, 0, 4]), "empty_box", r"`bbox` is \[1, 2, 0, 4\]"),
        (annotation(5, bbox=[1, 2, 3, -4]), "empty_box", "positive"),
        (annotation(5, bbox=[30, 2, 15, 4]), "outside_photo", "beyond its photo of 40x20 px"),
        (annotation(5, bbox=[3, -2, 5, 4]), "outside_photo", "beyond"),
        (annotation(5, iscrowd="yes"), "bad_flag", "`iscrowd` is 'yes'"),
        (annotation(5, category_id="car"), "unknown_label", "`category_id` car"),
        (annotation(5, image_id=99), "unknown_photo", "`image_id` 99 is not in `images` .where 2 entries have no id"),
        (annotation(5, image_id=8), "unknown_photo", r"'000000000008.jpg', is not given and .*missing"),
    ],
)
def test_a_malformed_annotation_costs_itself_alone(file, wrong, reason, detail):
    """It keeps its place in the list, and those around it are read."""
    images = [image(7), image(8, width=None), image(9, file_name="../9.jpg"), without(image(1), "id"), "no object"]
    rows = boxes_of(opened(write(file, [annotation(1), wrong, annotation(2)], images)))
    assert [row["problem"] for row in rows] == [None, reason, None]
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert rows[1]["split"] == "train"
    assert re.search(detail, rows[1]["detail"]), rows[1]["detail"]


@pytest.mark.parametrize(
    "name",
    ["/etc/x.jpg", "C:/x.jpg", "C:\\..\\x.jpg", "a/../../x.jpg", "..\\x.jpg", "..", "./", "", "a\0.jpg", None, 5, "\ud800.jpg"],
)
def test_a_photo_outside_its_folder_is_no_photo(file, name):
    source = opened(write(file, [annotation(1)], [image(7, file_name=name)]))
    assert boxes_of(source)[0]["problem"] == "bad_row"
    assert photos_of(source) == []


@pytest.mark.parametrize("size", [0, -5, 2.5, "wide", None, 2**31, True, float("nan")])
def test_a_photo_without_a_size_is_listed_and_its_boxes_are_not_used(file, size):
    """Where its header cannot be read either."""
    source = opened(write(file, [annotation(1)], [image(7, height=size)]))
    assert boxes_of(source)[0]["problem"] == "unknown_photo"
    (photo,) = photos_of(source)
    assert (photo["width"], photo["height"]) == (None, None)


def test_a_half_of_a_surrogate_pair_does_not_stop_the_file(file):
    """JSON can name it, no table can hold it."""
    text = json.dumps({"images": [image(7, coco_url="X")], "annotations": [annotation("X")], "categories": CATEGORIES})
    file.write_text(text.replace('"X"', '"\\ud800"'))
    source = opened(file)
    assert boxes_of(source)[0]["problem"] is None
    assert photos_of(source)[0]["url"] is None


# Outlines.


@given(x=st.integers(0, 39), y=st.integers(0, 19), data=st.data())
def test_a_rectangles_outline_covers_its_px(x, y, data):
    """The frame (x right, y down, column by column) and the size are right, or some rectangle would come out elsewhere."""
    width, height = data.draw(st.integers(1, 40 - x)), data.draw(st.integers(1, 20 - y))
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    decoded = coco_mask.decode({"size": [20, 40], "counts": compress_mask([polygon], 40, 20)})
    expected = np.zeros((20, 40), np.uint8)
    expected[y : y + height, x : x + width] = 1
    assert np.array_equal(decoded, expected)


@given(st.integers(0, 90), st.lists(st.integers(1, 90), min_size=1, max_size=9))
def test_both_ways_to_write_rle_give_what_pycocotools_makes_of_the_mask(outside, more):
    runs = [outside, *more]
    pixels = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)
    text = coco_mask.encode(np.asfortranarray(pixels[:, None]))["counts"].decode()
    assert decode_counts(text).tolist() == runs
    for counts in (runs, text):
        assert compress_mask({"size": [len(pixels), 1], "counts": counts}, 1, len(pixels)) == text


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=20))
def test_lengths_of_runs_survive_compression(runs):
    """Differences to the number before the last, signs and numbers of many digits."""
    encoded = coco_mask.frPyObjects({"size": [1, 1], "counts": runs}, 1, 1)
    assert decode_counts(encoded["counts"].decode()).tolist() == runs


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_pixels_are_those_that_pycocotools_decodes(height, width, seed):
    """Columns first; of masks that begin inside and outside, and of one without a pixel."""
    pixels = np.random.default_rng(seed).random((height, width)) < seed % 4 / 3
    text = coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode()
    assert np.array_equal(decode_pixels(text, height, width), pixels)


@pytest.mark.parametrize(("text", "problem"), [("", "is of 0 px"), ("4", "is of 4 px"), ("03M", "below 0"), ("é", "characters")])
def test_runs_that_are_not_the_pictures_are_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        decode_pixels(text, 2, 3)


def test_polygons_of_one_object_are_united():
    left, right = [0, 0, 10, 0, 10, 20, 0, 20], [5, 0, 30, 0, 30, 20, 5, 20]
    counts = compress_mask([left, right], 40, 20)
    assert coco_mask.area({"size": [20, 40], "counts": counts}) == 30 * 20


def rle(counts: Any, size: Any = (20, 40)) -> dict[str, Any]:
    return {"size": list(size) if isinstance(size, tuple) else size, "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "detail"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "expected x, y of three points or more"),
        ([[1, 2, 3, 4, 5, 6], "no polygon"], "'no polygon'"),
        ([[1, 2, 3, 4, 5, "6"]], "expected numbers of px"),
        ([[1, 2, 3, 4, 5, float("nan")]], "expected numbers of px"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "expected numbers of px"),
        ([[1, 2, 3, 4, 5, 1e12]], "expected numbers of px"),
        ([[1, 2, 3, 4, 5, -(10**400)]], "expected numbers of px"),
        ([[0, 0, 1e7, 0, 0, 1e7]], "is 30,000,000 px long, more than 1,000,000"),
        ([[0, 0, 900, 900] * 1000], "px long, more than"),
        ([[100, 100, 110, 100, 110, 110]], "covers no pixel"),
        ("polygon", "expected polygons or RLE"),
        (rle([400, 400], (40, 20)), r"has `size` \[40, 20\], the photo \[20, 40\]"),
        ({"counts": [400, 400]}, "has `size` None"),
        (rle(None), "has `counts` None"),
        (rle([400, 400.0]), "expected text, or whole numbers"),
        (rle([400, -1, 401]), "expected text, or whole numbers"),
        (rle([400, True, 399]), "expected text, or whole numbers"),
        (rle([2**70]), "expected text, or whole numbers"),
        (rle([400, 399]), "sum up to 799"),
        (rle([]), "sum up to 0"),
        (rle(""), "sum up to 0"),
        (rle([800]), "covers no pixel"),
        (rle("P"), "are cut off"),  # A digit that says that more follow: pycocotools reads on behind the text.
        (rle("0P"), "are cut off"),
        (rle("o" * 7 + "0"), "a number beyond 32 bits"),
        (rle("é0"), "characters that RLE does not use"),
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
        (row,) = boxes_of(source)
    assert (row["problem"], row["segmentation"]) == (None, None)
    (note,) = source.read_notes()
    assert note.startswith(
        "outlines that cannot be used: 1; their boxes are taken without one; for example boxes.json, annotation 1"
    )


RLE_TEXT = st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=12)
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.integers(-9, 50), st.none())


@given(
    st.one_of(
        st.lists(st.lists(NUMBERS, max_size=9), max_size=3),
        st.builds(rle, st.one_of(RLE_TEXT, st.lists(NUMBERS, max_size=5)), st.sampled_from([(20, 40), (40, 20), (0, 0)])),
    )
)
def test_whatever_stands_there_gives_a_sound_mask_or_an_error(segmentation):
    """What comes out can be decoded by anyone: its runs fill the photo. A crash of pycocotools would end this process."""
    try:
        counts = compress_mask(segmentation, 40, 20)
    except ValueError:
        return
    if counts is not None:
        runs = decode_counts(counts)
        assert runs.min() >= 0
        assert runs.sum() == 800
        assert coco_mask.decode({"size": [20, 40], "counts": counts}).sum() == runs[1::2].sum()


def test_the_longest_allowed_outline_can_be_drawn():
    side = MAX_OUTLINE // 4
    counts = compress_mask([[0, 0, side, 0, side, side, 0, side]], 40, 20)
    assert coco_mask.area({"size": [20, 40], "counts": counts}) == 800


def test_a_photo_is_not_larger_than_pycocotools_takes(monkeypatch):
    """The limit keeps pycocotools within the memory that it reserves for an outline; here it is a thousand px."""
    monkeypatch.setattr(object_masks, "MAX_MASKED_PHOTO", 1000)
    for outline in (rle([300, 300, 401], (1001, 1)), [[0, 0, 1, 0, 1, 10, 0, 10]]):
        with pytest.raises(ValueError, match="more than 1,000"):
            compress_mask(outline, 1, 1001)
    encoded = compress_mask(rle([300, 300, 400], (1000, 1)), 1, 1000)
    assert decode_counts(encoded).tolist() == [300, 300, 400]


# Classes.


def test_supercategories_are_classes_above_their_categories(file):
    """`vehicle` can be chosen by name; `person` is one class, though category and supercategory both bear the name."""
    source = opened(write(file, [annotation(1)]))
    assert source.class_names == {"1": "person", "3": "car", "6": "bus", "supercategory:vehicle": "vehicle"}
    assert source.subclasses == {"supercategory:vehicle": ("3", "6")}
    assert below(["vehicle"], source, "include_labels") == {"supercategory:vehicle", "3", "6"}
    assert below(["person"], source, "include_labels") == {"1"}


def test_a_category_that_bears_a_supercategorys_name_stands_above_its_members(file):
    categories = [
        {"id": 0, "name": "Animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 2, "name": "dog", "supercategory": "ANIMALS"},
    ]
    source = opened(write(file, [], categories=categories))
    assert below(["animals"], source, "include_labels") == {"0", "1", "2"}


def test_supercategories_in_a_circle_are_refused(file):
    categories = [{"id": 1, "name": "a", "supercategory": "b"}, {"id": 2, "name": "b", "supercategory": "a"}]
    with pytest.raises(InputError, match=r"circle: (a -> b -> a|b -> a -> b)"):
        opened(write(file, [], categories=categories))


# Files and splits.


def test_each_split_has_its_file(tmp_path):
    """Photos lie in the folder of the file's name where there is one; a file may be compressed; other files do not matter."""
    write(tmp_path / "instances_train2017.json", [annotation(1)])
    plain = write(tmp_path / "plain.json", [annotation(1, image_id=8)], [image(8)])
    with gzip.open(tmp_path / "instances_val2017.json.gz", "wb") as packed:
        packed.write(plain.read_bytes())
    plain.unlink()
    (tmp_path / "captions_train2017.json").write_text("{}")
    (tmp_path / "photos" / "train2017").mkdir(parents=True)
    source = opened(tmp_path, tmp_path / "photos")
    assert [(row["split"], row["photo_id"], row["file"]) for row in boxes_of(source)] == [
        ("train", "7", "instances_train2017.json"),
        ("validation", "8", "instances_val2017.json.gz"),
    ]
    assert {row["split"]: row["file_name"] for row in photos_of(source)} == {
        "train": "train2017/000000000007.jpg",
        "validation": "000000000008.jpg",
    }
    assert source.listed_splits == {"train", "validation"}
    assert [row["photo_id"] for row in boxes_of(opened(tmp_path, splits=("validation",)))] == ["8"]


@pytest.mark.parametrize("seed", [0, 1])
def test_one_file_is_divided_by_a_hash_of_the_photo(file, seed):
    images = [image(number) for number in range(400)]
    path = write(file, [annotation(number, image_id=number) for number in range(400)], images)
    source = opened(path, seed=seed, validation_share=0.25)
    splits = {row["photo_id"]: row["split"] for row in photos_of(source)}
    assert len(splits) == 400
    assert 60 < Counter(splits.values())["validation"] < 140
    assert all(splits[row["photo_id"]] == row["split"] for row in boxes_of(source))
    assert splits == dict(zip(splits, assign_splits(list(splits), seed, 0.25), strict=True))
    only = opened(path, seed=seed, validation_share=0.25, splits=("validation",))
    held_out = {name for name, split in splits.items() if split == "validation"}
    assert {row["photo_id"] for row in boxes_of(only)} == {row["photo_id"] for row in photos_of(only)} == held_out


@given(st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True), max_size=30), st.integers(0, 9), st.floats(0, 0.9))
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
        name = tmp_path / f"instances_{split}.json"
        write(name, [annotation(1, image_id=number)], [image(number)])
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


# More levels than Python's parser takes, whose limit bounds its stack. Where a Python takes them, the file is no JSON either.
DEEP = sys.getrecursionlimit() + 10
WHOLE = json.dumps({"images": [image(7)], "annotations": [annotation(1)], "categories": CATEGORIES}, indent=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"line 1, column 1: not JSON .*cut off"),
        (WHOLE[: WHOLE.index("iscrowd")], r"boxes.json, line 21, column 4: not JSON .*cut off"),
        (WHOLE.replace('"iscrowd": 0', '"iscrowd": 0 0'), r"line 21, column 17: not JSON .*damaged"),
        (b"\xff\xfe" + WHOLE.encode("utf-16-le"), "not UTF-8 text"),
        (gzip.compress(WHOLE.encode()), "name it .json.gz"),
        ("[" * DEEP, "JSON that cannot be read|not JSON"),
        ('{"images": ' + "9" * 5000 + "}", "JSON that cannot be read"),
        ("[]", "a JSON list"),
        ('{"images": []}', r"no list `annotations` in it \(found: \['images'\]\)"),
        ('{"images": [], "annotations": [], "categories": {}}', "no list `categories`"),
        ('{"images": {}, "annotations": [], "categories": []}', "no list `images`"),
        ('{"images": [], "annotations": [{"segments_info": [{"bbox": [1]}]}]}', "no annotation has a `bbox` .*panoptic"),
        ('{"images": [], "annotations": [null, {"caption": "a car"}]}', "no annotation has a `bbox` .*caption"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_with_the_place(file, content, message):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        opened(file)


@pytest.mark.parametrize("packed", [gzip.compress(WHOLE.encode())[:-20], b"", b"no gzip"])
def test_a_damaged_gzip_is_refused(tmp_path, packed):
    path = tmp_path / "boxes.json.gz"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"boxes.json.gz.*cut off"):
        opened(path)


def test_a_byte_order_mark_does_not_matter(file):
    file.write_bytes(b"\xef\xbb\xbf" + WHOLE.encode())
    assert len(boxes_of(opened(file))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [image(7), image(8), image(7, width=50)]}, r"image id 7 stands twice in `images`, the second time, entry 3"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "lorry"}]}, r"category id 3 .* as `car` and, entry 4, as `lorry`"),
        ({"images": [image(7), image(7, file_name="other.jpg")]}, "image id 7 stands twice"),
        ({"images": [image("p1"), image("p1.jpg")]}, "image id p1.jpg and another one get the same id, p1"),
        ({"categories": [{"name": "car"}]}, r"entry 1 of `categories` is {'name': 'car'}, expected an `id`"),
        ({"categories": ["car"]}, r"entry 1 of `categories` is 'car'"),
    ],
)
def test_an_id_that_stands_for_two_things_is_refused(file, content, message):
    with pytest.raises(InputError, match=message):
        opened(write(file, [annotation(1)], **content))


def test_an_image_that_stands_twice_alike_is_one(file):
    assert len(photos_of(opened(write(file, [annotation(1)], [image(7), image(7)])))) == 1


def test_files_must_agree_about_ids(tmp_path):
    """Every split numbered from 0 is common, and would put two photos under one id."""
    write(tmp_path / "instances_train.json", [annotation(1)])
    val = tmp_path / "instances_val.json"
    write(val, [annotation(1)])
    with pytest.raises(InputError, match=r"instances_val.json: image id 7 is in instances_train.json too"):
        opened(tmp_path)
    write(val, [], [image(8)], [{"id": 3, "name": "lorry"}])
    with pytest.raises(InputError, match=r"category 3 is `lorry`, in another file `car`"):
        opened(tmp_path)


def test_a_folder_needs_one_file_for_each_split(tmp_path):
    with pytest.raises(InputError, match=r"no such file or folder"):
        opened(tmp_path / "nowhere")
    write(tmp_path / "instances_train2017.json", [annotation(1)])
    with pytest.raises(InputError, match=r"no file instances_val\*.json .* for the split validation; .*take `validation` out"):
        opened(tmp_path)
    write(tmp_path / "instances_train2014.json", [annotation(1)])
    with pytest.raises(
        InputError, match=r"instances_train2014.json and instances_train2017.json are both instances_train\*.json"
    ):
        opened(tmp_path, splits=("train",))


def test_the_preset_can_be_loaded():
    build = load_settings(BuildSettings, "build", [], preset("coco"))
    assert (build.source.kind, build.selection.reject_flags) == ("coco", ("group_of",))
    assert load_settings(TrainSettings, "train", [], preset("coco")).dataset == build.out


def test_real_data(real_data):
    """48 photos and 492 annotations of COCO 2017, six of them crowds in RLE: all are sound, and each outline lies in its box."""
    folder = real_data / "coco_mini"
    source = opened(folder / "instances.json", folder / "images", splits=("train", "validation"))
    rows, photos = boxes_of(source), {row["photo_id"]: row for row in photos_of(source)}
    assert (len(rows), len(photos), len(source.class_names)) == (492, 48, 80 + 11)
    assert Counter(row["problem"] for row in rows) == {None: 492}
    assert Counter(row["is_group_of"] for row in rows) == {0: 486, 1: 6}
    assert all((folder / "images" / photo["file_name"]).is_file() for photo in photos.values())
    assert all(photo["licence"].startswith("http") for photo in photos.values())
    for row in rows:
        photo = photos[row["photo_id"]]
        x, y, width, height = coco_mask.toBbox({"size": [photo["height"], photo["width"]], "counts": row["segmentation"]})
        box = np.array([row["x_min"], row["y_min"], row["x_max"], row["y_max"]]) * ([photo["width"], photo["height"]] * 2)
        assert np.abs(box - (x, y, x + width, y + height)).max() < 4.5  # Rounding at the ends of polygons; 3.4 px at most.
    vehicles = below(["vehicle"], source, "include_labels")
    assert {"2", "3", "4", "5", "6", "7", "8", "9"} < vehicles
