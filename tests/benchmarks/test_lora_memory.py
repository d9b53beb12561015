"""Both ways run, and diffusers' own loader gives what the LoRA gives, at the sizes of the tiny preset."""

from pathlib import Path

import pytest

from benchmarks import lora_memory
from pbe_core.settings import load_settings, preset
from pbe_train.config import TrainSettings


@pytest.mark.parametrize("way", lora_memory.WAYS)
def test_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str):
    options = ["--model.gradient_checkpointing=true", "--precision=fp32", "--lora.alpha=16", "--optimizer.learning_rate=0.01"]
    settings = load_settings(TrainSettings, "train", options, preset("lora_tiny"))
    monkeypatch.setattr(lora_memory, "settings_of", lambda: settings)
    monkeypatch.setattr(lora_memory, "VIEW", 128)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    monkeypatch.setattr(lora_memory, "CLIP_SIZES", {**lora_memory.CLIP_SIZES, **small})
    row = lora_memory.measure(way, tmp_path)
    assert row["way"] == way
    assert len(row["seconds"]) == lora_memory.STEPS
    assert row["peak_mb"] > 0
    if way == "full":
        assert row["trained_millions"] > 2
        return
    assert row["trained_millions"] < 1
    assert row["largest_change_by_lora"] > 1e-2
    assert row["largest_difference_to_diffusers"] <= 1e-5
