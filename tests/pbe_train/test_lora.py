"""LoRA: nothing at first, a sum in the end; what is trained, kept and gone on from; what others load of it."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader
from safetensors.torch import load_file
from torch import Tensor

import pbe_train.export
from pbe_core.errors import InputError
from pbe_train import PaintByExample
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.lora_files import CONDITIONER_FILE, DIFFUSERS_FILE
from pbe_train.checkpoints.lora_merge import merge_loras
from pbe_train.checkpoints.networks import build_model, read_pretrained
from pbe_train.checkpoints.trainer_checkpoint import list_checkpoints, read_state
from pbe_train.config import LoraSettings
from pbe_train.model.lora import is_lora
from pbe_train.model.paint_model import PaintByExampleModel, with_lora
from pbe_train.training import setup
from tests.conftest import Done, call_program
from tests.pbe_train.programs import start_ranks
from tests.pbe_train.small_world import World
from tests.pbe_train.test_resume import PARTS, STEPS, Runs, end, metrics, newest, status, straight, what_was_computed

ALL = ("attention", "feed_forward", "convolutions", "mapper")
LORA = ["--lora.rank=4", "--lora.alpha=6", f"--lora.targets={json.dumps(ALL)}", "--optimizer.learning_rate=0.02"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trained(world: World, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a few steps beside the run of two; the rate is high, so that it changes much."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return straight(world, out, f"--model.pretrained={run_folder}", *LORA, "--steps=4")


@pytest.fixture(scope="module")
def other(world: World, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of the U-Net's attention alone, with another rank and seed, and without an average."""
    out = tmp_path_factory.mktemp("lora") / "other"
    options = ["--lora.rank=2", "--optimizer.learning_rate=0.02", "--steps=3", "--seed=5", "--ema_decay=0"]
    return straight(world, out, f"--model.pretrained={run_folder}", *options)


def inputs(model: PaintByExampleModel) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    noisy, masked = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(2))
    mask = torch.ones(2, 1, 4, 4)
    side = model.conditioner.model.config.image_size
    return (
        noisy,
        masked,
        mask,
        torch.tensor([7, 800]),
        torch.randn(2, 3, side, side, generator=generator),
        torch.zeros(2, dtype=bool),
    )


@torch.no_grad()
def predicted(model: PaintByExampleModel, bf16: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model.eval()(*inputs(model))


def disturb(model: PaintByExampleModel) -> None:
    """Both halves of a LoRA random, so that it adds something."""
    with torch.no_grad():
        for name, parameter in model.kept().items():
            assert is_lora(name)
            parameter.normal_(std=0.2)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_new_lora_changes_nothing_bit_for_bit(world: World, run_folder: Path, shortcut: bool, bf16: bool):
    settings = world.settings(run_folder, f"--model.one_token_shortcut={str(shortcut).lower()}").model
    torch.manual_seed(0)
    plain = build_model(settings, 4)
    model = with_lora(copy.deepcopy(plain), LoraSettings(rank=3, alpha=5, targets=ALL), "base")
    assert torch.equal(predicted(model, bf16), predicted(plain, bf16))
    disturb(model)
    assert not torch.equal(predicted(model, bf16), predicted(plain, bf16))


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_which_layers_get_one(world: World, run_folder: Path, tokens: str):
    """And all that is trained can change the output: queries and keys of attention to one token cannot."""
    torch.manual_seed(0)
    plain = build_model(world.settings(run_folder, f"--model.tokens={tokens}").model, 4)
    names = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    model = with_lora(plain, LoraSettings(rank=2, targets=ALL), "base")
    disturb(model)
    layers = {name.partition(".lora_")[0] for name in model.kept()}
    assert layers <= names
    idle = {name for name in names if (".attn2.to_q" in name or ".attn2.to_k" in name) or ("mapper" in name and "to_k" in name)}
    assert idle
    assert (tokens == "all") == bool(layers & idle)
    assert model.kept().keys() == model.trained().keys()
    model.train()(*inputs(model)).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.trained().values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not is_lora(name))


