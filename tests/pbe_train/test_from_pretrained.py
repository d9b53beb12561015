"""Published models paint without a training: the same edit from every layout, and from an export as from its run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pbe_core.errors import InputError
from pbe_train import PaintByExample
from pbe_train.checkpoints.export import export
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.ldm_format import vae_config_of
from pbe_train.model.paint_model import assemble
from tests.pbe_train.published import (
    Published,
    make_comparable,
    make_published,
    make_run,
    original_state,
    write_hub,
    write_stable_diffusion,
    write_tensors,
)

RANDOM = np.random.default_rng(0)
PHOTO = RANDOM.integers(0, 256, (80, 90, 3), np.uint8)
REFERENCE = RANDOM.integers(0, 256, (30, 50, 3), np.uint8)
MASK = np.zeros((80, 90), bool)
MASK[20:50, 22:57] = True


@pytest.fixture(scope="module")
def parts() -> Published:
    return make_comparable(make_published(9))


@pytest.fixture(scope="module")
def hub(parts: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("released") / "hub", parts)


def edited(source: Path, size: int | None = 64) -> np.ndarray:
    return np.asarray(PaintByExample.from_pretrained(source)(PHOTO, MASK, REFERENCE, steps=2, size=size))


def test_every_layout_paints_the_same(parts: Published, hub: Path, tmp_path: Path):
    first = edited(hub)
    assert np.array_equal(first[~MASK], PHOTO[~MASK])
    assert not np.array_equal(first[MASK], PHOTO[MASK])
    for name in ("model.ckpt", "model.safetensors"):
        write_tensors(tmp_path / name, original_state(parts))
        assert np.array_equal(edited(tmp_path / name), first), name
    other = write_hub(tmp_path / "other", make_comparable(make_published(9, seed=1)))
    assert not np.array_equal(edited(other), first)


def test_the_released_model_works_at_512_px_with_its_own_mask(hub: Path):
    run = PaintByExample.from_pretrained(str(hub)).run
    model = run.settings.model
    assert (run.identity.view_size, model.mask_to_latent, model.reference_geometry) == (512, "bilinear", "squash")
    assert (model.conditioner_blocks, model.tokens, run.settings.prediction) == (1, "class", "epsilon")


@pytest.mark.parametrize("form", ["diffusers", "ldm"])
def test_an_export_paints_as_its_run(form: str, hub: Path, tmp_path: Path):
    """Also what no tensor tells: the size of views, how masks shrink, how references are fitted."""
    model = {"mask_to_latent": "nearest", "reference_geometry": "pad"}
    run = make_run(tmp_path / "run", hub, hub, more=model)
    out = tmp_path / "exported" if form == "diffusers" else tmp_path / "exported" / "model.safetensors"
    export(load_run(run, device="cpu"), run, tmp_path / "exported", "model.safetensors", form, "ema")
    expected = edited(run, None)
    assert np.array_equal(edited(out, None), expected)
    metadata = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert metadata["painting"] == {"view_size": 64, "guidance_dropout": 0.2, **model}
    (tmp_path / "exported" / "export.json").unlink()
    alike = np.array_equal(edited(out, None if form == "ldm" else 64), expected)
    # The metadata makes it so; the one file has it inside.
    assert alike == (form == "ldm")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_copy_of_the_one_file_paints_as_its_run(suffix: str, hub: Path, tmp_path: Path):
    """Also one whose conditioner is of a depth of its own, which is a start again."""
    more = {"reference_geometry": "pad"}
    run = make_run(tmp_path / "run", hub, hub, more=more)
    loaded = load_run(run, device="cpu")
    deep = loaded.settings.model.model_copy(update={"conditioner_blocks": 2})
    settings = loaded.settings.model_copy(update={"model": deep})
    torch.manual_seed(0)
    model = assemble(deep, loaded.model.unet, loaded.model.conditioner.model).eval()
    export(replace(loaded, settings=settings, model=model), run, tmp_path / "exported", f"model.{suffix}", "ldm", "ema")
    copy = (tmp_path / "exported" / f"model.{suffix}").rename(tmp_path / f"copy.{suffix}")
    found = PaintByExample.from_pretrained(copy).run
    assert (found.settings.model.conditioner_blocks, found.identity.view_size) == (2, 64)
    assert (found.settings.model.reference_geometry, found.settings.model.mask_to_latent) == ("pad", "nearest")
    make_run(tmp_path / "next", hub, copy, blocks=2)


@pytest.mark.parametrize("form", ["diffusers", "ldm"])
def test_metadata_is_about_its_own_files_only(form: str, parts: Published, hub: Path, tmp_path: Path):
    """What lies beside it, or has taken a file's place, is another model."""
    run = make_run(tmp_path / "run", hub, hub, more={"reference_geometry": "pad"})
    folder = tmp_path / "exported"
    export(load_run(run, device="cpu"), run, folder, "model.safetensors", form, "ema")
    if form == "ldm":
        foreign = folder / "other.safetensors"
        write_tensors(foreign, original_state(parts))
    else:
        shutil.copy(hub / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "kept")
        state = load_file(tmp_path / "kept")
        save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"by": "another program"})
        foreign = folder
    assert PaintByExample.from_pretrained(foreign).run.settings.model.reference_geometry == "squash"


