"""Weights in: every layout gives the same model, nothing is loaded in part, and what does not belong is refused in one line."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe_train.config import TrainSettings
from pbe_train.networks.loading import load_encoder
from pbe_train.networks.model import PaintByExampleModel
from pbe_train.train import train
from pbe_train.training.checkpoint import read_state
from pbe_train.training.ranks import Ranks
from pbe_train.weights.account import Account
from pbe_train.weights.start import start_model
from schemas.errors import InputError
from schemas.weights import load_vae
from tests.pbe_train.published import (
    Published,
    config_of,
    make_published,
    original_state,
    write_hub,
    write_network,
    write_stable_diffusion,
    write_tensors,
)
from tests.pbe_train.small_world import World

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def paint() -> Published:
    return make_published(9)


@pytest.fixture(scope="module")
def prior(paint: Published) -> Published:
    """A text-to-image model of the same VAE."""
    return replace(make_published(4, seed=1), vae=paint.vae)


@pytest.fixture(scope="module")
def base(paint: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hub`, Paint by Example as released, and `encoder`, its vision model alone."""
    folder = tmp_path_factory.mktemp("base")
    write_hub(folder / "hub", paint)
    paint.encoder.model.save_pretrained(folder / "encoder")
    return folder


def settings_of(base: Path, start: Path | str, **changes: object) -> TrainSettings:
    model = {
        "pretrained": str(start),
        "encoder": str(base / "encoder"),
        "vae": str(base / "hub" / "vae"),
        "conditioner_blocks": 1,
    }
    groups = {"model": model | dict(changes.pop("model", {}))}
    return TrainSettings.model_validate({"dataset": "none", **groups, **changes})


def start(base: Path, where: Path | str, **changes: object) -> tuple[PaintByExampleModel, Account]:
    settings = settings_of(base, where, **changes)
    model, account = start_model(settings, load_vae(settings.model.vae))
    assert account
    return model, account


def assert_is(model: PaintByExampleModel, parts: Published) -> None:
    """Every weight of U-Net, conditioner and encoder, bit for bit."""
    unet, encoder = parts.unet.state_dict(), parts.encoder.state_dict()
    assert all(torch.equal(tensor, unet[name]) for name, tensor in model.unet.state_dict().items())
    found = model.conditioner.state_dict()
    assert found.keys() == encoder.keys()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in found.items())


def write_original(path: Path, parts: Published, *, text: bool = False) -> Path:
    state = original_state(parts, text=text)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 7, "callbacks": {}}, path)
    return path


