import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import SelectionSettings
from pipelines.selection import drop_duplicates, object_ids, select, with_names
from schemas.tables import BOXES, REJECT_REASONS

GOOD = {
    "split": "train", "photo_id": "0a1b", "label": "/m/1", "x_min": 0.1, "x_max": 0.6, "y_min": 0.2, "y_max": 0.7,
    "is_occluded": 0, "is_truncated": 0, "is_group_of": 0, "is_depiction": 0, "is_inside": 0, "file": "a.csv", "row": 1,
}  # fmt: skip


def batch(*rows: dict) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{**GOOD, "row": number, **row} for number, row in enumerate(rows)], schema=BOXES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"x_max": 0.14, "y_max": 0.7}, None),  # 0.04 x 0.5 = 0.02, the smallest area that is accepted
        ({"x_max": 0.139}, "too_small"),
        ({"x_min": 0.0, "x_max": 1.0, "y_min": 0.0, "y_max": 0.81}, "too_large"),
        ({"is_group_of": 1}, "group_of"),
        ({"is_depiction": 1}, "depiction"),
        ({"is_inside": 1}, "inside"),
        ({"is_occluded": 1, "is_truncated": 1}, None),
        ({"is_inside": -1}, None),
        ({"is_group_of": 2}, "bad_flag"),
        ({"is_occluded": None}, "bad_flag"),
        ({"x_min": 0.6}, "bad_box"),
        ({"x_min": float("nan")}, "bad_box"),
        ({"y_max": None}, "bad_box"),
        ({"x_min": -0.01}, "bad_box"),
        ({"y_max": 1.5}, "bad_box"),
        ({"x_max": 1.2}, "bad_box"),
        ({"y_min": -0.01}, "bad_box"),
        ({"y_min": 0.7}, "bad_box"),
        ({"label": None}, "bad_box"),
        ({"photo_id": "../../etc/passwd"}, "bad_photo_id"),
        ({"photo_id": "a.b"}, "bad_photo_id"),
        ({"photo_id": ""}, "bad_photo_id"),
        ({"photo_id": None}, "bad_photo_id"),
        ({"photo_id": "a" * 65}, "bad_photo_id"),
        ({"photo_id": "a\n"}, "bad_photo_id"),
    ],
)
def test_each_rule_with_its_reason(change, reason):
    selected = select(batch(change), SelectionSettings(min_area=0.0199999))
    assert selected.rejects["reason"].to_pylist() == ([reason] if reason else [])
    assert len(selected.objects) == (0 if reason else 1)


def test_flags_count_as_the_settings_say():
    rows = batch({"is_group_of": 1}, {"is_truncated": 1}, {"is_truncated": -1})
    as_paper = SelectionSettings(reject_flags=())
    assert len(select(rows, as_paper).objects) == 3
    strict = SelectionSettings(reject_flags=("truncated",), unknown_flags="reject")
    assert select(rows, strict).rejects["reason"].to_pylist() == ["truncated", "unknown_flag"]


number = st.one_of(st.floats(0, 1), st.none(), st.sampled_from([float("nan"), -1.0, 2.0, float("inf")]))
flag = st.sampled_from([0, 0, 0, 1, -1, 7, None])
rows = st.fixed_dictionaries(
    {
        "photo_id": st.sampled_from(["a", "b", "c/d", ""]),
        **dict.fromkeys(("x_min", "x_max", "y_min", "y_max"), number),
        **dict.fromkeys(("is_occluded", "is_group_of", "is_inside"), flag),
    }
)


@given(st.lists(rows, max_size=30), st.floats(0, 0.5), st.floats(0.5, 1), st.sampled_from(["accept", "reject"]))
def test_accepted_and_rejected_are_all_that_was_read(table, small, large, unknown):
    settings = SelectionSettings(min_area=small, max_area=large, unknown_flags=unknown)
    read = batch(*table)
    selected = select(read, settings)
    unique = drop_duplicates(selected.objects)
    numbers = [row for part in (unique.objects, unique.rejects, selected.rejects) for row in part["row"].to_pylist()]
    assert sorted(numbers) == list(range(len(table)))
    assert set(selected.rejects["reason"].to_pylist()) <= set(REJECT_REASONS)
    for area in unique.objects["area_share"].to_pylist():
        assert small <= area <= large


def test_ids_are_those_of_the_box_and_not_of_its_place():
    random = np.random.default_rng(0)
    table = pa.Table.from_batches([batch(*({"x_min": x, "x_max": x + 0.3} for x in random.uniform(0, 0.5, 200)))])
    ids = object_ids(table)
    shuffle = random.permutation(200)
    assert object_ids(table.take(shuffle)).to_pylist() == ids.take(shuffle).to_pylist()
    assert len(set(ids.to_pylist())) == 200
    assert pc.all(pc.match_substring_regex(ids, r"^0a1b-[0-9a-f]{12}$")).as_py()


def test_ids_are_pinned():
    """These may never change: keys of existing datasets would."""
    assert object_ids(pa.Table.from_batches([batch({})])).to_pylist() == ["0a1b-539830491ba4"]


def test_ids_change_with_every_coordinate_and_the_label():
    changes = [{}, {"label": "/m/2"}, *({name: GOOD[name] + 1e-9} for name in ("x_min", "x_max", "y_min", "y_max"))]
    assert len(set(object_ids(pa.Table.from_batches([batch(*changes)])).to_pylist())) == 6


def test_a_box_that_stands_twice_is_one_object():
    selected = select(batch({}, {"x_min": 0.11}, {}), SelectionSettings())
    unique = drop_duplicates(selected.objects)
    assert sorted(unique.objects["row"].to_pylist()) == [0, 1]
    assert unique.rejects.select(["row", "reason"]).to_pylist() == [{"row": 2, "reason": "duplicate"}]


def test_labels_without_a_name_keep_their_id():
    table = pa.Table.from_batches([batch({}, {"label": "/m/2"})])
    assert with_names(table, {"/m/1": "Disc"})["label_name"].to_pylist() == ["Disc", "/m/2"]
