"""`dataset.json`: what a build leaves, in one file that a person can read and the trainer checks first."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import InputError
from schemas.words import number_of

FORMAT_VERSION = 4


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class VaeIdentity(_Part):
    """Which VAE made the latents."""

    source: str
    """Folder or hub id it was loaded from."""
    sha256: str
    """Hash of its weights (`schemas.weights.weights_sha256`)."""
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

    def find_imbalance(self) -> str | None:
        """The first account that does not balance, as a sentence; None if all do."""
        if self.boxes != self.objects + sum(self.rejects.values()):
            boxes = number_of(self.boxes, "box", "boxes")
            return f"of {boxes} {self.objects} were accepted and {sum(self.rejects.values())} rejected"
        if self.planned != self.samples + sum(self.failures.values()):
            planned = number_of(self.planned, "sample")
            return f"of {planned} planned {self.samples} were packed and {sum(self.failures.values())} failed"
        return None


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


def read_dataset(folder: Path) -> DatasetInfo:
    """The `dataset.json` of a dataset folder.

    Raises:
        InputError: no dataset there, a build that was not finished, or another format version.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        if (folder / "plan.parquet").is_file():
            raise InputError(f"{path}: the build in this folder is not finished; run the same build command again")
        raise InputError(f"{path}: no dataset here; build one first (`make shards`, or python pipelines/build.py --config ...)")
    try:
        content = json.loads(path.read_bytes())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; run the build again, it makes only what is missing") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; build the dataset again")
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; build the dataset again") from None
