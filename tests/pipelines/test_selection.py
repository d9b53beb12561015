"""The selection as a stage: every rule, the counts, and that no order of the input decides anything.

`expected` and `left_beside_others` are a second implementation of docs/selection.md in plain Python, one box at a time.
"""

import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle
from pbe_core.leave_out import LeftOut, write_left_out
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.geometry import reference_window
from pipelines.selection import objects as objects_stage
from pipelines.selection import partition, selector
from pipelines.selection.objects import Selection, select_objects
from pipelines.selection.partition import SpillFiles, partition_by_photo
from pipelines.selection.rules import (
    above_max_aspect,
    below_min_side,
    choose_classes,
    class_limits,
    order_within,
    quotas,
    suppress,
)
from pipelines.selection.selector import object_shares
from schemas.tables import BOXES, COORDINATES, FLAGS, OBJECTS, PHOTOS, REJECT_REASONS, REJECTS

GOOD = {"split": "train", "photo_id": "0a1b", "label": "/m/1", "x_min": 0.1, "x_max": 0.6, "y_min": 0.2, "y_max": 0.7}
GOOD |= {**dict.fromkeys(FLAGS, 0), "file": "a.csv", "row": 1}
FAR = {"photo_id": "far", "x_min": 0.3, "x_max": 0.7, "y_min": 0.3, "y_max": 0.7}
"""A box that breaks no rule and meets no other."""
PLAIN = {"reject_flags": (), "near_duplicate_iou": None}


def source_of(rows: list[dict], photos: list[dict] = (), batch: int = 7, listed: bool = False, **known) -> Source:
    """Boxes and photos as a source, in small batches."""

    def batches(items, schema):
        for start in range(0, len(items), batch):
            yield pa.RecordBatch.from_pylist(items[start : start + batch], schema=schema)

    splits = frozenset({"train", "validation"} if listed else ())
    boxes, listing = (lambda: batches(rows, BOXES)), (lambda: batches(photos, PHOTOS))
    return Source("test", (), "stored", read_boxes=boxes, read_photos=listing, listed_splits=splits, rows=len(rows), **known)


def run(
    source: Source, out: Path, rules: dict | None = None, seed: int = 0, references: dict | None = None, **source_settings
) -> tuple[Selection, list, list]:
    """The stage: what it found, objects, rejects."""
    chosen = BuildSettings(
        out=out,
        seed=seed,
        source=SourceSettings(annotations=out, photos=out, **source_settings),
        selection=SelectionSettings(**(rules or {})),
        references=references or {},
    )
    selection = select_objects(chosen, out, source)
    assert not list(out.glob(".*")), "temporary files stay behind"
    objects, rejects = (pq.read_table(out / f"{name}.parquet") for name in ("objects", "rejects"))
    assert objects.schema.equals(OBJECTS)
    assert rejects.schema.equals(REJECTS)
    return selection, objects.to_pylist(), rejects.to_pylist()


def boxes(*changes: dict) -> list[dict]:
    return [{**GOOD, "row": number, **change} for number, change in enumerate(changes, 1)]


def on_photos(*names: str) -> list[dict]:
    """A good box for each photo, given as `split/id`."""
    return boxes(*({"split": name.split("/")[0], "photo_id": name.split("/")[1]} for name in names))


UNREAD = {**dict.fromkeys(GOOD, None), "problem": "bad_row", "detail": "5 cells", "split": "train", "file": "a.csv"}
ALONE = [
    ({}, None, None),
    ({"x_max": 0.14, "y_max": 0.7}, None, None),  # 0.04 x 0.5 = 0.02, the smallest area that is accepted
    ({"x_max": 0.139}, "too_small", None),
    ({"x_min": 0.0, "x_max": 1.0, "y_min": 0.0, "y_max": 0.81}, "too_large", None),
    ({"is_group_of": 1}, "group_of", None),
    ({"is_depiction": 1}, "depiction", None),
    ({"is_inside": 1}, "inside", None),
    ({"is_occluded": 1, "is_truncated": 1, "is_inside": -1}, None, None),
    ({"is_group_of": 2}, "bad_flag", "is_group_of is 2, expected 1, 0 or -1"),
    ({"is_occluded": None}, "bad_flag", "is_occluded is empty"),
    ({"x_min": 0.6}, "empty_box", "x_min is 0.6 and x_max is 0.6"),
    ({"x_min": float("nan")}, "bad_number", "x_min is empty or not a number"),
    ({"x_min": -0.01}, "outside_photo", "x_min is -0.01"),
    ({"y_max": 1.5}, "outside_photo", "y_max is 1.5, not a fraction"),
    ({"y_min": float("-inf")}, "outside_photo", "y_min is -inf"),
    ({"label": None, "x_min": None}, "no_label", "empty"),
    ({"photo_id": "../../etc/passwd"}, "bad_photo_id", "../../etc/passwd"),
    ({"photo_id": ""}, "bad_photo_id", "letters, digits"),
    ({"photo_id": None}, "bad_photo_id", "None"),
    ({"photo_id": "a" * 65}, "bad_photo_id", "aaa"),
    ({"photo_id": "a\n"}, "bad_photo_id", "a"),
    (UNREAD, "bad_row", "5 cells"),
    ({"problem": "bad_number", "detail": "XMin is 'wide'", "x_min": None}, "bad_number", "XMin is 'wide'"),
    ({"problem": "unknown_photo", "detail": "no file a.jpg", "x_min": None}, "unknown_photo", "no file a.jpg"),
]


