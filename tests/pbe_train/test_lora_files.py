"""LoRAs as other tools write them, what of a file is refused, and edits that are repeated with theirs."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import pbe_train.export
import pbe_train.sample
from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_train import PaintByExample
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.lora_merge import asked_for, merge_loras
from pbe_train.editing.edit_settings import EditSettings, LoraRecord, ModelRecord, PictureRecord, weights_hash
from pbe_train.model.pipeline import Run
from tests.conftest import Done, call_program
from tests.pbe_train.published import make_published, write_hub

Weights = dict[str, Tensor]
# A layer of each kind, with its names in diffusers, in kohya's layout and in the original code.
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LAYERS = {f"{ATTENTION}.to_q": 3, f"{ATTENTION}.to_out.0": 2, "mid_block.resnets.0.conv1": 4}
ORIGINAL = {
    f"{ATTENTION}.to_q": "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    f"{ATTENTION}.to_out.0": "input_blocks_3_1_transformer_blocks_0_attn1_to_out_0",
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
}
ALPHA = 5.0


@pytest.fixture(scope="module")
def matrices(run_folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer of the run's U-Net A and B, of a rank of its own."""
    generator, weights = torch.Generator().manual_seed(0), load_run(run_folder, device="cpu").model.unet.state_dict()
    made = {}
    for name, rank in LAYERS.items():
        outputs, *rest = weights[f"{name}.weight"].shape
        down = torch.randn(rank, *rest, generator=generator)
        made[name] = down, torch.randn(outputs, rank, *[1] * (len(rest) - 1), generator=generator)
    return made


def peft_names(matrices: dict, prefix: str) -> Weights:
    named = {f"{prefix}{name}.lora_A.weight": down for name, (down, _) in matrices.items()}
    return named | {f"{prefix}{name}.lora_B.weight": up for name, (_, up) in matrices.items()}


def write_peft_in_diffusers(folder: Path, matrices: dict) -> Path:
    """As `save_lora_weights` with metadata: one alpha for all, another for a layer."""
    settings = {"unet.r": 3, "unet.lora_alpha": ALPHA, "unet.alpha_pattern": {"mid_block.resnets.0.conv1": 2.0}}
    note = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file(peft_names(matrices, "unet."), folder / "pytorch_lora_weights.safetensors", note)
    return folder


def write_without_alpha(folder: Path, matrices: dict) -> Path:
    """As older versions of it, in half precision."""
    halves = {name: tensor.half() for name, tensor in peft_names(matrices, "unet.").items()}
    save_file(halves, folder / "some.safetensors")
    return folder / "some.safetensors"


def write_peft(folder: Path, matrices: dict) -> Path:
    """Peft's own `save_pretrained`, with rsLoRA."""
    save_file(peft_names(matrices, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 3, "lora_alpha": ALPHA, "use_rslora": True, "peft_type": "LORA"})
    )
    return folder


def write_older_diffusers(folder: Path, matrices: dict) -> Path:
    """By attention processors, in a pickle."""
    tensors = {}
    for name, (down, up) in matrices.items():
        processor = name.replace(".to_q", ".processor.to_q_lora").replace(".to_out.0", ".processor.to_out_lora")
        start = processor if processor != name else f"{name}.lora"
        tensors |= {f"unet.{start}.down.weight": down, f"unet.{start}.up.weight": up}
    torch.save(tensors, folder / "pytorch_lora_weights.bin")
    return folder


def write_kohya(folder: Path, matrices: dict, names: Callable[[str], str] = lambda name: name.replace(".", "_")) -> Path:
    """With a text encoder's part, and matrices of linear layers as kernels of 1 x 1."""
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    for name, (down, up) in matrices.items():
        start, wide = f"lora_unet_{names(name)}", (..., None, None) if down.ndim == 2 else ...
        tensors |= {f"{start}.lora_down.weight": down[wide], f"{start}.lora_up.weight": up[wide]}
        tensors[f"{start}.alpha"] = torch.tensor(ALPHA)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "any name.safetensors", {"ss_network_dim": "4"}
    )
    return folder


def write_original(folder: Path, matrices: dict) -> Path:
    """The same with the original code's names of layers."""
    return write_kohya(folder, matrices, ORIGINAL.__getitem__)


