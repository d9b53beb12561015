"""The command for half an hour on a GPU, rehearsed at tiny size on a CPU: all parts run, are kept, and are not run again."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import GPU_ALONE, PARTS, Record, is_done, main, results_folder
from benchmarks.train_step import WAYS
from pbe_core.errors import InputError
from pbe_core.machine import cpu_name


def start(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    main()


def test_a_rehearsal_leaves_every_part_but_those_that_take_a_gpu(dataset: Path, tmp_path: Path, monkeypatch, capfd):
    options = ["--device", "cpu", "--preset", "tiny", "--tiny", str(dataset), "--minutes", "1", "--work", str(tmp_path / "work")]
    options += ["--out", str(tmp_path)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    start(monkeypatch, *options, "--parts", "environment", "parity", "ladder", "loop")
    folder = results_folder(tmp_path, cpu_name())
    assert "parity: left out, it takes a GPU" in capfd.readouterr().out
    found = {path.stem: json.loads(path.read_bytes()) for path in folder.glob("*.json")}
    assert {part: one["error"] for part, one in found.items()} == dict.fromkeys(("environment", "ladder", "loop"))