def test_each_rule_has_its_reason_and_malformed_rows_say_what_is_wrong(tmp_path):
    rows = [{**GOOD, "photo_id": f"p{number}", **change, "row": number} for number, (change, _, _) in enumerate(ALONE)]
    selection, objects, rejects = run(source_of(rows), tmp_path, {"min_area": 0.0199999})
    found = {row["row"]: row for row in rejects}
    reasons = {number: reason for number, (_, reason, _) in enumerate(ALONE) if reason}
    assert {number: row["reason"] for number, row in found.items()} == reasons
    assert selection.rejects == Counter(reasons.values())
    assert len(objects) == len(ALONE) - len(found)
    for number, (_, reason, detail) in enumerate(ALONE):
        if detail:
            assert detail in found[number]["detail"]
            shown = f"a.csv, row {number}: {found[number]['detail']}"
            assert shown in selection.examples[reason] or len(selection.examples[reason]) == selector.EXAMPLES
        elif reason:
            assert found[number]["detail"] is None
            assert reason not in selection.examples
    unlabelled = found[next(number for number, (change, _, _) in enumerate(ALONE) if "label" in change)]
    assert [unlabelled[name] for name in ("x_min", "label", "x_max", "file", "reasons")] == [None, None, 0.6, "a.csv", None]


def test_a_row_that_cannot_be_read_has_this_reason_alone(tmp_path):
    rows = boxes({"is_group_of": 1, "problem": "bad_row"}, {"label": None, "problem": "bad_flag", "detail": "IsInside"}, FAR)
    listed = [{"split": "train", "photo_id": "far"}]
    _, _, rejects = run(source_of(rows, listed, listed=True), tmp_path, {"all_reasons": True})
    found = {row["row"]: (row["reasons"], row["detail"]) for row in rejects}
    assert found[1][0] == ["bad_row"]
    assert found[2] == (["no_label", "bad_flag", "unknown_photo"], "the label is empty")


def test_sides_and_aspect_are_px_up_to_rounding():
    asked = SelectionSettings(min_side=40, max_aspect=5)
    assert below_min_side(np.array([39.99, 40 - 1e-9, 40]), asked).tolist() == [True, False, False]
    assert above_max_aspect(np.full(3, 40.0), np.array([200, 200 + 1e-9, 200.01]), asked).tolist() == [False, False, True]


def outlined(photo: str, share: float) -> dict:
    """A box of 100 x 40 px in a photo of 200 x 100 px, whose outline covers this share of the box padded by 10 px: 7,200 px."""
    pixels = np.zeros((100, 200), bool)
    pixels[30:70, 50:150].flat[: round(share * 7200)] = True
    counts = coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode()
    return {"photo_id": photo, "x_min": 0.25, "x_max": 0.75, "y_min": 0.3, "y_max": 0.7, "segmentation": counts}


@pytest.mark.parametrize(
    ("rules", "references", "empty"),
    [
        ({}, {"background": "grey"}, ["under"]),
        ({}, {"background": "keep"}, []),
        ({"min_object_share": None}, {"background": "grey"}, []),
        # Without padding the reference is the box, 4,000 px.
        ({}, {"background": "grey", "padding": 0}, []),
    ],
)
def test_references_that_would_be_cut_out_to_almost_nothing_are_rejected(rules, references, empty, tmp_path):
    """By the tables alone: 1,440 px are a fifth of a reference. Not asked where the photo has no size or the box no outline."""
    rows = boxes(outlined("over", 0.2), outlined("under", 0.1999), outlined("unknown", 0.01), {"photo_id": "none"})
    photos = [{"split": "train", "photo_id": photo, "width": 200, "height": 100} for photo in ("over", "under", "none")]
    selection, _, rejects = run(source_of(rows, photos), tmp_path, rules, references=references)
    assert [reject["photo_id"] for reject in rejects] == empty
    assert selection.rejects == ({"reference_too_empty": 1} if empty else {})


