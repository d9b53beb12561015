"""Weights out: what goes in comes out bit for bit, diffusers paints the same with it, and nothing else is overwritten."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import pbe_train.export
from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError
from pbe_core.randomness import name_hash
from pbe_train import PaintByExample
from pbe_train.checkpoints import export as exporting
from pbe_train.checkpoints.diffusers_format import load_diffusers_pipeline
from pbe_train.checkpoints.export import check_free, model_card, new_export
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.key_mapping import Tensors
from pbe_train.checkpoints.ldm_format import schedule_buffers
from pbe_train.checkpoints.load_report import GUESSED, LoadReport, make_report
from pbe_train.checkpoints.networks import read_pretrained
from pbe_train.checkpoints.pretrained import PretrainedModel
from pbe_train.checkpoints.trainer_checkpoint import (
    check_resumable,
    find_checkpoint,
    list_checkpoints,
    read_file,
    read_state,
    save_weights,
)
from pbe_train.config import ModelSettings
from pbe_train.data.references import fit_reference
from pbe_train.model.paint_model import assemble
from pbe_train.model.pipeline import Run, SamplingSettings
from pbe_train.model.schedulers import training_schedule
from tests.pbe_train.published import (
    Published,
    broken_hub,
    make_comparable,
    make_published,
    make_run,
    original_state,
    write_hub,
    write_stable_diffusion,
    write_tensors,
)

NETWORKS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model")
HOW = {"mask_to_latent": "nearest", "reference_geometry": "pad"}
"""How the run was trained: otherwise than the released model."""
LDM = ("own.ckpt", "own.safetensors")


@pytest.fixture(scope="module")
def parts() -> Published:
    return make_comparable(make_published(9))


@pytest.fixture(scope="module")
def hub(parts: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("released") / "hub", parts)


@pytest.fixture(scope="module")
def run(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began from the released model and has its weights."""
    folder = make_run(tmp_path_factory.mktemp("run") / "run", hub, hub, more=HOW)
    (folder / "evaluation.json").write_text(json.dumps({"scores": {"agreement": 0.75}}))
    return folder


@pytest.fixture(scope="module")
def averaged(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a moving average, all of whose weights are larger by a half."""
    return make_run(tmp_path_factory.mktemp("averaged") / "run", hub, hub, average=0.5)


@pytest.fixture(scope="module")
def loaded(run: Path) -> Run:
    return load_run(run, device="cpu")


def program(run: Path, out: Path, form: str, *options: str) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", ["export", "--model", str(run), "--out", str(out), "--format", form, *options])
        pbe_train.export.main()
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in all formats: a folder `diffusers`, and a folder for each of `LDM`."""
    out = tmp_path_factory.mktemp("exported")
    program(run, out / "diffusers", "diffusers")
    for name in LDM:
        program(run, out / name.partition(".")[2] / name, "ldm")
    return out


def where_of(exported: Path, form: str) -> Path:
    return exported / form if form == "diffusers" else exported / form.partition(".")[2] / form


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name].shape, found[name].dtype) == (expected[name].shape, expected[name].dtype), name
        assert torch.equal(found[name], expected[name]), name


def changed(run: Run, **model: object) -> Run:
    """A run with other settings of its model."""
    return replace(run, settings=run.settings.model_copy(update={"model": run.settings.model.model_copy(update=model)}))


# --- Bits and pictures ----------------------------------------------------------------------------------------------------


