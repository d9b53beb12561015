"""The networks by their sizes alone: for counting before anything is downloaded, and for measuring with random weights.

Sizes are those of local config files, or built in for what the paper starts from: Stable Diffusion v1-4 and CLIP ViT-L/14.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pbe_train.checkpoints.networks import NO_ENCODER
from pbe_train.checkpoints.sources import read_source
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint
from pbe_train.config import ModelSettings, UNetSettings
from pbe_train.model.paint_model import PaintByExampleModel, assemble, new_unet

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"
# Its networks have the sizes of Stable Diffusion v1-4 and of CLIP, but for the first layer, which is counted as widened anyway.
PAINT_BY_EXAMPLE = "Fantasy-Studio/Paint-by-Example"
CLIP = "openai/clip-vit-large-patch14"
# Radford et al., Learning transferable visual models from natural language supervision (2021), table 20: ViT-L/14 at 224 px.
CLIP_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
# Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), f = 8: 83.7 M parameters.
VAE_SIZES = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def unloaded_model(settings: ModelSettings) -> PaintByExampleModel:
    """The model that the settings ask for with random weights, on torch's default device; on `meta` it takes no memory.

    Raises:
        InputError: a network is neither here nor one whose sizes are known.
    """
    channels = vae_config(settings.vae)["latent_channels"]
    if settings.pretrained:
        config = unet_config(settings.pretrained)
        unet = UNet2DConditionModel.from_config({**config, "in_channels": 2 * config["out_channels"] + 1})
    else:
        unet = new_unet(settings.unet, channels)
    return assemble(settings, unet, CLIPVisionModel(encoder_config(settings.encoder)))


def unloaded_vae(source: str) -> AutoencoderKL:
    """A VAE of these sizes with random weights, on torch's default device."""
    return AutoencoderKL.from_config(vae_config(source)).eval().requires_grad_(False)


def unet_config(source: str) -> dict[str, Any]:
    """The configuration (diffusers) of the U-Net of a start: a folder, file, run, or a hub id that is known here.

    Raises:
        InputError: neither here nor known.
    """
    path = Path(source).expanduser()
    if path.is_file() or locate_checkpoint(path):
        return read_source(source).unet_config
    if source in (STABLE_DIFFUSION, PAINT_BY_EXAMPLE):
        return {**new_unet_config(), "in_channels": 4}
    return _read_config(source, "unet", "model.pretrained", "out_channels", STABLE_DIFFUSION)


def new_unet_config() -> dict[str, Any]:
    """The configuration of Stable Diffusion 1.x's U-Net but for its first layer: that of one from scratch, by default."""
    with torch.device("meta"):
        return dict(new_unet(UNetSettings(), 4).config)


def vae_config(source: str) -> dict[str, Any]:
    """The configuration (diffusers) of a VAE.

    Raises:
        InputError: neither here nor known.
    """
    if source in (STABLE_DIFFUSION, f"{STABLE_DIFFUSION}/vae"):
        return VAE_SIZES
    return _read_config(source, "vae", "model.vae", "latent_channels", f"{STABLE_DIFFUSION}/vae")


def encoder_config(source: str) -> CLIPVisionConfig:
    """The configuration (transformers) of a CLIP vision model.

    Raises:
        InputError: neither here nor known.
    """
    if source in (CLIP, PAINT_BY_EXAMPLE):
        return CLIPVisionConfig(**CLIP_SIZES)
    if Path(source).expanduser().is_file():
        inside = read_source(source).encoder_config
        if inside is None:
            raise InputError(f"{source}: {NO_ENCODER}")
        return inside
    config = _read_config(source, "image_encoder", "model.encoder", "", CLIP)
    # A whole CLIP has its vision model's sizes inside.
    config = config.get("vision_config", config)
    if "hidden_size" not in config:
        raise InputError(f"{source}: its config.json is not that of a CLIP vision model; set model.encoder to one")
    return CLIPVisionConfig.from_dict(config)


def _read_config(source: str, subfolder: str, setting: str, key: str, known: str) -> dict[str, Any]:
    folders = (Path(source).expanduser(), REPOSITORY / source)
    places = (place / "config.json" for folder in folders for place in (folder, folder / subfolder))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(
            f"{source}: no config.json here, and its sizes are not known; set {setting} to a local folder or {known}"
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict) or (key and key not in config):
        raise InputError(f"{path}: not the config of such a network; get the file again, or set {setting} to another folder")
    return config
