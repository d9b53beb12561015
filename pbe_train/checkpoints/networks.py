"""The networks that the settings name: VAE and CLIP vision model, which stay as they are, and the model that is trained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.errors import InputError
from pbe_core.vae import load_network, load_vae, weights_sha256
from pbe_train.checkpoints.diffusers_folder import locate_image_encoder, read_image_encoder
from pbe_train.checkpoints.key_mapping import Tensors, bare_encoder_names
from pbe_train.checkpoints.ldm_file import read_original
from pbe_train.checkpoints.strict_load import fill
from pbe_train.config import ModelSettings
from pbe_train.model.paint_model import PaintByExampleModel, assemble, new_unet
from schemas.dataset import DatasetInfo

NO_ENCODER = "no vision encoder here; set model.encoder to a CLIP vision model, or to a Paint by Example model that has one"


def build_model(settings: ModelSettings, latent_channels: int, unet_config: dict[str, Any] | None = None) -> PaintByExampleModel:
    """The model that the settings ask for, with its initial weights from torch's global generator.

    Args:
        settings: which networks; `pretrained` is not read here (`init_from_pretrained` makes the model of a run with a start).
        latent_channels: C of the VAE.
        unet_config: the U-Net's configuration from a checkpoint; null: that of the settings.
    """
    encoder = load_encoder(settings.encoder)
    if unet_config is not None:
        unet = UNet2DConditionModel.from_config(unet_config)
    else:
        unet = new_unet(settings.unet, latent_channels)
    return assemble(settings, unet, encoder)


def load_dataset_vae(source: str, dataset: Path, info: DatasetInfo) -> AutoencoderKL:
    """The VAE, after a check that it is the one that made the dataset's latents.

    Raises:
        InputError: it is another one; a model trained on its latents would paint noise.
    """
    vae = load_vae(source)
    found = weights_sha256(vae.state_dict())
    if found != info.vae.sha256:
        raise InputError(
            f"{dataset / 'dataset.json'}: the latents were made by {info.vae.source} (weights {info.vae.sha256[:12]}), but "
            f"model.vae is {source} (weights {found[:12]}); set model.vae to that VAE, or build the dataset again with this one"
        )
    return vae


def load_encoder(source: str) -> CLIPVisionModel:
    """The CLIP vision model, frozen, in fp32.

    Args:
        source: a CLIP vision model, as `load_network` finds it, or a whole Paint by Example model in diffusers' or the original
            layout, of which it is the vision encoder.

    Raises:
        InputError: nothing of that kind, or an incomplete one.
    """
    inside = _encoder_inside(source)
    if inside is None:
        encoder: CLIPVisionModel = load_network(CLIPVisionModel, source, "image_encoder")
    else:
        # Its random weights are all replaced; they must not take numbers from the generator that what is new is drawn from.
        with torch.random.fork_rng(devices=[]):
            encoder = CLIPVisionModel(inside[0])
        fill(bare_encoder_names(encoder.state_dict()), inside[1], source, "vision encoder")
    return encoder.eval().requires_grad_(False)


def _encoder_inside(source: str) -> tuple[CLIPVisionConfig, Tensors] | None:
    """Sizes and tensors (bare names) of the vision encoder inside a Paint by Example model; null where the source is none."""
    path = Path(source).expanduser()
    if path.is_file():
        whole = read_original(path)
        if whole.encoder_config is None or whole.encoder is None:
            raise InputError(f"{source}: {NO_ENCODER}")
        return whole.encoder_config, whole.encoder
    folder = locate_image_encoder(source)
    return read_image_encoder(folder)[:2] if folder else None
