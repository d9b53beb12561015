"""Steps that are recorded and repeated are the steps of the plain loop, to the bit; what cannot be recorded is refused.

No GPU here: a tape of the CPU's operations stands for a CUDA graph (tests/pbe_train/tape.py), and tensors without content for
those of a GPU.
"""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from pbe_core.errors import InputError
from pbe_core.vae import weights_sha256
from pbe_train import train as train_module
from pbe_train.checkpoints.networks import unloaded_model
from pbe_train.checkpoints.trainer_checkpoint import list_checkpoints
from pbe_train.data.training_dataset import Batch
from pbe_train.model.schedulers import training_schedule
from pbe_train.train import compute, train
from pbe_train.training import cuda_graph, setup
from pbe_train.training.cuda_graph import WARM_UP, Computed, RepeatedStep
from pbe_train.training.distributed import Distributed, Watchdog
from pbe_train.training.optimizer import EMA
from pbe_train.training.setup import out_of_memory
from tests.pbe_train.small_world import World
from tests.pbe_train.tape import READS, TapeRecording, tensors_in

ONE = Distributed(0, 1, torch.device("cpu"))
STEPS = 11


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda_graph: true` on a CPU, by a tape."""
    monkeypatch.setattr(TapeRecording, "made", 0)
    monkeypatch.setattr(cuda_graph, "Recording", TapeRecording)
    monkeypatch.setattr(setup, "prepare_device", lambda _: None)


def run(world: World, out: Path, *options: str) -> None:
    train(
        world.settings(out, f"--steps={STEPS}", "--log_every=5", "--validation.every=5", "--optimizer.warmup_steps=20", *options),
        ONE,
    )


def what_was_computed(out: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Hashes of weights, average and moments of the last checkpoint, and all metrics but those of the clock."""
    last = list_checkpoints(out)[-1]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    clock = ("samples_per_second", "data_wait")
    kept = [{key: value for key, value in line.items() if key not in clock} for line in lines]
    return [weights_sha256(load_file(last / f"{part}.safetensors")) for part in ("model", "ema", "optimizer")], kept


@pytest.mark.parametrize(
    "options",
    [
        ("--precision=bf16",),
        ("--accumulation=2", "--optimizer.gradient_clip=0.1", "--model.gradient_checkpointing=true"),
        ("--precision=fp16", "--prediction=v_prediction"),
    ],
)
def test_a_run_of_recorded_steps_is_the_plain_run_to_the_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taped: None, options: tuple[str, ...]
):
    """Across a stop, after which steps are recorded anew; with a step whose gradient is not finite, among the repeated ones."""
    whole, rates = train_module.noise_losses, []

    def noise_losses(model, schedule, batch):
        rates.append(batch.timestep.clone() if torch._C._len_torch_dispatch_stack() == 0 else None)
        return whole(model, schedule, batch) * torch.where(batch.timestep == broken, math.inf, 1.0)

    monkeypatch.setattr(train_module, "noise_losses", noise_losses)
    broken = -1
    run(world, tmp_path / "first", *options)
    broken = int(rates[-3 if "--accumulation=2" in options else -2][0])  # Of the last step but one: no other has this time.
    run(world, tmp_path / "plain", *options)
    run(world, tmp_path / "recorded", *options, "--cuda_graph=true", "--steps=5")
    run(world, tmp_path / "recorded", *options, "--cuda_graph=true")
    assert TapeRecording.made == 2
    weights, lines = what_was_computed(tmp_path / "plain")
    assert what_was_computed(tmp_path / "recorded") == (weights, lines)
    assert sum(line.get("nonfinite_steps", 0) for line in lines) == 1


class WithoutContent(TorchDispatchMode):
    """PyTorch's AdamW has no rule for tensors without content; it changes weights and moments in place."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return None if func is torch.ops.aten._fused_adamw_.tensor_lr else func(*args, **(kwargs or {}))


class NothingOfTheHost(WithoutContent):
    """Inside it, an operation that takes a tensor of the CPU, or makes one, is an error: a recording cannot hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} reads a number on the host"
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self.seen += 1
        hosts = [tensor for tensor in tensors_in((args, kwargs, made)) if tensor.device.type == "cpu"]
        assert not hosts, f"{func} goes between host and device"
        return made

    seen = 0


@pytest.mark.parametrize("way", [(), ("--model.gradient_checkpointing=true", "--model.tokens=all")])
def test_a_step_never_goes_between_host_and_device(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None, way: tuple[str, ...]
):
    """On a device whose tensors have no content; the first step may still bring the schedule's numbers there."""
    options = ("--accumulation=2", "--optimizer.gradient_clip=1", "--precision=fp32", "--cuda_graph=true", *way)
    settings, device = world.settings(tmp_path, *options), torch.device("meta")
    monkeypatch.setattr(
        sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda _: None
    )  # It knows GPUs and CPUs.
    with device:
        model = unloaded_model(settings.model).train()
        planes, reference = torch.empty(2, 13, 4, 4), torch.empty(2, 32, 32, 3, dtype=torch.uint8)
        times, dropped = torch.empty(2, dtype=torch.long), torch.empty(2, dtype=torch.bool)
    trained = model.trained()
    optimizer = torch.optim.AdamW(trained.values(), lr=1.0, fused=True, capturable=True)
    optimizer.param_groups[0]["lr"] = torch.empty((), device=device)
    state = SimpleNamespace(settings=settings, trained=trained, optimizer=optimizer, parallel=model, step=0)
    state.distributed, state.ema = Distributed(0, 1, device), EMA(trained, 0.9, recorded=True)
    state.scaler, state.schedule = torch.amp.GradScaler("cpu", enabled=False), training_schedule("v_prediction")
    batches, watchdog = [Batch(planes, reference, times, dropped)] * 2, Watchdog(0, str)
    watched = NothingOfTheHost()
    with watched, pytest.raises(AssertionError, match="goes between host and device"):
        compute(state, watchdog, batches)
    with WithoutContent():
        compute(state, watchdog, batches)
    with watched:
        computed = compute(state, watchdog, batches)
    assert watched.seen > 1000
    assert [losses.shape for losses in computed.losses] == [(2,), (2,)]
    assert computed.gradient_norm.device == device


class Calls(TorchDispatchMode):
    """Notes which operations are called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_an_average_that_is_not_recorded_is_told_a_number():
    """A GPU takes a list of tensors for shares one by one, a kernel each: a thousand launches a step for the paper's model."""
    weights = {name: torch.nn.Parameter(torch.randn(5, generator=torch.manual_seed(7))) for name in "abc"}
    plain, recorded = EMA(weights, 0.9), EMA(weights, 0.9, recorded=True)
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(3)
    for average in (plain, recorded):
        average.set_decay(7)
    with Calls() as calls:
        plain.average_in()
    assert calls.called == [torch.ops.aten._foreach_lerp_.Scalar]
    recorded.average_in()
    for name in weights:
        assert torch.equal(plain.average[name], recorded.average[name])


def test_each_shape_of_batches_has_a_recording_of_its_own_in_one_memory(monkeypatch: pytest.MonkeyPatch):
    pools, host = [], []

    class Pooled(TapeRecording):
        def __init__(self, step, pool):
            pools.append(pool)
            super().__init__(step, pool)

    def step(batches: list[Batch]) -> Computed:
        host.append("called")
        losses = [batch.planes.sum(dim=(1, 2, 3)) for batch in batches]
        return Computed(losses, [batch.timestep for batch in batches], losses[0].sum(), losses[0].sum() > 5)

    def batch(width: int, value: float) -> Batch:
        planes, references = torch.full((2, 1, 1, width), value), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
        return Batch(planes, references, torch.full((2,), int(value)), torch.zeros(2, dtype=torch.bool))

    monkeypatch.setattr(cuda_graph, "Recording", Pooled)
    repeated, kept = RepeatedStep(step, ranks=1), []
    for number in range(WARM_UP + 3):
        for width in (1, 3):
            kept.append((width * float(number), number, repeated([batch(width, float(number)), batch(width, 0.0)])))
    assert pools == [None, "pool"]
    assert len(host) == 2 * (WARM_UP + 1)
    for total, number, computed in kept:
        assert computed.losses[0].tolist() == [total] * 2
        assert computed.losses[1].tolist() == [0.0] * 2
        assert [times.tolist() for times in computed.timesteps] == [[number] * 2, [0] * 2]
        assert float(computed.gradient_norm) == 2 * total
        assert bool(computed.nonfinite) == (2 * total > 5)
    assert RepeatedStep(step, ranks=2).warm_up == 11


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        (["--optimizer.state=8bit"], "optimizer.state fp32"),
        (["--optimizer.place=cpu"], "optimizer.place device"),
        (["--model.weights=bf16", "--precision=bf16"], "model.weights fp32"),
        (["--ema_place=cpu", "--optimizer.state=8bit"], "optimizer.state fp32 and ema_place device"),
    ],
)
def test_what_the_host_has_a_part_in_is_not_recorded(world: World, tmp_path: Path, options: list[str], lacking: str):
    with pytest.raises(InputError, match=f"takes {lacking}; or set it to false"):
        world.settings(tmp_path, "--cuda_graph=true", *options)


def test_on_a_cpu_it_is_refused_in_one_line(world: World, tmp_path: Path):
    with pytest.raises(InputError, match=r"^train\.cuda_graph: only a GPU repeats recorded steps, .*; set cuda_graph to false$"):
        run(world, tmp_path, "--cuda_graph=true")
    world.settings(tmp_path, "--cuda_graph=true", "--ema_decay=0", "--ema_place=cpu")  # There is no average.


def test_who_is_out_of_memory_is_told_that_it_takes_some(world: World, tmp_path: Path):
    lines = [out_of_memory(MemoryError("none"), world.settings(tmp_path, *way), ONE) for way in ((), ("--cuda_graph=true",))]
    assert ["--cuda_graph false" in line for line in lines] == [False, True]


def test_ranks_are_joined_as_a_recording_needs_it(monkeypatch: pytest.MonkeyPatch):
    """NCCL's thread that looks for errors is off, unless the user says otherwise; of other runs nothing is changed."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    for recorded, given, found in ((False, None, None), (True, "3", "3"), (True, None, "0")):
        with pytest.MonkeyPatch.context() as patch:
            if given:
                patch.setenv(name, given)
            Distributed.start(1, "fp32", recorded)
            assert os.environ.get(name) == found
    monkeypatch.setenv(name, "0")  # So that it is taken away in the end.
