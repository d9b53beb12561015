"""Latents: views and masked views through the VAE's encoder, loaded once per actor.

Batches are fixed by the settings and the shard, never by the number of workers, so that the bytes do not depend on it. A compiled
encoder sees batches of one size alone: torch.compile makes a program for each size, gives up after eight of them, and runs what
comes then uncompiled, so that bytes would depend on what an actor had packed before.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float16, Float32, UInt8

from pbe_core.vae import load_vae
from pipelines.config import LatentSettings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Encoder:
    """A VAE on its device, in its precision."""

    vae: AutoencoderKL
    device: torch.device
    dtype: torch.dtype
    threads: int
    batch_size: int | None = None
    """`latents.batch_size`, where the VAE is compiled: fewer samples are filled up to it, and what that gives is dropped."""

    def encode_samples(
        self, views: UInt8[np.ndarray, "samples size size 3"], masks: Bool[np.ndarray, "samples masks size size"]
    ) -> Float16[np.ndarray, "samples pictures two_channels height width"]:
        """Posteriors of each view, and of the view under each of its masks, the region set to 0 in [-1, 1] (mid grey).

        What goes to the device are bytes; the pictures are made there.
        """
        torch.set_num_threads(self.threads)
        count = len(views)
        if self.batch_size:
            missing = max(0, samples_per_batch(self.batch_size, masks.shape[1]) - count)
            views, masks = (np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) for part in (views, masks))
        view = torch.from_numpy(views).to(self.device).movedim(-1, 1).to(torch.float32)[:, None] / 127.5 - 1
        kept = ~torch.from_numpy(masks).to(self.device)[:, :, None]
        packed = self.encode(torch.cat([view, view * kept], dim=1).flatten(0, 1))
        return packed.reshape(len(views), 1 + masks.shape[1], *packed.shape[1:])[:count]

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


def samples_per_batch(batch_size: int, masks: int) -> int:
    """Samples encoded at once: so many pictures at most, of a view and its masked views each, and one sample at least."""
    return max(1, batch_size // (1 + masks))


def load_encoder(settings: LatentSettings, device: str) -> Encoder:
    """Load the VAE onto a device, `cpu` or `cuda`."""
    dtype = _DTYPES[settings.precision]
    vae = load_vae(settings.vae).to(device, dtype, memory_format=torch.channels_last)
    if settings.compile:
        vae.encoder.compile(dynamic=False)
    return Encoder(vae, torch.device(device), dtype, settings.threads, settings.batch_size if settings.compile else None)
