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
from pbe_train.checkpoints.from_pretrained import FIRST_LAYER, init_from_pretrained, widened
from pbe_train.checkpoints.load_report import LoadReport
from pbe_train.checkpoints.networks import encoder_config, load_encoder, read_pretrained, unet_config
from pbe_train.checkpoints.pretrained import read_tensor_file
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


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def write_original(path: Path, parts: Published, *, text: bool = False, named: str = "", old: str = "", new: str = "") -> Path:
    state = {name.replace(old, new): tensor for name, tensor in original_state(parts, text=text).items()}
    if path.suffix == ".safetensors":
        write_tensors(path, state)
    else:
        torch.save({"state_dict": state, "global_step": 7, "callbacks": {}}, path)
    return path.rename(path.with_name(named)) if named else path


LAYOUTS: dict[str, Write] = {
    "transformers 4": lambda path, parts: write_hub(path, parts, transformers=4, position_ids=True),
    "transformers 5": lambda path, parts: write_hub(path, parts, transformers=5),
    "shards": lambda path, parts: write_in_shards(write_hub(path, parts)),
    "shards of pickles, older VAE": lambda path, parts: write_in_shards(write_hub(path, parts, pickles=True, vae="old")),
    "original by transformers 5": lambda path, parts: write_original(
        path.with_suffix(".safetensors"), parts, old=".transformer.vision_model.", new=".transformer."
    ),
    "ckpt": lambda path, parts: write_original(path.with_suffix(".ckpt"), parts),
    "safetensors named ckpt": lambda path, parts: write_original(path.with_suffix(".safetensors"), parts, named="m.ckpt"),
    "ckpt named safetensors": lambda path, parts: write_original(path.with_suffix(".ckpt"), parts, named="m.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_model(layout: str, paint: Published, tmp_path: Path):
    """The same bits, whichever file they came in; and model.encoder may be that very model."""
    where = LAYOUTS[layout](tmp_path / "m", paint)
    source, encoder = read_pretrained(str(where)), paint.encoder.state_dict()
    assert source.kind.startswith("Paint by Example")
    assert_same(source.unet, paint.unet.state_dict())
    assert_same(source.vae, paint.vae.state_dict())
    assert_same(source.conditioner, {name: tensor for name, tensor in encoder.items() if not name.startswith("model.")})
    assert_same(load_encoder(str(where)).state_dict(), paint.encoder.model.state_dict())


def test_shards_that_do_not_hold_all(paint: Published, tmp_path: Path):
    where = write_in_shards(write_hub(tmp_path / "hub", paint))
    index = where / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["one.more"] = content["weight_map"]["conv_out.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1 tensor in no shard, first one\.more"):
        read_pretrained(str(where))


def test_paint_by_example_of_the_published_depth(tmp_path: Path):
    """24 layers of CLIP, 5 blocks of the conditioner, 2 of each level: all of it in the model, bit for bit, and in the report."""
    parts = make_published(9, layers=24, blocks=2)
    write_hub(tmp_path / "hub", parts)
    parts.encoder.model.save_pretrained(tmp_path / "encoder")
    model, report = start(tmp_path, write_original(tmp_path / "model.ckpt", parts), conditioner_blocks=5)
    assert_same(model.unet.state_dict(), parts.unet.state_dict())
    assert_same(model.conditioner.state_dict(), parts.encoder.state_dict())
    assert (report.new, report.licence) == ([], "creativeml-openrail-m")


@pytest.mark.parametrize(
    ("layout", "wide"), [("diffusers", False), ("unet", False), ("safetensors", False), ("diffusers", True), ("ckpt", True)]
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
    assert_same(model.unet.state_dict(), expected)
    assert not model.unet.conv_in.weight[:, 4:].any()
    assert report.loaded == {"U-Net": len(expected)}
    assert report.new[0].startswith("nothing in unet.conv_in" if wide else "5 more input channels of unet.conv_in, all 0")
    assert report.new[1] == "the conditioner, at random"


def test_half_precision(paint: Published, base: Path, tmp_path: Path):
    """Rounded weights are loaded, VAE and encoder compared as rounded; also where `variant="fp16"` is all that was downloaded."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in original_state(paint).items()}
    write_tensors(tmp_path / "model.safetensors", state)
    rounded = {name: t.half().float() if t.is_floating_point() else t for name, t in paint.encoder.model.state_dict().items()}
    where = write_hub(tmp_path / "hub", paint)
    for path in where.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    model, _ = start(base, tmp_path / "model.safetensors")
    again, _ = start(base, where, encoder=str(where), vae=str(where))
    for each in (model, again):
        assert torch.equal(each.unet.conv_out.weight, paint.unet.conv_out.weight.half().float())
    assert_same(again.conditioner.model.state_dict(), rounded)


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
def test_tensors_of_no_use_are_named_and_left(flat: bool, prior: Published, tmp_path: Path):
    """Once each group, with its tensors counted; a plain number among the tensors is none of them."""
    state = {k: v for k, v in original_state(prior).items() if k.startswith(("model.", "first_stage_model."))}
    extra = {name: torch.zeros(1) for group in EXTRA.values() for name in group}
    numbers = {"global_step": 470_000, "epoch": 3.0, "optimizer_states": [{"state": {0: torch.zeros(2)}}]}
    content = {**state, **extra, **numbers}
    torch.save(content if flat else {"state_dict": content}, tmp_path / "merged.ckpt")
    source = read_pretrained(str(tmp_path / "merged.ckpt"))
    assert {what: source.aside[what] for what in EXTRA} == {what: len(group) for what, group in EXTRA.items()}
    assert source.aside["what is no tensor: epoch, global_step, optimizer_states"] == 3
    assert len(source.unet) + len(source.vae) + sum(source.aside.values()) == len(content)


# --- Pickles --------------------------------------------------------------------------------------------------------------


def test_a_lightning_checkpoint_with_numbers_of_numpy(tmp_path: Path):
    """As sd-v1-4.ckpt has its learning rate, under the name that numpy had in its time."""
    torch.save({"state_dict": {"a": torch.ones(3)}, "lr_schedulers": [{"_last_lr": [np.float64(1e-4)]}]}, tmp_path / "kept.ckpt")
    found, wanted = b"c" + np.float64(1).__reduce__()[0].__module__.encode() + b"\n", b"cnumpy.core.multiarray\n"
    with zipfile.ZipFile(tmp_path / "kept.ckpt") as old, zipfile.ZipFile(tmp_path / "sd.ckpt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry).replace(found, wanted))
    assert_same(read_tensor_file(tmp_path / "sd.ckpt").tensors, {"a": torch.ones(3)})


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


def foreign(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Any]:
    """Objects of classes of packages that are not here, for as long as a file that names them is written."""
    made = []
    for name in names:
        module, _, own = name.rpartition(".")
        for number in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:number])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
        kind = type(own, (), {"__module__": module})
        setattr(sys.modules[module], own, kind)
        made.append(kind())
    return made


@pytest.mark.parametrize("old_format", [True, False])
def test_hyper_parameters_of_omegaconf(old_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Lightning saves them, beside the class of its callback: read without these packages, and nothing of them runs."""
    config, metadata, node, callback = foreign(monkeypatch, *NAMED)
    metadata.__dict__.update(ref_type=Any, object_type=dict, key_type=int, flags={})
    config.__dict__.update(_metadata=metadata, _content={"lr": node, "paths": [Path("/data")], "more": argparse.Namespace(a=1)})
    counts: defaultdict[str, list[int]] = defaultdict(list)
    counts["epochs"].append(1)
    content = {
        "hyper_parameters": config,
        "hparams_type": type(config),
        "loops": counts,
        "last": [np.arange(3), np.float64(1)],
        "callbacks": {type(callback): {"best_model_score": None}},
    }
    whole = {"state_dict": {"a": torch.ones(3)}, **content}
    torch.save(whole, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=not old_format)
    monkeypatch.undo()
    assert "omegaconf" not in sys.modules
    read = read_tensor_file(tmp_path / "sd.ckpt")
    assert_same(read.tensors, {"a": torch.ones(3)})
    assert read.others == ["callbacks", "hparams_type", "hyper_parameters", "last", "loops"]


@pytest.mark.parametrize("old_format", [True, False])
def test_a_pickle_that_could_run_code_does_not(old_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error names what stands in the way, and not PyTorch's sentence on how to allow it."""
    path, sign = tmp_path / "model.ckpt", tmp_path / "it ran"
    bomb, part = {"b": Bomb(sign), "lr": np.float64(1)}, {"rest": foreign(monkeypatch, *NAMED, "ldm.data.Part")}
    for content, name in ((bomb, r"builtins\.getattr"), (part, r"ldm\.data\.Part")):
        torch.save({"a": torch.zeros(1), **content}, path, _use_new_zipfile_serialization=not old_format)
        with pytest.raises(InputError, match=rf"model\.ckpt: a pickle .* could run code .*it names {name};") as raised:
            read_tensor_file(path)
        assert "\n" not in str(raised.value)
    assert not sign.exists()


@pytest.mark.parametrize(("old_format", "where"), [(False, 0.02), (False, 0.98), (True, 0.98)])
def test_a_pickle_that_is_damaged_or_cut_short(old_format: bool, where: float, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.ones(10_000)}, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * where)])
    with pytest.raises(InputError, match=r"model\.ckpt: a .* cut short"):
        read_tensor_file(path)


def test_pickles_of_something_else(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    for content in ([1, 2], {"state_dict": {"a": 1}}, {"a": 1}):
        torch.save(content, path)
        with pytest.raises(InputError, match="holds no named tensors"):
            read_tensor_file(path)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"state_dict": {"a": 1.5}}, protocol=protocol))
        with pytest.raises(InputError, match=r"model\.ckpt: a damaged file of PyTorch"):
            read_tensor_file(path)


