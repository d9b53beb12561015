"""A pretrained model in one form, whatever layout it came in; strict loading; and the metadata that an export carries.

An export's metadata says what no tensor does: how its model is to be used, how deep it is, its licence. A file in the LDM layout
carries it inside, so that a copy of the file paints the same; a folder has it in export.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pbe_train.checkpoints.key_mapping import Tensors, bare_encoder_names, starting_with
from pbe_train.model.pipeline import Run

METADATA_FILE = "export.json"
METADATA_KEY = "paint_by_example"
"""Key of the metadata (JSON) in a safetensors file, or beside the `state_dict` of a pickle."""

Kind = Literal[
    "Stable Diffusion, diffusers layout",
    "Stable Diffusion, original layout",
    "Paint by Example, diffusers layout",
    "Paint by Example, original layout",
    "run of this trainer",
]


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model. Its tensors are backed by its files and have the names of today's diffusers."""

    where: str
    """Its folder or file."""
    kind: Kind
    """What it is and how it is laid out."""
    unet_config: dict[str, Any]
    """diffusers' configuration of its U-Net."""
    unet: Tensors
    """Its U-Net."""
    conditioner: Tensors | None = None
    """What stands between vision encoder and U-Net: mapper, normalisation, projection, null vector. Null: it has none."""
    encoder: Tensors | None = None
    """Its vision encoder, under bare names (those of transformers 5)."""
    encoder_config: CLIPVisionConfig | None = None
    """The encoder's sizes."""
    encoder_sha256: str | None = None
    """In place of an encoder: the hash of the one it was trained with."""
    vae: Tensors | None = None
    """Its VAE."""
    vae_sha256: str | None = None
    """In place of a VAE: the hash of the one it was trained with."""
    prediction: str | None = None
    """What its U-Net predicts, where it says so, in diffusers' words."""
    trained_with: dict[str, Any] = field(default_factory=dict)
    """Settings of `train.model` that it was trained with, where it says so."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Metadata of an export of this project; empty for any other model."""
    aside: dict[str, int] = field(default_factory=dict)
    """What it has and a training has no use for: what it is -> tensors; 0 for what was not opened."""


class ModelTensors(NamedTuple):
    """The tensors of a trained model by part, contiguous and on the CPU, under names of diffusers and transformers 5."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    encoder: dict[str, Tensor]
    """The vision encoder, under bare names."""
    conditioner: dict[str, Tensor]
    """Mapper, normalisation, projection, null vector."""


def tensors_of(run: Run) -> ModelTensors:
    """All tensors of a run that painting needs."""
    state = run.model.conditioner.state_dict()
    conditioner = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    parts = (run.model.unet.state_dict(), run.vae.state_dict(), bare_encoder_names(starting_with("model.", state)), conditioner)
    return ModelTensors(*({name: tensor.detach().cpu().contiguous() for name, tensor in part.items()} for part in parts))


@torch.no_grad()
def strict_load(target: Mapping[str, Tensor], tensors: Tensors, where: str, part: str) -> None:
    """Copy all of `tensors` into all of `target`.

    Args:
        target: of one part of the model.
        tensors: of the same names and shapes, in any precision.
        where: file or folder of the tensors, for messages.
        part: what they are, for messages.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape; then nothing was copied.
    """
    missing, unexpected = sorted(target.keys() - tensors.keys()), sorted(tensors.keys() - target.keys())
    reshaped = [
        f"{name} {list(tensors[name].shape)}, not {list(target[name].shape)}"
        for name in sorted(target.keys() & tensors.keys())
        if target[name].shape != tensors[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(faults.values()):
        listed = (
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in faults.items()
            if names
        )
        raise InputError(f"{where}: the tensors of its {part} do not fit: {'; '.join(listed)}")
    for name, tensor in tensors.items():
        target[name].copy_(tensor)


def parse_metadata(text: object) -> dict[str, Any]:
    """The metadata in a value of `METADATA_KEY`; empty where it is none."""
    try:
        content = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def metadata_beside(folder: Path, file: str) -> dict[str, Any]:
    """The content of export.json in a folder; empty where it is not about `file` (weights, by their path in the folder)."""
    try:
        metadata = json.loads((folder / METADATA_FILE).read_bytes())
        mine = metadata["files"][file]["bytes"] == (folder / file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return metadata if mine else {}


def check_depth(where: str, blocks: int, layers: int, metadata: Mapping[str, Any]) -> None:
    """Refuse a model that is not whole, which would otherwise be taken for a shallower one.

    Args:
        where: file or folder, for messages.
        blocks: of its conditioner.
        layers: of its vision encoder.
        metadata: how deep it says it is; by default the published programs' rule, (layers + 1) // 5 blocks.

    Raises:
        InputError: it has other depths.
    """
    expected = metadata.get("conditioner_blocks", (layers + 1) // 5), metadata.get("encoder_layers", layers)
    if (blocks, layers) != expected:
        raise InputError(
            f"{where}: its conditioner has {number_of(blocks, 'block')} and its vision encoder {number_of(layers, 'layer')}, "
            f"where {expected[0]} and {expected[1]} belong together: it is cut short or of another kind"
        )
