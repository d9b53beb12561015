"""diffusers' PaintByExamplePipeline from a folder, in every version of diffusers and transformers.

From diffusers 0.38 on `DiffusionPipeline.from_pretrained` cannot: the class was moved, and the entry by which `model_index.json`
names the image encoder was lost.
"""

from importlib import import_module
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, PaintByExamplePipeline, UNet2DConditionModel

from pbe_core.errors import InputError
from pbe_core.weight_files import DIFFUSERS_FILES
from pbe_train.checkpoints.diffusers_folder import (
    IMAGE_ENCODER,
    locate_folder,
    locate_image_encoder,
    read_config,
    read_image_encoder,
    read_json,
)
from pbe_train.checkpoints.files import read_weights
from pbe_train.checkpoints.key_mapping import bare_encoder_names, current_vae_names, prefixed, starting_with
from pbe_train.checkpoints.strict_load import fill

# Where diffusers keeps the class: since 0.38, and before.
MODULES = ("diffusers.pipelines.deprecated.paint_by_example.image_encoder", "diffusers.pipelines.paint_by_example.image_encoder")


def load_diffusers_pipeline(source: str, dtype: torch.dtype = torch.float32) -> PaintByExamplePipeline:
    """The pipeline of an export, or of the released model in the same layout, without a safety checker.

    Args:
        source: folder or hub id.
        dtype: of the networks.

    Raises:
        InputError: no such model there, or one that is not whole.
    """
    folder, inside = locate_folder(str(source)), locate_image_encoder(str(source))
    if folder is None or inside is None:
        raise InputError(f"{source}: no Paint by Example model in diffusers' layout; give a folder that holds image_encoder/")
    config, vision, conditioner, _ = read_image_encoder(inside)
    if "proj_out.weight" not in conditioner:
        raise InputError(f"{inside}: proj_out.weight is missing; get the model again")
    encoder = _image_encoder_class()(config, proj_size=conditioner["proj_out.weight"].shape[0]).eval()
    own = encoder.state_dict()
    bare = prefixed("model.", bare_encoder_names(starting_with("model.", own)))
    rest = {name: tensor for name, tensor in own.items() if not name.startswith("model.")}
    fill(bare | rest, prefixed("model.", vision) | conditioner, str(inside), "image encoder")
    unet = UNet2DConditionModel.from_config(read_config(folder / "unet")).eval()
    fill(unet.state_dict(), read_weights(folder / "unet", DIFFUSERS_FILES), str(folder / "unet"), "U-Net")
    vae = AutoencoderKL.from_config(read_config(folder / "vae")).eval()
    fill(vae.state_dict(), current_vae_names(read_weights(folder / "vae", DIFFUSERS_FILES)), str(folder / "vae"), "VAE")
    read_json(folder / "feature_extractor" / "preprocessor_config.json")  # transformers would look for it on the hub.
    return PaintByExamplePipeline(
        vae=vae.to(dtype),
        image_encoder=encoder.to(dtype),
        unet=unet.to(dtype),
        scheduler=_scheduler(read_json(folder / "scheduler" / "scheduler_config.json")),
        safety_checker=None,
        feature_extractor=transformers.CLIPImageProcessor.from_pretrained(str(folder / "feature_extractor")),
    )


def _scheduler(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config.get("_class_name", "PNDMScheduler")).from_config(config)


def _image_encoder_class() -> Any:
    for name in MODULES:
        try:
            return getattr(import_module(name), IMAGE_ENCODER)
        except ModuleNotFoundError:
            continue
    raise InputError(f"diffusers {diffusers.__version__} has no {IMAGE_ENCODER} any more; install a version up to 0.42")
