"""diffusers' layout: a folder, here or on the hub, with a folder for each network that holds its sizes and its weights.

read_diffusers            folder ─▶ PretrainedModel: Stable Diffusion, Paint by Example, or a U-Net alone
write_diffusers           ModelTensors ─▶ a folder of PaintByExamplePipeline
load_diffusers_pipeline   folder or hub id ─▶ that pipeline, in every version of diffusers
"""

import json
import re
from collections.abc import Collection
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, PaintByExamplePipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_core.errors import InputError
from pbe_core.hub import fetch
from pbe_core.network_files import local_folder
from pbe_core.weight_files import DIFFUSERS_FILES, TRANSFORMERS_FILES, save_tensors, weights_of
from pbe_core.words import number_of
from pbe_train.checkpoints.key_mapping import (
    POSITION_IDS,
    VISION_MODEL,
    Tensors,
    bare_encoder_names,
    count_blocks,
    current_vae_names,
    prefixed,
    starting_with,
)
from pbe_train.checkpoints.pretrained import (
    ModelTensors,
    PretrainedModel,
    check_depth,
    metadata_beside,
    read_weights,
    strict_load,
)
from pbe_train.data.latents import CLIP_MEAN, CLIP_STD
from pbe_train.model.pipeline import Run
from pbe_train.model.schedulers import SCHEDULE, SPACING

IMAGE_ENCODER = "PaintByExampleImageEncoder"
# Where diffusers keeps that class: since 0.38, and before.
MODULES = ("diffusers.pipelines.deprecated.paint_by_example.image_encoder", "diffusers.pipelines.paint_by_example.image_encoder")
# The last version whose DiffusionPipeline.from_pretrained loads this pipeline.
WRITTEN_FOR = "0.36.0"
NOT_OPENED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor")
TRANSFORMER = (
    "its network is a transformer (SD3, FLUX and others), which is trained otherwise and has no first convolution; give a model "
    "of Stable Diffusion 1.x, 2.x or XL (docs/weights.md)"
)
# Of the noise schedule, what a scheduler's configuration says and other steps of sampling do not change.
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Pillow's number for it, as preprocessor_config.json writes it.
BILINEAR = 2


def locate_folder(source: str) -> Path | None:
    """The folder that a source means: itself, one of the project's own tree, or what the hub has under that id.

    The hub gives only configurations and weights of the networks that are read, pickles only where there is nothing else.

    Raises:
        InputError: the hub does not give it, or it holds no model in diffusers' layout.
    """
    folder = local_folder(source)
    if folder or not HUB_ID.fullmatch(source):
        return folder
    return fetch(source, partial(choose_files, source))


def choose_files(source: str, names: Collection[str]) -> list[str]:
    """The files of a repository that a model in diffusers' layout is read from.

    Args:
        source: name of the repository, for messages.
        names: of all its files, with / between.

    Raises:
        InputError: no such model, or a network of it whose weights are in no form that is read.
    """
    whole = "unet/config.json" in names
    networks = {"unet/": DIFFUSERS_FILES, "vae/": DIFFUSERS_FILES, "image_encoder/": TRANSFORMERS_FILES}
    # Configurations are small; indices of shards come with their shards.
    chosen = [name for name in names if name.endswith(".json") and name.count("/") < 2 and ".index." not in name]
    for start, files in networks.items() if whole else [("", DIFFUSERS_FILES)]:
        if f"{start}config.json" not in names:
            continue
        found = weights_of([name.removeprefix(start) for name in names if name.startswith(start)], files)
        if not found and whole:
            raise InputError(f"{source}: the hub has it, but no weights in {start} as {', '.join(files)}, nor shards of these")
        chosen += [start + name for name in found]
    if "transformer/config.json" in names and not whole:
        raise InputError(f"{source}: {TRANSFORMER}")
    if all(name.endswith(".json") for name in chosen):
        raise InputError(f"{source}: the hub has it, but it is no model in diffusers' layout (no unet/config.json)")
    return chosen


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a U-Net in diffusers' layout lies in it, or it is one."""
    path = folder / "config.json"
    alone = path.is_file() and read_json(path).get("_class_name") == "UNet2DConditionModel"
    return alone or (folder / "unet" / "config.json").is_file()


