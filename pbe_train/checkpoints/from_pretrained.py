"""What a pretrained model becomes: the start of a new run, or a model to paint with.

Stable Diffusion        U-Net ─ 4 input channels + 5 of zeros ─▶ U-Net        conditioner: new
its inpainting models   U-Net ─ 9 input channels in our order ─▶ U-Net        conditioner: new
Paint by Example, run   U-Net ─────────────────────────────────▶ U-Net        conditioner ─▶ conditioner

Nothing is missing, nothing left over, nothing means something else here. The load report (start.json) says where each tensor
went, what is new, and under what licence the weights are.
"""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor
from transformers import CLIPVisionModel

from pbe_core.autoencoder import Autoencoder
from pbe_core.buckets import Shape
from pbe_core.errors import InputError
from pbe_core.network_files import local_folder
from pbe_core.vae import load_vae, weights_sha256
from pbe_core.words import number_of
from pbe_train.checkpoints.diffusers_format import read_config
from pbe_train.checkpoints.key_mapping import Tensors, bare_encoder_names, count_blocks, starting_with
from pbe_train.checkpoints.ldm_format import vae_config_of
from pbe_train.checkpoints.load_report import LoadReport, make_report
from pbe_train.checkpoints.networks import build_model, load_encoder, other_latents, read_pretrained, read_run
from pbe_train.checkpoints.pretrained import PretrainedModel, strict_load
from pbe_train.checkpoints.starts import DEFAULT_CHANNELS, FIRST_LAYER, turned
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, locate_checkpoint, read_part, read_state
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel, assemble, copy_values
from pbe_train.model.pipeline import Run, RunIdentity

# Of a VAE, what makes latents. The VAEs that are usual beside Stable Diffusion 1.x's own have other decoders.
ENCODING = ("encoder.", "quant_conv.")
OTHER_DECODER = "decoder of the VAE, where the start's own VAE has another one; latents are the same"
TURNED = "a mask where 1 means keep, by other weights and bias of unet.conv_in: the same but in the outermost latent cells"
# The released model's, which no file of it says: views of 512 px, masks shrunk without antialias, references squashed.
RELEASED = {"view_size": 512, "mask_to_latent": "bilinear", "reference_geometry": "squash", "guidance_dropout": 0.2}
# What may differ between U-Nets of Stable Diffusion's kind: their sizes. Anything else is another architecture.
SIZES = {
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "upcast_attention",
    "use_linear_projection",
    "transformer_layers_per_block",
}
# What those that are taken are called, for messages.
TAKEN = "give a model of Stable Diffusion 1.x, 2.x or XL, or one of their inpainting models"


def init_from_pretrained(settings: TrainSettings, vae: Autoencoder) -> tuple[PaintByExampleModel, LoadReport | None]:
    """The model of a new run, and the report on where its weights are from; null for a run from scratch.

    New parts get their weights from torch's global generator.

    Args:
        settings: of the run.
        vae: the dataset's.

    Raises:
        InputError: the pretrained model is damaged, of another kind or incomplete, or contradicts the settings or the dataset.
    """
    channels = vae.sizes.latent_channels
    if settings.model.pretrained is None:
        return build_model(settings.model, channels), None
    source = read_pretrained(settings.model.pretrained)
    check_architecture(source, channels)
    _check_settings(source, settings)
    if is_turned := source.mask_channel == "repaint" and settings.model.mask_channel == "keep":
        source = turned(source)
    if fault := _vae_difference(source, vae.state_dict()):
        raise InputError(
            f"{source.where}: its VAE is not the dataset's ({fault}); build the dataset with that VAE (latents.vae), or give a "
            "model of the dataset's"
        )
    encoder = load_encoder(settings.model.encoder)
    if fault := _difference(source.encoder, source.encoder_sha256, bare_encoder_names(encoder.state_dict())):
        raise InputError(
            f"{source.where}: its vision encoder is not model.encoder, {settings.model.encoder} ({fault}); set model.encoder to "
            f"{source.where if source.encoder else 'that of the run'}"
        )
    tensors, new = _with_all_channels(source, channels, is_turned)
    model = _fill(source, settings.model, encoder, {**source.unet_config, "in_channels": 2 * channels + 1}, tensors)
    report = make_report(source, new, settings.model)
    if _difference(source.vae, None, vae.state_dict()):
        report.otherwise.append(OTHER_DECODER)
    return model, report


