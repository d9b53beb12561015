"""`dataset.json`: what a build leaves, in one file that a person can read and the trainer checks first."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_serializer

FORMAT_VERSION = 5
CUTTING_VERSION = 2
"""Of how pixels are cut and resized: another one makes other bytes of the same photo. Datasets and pair sets of all are read."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def leave_out(content: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What is written, without fields that have these values."""
    return {name: value for name, value in content.items() if name not in defaults or value != defaults[name]}


class Normalisation(_Part):
    """How a VAE's own latents are changed before they are stored, channel by channel: (latent - shift) / spread."""

    shift: tuple[float, ...]
    """diffusers' `latents_mean`, or `shift_factor` in every channel."""
    spread: tuple[float, ...]
    """diffusers' `latents_std`; 1 where there is only a shift."""


class VaeIdentity(_Part):
    """Which VAE made the latents. The fields with defaults are left out of the file where they have these."""

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
    kind: str = "AutoencoderKL"
    """Class of diffusers, or `TAEF2`."""
    deterministic: bool = False
    """Whether a picture has one latent and not a distribution: shards hold C channels of it, without standard deviations."""
    normalisation: Normalisation | None = None
    """What was done to the VAE's own latents (and deviations) before they were stored; null: nothing."""

    @property
    def stored_channels(self) -> int:
        """Channels of a latent in the shards: mean and standard deviation, or the mean alone."""
        return self.latent_channels * (1 if self.deterministic else 2)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Written as before there were these fields, so that what did not need them is the same bytes."""
        return leave_out(write(self), {"kind": "AutoencoderKL", "deterministic": False, "normalisation": None})


def shard_name(split: str, number: int, shape: tuple[int, int] | None = None) -> str:
    """A shard's name: `train-000012`; in a dataset of several shapes of views, `train-640x384-000012` (width x height, px)."""
    return f"{split}-{number:06d}" if shape is None else f"{split}-{shape[0]}x{shape[1]}-{number:06d}"


def shard_group(name: str) -> str:
    """The shards that are numbered with this one: its name without its number."""
    return name.rpartition("-")[0]


def shard_split(name: str) -> str:
    """The split that a shard is of, by its name."""
    return name.split("-")[0]


def shard_shape(name: str) -> tuple[int, int] | None:
    """Width and height in px of the views of a shard, by its name; null where the dataset has one size of views, `view_size`."""
    parts = name.split("-")
    if len(parts) < 3:
        return None
    width, height = parts[1].split("x")
    return int(width), int(height)


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
    references: int = 0
    """References from other photos in the samples; left out where there are none."""
    lost_references: dict[str, int] = {}
    """Those that were planned for these samples and could not be cut, by code; left out likewise."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out(write(self), {"references": 0, "lost_references": {}})


class DatasetInfo(_Part):
    """The content of `dataset.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    fingerprint: str
    """Hash of all that determines the shards' bytes: inputs, settings, VAE, code version."""
    view_size: int
    """S, side of a view in px; with `buckets`, of a square as large as the largest of them."""
    buckets: tuple[tuple[int, int], ...] | None = None
    """Shapes of views, px, if not all are squares of S. A shard has one, as in `train-640x384-000000`. Null is left out."""
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

    def view_shape(self, shard: str) -> tuple[int, int]:
        """Width and height in px of the views in a shard."""
        return (self.buckets and shard_shape(shard)) or (self.view_size, self.view_size)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out(write(self), {"buckets": None})
