"""The programs that measure planning and starting: what they run, count and keep. Times themselves are never asserted."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import planning, startup
from benchmarks.checkout import run_in
from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY


def test_a_plan_is_measured_beside_its_floor_and_another_checkout(tmp_path: Path, monkeypatch, capsys):
    options = ["--folder", str(tmp_path), "--make", "--rows", "1000", "--turns", "1", "--beside", str(REPOSITORY)]
    monkeypatch.setattr(sys, "argv", ["planning", *options, "--results", str(tmp_path / "planning.json")])
    planning.main()
    result = json.loads((tmp_path / "planning.json").read_text())
    assert result["same_tables"] is True
    assert [(row["way"], row["rows"]) for row in result["ways"]] == [
        *(("ours", 1000), ("beside", 1000), ("ours, a tenth", 100), ("floor", 1000))
    ]
    assert all(row["cpu_seconds"] > 0 and row["peak_mb"] > 10 for row in result["ways"])
    assert "the tables of both are the same" in capsys.readouterr().out


def test_starting_is_measured_for_the_commands_that_are_asked_for(tmp_path: Path, monkeypatch):
    options = ["--turns", "1", "--only", "pbe --help", "pbe edit", "--results", str(tmp_path / "startup.json")]
    monkeypatch.setattr(sys, "argv", ["startup", *options])
    startup.main()
    rows = json.loads((tmp_path / "startup.json").read_text())["commands"]
    assert [row["command"] for row in rows] == ["pbe --help", "pbe edit --help"]
    assert all(row["cpu_seconds"] > 0 and row["beside_cpu_seconds"] is None for row in rows)


def test_the_time_of_children_counts_and_a_failure_is_told(tmp_path: Path):
    burn = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    assert run_in(REPOSITORY, ["-c", child], tmp_path / "log").cpu_seconds >= 0.4
    with pytest.raises(InputError, match="ended with 3"):
        run_in(REPOSITORY, ["-c", "import sys; sys.exit(3)"], tmp_path / "log")
