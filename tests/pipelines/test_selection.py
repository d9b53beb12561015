"""The selection as a stage: every rule, the books, and that no order of the input decides anything.

`expected` below is a second implementation of docs/selection.md in plain Python, one box at a time.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.geometry import reference_window
from pipelines.selection import objects as objects_stage
from pipelines.selection import partition, selector
from pipelines.selection.classes import ClassQuota, quotas
from pipelines.selection.objects import Selection, select_objects
from pipelines.selection.partition import SpillFiles, partition_by_photo
from pipelines.selection.rules import suppress
from pipelines.selection.selector import object_shares
from schemas.tables import BOXES, OBJECTS, PHOTOS, REJECT_REASONS, REJECTS

GOOD = {
    "split": "train", "photo_id": "0a1b", "label": "/m/1", "x_min": 0.1, "x_max": 0.6, "y_min": 0.2, "y_max": 0.7,
    "is_occluded": 0, "is_truncated": 0, "is_group_of": 0, "is_depiction": 0, "is_inside": 0, "file": "a.csv", "row": 1,
}  # fmt: skip
PLAIN = {"reject_flags": (), "near_duplicate_iou": None}
FREE = {"min_area": 0.0, "max_area": 1.0, **PLAIN}


def source_of(rows: list[dict], photos: list[dict] = (), batch: int = 7, listed: bool = False, **known) -> Source:
    """Boxes and photos as a source, in small batches."""

    def batches(items, schema):
        for start in range(0, len(items), batch):
            yield pa.RecordBatch.from_pylist(items[start : start + batch], schema=schema)

    return Source(
        name="test",
        files=(),
        frame="stored",
        read_boxes=lambda: batches(rows, BOXES),
        read_photos=lambda: batches(photos, PHOTOS),
        listed_splits=frozenset({"train", "validation"} if listed else ()),
        rows=len(rows),
        **known,
    )


def run(source: Source, out: Path, rules: dict | None = None, seed: int = 0, **source_settings) -> tuple[Selection, list, list]:
    """The stage: what it found, objects, rejects."""
    chosen = BuildSettings(
        out=out,
        seed=seed,
        source=SourceSettings(annotations=out, photos=out, **source_settings),
        selection=SelectionSettings(**(rules or {})),
    )
    selection = select_objects(chosen, out, source)
    assert not list(out.glob(".*")), "temporary files stay behind"
    objects, rejects = (pq.read_table(out / f"{name}.parquet") for name in ("objects", "rejects"))
    assert objects.schema.equals(OBJECTS)
    assert rejects.schema.equals(REJECTS)
    return selection, objects.to_pylist(), rejects.to_pylist()


def boxes(*changes: dict) -> list[dict]:
    return [{**GOOD, "row": number, **change} for number, change in enumerate(changes, 1)]


def far(number: int = 0) -> dict:
    """A box that breaks no rule and meets no other."""
    return {"photo_id": f"far{number}", "x_min": 0.3, "x_max": 0.7, "y_min": 0.3, "y_max": 0.7}


UNREAD = {"problem": "bad_row", "detail": "5 cells", "split": "train", "file": "a.csv", "row": 1}


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({}, None, None),
        ({"x_max": 0.14, "y_max": 0.7}, None, None),  # 0.04 x 0.5 = 0.02, the smallest area that is accepted
        ({"x_max": 0.139}, "too_small", None),
        ({"x_min": 0.0, "x_max": 1.0, "y_min": 0.0, "y_max": 0.81}, "too_large", None),
        ({"is_group_of": 1}, "group_of", None),
        ({"is_depiction": 1}, "depiction", None),
        ({"is_inside": 1}, "inside", None),
        ({"is_occluded": 1, "is_truncated": 1}, None, None),
        ({"is_inside": -1}, None, None),
        ({"is_group_of": 2}, "bad_flag", "is_group_of is 2, expected 1, 0 or -1"),
        ({"is_occluded": None}, "bad_flag", "is_occluded is empty"),
        ({"x_min": 0.6}, "empty_box", "x_min is 0.6 and x_max is 0.6"),
        ({"x_min": float("nan")}, "bad_number", "x_min is empty or not a number"),
        ({"y_max": None}, "bad_number", "y_max is empty"),
        ({"x_min": -0.01}, "outside_photo", "x_min is -0.01"),
        ({"y_max": 1.5}, "outside_photo", "y_max is 1.5, not a fraction"),
        ({"y_min": float("-inf")}, "outside_photo", "y_min is -inf"),
        ({"label": None}, "no_label", "empty"),
        ({"photo_id": "../../etc/passwd"}, "bad_photo_id", "../../etc/passwd"),
        ({"photo_id": ""}, "bad_photo_id", "letters, digits"),
        ({"photo_id": None}, "bad_photo_id", "None"),
        ({"photo_id": "a" * 65}, "bad_photo_id", "aaa"),
        ({"photo_id": "a\n"}, "bad_photo_id", "a"),
        ({**dict.fromkeys(GOOD, None), **UNREAD}, "bad_row", "5 cells"),
        ({"problem": "bad_number", "detail": "XMin is 'wide'", "x_min": None}, "bad_number", "XMin is 'wide'"),
        ({"problem": "unknown_photo", "detail": "no file a.jpg", "x_min": None}, "unknown_photo", "no file a.jpg"),
    ],
)  # fmt: skip
def test_each_rule_has_its_reason_and_malformed_rows_say_what_is_wrong(change, reason, detail, tmp_path):
    selection, objects, rejects = run(source_of(boxes(change, far())), tmp_path, {"min_area": 0.0199999})
    assert len(objects) == (1 if reason else 2)
    assert [reject["reason"] for reject in rejects] == ([reason] if reason else [])
    assert selection.rejects == ({reason: 1} if reason else {})
    if detail:
        assert detail in rejects[0]["detail"]
        assert selection.examples[reason] == [f"a.csv, row 1: {rejects[0]['detail']}"]
    elif reason:
        assert rejects[0]["detail"] is None
        assert selection.examples == {}


def test_what_is_not_known_of_a_rejected_row_stays_null(tmp_path):
    row = boxes({"x_min": None, "is_inside": None, "label": None})[0]
    _, _, (reject,) = run(source_of([row, *boxes(far())]), tmp_path)
    assert (reject["x_min"], reject["is_inside"], reject["label"], reject["x_max"]) == (None, None, None, 0.6)
    assert (reject["file"], reject["row"], reject["reasons"]) == ("a.csv", 1, None)


def test_all_reasons_are_written_on_request(tmp_path):
    rows = boxes({"is_group_of": 1, "is_inside": 1, "x_max": 0.11}, far())
    _, _, (reject,) = run(source_of(rows), tmp_path, {"all_reasons": True})
    assert reject["reason"] == "group_of"
    assert reject["reasons"] == ["group_of", "inside", "too_small"]
    unread = boxes(
        {"is_group_of": 1, "problem": "bad_row", "detail": "no UTF-8"},
        {"label": None, "problem": "bad_flag", "detail": "IsInside"},
        far(),
    )
    _, _, rejects = run(source_of(unread), tmp_path, {"all_reasons": True})
    found = {row["row"]: (row["reasons"], row["detail"]) for row in rejects}
    assert found == {1: (["bad_row"], "no UTF-8"), 2: (["no_label", "bad_flag"], "the label is empty")}


def test_sides_and_aspect_are_px_and_asked_only_where_the_size_is_known(tmp_path):
    tall = {"x_min": 0.4, "x_max": 0.6, "y_min": 0.0, "y_max": 0.5}
    rows = boxes({**tall, "photo_id": "wide"}, {**tall, "photo_id": "narrow"}, {**tall, "photo_id": "unknown"})
    photos = [
        {"split": "train", "photo_id": "wide", "width": 1000, "height": 400},  # 200 x 200 px
        {"split": "train", "photo_id": "narrow", "width": 200, "height": 400},  # 40 x 200 px
    ]
    for rules, reason in (({"min_side": 41}, "reference_too_small"), ({"max_aspect": 4.9}, "too_elongated")):
        _, objects, rejects = run(source_of(rows, photos), tmp_path, rules)
        assert {row["photo_id"] for row in objects} == {"wide", "unknown"}
        assert [(row["photo_id"], row["reason"]) for row in rejects] == [("narrow", reason)]
    for rules in ({"min_side": 40}, {"max_aspect": 5}):
        assert len(run(source_of(rows, photos), tmp_path, rules)[1]) == 3


OUTLINED = {"width": 200, "height": 100}


def outlined(photo: str, share: float, **change) -> dict:
    """A box of 100 x 40 px in a photo of 200 x 100 px, whose outline covers this share of the box padded by 10 px: 7,200 px."""
    pixels = np.zeros((100, 200), bool)
    pixels[30:70, 50:150].flat[: round(share * 7200)] = True
    counts = coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode()
    place = {"x_min": 0.25, "x_max": 0.75, "y_min": 0.3, "y_max": 0.7}
    return {"photo_id": photo, **place, "segmentation": counts, **change}


@pytest.mark.parametrize(
    ("rules", "references", "empty"),
    [
        ({}, {"background": "grey"}, ["under"]),
        ({}, {"background": "keep"}, []),
        ({}, {}, []),
        ({"min_object_share": None}, {"background": "grey"}, []),
        ({"min_object_share": 0.3}, {"background": "grey"}, ["over", "under"]),
        # Without padding the reference is the box, 4,000 px.
        ({}, {"background": "grey", "padding": 0}, []),
    ],
)
def test_references_that_would_be_cut_out_to_almost_nothing_are_rejected(rules, references, empty, tmp_path):
    """By the tables alone: 1,440 px are a fifth of a reference. Not asked where the photo has no size or the box no outline."""
    rows = boxes(
        outlined("over", 0.2), outlined("under", 0.1999), outlined("unknown", 0.01), outlined("none", 1, segmentation=None)
    )
    photos = [{"split": "train", "photo_id": row["photo_id"], **OUTLINED} for row in rows if row["photo_id"] != "unknown"]
    chosen = BuildSettings(
        out=tmp_path,
        source=SourceSettings(annotations=tmp_path, photos=tmp_path),
        selection=SelectionSettings(**rules),
        references=references,
    )
    selection = select_objects(chosen, tmp_path, source_of(rows, photos))
    rejects = pq.read_table(tmp_path / "rejects.parquet").to_pylist()
    assert sorted(reject["photo_id"] for reject in rejects) == empty
    assert selection.rejects == ({"reference_too_empty": len(empty)} if empty else {})
    assert selection.boxes == selection.objects + len(empty)


def test_the_share_of_an_object_is_that_of_its_reference_as_cut():
    """At the photo's edges, with fractions of pixels; more outlines than pycocotools measures at once. Counted pixel by pixel."""
    draw = np.random.default_rng(0)
    edges = {name: [] for name in ("x_min", "x_max", "y_min", "y_max")}
    counts, expected = [], []
    for _ in range(300):
        (left, right), (top, bottom) = (np.sort(draw.uniform(0, side, 2)) for side in (200, 100))
        pixels = np.zeros((100, 200), bool)
        pixels[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = draw.random((int(bottom) - int(top) + 1, 1)) < 0.5
        pixels[int(top), int(left)] = True
        x_min, y_min, x_max, y_max = reference_window(Rectangle(left, top, right, bottom), 200, 100, 7)
        expected.append(pixels[y_min:y_max, x_min:x_max].mean())
        counts.append(coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode())
        for name, value in zip(edges, (left / 200, right / 200, top / 100, bottom / 100), strict=True):
            edges[name].append(value)
    sides = np.full(301, 200.0), np.full(301, 100.0)
    columns = {name: np.array([*values, np.nan]) for name, values in edges.items()}
    shares = object_shares(pa.array([*counts, counts[0]]), sides, columns, 7)
    assert shares[:300] == pytest.approx(expected)
    assert np.isnan(shares[300]), "a box without a place"
    assert np.isnan(object_shares(pa.nulls(301, pa.string()), sides, columns, 7)).all()


def test_of_near_duplicates_the_largest_stays_under_whatever_label(tmp_path):
    large = {"x_min": 0.1, "x_max": 0.6, "y_min": 0.1, "y_max": 0.6}
    rows = boxes({**large, "x_max": 0.58, "label": "/m/2"}, large, {**large, "x_min": 0.3}, {**large, "photo_id": "other"})
    _, objects, rejects = run(source_of(rows), tmp_path, {"near_duplicate_iou": 0.9})
    assert [(row["row"], row["reason"]) for row in rejects] == [(1, "near_duplicate")]
    assert len(objects) == 3
    assert len(run(source_of(rows), tmp_path, PLAIN)[1]) == 4


def test_nested_boxes_go_if_wished(tmp_path):
    outer, inner = (
        {"x_min": 0.0, "x_max": 0.8, "y_min": 0.0, "y_max": 0.8},
        {"x_min": 0.7, "x_max": 0.9, "y_min": 0.1, "y_max": 0.5},
    )
    rows = boxes(outer, inner)  # Half of the inner box lies in the outer one.
    assert [row["reason"] for row in run(source_of(rows), tmp_path, {"nested_share": 0.49})[2]] == ["nested"]
    assert run(source_of(rows), tmp_path, {"nested_share": 0.51})[2] == []
    assert run(source_of(rows), tmp_path)[2] == []


def test_a_box_that_stands_twice_is_one_object_and_its_flags_decide_which(tmp_path):
    for rows in itertools.permutations(boxes({}, {"is_occluded": 1}, {"x_min": 0.3})):
        _, objects, rejects = run(source_of(list(rows)), tmp_path, PLAIN)
        assert sorted(row["is_occluded"] for row in objects) == [0, 0]
        assert [(row["row"], row["reason"]) for row in rejects] == [(2, "duplicate")]


CLASSES = {"/m/animal": "Animal", "/m/cat": "Cat", "/m/lion": "Lion", "/m/car": "Car", "/m/car2": "Car"}
BELOW = {"/m/entity": ("/m/animal", "/m/car"), "/m/animal": ("/m/cat",), "/m/cat": ("/m/lion",)}


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({}, {"/m/cat", "/m/lion", "/m/car"}),
        ({"include_labels": ("cat",)}, {"/m/cat", "/m/lion"}),
        ({"include_labels": ("/m/entity",), "exclude_labels": ("Cat",)}, {"/m/car"}),
        ({"exclude_labels": ("/m/lion",)}, {"/m/cat", "/m/car"}),
        ({"include_labels": ("/m/car",)}, {"/m/car"}),
    ],
)
def test_labels_are_chosen_by_name_or_id_with_all_below_them(rules, left, tmp_path):
    rows = boxes(*({"label": label, "photo_id": f"p{place}"} for place, label in enumerate(("/m/cat", "/m/lion", "/m/car"))))
    _, objects, rejects = run(source_of(rows, class_names=CLASSES, subclasses=BELOW), tmp_path, rules)
    assert {row["label"] for row in objects} == left
    assert {row["reason"] for row in rejects} <= {"label_excluded"}
    assert {row["label_name"] for row in objects} == {CLASSES[label] for label in left}


