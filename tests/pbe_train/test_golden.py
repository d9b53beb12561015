"""The first losses of the tiny preset are those of golden_losses.json, so that no change of the numbers passes unseen.

Data, networks and arithmetic all show in them. The file is made anew by `python -m tests.pbe_train.golden`.
"""

import json
import math
from pathlib import Path

import pytest

from tests.pbe_train.golden import FILE, PRECISIONS, STEPS, Golden, compare, machine, shards_sha256, train


@pytest.fixture(scope="module")
def golden() -> Golden:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tiny_preset_trains_as_it_did(golden: Golden, dataset: Path, tmp_path: Path, precision: str):
    losses = train(dataset, tmp_path / "run", precision)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    problem = compare(golden, precision, losses, machine(), shards_sha256(dataset))
    assert problem is None, problem


def test_losses_are_compared_exactly_on_a_machine_of_the_same_kind_and_loosely_on_others(golden: Golden):
    known, same = golden["losses"]["fp32"], golden["machine"]
    other = {**same, "torch": "1.0"}

    def told(losses: list[float], here: dict[str, str], shards: str = golden["shards"]) -> str | None:
        return compare(golden, "fp32", losses, here, shards)

    assert told(known, same) is None
    last_bit = [*known[:-1], math.nextafter(known[-1], 2)]
    assert "1 of 20 losses" in told(last_bit, same)
    assert "from step 20, by up to" in told(last_bit, same)
    assert "compared exactly" in told(last_bit, same)
    assert told(last_bit, other) is None
    far = [loss * 1.03 for loss in known]
    assert f"compared to 2%, since the machine is another: torch {same['torch']} -> 1.0" in told(far, other)
    assert "the shards are the same" in told(far, other)
    assert "the shards are others" in told(far, other, "0")
    assert "1 of 20 losses" in told([math.nan, *known[1:]], other)
