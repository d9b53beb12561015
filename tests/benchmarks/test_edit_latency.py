"""The program that times edits: its rows run, at sizes of no size, and what is reckoned says so."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import edit_latency
from benchmarks.edit_latency import ROWS, as_row, main, measure, write
from pbe_core.errors import InputError

TOLD = {"seconds": 10.0, "steps": [(2.0, 2), (2.0, 2), (8.0, 2)], "passes": 10, "all_passes": 102, "peak_mb": 5000.4}


def test_steps_that_were_left_out_are_reckoned_and_the_row_says_so():
    whole, few = as_row("peer", TOLD, None), as_row("peer", TOLD, 4)
    assert (whole["seconds"], whole["passes"], whole["reckoned_from_steps"]) == (10.0, 10, None)
    # 92 passes more, of the median's length; of the ten, the first four were in steps that nobody was told of.
    assert (few["seconds"], few["passes"], few["reckoned_from_steps"]) == (10 + 92, 102, 3)
    assert few["seconds_a_pass"] == whole["seconds_a_pass"] == 1.0
    assert few["peak_mb"] == 5000
    assert as_row("fp32, reuse 2", TOLD, None)["seconds_a_pass"] is None


def test_rows_come_together_in_one_file(tmp_path: Path):
    """In the program's order, each beside the peer; one that is measured again replaces the old one."""
    file = tmp_path / "results" / "latency.json"
    write(file, {"row": "+ bf16", "seconds": 5.0}, 512)
    assert "times_peer" not in json.loads(file.read_text())["rows"][0]
    write(file, {"row": "default steps", "seconds": 20.0}, 512)
    write(file, {"row": "peer", "seconds": 50.0}, 512)
    rows = write(file, {"row": "+ bf16", "seconds": 4.0}, 512)
    assert [(row["row"], row["times_peer"]) for row in rows] == [("peer", 1.0), ("default steps", 2.5), ("+ bf16", 12.5)]
    assert json.loads(file.read_text())["rows"] == rows


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.compiled])
def test_a_row(name: str):
    """Each way paints; passes are counted as items that go through the U-Net, whatever the batch."""
    told = measure(name, tiny=True, few=3)
    part = "interval" in name
    assert {passes for _, passes in told["steps"]} == ({1, 2} if part else {2})
    assert told["passes"] == (5 if part else 2 * (len(told["steps"]) + 1))
    assert told["all_passes"] == (102 if name == "exact published" else 28 if part else 34)
    assert told["peak_mb"] > 100


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """From its command line to its file, with a row in a process of its own."""
    file = tmp_path / "latency.json"
    words = ["--tiny", "--few", "3", "--threads", "1", "--results", str(file)]
    monkeypatch.setattr(sys, "argv", ["edit_latency", *words, "--rows", "fp32, interval 0-0.83, reuse 2", "+ bf16"])
    main()
    # Of steps that differ in length nothing is reckoned.
    assert [(row["row"], row["reckoned_from_steps"]) for row in json.loads(file.read_text())["rows"]] == [
        ("+ bf16", 2),
        ("fp32, interval 0-0.83, reuse 2", None),
    ]
    assert "+ bf16" in capsys.readouterr().out
    for wrong, said in ((["--rows", "peer"], "with --peer"), (["--few", "2"], "give 3 steps or more")):
        monkeypatch.setattr(sys, "argv", ["edit_latency", *wrong])
        with pytest.raises(InputError, match=said):
            main()
    monkeypatch.setattr(edit_latency.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1e9}))
    monkeypatch.setattr(sys, "argv", ["edit_latency", "--rows", "+ bf16"])
    with pytest.raises(InputError, match=r"1\.0 GB of memory are free, and 8 are needed"):
        main()