def read_diffusers(folder: Path) -> PretrainedModel:
    """The model in such a folder.

    Raises:
        InputError: a file that is missing or damaged, or tensors that no part of these models has.
    """
    whole = (folder / "unet" / "config.json").is_file()
    inside = folder / "unet" if whole else folder
    config, unet = read_config(inside), read_weights(inside, DIFFUSERS_FILES)
    if not whole:
        words = _is_by_words(folder.absolute().parent)
        return PretrainedModel(str(folder), "Stable Diffusion, diffusers layout", config, unet, by_words=words)
    vae_folder, encoder_folder = folder / "vae", folder / "image_encoder"
    vae = current_vae_names(read_weights(vae_folder, DIFFUSERS_FILES)) if (vae_folder / "config.json").is_file() else None
    conditioner = encoder = encoder_config = None
    aside = {f"{name}/": 0 for name in NOT_OPENED if (folder / name).is_dir()}
    if is_image_encoder(encoder_folder):
        encoder_config, encoder, conditioner, left = read_image_encoder(encoder_folder)
        aside |= left
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path) if path.is_file() else {}
    return PretrainedModel(
        where=str(folder),
        kind="Paint by Example, diffusers layout" if conditioner else "Stable Diffusion, diffusers layout",
        unet_config=config,
        unet=unet,
        conditioner=conditioner,
        encoder=encoder,
        encoder_config=encoder_config,
        vae=vae,
        # diffusers' own default, for schedulers that were saved before there was a choice.
        prediction=scheduler.get("prediction_type", "epsilon") if scheduler else None,
        schedule={name: scheduler[name] for name in NOISE if name in scheduler},
        by_words=_is_by_words(folder),
        metadata=metadata_beside(folder, f"unet/{DIFFUSERS_FILES[0]}"),
        aside=aside,
    )


def _is_by_words(folder: Path) -> bool:
    """Whether a folder is that of a pipeline which paints by words, as far as its files say."""
    index = folder / "model_index.json"
    return (folder / "text_encoder").is_dir() or (index.is_file() and "Inpaint" in str(read_json(index).get("_class_name")))


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


