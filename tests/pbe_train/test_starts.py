"""Starts of other lines than Stable Diffusion 1.x, in folders that diffusers wrote: they predict what they did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError
from pbe_core.randomness import name_hash
from pbe_train.checkpoints import export as exporting
from pbe_train.checkpoints.diffusers_format import load_diffusers_pipeline
from pbe_train.checkpoints.from_pretrained import init_from_pretrained, load_model, load_run
from pbe_train.checkpoints.load_report import LoadReport
from pbe_train.checkpoints.networks import read_pretrained, unet_config, unloaded_model
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.data.latents import to_mask_channel
from pbe_train.model.paint_model import PaintByExampleModel, parameters_without_effect
from pbe_train.model.pipeline import SamplingSettings
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pbe_train.training.flops import step_flops
from tests.pbe_train.published import (
    Published,
    make_comparable,
    make_published,
    make_run,
    original_unet,
    original_vae,
    write_hub,
    write_network,
    write_tensors,
)
from tests.pbe_train.small_world import World

WIDTH = 48
"""Of a word's vector in the models below; 1.x has 64 here."""
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
# What tells the lines apart, as their own config.json have it, in smaller numbers.
LINES: dict[str, dict[str, Any]] = {
    "1": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8, "cross_attention_dim": WIDTH, **BLOCKS},
    "2": {
        "block_out_channels": (64, 64, 128, 128),
        "attention_head_dim": (1, 1, 2, 2),
        "cross_attention_dim": WIDTH,
        "use_linear_projection": True,
        "upcast_attention": True,
        **BLOCKS,
    },
    "XL": {
        "block_out_channels": (64, 128, 128),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": WIDTH,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 20,
        "sample_size": 128,
    },
}
PIPELINES: dict[tuple[str, bool], type[DiffusionPipeline]] = {
    ("1", False): StableDiffusionPipeline,
    ("1", True): StableDiffusionInpaintPipeline,
    ("2", False): StableDiffusionPipeline,
    ("2", True): StableDiffusionInpaintPipeline,
    ("XL", False): StableDiffusionXLPipeline,
    ("XL", True): StableDiffusionXLInpaintPipeline,
}


class Start(NamedTuple):
    """A start of another line, and its folder as diffusers wrote it."""

    folder: Path
    unet: UNet2DConditionModel
    line: str
    inpainting: bool

    def predict(self, noisy: Tensor, masked: Tensor, keep: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """What its U-Net says in its own program, of the inputs that ours takes."""
        seen = torch.cat([noisy, 1 - keep, masked], dim=1) if self.inpainting else noisy
        added = None
        if self.line == "XL":  # No words, and pictures as it was trained with: 8 px a cell, not cut.
            side = 8 * self.unet.config.sample_size
            sizes = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(noisy), 1)
            added = {"text_embeds": torch.zeros(len(noisy), 20), "time_ids": sizes}
        return self.unet(seen, time, encoder_hidden_states=condition, added_cond_kwargs=added).sample


@pytest.fixture(scope="module")
def parts() -> Published:
    return make_comparable(make_published(9))