def test_the_share_of_an_object_is_that_of_its_reference_as_cut():
    """At the photo's edges, with fractions of pixels; more outlines than pycocotools measures at once. Counted pixel by pixel."""
    draw = np.random.default_rng(0)
    edges, counts, shares = [], [], []
    for _ in range(300):
        (left, right), (top, bottom) = (np.sort(draw.uniform(0, side, 2)) for side in (200, 100))
        pixels = np.zeros((100, 200), bool)
        pixels[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = draw.random((int(bottom) - int(top) + 1, 1)) < 0.5
        pixels[int(top), int(left)] = True
        x_min, y_min, x_max, y_max = reference_window(Rectangle(left, top, right, bottom), 200, 100, 7)
        shares.append(pixels[y_min:y_max, x_min:x_max].mean())
        counts.append(coco_mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode())
        edges.append((left / 200, right / 200, top / 100, bottom / 100))
    sides = np.full(301, 200.0), np.full(301, 100.0)
    columns = dict(zip(COORDINATES, np.array([*edges, (np.nan,) * 4]).T, strict=True))
    found = object_shares(pa.array([*counts, counts[0]]), sides, columns, 7)
    assert found[:300] == pytest.approx(shares)
    assert np.isnan(found[300]), "a box without a place"


def test_of_a_box_that_stands_twice_flags_and_outline_decide_which_is_one_object(tmp_path):
    rows = boxes({}, {"is_occluded": 1}, {"x_min": 0.3, "segmentation": "abc1"}, {"x_min": 0.3, "segmentation": "abd1"})
    for ordered in (rows, rows[::-1]):
        _, objects, rejects = run(source_of(ordered), tmp_path, PLAIN)
        assert sorted((row["is_occluded"], row["segmentation"] or "") for row in objects) == [(0, ""), (0, "abd1")]
        assert sorted((row["row"], row["reason"]) for row in rejects) == [(2, "duplicate"), (3, "duplicate")]


CLASSES = {"/m/animal": "Animal", "/m/cat": "Cat", "/m/lion": "Lion", "/m/car": "Car", "/m/car2": "Car"}
BELOW = {"/m/entity": ("/m/animal", "/m/car"), "/m/animal": ("/m/cat",), "/m/cat": ("/m/lion",)}
KNOWN = {"class_names": CLASSES, "subclasses": BELOW}


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({}, {"/m/cat", "/m/lion", "/m/car"}),
        ({"include_labels": ("cat",)}, {"/m/cat", "/m/lion"}),
        ({"include_labels": ("/m/entity",), "exclude_labels": ("Cat",)}, {"/m/car"}),
        ({"exclude_labels": ("/m/lion",)}, {"/m/cat", "/m/car"}),
        ({"include_labels": ("Lyon",)}, "include_labels: .*no class 'Lyon'; did you mean Lion"),
        ({"exclude_labels": ("car",)}, "exclude_labels: several classes are called 'car': /m/car, /m/car2"),
    ],
)
def test_labels_are_chosen_by_name_or_id_with_all_below_them(rules, left):
    labels, chosen = ("/m/cat", "/m/lion", "/m/car"), SelectionSettings(**rules)
    if isinstance(left, str):
        with pytest.raises(InputError, match=left):
            choose_classes(labels, source_of([], **KNOWN), chosen)
    else:
        choice = choose_classes(labels, source_of([], **KNOWN), chosen)
        assert set(itertools.compress(labels, choice.chosen)) == left


def test_a_class_that_is_taken_without_those_below_it_is_noted(tmp_path):
    """Fewer boxes than one would think, and status 0; or none, and the error says why."""
    rows = boxes({"label": "/m/cat"}, {"label": "/m/lion", "photo_id": "b"})
    without, objects, _ = run(source_of(rows, class_names=CLASSES), tmp_path, {"include_labels": ("Cat",)})
    assert "include_labels means Cat alone" in without.notes[0]
    assert [row["label_name"] for row in objects] == ["Cat"]
    known, _, _ = run(source_of(rows, **KNOWN), tmp_path, {"include_labels": ("Cat",)})
    of_own, _, _ = run(source_of(rows), tmp_path, {"exclude_labels": ("/m/cat",)}, kind="boxes", unit="fraction")
    assert [note for selection in (known, of_own) for note in selection.notes if "hierarchy" in note] == []
    with pytest.raises(InputError, match=r"none of the 2 boxes.*no class hierarchy"):
        run(source_of(rows, class_names=CLASSES), tmp_path, {"include_labels": ("Animal",)})