# --- Refused --------------------------------------------------------------------------------------------------------------


def broken_file(change: Callable[[dict[str, Tensor]], object], text: bool = False) -> Write:
    """An original file with other tensors."""

    def write(folder: Path, parts: Published) -> Path:
        state = original_state(parts, text=text)
        change(state)
        write_tensors(folder / "model.safetensors", state)
        return folder / "model.safetensors"

    return write


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: [state.pop(name) for name in list(state) if name.startswith(names)]


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name: torch.ones(shape)})


def write_without_words(folder: Path, parts: Published) -> Path:
    write_stable_diffusion(folder, parts)
    (folder / "text_encoder").rmdir()
    return folder


UNET, MAPPER = "model.diffusion_model.", "cond_stage_model.mapper.resblocks.0."
BROKEN: dict[str, tuple[Write, str]] = {
    "missing": (broken_hub(drop("conv_out.bias")), r"1 missing \(conv_out\.bias\)"),
    "unexpected": (broken_hub(put("conv_out.beta", 4)), r"1 unexpected \(conv_out\.beta\)"),
    "shape": (broken_hub(put("conv_out.bias", 5)), r"1 of another shape \(conv_out\.bias \[5\], not \[4\]\)"),
    "conditioner": (broken_hub(drop("uncond_vector"), "image_encoder"), r"conditioner .*1 missing \(uncond_vector\)"),
    "parts of two models": (broken_hub(put("proj_out.weight", 48, 64), "image_encoder"), r"proj_out\.weight \[48, 64\]"),
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
    # Of either order, in Paint by Example without its conditioner and in inpainting models without their text encoder.
    "nine channels, diffusers": (lambda folder, parts: write_without_words(folder / "sd", parts), "nothing here says which"),
    "nine channels, original": (broken_file(drop("cond_stage_model."), text=True), "nothing here says which"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_model_that_is_not_whole_or_of_another_kind(fault: str, paint: Published, base: Path, tmp_path: Path):
    write, cause = BROKEN[fault]
    refused(base, write(tmp_path, paint), cause)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"dual_cross_attention": True}, r"Stable Diffusion's kind \(dual_cross_attention is True"),
        ({"layers_per_block": [1, 1, 1, 2]}, r"layers_per_block \[1, 1, 1, 2\] and not one number"),
        ({"use_linear_projection": True}, r"\d+ of another shape \(.*proj_in\.weight \[\d+, \d+, 1, 1\], not \[\d+, \d+\]"),
        ({"in_channels": 8}, r"8 input channels, where 4"),
        ({"out_channels": 8}, r"latents of 8 channels, the dataset's have 4"),
        ({"cross_attention_dim": 48}, r"\d+ of another shape \(.*attn2\.to_k\.weight \[\d+, 64\], not \[\d+, 48\]"),
    ],
)
def test_other_u_nets(change: dict[str, object], cause: str, prior: Published, base: Path, tmp_path: Path):
    refused(base, write_stable_diffusion(tmp_path / "sd", prior, **change), cause)


