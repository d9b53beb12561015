"""Latents: views and masked views through the VAE's encoder, loaded once per actor.

Batches are fixed by the settings and the shard, never by the number of workers, so that the bytes do not depend on it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float16, Float32, UInt8

from pipelines.config import LatentSettings
from schemas.weights import load_vae

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Encoder:
    """A VAE on its device, in its precision."""

    vae: AutoencoderKL
    device: torch.device
    dtype: torch.dtype
    threads: int

    @torch.inference_mode()
    def encode(
        self, pictures: Float32[np.ndarray, "batch 3 size size"]
    ) -> Float16[np.ndarray, "batch two_channels height width"]:
        """Posterior of each picture (values in [-1, 1]): mean, then standard deviation, unscaled."""
        torch.set_num_threads(self.threads)  # A setting of the calling thread; sums are ordered by it, so the bytes depend on it.
        pixels = torch.from_numpy(pictures).to(self.device, self.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        packed: np.ndarray = torch.cat([posterior.mean, posterior.std], dim=1).to("cpu", torch.float16).numpy()
        return packed


def load_encoder(settings: LatentSettings, device: str) -> Encoder:
    """Load the VAE onto a device, `cpu` or `cuda`."""
    dtype = _DTYPES[settings.precision]
    vae = load_vae(settings.vae).to(device, dtype, memory_format=torch.channels_last)
    return Encoder(vae, torch.device(device), dtype, settings.threads)


def view_and_masked(
    view: UInt8[np.ndarray, "size size 3"], masks: Bool[np.ndarray, "masks size size"]
) -> Float32[np.ndarray, "pictures 3 size size"]:
    """What the VAE encodes for one sample, in [-1, 1]: the view, then the view with each mask's region set to 0 (mid grey)."""
    picture = np.moveaxis(view.astype(np.float32) / 127.5 - 1, -1, 0)
    return np.concatenate([picture[None], picture * ~masks[:, None]])
