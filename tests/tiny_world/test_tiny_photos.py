"""The tiny world's photos and tables: law 1 (bytes depend on names only), Open Images' layout, honest boxes and flags."""

import base64
import csv
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tiny_world.kinds import INSTANCES_PER_KIND, KINDS, instance
from tiny_world.make_photos import BOX_COLUMNS, PHOTO_COLUMNS, PHOTO_TABLES, make_world, photo_id
from tiny_world.scenes import Light, boxes_of, plan_scene, render_scene

OFFICIAL_BOX_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_groups_say_which_individual_a_box_shows(world: Path, tmp_path: Path) -> None:
    """The same photos and tables, and one more: all boxes but those around many; some individuals are seen in several scenes."""
    make_world(tmp_path, train_photos=60, validation_photos=15, seed=3, processes=1, groups=True)
    files = files_of(tmp_path)
    files.pop("boxes.csv")
    assert files == files_of(world)
    rows = rows_of(tmp_path / "boxes.csv")
    expected, seen_in = set(), {}
    for split, count in (("train", 60), ("validation", 15)):
        for index in range(count):
            scene = plan_scene(3, split, index)
            if scene.is_group:
                continue
            boxes = boxes_of(scene, *render_scene(scene)[1:])
            for box in boxes:
                (who,) = {who for who, _ in scene.objects if who.kind == box.kind}
                name = f"{split}/{photo_id(3, split, index)}.jpg"
                expected.add(
                    (name, f"{box.x_min:.6f}", KINDS[box.kind].name, f"{split}-{who.kind}-{who.number}", str(scene.width))
                )
                seen_in.setdefault((split, who.kind, who.number), set()).add(name)
    assert {(row["photo"], row["x_min"], row["label"], row["group"], row["width"]) for row in rows} == expected
    assert {row["split"] for row in rows} == {"train", "validation"}
    assert all(row["photo"].startswith(row["split"]) and row["group"].startswith(row["split"]) for row in rows)
    assert sum(len(photos) > 1 for photos in seen_in.values()) > 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, train_photos=60, validation_photos=15, seed=3, processes=1)
    return folder


def test_bytes_do_not_depend_on_the_number_of_processes_nor_a_photo_on_the_others(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "same", train_photos=60, validation_photos=15, seed=3, processes=2)
    assert files_of(tmp_path / "same") == files_of(world)
    make_world(tmp_path / "small", train_photos=9, validation_photos=1, seed=3, processes=1)
    photos = {name: data for name, data in files_of(tmp_path / "small").items() if name.endswith(".jpg")}
    assert len(photos) == 10
    assert photos.items() <= files_of(world).items()
    make_world(tmp_path / "other", train_photos=9, validation_photos=1, seed=4, processes=1)
    assert not set(photos.values()) & set(files_of(tmp_path / "other").values())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_box_table_is_that_of_open_images(world: Path, split: str) -> None:
    path = world / f"{split}-annotations-bbox.csv"
    assert path.read_text().splitlines()[0] == OFFICIAL_BOX_COLUMNS == ",".join(BOX_COLUMNS)
    with (world / "class-descriptions-boxable.csv").open() as file:
        names = dict(csv.reader(file))
    assert len(names) == len(KINDS) >= 12
    rows = rows_of(path)
    assert {row["ImageID"] for row in rows} <= {file.stem for file in (world / split).glob("*.jpg")}
    for row in rows:
        assert 0 <= float(row["XMin"]) < float(row["XMax"]) <= 1
        assert 0 <= float(row["YMin"]) < float(row["YMax"]) <= 1
        assert all(len(row[edge].split(".")[1]) == 6 for edge in ("XMin", "XMax", "YMin", "YMax"))
        assert row["LabelName"] in names
        assert {row[flag] for flag in FLAGS} <= ({"-1"} if row["Source"] == "activemil" else {"0", "1"})
    sources = Counter(row["Source"] for row in rows)
    assert split == "validation" or 0 < sources["activemil"] < sources["xclick"], "unknown flags occur"


