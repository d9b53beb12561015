"""The VAE that made a dataset's latents, and what it makes of them: for programs that show a dataset.

Both functions load PyTorch and diffusers when they are called, which takes seconds.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float16, UInt8

from pbe_core.errors import InputError
from schemas.dataset import DatasetInfo

if TYPE_CHECKING:
    from pbe_core.autoencoder import Autoencoder


def load_recorded_vae(info: DatasetInfo, source: str | None = None) -> "Autoencoder":
    """The VAE that made a dataset's latents, normalising as it did then.

    Args:
        info: of the dataset.
        source: folder or hub id, where the VAE is not any more where the build had it.

    Raises:
        InputError: it cannot be loaded, or has other weights than the one that made the latents.
    """
    from pbe_core.vae import load_vae, weights_sha256

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
    return vae.normalise(info.vae.normalisation)


def decode_means(
    vae: "Autoencoder", posteriors: Float16[np.ndarray, "pictures stored height width"]
) -> list[UInt8[np.ndarray, "view_height view_width 3"]]:
    """What the VAE makes of the means of posteriors (mean, then standard deviation, if any; unscaled). RGB, 0-255."""
    import torch

    means = torch.from_numpy(posteriors[:, : vae.sizes.latent_channels].astype(np.float32))
    with torch.inference_mode():
        # One at a time: a picture of 512 px takes Stable Diffusion's decoder more than a GB.
        decoded = [vae.decode(mean[None])[0] for mean in means]
    return [((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy() for pixels in decoded]
