"""Lists of photos, each once: the same as a plain dictionary gives, whatever the order, the parts, and the hashes."""

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import photos
from pipelines.photos import each_once, known_about

NAMES = ("split", "photo_id", "file_name", "url")
LISTED = pa.schema([(name, pa.string()) for name in NAMES])
VALUES = st.none() | st.sampled_from(["a", "b", "ü"])
ROWS = st.lists(st.tuples(st.sampled_from(["train", "test"]), st.sampled_from([f"{n:02d}" for n in range(30)]), VALUES, VALUES))


def table(rows: list[tuple]) -> pa.Table:
    return pa.table([pa.array(list(column), pa.string()) for column in zip(*rows, strict=True)] or [[]] * 4, schema=LISTED)


def in_parts(rows: list[tuple], count: int = 3) -> list[pa.Table]:
    return [table(rows[start : start + count]) for start in range(0, len(rows), count)]


def plain(rows: list[tuple]) -> dict[tuple, tuple]:
    """Each photo's smallest values."""
    found: dict[tuple, list[list]] = {}
    for split, photo_id, *values in rows:
        for kept, value in zip(found.setdefault((split, photo_id), [[], []]), values, strict=True):
            kept += [value] if value is not None else []
    return {name: tuple(min(kept, default=None) for kept in both) for name, both in found.items()}


def as_dict(listed: pa.Table) -> dict[tuple, tuple]:
    rows = [tuple(row.values()) for row in listed.to_pylist()]
    assert len({row[:2] for row in rows}) == len(rows)
    return {row[:2]: row[2:] for row in rows}


@pytest.fixture(params=[1, 1_000_000], ids=["merged often", "merged once"], autouse=True)
def held(request, monkeypatch):
    monkeypatch.setattr(photos, "_ROWS_HELD", request.param)


@given(rows=ROWS, seed=st.integers(0, 99))
@settings(deadline=None)
def test_each_photo_is_there_once_with_what_any_row_has(rows, seed):
    # Objects of a photo stand together, and say the same.
    rows = [row for row in rows for _ in range(random.Random(seed).randint(1, 3))]
    listed = each_once(in_parts(rows), LISTED)
    assert (listed.schema, as_dict(listed)) == (LISTED, plain(rows))
    random.Random(seed).shuffle(rows)
    assert each_once(in_parts(rows, 5), LISTED).to_pylist() == listed.to_pylist()


@given(rows=ROWS, told=ROWS, seed=st.integers(0, 99))
@settings(deadline=None)
def test_what_a_source_knows_of_a_photo_is_added_and_the_row_itself_counts_most(rows, told, seed):
    wanted = each_once(in_parts(rows), LISTED)
    told = [*told, ("train", None, "a", "a"), (None, "00", "a", "a"), ("train", "no id, ü", "a", "a")]
    random.Random(seed).shuffle(told)
    joined = known_about([batch for part in in_parts(told) for batch in part.to_batches()], wanted, LISTED)
    known = plain(told)
    expected = {
        name: tuple(own if own is not None else other for own, other in zip(values, known.get(name, (None, None)), strict=True))
        for name, values in as_dict(wanted).items()
    }
    assert (joined.schema, as_dict(joined)) == (LISTED, expected)
    assert joined.select(NAMES[:2]).to_pylist() == wanted.select(NAMES[:2]).to_pylist()


def test_two_photos_of_one_key_are_told_apart_or_refused(monkeypatch):
    """64 bits are enough for all photos there are, and yet nothing is taken for another photo in silence."""
    monkeypatch.setattr(
        photos, "photo_keys", lambda rows: np.array([len(one) for one in rows["photo_id"].to_pylist()], np.uint64)
    )
    wanted = each_once([table([("train", "a", None, None), ("train", "bb", None, None), ("train", "a", None, "u")])], LISTED)
    assert as_dict(wanted) == {("train", "a"): (None, "u"), ("train", "bb"): (None, None)}
    others = table([("train", "z", "of z", None), ("test", "bb", "of the other split", None), ("train", "bb", "of bb", None)])
    assert as_dict(known_about(others.to_batches(), wanted, LISTED))["train", "a"] == (None, "u")
    assert as_dict(known_about(others.to_batches(), wanted, LISTED))["train", "bb"] == ("of bb", None)
    for other in (("train", "z", None, None), ("test", "a", None, None)):
        with pytest.raises(RuntimeError, match="two photos have the same key"):
            each_once([table([("train", "a", None, None)]), table([other])], LISTED)