LAYOUTS: dict[str, Callable[[Path, Published], Path]] = {
    "transformers 4": lambda folder, parts: write_hub(folder / "m", parts, transformers=4, position_ids=True),
    "transformers 5": lambda folder, parts: write_hub(folder / "m", parts, transformers=5),
    "pickles": lambda folder, parts: write_hub(folder / "m", parts, pickles=True),
    "older VAE": lambda folder, parts: write_hub(folder / "m", parts, vae="old"),
    "ckpt": lambda folder, parts: write_original(folder / "model.ckpt", parts),
    "original safetensors": lambda folder, parts: write_original(folder / "model.safetensors", parts),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_paint_by_example_starts_from_every_layout(layout: str, paint: Published, base: Path, tmp_path: Path):
    """The same bits, whichever file they came in; and model.encoder may be that very model."""
    where = LAYOUTS[layout](tmp_path, paint)
    model, account = start(base, where)
    assert_is(model, paint)
    assert account.kind.startswith("Paint by Example")
    assert account.new == []
    assert account.licence == "creativeml-openrail-m"
    again, _ = start(base, where, model={"encoder": str(where)})
    assert_is(again, paint)


def test_a_conditioner_of_five_blocks(tmp_path: Path):
    """As released: 24 layers of CLIP, 5 blocks."""
    parts = make_published(9, layers=24)
    write_hub(tmp_path / "hub", parts)
    parts.encoder.model.save_pretrained(tmp_path / "encoder")
    model, _ = start(tmp_path, write_original(tmp_path / "model.ckpt", parts), model={"conditioner_blocks": 5})
    assert_is(model, parts)


@pytest.mark.parametrize("layout", ["diffusers", "unet", "ckpt", "safetensors"])
def test_stable_diffusion_is_widened(layout: str, prior: Published, base: Path, tmp_path: Path):
    """The first 4 input channels are the prior's, the 5 new ones 0; the conditioner is new, and so it is said."""
    if layout == "diffusers":
        where = write_stable_diffusion(tmp_path / "sd", prior)
    elif layout == "unet":
        where = tmp_path / "unet"
        write_network(where, prior.unet, config_of(prior.unet), file=FILE)
    else:
        where = write_original(tmp_path / f"sd-v1-4.{layout}", prior, text=True)
    model, account = start(base, where)
    expected = prior.unet.state_dict()
    for name, tensor in model.unet.state_dict().items():
        if name == "conv_in.weight":
            assert torch.equal(tensor[:, :4], expected[name])
            assert not tensor[:, 4:].any()
        else:
            assert torch.equal(tensor, expected[name]), name
    assert account.loaded == {"U-Net": len(expected)}
    assert account.new == ["5 more input channels of unet.conv_in, all 0", "the conditioner, at random"]


def test_every_tensor_of_a_file_is_in_the_account(paint: Published, prior: Published, base: Path, tmp_path: Path):
    """Loaded and left aside add up to what the file holds: a tensor that is dropped unsaid breaks the sum."""
    for parts, text in ((paint, False), (prior, True)):
        path = write_original(tmp_path / "model.safetensors", parts, text=text)
        _, account = start(base, path)
        # Queries, keys and values are three tensors here and one there: two more for weight and bias of each block.
        stacked = 0 if text else 4
        assert sum(account.loaded.values()) + sum(account.aside.values()) == len(load_file(path)) + stacked
    assert account.aside["text encoder"] == 1
    assert account.aside["moving average (EMA)"] == 2
    assert account.aside["schedule"] == 4
    lines = account.lines()
    assert "left aside" in lines
    assert "moving average (EMA) (2)" in lines
    assert "the conditioner, at random" in lines


def test_half_precision_is_taken_as_it_is(paint: Published, base: Path, tmp_path: Path):
    """Rounded weights are loaded, and VAE and encoder are compared as rounded."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in original_state(paint).items()}
    write_tensors(tmp_path / "model.safetensors", state)
    model, _ = start(base, tmp_path / "model.safetensors")
    assert model.unet.conv_out.weight.dtype == torch.float32
    assert torch.equal(model.unet.conv_out.weight, paint.unet.conv_out.weight.half().float())


def test_weights_that_are_there_in_half_precision_alone(paint: Published, base: Path, tmp_path: Path):
    """As a download with `variant="fp16"` leaves them: U-Net, conditioner, vision encoder and VAE."""
    where = write_hub(tmp_path / "hub", paint)
    for path in where.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    model, _ = start(base, where, model={"encoder": str(where), "vae": str(where)})
    assert torch.equal(model.unet.conv_out.weight, paint.unet.conv_out.weight.half().float())
    vision = model.conditioner.model.state_dict()
    for name, tensor in paint.encoder.model.state_dict().items():
        assert torch.equal(vision[name], tensor.half().float() if tensor.is_floating_point() else tensor), name


def test_a_lightning_checkpoint_that_names_its_callback(prior: Published, base: Path, tmp_path: Path):
    """As sd-v1-4.ckpt does: the class is a key, needs no package, and nothing of it runs."""
    import sys
    import types

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback
    sys.modules |= dict.fromkeys(("pytorch_lightning", "pytorch_lightning.callbacks", name), module)
    content = {"state_dict": original_state(prior, text=True), "callbacks": {callback: {"best_model_score": None}}}
    torch.save(content, tmp_path / "sd.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        del sys.modules[part]
    model, _ = start(base, tmp_path / "sd.ckpt")
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("old_format", [True, False])
def test_a_lightning_checkpoint_with_numbers_of_numpy(
    module: bytes, old_format: bool, prior: Published, base: Path, tmp_path: Path
):
    """As sd-v1-4.ckpt has its learning rate, under the name that numpy had in its time and the one it has now."""
    learning = {"_last_lr": [np.float64(1e-4)], "last_epoch": np.float64(3)}
    content = {"state_dict": original_state(prior, text=True), "lr_schedulers": [learning]}
    kept, path = tmp_path / "kept.ckpt", tmp_path / "sd.ckpt"
    torch.save(content, kept, _use_new_zipfile_serialization=not old_format)
    name = np.float64(1).__reduce__()[0].__module__.encode()
    if old_format:
        path.write_bytes(kept.read_bytes().replace(b"c" + name + b"\n", b"c" + module + b"\n"))
    else:
        with zipfile.ZipFile(kept) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                found = b"c" + name + b"\n"
                assert (found in data) == entry.filename.endswith("data.pkl")
                new.writestr(entry, data.replace(found, b"c" + module + b"\n"))
    model, _ = start(base, path)
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)


class Bomb:
    """What a pickle can do: it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("old_format", [True, False])
def test_a_pickle_that_could_run_code_does_not(old_format: bool, base: Path, tmp_path: Path):
    path, sign = tmp_path / "model.ckpt", tmp_path / "it ran"
    torch.save(
        {"state_dict": {"a": torch.zeros(1), "b": Bomb(sign)}, "lr": np.float64(1)},
        path,
        _use_new_zipfile_serialization=not old_format,
    )
    with pytest.raises(InputError, match=r"model\.ckpt: a pickle .* could run code .*save its state_dict as \.safetensors"):
        start(base, path)
    assert not sign.exists()


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("model.ckpt", b"not a pickle", "could run code|not a file of PyTorch"),
        ("empty.ckpt", b"", "not a file of PyTorch, or cut short"),
        ("model.safetensors", b"{}", "not a safetensors file"),
        ("model.zip", b"PK", r"weights are read from \.safetensors"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes, cause: str, base: Path, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=cause) as raised:
        start(base, tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "cause"), [([1, 2], "holds no named tensors"), ({"state_dict": {"a": 1}}, "`a` is no tensor")]
)
def test_pickles_of_something_else_are_refused(content: object, cause: str, base: Path, tmp_path: Path):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=cause):
        start(base, tmp_path / "model.ckpt")


