"""YOLO's files as they come: rows, names of classes, and where photos and label files lie; what is wrong costs its row."""

from pathlib import Path

import pytest

from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.annotations.yolo import find_data
from pipelines.config import BuildSettings
from tests.format_files import photo, write


def source_of(folder: Path, photos: Path | None = None, **source: object) -> Source:
    source = {
        "splits": ("train", "validation", "test"),
        "kind": "yolo",
        "annotations": folder,
        "photos": photos or folder,
        **source,
    }
    return open_source(BuildSettings(out=folder / "out", source=source))


def rows(source: Source) -> list[dict]:
    return [row for batch in source.read_boxes() for row in batch.to_pylist()]


def names_of_photos(source: Source) -> dict[str, str]:
    return {row["file_name"]: row["split"] for batch in source.read_photos() for row in batch.to_pylist()}


def one_photo(folder: Path, text: str, keys: str = "names: [cat, dog]") -> Source:
    """A dataset of one photo of 160 x 120 px, and its label file."""
    photo(folder / "images" / "train" / "a.png")
    write(folder / "labels" / "train" / "a.txt", text)
    write(folder / "data.yaml", f"train: images/train\n{keys}\n")
    return source_of(folder, splits=("train",))


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ("0 0.5 0.5", "bad_row", "3 numbers in '0 0.5 0.5', expected class x y width height"),
        ("cat 0.5 0.5 0.2 0.2", "bad_row", "'cat' is no number of a class"),
        ("-1 0.5 0.5 0.2 0.2", "bad_row", "'-1' is no number of a class"),
        ("0 0,5 0.5 0.2 0.2", "bad_number", "'0,5' is no finite number"),
        ("0 0.5 0.5 nan 0.2", "bad_number", "'nan' is no finite number"),
        ("0 0.1 0.1 0.5 0.1 0.5 80", "outside_photo", "an outline with 80.0, expected fractions"),
    ],
)
def test_a_row_that_cannot_be_read_costs_itself(row, reason, says, tmp_path):
    """Its file and line are told; the rows around it are read."""
    good = "1 0.5 0.5 0.25 0.5"
    before, bad, after = rows(one_photo(tmp_path, f"{good}\n{row}\n\n{good}\n"))
    assert (bad["problem"], bad["row"], bad["file"]) == (reason, 2, "labels/train/a.txt")
    assert bad["label"] == (None if reason == "bad_row" else "0"), "a row without one would be told to have no label"
    assert says in bad["detail"]
    assert "labels/train/a.txt, row 2: " in bad["detail"]
    for one, line in ((before, 1), (after, 4)):
        assert (one["problem"], one["row"], one["label"]) == (None, line, "1")
        assert [one[edge] for edge in ("x_min", "y_min", "x_max", "y_max")] == [0.375, 0.25, 0.625, 0.75]


def test_a_label_file_that_is_no_text_costs_itself(tmp_path):
    source = one_photo(tmp_path, "0 0.5 0.5 0.2 0.2")
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"0 0.5 \xff\xfe 0.2 0.2")
    (row,) = rows(source)
    assert row["problem"] == "bad_row"
    assert "no UTF-8 text" in row["detail"]


