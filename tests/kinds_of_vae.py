"""A small VAE of each kind that is taken, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from pbe_core.taef2 import Taef2
from pbe_core.vae_kinds import TAEF2_FILES

# Name -> how an AutoencoderKL is told apart; null: another class.
KINDS: dict[str, dict[str, Any] | None] = {
    "4": {"latent_channels": 4},
    "8 shifted": {"latent_channels": 8, "shift_factor": 0.5},
    "16 by channel": {
        "latent_channels": 16,
        "latents_mean": [0.1 * channel for channel in range(16)],
        "latents_std": [0.5 + 0.1 * channel for channel in range(16)],
    },
    # As SD3's and FLUX's, which do without.
    "32 shifted, bare": {"latent_channels": 32, "shift_factor": -0.25, "use_quant_conv": False, "use_post_quant_conv": False},
    "tiny": None,
    "taef2": None,
}


def make_kind(name: str, folder: Path) -> None:
    """Write a VAE of this kind into a folder."""
    torch.manual_seed(len(name))
    config = KINDS[name]
    if name == "taef2":
        save_taef2(folder)
    elif config is None:
        widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
        AutoencoderTiny(**widths, latent_channels=8, scaling_factor=1.5, shift_factor=0.0).save_pretrained(folder)
    else:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        sizes = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "scaling_factor": 0.7}
        AutoencoderKL(**blocks, **sizes, **config).save_pretrained(folder)


def save_taef2(folder: Path) -> None:
    """TAEF2 as its author publishes it: two files, in half precision."""
    model = Taef2()
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in zip(TAEF2_FILES, (model.encoder, model.decoder), strict=True):
        save_file({key: tensor.half().contiguous() for key, tensor in network.state_dict().items()}, folder / name)
