"""The first losses of the tiny preset are those of golden_losses.json, so that no change of the numbers passes unseen.

Data, networks and arithmetic all show in them. The file is made anew by `python -m tests.pbe_train.golden`.
"""

import json
import math
from pathlib import Path

import pytest

from tests.pbe_train.golden import FILE, PRECISIONS, compare, machine, shards_sha256, train

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tiny_preset_trains_as_it_did(dataset: Path, tmp_path: Path, precision: str):
    losses = train(dataset, tmp_path / "run", precision)
    assert losses[-1] < losses[0]
    problem = compare(GOLDEN, precision, losses, machine(), shards_sha256(dataset))
    assert problem is None, problem


def test_losses_are_compared_exactly_on_a_machine_of_the_same_kind_and_loosely_on_others():
    known, same, shards = GOLDEN["losses"]["fp32"], GOLDEN["machine"], GOLDEN["shards"]
    other, last_bit = {**same, "torch": "1.0"}, [*known[:-1], math.nextafter(known[-1], 2)]
    assert compare(GOLDEN, "fp32", known, same, shards) is None
    assert "1 of 8 losses" in compare(GOLDEN, "fp32", last_bit, same, shards)
    assert compare(GOLDEN, "fp32", last_bit, other, shards) is None
    far = compare(GOLDEN, "fp32", [loss * 1.03 for loss in known], other, "0")
    assert f"machine is another: torch {same['torch']} -> 1.0); the shards are others" in far
    assert "1 of 8 losses" in compare(GOLDEN, "fp32", [math.nan, *known[1:]], other, shards)
