"""Weights in: every layout gives the same model, nothing is loaded in part, and what does not belong is refused in one line."""

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
from pbe_train.checkpoints.init_from_pretrained import start_model, widened
from pbe_train.checkpoints.known_sizes import unet_config
from pbe_train.checkpoints.load_report import Account
from pbe_train.checkpoints.networks import load_encoder
from pbe_train.checkpoints.trainer_checkpoint import read_state
from pbe_train.config import TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.pbe_train.published import (
    Published,
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


def in_shards(folder: Path) -> Path:
    write_in_shards(folder)
    return folder


def under_another_name(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def as_transformers_5(path: Path, parts: Published) -> Path:
    state = original_state(parts)
    write_tensors(path, {name.replace(".transformer.vision_model.", ".transformer."): tensor for name, tensor in state.items()})
    return path


LAYOUTS: dict[str, Callable[[Path, Published], Path]] = {
    "transformers 4": lambda folder, parts: write_hub(folder / "m", parts, transformers=4, position_ids=True),
    "transformers 5": lambda folder, parts: write_hub(folder / "m", parts, transformers=5),
    "pickles": lambda folder, parts: write_hub(folder / "m", parts, pickles=True),
    "shards": lambda folder, parts: in_shards(write_hub(folder / "m", parts)),
    "shards of pickles": lambda folder, parts: in_shards(write_hub(folder / "m", parts, pickles=True)),
    "older VAE": lambda folder, parts: write_hub(folder / "m", parts, vae="old"),
    "ckpt": lambda folder, parts: write_original(folder / "model.ckpt", parts),
    "original safetensors": lambda folder, parts: write_original(folder / "model.safetensors", parts),
    "original by transformers 5": lambda folder, parts: as_transformers_5(folder / "model.safetensors", parts),
    "safetensors named ckpt": lambda folder, parts: under_another_name(
        write_original(folder / "model.safetensors", parts), "model.ckpt"
    ),
    "ckpt named safetensors": lambda folder, parts: under_another_name(
        write_original(folder / "model.ckpt", parts), "model.safetensors"
    ),
}


def test_shards_that_do_not_hold_all(paint: Published, base: Path, tmp_path: Path):
    where = in_shards(write_hub(tmp_path / "hub", paint))
    index = where / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["one.more"] = content["weight_map"]["conv_out.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"index\.json: 1 tensor in no shard, first one\.more; get the model again"):
        start(base, where)
    (where / "unet" / content["weight_map"]["one.more"]).unlink()
    with pytest.raises(
        InputError, match=r"index\.json: its shard diffusion_pytorch_model-0000\d-of-00003\.safetensors is not there"
    ):
        start(base, where)


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
    """As Lightning saves them: read without that package, without running anything of it, and told."""
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
        "last": np.arange(3),
        "optimizer_states": [],
    }
    torch.save(
        {"state_dict": original_state(prior, text=True), **content},
        tmp_path / "sd.ckpt",
        _use_new_zipfile_serialization=not old_format,
    )
    monkeypatch.undo()
    assert "omegaconf" not in sys.modules
    model, account = start(base, tmp_path / "sd.ckpt")
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)
    assert account.aside["what is no tensor: hparams_type, hyper_parameters, last, loops, optimizer_states"] == 5


@pytest.mark.parametrize("old_format", [True, False])
def test_a_pickle_that_could_run_code_does_not(old_format: bool, base: Path, tmp_path: Path):
    path, sign = tmp_path / "model.ckpt", tmp_path / "it ran"
    torch.save(
        {"state_dict": {"a": torch.zeros(1), "b": Bomb(sign)}, "lr": np.float64(1)},
        path,
        _use_new_zipfile_serialization=not old_format,
    )
    with pytest.raises(
        InputError, match=r"model\.ckpt: a pickle .* could run code .*save its state_dict as \.safetensors"
    ) as raised:
        start(base, path)
    assert "it names builtins.getattr (of builtins)" in str(raised.value)
    assert not sign.exists()


def test_a_pickle_of_other_packages_names_them(foreign, base: Path, tmp_path: Path):
    """All that stand in the way, and not PyTorch's sentence on how to allow them."""
    names = ("ldm.data.Part", "ldm.util.Log", "taming.modules.Model", "wandb.Settings", "zeus.Monitor")
    made = [kind() for kind in foreign(*names, *NAMED).values()]
    torch.save({"state_dict": {"a": torch.zeros(1)}, "rest": made}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"could run code when loaded: it names ") as raised:
        start(base, tmp_path / "model.ckpt")
    said = str(raised.value)
    assert "ldm.data.Part, ldm.util.Log, taming.modules.Model, wandb.Settings and 1 more (of ldm, taming, wandb, zeus)" in said
    assert "omegaconf" not in said
    assert "add_safe_globals" not in said
    assert "\n" not in said


@pytest.mark.parametrize("content", [{"a": 1.5}, {"state_dict": {"a": torch.zeros(1)}}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_another_program(content: object, protocol: int, base: Path, tmp_path: Path):
    """Not damaged, and not to be got again: it is another kind of file."""
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(InputError, match=r"model\.ckpt: a pickle that torch\.save has not written, .* save its state_dict as"):
        start(base, tmp_path / "model.ckpt")


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_a_pickle_that_is_damaged_or_cut_short(old_format: bool, where: float, prior: Published, base: Path, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": original_state(prior, text=True)}, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * where)])
    with pytest.raises(InputError, match=r"model\.ckpt: a .* cut short.* get the file again") as raised:
        start(base, path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("model.ckpt", b"not a pickle", "a text, which begins with 'not a pickle'"),
        ("empty.ckpt", b"", "is empty"),
        ("model.safetensors", b"{}", "a JSON file"),
        ("model.zip", b"PK", "no file of weights|a text"),
        ("model.ckpt", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes, cause: str, base: Path, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    for source in (lambda path: start(base, path), PaintByExample.from_pretrained, load_encoder, unet_config):
        with pytest.raises(InputError, match=cause) as raised:
            source(str(tmp_path / name))
        assert "\n" not in str(raised.value)
        assert "code" not in str(raised.value)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 1}}, {"a": 1}, {}])
def test_pickles_of_something_else_are_refused(content: object, base: Path, tmp_path: Path):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="holds no named tensors"):
        start(base, tmp_path / "model.ckpt")


EXTRA = {
    "text encoder": {
        "cond_stage_model.transformer.embeddings.token_embedding.weight": torch.zeros(3),
        "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias": torch.zeros(3),
        "cond_stage_model.logit_scale": torch.zeros(()),
    },
    "embedding_manager.*": {
        "embedding_manager.string_to_param_dict.*": torch.zeros(1, 8),
        "embedding_manager.other": torch.zeros(1),
    },
    "denoiser.*": {"denoiser.sigmas": torch.zeros(1000), "denoiser.log_sigmas": torch.zeros(1000)},
    "logvar": {"logvar": torch.zeros(1000)},
    "scale_factor": {"scale_factor": torch.tensor(0.18215)},
    "moving average (EMA)": {"model_ema.num_updates": torch.tensor(7)},
}


@pytest.mark.parametrize("flat", [True, False])
def test_what_a_start_does_not_need_is_named_and_left(flat: bool, prior: Published, base: Path, tmp_path: Path):
    """Once each group, with its tensors counted; a plain number among the tensors is none of them."""
    state = original_state(prior)
    state = {name: tensor for name, tensor in state.items() if name.startswith(("model.", "first_stage_model."))}
    extra = {name: tensor for group in EXTRA.values() for name, tensor in group.items()}
    numbers = {"global_step": 470_000, "epoch": 3.0, "optimizer_states": [{"state": {0: torch.zeros(2)}}]}
    content = {**state, **extra, **numbers}
    torch.save(content if flat else {"state_dict": content}, tmp_path / "merged.ckpt")
    model, account = start(base, tmp_path / "merged.ckpt")
    assert torch.equal(model.unet.conv_out.weight, prior.unet.conv_out.weight)
    assert {what: account.aside[what] for what in EXTRA} == {what: len(group) for what, group in EXTRA.items()}
    assert account.aside["what is no tensor: epoch, global_step, optimizer_states"] == 3
    assert sum(account.loaded.values()) + sum(account.aside.values()) == len(content)
    assert "embedding_manager.* (2)" in account.lines()


def test_what_nobody_knows_is_told_when_one_paints(paint: Published, tmp_path: Path, capsys):
    write_tensors(tmp_path / "model.safetensors", {**original_state(paint), "denoiser.sigmas": torch.zeros(3)})
    PaintByExample.from_pretrained(tmp_path / "model.safetensors")
    assert (
        capsys.readouterr().err == f"{tmp_path}/model.safetensors: left aside, since nothing here has a use for it: denoiser.*\n"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_mid_block.alpha", "a LoRA"),
        ("down_blocks.0.resnets.0.norm1.weight", "a U-Net or ControlNet of diffusers' layout"),
        ("first_stage_model.quant_conv.bias", "a VAE alone"),
        ("emb_params", "a textual inversion"),
        ("something", "no such model"),
    ],
)
def test_a_file_of_another_network_says_which(name: str, what: str, base: Path, tmp_path: Path):
    write_tensors(tmp_path / "model.safetensors", {name: torch.zeros(1)})
    with pytest.raises(
        InputError, match=rf"model\.safetensors: {what}.* \(no tensor here begins with model\.diffusion_model\.\)"
    ):
        start(base, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["control_model.x", "lora_unet_down_blocks_0.alpha", "ip_adapter.1.to_k_ip.weight"])