def broken_hub(change: Callable[[dict[str, Tensor]], object], part: str = "unet") -> Callable[[Path, Published], Path]:
    """The released layout with the tensors of one part changed."""

    def write(folder: Path, parts: Published) -> Path:
        where = write_hub(folder / "m", parts)
        path = where / part / ("model.safetensors" if part == "image_encoder" else FILE)
        state = load_file(path)
        change(state)
        save_file(state, path)
        return where

    return write


def rename(state: dict[str, Tensor], old: str, new: str) -> None:
    state[new] = state.pop(old)


FAULTS = {
    "missing": (
        broken_hub(lambda state: state.pop("conv_out.bias")),
        r"1 missing \(conv_out\.bias\)",
    ),
    "unexpected": (
        broken_hub(lambda state: rename(state, "conv_out.bias", "conv_out.beta")),
        r"1 missing \(conv_out\.bias\); 1 unexpected \(conv_out\.beta\)",
    ),
    "shape": (
        broken_hub(lambda state: state.update({"conv_out.bias": torch.zeros(5)})),
        r"1 of another shape \(conv_out\.bias \[5\], not \[4\]\)",
    ),
    "conditioner": (
        broken_hub(lambda state: state.pop("uncond_vector"), "image_encoder"),
        r"its conditioner are not those of this model: 1 missing \(uncond_vector\)",
    ),
    "parts of two models": (
        broken_hub(lambda state: state.update({"proj_out.weight": torch.zeros(48, 64)}), "image_encoder"),
        r"tokens of 48 features, its U-Net takes 64",
    ),
    "another VAE": (
        broken_hub(lambda state: state.update({"quant_conv.bias": torch.zeros(8)}), "vae"),
        r"its VAE is not the dataset's \(weights \w{12}, not \w{12}; first difference in quant_conv\.bias\)",
    ),
    "half a VAE": (
        broken_hub(lambda state: state.pop("quant_conv.bias"), "vae"),
        r"its VAE is not the dataset's \(quant_conv\.bias is in one of them only\)",
    ),
    "another encoder": (
        broken_hub(lambda state: state.update({"model.vision_model.post_layernorm.bias": torch.ones(64)}), "image_encoder"),
        r"its vision encoder is not model\.encoder, .*post_layernorm\.bias\); set model\.encoder to",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_whole_is_refused(fault: str, paint: Published, base: Path, tmp_path: Path):
    write, cause = FAULTS[fault]
    with pytest.raises(InputError, match=cause) as raised:
        start(base, write(tmp_path, paint))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda state: state.pop("model.diffusion_model.out.2.bias"), r"1 missing \(conv_out\.bias\)"),
        (lambda state: state.pop("model.diffusion_model.out.2.weight"), r"out\.2\.weight' is missing"),
        (lambda state: state.update({"control_model.x": torch.zeros(1)}), r"1 tensor\(s\) that no .* first control_model\.x"),
        (lambda state: state.update({"model.diffusion_model.label_emb.0.0.bias": torch.zeros(1)}), r"first model\..*label_emb"),
        (lambda state: state.update({"first_stage_model.odd": torch.zeros(1)}), r"first first_stage_model\.odd"),
        (lambda state: state.pop("cond_stage_model.mapper.resblocks.0.attn.c_qkv.bias"), r"3 missing \(mapper\.blocks\.0\.attn1"),
        (lambda state: [state.pop(name) for name in list(state) if ".diffusion_model." in name], "no tensor here begins with"),
    ],
)
def test_an_original_file_that_is_not_whole_is_refused(
    change: Callable[[dict[str, Tensor]], object], cause: str, paint: Published, base: Path, tmp_path: Path
):
    state = original_state(paint)
    change(state)
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(InputError, match=cause) as raised:
        start(base, tmp_path / "model.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_an_inpainting_model_is_told_from_paint_by_example(layout: str, paint: Published, base: Path, tmp_path: Path):
    """Both have 9 input channels, in another order and of opposite polarity."""
    if layout == "diffusers":
        where = write_stable_diffusion(tmp_path / "inpainting", paint)
    else:
        where = write_original(tmp_path / "inpainting.ckpt", paint, text=True)
    with pytest.raises(InputError, match=r"an inpainting model: its 9 input channels are latent, mask, masked view"):
        start(base, where)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            {"use_linear_projection": True},
            r"1\.x's kind \(use_linear_projection is True, there it is False\)",
        ),
        ({"addition_embed_type": "text_time"}, r"addition_embed_type is 'text_time'"),
        ({"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim \[5, 10, 20, 20\], one number"),
        ({"in_channels": 8}, r"8 input channels, where 4 are expected of a text-to-image model"),
        ({"out_channels": 8}, r"paints latents of 8 channels, the dataset's have 4"),
        ({"cross_attention_dim": 48}, r"\d+ of another shape \(.*attn2\.to_k\.weight \[\d+, 64\], not \[\d+, 48\]"),
    ],
)
def test_other_u_nets_are_refused(change: dict[str, object], cause: str, prior: Published, base: Path, tmp_path: Path):
    with pytest.raises(InputError, match=cause):
        start(base, write_stable_diffusion(tmp_path / "sd", prior, **change))


