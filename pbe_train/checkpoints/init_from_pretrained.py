"""A new run's model from a pretrained one: nothing missing, nothing left over, nothing that means something else here.

Stable Diffusion 1.x    U-Net ─ 4 input channels + 5 of zeros ─▶ U-Net        conditioner: new
Paint by Example, run   U-Net ─────────────────────────────────▶ U-Net        conditioner ─▶ conditioner

The load report (start.json) says where each tensor went, what is new, and under what licence the weights are.
"""

import inspect
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.files import write_atomically
from pbe_core.vae import weights_sha256
from pbe_core.words import noun, number_of
from pbe_train.checkpoints.key_mapping import Tensors, bare_encoder_names, count_blocks
from pbe_train.checkpoints.networks import build_model, load_encoder, read_pretrained
from pbe_train.checkpoints.pretrained import PretrainedModel, strict_load
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel, assemble

REPORT_FILE = "start.json"
OPEN_RAIL = "creativeml-openrail-m"
GUESSED = ", as Stable Diffusion's, if that is what it was"

# What may differ between U-Nets of Stable Diffusion 1.x's kind: their sizes. Anything else is another architecture.
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
}
FIRST_LAYER = "conv_in.weight"
# diffusers' own, in and out, for a configuration that does not say.
DEFAULT_CHANNELS = 4


@dataclass(frozen=True)
class LoadReport:
    """Where the weights of a new run are from."""

    source: str
    """File or folder of the pretrained model."""
    kind: str
    """What it is."""
    loaded: dict[str, int]
    """Part of the model -> tensors that were loaded into it."""
    new: list[str]
    """What the pretrained model does not have, in words."""
    aside: dict[str, int]
    """What it has and the new model has no use for -> tensors; 0 for what was not opened."""
    licence: str | None
    """Licence of its weights, by the name that the hub gives it; null where it is not known."""
    licence_guessed: bool = False
    """Whether that is the licence of what is published in this layout, and nothing says that this is such a model."""
    otherwise: list[str] = field(default_factory=list)
    """Settings that differ from those it was trained with."""

    def lines(self) -> str:
        """The report as a person reads it."""
        loaded = ", ".join(f"{count} {noun(count, 'tensors')} of the {part}" for part, count in self.loaded.items())
        aside = ", ".join(f"{what} ({count or 'not opened'})" for what, count in self.aside.items())
        return (
            f"start: {self.source} ({self.kind})\n"
            f"  loaded      {loaded}\n"
            f"  new         {'; '.join(self.new) or 'nothing'}\n"
            f"  left aside  {aside or 'nothing'}\n"
            f"  licence     {self.licence or 'not known'}{GUESSED if self.licence_guessed else ''}"
            + "".join(f"\n  otherwise   {difference}" for difference in self.otherwise)
        )


def init_from_pretrained(settings: TrainSettings, vae: AutoencoderKL) -> tuple[PaintByExampleModel, LoadReport | None]:
    """The model of a new run, and the report on where its weights are from; null for a run from scratch.

    New parts get their weights from torch's global generator.

    Args:
        settings: of the run.
        vae: the dataset's.

    Raises:
        InputError: the pretrained model is damaged, of another kind or incomplete, or contradicts the settings or the dataset.
    """
    channels = int(vae.config.latent_channels)
    if settings.model.pretrained is None:
        return build_model(settings.model, channels), None
    source = read_pretrained(settings.model.pretrained)
    check_architecture(source, channels)
    check_settings(source, settings)
    check_vae(source, vae)
    encoder = load_encoder(settings.model.encoder)
    check_encoder(source, bare_encoder_names(encoder.state_dict()), settings.model.encoder)

    # Not filled with random numbers first: every weight is about to be replaced, and at full size they take a while to draw.
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**source.unet_config, "in_channels": 2 * channels + 1})
    model = assemble(settings.model, unet.to_empty(device="cpu"), encoder)
    new = []
    tensors = dict(source.unet)
    if source.unet_config.get("in_channels", DEFAULT_CHANNELS) == channels and FIRST_LAYER in tensors:
        tensors[FIRST_LAYER] = widened(tensors[FIRST_LAYER])
        new.append(f"{channels + 1} more input channels of unet.conv_in, all 0")
    elif source.conditioner is None:
        new.append(f"nothing in unet.conv_in: it has the {channels + 1} more input channels already, all 0")
    strict_load(unet.state_dict(), tensors, source.where, "U-Net")
    if source.conditioner is None:
        new.append("the conditioner, at random")
    else:
        conditioner = {name.removeprefix("conditioner."): own for name, own in model.kept().items() if name[:5] != "unet."}
        strict_load(conditioner, source.conditioner, source.where, "conditioner")
    return model, make_report(source, new, settings.model)


def widened(weight: Float[Tensor, "out channels height width"]) -> Float[Tensor, "out wide height width"]:
    """The first layer's weight with input channels for masked view and mask, all 0: at first they change nothing."""
    channels = weight.shape[1]
    return torch.cat([weight, weight.new_zeros(weight.shape[0], channels + 1, *weight.shape[2:])], dim=1)


def is_widened(source: PretrainedModel, channels: int) -> bool:
    """Whether a text-to-image U-Net has the input channels for masked view and mask already, all 0.

    The published training started from such a file, `sd-v1-4-modified-9channel.ckpt`, made of Stable Diffusion's by its script.
    """
    weight = source.unet.get(FIRST_LAYER)
    return (
        source.conditioner is None
        and weight is not None
        and weight.shape[1] == 2 * channels + 1
        and not weight[:, channels:].any()
    )