@pytest.mark.parametrize(
    ("write", "scale"),
    [
        (write_peft_in_diffusers, lambda name, rank: (2.0 if "conv1" in name else ALPHA) / rank),
        (write_without_alpha, lambda name, rank: 1.0),
        (write_peft, lambda name, rank: ALPHA / math.sqrt(rank)),
        (write_older_diffusers, lambda name, rank: 1.0),
        (write_kohya, lambda name, rank: ALPHA / rank),
        (write_original, lambda name, rank: ALPHA / rank),
    ],
    ids=lambda value: value.__name__.removeprefix("write_") if callable(value) and value.__name__ != "<lambda>" else "",
)
def test_every_layout_is_read_at_its_strength(run_folder: Path, matrices: dict, tmp_path: Path, write: Callable, scale: Callable):
    """W + weight * alpha / rank * B A, computed here for each; all other weights stay as they were, bit for bit."""
    before, run = load_run(run_folder, device="cpu").model.kept(), load_run(run_folder, device="cpu")
    (merged,) = merge_loras(run, [(write(tmp_path, matrices), 0.5)])
    for name, weight in run.model.kept().items():
        layer = name.removeprefix("unet.").removesuffix(".weight")
        if layer not in matrices:
            assert torch.equal(weight, before[name]), name
            continue
        down, up = (each.double().flatten(1) for each in matrices[layer])
        added = 0.5 * scale(layer, LAYERS[layer]) * (up @ down).view(weight.shape)
        tolerance = 5e-3 if write is write_without_alpha else 1e-6
        torch.testing.assert_close(weight.double() - before[name], added, rtol=tolerance, atol=tolerance)
    texts = "1 tensors of text encoders are left aside, this model has none"
    assert [note.partition(": ")[2] for note in merged.notes] == ([texts] if write in (write_kohya, write_original) else [])


GOOD = f"unet.{ATTENTION}.to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{GOOD}.lora_A.weight": (2, 32), f"{GOOD}.lora_B.weight": (32, 2), f"{GOOD}.lora_magnitude_vector": (32,)}, "a DoRA"),
        ({"lora_unet_x.dora_scale": (1, 32)}, "a DoRA, which also scales"),
        ({"lora_unet_x.hada_w1_a": (4, 2)}, "a LoHa"),
        ({"lora_unet_x.lokr_w1": (4, 2)}, "a LoKr"),
        ({f"{GOOD}.lora_A.weight": (2, 32)}, "to_q has not both of its matrices; the file is not whole"),
        ({f"{GOOD}.lora_A.weight": (2, 32), f"{GOOD}.lora_B.weight": (32, 3)}, "do not make a LoRA"),
        ({f"{GOOD}.lora_A.weight": (0, 32), f"{GOOD}.lora_B.weight": (32, 0)}, "do not make a LoRA"),
        ({f"{GOOD}.weight": (32, 32)}, "is no part of a LoRA as diffusers, peft or kohya's scripts write it"),
        ({"lora_te_x.lora_down.weight": (2, 4), "lora_te_x.lora_up.weight": (4, 2)}, "holds no LoRA but for text encoders"),
        (
            {f"{GOOD}.lora_A.weight": (2, 64), f"{GOOD}.lora_B.weight": (64, 2)},
            rf"of another architecture than the model: it changes {GOOD} \[64, 64\], not \[32, 32\]; give a",
        ),
        (
            {f"unet.down_blocks.{n}.x.lora_A.weight": (2, 64) for n in range(5)}
            | {f"unet.down_blocks.{n}.x.lora_B.weight": (64, 2) for n in range(5)},
            r"x \[64, 64\], which the model has not; .* and 2 others; give",
        ),
    ],
    ids=["dora", "dora kohya", "loha", "lokr", "half", "ranks", "rank 0", "weights", "text", "shapes", "names"],
)
def test_what_is_no_lora_of_this_model_is_one_sentence(run_folder: Path, tmp_path: Path, tensors: dict, message: str):
    path = tmp_path / "wrong.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    run, before = load_run(run_folder, device="cpu"), load_run(run_folder, device="cpu").model.kept()
    with pytest.raises(InputError, match=message) as said:
        merge_loras(run, [path])
    assert "\n" not in str(said.value)
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.kept().items()), "nothing was changed"


def test_what_cannot_be_read_is_one_sentence(run_folder: Path, tmp_path: Path):
    run = load_run(run_folder, device="cpu")
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    whole = {f"{GOOD}.lora_A.weight": torch.ones(2, 32), f"{GOOD}.lora_B.weight": torch.ones(32, 2)}
    save_file(whole, tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) - 9])
    save_file({**whole, f"{GOOD}.lora_B.weight": torch.full((32, 2), torch.nan)}, tmp_path / "nan.safetensors")
    several = tmp_path / "several"
    several.mkdir()
    for name in "ab":
        save_file(whole, several / f"{name}.safetensors")
    for source, said in (
        ("missing", "no such file or folder; give a LoRA"),
        ("empty", "0 files .* name the file"),
        ("several", "2 files .* name the file"),
        ("page.safetensors", "an HTML page"),
        ("cut.safetensors", "damaged or cut short"),
        ("nan.safetensors", "not finite"),
    ):
        with pytest.raises(InputError, match=said):
            merge_loras(run, [str(tmp_path / source)])
    with pytest.raises(InputError, match="all weights of this run are its own, it holds no LoRA; give it as the model"):
        merge_loras(run, [run_folder])