@pytest.mark.parametrize(
    ("row", "edges", "outline"),
    [
        ("0 0.5 0.5 0.5 0.5", (0.25, 0.25, 0.75, 0.75), False),
        ("0.0 5e-1 +.5 0.5 0.5", (0.25, 0.25, 0.75, 0.75), False),
        ("0 0.5 0.5 0.5 0.5 0.87", (0.25, 0.25, 0.75, 0.75), False),  # With a confidence.
        ("0 0.25 0.25 0.75 0.25 0.5 0.75", (0.25, 0.25, 0.75, 0.75), True),
        ("0 0.25 0.25 0.75 0.25 0.5 0.75 0.9", (0.25, 0.25, 0.75, 0.75), True),  # With a confidence.
    ],
)
def test_what_a_row_may_be(row, edges, outline, tmp_path):
    source = one_photo(tmp_path, f"{row}\n0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 0.05 0.15\n")
    found = rows(source)[0]
    assert [found[edge] for edge in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx(edges)
    assert (found["label"], bool(found["segmentation"])) == ("0", outline)
    more = len(row.split()) in (6, 8)
    assert any("rows with a number more" in note and ": 1;" in note for note in source.read_notes()) == more


@pytest.mark.parametrize(("task", "outline"), [("", False), ("task: obb", False), ("task: segment", True)])
def test_four_points_are_a_turned_box_unless_something_says_that_they_are_an_outline(task, outline, tmp_path):
    """An oriented box and an outline of four points look alike: `task`, or outlines of more points, tell them apart."""
    diamond = "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5"
    source = one_photo(tmp_path / "alone", f"{diamond}\n1 0.5 0.5 0.2 0.2\n", f"names: [cat, dog]\n{task}")
    found = rows(source)
    assert [found[0][edge] for edge in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx((0.1, 0.1, 0.9, 0.9))
    assert bool(found[0]["segmentation"]) == outline
    assert any("oriented boxes" in note for note in source.notes) == (not task)
    beside = one_photo(tmp_path / "beside", f"{diamond}\n0 0.1 0.1 0.2 0.1 0.15 0.2\n")
    assert [bool(row["segmentation"]) for row in rows(beside)] == [True, True]


def test_key_points_are_not_outlines(tmp_path):
    """With `kpt_shape` a row is a box, and key points behind it."""
    (row,) = rows(one_photo(tmp_path, "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.9 0.9 1", "kpt_shape: [2, 3]\nnames: [cat]"))
    assert ([row["x_min"], row["x_max"]], row["segmentation"]) == ([0.25, 0.75], None)


@pytest.mark.parametrize(
    ("keys", "names", "note"),
    [
        ("names: [no, on]\nnc: 2", {"0": "no", "1": "on"}, None),
        ("names:\n  0: cat\n  3: 'dog'", {"0": "cat", "3": "dog"}, None),
        ("names: ['cat']\nnc: 4", {"0": "cat"}, "nc is '4', and there are 1 name"),
        ("names: \"['cat', 'dog']\"", {"0": "cat", "1": "dog"}, None),
        ("nc: 1", {}, "no `names`: classes are called by their numbers"),
    ],
)
def test_names_of_classes(keys, names, note, tmp_path):
    """As text, whatever YAML would make of it; a class that has no name is an error of its row where others have names."""
    source = one_photo(tmp_path, "0 0.5 0.5 0.2 0.2\n", keys)
    assert source.class_names == names
    assert not note or any(note in text for text in source.notes), source.notes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b", "expected keys train, val and names; found list"),
        ("train: {a: b}\nnames: [x]", "`train` is {'a': 'b'}, expected a folder"),
        ("train: images/train\nnames: {cat: 0}", "`names` has 'cat': '0', expected numbers"),
        ("train: images/train\nnames: [x]\ntask: paint", "`task` is 'paint', expected one of detect"),
        ("train: nowhere/at/all\nnames: [x]", "no folder or list 'nowhere/at/all' for the split train"),
        ("train: [a, b", "no YAML in UTF-8 that can be read"),
    ],
)
def test_a_data_file_that_is_none_is_one_sentence(text, says, tmp_path):
    photo(tmp_path / "images" / "train" / "a.jpg")
    with pytest.raises(InputError) as caught:
        source_of(write(tmp_path / "data.yaml", text), tmp_path, splits=("train",))
    assert says in str(caught.value)
    assert "data.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_photos_a_path_of_another_machine_and_labels_beside_photos(tmp_path):
    """All three at once, and no photo twice."""
    for name in ("a/one.jpg", "b/two 2.JPG", "c/three.webp"):
        photo(tmp_path / name)
    write(tmp_path / "a" / "one.txt", "0 0.5 0.5 0.2 0.2")
    listed = f"{tmp_path}/a/one.jpg\n./b/two 2.JPG\n\nC:\\data\\set\\b\\two 2.JPG\n"
    write(tmp_path / "lists" / "train.txt", listed)
    write(tmp_path / "data.yaml", "train: lists/train.txt\nval: /content/drive/set/c\ntest: null\nnames: [cat]\n")
    source = source_of(tmp_path, splits=("train", "validation"))
    assert names_of_photos(source) == {"a/one.jpg": "train", "b/two 2.JPG": "train", "c/three.webp": "validation"}
    assert [row["file"] for row in rows(source)] == ["a/one.txt"]


def test_a_label_file_without_a_photo_is_counted(tmp_path):
    """Its boxes are rejects, unless one photo of its name lies elsewhere below the photo folder."""
    photo(tmp_path / "train" / "images" / "a.jpg")
    for name in ("a", "lost"):
        write(tmp_path / "train" / "labels" / f"{name}.txt", "0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.3 0.3\n")
    write(tmp_path / "data.yaml", "train: ../train/images\nnames: [cat]\n")
    found = rows(source_of(tmp_path, splits=("train",)))
    assert [row["problem"] for row in found] == ["unknown_photo", "unknown_photo", None, None]
    assert "no photo of this name lies below" in found[0]["detail"]
    photo(tmp_path / "train" / "other" / "lost.png")
    assert [row["problem"] for row in rows(source_of(tmp_path, splits=("train",)))] == [None] * 4


