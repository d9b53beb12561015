"""A model to paint with: a run of this trainer, or a Paint by Example model in a published layout, exports among them."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import ValidationError

from pbe_core.errors import InputError
from pbe_core.vae import load_vae, local_folder, weights_sha256
from pbe_train.checkpoints.diffusers_format import read_config
from pbe_train.checkpoints.init_from_pretrained import check_architecture
from pbe_train.checkpoints.key_mapping import count_blocks
from pbe_train.checkpoints.ldm_format import vae_config_of
from pbe_train.checkpoints.networks import build_model, load_encoder, read_pretrained
from pbe_train.checkpoints.pretrained import PretrainedModel, strict_load
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, locate_checkpoint, read_part, read_state
from pbe_train.config import TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel, assemble, copy_values
from pbe_train.model.pipeline import Run, RunIdentity

# The released model's, which no file of it says: views of 512 px, masks shrunk without antialias, references squashed.
RELEASED = {"view_size": 512, "mask_to_latent": "bilinear", "reference_geometry": "squash", "guidance_dropout": 0.2}


def load_model(source: str | Path, weights: Literal["ema", "model"] = "ema", device: torch.device | str | None = None) -> Run:
    """A model to paint with.

    Args:
        source: a run folder of train.py or one of its checkpoints; a Paint by Example model in diffusers' layout (a folder or a
            hub id, an export among them); or a file in the original layout.
        weights: of a run, the moving average, where it keeps one, or the plain weights.
        device: by default the first GPU, else the CPU.

    Raises:
        InputError: none of these, damaged, or a model that does not paint by example.
    """
    folder = local_folder(str(source))
    if folder and locate_checkpoint(folder):
        return load_run(folder, weights, device)
    return from_pretrained(read_pretrained(str(source)), device)


def load_run(path: Path, weights: Literal["ema", "model"] = "ema", device: torch.device | str | None = None) -> Run:
    """Load a run for sampling.

    Args:
        path: a run folder (then its newest checkpoint) or a checkpoint folder.
        weights: the moving average, where the run keeps one, or the plain weights.
        device: by default the first GPU, else the CPU.

    Raises:
        InputError: no checkpoint there, a damaged one, or a frozen network that is not the one the run was trained with.
    """
    folder = locate_checkpoint(path)
    if not folder:
        raise InputError(f"{path}: no checkpoint here; give a run folder that train.py wrote (the `out` of its settings)")
    state = read_state(folder)
    try:
        settings = TrainSettings.model_validate(state.settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{folder / 'state.json'}: settings.{key}: {first['msg']}; it is of another version of this program"
        ) from None
    model = build_model(settings.model, state.identity.latent_channels, state.identity.unet)
    vae = load_vae(settings.model.vae)
    _check_frozen(folder, state, model, vae, settings)
    part = weights if f"{weights}.safetensors" in state.files else "model"
    copy_values(read_part(folder, state, part, model.kept()), model.kept())
    return Run(model.to(_place(device)).eval(), vae.to(_place(device)), settings, state.identity, state.step)


def from_pretrained(source: PretrainedModel, device: torch.device | str | None = None) -> Run:
    """A model in a published layout as if it were a run.

    Raises:
        InputError: it has no conditioner, or no VAE, or is another kind of model, or its metadata cannot be.
    """
    if source.conditioner is None:
        raise InputError(
            f"{source.where}: a {source.kind.partition(',')[0]} model, which paints by words; train it first "
            "(model.pretrained), or give a Paint by Example model"
        )
    if source.vae is None or source.encoder is None:
        raise InputError(f"{source.where}: has no VAE or no vision encoder, which painting needs")
    channels = int(source.unet_config.get("out_channels", 4))
    check_architecture(source, channels)
    settings, view_size = _settings_of(source, count_blocks(source.conditioner, "mapper.blocks."))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(source.unet_config)
        vae = AutoencoderKL.from_config(_vae_config(source))
    model = assemble(settings.model, unet.to_empty(device="cpu"), load_encoder(source.where))
    strict_load(unet.state_dict(), source.unet, source.where, "U-Net")
    kept = {name.removeprefix("conditioner."): own for name, own in model.kept().items() if not name.startswith("unet.")}
    strict_load(kept, source.conditioner, source.where, "conditioner")
    vae = vae.to_empty(device="cpu").eval().requires_grad_(False)
    strict_load(vae.state_dict(), source.vae, source.where, "VAE")
    identity = RunIdentity(
        dataset_fingerprint="",
        dataset_samples="",
        precision="fp32",
        vae_sha256=weights_sha256(vae.state_dict()),
        encoder_sha256=weights_sha256(model.conditioner.model.state_dict()),
        unet=dict(source.unet_config),
        latent_channels=channels,
        scaling_factor=vae.config.scaling_factor,
        view_size=view_size,
    )
    return Run(model.to(_place(device)).eval(), vae.to(_place(device)), settings, identity, step=0)


def _settings_of(source: PretrainedModel, blocks: int) -> tuple[TrainSettings, int]:
    """The settings and the size of views (px) by an export's metadata, or else as the released model's."""
    painting = source.metadata.get("painting")
    how = {**RELEASED, **{key: painting[key] for key in RELEASED if isinstance(painting, dict) and key in painting}}
    values = {
        "dataset": source.where,
        "prediction": source.prediction or "epsilon",
        "condition_dropout": how["guidance_dropout"],
        "model": {
            "encoder": source.where,
            "vae": source.where,
            "conditioner_blocks": blocks,
            "mask_to_latent": how["mask_to_latent"],
            "reference_geometry": how["reference_geometry"],
        },
    }
    try:
        return TrainSettings.model_validate(values), int(how["view_size"])
    except (ValueError, TypeError):
        raise InputError(f"{source.where}: its metadata (`painting`: {how}) is damaged") from None


def _vae_config(source: PretrainedModel) -> dict[str, Any]:
    folder = Path(source.where) / "vae"
    assert source.vae is not None
    if (folder / "config.json").is_file():
        return read_config(folder)
    try:
        return vae_config_of(source.vae)
    except KeyError as error:
        raise InputError(f"{source.where}: {error} of its VAE is missing: it is cut short") from None


def _check_frozen(
    folder: Path, state: CheckpointState, model: PaintByExampleModel, vae: AutoencoderKL, settings: TrainSettings
) -> None:
    frozen = (
        ("model.encoder", settings.model.encoder, model.conditioner.model, state.identity.encoder_sha256),
        ("model.vae", settings.model.vae, vae, state.identity.vae_sha256),
    )
    for key, source, network, expected in frozen:
        found = weights_sha256(network.state_dict())
        if found != expected:
            raise InputError(f"{folder}: {key} {source} now has other weights ({found[:12]}) than in training ({expected[:12]})")


def _place(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
