"""A short set of the kills; the full one is `python -m tests.faults.kill_train`."""

from pathlib import Path

import pytest

from tests.faults.kill_train import run


@pytest.mark.long
def test_a_training_that_is_killed_leaves_the_same_bytes(tmp_path: Path):
    hit = run(kills=2, steps=12, seed=1, folder=tmp_path)
    assert any(0 < step < 12 for step in hit), "one of them came in the middle"