def test_photos_elsewhere_than_the_labels(tmp_path):
    """An export of labels alone, and the photos as they always lay; also labels whose folder of images does not exist."""
    photo(tmp_path / "mine" / "2024" / "a.jpg")
    write(tmp_path / "export" / "labels" / "train" / "a.txt", "0 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "export" / "data.yaml", "train: images/train\nnames: [cat]\n")
    source = source_of(tmp_path / "export", tmp_path / "mine", splits=("train",))
    assert names_of_photos(source) == {"2024/a.jpg": "train"}
    assert [row["problem"] for row in rows(source)] == [None]


def test_two_splits_of_the_same_photos_are_divided_by_a_hash(tmp_path):
    """As in coco128.yaml, whose val is its train: all would go to validation, and train would be empty."""
    for number in range(40):
        photo(tmp_path / "images" / f"{number}.jpg")
    write(tmp_path / "data.yaml", "train: images\nval: images\nnames: [cat]\n")
    source = source_of(tmp_path, splits=("train", "validation"), validation_share=0.3)
    splits = list(names_of_photos(source).values())
    assert len(splits) == 40
    assert 3 <= splits.count("validation") <= 24
    assert any("are the same photos" in note for note in source.notes)


def test_folders_called_like_splits_are_splits_where_no_file_says_so(tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / "images" / split / "a.jpg")
        write(tmp_path / "labels" / split / "a.txt", "0 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "classes.txt", "cat\n")
    source = source_of(tmp_path, splits=("train", "validation"))
    assert names_of_photos(source) == {"images/train/a.jpg": "train", "images/val/a.jpg": "validation"}
    assert len(rows(source)) == 2
    assert find_data(tmp_path).names == {"0": "cat"}


def test_roboflows_darknet_export_and_labelimgs_folder(tmp_path):
    """Photos and label files side by side, class names among them; their other text files are no labels."""
    for folder in ("robo/train", "robo/valid", "img"):
        photo(tmp_path / folder / "a.jpg")
        write(tmp_path / folder / "a.txt", "1 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "robo" / "train" / "_darknet.labels", "cat\ndog\n")
    write(tmp_path / "robo" / "README.dataset.txt", "Set v1\n")
    source = source_of(tmp_path / "robo", splits=("train", "validation"))
    assert names_of_photos(source) == {"train/a.jpg": "train", "valid/a.jpg": "validation"}
    assert ([row["label"] for row in rows(source)], source.class_names) == (["1", "1"], {"0": "cat", "1": "dog"})
    write(tmp_path / "img" / "classes.txt", "cat\ndog\n")
    source = source_of(tmp_path / "img", splits=("train", "validation"))
    assert ([row["file"] for row in rows(source)], source.class_names) == (["a.txt"], {"0": "cat", "1": "dog"})


def test_no_name_leads_out_of_the_photo_folder(tmp_path):
    """A list of a stranger names files anywhere: what is read lies in the dataset's folder."""
    photo(tmp_path / "set" / "images" / "a.jpg")
    photo(tmp_path / "secret" / "b.jpg")
    write(tmp_path / "secret" / "b.txt", "0 0.5 0.5 0.2 0.2")
    write(tmp_path / "set" / "train.txt", "images/a.jpg\n../secret/b.jpg\n")
    write(tmp_path / "set" / "data.yaml", "train: train.txt\nnames: [cat]\n")
    source = source_of(tmp_path / "set", splits=("train",))
    assert list(names_of_photos(source)) == ["images/a.jpg", "secret/b.jpg"]  # The second one is of no file.
    assert rows(source) == []


def test_grey_backgrounds_take_an_outline(tmp_path):
    """Boxes alone leave nothing to cut out: a build that promises it is refused."""
    one_photo(tmp_path, "0 0.5 0.5 0.5 0.5")
    source = {"kind": "yolo", "annotations": tmp_path, "photos": tmp_path}
    settings = BuildSettings(out=tmp_path / "out", source=source, references={"background": "grey"})
    with pytest.raises(InputError, match=r"grey takes object masks, and .* has none: none of its boxes has an outline"):
        open_source(settings)
    one_photo(tmp_path, "0 0.5 0.5 0.5 0.5\n0 0.25 0.25 0.75 0.25 0.5 0.75")
    assert not open_source(settings).no_masks
