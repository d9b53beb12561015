"""A model in diffusers' layout, in a folder or on the hub: a folder for each network, with its sizes and its weights."""

import json
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_core.errors import InputError
from pbe_core.hub import fetch
from pbe_core.vae import local_folder
from pbe_core.weight_files import DIFFUSERS_FILES, TRANSFORMERS_FILES, weights_of
from pbe_train.checkpoints.files import read_weights
from pbe_train.checkpoints.key_mapping import POSITION_IDS, bare_encoder_names, count_blocks, current_vae_names, starting_with
from pbe_train.checkpoints.record import check_depth, record_beside
from pbe_train.checkpoints.source import Source

IMAGE_ENCODER = "PaintByExampleImageEncoder"
NOT_OPENED = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate_folder(source: str) -> Path | None:
    """The folder that a source means: itself, one of the project's own tree, or what the hub has under that id.

    Of the hub only configurations and weights of the networks that are read come, pickles only where there is nothing else.

    Raises:
        InputError: the hub does not give it, or it holds no model in diffusers' layout.
    """
    folder = local_folder(source)
    if folder or not HUB_ID.fullmatch(source):
        return folder
    return fetch(source, partial(choose_files, source))


def choose_files(source: str, names: Collection[str]) -> list[str]:
    """The files, of those of a repository, that a model in diffusers' layout is read from.

    Args:
        source: name of the repository, for messages.
        names: of all its files, with / between.

    Raises:
        InputError: no such model, or a network of it whose weights are in no form that is read.
    """
    whole = "unet/config.json" in names
    parts = (
        {"unet": DIFFUSERS_FILES, "vae": DIFFUSERS_FILES, "image_encoder": TRANSFORMERS_FILES} if whole else {"": DIFFUSERS_FILES}
    )
    # Configurations are small; indices of shards come with their shards.
    chosen = [name for name in names if name.endswith(".json") and name.count("/") < 2 and ".index." not in name]
    for part, files in parts.items():
        start = f"{part}/" if part else ""
        if f"{start}config.json" not in names:
            continue
        found = weights_of([name.removeprefix(start) for name in names if name.startswith(start)], files)
        if not found and whole:
            raise InputError(f"{source}: the hub has it, but no weights in {start} as {', '.join(files)}, nor shards of these")
        chosen += [start + name for name in found]
    if all(name.endswith(".json") for name in chosen):
        raise InputError(f"{source}: the hub has it, but it is no model in diffusers' layout (unet/config.json is not there)")
    return chosen


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a U-Net in diffusers' layout lies in it, or it is one."""
    return (folder / "unet" / "config.json").is_file() or _is_unet(folder)


def read_diffusers(folder: Path) -> Source:
    """The model in such a folder: Stable Diffusion 1.x, Paint by Example, or a U-Net alone.

    Raises:
        InputError: a file that is missing or damaged, or tensors that no part of these models has.
    """
    whole = (folder / "unet" / "config.json").is_file()
    inside = folder / "unet" if whole else folder
    config, unet = read_config(inside), read_weights(inside, DIFFUSERS_FILES)
    if not whole:
        return Source(str(folder), "Stable Diffusion, diffusers layout", config, unet)
    vae_folder, encoder_folder = folder / "vae", folder / "image_encoder"
    vae = current_vae_names(read_weights(vae_folder, DIFFUSERS_FILES)) if (vae_folder / "config.json").is_file() else None
    conditioner = encoder = encoder_config = None
    aside = {f"{name}/": 0 for name in NOT_OPENED if (folder / name).is_dir()}
    if is_image_encoder(encoder_folder):
        encoder_config, encoder, conditioner, left = read_image_encoder(encoder_folder)
        aside |= left
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return Source(
        where=str(folder),
        kind="Paint by Example, diffusers layout" if conditioner else "Stable Diffusion, diffusers layout",
        unet_config=config,
        unet=unet,
        conditioner=conditioner,
        encoder=encoder,
        encoder_config=encoder_config,
        vae=vae,
        # diffusers' own default, for schedulers that were saved before there was a choice.
        prediction=read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else None,
        record=record_beside(folder, f"unet/{DIFFUSERS_FILES[0]}"),
        aside=aside,
    )


def is_image_encoder(folder: Path) -> bool:
    """Whether a folder holds Paint by Example's image encoder: CLIP's vision model with the conditioner on top."""
    if not (folder / "config.json").is_file():
        return False
    kinds = read_config(folder).get("architectures")
    return isinstance(kinds, list) and IMAGE_ENCODER in kinds


def locate_image_encoder(source: str) -> Path | None:
    """The folder of Paint by Example's image encoder in a folder or hub repository, or the folder itself; null: there is none.

    Raises:
        InputError: the hub does not give it.
    """
    folder = local_folder(source)
    if folder is None and HUB_ID.fullmatch(source):
        # One small file, so that a CLIP repository is not fetched as a pipeline.
        config = "image_encoder/config.json"
        found = fetch(source, lambda names: [config] if config in names else [])
        folder = locate_folder(source) if found and is_image_encoder(found / "image_encoder") else None
    if folder is None:
        return None
    return next((place for place in (folder, folder / "image_encoder") if is_image_encoder(place)), None)


def read_image_encoder(
    folder: Path,
) -> tuple[CLIPVisionConfig, dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Sizes of the vision model, its tensors under bare names, those of the conditioner, and what is left aside.

    Raises:
        InputError: a file that is missing or damaged.
    """
    tensors = read_weights(folder, TRANSFORMERS_FILES)
    encoder = bare_encoder_names(starting_with("model.", tensors))
    left = {"position_ids": 1} if encoder.pop(POSITION_IDS, None) is not None else {}
    conditioner = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
    config = read_config(folder)
    if "hidden_size" not in config:
        raise InputError(f"{folder / 'config.json'}: `hidden_size` is missing, not the sizes of a vision model; get it again")
    sizes = CLIPVisionConfig.from_dict({**config, "model_type": "clip_vision_model"})
    # The pipeline makes its conditioner by this rule whatever else is written; how deep the encoder is, its configuration says.
    layers = sizes.num_hidden_layers
    told = {"encoder_layers": layers, "conditioner_blocks": (layers + 1) // 5}
    check_depth(str(folder), count_blocks(conditioner, "mapper.blocks."), count_blocks(encoder, "encoder.layers."), told)
    return sizes, encoder, conditioner, left


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the network in a folder, without what diffusers notes about versions and places.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        InputError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: missing or damaged; get the model again")
    return content


def _is_unet(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("_class_name") == "UNet2DConditionModel"
