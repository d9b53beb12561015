"""Training in little memory: moments in 8 bits or on the CPU, bf16 weights, frozen parts. As exact as any other training."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pbe_core.errors import InputError
from pbe_core.vae import weights_sha256
from pbe_train import train as train_module
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.trainer_checkpoint import read_state
from pbe_train.config import OptimizerSettings
from pbe_train.train import train
from pbe_train.training import tiered_adamw
from pbe_train.training.distributed import Distributed
from pbe_train.training.eight_bit import EightBit, dynamic_codes
from pbe_train.training.optimizer import EMA, clip_gradients, make_optimizer, set_learning_rate, step_unless
from pbe_train.training.tiered_adamw import TieredAdamW, round_at_random
from tests.pbe_train.small_world import World
from tests.pbe_train.tiers import OPTIONS

BF16 = ["--model.weights=bf16", "--precision=bf16"]
# The presets' ways, and what no preset does.
WAYS = {name: OPTIONS[name] for name in ("8gb", "12gb", "16gb", "masters")} | {
    "bf16": ["--accumulation=2", "--optimizer.gradient_clip=0.5", *BF16],
    "8bit-on-cpu": ["--optimizer.state=8bit", "--optimizer.place=cpu", "--ema_place=cpu", *BF16],
}
# What runs each time; the others in `make test-long`.
QUICK = ("8gb", "masters")


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


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.long) for way in WAYS])
def test_a_run_goes_on_bit_for_bit_and_a_broken_step_changes_nothing(world: World, tmp_path: Path, monkeypatch, way: str):
    """Step 2's gradient is not finite. The run is stopped after step 3; learning rate, noise and moments go on as if it were not.

    What was saved is what is painted with.
    """
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
    painted = load_run(tmp_path / "calm").model.kept()
    assert all(torch.equal(painted[name], value.float()) for name, value in parts(tmp_path / "calm", 6)["ema"].items())
    weights = {name: value.dtype for name, value in parts(tmp_path / "calm", 6)["model"].items()}
    short = [name for name, kind in weights.items() if kind == torch.bfloat16]
    # Whole in bf16; or, where fp32 copies are trained, only what is not trained.
    assert len(short) == len(weights) if way in ("8gb", "12gb", "bf16") else "unet.conv_in.weight" not in short


def made(settings: OptimizerSettings, start: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Parameter, object]:
    masters = {"weight": start.contiguous().clone()} if dtype == torch.bfloat16 and settings.place == "cpu" else {}
    weight = nn.Parameter(start.clone().to(dtype))
    return weight, make_optimizer({"weight": weight}, settings, seed, masters)


def steps(weight: nn.Parameter, optimizer: object, settings: OptimizerSettings, count: int, first: int = 0) -> None:
    """Towards 1 in each element, under gradients of very different sizes."""
    sizes = torch.logspace(-4, 2, weight.numel()).view(weight.shape)
    for step in range(first, first + count):
        weight.grad = ((weight.detach().float() - 1) * sizes).to(weight.dtype)
        set_learning_rate(optimizer, settings, step, 1000)
        step_unless(torch.tensor(False), optimizer)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_it_is_adamw(state: str, dtype: torch.dtype, place: str, layout: torch.memory_format):
    """What PyTorch's AdamW does to fp32 weights, but for what 8 and 16 bits hold; in any memory layout, which stays."""
    torch.manual_seed(0)
    settings = OptimizerSettings(learning_rate=1e-2, warmup_steps=3, state=state, place=place)
    start = torch.randn(33, 20, 3, 3).contiguous(memory_format=layout)
    plain = OptimizerSettings(learning_rate=1e-2, warmup_steps=3)
    (weight, optimizer), (true, adamw) = made(settings, start, dtype), made(plain, start, torch.float32)
    assert isinstance(adamw, torch.optim.AdamW)
    steps(true, adamw, plain, 40)
    steps(weight, optimizer, settings, 40)
    assert weight.is_contiguous(memory_format=layout)
    moved, apart = (true - start).abs().mean(), (weight.float() - true).abs()
    near = 0.08 if state == "8bit" else 0.02
    if (state, dtype) == ("fp32", torch.float32):
        torch.testing.assert_close(weight, true)
    elif isinstance(optimizer, TieredAdamW) and optimizer.masters:
        # Gradients are of bf16 weights, the weights themselves are not.
        assert (optimizer.masters["weight"] - true).abs().mean() < near * moved
        assert torch.equal(weight, optimizer.masters["weight"].bfloat16())
    else:
        assert apart.mean() < max(near, 0.05) * moved