def test_recomputed_activations_give_the_same_gradients(world: World, run_folder: Path):
    gradients = []
    for recomputed in ("false", "true"):
        torch.manual_seed(0)
        plain = build_model(world.settings(run_folder, f"--model.gradient_checkpointing={recomputed}").model, 4)
        model = with_lora(plain, LoraSettings(rank=2, targets=ALL), "base").train()
        disturb(model)
        model(*inputs(model)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.trained().items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_checkpoint_holds_the_lora_alone_and_the_base_stays_as_it_was(run_folder: Path, trained: Path):
    (checkpoint,) = list_checkpoints(trained)
    base = read_pretrained(str(run_folder))
    state = read_state(checkpoint)
    names = load_file(checkpoint / "model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names)
    assert any(name.startswith("conditioner.") for name in names)
    assert {name for name in names if name.endswith("lora_B.weight") and not names[name].any()} == set(), "all of it was trained"
    assert load_file(checkpoint / "optimizer.safetensors").keys() == {
        f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names
    }
    sizes = [
        path.stat().st_size for path in (checkpoint / "model.safetensors", list_checkpoints(run_folder)[-1] / "model.safetensors")
    ]
    assert sizes[0] < 0.5 * sizes[1]
    # Its hash is of what the base holds; the run that painted beside it did not change a bit.
    whole = {f"unet.{name}": value for name, value in base.unet.items()}
    whole |= {f"conditioner.{name}": value for name, value in (base.conditioner or {}).items()}
    assert state.identity.base_sha256 == setup.weights_sha256(whole)
    assert "a LoRA of rank 4 in " in json.loads((trained / "start.json").read_text())["new"][0]


def test_a_killed_lora_goes_on_bit_for_bit(world: World, run_folder: Path, tmp_path: Path):
    """With micro-batches and two loader processes; and where the base has moved meanwhile, since its hash is what counts."""
    options = [f"--steps={STEPS}", "--checkpoint_every=5", "--log_every=3", "--accumulation=2", *LORA, "--lora.rank=3"]
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved)
    with Runs(world, tmp_path / "killed", *options, f"--model.pretrained={run_folder}") as runs:
        runs.kill_when(lambda: newest(runs.out) == 5)
        runs.options[-1] = f"--model.pretrained={moved}"
        runs.finish()
    whole = straight(world, tmp_path / "straight", *options, f"--model.pretrained={run_folder}")
    assert what_was_computed(runs.out) == what_was_computed(whole)
    assert PARTS == ("model", "ema", "optimizer")
    with pytest.raises(InputError, match=r"was trained otherwise: lora\.rank 3 -> 5"):
        straight(world, runs.out, *options, "--lora.rank=5", f"--model.pretrained={run_folder}")


def test_two_ranks_train_one_lora(world: World, run_folder: Path, tmp_path: Path):
    options = [f"--model.pretrained={run_folder}", *LORA, "--steps=4", "--global_batch=8", "--log_every=1"]
    processes = start_ranks(2, ["--config", str(world.config), *options], tmp_path)
    try:
        one = straight(world, tmp_path / "one", *options)
        assert [status(process) for process in processes] == [0, 0], (tmp_path / "log0").read_text()
    finally:
        end(processes)
    first, second = json.loads((tmp_path / "run" / "finished.json").read_text())["weights_sha256"]
    assert first == second
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (one, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_another_base_is_refused(world: World, run_folder: Path, trained: Path, tmp_path: Path):
    """By who goes on with a LoRA, and by who paints with it."""
    changed = tmp_path / "changed"
    straight(world, changed, "--steps=1")
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    with pytest.raises(InputError, match=r"was trained otherwise: base_sha256 '\w+' -> '\w+'"):
        straight(world, out, f"--model.pretrained={changed}", *LORA, "--steps=6")
    (checkpoint,) = list_checkpoints(out)
    state = json.loads((checkpoint / "state.json").read_text())
    for named, said in ((changed, "has other weights"), (tmp_path / "gone", "cannot be read, and a LoRA alone is no model")):
        state["settings"]["model"]["pretrained"] = str(named)
        (checkpoint / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match=said):
            load_run(out, device="cpu")


def test_a_lora_needs_a_whole_model(world: World, tmp_path: Path):
    with pytest.raises(InputError, match=r"lora: a LoRA is trained beside a whole Paint by Example model.*model\.pretrained"):
        straight(world, tmp_path / "run", *LORA)
    unet = tmp_path / "words" / "unet"
    sizes = build_model(world.settings(tmp_path).model, 4).unet.config
    UNet2DConditionModel.from_config({**sizes, "in_channels": 4}).save_pretrained(unet)
    with pytest.raises(InputError, match="is a Stable Diffusion model, which has no conditioner"):
        straight(world, tmp_path / "run", *LORA, f"--model.pretrained={unet.parent}")


# --- What others load of it ---


def unmerged(world: World, run: Path, base: Path) -> PaintByExampleModel:
    """The averaged LoRA of a run as it was trained: in layers of peft."""
    settings = world.settings(run, f"--model.pretrained={base}")
    (checkpoint,) = list_checkpoints(run)
    state = read_state(checkpoint)
    model, _ = setup.init_from_pretrained(settings, load_run(base, device="cpu").vae)
    with_lora(model, LoraSettings.model_validate(state.settings["lora"]), "base")
    part = "ema" if (checkpoint / "ema.safetensors").is_file() else "model"
    with torch.no_grad():
        for name, value in load_file(checkpoint / f"{part}.safetensors").items():
            model.kept()[name].copy_(value)
    return model


def export(*options: object) -> Done:
    return call_program(pbe_train.export.main, *map(str, options))


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for form in ("lora", "kohya"):
        done = export("--model", trained, "--format", form, "--out", folder / form)
        assert done.returncode == 0, done.stderr
    return {form: folder / form for form in ("lora", "kohya")}


@contextmanager
def loaded_by_diffusers(unet: UNet2DConditionModel, folder: Path, form: str) -> Iterator[None]:
    if form == "lora":
        unet.load_lora_adapter(str(folder), weight_name=DIFFUSERS_FILE, prefix="unet")
    else:
        file = f"{folder.name}.safetensors"
        state, alphas, note = Loader.lora_state_dict(
            str(folder), weight_name=file, unet_config=unet.config, return_lora_metadata=True
        )
        Loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=note)
    yield
    unet.unload_lora()


def far(model: PaintByExampleModel, other: PaintByExampleModel) -> float:
    return float((predicted(model) - predicted(other)).abs().max())


def test_merged_is_unmerged_and_its_export(world: World, run_folder: Path, trained: Path, tmp_path: Path):
    beside, base = unmerged(world, trained, run_folder), load_run(run_folder, device="cpu").model
    assert far(beside, base) > 100 * TOLERANCE, "it has learnt something that shows"
    assert far(beside, load_run(trained, device="cpu").model) <= TOLERANCE
    done = export("--model", trained, "--format", "weights", "--merge", "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    whole = load_run(tmp_path / "whole", device="cpu")
    assert far(beside, whole.model) <= 1e-3, "in half precision"
    assert whole.settings.lora is None
    assert "| LoRA in its weights | that of this run |" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_diffusers_own_loader_gives_the_same_unet(world: World, run_folder: Path, trained: Path, exported: dict, form: str):
    """At full strength: alpha / rank is 1.5 here, and many a loader loses alpha."""
    beside, plain = unmerged(world, trained, run_folder), load_run(run_folder, device="cpu").model
    assert {module.scaling["default"] for module in beside.modules() if hasattr(module, "lora_A")} == {1.5}
    noisy, masked, mask, timestep, *_ = inputs(plain)
    condition = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(3))
    given = noisy, masked, mask, timestep, condition
    with torch.no_grad():
        before = plain.eval().predict(*given)
        # The shortcut is ours: theirs computes the whole attention.
        theirs = UNet2DConditionModel.from_config(plain.unet.config).eval()
        theirs.load_state_dict(plain.unet.state_dict())
        with loaded_by_diffusers(theirs, exported[form], form):
            seen = theirs(torch.cat(given[:3], 1), timestep, encoder_hidden_states=condition).sample
        expected = beside.eval().predict(*given)
    assert (seen - before).abs().max() > 100 * TOLERANCE
    assert (seen - expected).abs().max() <= TOLERANCE


def test_what_is_exported_is_read_back(world: World, run_folder: Path, trained: Path, exported: dict[str, Path], tmp_path: Path):
    """From the run, from either layout, and from either one's file, which names the part that lies beside it."""
    expected = load_run(trained, device="cpu").model
    places = {"run": trained, "lora": exported["lora"], "kohya": exported["kohya"]}
    places["file"] = exported["kohya"] / "kohya.safetensors"
    for name, place in places.items():
        run = load_run(run_folder, device="cpu")
        (merged,) = merge_loras(run, [place])
        assert merged.notes == [], name
        assert far(run.model, expected) <= TOLERANCE, name
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(exported["lora"] / DIFFUSERS_FILE, alone)
    with pytest.raises(InputError, match=f"a part of it, {CONDITIONER_FILE}, is not beside it"):
        merge_loras(load_run(run_folder, device="cpu"), [alone])
    assert f"`{CONDITIONER_FILE}` is a part of it" in (exported["kohya"] / "README.md").read_text()


def test_several_are_the_base_and_their_weighted_sum(world: World, run_folder: Path, trained: Path, other: Path, tmp_path: Path):
    """To the last bits of fp32, whatever order they come in; 0 is the base; and a person is told of another base."""
    base, one, two = (load_run(place, device="cpu").model.kept() for place in (run_folder, trained, other))
    stacked = PaintByExample.from_pretrained(run_folder, device="cpu", loras=[f"{trained}:0.8", (other, -1.5)])
    assert [(lora.source, lora.weight) for lora in stacked.loras] == [(str(trained), 0.8), (str(other), -1.5)]
    changed = 0
    for name, weight in stacked.run.model.kept().items():
        expected = base[name].double() + 0.8 * (one[name].double() - base[name]) - 1.5 * (two[name].double() - base[name])
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
        changed += not torch.equal(weight, base[name])
    assert changed == len({*load_file(list_checkpoints(trained)[-1] / "model.safetensors")}) // 2
    none = PaintByExample.from_pretrained(run_folder, device="cpu", loras=[(trained, 0), f"{other}:0"]).run.model.kept()
    assert all(torch.equal(none[name], weight) for name, weight in base.items())
    beside = PaintByExample.from_pretrained(trained, device="cpu", loras=[other])
    assert "was trained beside other weights" in beside.loras[0].notes[0]


def test_a_lora_run_is_a_start_and_is_exported_alone_or_merged(world: World, trained: Path, run_folder: Path, tmp_path: Path):
    """A run that begins from one has its base and its LoRA, in one."""
    further = straight(
        world, tmp_path / "further", f"--model.pretrained={trained}", "--steps=1", "--optimizer.learning_rate=1e-12"
    )
    assert far(load_run(further, "model", "cpu").model, load_run(trained, device="cpu").model) <= TOLERANCE
    for options, said in (
        (["--format", "weights", "--model", trained], "trains a LoRA, and --format weights holds a whole model; give --merge"),
        (["--format", "weights", "--model", run_folder, "--merge"], "there is nothing to merge"),
        (["--format", "lora", "--model", run_folder], "it holds no LoRA"),
        (["--format", "lora", "--model", trained, "--merge"], "holds a LoRA alone"),
        (["--format", "weights", "--model", run_folder, "--lora", trained], "give --merge, too"),
    ):
        done = export(*options, "--out", tmp_path / "none")
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    done = export("--format", "weights", "--model", run_folder, "--merge", "--lora", f"{trained}:0.5", "--out", tmp_path / "half")
    assert done.returncode == 0, done.stderr
    run = load_run(run_folder, device="cpu")
    merge_loras(run, [(trained, 0.5)])
    assert far(load_run(tmp_path / "half", device="cpu").model, run.model) <= 1e-3
    (told,) = json.loads((tmp_path / "half" / "export.json").read_text())["loras"]
    assert (told["name"], told["weight"]) == ("run", 0.5)


@pytest.mark.long
def test_a_compiled_lora_trains_as_one_that_is_not(world: World, run_folder: Path, tmp_path: Path):
    options = [f"--model.pretrained={run_folder}", *LORA, "--steps=2", "--log_every=1"]
    runs = [straight(world, tmp_path / way, *options, f"--model.compile={way}") for way in ("false", "true")]
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
