"""The kinds of VAE that are taken, and what the files of one say before it is loaded: without PyTorch, which takes seconds.

AutoencoderKL             diffusers; any number of channels, shift_factor, latents_mean and latents_std, quant_conv or none
AsymmetricAutoencoderKL   diffusers; its decoder without the mask and picture that it may be shown as well
AutoencoderKLQwenImage    diffusers; of films, here of a single frame
AutoencoderTiny           diffusers (TAESD and its kin); deterministic
AutoencoderDC             diffusers (SANA's); deterministic
TAEF2                     its author's two files of weights, `pbe_core.taef2`; deterministic
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from schemas.dataset import Normalisation

AUTOENCODER_KL, AUTOENCODER_TINY, TAEF2 = "AutoencoderKL", "AutoencoderTiny", "TAEF2"
AUTOENCODER_DC, QWEN = "AutoencoderDC", "AutoencoderKLQwenImage"
TAEF2_FILES = ("taef2_encoder.safetensors", "taef2_decoder.safetensors")
# 0.851 is the standard deviation of its latents, measured on 26 photos of Open Images at 256 px; its author gives no factor.
TAEF2_CONFIG: dict[str, Any] = {"latent_channels": 32, "scaling_factor": round(1 / 0.851, 4)}


class _Kind(NamedTuple):
    """What differs between kinds, by names of diffusers' configuration."""

    widths: str
    """Channels of each level; every level but one halves the resolution."""
    channels: str = "latent_channels"
    scale: float = 1.0
    """Its scaling_factor, where a configuration does not say."""
    deterministic: bool = False


KINDS = {
    AUTOENCODER_KL: _Kind("block_out_channels", scale=0.18215),
    "AsymmetricAutoencoderKL": _Kind("down_block_out_channels", scale=0.18215),
    QWEN: _Kind("dim_mult", "z_dim"),
    AUTOENCODER_TINY: _Kind("encoder_block_out_channels", deterministic=True),
    AUTOENCODER_DC: _Kind("encoder_block_out_channels", deterministic=True),
    TAEF2: _Kind("", deterministic=True),
}
REFUSED = {
    "AutoencoderKLFlux2": "whose latents are folded and normalised by running statistics; TAEF2 has the same before that",
    "VQModel": "whose latents are those of a code book",
    "ConsistencyDecoderVAE": "whose decoder is itself a diffusion; of the same latents is Stable Diffusion's VAE",
    "AutoencoderRAE": "whose latents are tokens of a vision encoder",
    "AutoencoderKLTemporalDecoder": "whose decoder makes films; of the same latents is Stable Diffusion's VAE",
}
"""Kinds of which there is more to say than that they are not taken."""


class VaeSizes(NamedTuple):
    """What the programs ask of a VAE, whichever class it is."""

    kind: str
    """A key of `KINDS`."""
    config: Mapping[str, Any]
    latent_channels: int
    """C."""
    downsampling: int
    """View px per latent cell."""
    scaling_factor: float
    normalisation: Normalisation | None
    """What the configuration says that latents are shifted and divided by, before they are scaled."""

    @property
    def deterministic(self) -> bool:
        """Whether a picture has one latent and not a distribution."""
        return KINDS[self.kind].deterministic


def locate_vae(folder: Path, subfolder: str = "vae") -> Path | None:
    """The folder with a VAE's files: this one, or the one in it where a pipeline keeps it; null: there is none."""
    return next((place for place in (folder, folder / subfolder) if (place / "config.json").is_file() or is_taef2(place)), None)


def is_taef2(place: Path) -> bool:
    """Whether a folder holds TAEF2 as its author publishes it, or half of it."""
    return not (place / "config.json").is_file() and any((place / name).is_file() for name in TAEF2_FILES)


def read_vae_sizes(place: Path) -> VaeSizes:
    """The sizes of the VAE whose files lie in a folder.

    Raises:
        OSError: its config.json cannot be read.
        ValueError: it is no VAE's that is taken; with the reason.
    """
    if is_taef2(place):
        return vae_sizes(TAEF2, TAEF2_CONFIG)
    config = json.loads((place / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise ValueError("no JSON object")
    return vae_sizes(config.get("_class_name", AUTOENCODER_KL), config)


def vae_sizes(kind: str, config: Mapping[str, Any]) -> VaeSizes:
    """The sizes of a VAE of this kind with this configuration (diffusers').

    Raises:
        ValueError: another kind, or a configuration that is damaged or says two things; with the reason.
    """
    if kind not in KINDS:
        why = f", {REFUSED[kind]}" if kind in REFUSED else ""
        taken = ", ".join(name for name in KINDS if name != TAEF2)
        raise ValueError(f"is of a {kind}{why}; taken are {taken} and a folder of {TAEF2}'s two files")
    own = KINDS[kind]
    try:
        channels, widths = config[own.channels], (1,) * 4 if kind == TAEF2 else config[own.widths]
        if type(channels) is not int or channels < 1 or not isinstance(widths, list | tuple) or not widths:
            raise TypeError
        given = config.get("scaling_factor", own.scale)
        scale = 1.0 if given is None else float(given)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"not the config of an {kind}") from None
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scaling_factor {scale:g} is no positive number")
    return VaeSizes(kind, config, channels, 2 ** (len(widths) - 1), scale, _normalisation(config, channels))


def _normalisation(config: Mapping[str, Any], channels: int) -> Normalisation | None:
    """Diffusers' (latents - shift_factor) * scaling_factor, or (latents - latents_mean) * scaling_factor / latents_std."""
    mean, spread, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is None and spread is None:
        if not shift:
            return None
        mean = [shift] * channels
    elif shift:
        raise ValueError("gives both shift_factor and latents_mean or latents_std, which shift latents twice")
    found = []
    for name, values, usual in (("latents_mean or shift_factor", mean, 0.0), ("latents_std", spread, 1.0)):
        try:
            numbers = [usual] * channels if values is None else [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != channels or not all(map(math.isfinite, numbers)) or (usual and min(numbers) <= 0):
            raise ValueError(f"{name} is no list of {channels} numbers that latents can be normalised by")
        found.append(numbers)
    return Normalisation(shift=tuple(found[0]), spread=tuple(found[1]))