@pytest.mark.parametrize("key", ["include_labels", "exclude_labels"])
def test_a_class_that_is_taken_without_those_below_it_is_noted(key, tmp_path):
    """Where there is no class hierarchy, or where it has not the class: fewer boxes than one would think, and status 0."""
    rows = boxes({"label": "/m/cat"}, {"label": "/m/lion", "photo_id": "b"}, {"label": "/m/bus", "photo_id": "c"})
    names = {**CLASSES, "/m/bus": "Bus"}
    without, _, _ = run(source_of(rows, class_names=names), tmp_path, {key: ("Cat",)})
    assert re.match(
        f"selection.{key} means Cat alone, and nothing below: no class hierarchy is read .bbox_labels_600_hierarchy.json belongs "
        "beside the annotations; docs/selection.md#files-of-open-images",
        without.notes[0],
    )
    outside, _, _ = run(source_of(rows, class_names=names, subclasses=BELOW), tmp_path, {key: ("Bus",)})
    assert outside.notes[0] == f"selection.{key}: Bus: not in the class hierarchy, so nothing is below"
    known, _, _ = run(source_of(rows, class_names=names, subclasses=BELOW), tmp_path, {key: ("/m/lion",)})
    of_own, _, _ = run(source_of(rows), tmp_path, {key: ("/m/cat",)}, kind="boxes", unit="fraction")
    assert [note for selection in (known, of_own) for note in selection.notes if "hierarchy" in note] == []


