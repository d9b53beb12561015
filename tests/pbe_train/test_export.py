"""Weights out: what goes in comes out bit for bit, diffusers paints the same with it, and nothing else is overwritten."""

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
from pbe_core.errors import InputError
from pbe_core.randomness import name_hash
from pbe_core.vae import load_vae
from pbe_train import PaintByExample
from pbe_train.checkpoints import export as exporting
from pbe_train.checkpoints.diffusers_format import load_diffusers_pipeline
from pbe_train.checkpoints.export import model_card, new_export
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.checkpoints.init_from_pretrained import GUESSED, LoadReport, init_from_pretrained, make_report
from pbe_train.checkpoints.key_mapping import Tensors
from pbe_train.checkpoints.ldm_format import schedule_buffers, vae_config_of
from pbe_train.checkpoints.pretrained import PretrainedModel
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.data.references import fit_reference
from pbe_train.model.paint_model import assemble
from pbe_train.model.pipeline import SamplingSettings
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


@pytest.fixture(scope="module")
def parts() -> Published:
    return make_comparable(make_published(9))


@pytest.fixture(scope="module")
def hub(parts: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("released") / "hub", parts)


@pytest.fixture(scope="module")
def run(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", hub, hub)


def export(monkeypatch: pytest.MonkeyPatch, run: Path, out: Path, form: str, *options: str) -> Path:
    arguments = ["export", "--model", str(run), "--out", str(out), "--format", form, *options]
    monkeypatch.setattr("sys.argv", arguments)
    pbe_train.export.main()
    return out


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def test_released_model_to_run_to_export(hub: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Diffusers' layout in, diffusers' layout out: the same names, shapes and bits in every file of weights."""
    out = export(monkeypatch, run, tmp_path / "exported", "diffusers")
    for name in NETWORKS:
        assert_same(load_file(out / f"{name}.safetensors"), load_file(hub / f"{name}.safetensors"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["image_encoder"] == ["paint_by_example", "PaintByExampleImageEncoder"]
    assert index["safety_checker"] == [None, None]
    vision = json.loads((out / "image_encoder" / "config.json").read_text())
    assert (vision["architectures"], vision["projection_dim"]) == (["PaintByExampleImageEncoder"], 64)
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_original_file_to_run_to_export(suffix: str, parts: Published, hub: Path, tmp_path, monkeypatch):
    """The original layout in and out, but for what is left aside: every tensor, bit for bit."""
    given = original_state(parts)
    write_tensors(tmp_path / "model.safetensors", given)
    run = make_run(tmp_path / "run", hub, tmp_path / "model.safetensors")
    out = export(monkeypatch, run, tmp_path / "exported" / f"own.{suffix}", "ldm")
    found = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)["state_dict"]
    networks = {name: tensor for name, tensor in given.items() if "." in name and not name.startswith("model_ema.")}
    networks |= {"learnable_vector": given["learnable_vector"]}
    assert_same({name: tensor for name, tensor in found.items() if name not in schedule_buffers()}, networks)
    assert found.keys() - networks.keys() == schedule_buffers().keys()
    # And it is a start again.
    settings = TrainSettings.model_validate(
        {
            "dataset": "data",
            "model": {"pretrained": str(out), "encoder": str(out), "vae": str(hub / "vae"), "conditioner_blocks": 1},
        }
    )
    again, report = init_from_pretrained(settings, load_vae(str(hub / "vae")))
    assert torch.equal(again.unet.conv_in.weight, parts.unet.conv_in.weight)
    assert report
    assert report.aside["schedule"] == 12


def test_the_schedule_is_diffusers(hub: Path):
    """Against diffusers' own betas, and the equations between them (Ho et al. 2020)."""
    buffers = schedule_buffers()
    theirs = training_schedule("epsilon")
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
    clean = torch.full((1,), 3.0)  # x_0 = x_t = 3 must stay near 3 under the posterior's mean, where little noise is added.
    mean = buffers["posterior_mean_coef1"][:1] * clean + buffers["posterior_mean_coef2"][:1] * clean
    torch.testing.assert_close(mean, clean)


@pytest.mark.parametrize(("painting", "differs"), [({"reference_geometry": "pad"}, True), (["pad"], False)])
def test_the_report_names_settings_that_differ_from_the_training(painting: object, differs: bool):
    metadata = {"painting": painting, "licence": "mit"}
    source = PretrainedModel("export", "Paint by Example, diffusers layout", {}, {}, metadata=metadata)
    report = make_report(source, [], ModelSettings(encoder="e", vae="v"))
    assert [line.startswith("reference_geometry squash, ") for line in report.otherwise] == [True] * differs
    assert report.licence == "mit"


def test_a_run_is_a_pretrained_model(hub: Path, run: Path, parts: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its averaged weights, where it keeps them; run folder and checkpoint folder alike; encoder and VAE by their hashes."""
    averaged = make_run(tmp_path / "averaged", hub, hub, average=0.5)
    for where in (averaged, averaged / "checkpoints" / "step-00000003"):
        next_run = make_run(tmp_path / f"next{where.name}", hub, where)
        model = load_run(next_run, device="cpu").model
        assert torch.equal(model.unet.conv_in.weight, parts.unet.conv_in.weight + 0.5)
        assert torch.equal(model.conditioner.uncond_vector, parts.encoder.uncond_vector + 0.5)
    report = LoadReport(**json.loads((next_run / "start.json").read_text()))
    assert report.kind == "run of this trainer"
    assert report.licence == "creativeml-openrail-m"  # That of the start's own start.
    (averaged / "start.json").unlink()
    unknown = make_run(tmp_path / "unknown", hub, averaged)
    assert json.loads((unknown / "start.json").read_text())["licence"] is None
    with pytest.raises(InputError, match=r"says epsilon|says v_prediction"):
        make_run(tmp_path / "v", hub, averaged, prediction="v_prediction")
    other = write_hub(tmp_path / "other", make_published(9, seed=5))
    with pytest.raises(InputError, match="its VAE is not the dataset's"):
        make_run(tmp_path / "o", other, averaged)
    mixed = write_hub(tmp_path / "mixed", replace(make_published(9, seed=5), vae=parts.vae))
    with pytest.raises(InputError, match=r"encoder is not model\.encoder.*that of the run"):
        make_run(tmp_path / "m", mixed, averaged)
    damaged = averaged / "checkpoints" / "step-00000003" / "ema.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="the file is damaged"):
        make_run(tmp_path / "d", hub, averaged)


def test_which_weights_are_exported(hub: Path, parts: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The moving average where there is one, unless asked otherwise."""
    averaged = make_run(tmp_path / "run", hub, hub, average=0.5)
    for options, shift in (((), 0.5), (("--weights", "model"), 0.0)):
        out = export(monkeypatch, averaged, tmp_path / "out", "diffusers", *options)
        found = load_file(out / f"{NETWORKS[0]}.safetensors")["conv_out.bias"]
        assert torch.equal(found, parts.unet.conv_out.bias + shift)
    assert "of the last step" in (out / "README.md").read_text()


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return export(monkeypatch, run, out, "diffusers")


def test_diffusers_predicts_the_same_noise(run: Path, exported: Path, parts: Published):
    """Through the one-liner: U-Net and image encoder give what the model gives, and what the released parts gave."""
    pipeline, model = load_diffusers_pipeline(str(exported)), load_run(run, device="cpu").model
    torch.manual_seed(3)
    planes, reference = torch.randn(2, 9, 8, 8), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        condition, nothing = pipeline.image_encoder(reference, return_uncond_vector=True)
        torch.testing.assert_close(model.conditioner(reference), condition)
        torch.testing.assert_close(condition, parts.encoder(reference), rtol=0, atol=0)
        assert torch.equal(model.conditioner.uncond_vector, nothing)
        theirs = pipeline.unet(planes, 500, encoder_hidden_states=condition).sample
        noisy, masked, mask_channel = planes.split([4, 4, 1], dim=1)
        ours = model.predict(noisy, masked, mask_channel, torch.tensor([500, 500]), condition)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler"])
def test_diffusers_paints_the_same_picture(scheduler: str, run: Path, exported: Path):
    """Same photo, mask, reference and noise: the installed diffusers and our own painting agree to a grey level."""
    random = np.random.default_rng(0)
    photo, reference = random.integers(0, 256, (64, 64, 3), np.uint8), random.integers(0, 256, (32, 32, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[8:40, 16:56] = True
    pipeline = load_diffusers_pipeline(str(exported))
    pipeline.set_progress_bar_config(disable=True)
    if scheduler == "DDIMScheduler":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    ours = load_run(run, device="cpu")
    generator = torch.Generator().manual_seed(name_hash("paint", 7, bits=32))
    theirs = pipeline(
        example_image=Image.fromarray(reference),
        image=Image.fromarray(photo),
        mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
        latents=torch.randn((1, 4, 8, 8), generator=generator),
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="np",
    ).images[0]
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels[torch.from_numpy(mask)[None, None].expand_as(pixels)] = 0

    def paint(reference: np.ndarray) -> np.ndarray:
        how = SamplingSettings(5.0, 4, scheduler)
        return ours.paint(ours.encode_pixels(pixels), mask[None], [reference], [7], how)[0] / 255

    assert np.abs(paint(reference) - theirs).max() < 1 / 255
    # What is compared depends on the reference: from another one comes another picture.
    assert np.abs(paint(255 - reference) - theirs).max() > 3 / 255


def test_the_one_liner_loads_the_released_layout(hub: Path, parts: Published, tmp_path: Path, exported: Path):
    """Names of either transformers; and it refuses what is not whole."""
    for number in (4, 5):
        where = write_hub(tmp_path / str(number), parts, transformers=number, vae="old")
        (where / "feature_extractor").mkdir()
        preprocessor = (exported / "feature_extractor" / "preprocessor_config.json").read_bytes()
        (where / "feature_extractor" / "preprocessor_config.json").write_bytes(preprocessor)
        pipeline = load_diffusers_pipeline(str(where))
        found = pipeline.image_encoder.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in parts.encoder.state_dict().items())
    with pytest.raises(InputError, match=r"1 missing \(uncond_vector\)"):
        load_diffusers_pipeline(str(broken_hub(lambda state: state.pop("uncond_vector"), "image_encoder")(tmp_path, parts)))
    with pytest.raises(InputError, match=r"no Paint by Example model in diffusers' layout"):
        load_diffusers_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("form", "network", "change", "cause"),
    [
        ("diffusers", "model", {"tokens": "all"}, "conditions on all tokens"),
        ("ldm", "model", {"tokens": "all"}, "conditions on all tokens"),
        ("diffusers", "model", {"conditioner_blocks": 2}, "has 2 blocks, the pipeline's 1"),
        ("ldm", "settings", {"prediction": "v_prediction"}, "predicts v_prediction"),
        ("ldm", "unet", {"attention_head_dim": 4}, r"attention_head_dim 4, .* read back as 8; .*--format diffusers"),
        ("ldm", "unet", {"norm_num_groups": 16}, r"U-Net has norm_num_groups 16"),
        ("ldm", "unet", {"norm_eps": 1e-6}, r"U-Net has norm_eps 1e-06"),
        ("ldm", "vae", {"norm_num_groups": 8}, r"VAE has norm_num_groups 8"),
        ("ldm", "scale", {"scaling_factor": 0.5}, r"VAE has scaling_factor 0\.5, .* read back as 0\.18215"),
        ("ldm", "encoder", {"num_attention_heads": 2}, r"vision encoder has num_attention_heads 2, .* read back as 1"),
        ("ldm", "encoder", {"hidden_act": "gelu"}, r"vision encoder has hidden_act 'gelu'"),
        ("ldm", "encoder", {"layer_norm_eps": 1e-6}, r"vision encoder has layer_norm_eps"),
    ],
)
def test_runs_that_a_layout_cannot_hold(
    form: str, network: str, change: dict[str, object], cause: str, run: Path, tmp_path: Path
):
    """They would be read back as another model, and nothing would say so."""
    loaded = load_run(run, device="cpu")
    settings, identity = loaded.settings, loaded.identity
    if network == "model":
        settings = settings.model_copy(update={"model": settings.model.model_copy(update=change)})
    elif network == "settings":
        settings = settings.model_copy(update=change)
    elif network == "unet":
        identity = identity.model_copy(update={"unet": {**identity.unet, **change}})
    elif network == "scale":
        identity = identity.model_copy(update=change)
    elif network == "vae":
        loaded.vae.register_to_config(**change)
    else:
        loaded.model.conditioner.model.config.update(change)
    changed = replace(loaded, settings=settings, identity=identity)
    with pytest.raises(InputError, match=cause) as raised:
        exporting.export(changed, run, tmp_path / "out", "model.ckpt", form, "ema")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_takes_the_place_of_an_earlier_one_only(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and no export of this program"):
        export(monkeypatch, run, out, "diffusers")
    (out / "thesis.txt").unlink()
    export(monkeypatch, run, out, "diffusers")
    export(monkeypatch, run, out, "ldm")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json", "model.safetensors"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt is not of the earlier export"):
        export(monkeypatch, run, out, "ldm")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        export(monkeypatch, run, tmp_path / "file", "ldm")
    with pytest.raises(InputError, match=r"writes a folder; give a name without \.ckpt"):
        export(monkeypatch, run, tmp_path / "model.ckpt", "diffusers")


def test_an_export_that_fails_changes_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = export(monkeypatch, run, tmp_path / "out", "diffusers")
    before = {path: path.read_bytes() for path in out.rglob("*.json")}

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(exporting, "model_card", full)
    with pytest.raises(OSError, match="disk full"):
        export(monkeypatch, run, out, "diffusers")
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_export_tidies_up_after_one_that_was_killed(tmp_path: Path):
    """A real process that dies while it writes: the earlier export stands, and the next one leaves nothing else beside it."""
    out = tmp_path / "out"
    with new_export(out, {}) as partial:
        (partial / "weights").write_text("old")
    child = os.fork()
    if not child:
        with new_export(out, {}) as partial:
            (partial / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (out / "weights").read_text() == "old"
    assert len(list(tmp_path.iterdir())) > 1
    with new_export(out, {}) as partial:
        (partial / "weights").write_text("new")
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_card(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What it is, how it was trained and measured, its licence, and how it is loaded; and an unknown licence is called so."""
    (run / "evaluation.json").write_text(json.dumps({"scores": {"agreement": 0.75}}))
    card = (export(monkeypatch, run, tmp_path / "a", "diffusers") / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.library_name, data.license) == ("diffusers", "creativeml-openrail-m")
    assert "{{" not in card
    assert "{%" not in card
    for word in ("CreativeML Open RAIL-M", "`fingerprint`", '"agreement": 0.75', "learning_rate", "DiffusionPipeline", "3 of 64"):
        assert word in card
    assert "load_diffusers_pipeline" in card
    (run / "evaluation.json").unlink()
    report = (run / "start.json").read_bytes()
    (run / "start.json").unlink()
    export(monkeypatch, run, tmp_path / "b" / "own.ckpt", "ldm")
    (run / "start.json").write_bytes(report)
    card = (tmp_path / "b" / "README.md").read_text()
    assert ModelCard(card).data.license == "other"
    assert "Unknown: nothing is recorded" in card
    assert "--ckpt own.ckpt" in card
    assert "No evaluation" in card
    assert "the original code makes 5" in card


@pytest.mark.parametrize(("form", "trained"), [("diffusers", "bilinear"), ("ldm", "nearest")])
def test_the_card_says_what_other_programs_do_otherwise(form: str, trained: str, run: Path):
    loaded = load_run(run, device="cpu")
    cards = {}
    for geometry in ("pad", "squash"):
        for mask in ("nearest", "bilinear"):
            model = loaded.settings.model.model_copy(update={"reference_geometry": geometry, "mask_to_latent": mask})
            changed = replace(loaded, settings=loaded.settings.model_copy(update={"model": model}))
            cards[geometry, mask] = model_card(changed, "model", form, "mine", {}, None)
    assert all((f"this model was trained with `{trained}`" in card) == (mask == trained) for (_, mask), card in cards.items())
    for (geometry, _), card in cards.items():
        assert ("(123, 117, 104)" in card) == (geometry == "pad")
        assert ("as in training" in card) == (geometry == "squash" and form == "diffusers")
    assert ("diffusers 0.36 and transformers 4.57" in card) == (form == "diffusers")
    assert ("Do not load it with diffusers' `from_single_file`" in card) == (form == "ldm")
    # The snippet does what training did: the aspect kept, in the middle, on the encoder's mean colour.
    snippet = cards["pad", "nearest"].partition("## Differences")[2].partition("```python\n")[2].partition("```")[0]
    reference = np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8)
    names: dict[str, object] = {"reference": Image.fromarray(reference)}
    exec("\n".join(line for line in snippet.splitlines() if "open" not in line), names)
    assert np.array_equal(np.asarray(names["reference"]), fit_reference(reference, 32, "pad"))


@pytest.mark.parametrize("form", ["diffusers", "ldm"])
def test_the_licence_of_a_start(form: str, hub: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a published layout it is a guess, and called so, also further on; of an export it is what the export says."""
    assert json.loads((run / "start.json").read_text())["licence_guessed"] is True
    export(monkeypatch, run, tmp_path / "derived", form)
    inside = {"diffusers": "", "ldm": "model.safetensors"}[form]
    again = make_run(tmp_path / "again", hub, tmp_path / "derived" / inside)
    report = LoadReport(**json.loads((again / "start.json").read_text()))
    assert (report.licence, report.licence_guessed) == ("creativeml-openrail-m", True)
    assert f"creativeml-openrail-m{GUESSED}" in report.lines()
    assert GUESSED in (export(monkeypatch, again, tmp_path / "card", form) / "README.md").read_text()
    loaded = load_run(run, device="cpu")
    settings = loaded.settings.model_copy(update={"model": loaded.settings.model.model_copy(update={"pretrained": None})})
    exporting.export(replace(loaded, settings=settings), run, tmp_path / "own", "model.safetensors", form, "ema")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "Trained from scratch: U-Net and conditioner have no base weights" in card
    assert "| start | from scratch |" in card
    report = LoadReport(**json.loads((make_run(tmp_path / "next", hub, tmp_path / "own" / inside) / "start.json").read_text()))
    assert (report.licence, report.licence_guessed) == (None, False)


def test_the_scheduler_is_that_of_the_training(exported: Path, parts: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stable Diffusion's schedule, and what the U-Net of this run predicts: diffusers reads it from the file."""
    hub = write_hub(tmp_path / "hub", parts)
    (hub / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    run = make_run(tmp_path / "run", hub, hub, prediction="v_prediction")
    velocity = export(monkeypatch, run, tmp_path / "out", "diffusers")
    for out, prediction in ((exported, "epsilon"), (velocity, "v_prediction")):
        config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        expected = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
        expected |= {"clip_sample": False, "num_train_timesteps": 1000, "prediction_type": prediction}
        assert {key: config[key] for key in expected} == expected
    assert type(load_diffusers_pipeline(str(velocity)).scheduler) is PNDMScheduler


# --- Painting without a training: the same edit from every layout, and from an export as from its run --------------------------

RANDOM = np.random.default_rng(0)
PHOTO = RANDOM.integers(0, 256, (80, 90, 3), np.uint8)
REFERENCE = RANDOM.integers(0, 256, (30, 50, 3), np.uint8)
MASK = np.zeros((80, 90), bool)
MASK[20:50, 22:57] = True


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
    exporting.export(load_run(run, device="cpu"), run, tmp_path / "exported", "model.safetensors", form, "ema")
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
    exporting.export(replace(loaded, settings=settings, model=model), run, tmp_path / "exported", f"model.{suffix}", "ldm", "ema")
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
    exporting.export(load_run(run, device="cpu"), run, folder, "model.safetensors", form, "ema")
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
