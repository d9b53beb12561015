"""CLIP, DINOv2 and ResNets as judges, from a folder or the hub in the layout of transformers.

    picture ──short side to 224, centre crop──▶ CLIP vision model and projection ──▶ its image embedding, as it comes
    picture ──to 224 x 224, aspect and all────▶ DINOv2 ──▶ its class token after the last norm
    picture ──to 224 x 224, aspect and all────▶ ResNet ──▶ the mean of its last map over all places

All resize bytes by Pillow's bicubic, which rounds to bytes again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, Dinov2Model, ResNetModel

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.judges.loading import LoadedNetwork
from pbe_core.vae import find_network, load_network, weights_sha256
from pbe_core.weight_files import COUNTERS

PREPROCESSOR = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIZE = 224
RESNET_SIZE = 224
# The published DINOv2 stretches its grid of positions by (cells + 0.1) / cells of the grid, and not to a number of cells.
OFFSET = 0.1


@dataclass(frozen=True)
class Preparation:
    """How bytes become what a network takes; lengths in px."""

    size: int
    """Of the short side, or of both sides where nothing is cropped."""
    crop: int | None
    """Side of the centre square that is seen; none: the whole picture, aspect and all."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, picture: AnyPhoto) -> Float32[np.ndarray, "3 size size"]:
        """Resize, crop, normalise."""
        image = Image.fromarray(picture)
        if self.crop is None:
            image = image.resize((self.size, self.size), self.filter)
        else:
            short = min(image.size)
            width, height = (int(self.size * side / short) for side in image.size)
            left, top = (width - self.crop) // 2, (height - self.crop) // 2
            image = image.resize((width, height), self.filter).crop((left, top, left + self.crop, top + self.crop))
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1))

    def __str__(self) -> str:
        cropped = f"the short side to {self.size} px, centre crop of {self.crop} px"
        how = cropped if self.crop else f"to {self.size} x {self.size} px"
        numbers = [", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        return f"bytes by Pillow's {self.filter.name.lower()}, {how}, x / 255, mean {numbers[0]}, deviation {numbers[1]}"


class Embedding(nn.Module):
    """A network of transformers that gives features alone: CLIP's image embedding, DINOv2's class token, a ResNet's mean map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n width"]:
        """Prepared pictures -> features."""
        seen = self.model(pixel_values=pictures)
        if "image_embeds" in seen:
            return seen.image_embeds  # type: ignore[no-any-return]
        # A ResNet's last state is a map, DINOv2's are tokens.
        last = seen.last_hidden_state
        return last.mean((2, 3)) if last.ndim == 4 else last[:, 0]  # type: ignore[no-any-return]


def load_clip(where: str) -> LoadedNetwork:
    """The judge's network: a CLIP vision model of any size with its projection.

    Raises:
        InputError: nothing of that kind there, or an incomplete one.
    """
    folder = find_network(CLIPVisionModelWithProjection, where, "image_encoder", (PREPROCESSOR,))
    _check_type(folder, where, ("clip", "clip_vision_model"), "CLIP")
    model = load_network(CLIPVisionModelWithProjection, str(folder), "image_encoder")
    state = model.state_dict()
    preparation, config = clip_preparation(folder, model.config.image_size), model.config
    hashes = weights_sha256(state), _hashes(state)
    return LoadedNetwork(Embedding(model), preparation, str(preparation), config.image_size, config.projection_dim, *hashes)


def _hashes(state: dict[str, Tensor]) -> frozenset[str]:
    """Hashes of the encoder below the projection, as transformers 5 and 4 name its tensors.

    Also of its values in half precision, as many models carry it: the same network judges no more independently for that.
    """
    encoder = {name: value for name, value in state.items() if not name.startswith("visual_projection.")}
    bare = {name.removeprefix("vision_model."): value for name, value in encoder.items()}
    prefixed = {f"vision_model.{name}": value for name, value in bare.items()}
    halves = [{name: value.half() for name, value in named.items()} for named in (bare, prefixed)]
    return frozenset(map(weights_sha256, (bare, prefixed, *halves)))


def clip_preparation(folder: Path, size: int) -> Preparation:
    """What preprocessor_config.json beside a CLIP says; without one, what CLIP's own code does for pictures of `size` px.

    Raises:
        InputError: the file is damaged, or says what is not done here.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        return Preparation(size, size, CLIP_MEAN, CLIP_STD)
    try:
        said = json.loads(path.read_bytes())
        short, crop = (_side(said.get(key, size)) for key in ("size", "crop_size"))
        mean, std = (tuple(map(float, said.get(key, own))) for key, own in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)))
        preparation = Preparation(short, crop, mean, std, Image.Resampling(said.get("resample", 3)))
        plain = all(said.get(f"do_{step}", True) is True for step in ("resize", "center_crop", "rescale", "normalize"))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StopIteration):
        raise InputError(f"{path}: damaged, or not how pictures are prepared for a CLIP") from None
    if not plain or crop != size or short < crop or len(mean) != 3 or len(std) != 3 or not all(std):
        raise InputError(f"{path}: not CLIP's way (short side, centre crop of {size} px, normalisation); remove it to use that")
    return preparation


