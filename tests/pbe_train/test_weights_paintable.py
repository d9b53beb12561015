"""Published models paint without a training: the same edit from every layout, and from an export as from its run."""

import json
from pathlib import Path

import numpy as np
import pytest

from pbe_train import PaintByExample
from pbe_train.weights.sizes import vae_config
from schemas.errors import InputError
from tests.pbe_train.published import (
    Published,
    make_comparable,
    make_published,
    original_state,
    write_hub,
    write_stable_diffusion,
    write_tensors,
)
from tests.pbe_train.test_weights_export import export, make_run

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
def test_an_export_paints_as_its_run(form: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also what no tensor tells: the size of views, how masks shrink, how references are fitted."""
    model = {"mask_to_latent": "nearest", "reference_geometry": "pad"}
    run = make_run(tmp_path / "run", hub, hub, more=model)
    out = tmp_path / "exported" if form == "diffusers" else tmp_path / "exported" / "model.safetensors"
    export(monkeypatch, run, out, form)
    expected = edited(run, None)
    assert np.array_equal(edited(out, None), expected)
    record = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert record["painting"] == {"view_size": 64, "guidance_dropout": 0.2, **model}
    # The record is what makes it so.
    (tmp_path / "exported" / "export.json").unlink()
    assert not np.array_equal(edited(out), expected)


def test_the_vae_of_an_original_file_has_the_sizes_of_its_tensors(parts: Published):
    made = vae_config(parts.vae.state_dict())
    for name, value in made.items():
        own = parts.vae.config[name]
        assert (list(own) if isinstance(own, tuple) else own) == value, name


def test_a_vae_that_is_cut_short(parts: Published, tmp_path: Path):
    state = original_state(parts)
    del state["first_stage_model.post_quant_conv.weight"]
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(InputError, match=r"model\.safetensors: 'post_quant_conv\.weight' of its VAE is missing; .* get it again"):
        PaintByExample.from_pretrained(tmp_path / "model.safetensors")


def test_what_does_not_paint_by_example_is_refused(hub: Path, tmp_path: Path):
    words = write_stable_diffusion(tmp_path / "sd", make_published(4))
    with pytest.raises(InputError, match=r"sd: a Stable Diffusion model, which paints by words; train it first"):
        PaintByExample.from_pretrained(words)
    with pytest.raises(InputError, match=r"nowhere: no such file or folder, and no hub id"):
        PaintByExample.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a model in diffusers' layout"):
        PaintByExample.from_pretrained(tmp_path / "empty")
