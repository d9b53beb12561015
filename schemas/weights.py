"""The VAE, and its identity: a hash of its weights, so that a dataset and a model can agree on the one they use."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from schemas.dataset import VaeIdentity
from schemas.errors import InputError


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values (as little-endian float32) of all tensors, sorted by name.

    Independent of the file format and of storage in float16 or float32: the same values give the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def load_vae(source: str) -> AutoencoderKL:
    """An AutoencoderKL in float32, in evaluation mode, without gradients.

    Args:
        source: a folder or hub id that holds the VAE itself, or a pipeline with the VAE in its folder `vae`.

    Raises:
        InputError: nothing there that loads.
    """
    errors = []
    for subfolder in ("vae", None):
        if Path(source).is_dir() and not (Path(source) / (subfolder or "") / "config.json").is_file():
            continue
        try:
            vae = AutoencoderKL.from_pretrained(
                source, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
            )
            return vae.eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            errors.append(" ".join(str(error).split())[:200])
    raise InputError(
        f"{source}: no VAE there (neither a folder with AutoencoderKL's config.json nor a hub id); {' / '.join(errors)}"
    )


def identify_vae(vae: AutoencoderKL, source: str) -> VaeIdentity:
    """What `dataset.json` says of a VAE, so that the trainer can tell whether it has the same one."""
    return VaeIdentity(
        source=source,
        sha256=weights_sha256(vae.state_dict()),
        scaling_factor=vae.config.scaling_factor,
        latent_channels=vae.config.latent_channels,
        downsampling=2 ** (len(vae.config.block_out_channels) - 1),
    )
