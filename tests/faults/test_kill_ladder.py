"""A ladder of ablations that is stopped: its trainings are asked to save, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pbe_core.settings import REPOSITORY
from pbe_train.ladder.runs import is_in_use
from tests.pbe_train.ladder_world import make_ladder_world
from tests.pbe_train.small_world import make_world


def test_a_stop_is_handed_on(tmp_path: Path):
    """The real command, whose run would never come to its end."""
    small, out = make_ladder_world(make_world(tmp_path / "world"), tmp_path / "parts"), tmp_path / "ladder"
    options = small.options(out, "--arms", "baseline", "--seeds", "1", "--steps", "1000000", "--only", "train")
    command = [sys.executable, "-m", "pbe_train.ablations", *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        metrics = out / "runs" / "baseline-seed0" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        assert is_in_use(metrics.parent)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on from there" in said
    assert not is_in_use(metrics.parent)
    assert list((metrics.parent / "checkpoints").glob("step-*"))
    assert "is saved" in (out / "runs" / "baseline-seed0.log").read_text()
