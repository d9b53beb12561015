"""A model in diffusers' layout, in a folder or on the hub: a folder for each network, with its sizes and its weights."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_train.weights.files import read_tensors
from pbe_train.weights.names import POSITION_IDS, bare_encoder_names, count_blocks, current_vae_names, starting_with
from pbe_train.weights.record import check_depth, record_beside
from pbe_train.weights.source import Source
from schemas.errors import InputError
from schemas.weights import local_folder

# In this order: half precision (diffusers' `variant="fp16"`) where there is no other, pickles where there is nothing else.
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
TRANSFORMERS_FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
IMAGE_ENCODER = "PaintByExampleImageEncoder"
TEXT_ENCODER = "text_encoder"
NOT_OPENED = (TEXT_ENCODER, "tokenizer", "safety_checker", "feature_extractor")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate_folder(source: str) -> Path | None:
    """The folder that a source means: itself, one of the project's own tree, or what the hub has under that id.

    Of the hub only configurations and weights of the networks that are read come, pickles only where there is nothing else.

    Raises:
        InputError: the hub has no such repository, or cannot be reached.
    """
    folder = local_folder(source)
    if folder or not HUB_ID.fullmatch(source):
        return folder
    parts = {"unet": DIFFUSERS_FILES, "vae": DIFFUSERS_FILES, "image_encoder": TRANSFORMERS_FILES}
    wanted = ["*.json", *(f"{part}/{files[0]}" for part, files in parts.items())]
    try:
        found = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
        for number in (1, 2):
            missing = [
                f"{part}/{files[number]}"
                for part, files in parts.items()
                if (found / part / "config.json").is_file()
                and not any((found / part / name).is_file() for name in files[:number])
            ]
            if missing:
                wanted = [*wanted, *missing]
                found = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
        return found
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:160]
        raise InputError(
            f"{source}: no such folder or file, and not to be had from the hub ({cause}); give a local one"
        ) from None


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
        text_condition=(folder / TEXT_ENCODER).is_dir(),
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
    """The folder of Paint by Example's image encoder in a folder or hub repository, or the folder itself; null: there is none."""
    folder = local_folder(source)
    if folder is None and HUB_ID.fullmatch(source):
        try:
            # One small file, so that a CLIP repository is not fetched as a pipeline.
            config = Path(huggingface_hub.hf_hub_download(source, "image_encoder/config.json"))
        except (OSError, ValueError):
            return None
        folder = locate_folder(source) if is_image_encoder(config.parent) else None
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


def read_weights(folder: Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of the network in a folder, from the first of these files that is there.

    Raises:
        InputError: none is, or it cannot be read.
    """
    path = next((folder / name for name in files if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no weights here, not one of {', '.join(files)}; get the model again, in one file a network")
    return read_tensors(path)


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
