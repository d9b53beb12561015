"""A trained run as a folder of diffusers' PaintByExamplePipeline.

Written file by file, and not by the libraries: they would write the names of their own version, and these are those of the hub's
released model, which every version reads.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import save_file

from pbe_core.errors import InputError
from pbe_core.weight_files import DIFFUSERS_FILES, TRANSFORMERS_FILES
from pbe_core.words import number_of
from pbe_train.checkpoints.diffusers_folder import IMAGE_ENCODER
from pbe_train.checkpoints.key_mapping import VISION_MODEL, Tensors, count_blocks, prefixed
from pbe_train.checkpoints.metadata import tensors_of
from pbe_train.data.latents import CLIP_MEAN, CLIP_STD
from pbe_train.model.pipeline import Run
from pbe_train.model.schedulers import SCHEDULE, SPACING

# Pillow's number for it, as preprocessor_config.json writes it.
BILINEAR = 2
# The last version whose DiffusionPipeline.from_pretrained knows this pipeline.
WRITTEN_FOR = "0.36.0"


def check_diffusers(run: Run) -> None:
    """Refuse a run that diffusers' pipeline could not paint with.

    Raises:
        InputError: with the reason.
    """
    if run.settings.model.tokens != "class":
        raise InputError(
            "--format diffusers: the run conditions on all tokens of the encoder (model.tokens: all), the pipeline on the class "
            "token alone; such a run paints with pbe_train.sample only"
        )
    layers = run.model.conditioner.model.config.num_hidden_layers
    blocks, theirs = run.settings.model.conditioner_blocks, (layers + 1) // 5
    if blocks != theirs:
        raise InputError(
            f"--format diffusers: the run's conditioner has {number_of(blocks, 'block')}, the pipeline always "
            f"makes {theirs} for an encoder of {number_of(layers, 'layer')}, (layers + 1) // 5; "
            f"--format ldm may hold it, or train with model.conditioner_blocks {theirs}"
        )


def write_diffusers(run: Run, folder: Path) -> None:
    """Write networks, scheduler, preprocessor and model_index.json into an empty folder."""
    parts = tensors_of(run)
    assert count_blocks(parts.conditioner, "mapper.blocks.") == run.settings.model.conditioner_blocks
    encoder = run.model.conditioner.model.config
    width = run.identity.unet["cross_attention_dim"]
    vision = {**encoder.to_dict(), "architectures": [IMAGE_ENCODER], "model_type": "clip_vision_model", "projection_dim": width}
    for own in ("dtype", "torch_dtype", "_name_or_path"):
        vision.pop(own, None)
    vae = {**_without_notes(run.vae.config), "scaling_factor": run.identity.scaling_factor}
    _write_network(folder / "unet", _noted("UNet2DConditionModel", run.identity.unet), parts.unet, DIFFUSERS_FILES[0])
    _write_network(folder / "vae", _noted("AutoencoderKL", vae), parts.vae, DIFFUSERS_FILES[0])
    inside = parts.conditioner | prefixed(f"model.{VISION_MODEL}", parts.encoder)
    _write_network(folder / "image_encoder", vision, inside, TRANSFORMERS_FILES[0])
    schedule = {**SCHEDULE, "timestep_spacing": SPACING, "prediction_type": run.settings.prediction, "trained_betas": None}
    _write_json(folder / "scheduler" / "scheduler_config.json", _noted("PNDMScheduler", schedule))
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", _preprocessor(encoder.image_size))
    _write_json(folder / "model_index.json", _index())


def _preprocessor(size: int) -> dict[str, Any]:
    """How a reference becomes the encoder's input: all of it, squashed to a square, as in training."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": BILINEAR,
        "do_center_crop": False,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def _index() -> dict[str, Any]:
    return {
        "_class_name": "PaintByExamplePipeline",
        "_diffusers_version": WRITTEN_FOR,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["paint_by_example", IMAGE_ENCODER],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _noted(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": diffusers.__version__, **_without_notes(config)}


def _without_notes(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _write_network(folder: Path, config: dict[str, Any], tensors: Tensors, file: str) -> None:
    _write_json(folder / "config.json", config)
    # transformers reads no file that does not say what it was written from.
    save_file(dict(tensors), folder / file, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
