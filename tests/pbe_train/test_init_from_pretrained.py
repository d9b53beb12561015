"""Pretrained models in every layout: the same model, nothing loaded in part, and what does not belong refused in one line."""

import argparse
import json
import pickle
import sys
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.vae import load_vae
from pbe_train import PaintByExample
from pbe_train.checkpoints import networks
from pbe_train.checkpoints.init_from_pretrained import FIRST_LAYER, LoadReport, init_from_pretrained, widened
from pbe_train.checkpoints.networks import encoder_config, load_encoder, unet_config
from pbe_train.checkpoints.trainer_checkpoint import read_state
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.pbe_train.published import (
    Published,
    broken_hub,
    config_of,
    make_published,
    original_state,
    write_hub,
    write_in_shards,
    write_network,
    write_stable_diffusion,
    write_tensors,
)
from tests.pbe_train.small_world import World

FILE = "diffusion_pytorch_model.safetensors"
State = dict[str, Tensor]
Write = Callable[[Path, Published], Path]


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


def start(base: Path, where: Path | str, prediction: str = "epsilon", **model: object) -> tuple[PaintByExampleModel, LoadReport]:
    usual = {"encoder": str(base / "encoder"), "vae": str(base / "hub" / "vae"), "conditioner_blocks": 1}
    values = {"dataset": "none", "prediction": prediction, "model": {"pretrained": str(where), **usual, **model}}
    settings = TrainSettings.model_validate(values)
    made, report = init_from_pretrained(settings, load_vae(settings.model.vae))
    assert report
    return made, report


def refused(base: Path, where: Path | str, cause: str, **changes: object) -> None:
    with pytest.raises(InputError, match=cause) as raised:
        start(base, where, **changes)
    assert "\n" not in str(raised.value)


def assert_is(model: PaintByExampleModel, parts: Published) -> None:
    """Every weight of U-Net, conditioner and encoder, bit for bit."""
    unet, encoder = parts.unet.state_dict(), parts.encoder.state_dict()
    assert all(torch.equal(tensor, unet[name]) for name, tensor in model.unet.state_dict().items())
    found = model.conditioner.state_dict()
    assert found.keys() == encoder.keys()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in found.items())


def write_original(path: Path, parts: Published, *, text: bool = False, named: str = "") -> Path:
    state = original_state(parts, text=text)
    if path.suffix == ".safetensors":
        write_tensors(path, state)
    else:
        torch.save({"state_dict": state, "global_step": 7, "callbacks": {}}, path)
    return path.rename(path.with_name(named)) if named else path


def in_shards(folder: Path) -> Path:
    write_in_shards(folder)
    return folder


def as_transformers_5(path: Path, parts: Published) -> Path:
    state = original_state(parts)
    write_tensors(path, {name.replace(".transformer.vision_model.", ".transformer."): tensor for name, tensor in state.items()})
    return path