def test_a_configuration_that_leaves_out_what_is_usual(prior: Published, paint: Published, base: Path, tmp_path: Path):
    """The libraries have a default for it, and so it is left out by some; `architectures` may be null."""
    sd = write_stable_diffusion(tmp_path / "sd", prior)
    config = json.loads((sd / "unet" / "config.json").read_text())
    del config["in_channels"], config["out_channels"]
    (sd / "unet" / "config.json").write_text(json.dumps(config))
    model, account = start(base, sd)
    assert torch.equal(model.unet.conv_in.weight[:, :4], prior.unet.conv_in.weight)
    assert account.new[0].startswith("5 more input channels")
    hub = write_hub(tmp_path / "hub", paint)
    inside = json.loads((hub / "image_encoder" / "config.json").read_text())
    (hub / "image_encoder" / "config.json").write_text(json.dumps({**inside, "architectures": None}))
    with pytest.raises(InputError, match="an inpainting model"):
        start(base, hub)


def test_what_the_u_net_predicts_must_be_what_the_settings_say(prior: Published, base: Path, tmp_path: Path):
    velocity = write_stable_diffusion(tmp_path / "velocity", prior, prediction="v_prediction")
    with pytest.raises(InputError, match=r"predicts v_prediction, the setting `prediction` says epsilon; set it to v_prediction"):
        start(base, velocity)
    start(base, velocity, prediction="v_prediction")
    with pytest.raises(InputError, match="predicts epsilon"):
        start(base, write_original(tmp_path / "sd.ckpt", prior, text=True), prediction="v_prediction")


def test_the_depth_of_the_conditioner_is_the_checkpoints(paint: Published, base: Path, tmp_path: Path):
    for where in (base / "hub", write_original(tmp_path / "model.ckpt", paint)):
        with pytest.raises(InputError, match=r"has 1 block\(s\), model\.conditioner_blocks says 5; set .* to 1"):
            start(base, where, model={"conditioner_blocks": 5})


