"""A short set of the kills; the full one is `python -m tests.faults.kill_build`."""

from tests.faults.kill_build import TARGETS, kill_targets


def test_a_build_that_is_killed_makes_the_same_bytes(photos, dataset, tmp_path):
    report = kill_targets(photos, dataset, samples=20, kills=1, seed=1, folder=tmp_path)
    assert not report.problems
    statuses = {kill.target: kill.status for kill in report.kills}
    assert list(statuses) == list(TARGETS)
    # The program is started again; it survives the others.
    assert statuses == {"program": -9, "packing process": None, "raylet": None}
    assert len(report.sha256) > 8