def test_photos_are_joined_and_those_that_are_not_listed_are_errors_of_their_rows(tmp_path):
    known = {"url": "https://x/b", "author": "NA", "licence": "cc", "rotation": 90, "width": 8, "height": 6, "file_name": "b.jpg"}
    photos = [{"split": "train", "photo_id": name, **known} for name in ("b", "empty", "c")]
    rows = on_photos("train/b", "train/gone", "validation/c")
    selection, (found,), rejects = run(source_of(rows, photos, listed=True), tmp_path)
    assert {name: found[name] for name in known} == known
    missing = [("train", "gone", "unknown_photo"), ("validation", "c", "unknown_photo")]
    assert [(row["split"], row["photo_id"], row["reason"]) for row in rejects] == missing
    assert (selection.photos, selection.photos_with_boxes, selection.photos_without_boxes) == (3, 3, 2)
    unlisted, objects, _ = run(source_of(rows, photos), tmp_path, {"min_side": 1})
    assert {(row["split"], row["photo_id"]): row["url"] for row in objects}["train", "gone"] is None
    assert "how large the photos of 2 objects are" in unlisted.notes[0]


def test_of_two_rows_of_a_photo_contents_decide_which_counts(tmp_path):
    values = ("x", "B", "aa"), ("x", "A", "zz"), ("x", "A", "mm"), ("y", "0", "aa")
    photos = [{"split": "train", "photo_id": "b", "url": url, "author": by, "licence": licence} for url, by, licence in values]
    for shuffled in (photos, photos[::-1], photos[2:] + photos[:2]):
        _, (found,), _ = run(source_of(on_photos("train/b"), shuffled), tmp_path)
        # The licence goes by its text, not by the order in which licences were met.
        assert (found["url"], found["author"], found["licence"]) == ("x", "A", "mm")


ADDRESS = "https://x.org/photos/1.jpg"


