"""The command for half an hour on a GPU, rehearsed at tiny size on a CPU. Rates themselves are never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import GPU_ALONE, PARTS, Record, in_own_process, is_done, main, parse, results_folder, table_of
from pbe_core.errors import InputError
from pbe_core.machine import cpu_name
from pbe_core.settings import REPOSITORY


def options(dataset: Path, folder: Path) -> list[str]:
    places = ["--tiny", str(dataset), "--work", str(folder / "work"), "--out", str(folder)]
    return ["--device", "cpu", "--preset", "tiny", "--minutes", "0.01", *places]


def test_a_rehearsal_runs_every_part_but_those_that_take_a_gpu_and_none_twice(dataset: Path, tmp_path: Path, monkeypatch, capsys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "benchmarks.gpu", *options(dataset, tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = results_folder(tmp_path, cpu_name())
    found = {part: json.loads((folder / f"{part}.json").read_bytes()) for part in PARTS if part not in GPU_ALONE}
    assert {part: one["error"] for part, one in found.items()} == dict.fromkeys(found)
    assert all(one["done"] and one["seconds"] > 0 and one["preset"] == "tiny" for one in found.values())
    rows = {part: {row["what"]: row for row in one["rows"]} for part, one in found.items()}
    ladder = list(rows["ladder"])
    assert ladder[:3] == ["plain, batch 1", "+ bf16, batch 1", "+ channels-last, batch 1"]
    assert ladder[3].endswith(", batch 2")
    assert ladder[4].startswith("for long: ")
    assert {"waiting for data", "a checkpoint holds up the steps"} < rows["loop"].keys()
    assert rows["edits"].keys() == {"an edit, fp32", "an edit, bf16"}
    assert len(rows["latents"]) == 2
    assert rows["encoder"].keys() == {"encoder, fp32", "encoder, bf16"}
    assert rows["tiny"]["loss of the tiny preset, last line"]["steps"] == 2
    monkeypatch.setattr(sys, "argv", command[2:])
    main()
    told = capsys.readouterr().out
    assert "parity: left out, it takes a GPU" in told
    assert [part for part in PARTS if f"{part}: done before" in told] == list(found)
    assert "a checkpoint" in told


def test_what_fails_says_why_and_what_it_measured_before_stays(tmp_path: Path, monkeypatch, capsys):
    """No dataset for one part, a time that is up for another; the same command goes on with both."""
    monkeypatch.setattr(sys, "argv", ["gpu", *options(tmp_path / "nowhere", tmp_path), "--parts", "encoder", "tiny"])
    given, folder = parse(), results_folder(tmp_path, cpu_name())
    assert given.dataset == given.tiny
    folder.mkdir()
    in_own_process("tiny", given, folder, 0.0, None)
    told = capsys.readouterr().out
    assert told.startswith("tiny: failed: ")
    assert "nowhere: no dataset here; `make shards` makes the tiny one" in told

    Record(folder / "encoder.json", "encoder", "tiny").keep({"what": "encoder, fp32", "figure": 1.0, "unit": "", "goal": ""})
    in_own_process("encoder", given, folder, 0.0, 0.0)
    assert "encoder: failed: ended by its time" in capsys.readouterr().out
    assert not is_done(folder / "encoder.json")
    kept = Record(folder / "encoder.json", "encoder", "tiny").content
    assert [row["figure"] for row in kept["rows"]] == [1.0]
    assert list(table_of([kept]).columns[1].cells) == ["encoder, fp32", "failed"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    main()
    told = capsys.readouterr().out
    assert "encoder: left out, the time is up; the same command goes on" in told
    assert told.index("encoder: left out") < told.index("tiny: left out"), "in order of worth"


def test_a_row_takes_the_place_of_one_that_says_the_same(tmp_path: Path):
    for figure in (1.0, 2.0):
        record = Record(tmp_path / "part.json", "part", "tiny")
        for what in ("one", "other"):
            record.keep({"what": what, "figure": figure, "unit": "", "goal": ""})
    record.fail("it broke")
    record.begin()
    record.finish()
    content = json.loads((tmp_path / "part.json").read_bytes())
    assert [(row["what"], row["figure"]) for row in content["rows"]] == [("one", 2.0), ("other", 2.0)]
    assert (content["error"], content["done"]) == (None, True)


def test_what_is_recorded_is_never_half_there(tmp_path: Path, monkeypatch):
    """A part may be ended at any time, also while it writes; the same command then goes on."""
    record = Record(tmp_path / "part.json", "part", "tiny")
    record.finish()
    before = (tmp_path / "part.json").read_bytes()
    monkeypatch.setattr(os, "replace", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.keep({"what": "one", "figure": 1.0, "unit": "", "goal": ""})
    assert (tmp_path / "part.json").read_bytes() == before


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_without_a_gpu_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PATH", "")  # So that no nvidia-smi is found.
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(InputError, match="no GPU here; rehearse with --device cpu --preset tiny"):
        parse()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no GPU here"):
        parse()
    for minutes in ("-1", "nan", "inf"):
        monkeypatch.setattr(sys, "argv", ["gpu", *options(tmp_path, tmp_path), "--minutes", minutes])
        with pytest.raises(InputError, match=f"--minutes {minutes}: no time that can be shared out"):
            parse()
    monkeypatch.setattr(sys, "argv", ["gpu", "--help"])
    with pytest.raises(SystemExit):
        parse()
    assert "pip download" in capsys.readouterr().out
