"""The program that measures the presets for small GPUs: what it runs and keeps. Rates themselves are never asserted."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.tiers import main, settings_of, table_of
from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY

TINY = REPOSITORY / "configs" / "tiny.yaml"


def test_a_preset_is_measured_at_tiny_size_on_a_cpu(tmp_path: Path, monkeypatch, capsys):
    options = ["--device", "cpu", "--world", str(TINY), "--tiers", "8", "--steps", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tiers", *options])
    main()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("tiers.")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["preset"] == "finetune_8gb"
    assert row["samples_per_second"] > 0
    assert row["peak_gb"] is None
    assert 0 < row["counted_gb"] < 1
    assert "finetune_8gb" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tiers"])
    with pytest.raises(InputError, match="this machine has no GPU"):
        main()


def test_a_small_config_lends_its_networks_and_the_preset_its_ways():
    settings, whole = settings_of(8, TINY), settings_of(8, None)
    assert settings.model.unet.block_out_channels == (64, 96)
    assert (settings.model.weights, settings.model.train) == ("bf16", ("attentions", "conditioner"))
    assert settings.optimizer == whole.optimizer
    assert whole.model.pretrained == "Fantasy-Studio/Paint-by-Example"


def test_what_did_not_fit_is_shown():
    row = {"preset": "finetune_8gb", "batch": 4, "accumulation": 8, "peak_gb": None, "counted_gb": 5, "host_gb": 1}
    table = table_of("device", [{**row, "samples_per_second": None}])
    assert list(table.columns[5].cells) == ["out of memory"]