LAYOUTS: dict[str, Write] = {
    "transformers 4": lambda folder, parts: write_hub(folder / "m", parts, transformers=4, position_ids=True),
    "transformers 5": lambda folder, parts: write_hub(folder / "m", parts, transformers=5),
    "pickles": lambda folder, parts: write_hub(folder / "m", parts, pickles=True),
    "shards": lambda folder, parts: in_shards(write_hub(folder / "m", parts)),
    "shards of pickles": lambda folder, parts: in_shards(write_hub(folder / "m", parts, pickles=True)),
    "older VAE": lambda folder, parts: write_hub(folder / "m", parts, vae="old"),
    "ckpt": lambda folder, parts: write_original(folder / "m.ckpt", parts),
    "original safetensors": lambda folder, parts: write_original(folder / "m.safetensors", parts),
    "original by transformers 5": lambda folder, parts: as_transformers_5(folder / "m.safetensors", parts),
    "safetensors named ckpt": lambda folder, parts: write_original(folder / "m.safetensors", parts, named="m.ckpt"),
    "ckpt named safetensors": lambda folder, parts: write_original(folder / "m.ckpt", parts, named="m.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_paint_by_example_starts_from_every_layout(layout: str, paint: Published, base: Path, tmp_path: Path):
    """The same bits, whichever file they came in; and model.encoder may be that very model."""
    where = LAYOUTS[layout](tmp_path, paint)
    model, report = start(base, where, encoder=str(where))
    assert_is(model, paint)
    assert report.kind.startswith("Paint by Example")
    assert report.new == []
    assert report.licence == "creativeml-openrail-m"


def test_shards_that_do_not_hold_all(paint: Published, base: Path, tmp_path: Path):
    where = in_shards(write_hub(tmp_path / "hub", paint))
    index = where / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["one.more"] = content["weight_map"]["conv_out.bias"]
    index.write_text(json.dumps(content))
    refused(base, where, r"1 tensor in no shard, first one\.more")
    (where / "unet" / content["weight_map"]["one.more"]).unlink()
    refused(base, where, r"shard diffusion_pytorch_model-0000\d-of-00003\.safetensors is not there")


def test_a_conditioner_of_five_blocks(tmp_path: Path):
    """As released: 24 layers of CLIP, 5 blocks."""
    parts = make_published(9, layers=24)
    write_hub(tmp_path / "hub", parts)
    parts.encoder.model.save_pretrained(tmp_path / "encoder")
    model, _ = start(tmp_path, write_original(tmp_path / "model.ckpt", parts), conditioner_blocks=5)
    assert_is(model, parts)


@pytest.mark.parametrize(
    ("layout", "wide"),
    [*((layout, False) for layout in ("diffusers", "unet", "ckpt", "safetensors")), ("diffusers", True), ("ckpt", True)],
)
def test_stable_diffusion_is_widened(layout: str, wide: bool, prior: Published, base: Path, tmp_path: Path):
    """The first 4 input channels are the prior's, the 5 new ones 0; the conditioner is new, and so it is said.

    Also where they are there already, all 0, as in the published training's own start, `sd-v1-4-modified-9channel.ckpt`.
    """
    parts, expected = prior, prior.unet.state_dict() | {FIRST_LAYER: widened(prior.unet.conv_in.weight.data)}
    if wide:
        parts = replace(prior, unet=make_published(9, seed=1).unet)
        parts.unet.load_state_dict(expected)
    if layout == "diffusers":
        where = write_stable_diffusion(tmp_path / "sd", parts)
    elif layout == "unet":
        where = tmp_path / "unet"
        write_network(where, parts.unet, config_of(parts.unet), file=FILE)
    else:
        where = write_original(tmp_path / f"sd-v1-4.{layout}", parts, text=True)
    model, report = start(base, where)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.unet.state_dict().items())
    assert not model.unet.conv_in.weight[:, 4:].any()
    assert report.loaded == {"U-Net": len(expected)}
    assert report.new[0].startswith("nothing in unet.conv_in" if wide else "5 more input channels of unet.conv_in, all 0")
    assert report.new[1] == "the conditioner, at random"


def test_half_precision(paint: Published, base: Path, tmp_path: Path):
    """Rounded weights are loaded, VAE and encoder compared as rounded; also where `variant="fp16"` is all that was downloaded."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in original_state(paint).items()}
    write_tensors(tmp_path / "model.safetensors", state)
    rounded = paint.unet.conv_out.weight.half().float()
    model, _ = start(base, tmp_path / "model.safetensors")
    assert torch.equal(model.unet.conv_out.weight, rounded)
    where = write_hub(tmp_path / "hub", paint)
    for path in where.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    model, _ = start(base, where, encoder=str(where), vae=str(where))
    assert torch.equal(model.unet.conv_out.weight, rounded)
    vision = model.conditioner.model.state_dict()
    for name, tensor in paint.encoder.model.state_dict().items():
        assert torch.equal(vision[name], tensor.half().float() if tensor.is_floating_point() else tensor), name


@pytest.mark.parametrize("text", [False, True])
def test_every_tensor_of_a_file_is_in_the_report(text: bool, paint: Published, prior: Published, base: Path, tmp_path: Path):
    """Loaded and left aside add up to what the file holds: a tensor that is dropped unsaid breaks the sum."""
    path = write_original(tmp_path / "model.safetensors", prior if text else paint, text=text)
    _, report = start(base, path)
    # Queries, keys and values are three tensors here and one there: two more for weight and bias of each block.
    stacked = 0 if text else 4
    assert sum(report.loaded.values()) + sum(report.aside.values()) == len(load_file(path)) + stacked
    assert report.aside.get("text encoder") == (1 if text else None)
    assert (report.aside["moving average (EMA)"], report.aside["schedule"]) == (2, 4)
    assert "moving average (EMA) (2)" in report.lines()


EXTRA = {
    "text encoder": ("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias", "cond_stage_model.logit_scale"),
    "embedding_manager.*": ("embedding_manager.string_to_param_dict.*", "embedding_manager.other"),
    "denoiser.*": ("denoiser.sigmas", "denoiser.log_sigmas"),
    "logvar": ("logvar",),
    "moving average (EMA)": ("model_ema.num_updates",),
}


@pytest.mark.parametrize("flat", [True, False])
def test_tensors_of_no_use_are_named_and_left(flat: bool, prior: Published, base: Path, tmp_path: Path):
    """Once each group, with its tensors counted; a plain number among the tensors is none of them."""
    state = original_state(prior)
    state = {name: tensor for name, tensor in state.items() if name.startswith(("model.", "first_stage_model."))}
    extra = {name: torch.zeros(1) for group in EXTRA.values() for name in group}
    numbers = {"global_step": 470_000, "epoch": 3.0, "optimizer_states": [{"state": {0: torch.zeros(2)}}]}
    content = {**state, **extra, **numbers}
    torch.save(content if flat else {"state_dict": content}, tmp_path / "merged.ckpt")
    model, report = start(base, tmp_path / "merged.ckpt")
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)
    assert {what: report.aside[what] for what in EXTRA} == {what: len(group) for what, group in EXTRA.items()}
    assert report.aside["what is no tensor: epoch, global_step, optimizer_states"] == 3
    assert sum(report.loaded.values()) + sum(report.aside.values()) == len(content)


# --- Pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_format", [True, False])
def test_a_lightning_checkpoint_with_numbers_of_numpy(old_format: bool, prior: Published, base: Path, tmp_path: Path):
    """As sd-v1-4.ckpt has its learning rate, under the name that numpy had in its time."""
    content = {"state_dict": original_state(prior, text=True), "lr_schedulers": [{"_last_lr": [np.float64(1e-4)]}]}
    kept, path = tmp_path / "kept.ckpt", tmp_path / "sd.ckpt"
    torch.save(content, kept, _use_new_zipfile_serialization=not old_format)
    found, wanted = b"c" + np.float64(1).__reduce__()[0].__module__.encode() + b"\n", b"cnumpy.core.multiarray\n"
    if old_format:
        path.write_bytes(kept.read_bytes().replace(found, wanted))
    else:
        with zipfile.ZipFile(kept) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                new.writestr(entry, old.read(entry).replace(found, wanted))
    model, _ = start(base, path)
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)


class Bomb:
    """What a pickle can do: it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


NAMED = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, type]]:
    """Classes of packages that are not here, for as long as a file that names them is written."""

    def make(*names: str) -> dict[str, type]:
        made = {}
        for name in names:
            module, _, own = name.rpartition(".")
            for number in range(1, module.count(".") + 2):
                parent = ".".join(module.split(".")[:number])
                monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
            made[own] = type(own, (), {"__module__": module})
            setattr(sys.modules[module], own, made[own])
        return made

    return make