def test_states_do_not_depend_on_the_memory_layout():
    """So a run may go on in another one: `model.channels_last` may change."""
    torch.manual_seed(0)
    settings, start = OptimizerSettings(learning_rate=1e-2, state="8bit"), torch.randn(40, 20, 3, 3)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight, optimizer = made(settings, start.contiguous(memory_format=layout), torch.bfloat16)
        steps(weight, optimizer, settings, 5)
        found.append({"weight": weight.detach(), **optimizer.tensors()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_long_tensors_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    settings, start = OptimizerSettings(learning_rate=1e-2, state="8bit"), torch.randn(5001)
    whole, in_pieces = made(settings, start, torch.float32), made(settings, start, torch.float32)
    steps(*whole, settings, 5)
    monkeypatch.setattr(tiered_adamw, "PIECE", 1024)
    steps(*in_pieces, settings, 5)
    assert torch.equal(whole[0], in_pieces[0])


def test_steps_that_are_smaller_than_bf16s_spacing_count_on_average():
    """Each is a fortieth of the spacing; rounded to the nearest, nothing would ever move. The noise is one by name."""
    settings = OptimizerSettings(learning_rate=1e-4, warmup_steps=0, weight_decay=0)
    runs = [made(settings, torch.ones(4000), torch.bfloat16, seed) for seed in (0, 0, 1)]
    for weight, optimizer in runs:
        for step in range(100):
            weight.grad = torch.ones_like(weight)
            set_learning_rate(optimizer, settings, step, 1000)
            step_unless(torch.tensor(False), optimizer)
    same, again, other = (weight.detach() for weight, _ in runs)
    assert float(same.float().mean()) == pytest.approx(1 - 100 * 1e-4, abs=5e-4)
    assert len(same.unique()) > 1
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_rounding_keeps_what_bf16_has_and_is_right_on_average():
    noise = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, 1.0, -2.5, 3e38, -1e-30]).bfloat16()
    assert torch.equal(round_at_random(exact.float(), noise), exact)
    for value in (1.001, -1.001, 3e-5, -7e8):
        rounded = round_at_random(torch.full((100_000,), value), noise).float()
        down, up = rounded.min(), rounded.max()
        assert down < value < up
        assert abs(float(rounded.double().mean()) - value) < 0.02 * float(up - down)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_hold_numbers_of_seven_decades(signed: bool):
    """Codes are those of the paper: 0 and 1 are exact, and what lies between is off by less than half of a step."""
    codes = dynamic_codes(signed)
    assert (len(codes), len(set(codes)), codes[-1], min(map(abs, codes))) == (256, 256, 1.0, 0.0)
    assert codes[0] == pytest.approx(-0.992968 if signed else 0)
    values = torch.logspace(-5, 0, 1000) * (torch.arange(1000) % 2 * 2 - 1 if signed else 1)
    kept = EightBit(1000, signed, torch.device("cpu"))
    assert not kept.read(0, 1000).any()
    kept.write(0, 1000, values, torch.zeros(()))
    apart = ((kept.read(0, 1000) - values) / values).abs()
    assert apart.max() < 0.35
    assert apart[values.abs() > 0.1].max() < 0.06
    before = kept.codes.clone(), kept.scales.clone()
    kept.write(0, 1000, torch.full((1000,), float("nan")), torch.ones(()))
    assert torch.equal(kept.codes, before[0])
    assert torch.equal(kept.scales, before[1])


def test_the_gradient_of_bf16_weights_has_its_norm_in_fp32():
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for name in "ab"}
    for weight in weights.values():
        weight.grad = torch.randn(1000).bfloat16()
    true = torch.cat([weight.grad.float() for weight in weights.values()]).norm()
    assert float(clip_gradients(weights, 0)) == pytest.approx(float(true), rel=1e-6)
    assert float(clip_gradients(weights, 1.5)) == pytest.approx(float(true), rel=1e-6)
    assert float(clip_gradients(weights, 0)) == pytest.approx(1.5, rel=1e-2)


def test_the_average_of_bf16_weights_is_fp32_and_lies_where_it_is_asked_for():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = EMA({"weight": weight}, 0.999, "cpu")
    with torch.no_grad():
        weight.fill_(2)
    average.update(100_000)
    assert average.average["weight"].tolist() == pytest.approx([1.001] * 3, abs=1e-5)
    with average.in_place():
        assert weight.tolist() == [1.0] * 3
    assert weight.tolist() == [2.0] * 3


def test_only_what_is_named_is_trained(world: World, tmp_path: Path):
    run(world, tmp_path / "run", '--model.train=["attn1", "conditioner.proj_out"]', "--steps=2", "--checkpoint_every=1")
    one, two = (parts(tmp_path / "run", step) for step in (1, 2))
    without_effect = {name for name in one["model"] if "mapper" in name and (".to_q." in name or ".to_k." in name)}
    moved = {name for name, value in one["model"].items() if not torch.equal(value, two["model"][name])}
    named = {name for name in one["model"] if ".attn1." in name or "conditioner.proj_out" in name}
    assert moved == named - without_effect
    assert {name.partition(".")[2] for name in one["optimizer"]} == moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.train=nothing_such"],
            r"model\.train: nothing that is trained is in 'nothing_such'; names are made of .*attn1",
        ),
        (["--model.weights=bf16", "--precision=fp16"], r"model\.weights bf16 is computed in bf16, not in precision fp16"),
        (["--model.weights=bf16"], r"precision auto comes to fp32 on this machine; set precision to bf16"),
    ],
    ids=["no-such-part", "fp16", "auto"],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(world: World, tmp_path: Path, options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        run(world, tmp_path / "run", *options)


def test_a_checkpoint_from_before_these_settings_goes_on(world: World, tmp_path: Path):
    run(world, tmp_path / "run", "--steps=2")
    path = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    for group, name in (
        ("", "ema_place"),
        ("", "cuda_graph"),
        ("model", "train"),
        ("model", "weights"),
        ("optimizer", "state"),
        ("optimizer", "place"),
    ):
        (state["settings"][group] if group else state["settings"]).pop(name)
    path.write_text(json.dumps(state))
    run(world, tmp_path / "run", "--steps=3")
    with pytest.raises(InputError, match=r"optimizer\.state 'fp32' -> '8bit'"):
        run(world, tmp_path / "run", "--steps=4", "--optimizer.state=8bit")
