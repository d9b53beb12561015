"""What is counted as a training's memory is what PyTorch's allocator sees of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pbe_train.checkpoints.networks import unloaded_model
from pbe_train.config import TrainSettings
from pbe_train.model.paint_model import prepare
from pbe_train.training.memory import training_memory
from pbe_train.training.optimizer import EMA, cast_weights, clip_gradients, make_optimizer, set_learning_rate, step_unless
from tests.pbe_train.small_world import World
from tests.pbe_train.tiers import OPTIONS

CELLS, BATCH = 16, 6
# Wider than the small world's networks: the weights' share is then as large as that of the activations.
SIZES = ["--precision=bf16", "--model.unet.block_out_channels=[64, 128]", "--accumulation=2"]


def allocated(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What some work returns, the bytes that it leaves allocated, and the most that there were on the way.

    Of the CPU's allocator, which tells the profiler of each block; memory that kernels get in other ways is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return made, now, most


class Training:
    """The trainer's own parts, and its step, on made-up batches."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings, model = settings, unloaded_model(settings.model)
        masters = cast_weights(model, settings, "bf16")
        self.model = prepare(model, settings.model, torch.device("cpu")).train()
        self.trained = self.model.trained()
        self.optimizer = make_optimizer(self.trained, settings.optimizer, 0, masters)
        self.ema = EMA(self.trained, settings.ema_decay, settings.ema_place, masters)

    def step(self) -> None:
        """As `train_step`."""
        for _ in range(self.settings.accumulation):
            torch.autograd.backward(self.loss() / self.settings.accumulation)
        norm = clip_gradients(self.trained, 0)
        set_learning_rate(self.optimizer, self.settings.optimizer, 0, 10)
        step_unless(~norm.isfinite(), self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(1)

    def loss(self) -> Tensor:
        noisy, noise, masked = (torch.randn(BATCH, 4, CELLS, CELLS) for _ in range(3))
        mask, reference = torch.ones(BATCH, 1, CELLS, CELLS), torch.randn(BATCH, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(noisy, masked, mask, torch.arange(BATCH), reference, torch.zeros(BATCH, dtype=torch.bool))
        return (predicted.float() - noise).square().mean()


@pytest.mark.parametrize("tier", ["whole", *OPTIONS])
def test_the_count_is_the_allocators_peak_within_a_tenth(world: World, tmp_path: Path, tier: str):
    """Of the device and of the CPU's memory together, which are one here. `whole`: nothing is saved anywhere."""
    settings = world.settings(tmp_path, *OPTIONS.get(tier, []), *SIZES)
    training, kept, _ = allocated(lambda: Training(settings))
    counted = training_memory(settings, CELLS, [BATCH], bf16=True, gpu=False)[BATCH]
    _, later, most = allocated(lambda: [training.step() for _ in range(2)])
    # AdamW makes its moments in the first step, and everything is still there after the last one.
    assert counted.kept + counted.host == pytest.approx(kept + later, rel=0.02)
    assert counted.device + counted.host == pytest.approx(kept + most, rel=0.1)
    assert counted.working > 0.2 * counted.device, "activations count"


def test_what_saves_memory_is_counted_to_save_it(world: World, tmp_path: Path):
    def of(*options: str, batch: int = BATCH) -> Any:
        return training_memory(world.settings(tmp_path, *SIZES, *options), CELLS, [batch], bf16=True)[batch]

    whole = of()
    assert of("--model.gradient_checkpointing=true").working < 0.8 * whole.working
    assert of("--optimizer.state=8bit").moments < 0.3 * whole.moments
    short, copies = of("--model.weights=bf16"), of("--model.weights=bf16", "--optimizer.place=cpu")
    assert short.weights == pytest.approx(whole.weights / 2, rel=0.01)
    assert (short.gradients, copies.masters) == (whole.gradients // 2, whole.gradients)
    assert copies.device < short.device < whole.device
    assert copies.host == copies.masters + copies.moments
    frozen = of('--model.train=["conditioner"]')
    assert frozen.trained < 0.2 * whole.trained
    assert frozen.working < whole.working
    assert of("--ema_place=cpu").host == whole.average
    assert of("--ema_decay=0").average == 0
    # GPUs compute normalisations in fp32.
    plain = training_memory(world.settings(tmp_path, *SIZES), CELLS, [BATCH], bf16=True, gpu=False)[BATCH]
    assert plain.working < whole.working