def test_a_weight_stands_behind_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert asked_for("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert asked_for("a/b.safetensors:-0.5") == ("a/b.safetensors", -0.5)
    assert asked_for((Path("a:b"), 2)) == ("a:b", 2.0)
    (tmp_path / "a:0.5").touch()
    assert asked_for("a:0.5") == ("a:0.5", 1.0), "a file of that very name"
    for wrong in ("a:much", "a:nan", "a:", ("a", math.inf)):
        with pytest.raises(InputError, match=r"its weight is .*give a number, such as a:0\.8"):
            asked_for(wrong)


# --- Edits ---


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    random, mask = np.random.default_rng(0), np.zeros((40, 40), np.uint8)
    mask[8:24, 8:24] = 255
    made = {"image": random.integers(0, 256, (40, 40, 3), np.uint8), "mask": mask}
    made["reference"] = random.integers(0, 256, (20, 20, 3), np.uint8)
    for name, pixels in made.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in made}


def edit(out: Path, *options: object) -> Done:
    return call_program(pbe_train.sample.main, "--out", str(out), "--threads", "1", "--device", "cpu", *map(str, options))


def test_an_edit_with_loras_is_repeated_from_its_settings(run_folder: Path, matrices: dict, pictures: dict, tmp_path: Path):
    folder = tmp_path / "lora"
    folder.mkdir()
    file = write_kohya(folder, matrices) / "any name.safetensors"
    given = [word for name, path in pictures.items() for word in (f"--{name}", path)]
    how = ["--model", run_folder, "--steps", "2", "--guidance", "1", "--scheduler", "DDIMScheduler"]
    assert edit(tmp_path / "plain.png", *how, *given).returncode == 0
    done = edit(tmp_path / "one.png", *how, *given, "--lora", f"{file}:0.25")
    assert done.returncode == 0, done.stderr
    assert "text encoders are left aside" in done.stderr
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    records = {name: PictureRecord(name=path.name, sha256=file_sha256(path)) for name, path in pictures.items()}
    settings = EditSettings(
        model=ModelRecord(name="a run", source=str(run_folder), sha256=weights_hash(str(run_folder))),
        loras=[LoraRecord(name=file.name, source=str(file), weight=0.25, sha256=file_sha256(file))],
        seeds=[0],
        guidance=1,
        steps=2,
        scheduler="DDIMScheduler",
        size=32,
        device="cpu",
        threads=1,
        photo=records["image"],
        mask=records["mask"],
        references=[records["reference"]],
    )
    path = tmp_path / "settings.json"
    path.write_text(settings.model_dump_json())
    assert edit(tmp_path / "again.png", "--settings", path).returncode == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    done = edit(tmp_path / "other.png", "--settings", path, "--lora", f"{file}:0.5")
    assert done.returncode == 0
    assert "--lora: others than those of the settings: the picture will be another one" in done.stderr
    path.write_text(settings.model_copy(update={"loras": []}).model_dump_json())
    assert "loras" not in path.read_text(), "as before there were any"
    assert edit(tmp_path / "none.png", "--settings", path).returncode == 0
    assert (tmp_path / "none.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    lost = settings.model_copy(update={"loras": [settings.loras[0].model_copy(update={"source": None})]})
    path.write_text(lost.model_dump_json())
    assert (
        "do not say where the LoRA 'any name.safetensors' lies; give it with --lora"
        in edit(tmp_path / "x.png", "--settings", path).stderr
    )
    path.write_text(settings.model_dump_json())
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    done = edit(tmp_path / "x.png", "--settings", path)
    assert done.returncode == 2
    assert "is not the LoRA of" in done.stderr


def test_a_lora_is_added_before_the_model_is_cast(run_folder: Path, matrices: dict, tmp_path: Path):
    """In 16 bits W + delta would be rounded twice."""
    place = write_peft(tmp_path, matrices)
    exact: Run = PaintByExample.from_pretrained(run_folder, device="cpu", loras=place).run
    halved = PaintByExample.from_pretrained(run_folder, device="cpu", loras=[place], precision="bf16").run
    for name, weight in halved.model.kept().items():
        assert torch.equal(weight, exact.model.kept()[name].bfloat16())


def test_a_lora_is_merged_into_a_released_model(tmp_path: Path):
    """Which is no run of this trainer; its licence goes with it, and diffusers' pipeline reads it."""
    hub = write_hub(tmp_path / "hub", make_published(9))
    weights = load_file(hub / "unet" / "diffusion_pytorch_model.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = weights[f"{name}.weight"].shape[0]
    tensors = {f"unet.{name}.lora_A.weight": torch.ones(1, width), f"unet.{name}.lora_B.weight": torch.ones(width, 1)}
    save_file(tensors, tmp_path / "cup.safetensors")
    options = ["--model", hub, "--merge", "--lora", f"{tmp_path / 'cup.safetensors'}:0.5", "--format", "diffusers"]
    done = call_program(pbe_train.export.main, *map(str, options), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    for key, weight in weights.items():
        torch.testing.assert_close(merged[key], weight + 0.5 if key == f"{name}.weight" else weight)
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["licence"] == "creativeml-openrail-m"
    assert [each["name"] for each in told["loras"]] == ["cup.safetensors"]
    assert "| LoRA in its weights | cup.safetensors, weight 0.5, `" in (tmp_path / "out" / "README.md").read_text()
