"""Strong augmentation of the reference: without it the model learns to paste the reference back.

The published run used albumentations 0.4.3, whose `ElasticTransform` was in fact a strong random affine map (`alpha_affine=50`)
with a negligible elastic part. In albumentations 2 the transform of that name moves nothing, so the published distribution is
written out here; rotation and affine map are one map, so that pixels are interpolated once. Our own preset is in `strong.py`.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64

from pbe_core.randomness import generator
from pbe_train.config import AugmentationSettings, ReferenceGeometry
from pbe_train.data.fitting import Picture, Reference, fit_reference

Map = Float64[np.ndarray, "3 3"]

ROTATION = 20
"""Largest angle, degrees (paper, section 3.2)."""
REACH = 50 / 224
"""How far the affine map moves a corner, per axis, at most: 50 px at 224 px, of the side."""
BLUR_KERNELS = (3, 5, 7)
"""Sides of the box blur, px."""


class Drawn(NamedTuple):
    """What was drawn for one reference, in the order in which it is done."""

    flip: bool
    """Whether left and right change places."""
    kernel: int | None
    """Side of the box blur, px; None for no blur."""
    map: Map | None
    """Where a pixel goes, in homogeneous coordinates (x, y, 1) of pixel centres; None where it stays."""


def draw_published(settings: AugmentationSettings, size: int, *names: int | str) -> Drawn:
    """What the published run would do to a reference of `size` px: each part fires with its own probability, alone.

    Source: Yang et al. 2023, section 3.2, and what albumentations 0.4.3 made of the published code's call.
    """
    # All numbers are drawn, whatever fires: a setting changes its own part of the augmentation and no other.
    numbers = generator(*names).random(12)
    flip, rotate, blur, elastic = numbers[:4] < (settings.flip, settings.rotate, settings.blur, settings.elastic)
    angle, kernel, corners = numbers[4], numbers[5], numbers[6:].reshape(3, 2)
    whole = np.eye(3)
    if rotate:
        whole = rotation(size, (2 * angle - 1) * ROTATION)
    if elastic:
        whole = three_point_map(size, (2 * corners - 1) * REACH * size) @ whole
    return Drawn(
        flip=bool(flip),
        kernel=BLUR_KERNELS[int(kernel * len(BLUR_KERNELS))] if blur else None,
        map=whole if rotate or elastic else None,
    )


def rotation(size: int, degrees: float) -> Map:
    """Turns a square about its centre."""
    middle = (size - 1) / 2
    return np.vstack([cv2.getRotationMatrix2D((middle, middle), degrees, 1), [0.0, 0, 1]])


def three_point_map(size: int, moved: Float64[np.ndarray, "3 2"]) -> Map:
    """The affine map that moves three corners of a square around the centre, a third of the side away from it, by these px.

    Source: `elastic_transform` of albumentations 0.4.3.
    """
    centre, third = size // 2, size // 3
    corners = np.array(
        [[centre + third, centre + third], [centre + third, centre - third], [centre - third, centre - third]], np.float32
    )
    return np.vstack([cv2.getAffineTransform(corners, (corners + moved).astype(np.float32)), [0.0, 0, 1]])


def apply(drawn: Drawn, reference: Reference) -> Reference:
    """Do what was drawn; what comes from beyond the edge is reflected."""
    if drawn.flip:
        reference = cv2.flip(reference, 1)
    if drawn.kernel:
        reference = cv2.blur(reference, (drawn.kernel, drawn.kernel), borderType=cv2.BORDER_REFLECT_101)
    if drawn.map is not None:
        # With a fourth channel OpenCV moves the pixels in half the time.
        four = cv2.cvtColor(reference, cv2.COLOR_RGB2RGBA)
        size = reference.shape[:2]
        four = cv2.warpAffine(four, drawn.map[:2], size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        reference = cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)
    return reference


def augment(settings: AugmentationSettings, reference: Reference, *names: int | str) -> Reference:
    """The reference as the presets `paper` and `none` change it: a pure function of it and of the names."""
    if settings.preset == "none":
        return reference
    return apply(draw_published(settings, len(reference), *names), reference)


def prepare_reference(
    settings: AugmentationSettings,
    geometry: ReferenceGeometry,
    picture: Picture,
    outline: Bool[np.ndarray, "height width"] | None,
    size: int,
    *names: int | str,
) -> Reference:
    """A reference as it is stored -> what the encoder sees of it in training: a pure function of it and of the names.

    Args:
        settings: which preset, and how often its parts fire.
        geometry: the model's.
        picture: RGB, 0-255.
        outline: which of its pixels are the object's, where that is known and the settings need it.
        size: side of the encoder's square, px.
        names: what the draw is for.
    """
    if settings.preset == "strong":
        # Imported where it is asked for: the other presets need no albumentations, which takes two seconds.
        from pbe_train.data.strong import augment_strongly

        return augment_strongly(settings.strong, geometry, picture, outline, size, *names)
    return augment(settings, fit_reference(picture, size, geometry), *names)
