"""What is counted as a training's memory is what PyTorch's allocator sees of one."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.tiers import Steps
from pbe_train.training.memory import training_memory
from pbe_train.training.tiered_adamw import LEAST_8BIT, moment_bytes
from tests.pbe_train.small_world import World
from tests.pbe_train.tiers import OPTIONS

CELLS, BATCH = 16, 6
# What is compared each time; the others in `make test-long`.
QUICK = ("8gb", "16gb", "masters")
# Wider than the small world's networks: the weights' share is then as large as that of the activations.
SIZES = ["--precision=bf16", "--model.unet.block_out_channels=[64, 128]", "--accumulation=2"]


def allocated(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What some work returns, the bytes that it leaves allocated, and the most that there were on the way.

    Of the CPU's allocator, which tells the profiler of each block; memory that kernels get in other ways is not in it.
    """
    gc.collect()  # What the work before left in cycles would be freed on the way, and count as less than nothing.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = work()
        gc.collect()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return made, now, most


@pytest.mark.parametrize(
    "tier", [tier if tier in QUICK else pytest.param(tier, marks=pytest.mark.long) for tier in ("whole", *OPTIONS)]
)
def test_the_count_is_the_allocators_peak_within_a_tenth(world: World, tmp_path: Path, tier: str):
    """Of the device and of the CPU's memory together, which are one here. `whole`: nothing is saved anywhere."""
    settings = world.settings(tmp_path, *OPTIONS.get(tier, []), *SIZES)
    training, kept, _ = allocated(lambda: Steps(settings, 8 * CELLS, BATCH, torch.device("cpu")))
    counted = training_memory(settings, CELLS, [BATCH], bf16=True, gpu=False)[BATCH]
    _, later, most = allocated(lambda: [training.step() for _ in range(2)])
    # AdamW makes its moments in the first step, and everything is still there after the last one.
    assert counted.kept + counted.host == pytest.approx(kept + later, rel=0.02)
    assert counted.device + counted.host == pytest.approx(kept + most, rel=0.1)
    assert counted.working > 0.2 * counted.device, "activations count"


def test_what_saves_memory_is_counted_to_save_it(world: World, tmp_path: Path):
    def of(*options: str, gpu: bool = True) -> Any:
        settings = world.settings(tmp_path, "--precision=bf16", *options)
        return training_memory(settings, CELLS, [BATCH], bf16=True, gpu=gpu)[BATCH]

    whole = of()
    assert of("--model.gradient_checkpointing=true").working < 0.8 * whole.working
    large = [320 * 320 * 9, 1280 * 768]
    assert moment_bytes(large, "8bit") < 0.3 * moment_bytes(large, "fp32")
    # Of this model much is in small tensors, which keep 32 bits.
    assert moment_bytes([LEAST_8BIT - 1], "8bit") == moment_bytes([LEAST_8BIT - 1], "fp32")
    assert of("--optimizer.state=8bit").moments < 0.5 * whole.moments
    short, copies = of("--model.weights=bf16"), of("--model.weights=bf16", "--optimizer.place=cpu")
    assert short.weights == pytest.approx(whole.weights / 2, rel=0.01)
    assert (short.gradients, copies.masters) == (whole.gradients // 2, whole.gradients)
    assert copies.device < short.device < whole.device
    assert copies.host == copies.masters + copies.moments
    frozen = of('--model.train=["conditioner"]', "--ema_place=cpu")
    assert frozen.trained < 0.3 * whole.trained
    assert frozen.working < whole.working
    assert frozen.host == frozen.average
    # GPUs compute normalisations in fp32.
    assert of("--ema_decay=0", gpu=False).working < whole.working