@pytest.fixture(scope="module")
def hub(parts: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where VAE and vision encoder are from."""
    return write_hub(tmp_path_factory.mktemp("released") / "hub", parts)


def make_start(folder: Path, line: str, inpainting: bool, vae: AutoencoderKL, prediction: str = "epsilon") -> Start:
    torch.manual_seed(3)
    sizes = {"in_channels": 9 if inpainting else 4, "out_channels": 4, "layers_per_block": 1, "sample_size": 8}
    unet = UNet2DConditionModel(**{**sizes, **LINES[line]}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    words = {"vocab_size": 4, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = CLIPTextModel(CLIPTextConfig(**words, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}, merges=[])
    more: dict[str, Any] = {"text_encoder": text, "tokenizer": tokenizer}
    more |= dict.fromkeys(("text_encoder_2", "tokenizer_2") if line == "XL" else ("safety_checker", "feature_extractor"))
    if line != "XL":
        more["requires_safety_checker"] = False
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        skip_prk_steps=True,
        steps_offset=1,
    )
    PIPELINES[line, inpainting](vae=vae, unet=unet, scheduler=scheduler, **more).save_pretrained(folder)
    return Start(folder, unet, line, inpainting)


@pytest.fixture(scope="module")
def starts(parts: Published, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Start]:
    """Line and kind -> a start, made once; that of 2 predicts the velocity."""
    made: dict[tuple[str, bool], Start] = {}

    def get(line: str, inpainting: bool) -> Start:
        if (line, inpainting) not in made:
            folder = tmp_path_factory.mktemp("start") / f"{line}-{inpainting}"
            made[line, inpainting] = make_start(folder, line, inpainting, parts.vae, prediction_of(line, inpainting))
        return made[line, inpainting]

    return get


def prediction_of(line: str, inpainting: bool) -> str:
    return "v_prediction" if line == "2" and not inpainting else "epsilon"


def settings_of(hub: Path, where: Path | str, prediction: str = "epsilon", **model: object) -> TrainSettings:
    usual = {"encoder": str(hub), "vae": str(hub / "vae"), "conditioner_blocks": 1}
    values = {"dataset": "none", "prediction": prediction, "model": {"pretrained": str(where), **usual, **model}}
    return TrainSettings.model_validate(values)


def begin(hub: Path, vae: AutoencoderKL, where: Path, **settings: Any) -> tuple[PaintByExampleModel, LoadReport]:
    model, report = init_from_pretrained(settings_of(hub, where, **settings), Autoencoder(vae))
    assert report
    return model.eval(), report


def inputs(tokens: int = 1) -> tuple[Tensor, ...]:
    """Noisy latent, masked latent, 1 - mask with a mask that reaches two borders, times, condition."""
    generator = torch.Generator().manual_seed(1)
    noisy, masked = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4, 3:], mask[1, :, 2:6, 2:6] = 1, 0.25
    return noisy, masked, 1 - mask, torch.tensor([7, 800]), torch.randn(2, tokens, WIDTH, generator=generator)


ALL = [(line, inpainting) for line in LINES for inpainting in (False, True)]


# --- What is predicted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "inpainting"), ALL)
def test_it_predicts_what_it_did(line: str, inpainting: bool, starts, hub: Path, parts: Published):
    """The same inputs in diffusers' own U-Net and in ours: <= 1e-5, at the borders, too; with or without the shortcut."""
    start = starts(line, inpainting)
    for shortcut in (True, False):
        prediction = prediction_of(line, inpainting)
        model, report = begin(hub, parts.vae, start.folder, prediction=prediction, one_token_shortcut=shortcut)
        with torch.no_grad():
            ours, theirs = model.predict(*inputs()), start.predict(*inputs())
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() <= 1e-5
    name = "Stable Diffusion" + {"1": "", "2": " 2", "XL": " XL"}[line] + (" inpainting" if inpainting else "")
    assert report.kind == f"{name}, diffusers layout"
    assert report.licence == ("creativeml-openrail-m" if line == "1" else "openrail++")
    assert report.licence_guessed
    assert report.new[1] == "the conditioner, at random"
    assert ("put in order" in report.new[0]) == inpainting
    assert any("mask_to_latent bilinear, where it was trained with nearest" in line for line in report.otherwise) == inpainting
    with torch.no_grad():  # The new conditioner has the width of its words.
        assert model.conditioner(torch.zeros(1, 3, 32, 32)).shape == (1, 1, WIDTH)


def test_a_mask_is_turned_within_the_weights_where_that_is_asked_for(starts, hub: Path, parts: Published):
    """By the other sign and another bias: the same first layer but in the outermost cells, where no weights can be right."""
    start = starts("1", True)
    exact, _ = begin(hub, parts.vae, start.folder)
    model, report = begin(hub, parts.vae, start.folder, mask_channel="keep")
    assert (exact.mask_channel, model.mask_channel) == ("repaint", "keep")
    assert "the outermost latent cells" in report.new[-1]
    noisy, masked, keep, *_ = inputs()
    with torch.no_grad():
        expected = exact.unet.conv_in(torch.cat([noisy, masked, 1 - keep], dim=1))
        difference = (model.unet.conv_in(torch.cat([noisy, masked, keep], dim=1)) - expected).abs()
    assert difference[..., 1:-1, 1:-1].max() <= 1e-6
    assert difference[..., 0, :].max() > 1e-2


def test_masks_and_masked_views_as_its_own_pipeline_has_them(starts, parts: Published):
    """As diffusers binarises masks at 0.5, shrinks them by nearest, and sets what is masked to grey, so does training here."""
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(starts("1", True).folder, safety_checker=None)
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 11:40, 13:] = True
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    seen = pipeline.mask_processor.preprocess(Image.fromarray(mask[0]), height=64, width=64)
    grey = pipeline.image_processor.preprocess(photo, height=64, width=64) * (seen < 0.5)
    theirs, _ = pipeline.prepare_mask_latents(seen, grey, 1, 64, 64, torch.float32, torch.device("cpu"), None, False)
    assert torch.equal(theirs, 1 - to_mask_channel(mask, 8, "nearest"))
    assert grey[:, :, 20, 20].abs().max() == 0