def test_no_box_for_want_of_a_hierarchy_is_said_to_be_that(tmp_path):
    source = source_of(boxes({"label": "/m/cat"}), class_names=CLASSES)
    with pytest.raises(InputError, match=r"none of the 1 box .*data-format.md#reasons-of-rejects.*no class hierarchy"):
        run(source, tmp_path, {"include_labels": ("Animal",)})


@pytest.mark.parametrize(
    ("label", "message"),
    [("Lyon", "no class 'Lyon'; did you mean Lion"), ("car", "several classes are called 'car': /m/car, /m/car2")],
)
def test_a_label_that_is_none_is_named_before_any_work(label, message, tmp_path):
    source = source_of(boxes({"label": "/m/cat"}), class_names=CLASSES, subclasses=BELOW)
    with pytest.raises(InputError, match=message):
        run(source, tmp_path, {"include_labels": (label,)})
    assert list(tmp_path.iterdir()) == []


def test_photos_are_joined_and_those_that_are_not_listed_are_errors_of_their_rows(tmp_path):
    known = {"url": "https://x/b", "author": "NA", "licence": "cc", "rotation": 90, "width": 8, "height": 6, "file_name": "b.jpg"}
    photos = [{"split": "train", "photo_id": name, **known} for name in ("b", "empty", "c")]
    rows = boxes({"photo_id": "b"}, {"photo_id": "gone"}, {"photo_id": "c", "split": "validation"})
    selection, (found,), rejects = run(source_of(rows, photos, listed=True), tmp_path)
    assert {name: found[name] for name in known} == known
    assert [(row["split"], row["photo_id"], row["reason"]) for row in rejects] == [
        ("train", "gone", "unknown_photo"), ("validation", "c", "unknown_photo"),
    ]  # fmt: skip
    assert (selection.photos, selection.photos_with_boxes, selection.photos_without_boxes) == (3, 3, 2)
    _, objects, _ = run(source_of(rows, photos), tmp_path)
    assert {(row["split"], row["photo_id"]): row["url"] for row in objects}["train", "gone"] is None


