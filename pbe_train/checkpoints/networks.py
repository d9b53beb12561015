"""From what the settings name to networks: pretrained models, VAE and vision encoder, the model; and their sizes alone.

Sizes alone serve to count before anything is downloaded, and to measure with random weights. They are those of local config
files, or built in (`known_sizes.py`): of Stable Diffusion 1.x, 2.x, XL and their inpainting models, and of CLIP ViT-L/14.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pbe_core.vae import load_network, load_vae, weights_sha256
from pbe_core.vae_kinds import AUTOENCODER_KL, VaeSizes, locate_vae, read_vae_sizes
from pbe_core.vae_kinds import vae_sizes as sizes_of
from pbe_train.checkpoints.diffusers_format import (
    TRANSFORMER,
    is_diffusers_folder,
    locate_folder,
    locate_image_encoder,
    read_diffusers,
    read_image_encoder,
    read_json,
)
from pbe_train.checkpoints.key_mapping import Tensors, bare_encoder_names, prefixed, starting_with
from pbe_train.checkpoints.known_sizes import CLIP, CLIP_SIZES, PAINT_BY_EXAMPLE, STABLE_DIFFUSION, U_NETS, VAE_SIZES, VAES
from pbe_train.checkpoints.ldm_format import read_ldm
from pbe_train.checkpoints.pretrained import PretrainedModel, strict_load
from pbe_train.checkpoints.starts import as_start, plain_config, turned
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, locate_checkpoint, read_file, read_state
from pbe_train.config import LoraSettings, MaskChannel, ModelSettings, TrainSettings, UNetSettings
from pbe_train.model.lora import layers_of, merged, misfits
from pbe_train.model.paint_model import PaintByExampleModel, assemble, new_unet, with_lora
from schemas.dataset import DatasetInfo

NO_ENCODER = "no vision encoder here; set model.encoder to a CLIP vision model, or to a Paint by Example model"


def read_pretrained(source: str) -> PretrainedModel:
    """The model in a file in the LDM layout, a folder or hub id in diffusers' layout, or a run of this trainer.

    Its U-Net takes its inputs in this project's order, whatever that of the file is.

    Raises:
        InputError: none of these, or damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return as_start(read_ldm(path))
    folder = locate_folder(source)
    if folder is None:
        raise InputError(f"{source}: no such file or folder, and no hub id (owner/name)")
    if is_diffusers_folder(folder):
        return as_start(read_diffusers(folder))
    checkpoint = locate_checkpoint(folder)
    if checkpoint is None and (folder / "transformer" / "config.json").is_file():
        raise InputError(f"{folder}: {TRANSFORMER}")
    if checkpoint is None:
        raise InputError(
            f"{folder}: neither a model in diffusers' layout (unet/config.json), nor a run of this trainer (checkpoints/), "
            "nor one of its checkpoints (state.json)"
        )
    # The moving average, where the run keeps one. Encoder and VAE are not in it, only their hashes.
    return read_run(checkpoint, read_state(checkpoint), "ema")


def read_run(checkpoint: Path, state: CheckpointState, weights: Literal["ema", "model"]) -> PretrainedModel:
    """The model of a run: of one that trains a LoRA, its base with the LoRA in its weights.

    Args:
        checkpoint: its folder.
        state: of the checkpoint.
        weights: the moving average, where there is one, or the plain weights.

    Raises:
        InputError: a damaged file, or a LoRA's base that is not there, or not what it was.
    """
    averaged = weights == "ema" and "ema.safetensors" in state.files
    tensors: Tensors = read_file(checkpoint, state, "ema" if averaged else "model")
    if state.identity.base_sha256 is not None:
        tensors = _read_with_base(checkpoint, state, tensors)
    return PretrainedModel(
        where=str(checkpoint),
        kind="run of this trainer",
        unet_config=state.identity.unet,
        unet=starting_with("unet.", tensors),
        conditioner=starting_with("conditioner.", tensors),
        encoder_sha256=state.identity.encoder_sha256,
        vae_sha256=state.identity.vae_sha256,
        prediction=state.settings.get("prediction"),
        trained_with=state.settings.get("model", {}),
        mask_channel=state.identity.mask_channel,
        aside={"optimizer": 0} | ({"weights that are not averaged": 0} if averaged else {}),
    )