# --- Through a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(starts, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began from an inpainting model."""
    where = starts("1", True).folder
    return make_run(tmp_path_factory.mktemp("run") / "run", hub, where, more={"mask_to_latent": "nearest"})


def test_a_run_keeps_what_its_mask_means(run: Path, starts, parts: Published, hub: Path, tmp_path: Path):
    """Saved and loaded, exported as weights, and as a start; a checkpoint of old says nothing and means 1 = keep."""
    state = json.loads(next((run / "checkpoints").glob("*/state.json")).read_text())
    assert state["identity"]["mask_channel"] == "repaint"
    loaded = load_run(run, device="cpu")
    exporting.export(loaded, run, tmp_path / "weights", "", "weights", "model")
    with torch.no_grad():
        expected = starts("1", True).predict(*inputs())
        for place, model, error in (
            ("run", loaded.model, 1e-5),
            ("weights, which are of half precision", load_run(tmp_path / "weights", device="cpu").model, 0.02),
            ("run as a start", begin(hub, parts.vae, run)[0], 1e-5),
            ("weights as a start", begin(hub, parts.vae, tmp_path / "weights")[0], 0.02),
        ):
            assert (model.predict(*inputs()) - expected).abs().max() <= error, place
            model.mask_channel = "keep"
            assert (model.predict(*inputs()) - expected).abs().max() > 0.1, place
    old = json.loads(next((make_run(tmp_path / "old", hub, hub) / "checkpoints").glob("*/state.json")).read_text())
    assert "mask_channel" not in old["identity"]


def test_a_training_begins_and_goes_on(starts, world: World, tmp_path: Path):
    """The real loop from an inpainting model: one step and another one later come to the weights of two."""
    start = starts("1", True)
    folder = shutil.copytree(start.folder, tmp_path / "start")
    shutil.rmtree(folder / "vae")
    shutil.copytree(world.vae, folder / "vae")
    options = (f"--model.pretrained={folder}", "--global_batch=2", "--model.mask_to_latent=nearest", "--pictures.every=0")
    options += ("--validation.every=0", "--loader.workers=0")
    one = Distributed(0, 1, torch.device("cpu"))
    for out, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        train(world.settings(tmp_path / out, *options, f"--steps={steps}"), one)
    whole, parts = (load_run(tmp_path / out, device="cpu") for out in ("whole", "parts"))
    assert whole.model.mask_channel == parts.model.mask_channel == parts.identity.mask_channel == "repaint"
    for name, tensor in whole.model.kept().items():
        assert torch.equal(tensor, parts.model.kept()[name]), name


