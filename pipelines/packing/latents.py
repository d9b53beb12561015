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

    def encode_samples(
        self, views: UInt8[np.ndarray, "samples size size 3"], masks: Bool[np.ndarray, "samples masks size size"]
    ) -> Float16[np.ndarray, "samples pictures two_channels height width"]:
        """Posteriors of each view, and of the view under each of its masks, the region set to 0 in [-1, 1] (mid grey).

        What goes to the device are bytes; the pictures are made there.
        """
        torch.set_num_threads(self.threads)
        view = torch.from_numpy(views).to(self.device).movedim(-1, 1).to(torch.float32)[:, None] / 127.5 - 1
        kept = ~torch.from_numpy(masks).to(self.device)[:, :, None]
        packed = self.encode(torch.cat([view, view * kept], dim=1).flatten(0, 1))
        return packed.reshape(len(views), 1 + masks.shape[1], *packed.shape[1:])

    @torch.inference_mode()
    def encode(
        self, pictures: Float32[torch.Tensor, "batch 3 size size"]
    ) -> Float16[np.ndarray, "batch two_channels height width"]:
        """Posterior of each picture (values in [-1, 1]): mean, then standard deviation, unscaled."""
        torch.set_num_threads(self.threads)  # A setting of the calling thread; sums are ordered by it, so the bytes depend on it.
        pixels = pictures.to(self.device, self.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        packed: np.ndarray = torch.cat([posterior.mean, posterior.std], dim=1).to("cpu", torch.float16).numpy()
        return packed


def load_encoder(settings: LatentSettings, device: str) -> Encoder:
    """Load the VAE onto a device, `cpu` or `cuda`."""
    dtype = _DTYPES[settings.precision]
    vae = load_vae(settings.vae).to(device, dtype, memory_format=torch.channels_last)
    if settings.compile:
        # Shards end in smaller batches: each size is compiled once, for itself, whatever came before it.
        vae.encoder.compile(dynamic=False)
    return Encoder(vae, torch.device(device), dtype, settings.threads)