def test_of_two_rows_of_a_photo_contents_decide_which_counts(tmp_path):
    photos = [
        {"split": "train", "photo_id": "b", "url": url, "author": author} for url, author in (("x", "B"), ("x", "A"), ("y", "0"))
    ]
    for shuffled in itertools.permutations(photos):
        _, (found,), _ = run(source_of(boxes({"photo_id": "b"}), list(shuffled)), tmp_path)
        assert (found["url"], found["author"]) == ("x", "A")
    photos = [{"split": "train", "photo_id": "b", "licence": licence, "original_bytes": 7} for licence in ("zz", "aa", "mm")]
    for shuffled in itertools.permutations(photos):
        _, (found,), _ = run(source_of(boxes({"photo_id": "b"}), list(shuffled)), tmp_path)
        assert found["licence"] == "aa", "by its text, not by the order in which licences were met"


@pytest.mark.parametrize("choice", ["drop", "report"])
def test_a_photo_under_two_ids_is_kept_once_and_not_in_train(choice, tmp_path):
    photos = [
        {"split": split, "photo_id": name, "original_md5": md5}
        for split, name, md5 in (
            ("train", "a", "same"), ("validation", "b", "same"), ("train", "c", "other"), ("train", "d", None),
            ("train", "e", None), ("validation", "empty", "other"),
        )
    ]  # fmt: skip
    rows = boxes(*({"photo_id": name, "split": "validation" if name == "b" else "train"} for name in "abcde"))
    selection, objects, rejects = run(source_of(rows, photos), tmp_path, same_photo=choice)
    assert selection.same_photos == {"original_md5": 1, "across_splits": 1}
    (pair,) = pq.read_table(tmp_path / "same_photos.parquet").to_pylist()
    assert (pair["photo_id"], pair["kept_photo_id"], pair["by"]) == ("a", "b", "original_md5")
    assert [(row["photo_id"], row["reason"]) for row in rejects] == ([("a", "same_photo")] if choice == "drop" else [])
    assert {row["photo_id"] for row in objects} == set("abcde") - ({"a"} if choice == "drop" else set())


ADDRESS = "https://x.org/photos/1.jpg"


@pytest.mark.parametrize(
    ("name", "first", "second", "same"),
    [
        ("file_name", "1.jpg", "1.jpg", True),  # In one split, so in one folder.
        ("file_name", "1.jpg", "1.JPG", False),
        ("url", ADDRESS, ADDRESS, True),
        ("url", ADDRESS, ADDRESS + "?size=2", False),
        ("url", "http://", "http://", False),
        ("url", "https://x.org/", "https://x.org/", False),
        ("url", "unknown", "unknown", False),
        ("url", None, None, False),
    ],
)
@pytest.mark.parametrize("choice", ["drop", "report"])
def test_photos_of_one_file_or_one_url_are_one(name, first, second, same, choice, tmp_path):
    photos = [{"split": "train", "photo_id": photo_id, name: value} for photo_id, value in (("a", first), ("b", second))]
    photos.append({"split": "train", "photo_id": "without-boxes", name: first})
    rows = boxes({"photo_id": "a"}, {"photo_id": "b"}, {"photo_id": "c"})
    selection, objects, rejects = run(source_of(rows, photos), tmp_path, same_photo=choice)
    found = pq.read_table(tmp_path / "same_photos.parquet").to_pylist()
    assert [row["by"] for row in found] == [name] * same
    assert selection.same_photos == ({name: 1, "across_splits": 0} if same else {})
    dropped = [row["photo_id"] for row in found] if choice == "drop" else []
    assert [(row["photo_id"], row["reason"]) for row in rejects] == [(photo_id, "same_photo") for photo_id in dropped]
    assert {row["photo_id"] for row in objects} == set("abc") - set(dropped)
    assert any("URL of another photo" in note for note in selection.notes) == (name == "url" and bool(dropped))