@pytest.mark.parametrize("old_format", [True, False])
def test_hyper_parameters_of_omegaconf(old_format: bool, foreign, prior: Published, base: Path, tmp_path: Path, monkeypatch):
    """As Lightning saves them, beside the class of its callback: read without these packages, and nothing of them runs."""
    classes = foreign(*NAMED)
    config, metadata, node = (classes[name]() for name in ("DictConfig", "ContainerMetadata", "AnyNode"))
    metadata.__dict__.update(ref_type=Any, object_type=dict, key_type=int, flags={})
    config.__dict__.update(_metadata=metadata, _content={"lr": node, "paths": [Path("/data")], "more": argparse.Namespace(a=1)})
    counts: defaultdict[str, list[int]] = defaultdict(list)
    counts["epochs"].append(1)
    content = {
        "hyper_parameters": config,
        "hparams_type": type(config),
        "loops": counts,
        "last": [np.arange(3), np.float64(1)],
        "callbacks": {classes["ModelCheckpoint"]: {"best_model_score": None}},
    }
    whole = {"state_dict": original_state(prior, text=True), **content}
    torch.save(whole, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=not old_format)
    monkeypatch.undo()
    assert "omegaconf" not in sys.modules
    model, report = start(base, tmp_path / "sd.ckpt")
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)
    assert report.aside["what is no tensor: callbacks, hparams_type, hyper_parameters, last, loops"] == 5