@pytest.mark.parametrize(
    ("name", "first", "second", "same"),
    [
        ("original_md5", "train/same", "validation/same", True),
        ("file_name", "train/2.jpg", "train/2.jpg", True),  # In one split, so in one folder.
        ("file_name", "train/2.jpg", "train/2.JPG", False),
        ("file_name", "train/1.jpg", "validation/1.jpg", True),
        ("file_name", "train/2.jpg", "validation/2.jpg", False),  # One in each split's folder.
        ("url", f"train/{ADDRESS}", f"train/{ADDRESS}", True),
        ("url", f"train/{ADDRESS}", f"train/{ADDRESS}?size=2", False),
        ("url", "train/https://x.org/", "train/https://x.org/", False),
        ("url", "train/unknown", "train/unknown", False),
        ("original_md5", "train/", "validation/", False),
    ],
)
@pytest.mark.parametrize("choice", ["drop", "report"])
def test_a_photo_under_two_ids_is_kept_once_and_not_in_train(name, first, second, same, choice, tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    splits, values = zip(*(text.split("/", 1) for text in (first, second)), strict=True)
    photos = [
        {"split": split, "photo_id": photo_id, name: value or None}
        for split, photo_id, value in zip(splits, "ab", values, strict=True)
    ]
    photos.append({"split": splits[1], "photo_id": "without-boxes", name: values[0] or None})
    rows = on_photos(f"{splits[0]}/a", f"{splits[1]}/b", "train/c")
    selection, objects, rejects = run(source_of(rows, photos), tmp_path, same_photo=choice)
    across = splits[0] != splits[1]
    assert selection.same_photos == ({name: 1, "across_splits": int(across)} if same else {})
    found = pq.read_table(tmp_path / "same_photos.parquet").to_pylist()
    assert [row["by"] for row in found] == [name] * same
    assert not across or not same or found[0]["photo_id"] == "a"
    dropped = [row["photo_id"] for row in found] if choice == "drop" else []
    assert [(row["photo_id"], row["reason"]) for row in rejects] == [(photo_id, "same_photo") for photo_id in dropped]
    assert {row["photo_id"] for row in objects} == set("abc") - set(dropped)
    assert any("URL of another photo" in note for note in selection.notes) == (name == "url" and bool(dropped))


@pytest.mark.parametrize("choice", ["drop", "report"])
def test_one_id_in_two_splits_is_one_photo(choice, tmp_path):
    """Keys are made of ids: two splits with one would have samples of one key."""
    rows = on_photos("train/a", "train/b", "validation/a", "validation/c")
    selection, objects, rejects = run(source_of(rows), tmp_path, same_photo=choice)
    assert [(row["split"], row["photo_id"], row["reason"]) for row in rejects] == [("train", "a", "same_photo")]
    assert selection.same_photos == {"photo_id": 1, "across_splits": 1}
    (pair,) = pq.read_table(tmp_path / "same_photos.parquet").to_pylist()
    assert (pair["split"], pair["kept_split"], pair["by"]) == ("train", "validation", "photo_id")
    assert len(names(objects)) == len(objects) == 3


def many(photos: int, per_photo: int) -> list[dict]:
    draw = np.random.default_rng(0)
    rows = []
    for photo, _ in itertools.product(range(photos), range(per_photo)):
        x, y = draw.uniform(0, 0.5, 2).tolist()
        place = {"x_min": x, "x_max": x + 0.4, "y_min": y, "y_max": y + 0.4}
        rows.append({"photo_id": f"p{photo}", "label": f"/m/{draw.integers(3)}", **place})
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


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_cap_per_class_is_exact_in_each_split(smoothing, tmp_path):
    rows = [{**row, "split": "validation" if row["photo_id"].endswith("0") else "train"} for row in many(60, 5)]
    counts = Counter((row["split"], row["label"]) for row in rows)
    selection, objects, rejects = run(source_of(rows), tmp_path, {**PLAIN, "max_per_class": 20, "class_smoothing": smoothing})
    allowed = {key: n if n <= 20 else math.floor(20 * (n / 20) ** smoothing) for key, n in counts.items()}
    assert Counter((row["split"], row["label"]) for row in objects) == allowed
    assert {row["reason"] for row in rejects} == {"over_class_cap"}
    assert selection.rejects == {"over_class_cap": len(rejects)}
    assert sum(sum(classes.values()) for classes in selection.objects_by_class.values()) == len(objects)
    smaller = run(source_of(rows), tmp_path, {**PLAIN, "max_per_class": 10, "class_smoothing": smoothing})[1]
    assert names(smaller) <= names(objects)


def test_a_subset_is_of_whole_photos_and_within_a_larger_one(tmp_path):
    rows = many(200, 2)
    kept = {share: run(source_of(rows, batch=400), tmp_path, {**PLAIN, "subset": share}) for share in (0.1, 0.5, 1.0)}
    photos = {share: {row["photo_id"] for row in objects} for share, (_, objects, _) in kept.items()}
    assert photos[0.1] < photos[0.5] < photos[1.0]
    assert abs(len(photos[0.5]) - 100) < 4 * math.sqrt(50)
    assert photos[0.5].isdisjoint({row["photo_id"] for row in kept[0.5][2]})
    assert {row["reason"] for row in kept[0.5][2]} == {"not_in_subset"}


NUMBERS = st.sampled_from([0.0, 0.1, 0.11, 0.3, 0.5, 0.52, 0.9, 1.0] * 2 + [None, float("nan"), -1.0, 2.0])
SOME_FLAG = st.sampled_from([0, 0, 0, 0, 1, -1, 7, None])
SOME_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "photo_id": st.sampled_from(["a", "a", "b", "c/d", ""]),
            "label": st.sampled_from(["/m/cat", "/m/lion", "/m/car", "/m/none", None]),
            "x_min": st.sampled_from([0.0, 0.1, 0.11, 0.3]), "x_max": NUMBERS,
            "y_min": st.sampled_from([0.0, 0.1, 0.3, 0.32]), "y_max": NUMBERS,
            "is_occluded": SOME_FLAG, "is_group_of": SOME_FLAG,
        }
    ),
    min_size=1, max_size=25,
)  # fmt: skip
SOME_RULES = st.fixed_dictionaries(
    {
        "min_area": st.sampled_from([0.0, 0.02, 0.2]), "max_area": st.sampled_from([0.3, 0.8, 1.0]),
        "min_side": st.sampled_from([None, 20]), "max_aspect": st.sampled_from([None, 2.0]),
        "reject_flags": st.sampled_from([(), ("group_of",), ("group_of", "occluded")]),
        "unknown_flags": st.sampled_from(["accept", "reject"]),
        "include_labels": st.sampled_from([(), ("Animal",)]), "exclude_labels": st.sampled_from([(), ("Lion",)]),
        "near_duplicate_iou": st.sampled_from([None, 0.5, 0.9]), "nested_share": st.sampled_from([None, 0.9]),
        "max_per_photo": st.sampled_from([None, 1, 2]), "max_per_class": st.sampled_from([None, 1, 2]),
        "class_smoothing": st.sampled_from([0.0, 0.5]), "subset": st.sampled_from([1.0, 0.5]),
    }
)  # fmt: skip
LISTED = [{"split": "train", "photo_id": "a", "width": 100, "height": 50}, {"split": "train", "photo_id": "b"}]


