"""A short set of `python -m tests.faults.kill_crawl`."""

import pytest

from tests.faults.kill_crawl import kill_often

pytestmark = pytest.mark.timeout(3600)  # It waits for what comes, however slow the machine is.


def test_a_crawl_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path):
    report = kill_often(300, 2, 1, tmp_path)
    assert not report.problems
    assert len(report.kills) == 2
    # In the middle of it each time, and what was recorded grows.
    recorded = [kill.recorded for kill in report.kills]
    assert recorded == sorted(recorded)
    assert 0 < recorded[0] <= recorded[-1] < 300