@pytest.mark.parametrize("old_format", [True, False])
def test_a_pickle_that_could_run_code_does_not(old_format: bool, foreign, base: Path, tmp_path: Path):
    """The error names what stands in the way, and not PyTorch's sentence on how to allow it."""
    path, sign = tmp_path / "model.ckpt", tmp_path / "it ran"
    content = {"state_dict": {"a": torch.zeros(1), "b": Bomb(sign)}, "lr": np.float64(1)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    refused(base, path, r"model\.ckpt: a pickle .* could run code .*it names builtins\.getattr; .*\.safetensors")
    assert not sign.exists()
    names = ("ldm.data.Part", "ldm.util.Log", "taming.modules.Model", "wandb.Settings", "zeus.Monitor")
    made = [kind() for kind in foreign(*names, *NAMED).values()]
    torch.save({"state_dict": {"a": torch.zeros(1)}, "rest": made}, path, _use_new_zipfile_serialization=not old_format)
    refused(base, path, r"it names ldm\.data\.Part, ldm\.util\.Log, taming\.modules\.Model, wandb\.Settings and 1 more; where")


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("where", [0.02, 0.98])
def test_a_pickle_that_is_damaged_or_cut_short(old_format: bool, where: float, prior: Published, base: Path, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": original_state(prior, text=True)}, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * where)])
    refused(base, path, r"model\.ckpt: a .* cut short")


def test_pickles_of_something_else(base: Path, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    for content in ([1, 2], {"state_dict": {"a": 1}}, {"a": 1}):
        torch.save(content, path)
        refused(base, path, "holds no named tensors")
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"state_dict": {"a": 1.5}}, protocol=protocol))
        refused(base, path, r"model\.ckpt: a pickle that torch\.save has not written")


# --- Refused --------------------------------------------------------------------------------------------------------------


def broken_file(change: Callable[[State], object], text: bool = False) -> Write:
    """An original file with other tensors."""

    def write(folder: Path, parts: Published) -> Path:
        state = original_state(parts, text=text)
        change(state)
        write_tensors(folder / "model.safetensors", state)
        return folder / "model.safetensors"

    return write


def drop(*names: str) -> Callable[[State], object]:
    return lambda state: [state.pop(name) for name in list(state) if name.startswith(names)]


def put(name: str, *shape: int) -> Callable[[State], object]:
    return lambda state: state.update({name: torch.ones(shape)})