def expected(row: dict, rules: dict) -> list[str]:
    """Reasons of the first group for one box, by docs/selection.md; subset left out (it is a hash)."""
    edges = x_min, x_max, y_min, y_max = [math.nan if row[name] is None else row[name] for name in COORDINATES]
    width, height = x_max - x_min, y_max - y_min
    photo = next((photo for photo in LISTED if photo["photo_id"] == row["photo_id"]), None)
    included = not rules["include_labels"] or row["label"] in ("/m/cat", "/m/lion")
    excluded = bool(rules["exclude_labels"]) and row["label"] == "/m/lion"
    asked = [row[f"is_{flag}"] for flag in rules["reject_flags"]]
    found = {
        "bad_photo_id": row["photo_id"] in ("c/d", ""),
        "no_label": row["label"] is None,
        "bad_number": any(math.isnan(value) for value in edges),
        "outside_photo": any(value < 0 or value > 1 for value in edges),
        "empty_box": x_min >= x_max or y_min >= y_max,
        "bad_flag": any(row[flag] not in (0, 1, -1) for flag in FLAGS),
        "unknown_label": row["label"] == "/m/none",
        "unknown_photo": photo is None,
        "label_excluded": row["label"] is not None and not (included and not excluded),
        **{flag: value == 1 for flag, value in zip(rules["reject_flags"], asked, strict=True)},
        "unknown_flag": rules["unknown_flags"] == "reject" and -1 in asked,
        "too_small": width * height < rules["min_area"],
        "too_large": width * height > rules["max_area"],
    }
    if photo and "width" in photo:
        shorter, longer = sorted((width * 100, height * 50)) if not math.isnan(width + height) else (math.nan, math.nan)
        found["reference_too_small"] = rules["min_side"] is not None and shorter < rules["min_side"]
        found["too_elongated"] = rules["max_aspect"] is not None and longer > shorter * rules["max_aspect"]
    return [reason for reason in REJECT_REASONS if found.get(reason)]


def area(row: dict) -> float:
    return (row["x_max"] - row["x_min"]) * (row["y_max"] - row["y_min"])


def overlap(a: dict, b: dict) -> float:
    sides = [min(a[f"{axis}_max"], b[f"{axis}_max"]) - max(a[f"{axis}_min"], b[f"{axis}_min"]) for axis in "xy"]
    return max(sides[0], 0) * max(sides[1], 0)


def left_beside_others(rows: list[dict], rules: dict) -> set[int]:
    """Rows that pass the second group as well: greedy suppression and nesting, one pair at a time."""
    left, kept, before = set(), [], []
    iou, share = rules["near_duplicate_iou"], rules["nested_share"]
    for row in sorted(rows, key=lambda row: -area(row)):
        close = [(other, overlap(row, other)) for other in before if other["photo_id"] == row["photo_id"]]
        near = iou and any(o in kept and common >= iou * (area(row) + area(o) - common) for o, common in close)
        nested = share and any(common >= share * area(row) for _, common in close)
        if not near:
            kept.append(row)
        before.append(row)
        if not (near or nested):
            left.add(row["row"])
    return left


@settings(max_examples=50)
@given(SOME_ROWS, SOME_RULES, st.integers(0, 5))
def test_every_box_is_accepted_or_rejected_once_as_the_rules_say(tmp_path_factory, changes, rules, seed):
    """Accepted + rejected = read; first and all reasons, and the accepted, are those of a second implementation."""
    rows = boxes(*changes, {**FAR, "photo_id": "b", "label": "/m/lion"})
    source, out = source_of(rows, LISTED, listed=True, **KNOWN), tmp_path_factory.mktemp("out")
    try:
        selection, objects, rejects = run(source, out, {**rules, "all_reasons": True}, seed)
    except InputError:  # That nothing is accepted has a test of its own.
        return
    assert selection.boxes == len(rows) == len(objects) + len(rejects)
    assert selection.objects == len(objects)
    assert selection.rejects == Counter(row["reason"] for row in rejects)
    found = {row["row"]: row["reasons"] for row in rejects}
    assert len(found) == len(rejects)
    assert all(row["reason"] == row["reasons"][0] for row in rejects)
    alone = {row["row"]: expected(row, rules) for row in rows}
    for number, reasons in alone.items():
        if reasons:
            assert [reason for reason in found.get(number, []) if reason != "not_in_subset"] == reasons
    passing = [row for row in rows if not alone[row["row"]] and "not_in_subset" not in found.get(row["row"], [])]
    if len({round(area(row), 9) for row in passing}) == len(passing):  # Which of two as large stays goes by a hash.
        capped = {row["row"] for row in rejects if row["reason"] in ("over_photo_cap", "over_class_cap")}
        assert left_beside_others(passing, rules) == {row["row"] for row in rows} - found.keys() | capped
    if rules["max_per_photo"]:
        assert max(Counter(row["photo_id"] for row in objects).values()) <= rules["max_per_photo"]


@settings(max_examples=15)
@given(SOME_ROWS, SOME_RULES, st.randoms(use_true_random=False), st.integers(1, 30))
def test_no_order_of_rows_decides_anything(tmp_path_factory, changes, rules, shuffle, batch):
    """objects.parquet is the same byte for byte; rejects are the same rows with the same reasons."""
    rows = boxes(*changes, FAR, {"x_min": -0.0, "photo_id": "far"})
    photos = [*LISTED, {"split": "train", "photo_id": "far"}]
    shuffled = shuffle.sample(rows, len(rows))
    found = []
    for ordered, size in ((rows, 7), (shuffled, batch)):
        out = tmp_path_factory.mktemp("out")
        try:
            _, _, rejects = run(source_of(ordered, photos, size, **KNOWN), out, rules)
        except InputError:
            found.append(None)
            continue
        keys = [[str(row[name]) for name in ("reason", "photo_id", "label", "x_max", "y_max")] for row in rejects]
        found.append(((out / "objects.parquet").read_bytes(), sorted(keys)))
    assert found[0] == found[1]


