"""`dataset.json`: what a build leaves, in one file that a person can read and the trainer checks first."""

from typing import Any

from pydantic import BaseModel, ConfigDict

FORMAT_VERSION = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class VaeIdentity(_Part):
    """Which VAE made the latents."""

    source: str
    """Folder or hub id it was loaded from."""
    sha256: str
    """Hash of its weights (`pbe_core.vae.weights_sha256`)."""
    config: dict[str, Any]
    """Its architecture, as in its config.json."""
    scaling_factor: float
    """Latents are stored unscaled; a diffusion model sees them times this."""
    latent_channels: int
    """C, channels of a latent."""
    downsampling: int
    """f, view px per latent cell."""


class SplitCounts(_Part):
    """What one split holds."""

    shards: list[str]
    """Names of its shards, in order; the files are shards/<name>.tar."""
    samples: int
    """Samples in them."""
    bytes: int
    """Size of the tars."""


class Books(_Part):
    """The balance: boxes = objects + rejects, planned = samples + failures."""

    boxes: int
    """Boxes read."""
    objects: int
    """Boxes accepted."""
    rejects: dict[str, int]
    """Boxes rejected, by reason."""
    planned: int
    """Samples planned."""
    samples: int
    """Samples packed."""
    failures: dict[str, int]
    """Samples that could not be made, by code."""
    masks: dict[str, int]
    """Masks by kind."""
    padded_views: int
    """Views that no square inside the photo could hold, padded by reflection."""


class DatasetInfo(_Part):
    """The content of `dataset.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    fingerprint: str
    """Hash of all that determines the shards' bytes: inputs, settings, VAE, code version."""
    view_size: int
    """S, side of a view in px."""
    masks_per_view: int
    """K."""
    vae: VaeIdentity
    """Which VAE made the latents."""
    splits: dict[str, SplitCounts]
    """What each split holds."""
    books: Books
    """Where every box and every planned sample went."""
    settings: dict[str, Any]
    """The settings of the build, in full."""