def test_a_lora_beside_a_base_whose_mask_is_turned(world: World, starts, tmp_path: Path):
    """It is painted with, and is a start, beside the base as it was trained beside: turned. And the report says that it was."""
    start = starts("1", True)
    folder = shutil.copytree(start.folder, tmp_path / "start")
    shutil.rmtree(folder / "vae")
    shutil.copytree(world.vae, folder / "vae")
    options = ("--global_batch=2", "--model.mask_to_latent=nearest", "--pictures.every=0", "--validation.every=0")
    options += ("--loader.workers=0", "--steps=1")
    one = Distributed(0, 1, torch.device("cpu"))
    train(world.settings(tmp_path / "base", *options, f"--model.pretrained={folder}"), one)
    beside = (f"--model.pretrained={tmp_path / 'base'}", "--model.mask_channel=keep", "--lora.rank=2")
    train(world.settings(tmp_path / "lora", *options, *beside), one)
    base, loaded = load_run(tmp_path / "base", device="cpu"), load_run(tmp_path / "lora", device="cpu")
    assert (base.model.mask_channel, loaded.model.mask_channel) == ("repaint", "keep")
    assert torch.equal(loaded.model.unet.conv_in.weight[:, -1], -base.model.unet.conv_in.weight[:, -1])
    new = json.loads((tmp_path / "lora" / "start.json").read_text())["new"]
    assert ["1 means keep" in new[0], "a LoRA of rank 2" in new[1]] == [True, True]


def test_a_model_that_paints_by_words_does_not_paint_here(starts):
    with pytest.raises(InputError, match="a Stable Diffusion 2 inpainting model, which paints by words; train it first"):
        load_model(starts("2", True).folder, device="cpu")