def test_a_configuration_that_leaves_out_what_is_usual(prior: Published, paint: Published, base: Path, tmp_path: Path):
    """The libraries have a default for it, and so it is left out by some; `architectures` may be null."""
    sd, hub = write_stable_diffusion(tmp_path / "sd", prior), write_hub(tmp_path / "hub", paint)
    usual = {"unet": {"in_channels", "out_channels"}, "image_encoder": {"architectures"}}
    for path, name in ((sd, "unet"), (hub, "image_encoder")):
        config = json.loads((path / name / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in usual[name]}
        (path / name / "config.json").write_text(json.dumps(kept))
    model, _ = start(base, sd)
    assert torch.equal(model.unet.conv_in.weight[:, :4], prior.unet.conv_in.weight)
    refused(base, hub, "nothing here says which")


def test_settings_that_contradict_the_model(prior: Published, paint: Published, base: Path, tmp_path: Path):
    velocity = write_stable_diffusion(tmp_path / "velocity", prior, prediction="v_prediction")
    refused(base, velocity, r"predicts v_prediction, .*set it to v_prediction")
    start(base, velocity, prediction="v_prediction")
    refused(base, write_original(tmp_path / "sd.ckpt", prior, text=True), "predicts epsilon", prediction="v_prediction")
    refused(base, base / "hub", r"has 1 block; set model\.conditioner_blocks to 1", conditioner_blocks=5)


def test_a_vae_with_a_decoder_of_its_own(paint: Published, base: Path, tmp_path: Path):
    """As sd-vae-ft-mse beside Stable Diffusion: the latents are the same, which a line says."""
    where = broken_hub(lambda state: state.update({"decoder.conv_out.bias": torch.ones(3)}), "vae")(tmp_path, paint)
    _, report = start(base, where)
    assert any("decoder of the VAE" in line for line in report.otherwise)
    assert not start(base, base / "hub")[1].otherwise


def test_places_that_hold_nothing(base: Path, tmp_path: Path):
    refused(base, tmp_path, "neither a model in diffusers' layout")
    refused(base, tmp_path / "nowhere" / "at all", "no such file or folder")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    refused(base, tmp_path, r"unet: no weights here .*diffusion_pytorch_model\.safetensors")
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
    sd = write_stable_diffusion(tmp_path / "sd", replace(prior, vae=load_vae(str(world.vae)).network))
    options = ("--checkpoint_every=1", "--global_batch=2")
    train(world.settings(tmp_path / "run", *options, f"--model.pretrained={sd}", "--steps=1"), ranks)
    said = capsys.readouterr().out
    assert f"start: {sd} (Stable Diffusion, diffusers layout)" in said
    assert json.loads((tmp_path / "run" / "start.json").read_text())["licence"] == "creativeml-openrail-m"
    (sd / "unet" / FILE).unlink()
    # Whatever is named later: the model is made of what it began with, which its licence is that of.
    for step, later in ((2, "elsewhere"), (3, "null")):
        train(world.settings(tmp_path / "run", *options, f"--model.pretrained={later}", f"--steps={step}"), ranks)
        said = capsys.readouterr().out
        assert "start:" not in said
        assert (f"this run began from {sd}" in said) == (later == "elsewhere")
        state = read_state(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        assert state.settings["model"]["pretrained"] == str(sd)


def test_the_sizes_of_a_file_are_those_that_the_folder_says(paint: Published, base: Path, tmp_path: Path):
    """Sizes read off the tensors of an original file are those that diffusers' layout writes down."""
    hub, file = str(base / "hub"), str(write_original(tmp_path / "model.ckpt", paint))
    theirs, ours = unet_config(hub), unet_config(file)
    compared = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "attention_head_dim")
    assert {key: ours[key] for key in compared} == {key: theirs[key] for key in compared}
    keys = networks.CLIP_SIZES.keys() - {"projection_dim"}
    assert all(getattr(encoder_config(file), key) == getattr(encoder_config(hub), key) for key in keys)
    with torch.device("meta"):
        model = networks.unloaded_model(ModelSettings(pretrained=file, encoder=file, vae=f"{hub}/vae", conditioner_blocks=1))
    expected = {name: tensor.shape for name, tensor in paint.unet.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.unet.state_dict().items()} == expected
    released = networks.PAINT_BY_EXAMPLE  # Known without a download.
    assert unet_config(released)["block_out_channels"] == (320, 640, 1280, 1280)
    assert encoder_config(released).num_hidden_layers == 24
