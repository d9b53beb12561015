"""A short set of the kills, in one build; the full one is `python -m tests.faults.kill_build`."""

import random

from tests.faults.kill_build import build_command, kill_often, report_of


def test_a_build_that_is_killed_makes_the_same_bytes(photos, dataset, tmp_path):
    report, targets = report_of(dataset), ["packing process", "raylet", "program"]
    command = build_command(photos, tmp_path / "build" / "dataset", 2, samples=20)
    kill_often(targets, 3, command, tmp_path / "build", report, random.Random(1))
    assert not report.problems
    # The program is started again; it survives the others.
    assert [(kill.target, kill.status) for kill in report.kills] == list(zip(targets, (None, None, -9), strict=True))
    assert len(report.sha256) > 8