def _read_with_base(checkpoint: Path, state: CheckpointState, lora: Tensors) -> dict[str, Tensor]:
    """U-Net and conditioner of a LoRA's base, with the LoRA in them. Raises InputError: the base is not there, or another."""
    settings = TrainSettings.model_validate(state.settings)
    named = settings.model.pretrained
    assert named
    assert settings.lora
    where = f"{checkpoint}: its base, {named} (model.pretrained)"
    try:
        base = read_pretrained(named)
    except InputError as error:
        raise InputError(f"{where}, cannot be read, and a LoRA alone is no model: {error}") from None
    if base.mask_channel == "repaint" and state.identity.mask_channel == "keep":
        base = turned(base)  # As it was when the run began.
    tensors = prefixed("unet.", base.unet) | prefixed("conditioner.", base.conditioner or {})
    found = weights_sha256(tensors)
    if found != state.identity.base_sha256:
        raise InputError(
            f"{where}, has other weights ({found[:12]}) than it was trained beside ({str(state.identity.base_sha256)[:12]}); put "
            "that model there"
        )
    layers = layers_of(lora, settings.lora.scale)
    if wrong := misfits(tensors, layers):
        raise InputError(f"{checkpoint}: its LoRA does not fit its base: {wrong[0]}")
    return tensors | {f"{name}.weight": merged(tensors[f"{name}.weight"], [(layer, 1.0)]) for name, layer in layers.items()}


def build_model(
    settings: ModelSettings,
    latent_channels: int,
    unet_config: dict[str, Any] | None = None,
    mask_channel: MaskChannel = "keep",
) -> PaintByExampleModel:
    """The model that the settings ask for, with its initial weights from torch's global generator.

    Args:
        settings: which networks; `pretrained` is not read here (`init_from_pretrained` does).
        latent_channels: C of the VAE.
        unet_config: the U-Net's configuration from a checkpoint; null: that of the settings.
        mask_channel: what 1 means in its mask channel.
    """
    encoder = load_encoder(settings.encoder)
    unet = UNet2DConditionModel.from_config(unet_config) if unet_config else new_unet(settings.unet, latent_channels)
    return assemble(settings, unet, encoder, mask_channel)


def load_dataset_vae(source: str, dataset: Path, info: DatasetInfo) -> Autoencoder:
    """The VAE, after a check that it is the one that made the dataset's latents; it normalises as it did for these.

    Raises:
        InputError: it is another one; a model trained on its latents would paint noise.
    """
    vae = load_vae(source)
    found = weights_sha256(vae.state_dict())
    if found != info.vae.sha256:
        raise InputError(
            f"{dataset / 'dataset.json'}: the latents were made by {info.vae.source} (weights {info.vae.sha256[:12]}), but "
            f"model.vae is {source} (weights {found[:12]}); set model.vae to that VAE, or build the dataset again with this one"
        )
    return vae.normalise(info.vae.normalisation)


def load_encoder(source: str) -> CLIPVisionModel:
    """The CLIP vision model, frozen, in fp32.

    Args:
        source: a CLIP vision model, as `load_network` finds it, or a whole Paint by Example model in either published layout, of
            which it is the vision encoder.

    Raises:
        InputError: nothing of that kind, or an incomplete one.
    """
    if Path(source).expanduser().is_file():
        whole = read_ldm(Path(source).expanduser())
        config, tensors = whole.encoder_config, whole.encoder
    elif folder := locate_image_encoder(source):
        config, tensors, *_ = read_image_encoder(folder)
    else:
        encoder: CLIPVisionModel = load_network(CLIPVisionModel, source, "image_encoder")
        return encoder.eval().requires_grad_(False)
    if tensors is None:
        raise InputError(f"{source}: {NO_ENCODER}")
    # Its random weights are all replaced; they must not take numbers from the generator that new parts are drawn from.
    with torch.random.fork_rng(devices=[]):
        encoder = CLIPVisionModel(config)
    strict_load(bare_encoder_names(encoder.state_dict()), tensors, source, "vision encoder")
    return encoder.eval().requires_grad_(False)