UNET, MAPPER = "model.diffusion_model.", "cond_stage_model.mapper.resblocks.0."
BROKEN: dict[str, tuple[Write, str]] = {
    "missing": (broken_hub(drop("conv_out.bias")), r"1 missing \(conv_out\.bias\)"),
    "unexpected": (broken_hub(put("conv_out.beta", 4)), r"1 unexpected \(conv_out\.beta\)"),
    "shape": (broken_hub(put("conv_out.bias", 5)), r"1 of another shape \(conv_out\.bias \[5\], not \[4\]\)"),
    "conditioner": (broken_hub(drop("uncond_vector"), "image_encoder"), r"conditioner .*1 missing \(uncond_vector\)"),
    "parts of two models": (broken_hub(put("proj_out.weight", 48, 64), "image_encoder"), "tokens of 48 features"),
    "another VAE": (broken_hub(put("quant_conv.bias", 8), "vae"), r"VAE is not the dataset's \(.*quant_conv\.bias\)"),
    "half a VAE": (broken_hub(drop("quant_conv.bias"), "vae"), r"VAE is not the dataset's \(quant_conv\.bias is in one"),
    "another encoder": (
        broken_hub(put("model.vision_model.post_layernorm.bias", 64), "image_encoder"),
        r"encoder is not model\.encoder, .*post_layernorm\.bias\); set model\.encoder to",
    ),
    "file: a bias": (broken_file(drop(f"{UNET}out.2.bias")), r"1 missing \(conv_out\.bias\)"),
    "file: a weight": (broken_file(drop(f"{UNET}out.2.weight")), r"out\.2\.weight' is missing"),
    "file: odd in the mapper": (broken_file(put(f"{MAPPER}odd", 1)), r"1 tensor within .* first cond_stage_model.*\.odd"),
    "file: odd in the U-Net": (broken_file(put(f"{UNET}label_emb.0.0.bias", 1)), r"first model\..*label_emb"),
    "file: odd in the VAE": (broken_file(put("first_stage_model.odd", 1)), r"first first_stage_model\.odd"),
    "file: half a mapper": (broken_file(drop(f"{MAPPER}attn.c_qkv.bias")), r"3 missing \(mapper\.blocks\.0\.attn1"),
    "file: no U-Net": (broken_file(drop(UNET)), r"no tensor here begins with model\.diffusion_model\."),
    "file: with ControlNet": (broken_file(put("control_model.x", 1)), "a ControlNet .* beside the model"),
    "file: with LoRA": (broken_file(put("lora_unet_mid.alpha", 1), text=True), "a LoRA .* beside the model"),
    "file: with adapter": (broken_file(put("ip_adapter.1.weight", 1)), "an adapter .* beside the model"),
    # Both have 9 input channels, in another order and of opposite polarity.
    "inpainting, diffusers": (lambda folder, parts: write_stable_diffusion(folder / "sd", parts), "an inpainting model"),
    "inpainting, original": (broken_file(lambda _: None, text=True), "an inpainting model"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_model_that_is_not_whole_or_of_another_kind(fault: str, paint: Published, base: Path, tmp_path: Path):
    write, cause = BROKEN[fault]
    refused(base, write(tmp_path, paint), cause)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"use_linear_projection": True}, r"1\.x's kind \(use_linear_projection is True"),
        ({"addition_embed_type": "text_time"}, r"addition_embed_type is 'text_time'"),
        ({"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim \[5, 10, 20, 20\], one number"),
        ({"in_channels": 8}, r"8 input channels, where 4"),
        ({"out_channels": 8}, r"latents of 8 channels, the dataset's have 4"),
        ({"cross_attention_dim": 48}, r"\d+ of another shape \(.*attn2\.to_k\.weight \[\d+, 64\], not \[\d+, 48\]"),
    ],
)
def test_other_u_nets(change: dict[str, object], cause: str, prior: Published, base: Path, tmp_path: Path):
    refused(base, write_stable_diffusion(tmp_path / "sd", prior, **change), cause)


def test_a_configuration_that_leaves_out_what_is_usual(prior: Published, paint: Published, base: Path, tmp_path: Path):
    """The libraries have a default for it, and so it is left out by some; `architectures` may be null."""
    sd = write_stable_diffusion(tmp_path / "sd", prior)
    config = json.loads((sd / "unet" / "config.json").read_text())
    del config["in_channels"], config["out_channels"]
    (sd / "unet" / "config.json").write_text(json.dumps(config))
    model, _ = start(base, sd)
    assert torch.equal(model.unet.conv_in.weight[:, :4], prior.unet.conv_in.weight)
    hub = write_hub(tmp_path / "hub", paint)
    inside = json.loads((hub / "image_encoder" / "config.json").read_text())
    (hub / "image_encoder" / "config.json").write_text(json.dumps({**inside, "architectures": None}))
    refused(base, hub, "an inpainting model")


def test_settings_that_contradict_the_model(prior: Published, paint: Published, base: Path, tmp_path: Path):
    velocity = write_stable_diffusion(tmp_path / "velocity", prior, prediction="v_prediction")
    refused(base, velocity, r"predicts v_prediction, .*set it to v_prediction")
    start(base, velocity, prediction="v_prediction")
    refused(base, write_original(tmp_path / "sd.ckpt", prior, text=True), "predicts epsilon", prediction="v_prediction")
    for where in (base / "hub", write_original(tmp_path / "model.ckpt", paint)):
        refused(base, where, r"has 1 block, .* set model\.conditioner_blocks to 1", conditioner_blocks=5)


def test_places_that_hold_nothing(base: Path, tmp_path: Path):
    refused(base, tmp_path, "neither a model in diffusers' layout")
    refused(base, tmp_path / "nowhere" / "at all", "no such file or folder")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    refused(base, tmp_path, r"unet: no weights here: none of diffusion_pytorch_model\.safetensors")