def test_it_paints_what_diffusers_paints(run: Path, starts, parts: Published):
    """The inpainting pipeline of diffusers, shown our reference's token in the place of words: the same picture."""
    loaded = load_run(run, device="cpu")
    view = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 11:40, 13:] = True
    reference = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    pixels = torch.from_numpy(view.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None] * ~torch.from_numpy(mask)[:, None]
    masked = loaded.encode_pixels(pixels)
    ours = loaded.paint(masked, mask, [reference], [5], SamplingSettings(3.0, 8, "DDIMScheduler"))[0]

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(starts("1", True).folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    pipeline.scheduler.register_to_config(set_alpha_to_one=False, steps_offset=1)
    generator = torch.Generator().manual_seed(name_hash("paint", 5, bits=32))
    theirs = pipeline(
        prompt_embeds=loaded.condition([reference]),
        negative_prompt_embeds=loaded.model.conditioner.uncond_vector.detach(),
        image=Image.fromarray(view),
        mask_image=Image.fromarray(mask[0]),
        height=64,
        width=64,
        strength=1.0,
        latents=torch.randn(1, 4, 8, 8, generator=generator),
        guidance_scale=3.0,
        num_inference_steps=8,
        output_type="np",
    ).images[0]
    assert ours.std() > 5
    assert np.abs(theirs * 255 - ours).max() <= 1


def test_what_no_other_program_could_paint_with_is_not_exported(run: Path, hub: Path, tmp_path: Path):
    for form in ("diffusers", "ldm"):
        with pytest.raises(
            InputError, match=r"sees 1 where it repaints; .*--format weights holds it.*--model\.mask_channel keep"
        ):
            exporting.export(load_run(run, device="cpu"), run, tmp_path / form, "model.ckpt", form, "model")
        assert not (tmp_path / form).exists()
    next_run = make_run(tmp_path / "next", hub, run, more={"mask_channel": "keep"})
    exporting.export(load_run(next_run, device="cpu"), next_run, tmp_path / "out", "", "diffusers", "model")
    assert read_pretrained(str(tmp_path / "out")).mask_channel == "keep"


@pytest.mark.parametrize("line", ["2", "XL"])
def test_other_lines_are_exported_as_paint_by_example(line: str, starts, hub: Path, tmp_path: Path):
    """PaintByExamplePipeline of diffusers has the U-Net of this size, and paints; what it predicts goes into the scheduler."""
    start, prediction = starts(line, False), prediction_of(line, False)
    run = make_run(tmp_path / "run", hub, start.folder, prediction=prediction, more={"reference_geometry": "squash"})
    loaded = load_run(run, device="cpu")
    exporting.export(loaded, run, tmp_path / "out", "", "diffusers", "model")
    pipeline = load_diffusers_pipeline(str(tmp_path / "out"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == prediction
    noisy, masked, keep, time, condition = inputs()
    with torch.no_grad():
        theirs = pipeline.unet(torch.cat([noisy, masked, keep], dim=1), time, encoder_hidden_states=condition).sample
        assert (loaded.model.predict(noisy, masked, keep, time, condition) - theirs).abs().max() <= 1e-5
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.fromarray(np.eye(64, dtype=bool))
    shown = pipeline(image=photo, mask_image=mask, example_image=photo, num_inference_steps=2, height=64, width=64)
    assert shown.images[0].size == (64, 64)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: openrail++" in card
    assert "2.x or XL" in card
    assert "Open RAIL++-M" in card
    again = read_pretrained(str(tmp_path / "out"))
    assert (again.kind, again.prediction, again.metadata["licence"]) == (
        "Paint by Example, diffusers layout",
        prediction,
        "openrail++",
    )
    with pytest.raises(InputError, match="original code"):
        exporting.export(loaded, run, tmp_path / "ldm", "model.ckpt", "ldm", "model")


# --- Original files -----------------------------------------------------------------------------------------------------------


def write_original(path: Path, start: Start, vae: AutoencoderKL) -> Path:
    """As the programs of that time left it: U-Net, VAE, and a text encoder under the names of its line."""
    name = {
        "1": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "2": "cond_stage_model.model.ln_final.weight",
        "XL": "conditioner.embedders.1.model.ln_final.weight",
    }[start.line]
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in original_unet(start.unet).items()}
    state |= {f"first_stage_model.{key}": tensor for key, tensor in original_vae(vae).items()}
    if start.line == "XL":
        for number, layer in ((0, start.unet.add_embedding.linear_1), (2, start.unet.add_embedding.linear_2)):
            state |= {f"model.diffusion_model.label_emb.0.{number}.{kind}": t for kind, t in layer.state_dict().items()}
    write_tensors(path, state | {name: torch.rand(8)})
    return path


@pytest.mark.parametrize(("line", "inpainting"), [("1", True), ("2", False), ("2", True), ("XL", False), ("XL", True)])
def test_original_files(line: str, inpainting: bool, starts, hub: Path, parts: Published, tmp_path: Path):
    """sd-v1-5-inpainting.ckpt, v2-1_768-ema-pruned.ckpt, sd_xl_base_1.0.safetensors and their kin: the same prediction."""
    start = starts(line, inpainting)
    where = write_original(tmp_path / "model.ckpt", start, parts.vae)
    prediction = prediction_of(line, inpainting)
    model, report = begin(hub, parts.vae, where, prediction=prediction)
    with torch.no_grad():
        assert (model.predict(*inputs()) - start.predict(*inputs())).abs().max() <= 1e-5
    name = {"1": "", "2": " 2", "XL": " XL"}[line] + (" inpainting" if inpainting else "")
    assert report.kind == f"Stable Diffusion{name}, original layout"
    # What it predicts, no file of the later lines says.
    assert any("prediction as the settings say" in said for said in report.otherwise) == (line != "1")
    sizes = ("block_out_channels", "layers_per_block", "cross_attention_dim", "use_linear_projection", "in_channels")
    found = unet_config(str(where))
    assert [plain(found[name]) for name in sizes] == [plain(start.unet.config[name]) for name in sizes]


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- Refused ------------------------------------------------------------------------------------------------------------------


def changed(start: Start, folder: Path, part: str = "unet", **changes: object) -> Path:
    """A copy whose configuration says something else."""
    shutil.copytree(start.folder, folder)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


REFUSED: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "another prediction": ("2", True, {"prediction": "v_prediction"}, "predicts epsilon, .*set it to epsilon"),
    "heads of three levels": ("2", True, {"attention_head_dim": [1, 1, 2]}, "no U-Net can be made of its configuration"),
    "an upscaler": ("2", True, {"num_class_embeds": 1000}, r"not of Stable Diffusion's kind \(num_class_embeds is 1000"),
    "a refiner": ("XL", False, {"cross_attention_dim": 276}, "refiner of Stable Diffusion XL"),
    "sizes that do not add up": ("XL", False, {"addition_time_embed_dim": 260}, "addition_time_embed_dim 260 and .* 1556"),
    "pictures as words": ("XL", False, {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
    "words of several widths": ("2", True, {"cross_attention_dim": [48, 48]}, "and not one number"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused(fault: str, starts, hub: Path, parts: Published, tmp_path: Path):
    line, inpainting, changes, cause = REFUSED[fault]
    settings = {"prediction": changes.pop("prediction")} if "prediction" in changes else {}
    where = changed(starts(line, inpainting), tmp_path / "start", **changes)
    with pytest.raises(InputError, match=cause) as raised:
        begin(hub, parts.vae, where, **settings)
    assert "\n" not in str(raised.value)


def test_nine_channels_that_nothing_tells_the_order_of(starts, hub: Path, parts: Published, tmp_path: Path):
    """A U-Net alone may be Paint by Example's: it is taken where the folder above, or what lies beside it, says which."""
    start = starts("1", True)
    config = json.loads((start.folder / "unet" / "config.json").read_text())
    write_network(tmp_path / "alone", start.unet, config, file="diffusion_pytorch_model.safetensors")
    write_network(tmp_path / "of paint by example" / "unet", parts.unet, config, file="diffusion_pytorch_model.safetensors")
    (tmp_path / "of paint by example" / "model_index.json").write_text('{"_class_name": "PaintByExamplePipeline"}')
    for where in (tmp_path / "alone", tmp_path / "of paint by example", tmp_path / "of paint by example" / "unet"):
        with pytest.raises(InputError, match=r"9 input channels: .*nothing here says which it is"):
            begin(hub, parts.vae, where)
    shutil.rmtree(tmp_path / "alone")
    shutil.copytree(start.folder, tmp_path / "bare", ignore=lambda _, names: [name for name in names if "text" in name])
    for where in (start.folder / "unet", tmp_path / "bare"):
        assert begin(hub, parts.vae, where)[0].mask_channel == "repaint"


def test_a_transformer_is_refused_by_name(hub: Path, parts: Published, tmp_path: Path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(InputError, match="its network is a transformer"):
        begin(hub, parts.vae, tmp_path)


def test_another_noise_schedule_is_said(starts, hub: Path, parts: Published, tmp_path: Path):
    where = changed(starts("2", True), tmp_path / "start", "scheduler", beta_start=0.0001)
    _, report = begin(hub, parts.vae, where)
    assert any("beta_start of the noise schedule 0.00085, where it was trained with 0.0001" in line for line in report.otherwise)


# --- Sizes alone --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As their makers give them, and 5 more input channels of 9 weights for each of 320.
        ("stabilityai/stable-diffusion-2-1", 865_910_724 + 320 * 5 * 9),
        ("stable-diffusion-v1-5/stable-diffusion-inpainting", 859_535_364),
        # Less the 2 layers that are folded away: 2816 -> 1280 -> 1280.
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684 - (2816 + 1 + 1280 + 1) * 1280 + 320 * 5 * 9),
    ],
)
def test_sizes_that_are_known_by_name(name: str, parameters: int):
    """`pbe cost` counts them without a file."""
    settings = ModelSettings(pretrained=name, encoder="openai/clip-vit-large-patch14", vae=name)
    with torch.device("meta"):
        model = unloaded_model(settings)
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == parameters


def test_costs_are_counted_of_a_folder(starts, hub: Path):
    """As its U-Net becomes; parameters without effect are those of attention to the one token, in every block of a level."""
    folder = str(starts("XL", True).folder)
    settings = ModelSettings(pretrained=folder, encoder=str(hub), vae=str(hub / "vae"), conditioner_blocks=1)
    with torch.device("meta"):
        model = unloaded_model(settings)
    assert model.conditioner.proj_out.out_features == WIDTH
    idle = {id(parameter) for parameter in parameters_without_effect(model.unet, model.conditioner.mapper)}
    named = {name for name, parameter in model.unet.named_parameters() if id(parameter) in idle}
    assert named == {
        name
        for name, _ in model.unet.named_parameters()
        if any(part in name for part in (".norm2.", ".attn2.to_q", ".attn2.to_k")) and ".transformer_blocks." in name
    }
    assert step_flops(settings, 8).unet_forward > 0
