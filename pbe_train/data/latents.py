"""Small conversions between what a shard holds and what the networks take: latents, masks, references, pixels."""

import functools

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from pbe_train.config import MaskMode

# Normalisation of CLIP's pictures: per-channel mean and standard deviation of RGB in [0, 1] (Radford et al., 2021, code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_mask_channel(
    masks: Bool[np.ndarray, "batch height width"], cells: int | tuple[int, int], mode: MaskMode
) -> Float[Tensor, "batch 1 rows columns"]:
    """Masks at view size, True = repaint -> the U-Net's mask channel at latent resolution, 1 - mask, as published.

    `bilinear` has no antialias: at a factor of 8 a cell sees the 2 x 2 px at its centre (as published). `nearest` sees the one px
    at its top left (as in diffusers). They differ in about one masked cell of nine: use a model with what it was trained on.
    `cells` is the latent's rows and columns; one number is the side of a square.
    """
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    height, width = masks.shape[-2:]
    if height % rows == width % columns == 0 and height // rows == width // columns and width // columns % 2 == 0:
        # The same numbers from the few px that count, without making floats of all: 1, 3/4, 1/2, 1/4 and 0 are exact.
        step, middle = width // columns, width // columns // 2
        if mode == "nearest":
            shrunk = masks[:, ::step, ::step].astype(np.float32)
        else:
            # Columns first: they lie adjacent in masks that were decoded from RLE.
            pairs = masks[:, :, middle - 1 :: step].astype(np.uint8) + masks[:, :, middle::step]
            shrunk = (pairs[:, middle - 1 :: step] + pairs[:, middle::step]) * np.float32(0.25)
        return torch.from_numpy(1 - shrunk[:, None])
    inverted = torch.from_numpy(~masks)[:, None].float()
    return interpolate(inverted, size=(rows, columns), mode=mode, align_corners=False if mode == "bilinear" else None)


def draw_posterior(
    posterior: Float16[np.ndarray, "stored height width"],
    noise: Float32[np.ndarray, "channels height width"],
    scale: float,
) -> None:
    """Turn standard normal noise, in place, into a draw from a VAE posterior (mean and standard deviation, stacked).

    The draw is scaled for the diffusion model: (mean + deviation * noise) * scale. A deterministic VAE has the mean alone.
    """
    # PyTorch turns float16 into float32 many at a time, numpy one by one.
    values, drawn = torch.from_numpy(posterior).float(), torch.from_numpy(noise)
    if len(posterior) == len(noise):
        drawn.copy_(values)
    else:
        mean, deviation = values.chunk(2)
        drawn.mul_(deviation).add_(mean)
    drawn.mul_(scale)


def posterior_mean(
    posteriors: Float16[np.ndarray, "batch stored height width"], channels: int, scale: float
) -> Float[Tensor, "batch {channels} height width"]:
    """The means of VAE posteriors, scaled for the diffusion model."""
    return torch.from_numpy(posteriors[:, :channels].astype(np.float32) * np.float32(scale))


def normalise_reference(references: UInt8[Tensor, "batch size size 3"]) -> Float[Tensor, "batch 3 size size"]:
    """RGB, 0-255, channels last -> what CLIP's vision models take."""
    mean, deviation = _clip_statistics(references.device)
    return (references.permute(0, 3, 1, 2).float() / 255 - mean) / deviation


@functools.cache
def _clip_statistics(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    # Once: a step that copied them to a GPU would wait for all that the GPU still has to do.
    return torch.tensor(CLIP_MEAN, device=device)[:, None, None], torch.tensor(CLIP_STD, device=device)[:, None, None]


def to_tensor(pictures: UInt8[np.ndarray, "batch height width 3"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Channels last -> channels first."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def to_pictures(pixels: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    """RGB in [-1, 1], channels first -> 0-255, channels last; values outside are clipped."""
    scaled = (pixels.float().cpu() * 127.5 + 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