def test_flags_and_the_area_rule_have_every_outcome() -> None:
    """Otherwise a pipeline that drops or mixes them up would pass on this world."""
    outcomes: Counter[str] = Counter()
    for index in range(150):
        scene = plan_scene(0, "train", index)
        for box in boxes_of(scene, *render_scene(scene)[1:]):
            area = (box.x_max - box.x_min) * (box.y_max - box.y_min)
            outcomes.update({"small": area < 0.02, "large": area > 0.8, "group": box.is_group})
            outcomes.update({"occluded": box.is_occluded, "truncated": box.is_truncated, "all": 1})
            if box.is_truncated and not box.is_occluded:
                assert min(box.x_min, box.y_min, 1 - box.x_max, 1 - box.y_max) == 0
    assert all(outcomes[name] > 0 for name in ("small", "large", "group", "occluded", "truncated"))
    assert outcomes["small"] + outcomes["large"] < 0.1 * outcomes["all"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_photo_table_describes_the_files(world: Path, split: str) -> None:
    rows = rows_of(world / PHOTO_TABLES[split])
    assert list(rows[0]) == PHOTO_COLUMNS
    assert len(PHOTO_COLUMNS) == 12
    assert len(rows) == len(list((world / split).glob("*.jpg")))
    for row in rows:
        data = (world / split / f"{row['ImageID']}.jpg").read_bytes()
        assert int(row["OriginalSize"]) == len(data)
        assert base64.b64decode(row["OriginalMD5"]) == hashlib.md5(data).digest()
        assert row["Subset"] == split
        assert len(row["ImageID"]) == 16
        assert int(row["ImageID"], 16) >= 0


def test_splits_share_no_instance_and_no_photo() -> None:
    """Compared by look, not by name: an instance drawn without its split would be the same in both."""
    looks = {
        split: {
            replace(instance(0, split, kind, number), split="", number=0) for kind in range(len(KINDS)) for number in range(count)
        }
        for split, count in INSTANCES_PER_KIND.items()
    }
    assert {split: len(found) for split, found in looks.items()} == {
        split: len(KINDS) * count for split, count in INSTANCES_PER_KIND.items()
    }
    assert not looks["train"] & looks["validation"]
    for split in looks:
        shown = {who for index in range(150) for who, _ in plan_scene(0, split, index).objects}
        assert {replace(who, split="", number=0) for who in shown} <= looks[split]
        assert {who.kind for who in shown} == set(range(len(KINDS)))
    ids = {photo_id(0, split, index) for split in looks for index in range(1000)}
    assert len(ids) == 2000


def test_boxes_are_tight_around_what_is_seen() -> None:
    """Each object is repainted in one pure colour without light, and found again by that colour alone."""
    errors_px = []
    for index in range(40):
        scene = plan_scene(0, "train", index)
        if scene.is_group:
            continue
        pure = [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
        painted = [
            (replace(who, first=colour, second=colour), pose) for (who, pose), colour in zip(scene.objects, pure, strict=False)
        ]
        plain = replace(scene, light=Light(0.0, 0.0, 1.0), objects=tuple(painted))
        photo = render_scene(plain)[0].astype(float)
        ground = render_scene(replace(plain, objects=()))[0].astype(float)
        boxes = boxes_of(scene, *render_scene(scene)[1:])
        if len(boxes) < len(scene.objects):
            continue
        for box, colour in zip(boxes, pure, strict=False):
            if box.is_occluded:
                continue
            is_object = np.linalg.norm(photo - 255 * np.array(colour), axis=2) < np.linalg.norm(photo - ground, axis=2)
            columns, rows = np.flatnonzero(is_object.any(0)), np.flatnonzero(is_object.any(1))
            found = [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1]
            size = [scene.width, scene.width, scene.height, scene.height]
            box_px = np.multiply([box.x_min, box.x_max, box.y_min, box.y_max], size)
            errors_px.append(box_px - found)
    assert len(errors_px) > 40
    # Tips thinner than a pixel fade into their shadow; a systematic shift of one pixel would show in the mean.
    assert np.abs(errors_px).max() <= 3
    assert np.abs(np.mean(errors_px, 0)).max() < 0.3