def _with_all_channels(source: PretrainedModel, channels: int, is_turned: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The U-Net's tensors with all input channels, and what is new in the model, in words."""
    tensors, new = dict(source.unet), []
    if source.unet_config.get("in_channels", DEFAULT_CHANNELS) == channels and FIRST_LAYER in tensors:
        tensors[FIRST_LAYER] = widened(tensors[FIRST_LAYER])
        new.append(f"{channels + 1} more input channels of unet.conv_in, all 0")
    elif source.conditioner is None and (is_turned or source.mask_channel == "repaint"):
        new.append(
            f"nothing in unet.conv_in: its {2 * channels + 1} input channels are those of an inpainting model, put in order"
        )
    elif source.conditioner is None:
        new.append(f"nothing in unet.conv_in: it has the {channels + 1} more input channels already, all 0")
    if source.conditioner is None:
        new.append("the conditioner, at random")
    if is_turned:
        new.append(TURNED)
    return tensors, new


def _fill(
    source: PretrainedModel, settings: ModelSettings, encoder: CLIPVisionModel, unet_config: dict[str, Any], unet: Tensors
) -> PaintByExampleModel:
    """A model with these tensors of a U-Net and, where the source has one, its conditioner."""
    # Not filled with random numbers first: every weight is about to be replaced, and at full size they take a while to draw.
    try:
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(unet_config)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:  # diffusers', over sizes that do not go together.
        raise InputError(f"{source.where}: no U-Net can be made of its configuration ({' '.join(str(error).split())})") from None
    model = assemble(settings, network.to_empty(device="cpu"), encoder, source.mask_channel)
    strict_load(network.state_dict(), unet, source.where, "U-Net")
    if source.conditioner is not None:
        strict_load(starting_with("conditioner.", model.kept()), source.conditioner, source.where, "conditioner")
    return model


def widened(weight: Float[Tensor, "out channels height width"]) -> Float[Tensor, "out wide height width"]:
    """The first layer's weight with input channels for masked view and mask, all 0: at first they change nothing."""
    channels = weight.shape[1]
    return torch.cat([weight, weight.new_zeros(weight.shape[0], channels + 1, *weight.shape[2:])], dim=1)


def load_model(source: str | Path, weights: Literal["ema", "model"] = "ema", device: torch.device | str | None = None) -> Run:
    """A model to paint with; of a run that trains a LoRA, its base with the LoRA in its weights.

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
    return _from_pretrained(read_pretrained(str(source)), device)


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
    vae = load_vae(settings.model.vae).normalise(state.identity.vae_normalisation)
    if settings.lora:
        whole = read_run(folder, state, weights)
        model = _fill(whole, settings.model, load_encoder(settings.model.encoder), state.identity.unet, whole.unet)
        _check_frozen(folder, state, model, vae, settings)
        return _whole(Run(model.to(_place(device)).eval(), vae.to(_place(device)), settings, state.identity, state.step))
    model = build_model(settings.model, state.identity.latent_channels, state.identity.unet, state.identity.mask_channel)
    _check_frozen(folder, state, model, vae, settings)
    part = weights if f"{weights}.safetensors" in state.files else "model"
    copy_values(read_part(folder, state, part, model.kept()), model.kept())
    return Run(model.to(_place(device)).eval(), vae.to(_place(device)), settings, state.identity, state.step)


def _whole(run: Run) -> Run:
    """A run whose LoRA is in its weights, as one that has none: what is made of it has all weights of its own."""
    settings = run.settings.model_copy(update={"lora": None})
    return replace(run, settings=settings, identity=run.identity.model_copy(update={"base_sha256": None}))


def _from_pretrained(source: PretrainedModel, device: torch.device | str | None) -> Run:
    """A model in a published layout as if it were a run."""
    if source.conditioner is None:
        raise InputError(
            f"{source.where}: a {source.kind.partition(',')[0]} model, which paints by words; train it first "
            "(model.pretrained), or give a Paint by Example model"
        )
    if source.vae is None or source.encoder is None:
        raise InputError(f"{source.where}: has no VAE or no vision encoder, which painting needs")
    channels = int(source.unet_config.get("out_channels", DEFAULT_CHANNELS))
    check_architecture(source, channels)
    settings, view_size, buckets = _settings_of(source, count_blocks(source.conditioner, "mapper.blocks."))
    model = _fill(source, settings.model, load_encoder(source.where), source.unet_config, source.unet)
    folder = Path(source.where) / "vae"
    try:
        vae_config = read_config(folder) if (folder / "config.json").is_file() else vae_config_of(source.vae)
    except KeyError as error:
        raise InputError(f"{source.where}: {error} of its VAE is missing: it is cut short") from None
    with torch.device("meta"):
        network = AutoencoderKL.from_config(vae_config)
    # The pipeline of this layout scales latents and knows of no shift, whatever the configuration says.
    vae = Autoencoder(network.to_empty(device="cpu").eval().requires_grad_(False)).normalise(None)
    strict_load(vae.state_dict(), source.vae, source.where, "VAE")
    identity = RunIdentity(
        dataset_fingerprint="",
        dataset_samples="",
        precision="fp32",
        vae_sha256=weights_sha256(vae.state_dict()),
        encoder_sha256=weights_sha256(model.conditioner.model.state_dict()),
        unet=dict(source.unet_config),
        latent_channels=channels,
        scaling_factor=vae.sizes.scaling_factor,
        view_size=view_size,
        buckets=buckets,
    )
    return Run(model.to(_place(device)).eval(), vae.to(_place(device)), settings, identity, step=0)


def _settings_of(source: PretrainedModel, blocks: int) -> tuple[TrainSettings, int, tuple[Shape, ...] | None]:
    """The settings, and size and shapes of views (px), by an export's metadata, or else as the released model's."""
    painting = source.metadata.get("painting")
    known = (*RELEASED, "buckets")
    how = {**RELEASED, **{key: painting[key] for key in known if isinstance(painting, dict) and key in painting}}
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
        buckets = tuple((int(width), int(height)) for width, height in how.get("buckets", ()))
        return TrainSettings.model_validate(values), int(how["view_size"]), buckets or None
    except (ValueError, TypeError):
        raise InputError(f"{source.where}: its metadata (`painting`: {how}) is damaged") from None


def _check_frozen(
    folder: Path, state: CheckpointState, model: PaintByExampleModel, vae: Autoencoder, settings: TrainSettings
) -> None:
    frozen: tuple[tuple[str, str, CLIPVisionModel | Autoencoder, str], ...] = (
        ("model.encoder", settings.model.encoder, model.conditioner.model, state.identity.encoder_sha256),
        ("model.vae", settings.model.vae, vae, state.identity.vae_sha256),
    )
    for key, source, network, expected in frozen:
        found = weights_sha256(network.state_dict())
        if found != expected:
            raise InputError(f"{folder}: {key} {source} now has other weights ({found[:12]}) than in training ({expected[:12]})")


def _place(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_architecture(source: PretrainedModel, channels: int) -> None:
    """Refuse a U-Net that is not one of Stable Diffusion's kind, or of whose inputs it is not known what they mean.

    Args:
        source: the pretrained model.
        channels: C of the dataset's VAE.

    Raises:
        InputError: with the reason.
    """
    config = source.unet_config
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    for name, value in config.items():
        usual = parameters[name].default if name in parameters and name not in SIZES else value
        if value != usual:
            raise InputError(
                f"{source.where}: its U-Net is not of Stable Diffusion's kind ({name} is {value!r}, there it is {usual!r}); "
                f"{TAKEN}"
            )
    for name in ("cross_attention_dim", "layers_per_block"):
        if not isinstance(config.get(name, 1), int):
            raise InputError(f"{source.where}: its U-Net has {name} {config[name]!r} and not one number; {TAKEN}")
    inputs, outputs = (config.get(name, DEFAULT_CHANNELS) for name in ("in_channels", "out_channels"))
    if outputs != channels:
        raise InputError(other_latents(source.where, outputs, "the dataset's", channels))
    words, wide = source.conditioner is None, 2 * channels + 1
    # The published training started from `sd-v1-4-modified-9channel.ckpt`, where the channels beyond the latent's are all 0.
    weight = source.unet.get(FIRST_LAYER)
    if words and weight is not None and weight.shape[1] == wide and not weight[:, channels:].any():
        return
    if words and inputs == wide and source.mask_channel == "repaint":
        return
    if words and inputs == wide:
        raise InputError(
            f"{source.where}: its U-Net has {inputs} input channels: in Stable Diffusion's inpainting models latent, mask, "
            "masked view, in Paint by Example latent, masked view, mask, and nothing here says which it is; give the whole "
            "model, with its text encoder or its conditioner"
        )
    expected, kind = (channels, "text-to-image") if words else (wide, "Paint by Example")
    if inputs != expected:
        raise InputError(f"{source.where}: its U-Net has {inputs} input channels, where {expected} are those of a {kind} model")


def _check_settings(source: PretrainedModel, settings: TrainSettings) -> None:
    """Refuse a pretrained model that the settings contradict."""
    if source.prediction not in (None, settings.prediction):
        raise InputError(
            f"{source.where}: its U-Net predicts {source.prediction}, the setting `prediction` says {settings.prediction}; "
            f"set it to {source.prediction}"
        )
    if source.conditioner is None:
        return
    blocks = count_blocks(source.conditioner, "mapper.blocks.")
    if blocks != settings.model.conditioner_blocks:
        raise InputError(
            f"{source.where}: its conditioner has {number_of(blocks, 'block')}; set model.conditioner_blocks to {blocks}, not "
            f"{settings.model.conditioner_blocks}"
        )


def _vae_difference(source: PretrainedModel, ours: Tensors) -> str | None:
    """As `_difference`, of what makes latents; of a run only the hash of a whole VAE is known."""
    if source.vae is None:
        return _difference(None, source.vae_sha256, ours)
    theirs, own = ({name: tensor for name, tensor in vae.items() if name.startswith(ENCODING)} for vae in (source.vae, ours))
    return _difference(theirs, None, own)


def _difference(theirs: Tensors | None, their_sha256: str | None, ours: Tensors) -> str | None:
    """The first difference between a pretrained network and ours, in words; null where there is none to be seen."""
    if their_sha256 is not None:
        found = weights_sha256(ours)
        return None if found == their_sha256 else f"weights {their_sha256[:12]}, not {found[:12]}"
    if theirs is None:
        return None
    if odd := theirs.keys() ^ ours.keys():
        return f"{min(odd)} is in one of them only"
    # Files in half precision hold rounded values: ours are rounded likewise before they are compared.
    differs = (name for name in sorted(ours) if not torch.equal(ours[name].cpu().to(theirs[name].dtype), theirs[name]))
    first = next(differs, None)
    return first and f"weights {weights_sha256(theirs)[:12]}, not {weights_sha256(ours)[:12]}; first difference in {first}"
