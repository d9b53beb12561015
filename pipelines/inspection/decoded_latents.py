"""Latents of a dataset as pictures, decoded by the VAE that made them."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float16, UInt8

from pbe_core.errors import InputError
from pbe_core.images.decode import decode_photo
from pbe_core.images.sheets import Picture
from pbe_core.sample_codec import Sample
from pbe_core.vae import load_vae, weights_sha256
from schemas.dataset import DatasetInfo


def load_recorded_vae(info: DatasetInfo, source: str | None = None) -> AutoencoderKL:
    """The VAE that made a dataset's latents.

    Args:
        info: of the dataset.
        source: folder or hub id, where the VAE is not any more where the build had it.

    Raises:
        InputError: it cannot be loaded, or has other weights than the one that made the latents.
    """
    chosen = source or info.vae.source
    try:
        vae = load_vae(chosen)
    except InputError as error:
        raise InputError(f"{error}; give the dataset's VAE with --vae") from None
    found = weights_sha256(vae.state_dict())
    if found != info.vae.sha256:
        raise InputError(
            f"{chosen}: the weights of this VAE have the hash {found[:12]}..., those that made the latents "
            f"{info.vae.sha256[:12]}...; give the dataset's VAE with --vae"
        )
    return vae


@torch.inference_mode()
def decode_means(
    vae: AutoencoderKL, posteriors: Float16[np.ndarray, "pictures two_channels height width"]
) -> list[UInt8[np.ndarray, "size size 3"]]:
    """What the VAE makes of the means of posteriors (mean, then standard deviation; unscaled). RGB, 0-255."""
    means = torch.from_numpy(posteriors[:, : posteriors.shape[1] // 2].astype(np.float32))
    # One at a time: a picture of 512 px takes Stable Diffusion's decoder more than a GB.
    decoded = [vae.decode(mean[None]).sample[0] for mean in means]
    return [((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy() for pixels in decoded]


def views_of(samples: Sequence[Sample], info: DatasetInfo, vae: str | None = None) -> list[Picture]:
    """The view of each sample without its photo: view.jpg where the dataset keeps it, else decoded from its latent.

    Args:
        samples: of one dataset.
        info: of the dataset.
        vae: where its VAE is, if not where the build had it.

    Raises:
        InputError: latents must be decoded, and the VAE is not there or another one.
    """
    decoder = load_recorded_vae(info, vae) if any(sample.view is None for sample in samples) else None
    return [
        decode_means(decoder, sample.latent[None])[0] if sample.view is None else decode_photo(sample.view, frame="stored")
        for sample in samples
    ]