@pytest.mark.parametrize("choice", ["drop", "report"])
def test_one_file_in_two_splits_leaves_train(choice, tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    splits = {"a": "train", "b": "validation", "c": "train", "d": "validation"}
    names = {"a": "1.jpg", "b": "1.jpg", "c": "2.jpg", "d": "2.jpg"}  # 2.jpg: one in each split's folder.
    photos = [{"split": splits[photo_id], "photo_id": photo_id, "file_name": names[photo_id]} for photo_id in "abcd"]
    rows = boxes(*({"photo_id": photo_id, "split": splits[photo_id]} for photo_id in "abcd"))
    selection, objects, rejects = run(source_of(rows, photos), tmp_path, same_photo=choice)
    assert selection.same_photos == {"file_name": 1, "across_splits": 1}
    assert [(row["split"], row["photo_id"]) for row in rejects] == ([("train", "a")] if choice == "drop" else [])
    assert len(objects) == 4 - len(rejects)


def many(photos: int, per_photo: int, labels: int = 3, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    rows = []
    for photo in range(photos):
        for _ in range(per_photo):
            x, y = draw.uniform(0, 0.5, 2).tolist()
            rows.append(
                {
                    "photo_id": f"p{photo}",
                    "label": f"/m/{draw.integers(labels)}",
                    "x_min": x,
                    "x_max": x + 0.4,
                    "y_min": y,
                    "y_max": y + 0.4,
                }
            )
    return boxes(*rows)


def names(objects: list[dict]) -> set[str]:
    return {row["object_id"] for row in objects}


def test_a_cap_per_photo_keeps_that_many_and_a_smaller_one_keeps_of_these(tmp_path):
    rows = many(20, 5)
    kept = [run(source_of(rows), tmp_path, {**PLAIN, "max_per_photo": cap})[1] for cap in (1, 3, 9)]
    assert [Counter(row["photo_id"] for row in objects)["p7"] for objects in kept] == [1, 3, 5]
    assert names(kept[0]) < names(kept[1]) < names(kept[2])
    other = run(source_of(rows), tmp_path, {**PLAIN, "max_per_photo": 1}, seed=1)[1]
    assert names(other) != names(kept[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_a_cap_per_class_is_exact_in_each_split(smoothing, tmp_path):
    rows = [{**row, "split": "validation" if row["photo_id"].endswith("0") else "train"} for row in many(60, 5)]
    counts = Counter((row["split"], row["label"]) for row in rows)
    selection, objects, rejects = run(source_of(rows), tmp_path, {**PLAIN, "max_per_class": 20, "class_smoothing": smoothing})
    expected = {key: n if n <= 20 else math.floor(20 * (n / 20) ** smoothing) for key, n in counts.items()}
    assert Counter((row["split"], row["label"]) for row in objects) == expected
    assert {row["reason"] for row in rejects} == ({"over_class_cap"} if smoothing < 1 else set())
    assert sum(selection.objects_by_class["train"].values()) + sum(selection.objects_by_class["validation"].values()) == len(
        objects
    )
    smaller = run(source_of(rows), tmp_path, {**PLAIN, "max_per_class": 10, "class_smoothing": smoothing})[1]
    assert names(smaller) <= names(objects)


def test_a_subset_is_of_whole_photos_and_within_a_larger_one(tmp_path):
    rows = many(400, 2)
    kept = {share: run(source_of(rows), tmp_path, {**PLAIN, "subset": share}) for share in (0.1, 0.5, 1.0)}
    photos = {share: {row["photo_id"] for row in objects} for share, (_, objects, _) in kept.items()}
    assert photos[0.1] < photos[0.5] < photos[1.0]
    assert abs(len(photos[0.5]) - 200) < 4 * math.sqrt(100)
    assert photos[0.5].isdisjoint({row["photo_id"] for row in kept[0.5][2]})
    assert {row["reason"] for row in kept[0.5][2]} == {"not_in_subset"}


number = st.one_of(st.sampled_from([0.0, 0.1, 0.11, 0.3, 0.5, 0.52, 0.9, 1.0]), st.sampled_from([None, float("nan"), -1.0, 2.0]))
some_rows = st.lists(
    st.fixed_dictionaries(
        {
            "photo_id": st.sampled_from(["a", "a", "b", "c/d", ""]),
            "label": st.sampled_from(["/m/cat", "/m/lion", "/m/car", "/m/none", None]),
            "x_min": st.sampled_from([0.0, 0.1, 0.11, 0.3]), "x_max": number,
            "y_min": st.sampled_from([0.0, 0.1, 0.3, 0.32]), "y_max": number,
            **dict.fromkeys(("is_occluded", "is_group_of"), st.sampled_from([0, 0, 0, 0, 1, -1, 7, None])),
            "problem": st.sampled_from([None] * 8 + ["duplicate_id"]),
        }
    ),
    min_size=1, max_size=25,
)  # fmt: skip
some_rules = st.fixed_dictionaries(
    {
        "min_area": st.sampled_from([0.0, 0.02, 0.2]),
        "max_area": st.sampled_from([0.3, 0.8, 1.0]),
        "min_side": st.sampled_from([None, 20]),
        "max_aspect": st.sampled_from([None, 2.0]),
        "reject_flags": st.sampled_from([(), ("group_of",), ("group_of", "occluded")]),
        "unknown_flags": st.sampled_from(["accept", "reject"]),
        "include_labels": st.sampled_from([(), ("Animal",)]),
        "exclude_labels": st.sampled_from([(), ("Lion",)]),
        "near_duplicate_iou": st.sampled_from([None, 0.5, 0.9]),
        "nested_share": st.sampled_from([None, 0.9]),
        "max_per_photo": st.sampled_from([None, 1, 2]),
        "max_per_class": st.sampled_from([None, 1, 2]),
        "class_smoothing": st.sampled_from([0.0, 0.5]),
        "subset": st.sampled_from([1.0, 0.5]),
    }
)
LISTED = [{"split": "train", "photo_id": "a", "width": 100, "height": 50}, {"split": "train", "photo_id": "b"}]


def expected(row: dict, rules: dict) -> list[str]:
    """Reasons of the first group for one box, by docs/selection.md; subset left out (it is a hash)."""
    x_min, x_max, y_min, y_max = (math.nan if row[name] is None else row[name] for name in ("x_min", "x_max", "y_min", "y_max"))
    width, height = x_max - x_min, y_max - y_min
    photo = next((photo for photo in LISTED if photo["photo_id"] == row["photo_id"]), None)
    flags = [row[f"is_{name}"] for name in ("occluded", "truncated", "group_of", "depiction", "inside")]
    included = not rules["include_labels"] or row["label"] in ("/m/cat", "/m/lion")
    excluded = bool(rules["exclude_labels"]) and row["label"] == "/m/lion"
    found = {
        "bad_photo_id": row["photo_id"] in ("c/d", ""),
        "no_label": row["label"] is None,
        "bad_number": any(math.isnan(value) for value in (x_min, x_max, y_min, y_max)),
        "outside_photo": any(value < 0 or value > 1 for value in (x_min, x_max, y_min, y_max)),
        "empty_box": x_min >= x_max or y_min >= y_max,
        "bad_flag": any(flag not in (0, 1, -1) for flag in flags),
        "duplicate_id": row.get("problem") == "duplicate_id",
        "unknown_label": row["label"] == "/m/none",
        "unknown_photo": photo is None,
        "label_excluded": row["label"] is not None and not (included and not excluded),
        **{flag: row[f"is_{flag}"] == 1 for flag in rules["reject_flags"]},
        "unknown_flag": rules["unknown_flags"] == "reject" and any(row[f"is_{flag}"] == -1 for flag in rules["reject_flags"]),
        "too_small": width * height < rules["min_area"],
        "too_large": width * height > rules["max_area"],
    }
    if photo and "width" in photo:
        shorter, longer = sorted((width * 100, height * 50)) if not math.isnan(width + height) else (math.nan, math.nan)
        found["reference_too_small"] = rules["min_side"] is not None and shorter < rules["min_side"]
        found["too_elongated"] = rules["max_aspect"] is not None and longer > shorter * rules["max_aspect"]
    return [reason for reason in REJECT_REASONS if found.get(reason)]


def accepted_beside_others(rows: list[dict], rules: dict) -> set[int]:
    """Rows that pass the second group as well: greedy suppression, nesting and duplicates, one pair at a time."""

    def overlap(a: dict, b: dict) -> float:
        width = min(a["x_max"], b["x_max"]) - max(a["x_min"], b["x_min"])
        height = min(a["y_max"], b["y_max"]) - max(a["y_min"], b["y_min"])
        return max(width, 0) * max(height, 0)

    def area(row: dict) -> float:
        return (row["x_max"] - row["x_min"]) * (row["y_max"] - row["y_min"])

    def touches(row: dict, others: list[dict], share: float | None, beside: Callable[[dict, dict], float]) -> bool:
        return share is not None and any(overlap(row, other) >= share * beside(row, other) for other in others)

    left = set()
    ordered = sorted(rows, key=lambda row: (row["photo_id"], -area(row), row["rank"]))
    for _, group in itertools.groupby(ordered, lambda row: row["photo_id"]):
        kept: list[dict] = []
        before: list[dict] = []
        for row in group:
            near = touches(row, kept, rules["near_duplicate_iou"], lambda a, b: area(a) + area(b) - overlap(a, b))
            nested = touches(row, before, rules["nested_share"], lambda a, _: area(a))
            place = ("label", "x_min", "x_max", "y_min", "y_max")
            same = any(all(row[name] == other[name] for name in place) for other in before)
            if not near:
                kept.append(row)
            before.append(row)
            if not (near or nested or same):
                left.add(row["row"])
    return left


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_rows, some_rules, st.integers(0, 5))
def test_every_box_is_accepted_or_rejected_once_as_the_rules_say(tmp_path_factory, changes, rules, seed):
    """Accepted + rejected = read; first and all reasons, and the accepted, are those of a second implementation."""
    rows = boxes(*changes, *({**far(place), "photo_id": "b", "label": "/m/lion"} for place in range(1)))
    known = {"class_names": CLASSES, "subclasses": BELOW}
    try:
        selection, objects, rejects = run(
            source_of(rows, LISTED, listed=True, **known), tmp_path_factory.mktemp("out"), {**rules, "all_reasons": True}, seed
        )
    except InputError:  # That nothing is accepted has a test of its own.
        return
    assert selection.boxes == len(rows) == len(objects) + len(rejects)
    assert selection.objects == len(objects)
    assert selection.rejects == Counter(row["reason"] for row in rejects)
    assert len({row["row"] for row in rejects}) == len(rejects)
    by_row = {row["row"]: row for row in rejects}
    alone = {row["row"]: expected(row, rules) for row in rows}
    for row in rows:
        reject = by_row.get(row["row"])
        reasons = [reason for reason in (reject["reasons"] if reject else []) if reason != "not_in_subset"]
        if alone[row["row"]]:
            assert reasons == alone[row["row"]]
        if reject:
            assert reject["reason"] == reject["reasons"][0]
    outside = {row["row"] for row in rejects if "not_in_subset" in row["reasons"]}
    passing = [row for row in rows if not alone[row["row"]] and row["row"] not in outside]
    capped = {row["row"] for row in rejects if row["reason"] in ("over_photo_cap", "over_class_cap")}
    ties = len({(row["photo_id"], row["x_min"], row["x_max"], row["y_min"], row["y_max"]) for row in passing}) < len(passing)
    if not ties:  # Which of two boxes in one place stays goes by a hash.
        left = accepted_beside_others([{**row, "rank": row["row"]} for row in passing], rules)
        areas = [round((row["x_max"] - row["x_min"]) * (row["y_max"] - row["y_min"]), 9) for row in passing]
        if len(set(areas)) == len(areas):
            assert left == {row["row"] for row in rows} - set(by_row) | capped
    if rules["max_per_photo"]:
        assert max(Counter(row["photo_id"] for row in objects).values()) <= rules["max_per_photo"]


@settings(max_examples=25, deadline=None)
@given(some_rows, some_rules, st.randoms(use_true_random=False), st.integers(1, 30))
def test_no_order_of_rows_decides_anything(tmp_path_factory, changes, rules, shuffle, batch):
    """objects.parquet is the same byte for byte; rejects are the same rows with the same reasons."""
    rows = boxes(*changes, far())
    photos = [*LISTED, {"split": "train", "photo_id": "far0"}]
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    found = []
    for ordered, size in ((rows, 7), (shuffled, batch)):
        out = tmp_path_factory.mktemp("out")
        try:
            _, _, rejects = run(source_of(ordered, photos, size, class_names=CLASSES, subclasses=BELOW), out, rules)
        except InputError:
            found.append(None)
            continue
        key = [
            (row["reason"], row["photo_id"] or "", row["label"] or "", str(row["x_max"]), str(row["y_max"])) for row in rejects
        ]
        found.append(((out / "objects.parquet").read_bytes(), sorted(key)))
    assert found[0] == found[1]


def test_buckets_change_nothing(tmp_path, monkeypatch):
    """The same objects with one bucket and one run, and with many of both."""
    rows = many(200, 5)
    rules = {"nested_share": 0.9, "max_per_photo": 3, "max_per_class": 100}
    one = run(source_of(rows, batch=50), tmp_path / "one", rules)
    monkeypatch.setattr(partition, "ROWS_PER_FILE", 100)
    monkeypatch.setattr(partition, "ROWS_AT_ONCE", 20)
    monkeypatch.setattr(selector, "EXAMPLES", 1)
    parts = []
    select = selector.Selector.select
    monkeypatch.setattr(selector.Selector, "select", lambda self, part: parts.append(part) or select(self, part))
    random.Random(0).shuffle(rows)
    many_parts = run(source_of(rows, batch=50), tmp_path / "many", rules)
    assert len(parts) > 30
    assert (tmp_path / "many" / "objects.parquet").read_bytes() == (tmp_path / "one" / "objects.parquet").read_bytes()
    assert sorted(map(str, many_parts[2])) == sorted(map(str, one[2]))


def test_row_groups_have_one_size_however_the_rows_came(tmp_path, monkeypatch):
    monkeypatch.setattr(objects_stage, "_ROW_GROUP", 64)
    rows = many(100, 3)
    run(source_of(rows), tmp_path / "a", PLAIN)
    monkeypatch.setattr(partition, "ROWS_AT_ONCE", 10)
    run(source_of(rows[::-1], batch=11), tmp_path / "b", PLAIN)
    metadata = pq.ParquetFile(tmp_path / "b" / "objects.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [64, 64, 64, 64, 44]
    assert (tmp_path / "a" / "objects.parquet").read_bytes() == (tmp_path / "b" / "objects.parquet").read_bytes()


@pytest.mark.parametrize("choice", ["drop", "report"])
def test_one_id_in_two_splits_is_one_photo(choice, tmp_path):
    """Keys are made of ids: two splits with one would have samples of one key."""
    rows = boxes(
        {"photo_id": "a"}, {"photo_id": "b"}, {"photo_id": "a", "split": "validation"}, {"photo_id": "c", "split": "validation"}
    )
    selection, objects, rejects = run(source_of(rows), tmp_path, same_photo=choice)
    assert [(row["split"], row["photo_id"], row["reason"]) for row in rejects] == [("train", "a", "same_photo")]
    assert selection.same_photos == {"photo_id": 1, "across_splits": 1}
    (pair,) = pq.read_table(tmp_path / "same_photos.parquet").to_pylist()
    assert (pair["split"], pair["kept_split"], pair["by"]) == ("train", "validation", "photo_id")
    assert len(names(objects)) == len(objects) == 3


def test_outlines_decide_between_equal_boxes_and_not_their_order(tmp_path):
    rows = boxes({"segmentation": "abc1"}, {"segmentation": "abd1"}, {"x_min": -0.0, "photo_id": "z"})
    found = {str(run(source_of(list(order)), tmp_path, PLAIN)[1]) for order in itertools.permutations(rows)}
    assert len(found) == 1
    rows[2]["x_min"] = 0.0
    assert str(run(source_of(rows), tmp_path, PLAIN)[1]) in found


def test_annotations_without_a_box_say_so(tmp_path):
    """Not that none of 0 boxes is accepted."""
    with pytest.raises(InputError, match=r"no box in it for the splits train, validation; get another file, or"):
        run(source_of([]), tmp_path)


def test_absurd_ids_cost_their_rows_and_no_memory(tmp_path):
    rows = boxes(
        *({"photo_id": f"p{n}"} for n in range(2000)), {"photo_id": "x" * 1_000_000}, *({"photo_id": None} for _ in range(50))
    )
    selection, objects, _ = run(source_of(rows, batch=2000), tmp_path, PLAIN)
    assert (len(objects), selection.rejects, selection.photos_with_boxes) == (2000, {"bad_photo_id": 51}, 2000)


def test_rows_without_an_id_are_spread_over_the_buckets(tmp_path):
    """All of them would be one photo otherwise, and one bucket would have to hold them."""
    rows = boxes(*({"photo_id": None} for _ in range(500)), *({"photo_id": "same"} for _ in range(5)))
    counts = partition_by_photo(source_of(rows), 0, tmp_path).boxes.counts
    assert counts.sum() == 505
    assert (counts > 0).sum() > 150
    assert counts.max() < 20


@pytest.mark.parametrize("size", [7, 4000])
def test_a_bucket_has_its_rows_in_the_order_in_which_they_came(size, tmp_path):
    buckets = np.random.default_rng(0).integers(0, 10, 4000)
    spilled = SpillFiles(tmp_path, "rows", pa.schema([("number", pa.int64())]), 10)
    for start in range(0, len(buckets), size):
        numbers = np.arange(start, min(start + size, len(buckets)))
        part = pa.RecordBatch.from_arrays([pa.array(numbers)], names=["number"])
        spilled.add(part, buckets[start : start + size])
    spilled.finish()
    for bucket in range(10):
        expected_numbers = [number for number, own in enumerate(buckets) if own == bucket]
        assert spilled.read(range(bucket, bucket + 1))["number"].to_pylist() == expected_numbers
        assert spilled.read_column(range(bucket, bucket + 1), "number").to_pylist() == expected_numbers
    assert [bucket for part in spilled.together([5]) for bucket in part] == list(range(10))
    assert any(part.start == 5 for part in spilled.together([5]))


def test_what_killed_attempts_left_is_swept(tmp_path):
    dead = tmp_path / f".selection.{'0' * 32}.tmp"
    dead.mkdir()
    (dead / "boxes-00000.arrow").touch()
    (tmp_path / f".objects.parquet.{'0' * 32}.tmp").touch()
    run(source_of(boxes(far())), tmp_path)


def test_objects_stand_by_split_photo_and_object(tmp_path):
    rows = [{**row, "split": "validation" if int(row["photo_id"][1:]) % 3 == 0 else "train"} for row in many(50, 4)]
    _, objects, _ = run(source_of(rows), tmp_path, PLAIN)
    splits = [row["split"] for row in objects]
    assert splits == sorted(splits)
    order = [(row["split"], row["photo_id"]) for row in objects]
    assert len(list(itertools.groupby(order))) == len(set(order)) == 50
    assert order != sorted(order)


def test_ids_are_pinned_and_change_with_every_coordinate_and_the_label(tmp_path):
    """The first may never change: keys of existing datasets would."""
    changes = [{}, {"label": "/m/2"}, *({name: GOOD[name] + 1e-9} for name in ("x_min", "x_max", "y_min", "y_max"))]
    _, objects, _ = run(source_of(boxes(*changes)), tmp_path, PLAIN)
    found = names(objects)
    assert len(found) == 6
    assert "0a1b-539830491ba4" in found


def test_nothing_accepted_is_an_error_that_says_why_and_leaves_nothing(tmp_path):
    with pytest.raises(
        InputError, match=r"none of the 2 boxes is accepted \(bad_number: 1, group_of: 1.*a\.csv, row 2: x_min is empty"
    ):
        run(source_of(boxes({"is_group_of": 1}, {"x_min": None})), tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)), min_size=1, max_size=200),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.3]),
)
def test_the_limits_of_classes_are_those_of_sorting(pairs, cap, smoothing):
    pairs = list({priority: (group, priority) for group, priority in pairs}.values())
    group, priority = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], np.uint64)
    quota = ClassQuota(4)
    for start in range(0, len(pairs), 50):
        quota.count(group[start : start + 50], priority[start : start + 50])
    kept = priority <= quota.limits(cap, smoothing, [(group, priority)])[group]
    for own in range(4):
        mine = np.sort(priority[group == own])
        allowed = int(quotas(np.array([len(mine)]), cap, smoothing)[0])
        assert sorted(priority[kept & (group == own)].tolist()) == mine[:allowed].tolist()


def test_quotas_count_from_the_cap():
    assert quotas(np.array([0, 5, 10, 40, 1000]), 10, 0.0).tolist() == [0, 5, 10, 10, 10]
    assert quotas(np.array([0, 5, 10, 40, 1000]), 10, 0.5).tolist() == [0, 5, 10, 20, 100]
    counts = np.arange(5000)
    assert (quotas(counts, 11, 1.0) == counts).all(), "1 is none"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_suppression_is_greedy(pairs):
    pairs = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    gone: set[int] = set()
    for earlier, later in pairs:
        if earlier not in gone:
            gone.add(later)
    array = np.array(pairs, np.int64).reshape(-1, 2).T
    assert set(np.flatnonzero(suppress(array, 31)).tolist()) == gone


def test_a_reader_may_neither_invent_reasons_nor_leave_out_splits(tmp_path):
    with pytest.raises(ValueError, match="the problem 'odd', none of"):
        run(source_of(boxes({"problem": "odd"})), tmp_path)
    with pytest.raises(ValueError, match="rows without a split"):
        run(source_of(boxes({"split": None}, far())), tmp_path)
