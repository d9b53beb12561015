"""COCO files in which several images are of one file: one photo, which has the boxes of all of them."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.selection.objects import Selection, select_objects
from tests.coco_files import annotation, boxes_of, image, opened, photos_of, write


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


def test_a_box_that_stands_twice_is_a_duplicate_of_itself(tmp_path, photos):
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
