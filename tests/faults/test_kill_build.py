"""A short set of the kills, in two builds by one worker; the full one is `python -m tests.faults.kill_build`."""

import random
import signal
import subprocess
import time

import pytest

from pbe_core.errors import INTERRUPTED
from tests.faults.kill_build import build_command, kill_at_writes, kill_often, recorded, report_of

pytestmark = pytest.mark.timeout(1800)  # These wait for what comes, however slow the machine is.


def test_a_build_that_is_killed_makes_the_same_bytes(photos, dataset, tmp_path):
    report, targets = report_of(dataset), ["program", "raylet"]
    command = build_command(photos, tmp_path / "build" / "dataset", 1, samples=20)
    kill_often(targets, 2, command, tmp_path / "build", report, random.Random(1))
    assert not report.problems
    # The program is started again; it survives the other.
    assert [(kill.target, kill.status) for kill in report.kills] == list(zip(targets, (-9, None), strict=True))
    assert len(report.sha256) > 8


def test_a_build_that_is_killed_while_it_writes_leaves_nothing(photos, dataset, tmp_path):
    """The program just before a table takes its name, and its worker before a tar and a record do."""
    report = report_of(dataset)
    places = ["plan.parquet", "shards/train-N.tar", "shards/train-N.json"]
    command = build_command(photos, tmp_path / "build" / "dataset", 1, samples=20)
    kill_at_writes(3, command, tmp_path / "build", report, places)
    assert not report.problems
    deaths = {(kill.target.partition(": ")[2], kill.status) for kill in report.kills}
    assert deaths == set(zip(places, (-9, None, None), strict=True))


def test_sigterm_ends_a_build_in_one_line(photos, tmp_path):
    """As batch systems send it. Ray's own handler would abort the program with a page of addresses."""
    out = tmp_path / "dataset"
    process = subprocess.Popen(build_command(photos, out, 1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "shards").is_dir() or not recorded(out):
        assert process.poll() is None
        time.sleep(0.1)
    for _ in range(2):  # From who signals every process of a job, and from a launcher.
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    _, said = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (143, INTERRUPTED)
    assert "SIGTERM" not in said
    assert "Traceback" not in said