def _side(said: Any) -> int:
    """A length, which files write as a number or in an object."""
    return int(next(iter(said.values())) if isinstance(said, dict) else said)


def load_dinov2(where: str) -> LoadedNetwork:
    """The judge's network: a DINOv2 of any size, without registers, used as FD-DINOv2's published code (dgm-eval) uses it.

    Raises:
        InputError: nothing of that kind there, or an incomplete one.
    """
    folder = find_network(Dinov2Model, where, "image_encoder")
    _check_type(folder, where, ("dinov2",), "DINOv2 without registers")
    model = load_network(Dinov2Model, str(folder), "image_encoder")
    state = model.state_dict()
    sha256, width, patch = weights_sha256(state), model.config.hidden_size, model.config.patch_size
    if DINOV2_SIZE % patch:
        raise InputError(f"{where}: patches of {patch} px do not fill {DINOV2_SIZE} px")
    positions = positions_for(model.embeddings.position_embeddings.detach(), DINOV2_SIZE // patch)
    model.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
    preparation = Preparation(DINOV2_SIZE, None, IMAGENET_MEAN, IMAGENET_STD)
    return LoadedNetwork(Embedding(model), preparation, str(preparation), DINOV2_SIZE, width, sha256)


def load_resnet(where: str) -> LoadedNetwork:
    """The judge's network: a ResNet of any depth and width, with batch norms as they were at the end of training.

    It sees the whole picture, aspect and all, as regions have any aspect; published ResNets were trained on centre crops.

    Raises:
        InputError: nothing of that kind there, or an incomplete one.
    """
    folder = find_network(ResNetModel, where, "image_encoder")
    _check_type(folder, where, ("resnet",), "ResNet")
    model = load_network(ResNetModel, str(folder), "image_encoder")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(COUNTERS)}
    preparation = Preparation(RESNET_SIZE, None, IMAGENET_MEAN, IMAGENET_STD)
    width = model.config.hidden_sizes[-1]
    return LoadedNetwork(Embedding(model), preparation, str(preparation), RESNET_SIZE, width, weights_sha256(state))


def positions_for(positions: Float32[Tensor, "1 stored width"], cells: int) -> Float32[Tensor, "1 used width"]:
    """Position embeddings of a class token and of `cells` x `cells` patches, from those of the size that was trained on."""
    stored = round((positions.shape[1] - 1) ** 0.5)
    if stored == cells:
        return positions
    grid = positions[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    # transformers gives the size in place of this factor: its last positions lie a fifth of a patch farther on.
    resized = F.interpolate(grid, scale_factor=(cells + OFFSET) / stored, mode="bicubic", align_corners=False)
    assert resized.shape[2:] == (cells, cells)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], 1)


def _check_type(folder: Path, where: str, types: tuple[str, ...], what: str) -> None:
    """Raises InputError: the network in a folder is another than it is to be used as."""
    try:
        found = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{folder / 'config.json'}: damaged") from None
    if found not in types:
        raise InputError(f"{where}: a network of the type {found}, not a {what}")
