"""A trained run as one file in the original code's layout."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from pbe_core.errors import InputError
from pbe_train.checkpoints.key_mapping import Tensors, unet_table
from pbe_train.checkpoints.ldm_file import original_tensors
from pbe_train.checkpoints.metadata import tensors_of
from pbe_train.checkpoints.record import KEY
from pbe_train.checkpoints.sizes import original_unet_config, vae_config, vision_config
from pbe_train.model.pipeline import Run

SUFFIXES = (".safetensors", ".ckpt")
DEFAULT_NAME = "model.safetensors"
# What has no effect on what a network computes from inputs of a given size.
NO_EFFECT = {"sample_size", "force_upcast", "upcast_attention"}
VISION_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def check_original(run: Run) -> None:
    """Refuse a run that the original code could not paint with.

    Raises:
        InputError: with the reason.
    """
    if run.settings.model.tokens != "class":
        raise InputError(
            "--format ldm: the run conditions on all tokens of the encoder (model.tokens: all), the original code on the class "
            "token alone; such a run paints with pbe_train.sample only"
        )
    if run.settings.prediction != "epsilon":
        raise InputError(
            f"--format ldm: the run predicts {run.settings.prediction}, the original code can sample from predicted noise only; "
            "--format diffusers may hold it"
        )
    _check_read_back(run)


def _check_read_back(run: Run) -> None:
    """Refuse what the file has no place for: whoever reads it knows the shapes of its tensors and takes the rest as published.

    Raises:
        InputError: naming the setting.
    """
    parts = tensors_of(run)
    unet, vae, vision = (
        run.identity.unet,
        {**run.vae.config, "scaling_factor": run.identity.scaling_factor},
        run.model.conditioner,
    )
    attention = tuple("CrossAttn" in kind for kind in unet["down_block_types"])
    named = unet_table(attention, int(unet["layers_per_block"])).to_ldm(parts.unet)[0]
    _compare("U-Net", unet, original_unet_config, named, UNet2DConditionModel)
    _compare("VAE", vae, vae_config, parts.vae, AutoencoderKL)
    encoder = {name: getattr(vision.model.config, name) for name in VISION_SETTINGS}
    _compare("vision encoder", encoder, lambda tensors: vision_config(tensors).to_dict(), parts.encoder, None)


def _compare(
    network: str, own: Mapping[str, Any], read: Callable[[Tensors], dict[str, Any]], tensors: Tensors, kind: type | None
) -> None:
    try:
        found = read(tensors)
    except KeyError as error:
        raise InputError(
            f"--format ldm: the run's {network} has no {error.args[0]}, which the layout asks for; export with --format diffusers"
        ) from None
    if kind:
        parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
        found = {name: parameter.default for name, parameter in parameters.items() if name != "self"} | found
    for name in sorted(own.keys() & found.keys() - NO_EFFECT):
        ours, theirs = (list(value) if isinstance(value, tuple) else value for value in (own[name], found[name]))
        if ours != theirs:
            raise InputError(
                f"--format ldm: the run's {network} has {name} {ours!r}, which the layout cannot say and is read back as "
                f"{theirs!r}; export with --format diffusers"
            )


def write_original(run: Run, path: Path, record: Mapping[str, Any]) -> None:
    """Write the file: .safetensors, or .ckpt with the tensors under `state_dict`.

    The record goes inside: copies leave export.json behind.

    Raises:
        InputError: the run holds tensors that the original code has no name for.
    """
    parts = tensors_of(run)
    config = run.identity.unet
    attention = tuple("CrossAttn" in kind for kind in config["down_block_types"])
    tensors = original_tensors(*parts, attention=attention, layers=config["layers_per_block"])
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt", KEY: json.dumps(record)})
    else:
        torch.save({"state_dict": tensors, "global_step": run.step, KEY: json.dumps(record)}, path)
