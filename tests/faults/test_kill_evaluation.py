"""A short set of the kills; the full one is `python -m tests.faults.kill_evaluation`."""

from pathlib import Path

from tests.faults.kill_evaluation import PAIRS, run


def test_a_painting_that_is_killed_leaves_the_same_pictures_and_none_twice(tmp_path: Path):
    hit = run(kills=2, ranks=2, seed=1, folder=tmp_path)
    assert len(hit) >= 2
    assert any(0 < pictures < PAIRS for pictures in hit), "one of them came in the middle"