def test_damaged_metadata_is_refused(parts: Published, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    notes = {"paint_by_example": json.dumps({"painting": {"reference_geometry": "round"}})}
    save_file({name: tensor.contiguous() for name, tensor in original_state(parts).items()}, path, metadata=notes)
    with pytest.raises(InputError, match=r"metadata .* is damaged") as raised:
        PaintByExample.from_pretrained(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("what", "left"), [("block", "1 block.* 9 layer"), ("mapper", "0 block.* 9"), ("layer", "2 block.* 8 lay")]
)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_model_that_is_cut_short_is_no_shallower_one(layout: str, what: str, left: str, tmp_path: Path):
    """Whole blocks or layers are gone, so that what is there fits together: it neither paints nor starts a training."""
    parts = make_published(9, layers=9)
    gone = {"block": ("mapper.resblocks.1.", "mapper.blocks.1."), "mapper": ("mapper.",), "layer": ("encoder.layers.8.",)}[what]
    hub = write_hub(tmp_path / "hub", parts)
    if layout == "diffusers":
        where, path = hub, hub / "image_encoder" / "model.safetensors"
        state = load_file(path)
    else:
        where = path = tmp_path / "model.safetensors"
        state = original_state(parts)
    write_tensors(path, state)
    PaintByExample.from_pretrained(where)
    write_tensors(path, {name: tensor for name, tensor in state.items() if not any(part in name for part in gone)})
    with pytest.raises(InputError, match=rf"{left}.*, where .* belong together"):
        PaintByExample.from_pretrained(where)
    encoder = tmp_path / "encoder"
    parts.encoder.model.save_pretrained(encoder)
    with pytest.raises(InputError, match="belong together"):
        make_run(tmp_path / "run", hub, where, more={"encoder": str(encoder)}, blocks=1)


def test_the_vae_of_an_original_file_has_the_sizes_of_its_tensors(parts: Published):
    made = vae_config_of(parts.vae.state_dict())
    for name, value in made.items():
        own = parts.vae.config[name]
        assert (list(own) if isinstance(own, tuple) else own) == value, name


def test_a_vae_that_is_cut_short(parts: Published, tmp_path: Path):
    state = original_state(parts)
    del state["first_stage_model.post_quant_conv.weight"]
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(InputError, match=r"model\.safetensors: 'post_quant_conv\.weight' of its VAE is missing"):
        PaintByExample.from_pretrained(tmp_path / "model.safetensors")


def test_what_does_not_paint_by_example_is_refused(hub: Path, tmp_path: Path):
    words = write_stable_diffusion(tmp_path / "sd", make_published(4))
    with pytest.raises(InputError, match="a Stable Diffusion model, which paints by words"):
        PaintByExample.from_pretrained(words)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        PaintByExample.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a model in diffusers' layout"):
        PaintByExample.from_pretrained(tmp_path / "empty")
