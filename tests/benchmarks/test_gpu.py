"""The command for half an hour on a GPU, rehearsed at tiny size on a CPU. Rates themselves are never asserted."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import GPU_ALONE, PARTS, Record, in_own_process, is_done, main, parse, results_folder, table_of
from pbe_core.errors import InputError
from pbe_core.machine import cpu_name

SECONDS = 0.05
"""Of each part: least work."""


@pytest.fixture
def options(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu, "LOADING_SECONDS", 1800)  # A busy machine must not fail a test.
    places = ["--tiny", str(dataset), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    given = ["--device", "cpu", "--preset", "tiny", *places]
    monkeypatch.setattr(sys, "argv", ["gpu", *given])
    return given


def test_a_rehearsal_runs_every_part_but_those_that_take_a_gpu_and_none_twice(options: list[str], tmp_path: Path, capfd):
    folder = results_folder(tmp_path, cpu_name())
    folder.mkdir()
    given = parse()
    assert given.parts == list(PARTS), "in order of worth"
    assert given.dataset == given.tiny
    for part in PARTS:
        if part not in GPU_ALONE:
            in_own_process(part, given, folder, SECONDS)
    found = {part: json.loads((folder / f"{part}.json").read_bytes()) for part in PARTS if part not in GPU_ALONE}
    assert {part: one["error"] for part, one in found.items()} == dict.fromkeys(found)
    assert all(one["done"] and one["seconds"] > 0 and one["preset"] == "tiny" for one in found.values())
    rows = {part: {row["what"]: row for row in one["rows"]} for part, one in found.items()}
    assert list(rows["ladder"])[:3] == [f"{way}, batch {size}" for way, size in LADDER]
    assert list(rows["ladder"])[4].startswith("for long: ")
    assert {"waiting for data", "a checkpoint holds up the steps"} < rows["loop"].keys()
    assert rows["edits"].keys() == {"an edit, fp32", "an edit, bf16"}
    assert len(rows["latents"]) == 2
    assert rows["encoder"].keys() == {"encoder, fp32", "encoder, bf16"}
    assert rows["tiny"]["loss of the tiny preset, last line"]["steps"] == 2
    before = {part: (folder / f"{part}.json").stat().st_mtime_ns for part in found}
    capfd.readouterr()
    main()
    told = capfd.readouterr().out
    assert "parity: left out, it takes a GPU" in told
    assert all(f"{part}: done before" in told for part in found)
    assert "a checkpoint" in told
    assert {part: (folder / f"{part}.json").stat().st_mtime_ns for part in found} == before


LADDER = [("plain", 1), ("+ bf16", 1), ("+ channels-last", 1)]


def test_what_fails_says_why_and_what_it_measured_before_stays(options: list[str], tmp_path: Path, monkeypatch, capfd):
    """No dataset for one part, a time that is up for another; the same command goes on with both."""
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--tiny", str(tmp_path / "nowhere"), "--parts", "tiny", "encoder"])
    given, folder = parse(), results_folder(tmp_path, cpu_name())
    folder.mkdir()
    in_own_process("tiny", given, folder, SECONDS)
    assert "tiny: failed: " in (told := capfd.readouterr().out)
    assert "nowhere: no dataset here; `make shards` makes the tiny one" in told

    monkeypatch.setattr(gpu, "LOADING_SECONDS", 0)
    record = Record(folder / "encoder.json", "encoder", "tiny")
    record.keep({"what": "encoder, fp32", "figure": 1.0, "unit": "pictures/s", "goal": ""})
    in_own_process("encoder", given, folder, 0.0)
    assert "encoder: failed: ended by its time" in capfd.readouterr().out
    assert not is_done(folder / "encoder.json")
    kept = Record(folder / "encoder.json", "encoder", "tiny").content
    assert [row["figure"] for row in kept["rows"]] == [1.0]
    assert list(table_of([kept]).columns[1].cells) == ["encoder, fp32", "failed"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    main()
    assert "encoder: left out, the time is up; the same command goes on" in capfd.readouterr().out


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


def test_without_a_gpu_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PATH", "")  # So that no nvidia-smi is found.
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(InputError, match="no GPU here; rehearse with --device cpu --preset tiny"):
        parse()
    monkeypatch.setattr(sys, "argv", ["gpu", "--help"])
    with pytest.raises(SystemExit):
        parse()
    assert "pip download" in capsys.readouterr().out
