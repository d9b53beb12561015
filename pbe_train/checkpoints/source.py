"""What a model to start from holds, in one form whatever layout it came in; every tensor of it is in one of these places."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import CLIPVisionConfig

from pbe_train.checkpoints.key_mapping import Tensors

Kind = Literal[
    "Stable Diffusion, diffusers layout",
    "Stable Diffusion, original layout",
    "Paint by Example, diffusers layout",
    "Paint by Example, original layout",
    "run of this trainer",
]


@dataclass(frozen=True)
class Source:
    """A model to start from. Tensors are backed by its files and have the names that today's diffusers gives them."""

    where: str
    """The folder or file, for messages."""
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
    """Settings of `train.model` that it was trained with, where it says so: how it sees references and masks."""
    record: dict[str, Any] = field(default_factory=dict)
    """What an export of this project says of itself; empty for any other model."""
    aside: dict[str, int] = field(default_factory=dict)
    """What is there and has no use here: what it is -> tensors; 0 for what was not opened."""
    unknown: tuple[str, ...] = ()
    """Of `aside`, what no published model has, and so may have had a meaning."""
