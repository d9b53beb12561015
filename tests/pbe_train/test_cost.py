"""The costs that are told before a run: offline, for the presets, and right in the arithmetic from counts to hours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pbe_core.errors import InputError
from pbe_train.cost import ASSUMED_UTILISATION, estimate_cost, main, view_size
from pbe_train.training.flops import find_gpu
from tests.pbe_train.small_world import World

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_presets_cost_can_be_told_without_weights_and_network(tmp_path):
    """From an empty home, with the hub switched off; 923 M parameters, of which 32 M have no effect on one token."""
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pbe_train.cost", "--config", "configs/open_images.yaml", "--steps", "2_000"]
    # A dataset that is here would say how large its views are.
    command += ["--dataset", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")]
    table = {line[0]: line[1:] for line in lines}
    assert "views of 512 px (build.views.size of configs/open_images.yaml), latents of 64 cells a side" in done.stdout
    assert table["trained"] == ["890.8"]
    assert table["frozen (vision encoder)"] == ["303.2"]
    assert table["vision encoder, forward"][0] == "162"
    assert "128,000 samples (2,000 steps of 64)" in done.stdout
    assert "an MFU of 28% is assumed of every GPU" in " ".join(done.stdout.split())
    assert table["A100 80GB"][:2] == ["bf16", "312"]
    assert table["T4"][-1] == "none"


def test_the_tiny_preset_is_the_default(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["--dataset", str(tmp_path), "--global_batch=16"])
    said = capsys.readouterr().out
    assert "views of 128 px (build.views.size of" in said
    assert "(2,400 steps of 16)" in said


def test_hours_follow_from_counts_and_peak(world: World, tmp_path):
    settings = world.settings(tmp_path, "--steps=1000", "--global_batch=8")
    cost = estimate_cost(settings, 32, bf16=True)
    gpu = find_gpu("NVIDIA H200")
    assert cost.samples == 8000
    assert cost.hours(gpu, "bf16") == pytest.approx(8000 * cost.flops.total / (ASSUMED_UTILISATION * 989.5e12) / 3600)
    assert cost.hours(gpu, "fp32") == pytest.approx(989.5 / 67 * cost.hours(gpu, "bf16"), rel=1e-3)
    assert cost.trained + cost.without_effect + cost.frozen == sum(cost.parameters.values())


def test_the_side_of_a_view_is_that_of_the_dataset_first(world: World, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("build:\n  views:\n    size: 256\n")
    assert view_size(world.dataset, config) == (32, str(world.dataset / "dataset.json"))
    assert view_size(tmp_path, config) == (256, f"build.views.size of {config}")
    config.write_text("train:\n  steps: 3\n")
    assert view_size(tmp_path, config)[0] == 512
    (tmp_path / "dataset.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match=r"dataset\.json: damaged, it has no view_size"):
        view_size(tmp_path, config)
    (tmp_path / "dataset.json").unlink()
    assert view_size(tmp_path, None) == (512, "the default")
    config.write_text("build:\n  views:\n    size: much\n")
    with pytest.raises(InputError, match=r"build\.views\.size is 'much'; give a number of px"):
        view_size(tmp_path, config)


def test_unknown_networks_are_one_line():
    command = [sys.executable, "-m", "pbe_train.cost", "--config", "configs/open_images.yaml", "--model.encoder=someone/clip"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: someone/clip: no config.json here, and its sizes are not known; set model.encoder to a local folder or "
        "openai/clip-vit-large-patch14"
    )
