"""A small VAE of each kind that is taken, with random weights."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from pbe_core.taef2 import Taef2
from pbe_core.vae_kinds import TAEF2_FILES

# Name -> class of diffusers, and its sizes.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "down_block_out_channels": (8, 8, 8, 8),
            "up_block_out_channels": (16, 16, 16, 16),
            "norm_num_groups": 4,
        },
    ),
    "sana": (
        "AutoencoderDC",
        {
            **{f"{side}_block_types": ("ResBlock",) * 4 for side in ("encoder", "decoder")},
            **{f"{side}_block_out_channels": (8, 8, 8, 16) for side in ("encoder", "decoder")},
            **{f"{side}_layers_per_block": (1, 1, 1, 1) for side in ("encoder", "decoder")},
            **{f"{side}_qkv_multiscales": ((),) * 4 for side in ("encoder", "decoder")},
            "latent_channels": 8,
            "scaling_factor": 0.41407,
        },
    ),
    "qwen": (
        "AutoencoderKLQwenImage",
        {
            "base_dim": 8,
            "z_dim": 4,
            "num_res_blocks": 1,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [2.0, 1.5, 2.5, 1.0],
        },
    ),
}
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
    **dict.fromkeys(OTHERS),
}


def make_kind(name: str, folder: Path) -> None:
    """Write a VAE of this kind into a folder."""
    torch.manual_seed(len(name))
    config = KINDS[name]
    if name == "taef2":
        save_taef2(folder)
    elif name in OTHERS:
        kind, sizes = OTHERS[name]
        getattr(diffusers, kind)(**sizes).save_pretrained(folder)
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