def check_architecture(source: PretrainedModel, channels: int) -> None:
    """Refuse a U-Net that is not one of Stable Diffusion 1.x's kind, or whose inputs mean something else.

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
                f"{source.where}: its U-Net is not of Stable Diffusion 1.x's kind ({name} is {value!r}, there it is {usual!r}); "
                "give a 1.x model"
            )
    for name in ("cross_attention_dim", "attention_head_dim", "layers_per_block"):
        if not isinstance(config.get(name, 1), int):
            raise InputError(
                f"{source.where}: its U-Net has {name} {config[name]!r}, one number a model is needed; give a 1.x model"
            )
    inputs, outputs = (config.get(name, DEFAULT_CHANNELS) for name in ("in_channels", "out_channels"))
    if outputs != channels:
        raise InputError(
            f"{source.where}: its U-Net paints latents of {outputs} channels, the dataset's have {channels}; "
            "give a model of the dataset's VAE"
        )
    if is_widened(source, channels):
        return
    if source.conditioner is None and inputs == 2 * channels + 1:
        raise InputError(
            f"{source.where}: an inpainting model: its {inputs} input channels are latent, mask, masked view, with 1 = repaint; "
            "here they are latent, masked view, mask, with 1 = keep; give the text-to-image model that it was made of"
        )
    expected = channels if source.conditioner is None else 2 * channels + 1
    if inputs != expected:
        raise InputError(
            f"{source.where}: its U-Net has {inputs} input channels, where {expected} are expected of a "
            f"{'text-to-image' if source.conditioner is None else 'Paint by Example'} model; give one of these"
        )


def check_settings(source: PretrainedModel, settings: TrainSettings) -> None:
    """Refuse a pretrained model that the settings contradict. Raises InputError: naming the setting."""
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
            f"{source.where}: its conditioner has {number_of(blocks, 'block')}, model.conditioner_blocks says "
            f"{settings.model.conditioner_blocks}; set model.conditioner_blocks to {blocks}"
        )
    projection = source.conditioner.get("proj_out.weight")
    width = source.unet_config.get("cross_attention_dim")
    if projection is not None and projection.shape[0] != width:
        raise InputError(
            f"{source.where}: its conditioner makes tokens of {projection.shape[0]} features, its U-Net takes {width} "
            "(cross_attention_dim): these are parts of different models"
        )


def check_vae(source: PretrainedModel, vae: AutoencoderKL) -> None:
    """Refuse a pretrained model whose VAE is not the dataset's: its U-Net was trained on other latents.

    Raises:
        InputError: with what differs.
    """
    fault = _difference(source.vae, source.vae_sha256, vae.state_dict())
    if fault:
        raise InputError(
            f"{source.where}: its VAE is not the dataset's ({fault}), and a U-Net paints in the latents of its own; "
            "build the dataset with that VAE (latents.vae), or give a model of the dataset's"
        )


def check_encoder(source: PretrainedModel, encoder: Tensors, setting: str) -> None:
    """Refuse a pretrained model whose conditioner was trained on another vision encoder than `encoder` (bare names).

    Raises:
        InputError: with what differs.
    """
    fault = _difference(source.encoder, source.encoder_sha256, encoder)
    if fault:
        way_out = f"set model.encoder to {source.where}" if source.encoder else "set model.encoder to that of the run"
        raise InputError(f"{source.where}: its vision encoder is not model.encoder, {setting} ({fault}); {way_out}")


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
    if first is None:
        return None
    return f"weights {weights_sha256(theirs)[:12]}, not {weights_sha256(ours)[:12]}; first difference in {first}"


def make_report(source: PretrainedModel, new: list[str], model: ModelSettings) -> LoadReport:
    """The report on a pretrained model whose U-Net and conditioner were loaded in full."""
    conditioner = {"conditioner": len(source.conditioner)} if source.conditioner else {}
    same = {"vision encoder, that of model.encoder": source.encoder, "VAE, that of the dataset": source.vae}
    licence, guessed = _licence_of(source)
    painting = source.metadata.get("painting")
    # Metadata is a stranger's: what is no table says nothing.
    had = {**(painting if isinstance(painting, dict) else {}), **source.trained_with}
    differences = [
        f"{name} {getattr(model, name)}, where it was trained with {had[name]}; is that meant?"
        for name in ("tokens", "reference_geometry", "mask_to_latent")
        if had.get(name, getattr(model, name)) != getattr(model, name)
    ]
    return LoadReport(
        source=source.where,
        kind=source.kind,
        loaded={"U-Net": len(source.unet), **conditioner},
        new=new,
        aside={what: len(tensors) for what, tensors in same.items() if tensors} | source.aside,
        licence=licence,
        licence_guessed=guessed,
        otherwise=differences,
    )


def write_report(report: LoadReport, run: Path) -> None:
    """Leave the report in a run folder, as start.json."""
    write_atomically(run / REPORT_FILE, (json.dumps(asdict(report), indent=1) + "\n").encode())


def read_report(checkpoint: Path) -> dict[str, Any] | None:
    """The start.json of the run that a checkpoint folder is of; null where there is none."""
    try:
        content = json.loads((checkpoint.parent.parent / REPORT_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _licence_of(source: PretrainedModel) -> tuple[str | None, bool]:
    """The licence, and whether it is a guess."""
    run = source.kind == "run of this trainer"
    known = (read_report(Path(source.where)) or {}) if run else source.metadata
    if run or "licence" in known:
        return known.get("licence"), bool(known.get("licence_guessed"))
    return OPEN_RAIL, True
