"""A short set of the kills; the full one is `python -m tests.faults.kill_build`."""

from tests.faults.kill_build import TARGETS, run


def test_a_build_that_is_killed_makes_the_same_bytes(tmp_path):
    report = run(photos=20, kills=1, seed=1, folder=tmp_path)
    assert not report.problems
    statuses = {kill.target: kill.status for kill in report.kills}
    assert list(statuses) == list(TARGETS)
    assert statuses["program"] == -9
    assert statuses["packing process"] is None
    assert statuses["raylet"] is None
    assert report.shards > 8
