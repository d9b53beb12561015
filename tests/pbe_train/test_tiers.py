"""Training in little memory: moments in 8 bits or on the CPU, bf16 weights, frozen parts. As exact as any other training."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pbe_core.errors import InputError
from pbe_core.vae import weights_sha256
from pbe_train.checkpoints.trainer_checkpoint import read_state
from pbe_train.config import OptimizerSettings
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pbe_train.training.eight_bit import EightBit, dynamic_codes
from pbe_train.training.optimizer import EMA, clip_gradients, make_optimizer, set_learning_rate, step_unless
from pbe_train.training.tiered_adamw import TieredAdamW, round_at_random
from tests.pbe_train.small_world import World

BF16 = ["--model.weights=bf16", "--precision=bf16"]
WAYS = {
    "8-bit": ["--optimizer.state=8bit", "--ema_place=cpu"],
    "8-bit-bf16": ["--optimizer.state=8bit", "--ema_place=cpu", "--model.gradient_checkpointing=true", *BF16],
    "bf16": ["--accumulation=2", "--optimizer.gradient_clip=0.5", *BF16],
    "cpu": ["--optimizer.place=cpu", "--ema_place=cpu", *BF16],
    "frozen": ["--optimizer.state=8bit", "--optimizer.place=cpu", '--model.train=["attentions", "conditioner"]', *BF16],
}


def run(world: World, out: Path, *options: str) -> None:
    with torch.random.fork_rng():
        train(world.settings(out, *options), Distributed(0, 1, torch.device("cpu")))


def parts(out: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {part: load_file(folder / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}


def hashes(out: Path, step: int) -> list[str]:
    return [weights_sha256(part) for part in parts(out, step).values()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_bit_for_bit_and_a_broken_step_changes_nothing(world: World, tmp_path: Path, monkeypatch, way: str):
    """Step 2's gradient is not finite. The run is stopped after step 3; learning rate, noise and moments go on as if it were not."""
    import pbe_train.train as train_module

    whole, parts_of_a_step = train_module.noise_losses, 2 if way == "bf16" else 1

    def breaking_from(step: int) -> None:
        calls = itertools.count(step * parts_of_a_step)
        broken = {parts_of_a_step}
        monkeypatch.setattr(
            train_module, "noise_losses", lambda *given: whole(*given) * (math.inf if next(calls) in broken else 1)
        )

    options = ["--log_every=1", "--checkpoint_every=1", "--keep_last=9", *WAYS[way]]
    breaking_from(0)
    run(world, tmp_path / "calm", *options, "--steps=6")
    one, two, three = (hashes(tmp_path / "calm", step) for step in (1, 2, 3))
    assert (one[0], one[2]) == (two[0], two[2])
    assert two[0] != three[0]
    assert two[2] != three[2]
    breaking_from(0)
    run(world, tmp_path / "stopped", *options, "--steps=3")
    assert read_state(tmp_path / "stopped" / "checkpoints" / "step-00000003").optimizer_step == 2
    breaking_from(3)
    run(world, tmp_path / "stopped", *options, "--steps=6")
    assert hashes(tmp_path / "stopped", 6) == hashes(tmp_path / "calm", 6)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "calm")
