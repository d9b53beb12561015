"""The published networks that the trainer starts from: VAE, CLIP vision model, U-Net."""

from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionModel

from schemas.dataset import DatasetInfo
from schemas.errors import InputError
from schemas.weights import load_network, load_vae, weights_sha256


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
    """The CLIP vision model, frozen, in fp32."""
    return load_network(CLIPVisionModel, source, "image_encoder").eval().requires_grad_(False)


def load_unet(source: str) -> UNet2DConditionModel:
    """The U-Net of a Stable Diffusion folder or hub repository."""
    return load_network(UNet2DConditionModel, source, "unet")