def test_networks_that_were_added_are_refused(name: str, prior: Published, base: Path, tmp_path: Path):
    write_tensors(tmp_path / "model.safetensors", {**original_state(prior, text=True), name: torch.zeros(1)})
    with pytest.raises(InputError, match=rf"an? [\w]+ \({name}, \.\.\.\) beside the model, which would be lost"):
        start(base, tmp_path / "model.safetensors")


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
        (
            lambda state: state.update({"cond_stage_model.mapper.resblocks.0.odd": torch.zeros(1)}),
            r"1 tensor within its networks that no .* first cond_stage_model\.mapper\.resblocks\.0\.odd",
        ),
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


@pytest.mark.parametrize("layout", ["diffusers", "ckpt", "safetensors"])
def test_the_start_of_the_published_training(layout: str, prior: Published, base: Path, tmp_path: Path):
    """`sd-v1-4-modified-9channel.ckpt`: its five further input channels are 0, and so it is no inpainting model."""
    wide = make_published(9, seed=1)
    wide.unet.load_state_dict({**prior.unet.state_dict(), "conv_in.weight": widened(prior.unet.conv_in.weight.data)})
    parts = replace(prior, unet=wide.unet)
    if layout == "diffusers":
        where = write_stable_diffusion(tmp_path / "sd", parts)
    else:
        where = write_original(tmp_path / f"sd-v1-4-modified-9channel.{layout}", parts, text=True)
    model, account = start(base, where)
    expected = wide.unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.unet.state_dict().items())
    assert account.new == [
        "nothing in unet.conv_in: it has the 5 more input channels already, all 0",
        "the conditioner, at random",
    ]


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
        with pytest.raises(InputError, match=r"has 1 block, model\.conditioner_blocks says 5; set .* to 1"):
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


def test_a_training_starts_says_from_what_and_goes_on(world: World, prior: Published, tmp_path: Path, capsys):
    """The real loop: the account is printed and kept at the start of a new run; a resumed run reads the start no more."""
    vae = load_vae(str(world.vae))
    parts = replace(prior, vae=vae)
    sd = write_stable_diffusion(tmp_path / "sd", parts)
    options = (f"--model.pretrained={sd}", "--checkpoint_every=1")
    ranks = Distributed(0, 1, torch.device("cpu"))
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
        train(world.settings(tmp_path / "run", f"--model.pretrained={sd}"), Distributed(0, 1, torch.device("cpu")))
    assert not (tmp_path / "run").exists()