def read_image_encoder(folder: Path) -> tuple[CLIPVisionConfig, dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
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
        raise InputError(f"{folder / 'config.json'}: `hidden_size` is missing: not the sizes of a vision model")
    sizes = CLIPVisionConfig.from_dict({**config, "model_type": "clip_vision_model"})
    # The pipeline makes its conditioner by this rule whatever else is written; how deep the encoder is, its configuration says.
    layers = sizes.num_hidden_layers
    expected = {"encoder_layers": layers, "conditioner_blocks": (layers + 1) // 5}
    check_depth(str(folder), count_blocks(conditioner, "mapper.blocks."), count_blocks(encoder, "encoder.layers."), expected)
    return sizes, encoder, conditioner, left


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the network in a folder, without what diffusers notes about versions and places.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return _without_notes(read_json(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises InputError: there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: missing or damaged")
    return content


def check_diffusers(run: Run) -> None:
    """Refuse a run that diffusers' pipeline could not paint with. Raises InputError: with the reason."""
    layers = run.model.conditioner.model.config.num_hidden_layers
    blocks, theirs = run.settings.model.conditioner_blocks, (layers + 1) // 5
    if blocks != theirs:
        raise InputError(
            f"--format diffusers: the run's conditioner has {number_of(blocks, 'block')}, the pipeline's {theirs} for an encoder "
            f"of {number_of(layers, 'layer')}; export with --format ldm, or train with model.conditioner_blocks {theirs}"
        )


def write_diffusers(run: Run, parts: ModelTensors, folder: Path) -> None:
    """Write networks, scheduler, preprocessor and model_index.json into an empty folder.

    Written here, and not by the libraries: they would write the names of their own version, and these are those of the hub's
    released model, which every version reads.
    """
    encoder = run.model.conditioner.model.config
    width = run.identity.unet["cross_attention_dim"]
    vision = {**encoder.to_dict(), "architectures": [IMAGE_ENCODER], "model_type": "clip_vision_model", "projection_dim": width}
    for own in ("dtype", "torch_dtype", "_name_or_path"):
        vision.pop(own, None)
    vae = {**run.vae.config, "scaling_factor": run.identity.scaling_factor}
    _write_network(folder / "unet", _noted("UNet2DConditionModel", run.identity.unet), parts.unet, DIFFUSERS_FILES[0])
    _write_network(folder / "vae", _noted("AutoencoderKL", vae), parts.vae, DIFFUSERS_FILES[0])
    inside = parts.conditioner | prefixed(f"model.{VISION_MODEL}", parts.encoder)
    _write_network(folder / "image_encoder", vision, inside, TRANSFORMERS_FILES[0])
    schedule = {**SCHEDULE, "timestep_spacing": SPACING, "prediction_type": run.settings.prediction, "trained_betas": None}
    _write_json(folder / "scheduler" / "scheduler_config.json", _noted("PNDMScheduler", schedule))
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", _preprocessor(encoder.image_size))
    index = {
        "_class_name": "PaintByExamplePipeline",
        "_diffusers_version": WRITTEN_FOR,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["paint_by_example", IMAGE_ENCODER],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


def _preprocessor(size: int) -> dict[str, Any]:
    """How a reference becomes the encoder's input: all of it, squashed to a square, as in training."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": BILINEAR,
        "do_center_crop": False,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def _noted(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": diffusers.__version__, **_without_notes(config)}


def _without_notes(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _write_network(folder: Path, config: dict[str, Any], tensors: Tensors, file: str) -> None:
    _write_json(folder / "config.json", config)
    # transformers reads no file that does not say what it was written from.
    save_tensors(tensors, folder / file, {"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_diffusers_pipeline(source: str, dtype: torch.dtype = torch.float32) -> PaintByExamplePipeline:
    """The pipeline of an export, or of the released model in the same layout, without a safety checker.

    From diffusers 0.38 on `DiffusionPipeline.from_pretrained` cannot load it: the class was moved, and the entry by which
    `model_index.json` names the image encoder was lost.

    Args:
        source: folder or hub id.
        dtype: of the networks.

    Raises:
        InputError: no such model there, or one that is not whole.
    """
    folder, inside = locate_folder(str(source)), locate_image_encoder(str(source))
    if folder is None or inside is None:
        raise InputError(f"{source}: no Paint by Example model in diffusers' layout; give a folder that holds image_encoder/")
    model = read_diffusers(folder)
    assert model.conditioner is not None
    assert model.encoder is not None
    if model.vae is None or "proj_out.weight" not in model.conditioner:
        raise InputError(f"{folder}: has no VAE, or no proj_out.weight in image_encoder/")
    encoder = _image_encoder_class()(model.encoder_config, proj_size=model.conditioner["proj_out.weight"].shape[0]).eval()
    own = bare_encoder_names({name.removeprefix("model."): tensor for name, tensor in encoder.state_dict().items()})
    strict_load(own, {**model.encoder, **model.conditioner}, str(inside), "image encoder")
    unet = UNet2DConditionModel.from_config(model.unet_config).eval()
    strict_load(unet.state_dict(), model.unet, str(folder / "unet"), "U-Net")
    vae = AutoencoderKL.from_config(read_config(folder / "vae")).eval()
    strict_load(vae.state_dict(), model.vae, str(folder / "vae"), "VAE")
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    read_json(folder / "feature_extractor" / "preprocessor_config.json")  # transformers would look for it on the hub.
    return PaintByExamplePipeline(
        vae=vae.to(dtype),
        image_encoder=encoder.to(dtype),
        unet=unet.to(dtype),
        scheduler=getattr(diffusers, schedule.get("_class_name", "PNDMScheduler")).from_config(schedule),
        safety_checker=None,
        feature_extractor=transformers.CLIPImageProcessor.from_pretrained(str(folder / "feature_extractor")),
    )


def _image_encoder_class() -> Any:
    for name in MODULES:
        try:
            return getattr(import_module(name), IMAGE_ENCODER)
        except ModuleNotFoundError:
            continue
    raise InputError(f"diffusers {diffusers.__version__} has no {IMAGE_ENCODER} any more; install a version up to 0.42")