def test_other_files_are_refused_by_every_reader(base: Path, tmp_path: Path):
    (tmp_path / "model.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for read in (lambda path: start(base, path), PaintByExample.from_pretrained, load_encoder, unet_config):
        with pytest.raises(InputError, match=r"model\.ckpt: a pointer of Git LFS"):
            read(str(tmp_path / "model.ckpt"))


def test_an_encoder_is_never_loaded_in_part(paint: Published, base: Path, tmp_path: Path, prior: Published):
    where = broken_hub(drop("model.vision_model.post_layernorm.bias"), "image_encoder")(tmp_path, paint)
    with pytest.raises(InputError, match=r"vision encoder .*1 missing \(post_layernorm\.bias\)"):
        load_encoder(str(where))
    for read in (load_encoder, encoder_config):
        with pytest.raises(InputError, match="no vision encoder here"):
            read(str(write_original(tmp_path / "sd.ckpt", prior, text=True)))
    state = load_file(base / "encoder" / "model.safetensors")
    del state[next(name for name in state if name.endswith("post_layernorm.bias"))]
    (tmp_path / "clip").mkdir()
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "clip" / "config.json").write_bytes((base / "encoder" / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"clip: .*post_layernorm\.bias"):
        load_encoder(str(tmp_path / "clip"))


# --- In a training; and sizes alone ---------------------------------------------------------------------------------------


def test_a_training_starts_says_from_what_and_goes_on(world: World, prior: Published, tmp_path: Path, capsys):
    """The real loop: the report is printed and kept at the start of a new run; a resumed run reads the model no more."""
    ranks = Distributed(0, 1, torch.device("cpu"))
    other = write_stable_diffusion(tmp_path / "other", prior)
    with pytest.raises(InputError, match="its VAE is not the dataset's"):
        train(world.settings(tmp_path / "run", f"--model.pretrained={other}"), ranks)
    assert not (tmp_path / "run").exists()
    sd = write_stable_diffusion(tmp_path / "sd", replace(prior, vae=load_vae(str(world.vae))))
    options = (f"--model.pretrained={sd}", "--checkpoint_every=1")
    train(world.settings(tmp_path / "run", *options, "--steps=1"), ranks)
    said = capsys.readouterr().out
    assert f"start: {sd} (Stable Diffusion, diffusers layout)" in said
    assert "5 more input channels of unet.conv_in, all 0" in said
    assert json.loads((tmp_path / "run" / "start.json").read_text())["licence"] == "creativeml-openrail-m"
    (sd / "unet" / FILE).unlink()
    train(world.settings(tmp_path / "run", *options, "--steps=2"), ranks)
    assert "start:" not in capsys.readouterr().out
    # Whatever is named later: the model is made of what it began with, which its licence is that of.
    for step, later in ((3, "elsewhere"), (4, "null")):
        train(world.settings(tmp_path / "run", f"--model.pretrained={later}", f"--steps={step}"), ranks)
        assert (f"this run began from {sd}" in capsys.readouterr().out) == (later == "elsewhere")
        state = read_state(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        assert state.settings["model"]["pretrained"] == str(sd)
    again = (f"--model.pretrained={tmp_path / 'run'}", "--steps=1")
    train(world.settings(tmp_path / "next", *again, "--model.reference_geometry=pad"), ranks)
    said = capsys.readouterr().out
    assert "(run of this trainer)" in said
    assert "otherwise   reference_geometry pad, where it was trained with squash" in said


def test_the_sizes_of_a_file_are_those_that_the_folder_says(paint: Published, base: Path, tmp_path: Path):
    """Sizes read off the tensors of an original file are those that diffusers' layout writes down."""
    hub, file = str(base / "hub"), str(write_original(tmp_path / "model.ckpt", paint))
    theirs, ours = unet_config(hub), unet_config(file)
    compared = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "attention_head_dim")
    assert {key: ours[key] for key in compared} == {key: theirs[key] for key in compared}
    keys = networks.CLIP_SIZES.keys() - {"projection_dim"}
    assert all(getattr(encoder_config(file), key) == getattr(encoder_config(hub), key) for key in keys)
    model = networks.unloaded_model(ModelSettings(pretrained=file, encoder=file, vae=f"{hub}/vae", conditioner_blocks=1))
    expected = {name: tensor.shape for name, tensor in paint.unet.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.unet.state_dict().items()} == expected
    released, start = networks.PAINT_BY_EXAMPLE, networks.STABLE_DIFFUSION
    assert unet_config(released) == unet_config(start), "known without a download"
    assert encoder_config(released).num_hidden_layers == 24