def test_released_model_to_run_to_diffusers(hub: Path, exported: Path):
    """Diffusers' layout in, diffusers' layout out: the same names, shapes and bits in every file of weights."""
    out = exported / "diffusers"
    for name in NETWORKS:
        assert_same(load_file(out / f"{name}.safetensors"), load_file(hub / f"{name}.safetensors"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["image_encoder"] == ["paint_by_example", "PaintByExampleImageEncoder"]
    assert index["safety_checker"] == [None, None]
    vision = json.loads((out / "image_encoder" / "config.json").read_text())
    assert (vision["architectures"], vision["projection_dim"]) == (["PaintByExampleImageEncoder"], 64)
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("name", LDM)
def test_released_model_to_run_to_the_original_layout(name: str, parts: Published, exported: Path):
    """Every tensor of the original file but for what is left aside, bit for bit; and it can be read again."""
    given, out = original_state(parts), where_of(exported, name)
    found = load_file(out) if name.endswith("safetensors") else torch.load(out, weights_only=True)["state_dict"]
    networks = {name: tensor for name, tensor in given.items() if "." in name and not name.startswith("model_ema.")}
    networks |= {"learnable_vector": given["learnable_vector"]}
    schedule = schedule_buffers()
    assert_same({name: tensor for name, tensor in found.items() if name not in schedule}, networks)
    assert found.keys() - networks.keys() == schedule.keys()
    source = read_pretrained(str(out))
    assert_same(source.unet, parts.unet.state_dict())
    assert source.aside["schedule"] == 12


def test_the_schedule_is_diffusers():
    """Against diffusers' own betas, and the equations between them (Ho et al. 2020)."""
    buffers, theirs = schedule_buffers(), training_schedule("epsilon")
    assert isinstance(theirs, DDPMScheduler)
    torch.testing.assert_close(buffers["betas"], theirs.betas)
    torch.testing.assert_close(buffers["alphas_cumprod"], theirs.alphas_cumprod)
    assert all(len(values) == 1000 and values.isfinite().all() for values in buffers.values())
    total = buffers["sqrt_alphas_cumprod"] ** 2 + buffers["sqrt_one_minus_alphas_cumprod"] ** 2
    torch.testing.assert_close(total, torch.ones(1000))
    variance = theirs.betas * (1 - buffers["alphas_cumprod_prev"]) / (1 - theirs.alphas_cumprod)
    torch.testing.assert_close(buffers["posterior_variance"], variance, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(buffers["log_one_minus_alphas_cumprod"].exp(), 1 - theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    ratio = buffers["sqrt_recipm1_alphas_cumprod"] / buffers["sqrt_recip_alphas_cumprod"]
    torch.testing.assert_close(ratio, buffers["sqrt_one_minus_alphas_cumprod"])
    # x_0 = x_t must stay under the posterior's mean, where little noise is added.
    torch.testing.assert_close(buffers["posterior_mean_coef1"][:1] + buffers["posterior_mean_coef2"][:1], torch.ones(1))


def test_diffusers_predicts_the_same_noise_and_paints_the_same_pictures(loaded: Run, exported: Path, parts: Published):
    """Same photo, mask, reference and noise: the installed diffusers and our own painting agree to a grey level."""
    pipeline, model = load_diffusers_pipeline(str(exported / "diffusers")), loaded.model
    torch.manual_seed(3)
    planes, pixels = torch.randn(2, 9, 8, 8), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        condition, nothing = pipeline.image_encoder(pixels, return_uncond_vector=True)
        torch.testing.assert_close(model.conditioner(pixels), condition)
        torch.testing.assert_close(condition, parts.encoder(pixels), rtol=0, atol=0)
        assert torch.equal(model.conditioner.uncond_vector, nothing)
        ours = model.predict(*planes.split([4, 4, 1], dim=1), torch.tensor([500, 500]), condition)
        torch.testing.assert_close(ours, pipeline.unet(planes, 500, encoder_hidden_states=condition).sample, rtol=1e-4, atol=1e-5)

    random = np.random.default_rng(0)
    photo, reference = random.integers(0, 256, (64, 64, 3), np.uint8), random.integers(0, 256, (32, 32, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[8:40, 16:56] = True
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels[torch.from_numpy(mask)[None, None].expand_as(pixels)] = 0
    pipeline.set_progress_bar_config(disable=True)
    for scheduler in (PNDMScheduler, DDIMScheduler):
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        theirs = pipeline(
            example_image=Image.fromarray(reference),
            image=Image.fromarray(photo),
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
            latents=torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(name_hash("paint", 7, bits=32))),
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="np",
        ).images[0]
        how = SamplingSettings(5.0, 4, scheduler.__name__)
        # What is compared depends on the reference: from another one comes another picture.
        same, other = (
            np.abs(loaded.paint(loaded.encode_pixels(pixels), mask[None], [seen], [7], how)[0] / 255 - theirs).max()
            for seen in (reference, 255 - reference)
        )
        assert same < 1 / 255, scheduler
        assert other > 3 / 255, scheduler


def test_the_one_liner_loads_the_released_layout(parts: Published, tmp_path: Path, exported: Path):
    """Under older names too; and it refuses what is not whole."""
    where = write_hub(tmp_path / "hub", parts, transformers=5, vae="old")
    shutil.copytree(exported / "diffusers" / "feature_extractor", where / "feature_extractor")
    pipeline = load_diffusers_pipeline(str(where))
    assert_same(pipeline.vae.state_dict(), parts.vae.state_dict())
    assert_same(pipeline.image_encoder.state_dict(), parts.encoder.state_dict())
    with pytest.raises(InputError, match=r"1 missing \(uncond_vector\)"):
        load_diffusers_pipeline(str(broken_hub(lambda state: state.pop("uncond_vector"), "image_encoder")(tmp_path, parts)))
    with pytest.raises(InputError, match=r"no Paint by Example model in diffusers' layout"):
        load_diffusers_pipeline(str(tmp_path))


# --- A run as a start, which weights, what a layout cannot hold ----------------------------------------------------------------


def test_a_run_is_a_pretrained_model(hub: Path, averaged: Path, parts: Published, tmp_path: Path):
    """Its averaged weights, where it keeps them; encoder and VAE by their hashes."""
    next_run = make_run(tmp_path / "next", hub, averaged)
    model = load_run(next_run, device="cpu").model
    assert torch.equal(model.unet.conv_in.weight, parts.unet.conv_in.weight + 0.5)
    assert torch.equal(model.conditioner.uncond_vector, parts.encoder.uncond_vector + 0.5)
    report = LoadReport(**json.loads((next_run / "start.json").read_text()))
    assert report.kind == "run of this trainer"
    assert report.licence == "creativeml-openrail-m"  # That of the start's own start.
    other = write_hub(tmp_path / "other", make_published(9, seed=5))
    with pytest.raises(InputError, match="its VAE is not the dataset's"):
        make_run(tmp_path / "o", other, averaged)
    with pytest.raises(InputError, match=r"encoder is not model\.encoder.*that of the run"):
        make_run(tmp_path / "m", hub, averaged, more={"encoder": str(other)})
    with pytest.raises(InputError, match=r"says epsilon|says v_prediction"):
        make_run(tmp_path / "v", hub, averaged, prediction="v_prediction")
    unknown = shutil.copytree(averaged, tmp_path / "unknown")
    (unknown / "start.json").unlink()
    checkpoint = unknown / "checkpoints" / "step-00000003"
    assert make_report(read_pretrained(str(checkpoint)), [], ModelSettings(encoder="e", vae="v")).licence is None
    with (checkpoint / "ema.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xee")
    with pytest.raises(InputError, match="the file is damaged"):
        read_pretrained(str(unknown))


def test_which_weights_are_exported(averaged: Path, parts: Published, tmp_path: Path):
    """The moving average where there is one, unless asked otherwise."""
    for options, shift in (((), 0.5), (("--weights", "model"), 0.0)):
        out = program(averaged, tmp_path / "out", "diffusers", *options)
        found = load_file(out / f"{NETWORKS[0]}.safetensors")["conv_out.bias"]
        assert torch.equal(found, parts.unet.conv_out.bias + shift)
    assert "of the last step" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("form", "network", "change", "cause"),
    [
        ("diffusers", "model", {"tokens": "all"}, "conditions on all tokens"),
        ("ldm", "model", {"tokens": "all"}, "conditions on all tokens"),
        ("diffusers", "model", {"conditioner_blocks": 2}, "has 2 blocks, the pipeline's 1"),
        ("ldm", "settings", {"prediction": "v_prediction"}, "predicts v_prediction"),
        ("ldm", "unet", {"attention_head_dim": 4}, r"attention_head_dim 4, .* read back as 8; .*--format diffusers"),
        ("ldm", "unet", {"norm_eps": 1e-6}, r"U-Net has norm_eps 1e-06"),
        ("ldm", "vae", {"norm_num_groups": 8}, r"VAE has norm_num_groups 8"),
        ("ldm", "scale", {"scaling_factor": 0.5}, r"VAE has scaling_factor 0\.5, .* read back as 0\.18215"),
        ("ldm", "encoder", {"num_attention_heads": 2}, r"vision encoder has num_attention_heads 2, .* read back as 1"),
        ("ldm", "encoder", {"hidden_act": "gelu"}, r"vision encoder has hidden_act 'gelu'"),
    ],
)
def test_runs_that_a_layout_cannot_hold(
    form: str, network: str, change: dict[str, object], cause: str, run: Path, loaded: Run, tmp_path: Path, monkeypatch
):
    """They would be read back as another model, and nothing would say so."""
    other = loaded
    if network == "model":
        other = changed(loaded, **change)
    elif network == "settings":
        other = replace(loaded, settings=loaded.settings.model_copy(update=change))
    elif network == "encoder":
        for name, value in change.items():
            monkeypatch.setattr(loaded.model.conditioner.model.config, name, value)
    elif network == "vae":
        vae = copy.copy(loaded.vae.network)
        vae.register_to_config(**change)
        other = replace(loaded, vae=Autoencoder(vae))
    else:
        update = {"unet": {**loaded.identity.unet, **change}} if network == "unet" else change
        other = replace(loaded, identity=loaded.identity.model_copy(update=update))
    with pytest.raises(InputError, match=cause) as raised:
        exporting.export(other, run, tmp_path / "out", "model.ckpt", form, "ema")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# --- The folder ------------------------------------------------------------------------------------------------------------


def write_export(out: Path, content: str, name: str = "weights") -> None:
    with new_export(out, {}) as partial:
        (partial / name).write_text(content)


def test_an_export_takes_the_place_of_an_earlier_one_only(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and no export of this program"):
        program(run, out, "diffusers")
    (out / "thesis.txt").unlink()
    write_export(out, "old")
    write_export(out, "new", "other")
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "other"]
    with pytest.raises(OSError, match="disk full"), new_export(out, {}):  # An export that fails changes nothing.
        raise OSError("disk full")
    assert (out / "other").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt is not of the earlier export"):
        check_free(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        check_free(tmp_path / "file")
    with pytest.raises(InputError, match=r"writes a folder; give a name without \.ckpt"):
        program(run, tmp_path / "model.ckpt", "diffusers")


def test_the_next_export_tidies_up_after_one_that_was_killed(tmp_path: Path):
    """A real process that dies while it writes: the earlier export stands, and the next one leaves nothing else beside it."""
    out = tmp_path / "out"
    write_export(out, "old")
    child = os.fork()
    if not child:
        with new_export(out, {}) as partial:
            (partial / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (out / "weights").read_text() == "old"
    assert len(list(tmp_path.iterdir())) > 1
    write_export(out, "new")
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Card and licence -------------------------------------------------------------------------------------------------------


def test_the_model_card(loaded: Run, exported: Path):
    """What it is, how it was trained and measured, its licence, and how it is loaded; and an unknown licence is called so."""
    card = (exported / "diffusers" / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.library_name, data.license) == ("diffusers", "creativeml-openrail-m")
    assert "{{" not in card
    assert "{%" not in card
    for word in ("CreativeML Open RAIL-M", "`fingerprint`", '"agreement": 0.75', "learning_rate", "DiffusionPipeline", "3 of 64"):
        assert word in card
    card = model_card(loaded, "model", "ldm", "own.ckpt", {}, None)
    assert ModelCard(card).data.license == "other"
    for word in ("Unknown: nothing is recorded", "--ckpt own.ckpt", "No evaluation", "the original code makes 5"):
        assert word in card


@pytest.mark.parametrize(("form", "trained"), [("diffusers", "bilinear"), ("ldm", "nearest")])
def test_the_card_says_what_other_programs_do_otherwise(form: str, trained: str, loaded: Run):
    cards = {}
    for geometry in ("pad", "squash"):
        for mask in ("nearest", "bilinear"):
            other = changed(loaded, reference_geometry=geometry, mask_to_latent=mask)
            card = cards[geometry] = model_card(other, "model", form, "mine", {}, None)
            assert (f"this model was trained with `{trained}`" in card) == (mask == trained)
            assert ("(123, 117, 104)" in card) == (geometry == "pad")
            assert ("as in training" in card) == (geometry == "squash" and form == "diffusers")
            assert ("Do not load it with diffusers' `from_single_file`" in card) == (form == "ldm")
    # The snippet does what training did: the aspect kept, in the middle, on the encoder's mean colour.
    snippet = cards["pad"].partition("## Differences")[2].partition("```python\n")[2].partition("```")[0]
    reference = np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8)
    names: dict[str, object] = {"reference": Image.fromarray(reference)}
    exec("\n".join(line for line in snippet.splitlines() if "open" not in line), names)
    assert np.array_equal(np.asarray(names["reference"]), fit_reference(reference, 32, "pad"))


@pytest.mark.parametrize("form", ["diffusers", "own.safetensors"])
def test_the_licence_of_a_start(form: str, run: Path, loaded: Run, exported: Path, tmp_path: Path):
    """Of a published layout it is a guess, and called so, also further on; of an export it is what the export says."""
    assert json.loads((run / "start.json").read_text())["licence_guessed"] is True
    report = make_report(read_pretrained(str(where_of(exported, form))), [], loaded.settings.model)
    assert (report.licence, report.licence_guessed) == ("creativeml-openrail-m", True)
    assert f"creativeml-openrail-m{GUESSED}" in report.lines()
    assert GUESSED in (exported / "diffusers" / "README.md").read_text()
    kind = "diffusers" if form == "diffusers" else "ldm"
    exporting.export(changed(loaded, pretrained=None), run, tmp_path / form, form, kind, "ema")
    card = (tmp_path / form / "README.md").read_text()
    assert "Trained from scratch: U-Net and conditioner have no base weights" in card
    own = read_pretrained(str(tmp_path / form / (form if kind == "ldm" else "")))
    report = make_report(own, [], loaded.settings.model)
    assert (report.licence, report.licence_guessed) == (None, False)


@pytest.mark.parametrize(("painting", "differs"), [({"reference_geometry": "pad"}, True), (["pad"], False)])
def test_the_report_names_settings_that_differ_from_the_training(painting: object, differs: bool):
    metadata = {"painting": painting, "licence": "mit"}
    source = PretrainedModel("export", "Paint by Example, diffusers layout", {}, {}, metadata=metadata)
    report = make_report(source, [], ModelSettings(encoder="e", vae="v"))
    assert [line.startswith("reference_geometry squash, ") for line in report.otherwise] == [True] * differs
    assert report.licence == "mit"


def test_the_scheduler_is_that_of_the_training(run: Path, loaded: Run, exported: Path, tmp_path: Path):
    """Stable Diffusion's schedule, and what the U-Net of this run predicts: diffusers reads it from the file."""
    velocity = replace(loaded, settings=loaded.settings.model_copy(update={"prediction": "v_prediction"}))
    exporting.export(velocity, run, tmp_path / "out", "", "diffusers", "ema")
    for out, prediction in ((exported / "diffusers", "epsilon"), (tmp_path / "out", "v_prediction")):
        config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        expected = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
        expected |= {"clip_sample": False, "num_train_timesteps": 1000, "prediction_type": prediction}
        assert {key: config[key] for key in expected} == expected
        assert config["_class_name"] == "PNDMScheduler"


# --- Painting without a training: the same edit from every layout, and from an export as from its run --------------------------

RANDOM = np.random.default_rng(0)
PHOTO = RANDOM.integers(0, 256, (80, 90, 3), np.uint8)
REFERENCE = RANDOM.integers(0, 256, (30, 50, 3), np.uint8)
MASK = np.zeros((80, 90), bool)
MASK[20:50, 22:57] = True


def edited(source: Path, size: int | None = 64) -> np.ndarray:
    return np.asarray(PaintByExample.from_pretrained(source)(PHOTO, MASK, REFERENCE, steps=2, size=size))


def painting_of(source: Path) -> tuple[int, str, str]:
    run = PaintByExample.from_pretrained(source).run
    return run.identity.view_size, run.settings.model.mask_to_latent, run.settings.model.reference_geometry


def test_every_layout_paints_the_same(parts: Published, hub: Path, tmp_path: Path):
    """As the released model: at 512 px, if not asked otherwise, with its own way of shrinking masks."""
    first = edited(hub)
    assert np.array_equal(first[~MASK], PHOTO[~MASK])
    assert not np.array_equal(first[MASK], PHOTO[MASK])
    for name in ("model.ckpt", "model.safetensors"):
        write_tensors(tmp_path / name, original_state(parts))
        assert np.array_equal(edited(tmp_path / name), first), name
    other = write_hub(tmp_path / "other", make_comparable(make_published(9, seed=1)))
    assert not np.array_equal(edited(other), first)
    assert painting_of(hub) == painting_of(tmp_path / "model.ckpt") == (512, "bilinear", "squash")


@pytest.mark.parametrize("form", ["diffusers", *LDM])
def test_an_export_paints_as_its_run(form: str, run: Path, parts: Published, exported: Path, tmp_path: Path):
    """Also what no tensor tells: the size of views, how masks shrink, how references are fitted."""
    where = where_of(exported, form)
    assert np.array_equal(edited(where, None), edited(run, None))
    metadata = json.loads(((where if where.is_dir() else where.parent) / "export.json").read_text())
    assert metadata["painting"] == {"view_size": 64, "guidance_dropout": 0.2, **HOW}
    # The one file has it inside. A folder has it beside, about its own files only; what has taken their place is another model.
    if form == "diffusers":
        foreign = shutil.copytree(where, tmp_path / "other")
        weights = foreign / f"{NETWORKS[0]}.safetensors"
        save_file(load_file(where / f"{NETWORKS[0]}.safetensors"), weights, metadata={"by": "another program"})
    else:
        foreign = where.with_name(f"other{where.suffix}")
        assert painting_of(shutil.copy(where, tmp_path / f"copy{where.suffix}")) == (64, "nearest", "pad")
        write_tensors(foreign, original_state(parts))
    assert painting_of(foreign) == (512, "bilinear", "squash")


def test_the_one_file_tells_of_a_conditioner_of_another_depth(run: Path, loaded: Run, hub: Path, tmp_path: Path):
    """One that the rule of the published programs does not give; it is a start again."""
    deep = changed(loaded, conditioner_blocks=2)
    torch.manual_seed(0)
    model = assemble(deep.settings.model, loaded.model.unet, loaded.model.conditioner.model).eval()
    exporting.export(replace(deep, model=model), run, tmp_path / "exported", "model.ckpt", "ldm", "ema")
    where = tmp_path / "exported" / "model.ckpt"
    assert PaintByExample.from_pretrained(where).run.settings.model.conditioner_blocks == 2
    make_run(tmp_path / "next", hub, where, blocks=2)


def test_damaged_metadata_is_refused(parts: Published, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    notes = {"paint_by_example": json.dumps({"painting": {"reference_geometry": "round"}})}
    save_file({name: tensor.contiguous() for name, tensor in original_state(parts).items()}, path, metadata=notes)
    with pytest.raises(InputError, match=r"metadata .* is damaged"):
        PaintByExample.from_pretrained(path)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_model_that_is_cut_short_is_no_shallower_one(layout: str, tmp_path: Path):
    """Whole blocks or layers are gone, so that what is there fits together: it is refused where it is read."""
    parts = make_published(9, layers=9)
    hub = write_hub(tmp_path / "hub", parts)
    where, path, state = hub, hub / "image_encoder" / "model.safetensors", None
    if layout == "original":
        where = path = tmp_path / "model.safetensors"
        write_tensors(path, original_state(parts))
    state = load_file(path)
    read_pretrained(str(where))
    gone = {
        "1 block.* 9 layer": ("mapper.resblocks.1.", "mapper.blocks.1."),
        "0 block.* 9": ("mapper.",),
        "2 block.* 8 lay": ("encoder.layers.8.",),
    }
    for left, names in gone.items():
        write_tensors(path, {name: tensor for name, tensor in state.items() if not any(part in name for part in names)})
        with pytest.raises(InputError, match=rf"{left}.*, where .* belong together"):
            PaintByExample.from_pretrained(where)


def test_what_does_not_paint_by_example_is_refused(parts: Published, tmp_path: Path):
    words = write_stable_diffusion(tmp_path / "sd", make_published(4))
    with pytest.raises(InputError, match="a Stable Diffusion model, which paints by words"):
        PaintByExample.from_pretrained(words)
    state = original_state(parts)
    del state["first_stage_model.post_quant_conv.weight"]
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(InputError, match=r"model\.safetensors: 'post_quant_conv\.weight' of its VAE is missing"):
        PaintByExample.from_pretrained(tmp_path / "model.safetensors")


# --- Our own weights, without what only a resumed training needs ------------------------------------------------------------


def test_weights_alone_are_the_runs_in_half_precision_and_a_start(run: Path, loaded: Run, tmp_path: Path):
    """Every parameter, rounded to 16 bits, under its name; no optimizer. They paint, say where they are from, and begin a run."""
    out = program(run, tmp_path / "small", "weights")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "state.json", "export.json", "README.md", "start.json"}
    kept = loaded.model.kept()
    assert_same(load_file(out / "model.safetensors"), {name: value.detach().half() for name, value in kept.items()})
    again = load_run(out, device="cpu")
    assert (again.step, again.identity) == (loaded.step, loaded.identity)
    for name, value in again.model.kept().items():
        assert torch.equal(value, kept[name].half().float()), name
    report = make_report(read_pretrained(str(out)), [], loaded.settings.model)
    assert (report.kind, report.licence) == ("run of this trainer", "creativeml-openrail-m")
    assert json.loads((out / "start.json").read_text())["source"] == loaded.settings.model.pretrained
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "README.md").stat().st_mode}, "readable by all or by none"
    assert "PaintByExample.from_pretrained" in (out / "README.md").read_text()
    with pytest.raises(InputError, match=r"has no optimizer\.safetensors; it has model\.safetensors"):
        read_file(out, read_state(out), "optimizer")


def test_weights_alone_are_no_run_to_go_on_with_nor_a_folder_for_one(run: Path, loaded: Run, tmp_path: Path):
    """Whoever loaded a run in an export's folder would get the export. The way out is told, and nothing is changed."""
    out = program(run, tmp_path / "small", "weights")
    with pytest.raises(InputError, match=r"small: holds weights and is no run folder; .*--model\.pretrained"):
        find_checkpoint(out, "auto")
    assert find_checkpoint(tmp_path / "new", str(out)) == out
    with pytest.raises(InputError, match=r"small: holds weights alone.*--model\.pretrained"):
        check_resumable(out, read_state(out), loaded.settings, loaded.identity)


def test_weights_exported_again_say_what_they_are_and_nothing_of_their_neighbours(averaged: Path, tmp_path: Path):
    """An average stays one; start and evaluation of another model that lie two folders up are not theirs."""
    out = program(averaged, tmp_path / "of" / "here" / "first", "weights")
    (out / "start.json").unlink(missing_ok=True)
    (tmp_path / "of" / "evaluation.json").write_text('{"scores": "another model\'s"}')
    (tmp_path / "of" / "start.json").write_text('{"licence": "another model\'s"}')
    again = program(out, tmp_path / "again", "weights")
    assert json.loads((again / "export.json").read_text())["weights"] == "ema"
    card = (again / "README.md").read_text()
    assert "| weights | moving average |" in card
    assert "another model" not in card
    assert not (again / "start.json").exists()


def test_weights_alone_are_the_moving_average_of_a_run_of_all_tokens(averaged: Path, hub: Path, tmp_path: Path):
    """The average is what paints; other layouts refuse a run of all tokens, our own takes it."""
    out = program(averaged, tmp_path / "averaged", "weights")
    (checkpoint,) = list_checkpoints(averaged)
    average = read_file(checkpoint, read_state(checkpoint), "ema")
    assert_same(load_file(out / "model.safetensors"), {name: value.half() for name, value in average.items()})
    every = make_run(tmp_path / "all", hub, hub, more={"tokens": "all"})
    assert load_run(program(every, tmp_path / "small", "weights"), device="cpu").settings.model.tokens == "all"


def test_a_weight_beyond_half_precision_is_told_and_nothing_is_written(loaded: Run, tmp_path: Path):
    """As infinity it would paint nothing, and nobody would know why."""
    weights = {**loaded.model.kept(), "unet.conv_in.bias": torch.full((4,), 7e4)}
    with pytest.raises(InputError, match=r"^1 tensor with numbers beyond .* first unet\.conv_in\.bias; "):
        save_weights(tmp_path, 1, loaded.settings, loaded.identity, weights)
    assert not list(tmp_path.iterdir())
