"""A reference of any size -> the encoder's square: what training, validation, editing and evaluation have to do alike.

squash   the whole square is the reference, its aspect is lost                        (as published)
pad      the aspect is kept: longer side = side of the square, centred on PADDING

Always antialiased. The published code trains on references that it resizes without antialias, and edits with references that
Pillow resizes with it. A dataset built with `references.resize: published` holds the former as squares, which pass unchanged.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn.functional import interpolate

from pbe_core.errors import InputError
from pbe_train.config import ReferenceGeometry
from pbe_train.data.latents import CLIP_MEAN
from schemas.dataset import DatasetInfo

Picture = UInt8[np.ndarray, "_ _ 3"]
Reference = UInt8[np.ndarray, "size size 3"]

PADDING = tuple(round(255 * mean) for mean in CLIP_MEAN)
"""RGB, 0-255, of what is no reference: the mean that the encoder subtracts, so that it sees 0 (of 255, off by 0.3 at most). Mid
grey, 127, would be up to a third of a standard deviation away, and bluish."""


def fit_reference(picture: Picture, size: int, geometry: ReferenceGeometry) -> Reference:
    """A reference as the encoder sees it.

    Args:
        picture: RGB, 0-255, of any size.
        size: side of the square, px.
        geometry: the model's.
    """
    return pad(resize(picture, *fitted_size(picture, size, geometry)), size)


def check_geometry(geometry: ReferenceGeometry, folder: Path, info: DatasetInfo) -> None:
    """Refuse to pad references whose dataset has them as squares already (`references.resize: published` of the build).

    Args:
        geometry: the model's.
        folder: of the dataset.
        info: its dataset.json.

    Raises:
        InputError: their aspect is gone, so that padding would keep what is squashed.
    """
    if geometry == "pad" and info.settings.get("references", {}).get("resize") == "published":
        raise InputError(
            f"{folder / 'dataset.json'}: its references are stored squashed to squares (references.resize: published), so "
            "model.reference_geometry: pad has no aspect to keep; train with squash, or build with references.resize: antialiased"
        )


def fitted_size(picture: Picture, size: int, geometry: ReferenceGeometry) -> tuple[int, int]:
    """Height and width, px, that a reference has within a square of `size` px."""
    if geometry == "squash":
        return size, size
    height, width = picture.shape[:2]
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def resize(picture: Picture, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resize, bilinear and antialiased: as Pillow does it, in half the time of OpenCV's INTER_AREA."""
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = interpolate(planes, (height, width), mode="bilinear", antialias=True)
    pixels: np.ndarray = cv2.merge(list(resized[0].numpy()))
    return pixels


def pad(picture: Picture, size: int) -> Reference:
    """A picture that is no larger, in the middle of a square of `PADDING`; an odd pixel is below it or to its right."""
    height, width = picture.shape[:2]
    if height == width == size:
        return picture
    top, left = (size - height) // 2, (size - width) // 2
    edges = top, size - height - top, left, size - width - left
    square: np.ndarray = cv2.copyMakeBorder(picture, *edges, cv2.BORDER_CONSTANT, value=PADDING)
    return square