def unloaded_model(settings: ModelSettings, lora: LoraSettings | None = None) -> PaintByExampleModel:
    """The model that the settings ask for with random weights, on torch's default device; on `meta` it takes no memory.

    With a LoRA, where there is to be one.

    Raises:
        InputError: a network is neither here nor one whose sizes are known.
    """
    channels = vae_sizes(settings.vae).latent_channels
    if settings.pretrained:
        config = unet_config(settings.pretrained)
        if config["out_channels"] != channels:
            raise InputError(
                other_latents(settings.pretrained, config["out_channels"], f"those of model.vae ({settings.vae})", channels)
            )
        unet = UNet2DConditionModel.from_config({**config, "in_channels": 2 * config["out_channels"] + 1})
    else:
        unet = new_unet(settings.unet, channels)
    model = assemble(settings, unet, CLIPVisionModel(encoder_config(settings.encoder)))
    return with_lora(model, lora, base_sha256="") if lora else model


def other_latents(source: str, theirs: int, whose: str, channels: int) -> str:
    """What to tell a person whose pretrained U-Net and VAE do not belong together.

    Args:
        source: of the U-Net.
        theirs: channels of its latents.
        whose: the other latents, in words.
        channels: of those.
    """
    return (
        f"{source}: its U-Net paints latents of {theirs} channels, {whose} have {channels}; give a model of that VAE "
        "(model.pretrained), or none to train from scratch"
    )


def unloaded_vae(source: str) -> Autoencoder:
    """A VAE of these sizes with random weights, on torch's default device."""
    return Autoencoder.unloaded(vae_sizes(source))


def unet_config(source: str) -> dict[str, Any]:
    """The configuration (diffusers) of the U-Net of a pretrained model: a folder, file, run, or a hub id that is known here.

    Raises:
        InputError: neither here nor known.
    """
    path = Path(source).expanduser()
    if path.is_file() or locate_checkpoint(path):
        return read_pretrained(source).unet_config
    if source in U_NETS:
        return {**new_unet_config(), "in_channels": 4, **U_NETS[source]}
    return plain_config(_read_sizes(source, "unet", "model.pretrained", "out_channels", STABLE_DIFFUSION))


def new_unet_config() -> dict[str, Any]:
    """The configuration of Stable Diffusion 1.x's U-Net but for its first layer: that of one from scratch, by default."""
    with torch.device("meta"):
        config = new_unet(UNetSettings(), 4).config
    # Without what diffusers notes down for itself: it would not read values that it calls its defaults.
    return {name: value for name, value in config.items() if not name.startswith("_")}


def vae_sizes(source: str) -> VaeSizes:
    """The sizes of a VAE. Raises InputError: neither here nor known, or of another kind than those that are taken."""
    if source in VAES:
        return sizes_of(AUTOENCODER_KL, {**VAE_SIZES, **VAES[source]})
    place = next((found for folder in _folders(source) if (found := locate_vae(folder))), None)
    if place is None:
        raise InputError(_not_known(source, "model.vae", f"{STABLE_DIFFUSION}/vae"))
    try:
        return read_vae_sizes(place)
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: {' '.join(str(error).split())}; set model.vae to another folder") from None


def encoder_config(source: str) -> CLIPVisionConfig:
    """The configuration (transformers) of a CLIP vision model. Raises InputError: neither here nor known."""
    if source in (CLIP, PAINT_BY_EXAMPLE):
        return CLIPVisionConfig(**CLIP_SIZES)
    if Path(source).expanduser().is_file():
        inside = read_pretrained(source).encoder_config
        if inside is None:
            raise InputError(f"{source}: {NO_ENCODER}")
        return inside
    config = _read_sizes(source, "image_encoder", "model.encoder", "", CLIP)
    # A whole CLIP has its vision model's sizes inside.
    config = config.get("vision_config", config)
    if "hidden_size" not in config:
        raise InputError(f"{source}: its config.json is not that of a CLIP vision model; set model.encoder to one")
    return CLIPVisionConfig.from_dict(config)


def _folders(source: str) -> tuple[Path, Path]:
    return Path(source).expanduser(), REPOSITORY / source


def _not_known(source: str, setting: str, known: str) -> str:
    return f"{source}: no config.json here, and sizes not known; set {setting} to a local folder or {known}"


def _read_sizes(source: str, subfolder: str, setting: str, key: str, known: str) -> dict[str, Any]:
    places = (place / "config.json" for folder in _folders(source) for place in (folder, folder / subfolder))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(_not_known(source, setting, known))
    config = read_json(path)
    if key and key not in config:
        raise InputError(f"{path}: not the config of such a network; set {setting} to another folder")
    return config
