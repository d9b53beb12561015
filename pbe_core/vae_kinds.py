"""The kinds of VAE that are taken, and what the files of one say before it is loaded: without PyTorch, which takes seconds.

AutoencoderKL     diffusers; any number of channels, with or without shift_factor, latents_mean and latents_std, quant_conv
AutoencoderTiny   diffusers (TAESD and its kin); deterministic
TAEF2             its author's two files of weights, `pbe_core.taef2`; deterministic
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from schemas.dataset import Normalisation

AUTOENCODER_KL, AUTOENCODER_TINY, TAEF2 = "AutoencoderKL", "AutoencoderTiny", "TAEF2"
TAEF2_FILES = ("taef2_encoder.safetensors", "taef2_decoder.safetensors")
# 0.851 is the standard deviation of its latents, measured on 26 photos of Open Images at 256 px; its author gives no factor.
TAEF2_CONFIG: dict[str, Any] = {"latent_channels": 32, "scaling_factor": round(1 / 0.851, 4)}
# diffusers' own, for a configuration that does not say.
_SCALES = {AUTOENCODER_KL: 0.18215, AUTOENCODER_TINY: 1.0}
_WIDTHS = {AUTOENCODER_KL: "block_out_channels", AUTOENCODER_TINY: "encoder_block_out_channels"}


class VaeSizes(NamedTuple):
    """What the programs ask of a VAE, whichever class it is."""

    kind: str
    """`AutoencoderKL`, `AutoencoderTiny` or `TAEF2`."""
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
        return self.kind != AUTOENCODER_KL


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
    if kind not in (AUTOENCODER_KL, AUTOENCODER_TINY, TAEF2):
        raise ValueError(f"is of a {kind}; taken are {AUTOENCODER_KL}, {AUTOENCODER_TINY} and a folder of {TAEF2}'s two files")
    try:
        channels, widths = config["latent_channels"], (1,) * 4 if kind == TAEF2 else config[_WIDTHS[kind]]
        if type(channels) is not int or channels < 1 or not isinstance(widths, list | tuple) or not widths:
            raise TypeError
        given = config.get("scaling_factor", _SCALES.get(kind))
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