def test_buckets_and_row_groups_change_nothing(tmp_path, monkeypatch):
    """The same objects by split, photo and object, in row groups of one size, with one bucket and run, and with many of both."""
    monkeypatch.setattr(objects_stage, "_ROW_GROUP", 64)
    rows = [{**row, "split": "validation" if int(row["photo_id"][1:]) % 3 == 0 else "train"} for row in many(100, 5)]
    rules = {"nested_share": 0.9, "max_per_photo": 3, "max_per_class": 40}
    one = run(source_of(rows, batch=50), tmp_path / "one", rules)
    monkeypatch.setattr(partition, "ROWS_PER_FILE", 100)
    monkeypatch.setattr(partition, "ROWS_AT_ONCE", 10)
    random.Random(0).shuffle(rows)
    in_parts = run(source_of(rows, batch=50), tmp_path / "many", rules)
    assert (tmp_path / "many" / "objects.parquet").read_bytes() == (tmp_path / "one" / "objects.parquet").read_bytes()
    assert sorted(map(str, in_parts[2])) == sorted(map(str, one[2]))
    metadata = pq.ParquetFile(tmp_path / "many" / "objects.parquet").metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert sizes[:-1] == [64] * (len(one[1]) // 64)
    order = [(row["split"], row["photo_id"]) for row in one[1]]
    assert [split for split, _ in order] == sorted(split for split, _ in order)
    assert len(list(itertools.groupby(order))) == len(set(order)), "rows of a photo stand together"
    assert order != sorted(order)


def test_absurd_ids_cost_their_rows_and_no_memory(tmp_path):
    """Rows without an id are spread over the buckets: they would be one photo otherwise, and one bucket would hold them."""
    ids = [*("p" + str(n) for n in range(200)), "x" * 1_000_000, *[None] * 500]
    source = source_of(boxes(*({"photo_id": photo_id} for photo_id in ids)), batch=1000)
    selection, objects, _ = run(source, tmp_path, PLAIN)
    assert (len(objects), selection.rejects, selection.photos_with_boxes) == (200, {"bad_photo_id": 501}, 200)
    assert partition_by_photo(source, 0, tmp_path).boxes.counts.max() < 20


def test_a_bucket_has_its_rows_in_the_order_in_which_they_came(tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "ROWS_PER_FILE", 100)
    buckets = np.random.default_rng(0).integers(0, 10, 1000)
    spilled = SpillFiles(tmp_path, "rows", pa.schema([("number", pa.int64())]), 10)
    for start in range(0, len(buckets), 7):
        part = np.arange(start, min(start + 7, len(buckets)))
        spilled.add(pa.RecordBatch.from_arrays([pa.array(part)], names=["number"]), buckets[part])
    spilled.finish()
    for bucket in range(10):
        assert spilled.read(range(bucket, bucket + 1))["number"].to_pylist() == np.flatnonzero(buckets == bucket).tolist()
    assert [bucket for part in spilled.together([5]) for bucket in part] == list(range(10))
    assert any(part.start == 5 for part in spilled.together([5]))


def test_what_killed_attempts_left_is_swept(tmp_path):
    dead = tmp_path / f".selection.{'0' * 32}.tmp"
    dead.mkdir()
    (dead / "boxes-00000.arrow").touch()
    (tmp_path / f".objects.parquet.{'0' * 32}.tmp").touch()
    run(source_of(boxes(FAR)), tmp_path)


def test_ids_are_pinned_and_change_with_every_coordinate_and_the_label(tmp_path):
    """The first may never change: keys of existing datasets would."""
    changes = [{}, {"label": "/m/2"}, *({name: GOOD[name] + 1e-9} for name in COORDINATES)]
    _, objects, _ = run(source_of(boxes(*changes)), tmp_path, PLAIN)
    assert len(names(objects)) == 6
    assert "0a1b-539830491ba4" in names(objects)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"is_group_of": 1}, {"x_min": None}], r"none of the 2 boxes.*\(bad_number: 1, group_of: 1.*a\.csv, row 2: x_min"),
        ([], "no box in it for the splits train, validation"),
    ],
)
def test_nothing_accepted_is_an_error_that_says_why_and_leaves_nothing(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(source_of(boxes(*changes)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(
    st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 3), min_size=1, max_size=200),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.3]),
)
def test_a_class_keeps_its_quota_of_the_smallest_priorities(drawn, cap, smoothing):
    group, priority = np.array([*drawn.values()]), np.array([*drawn], np.uint64)
    kept = priority <= class_limits(group, priority, cap, smoothing)[group]
    for own in range(4):
        mine = np.sort(priority[group == own])
        allowed = int(quotas(np.array([len(mine)]), cap, smoothing)[0])
        assert sorted(priority[kept & (group == own)].tolist()) == mine[:allowed].tolist()


