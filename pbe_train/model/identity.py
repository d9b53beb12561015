"""What a model was trained on and with."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class RunIdentity(BaseModel):
    """What a run trains on and with; enough, with the settings, to sample from it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    dataset_fingerprint: str
    """Fingerprint of the dataset: of its plan and settings."""
    dataset_samples: str
    """Hash of how many samples each of the split's shards has. A build that is run again when more photos have come keeps its
    fingerprint, and orders its samples otherwise."""
    precision: str
    """Arithmetic of forward and backward pass: what `auto` was on the run's GPUs."""
    vae_sha256: str
    """Hash of the VAE's weights."""
    encoder_sha256: str
    """Hash of the vision encoder's weights."""
    unet: dict[str, Any]
    """diffusers' configuration of the U-Net."""
    latent_channels: int
    """C of the VAE."""
    scaling_factor: float
    """Latents are multiplied by this for the U-Net."""
    view_size: int
    """S, side of a view in px."""
