"""What the presets for small GPUs set, as options that go over the tests' small world."""

import json

from pbe_core.settings import load_settings, preset
from pbe_train.config import TrainSettings
from pbe_train.cost import TIERS

DECIDING = {
    "": ("ema_place", "precision"),
    "model": ("gradient_checkpointing", "weights", "train"),
    "optimizer": ("state", "place"),
}
MASTERS = ["--model.weights=bf16", "--precision=bf16", "--optimizer.place=cpu", "--ema_place=cpu"]


def options_of(gigabytes: int) -> list[str]:
    """The preset's settings that decide where things lie and how long they are; sizes and data stay those of the small world."""
    settings = load_settings(TrainSettings, "train", ["--config", str(preset(f"finetune_{gigabytes}gb"))]).model_dump(mode="json")
    options = []
    for group, names in DECIDING.items():
        values = settings[group] if group else settings
        for name in names:
            value = values[name] if isinstance(values[name], str) else json.dumps(values[name])
            options.append(f"--{group + '.' if group else ''}{name}={value}")
    return options


OPTIONS = {**{f"{gigabytes}gb": options_of(gigabytes) for gigabytes in TIERS}, "masters": MASTERS}
"""Of each preset, and of bf16 weights with fp32 copies on the CPU."""