def test_places_that_hold_nothing(base: Path, tmp_path: Path):
    with pytest.raises(InputError, match="neither a model in diffusers' layout"):
        start(base, tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        start(base, tmp_path / "nowhere" / "at all")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(InputError, match=r"unet: no weights here, not one of diffusion_pytorch_model\.safetensors"):
        start(base, tmp_path)


def test_a_hub_id_fetches_pickles_only_where_there_is_nothing_else(paint: Published, base: Path, tmp_path, monkeypatch):
    asked: list[list[str]] = []
    here = write_hub(tmp_path / "hub", paint, pickles=True)

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/model"
        asked.append(allow_patterns)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model, _ = start(base, "someone/model")
    assert_is(model, paint)
    assert not any(pattern.endswith((".bin", ".fp16.safetensors")) for pattern in asked[0])
    assert [pattern for pattern in asked[1] if pattern.endswith(".fp16.safetensors")] == [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "image_encoder/model.fp16.safetensors",
    ]
    assert [pattern for pattern in asked[2] if pattern.endswith(".bin")] == [
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "image_encoder/pytorch_model.bin",
    ]


def test_a_hub_that_does_not_answer(base: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"someone/model: .*not to be had from the hub \(no route\)"):
        start(base, "someone/model")


def test_an_encoder_is_never_loaded_in_part(paint: Published, base: Path, tmp_path: Path, prior: Published):
    where = broken_hub(lambda state: state.pop("model.vision_model.post_layernorm.bias"), "image_encoder")(tmp_path, paint)
    with pytest.raises(InputError, match=r"vision encoder are not those of this model: 1 missing \(post_layernorm\.bias\)"):
        load_encoder(str(where))
    with pytest.raises(InputError, match="no vision encoder here"):
        load_encoder(str(write_original(tmp_path / "sd.ckpt", prior, text=True)))
    state = load_file(base / "encoder" / "model.safetensors")
    del state[next(name for name in state if name.endswith("post_layernorm.bias"))]
    (tmp_path / "clip").mkdir()
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "clip" / "config.json").write_bytes((base / "encoder" / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"clip: .*post_layernorm\.bias"):
        load_encoder(str(tmp_path / "clip"))


def test_the_encoder_of_a_hub_repository(paint: Published, base: Path, monkeypatch: pytest.MonkeyPatch):
    """A Paint by Example repository is known by one small file; without that file it is taken for CLIP's own."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(base / "hub" / file))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(base / "hub"))
    found = load_encoder("someone/model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in paint.encoder.model.state_dict().items())
    asked = []

    def no_such_file(name: str, file: str) -> str:
        raise OSError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_such_file)
    plain = paint.encoder.model
    monkeypatch.setattr("pbe_train.networks.loading.load_network", lambda _, source, inside: asked.append(source) or plain)
    load_encoder("openai/clip")
    assert asked == ["openai/clip"]


def test_a_training_starts_says_from_what_and_goes_on(world: World, prior: Published, tmp_path: Path, capsys):
    """The real loop: the account is printed and kept at the start of a new run; a resumed run reads the start no more."""
    vae = load_vae(str(world.vae))
    parts = replace(prior, vae=vae)
    sd = write_stable_diffusion(tmp_path / "sd", parts)
    options = (f"--model.pretrained={sd}", "--checkpoint_every=1")
    ranks = Ranks(0, 1, torch.device("cpu"))
    train(world.settings(tmp_path / "run", *options, "--steps=1"), ranks)
    said = capsys.readouterr().out
    assert f"start: {sd} (Stable Diffusion, diffusers layout)" in said
    assert "5 more input channels of unet.conv_in, all 0" in said
    assert json.loads((tmp_path / "run" / "start.json").read_text())["licence"] == "creativeml-openrail-m"
    (sd / "unet" / FILE).unlink()
    train(world.settings(tmp_path / "run", *options, "--steps=2"), ranks)
    assert "start:" not in capsys.readouterr().out
    # Whatever is named later: the model is made of what it began with, which its licence is that of.
    for later, said in (("elsewhere", f"model.pretrained elsewhere is not read: this run began from {sd}"), ("null", "")):
        step = 3 + (later == "null")
        train(world.settings(tmp_path / "run", f"--model.pretrained={later}", f"--steps={step}"), ranks)
        assert said in capsys.readouterr().out
        state = read_state(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        assert state.settings["model"]["pretrained"] == str(sd)
    again = (f"--model.pretrained={tmp_path / 'run'}", "--steps=1")
    train(world.settings(tmp_path / "next", *again, "--model.reference_geometry=pad"), ranks)
    told = capsys.readouterr().out
    assert "(run of this trainer)" in told
    assert "otherwise   reference_geometry pad, where it was trained with squash" in told


def test_a_start_on_another_vae_ends_before_training(world: World, prior: Published, tmp_path: Path):
    sd = write_stable_diffusion(tmp_path / "sd", prior)
    with pytest.raises(InputError, match="its VAE is not the dataset's"):
        train(world.settings(tmp_path / "run", f"--model.pretrained={sd}"), Ranks(0, 1, torch.device("cpu")))
    assert not (tmp_path / "run").exists()