def test_quotas_count_from_the_cap():
    assert quotas(np.array([0, 5, 10, 40, 1000]), 10, 0.0).tolist() == [0, 5, 10, 10, 10]
    assert quotas(np.array([0, 5, 10, 40, 1000]), 10, 0.5).tolist() == [0, 5, 10, 20, 100]
    counts = np.arange(5000)
    assert (quotas(counts, 11, 1.0) == counts).all(), "1 is none"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_suppression_is_greedy(pairs):
    pairs = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    gone: set[int] = set()
    for earlier, later in pairs:
        if earlier not in gone:
            gone.add(later)
    array = np.array(pairs, np.int64).reshape(-1, 2).T
    assert set(np.flatnonzero(suppress(array, 31)).tolist()) == gone


def test_what_a_list_names_is_left_out_and_counted(tmp_path):
    """Marked as the viewer marks: one object of a photo, and all of another photo; the other boxes stay as they were."""
    rows = boxes({}, {"x_max": 0.7}, {"photo_id": "gone"}, {"photo_id": "gone", "x_max": 0.5}, FAR)
    _, before, _ = run(source_of(rows), tmp_path / "before", PLAIN)
    marked = next(row["object_id"] for row in before if row["photo_id"] == "0a1b" and row["x_max"] == 0.7)
    listed = tmp_path / "left_out.csv"
    write_left_out(listed, LeftOut({marked, "far-000000000000"}, {"gone"}))
    selection, after, rejects = run(source_of(rows), tmp_path / "after", {**PLAIN, "leave_out": listed})
    assert sorted(row["object_id"] for row in after) == sorted(
        row["object_id"] for row in before if row["object_id"] != marked and row["photo_id"] != "gone"
    )
    assert {row["row"]: row["reason"] for row in rejects} == {2: "left_out", 3: "left_out", 4: "left_out"}
    assert selection.rejects == {"left_out": 3}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("object,a-0123456789ab\n", "line 1: expected the header"),
        ("what,id\nphoto,../a\n", "line 2: 'photo,../a' is neither"),
        ("what,id\nobject,a\n", "line 2: 'object,a' is neither"),
        ("what,id\nphoto\n", "line 2: 'photo' is neither"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_list_of_what_is_left_out_is_told(tmp_path, text, told):
    path = tmp_path / "left_out.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(told)):
        run(source_of(boxes({})), tmp_path, {"leave_out": path})


@pytest.mark.parametrize("hashes", ["photos apart", "photos that have their first 44 bits in common"])
def test_the_fast_order_is_that_of_two_stable_sorts(hashes):
    draw = np.random.default_rng(3)
    photos = draw.integers(0, 2**64, 40, dtype=np.uint64)
    if "common" in hashes:
        photos = (photos >> np.uint64(20) << np.uint64(20))[np.arange(40) // 2] | draw.integers(0, 2**20, 40, dtype=np.uint64)
    photo = photos[draw.integers(0, 40, 3000)]
    number = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    number[::3] &= np.uint64(2**64 - 2**44)  # These differ from each other in the first bits,
    number[1::3] |= np.uint64(2**64 - 2**44)  # and these in the others alone.
    number[:50] = number[50:100]
    order, tied = order_within(photo, number)
    assert 900 < len(tied) < 3000
    few = order[tied]
    order[tied] = few[np.lexsort((few, number[few], photo[few]))]
    assert order.tolist() == np.lexsort((number, photo)).tolist()
    assert [len(each) for each in order_within(photo[:0], number[:0])] == [0, 0]


def test_words_alone_have_dictionaries_in_the_tables(tmp_path):
    """Parquet would begin one for each id and coordinate, too, and give it up: larger files, written in more time."""
    run(source_of(on_photos("train/a", "train/b") + boxes({"photo_id": "c", "x_min": 0.59})), tmp_path, {"min_area": 0.1})
    for name in ("objects", "rejects"):
        columns = pq.read_metadata(tmp_path / f"{name}.parquet").row_group(0).to_dict()["columns"]
        with_one = {one["path_in_schema"] for one in columns if "RLE_DICTIONARY" in one["encodings"]}
        assert {"split", "label"} < with_one
        assert not with_one & {"photo_id", "object_id", "row", "area_share", *COORDINATES}
