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
from pbe_core.settings import Group
from pbe_train.config import AugmentationPreset, ReferenceGeometry
from pbe_train.data.fitting import Picture, Reference, fit_reference

Map = Float64[np.ndarray, "3 3"]

ROTATION = 20
"""Largest angle, degrees (paper, section 3.2)."""
REACH = 50 / 224
"""How far the affine map moves a corner, per axis, at most: 50 px at 224 px, of the side."""
BLUR_KERNELS = (3, 5, 7)
"""Sides of the box blur, px."""


class Strong(Group):
    """Probabilities of the parts of the preset `strong`; each is drawn by a name of its own, whatever the others do."""

    erase: float = 0.3
    """Everything beside the object becomes the encoder's mean colour, where the dataset knows the object's outline and this
    covers at least 20 % of the reference."""
    light: float = 0.5
    """Brightness and contrast change by up to 20 %."""
    gamma: float = 0.3
    """A power of 0.65 to 1.5: dark and bright parts change unlike."""
    colour: float = 0.3
    """Hue turns by up to 12 degrees, saturation changes by up to 16 % of its range."""
    resolution: float = 0.3
    """Shrunk to 15 to 60 % of the side and enlarged again."""
    blur: float = 0.2
    """A Gaussian blur of 0.5 to 2.5 px at 224 px."""
    compression: float = 0.2
    """Written as a JPEG of quality 25 to 80."""
    flip: float = 0.5
    """Left and right change places."""
    affine: float = 0.8
    """Scaled by 0.7 to 1.25, turned within 25 degrees, sheared within 12 per axis, moved by up to 10 % of the side."""
    elastic: float = 0.3
    """Bent: pixels move by 5 px at 224 px on average, neighbours together."""


class Augmentation(Group):
    """A preset, and the probabilities of its parts."""

    preset: AugmentationPreset = "paper"
    flip: float = 0.5
    """`paper`: a horizontal flip."""
    rotate: float = 0.5
    """`paper`: a rotation within 20 degrees."""
    blur: float = 0.3
    """`paper`: a box blur of 3 to 7 px."""
    elastic: float = 0.3
    """`paper`: the random affine map."""
    strong: Strong = Strong()

    @property
    def needs_outlines(self) -> bool:
        """Whether the objects' own pixels are asked for, which costs a sample's reading a member more."""
        return self.preset == "strong" and self.strong.erase > 0


class Drawn(NamedTuple):
    """What was drawn for one reference, in the order in which it is done."""

    flip: bool
    """Whether left and right change places."""
    kernel: int | None
    """Side of the box blur, px; None for no blur."""
    map: Map | None
    """Where a pixel goes, in homogeneous coordinates (x, y, 1) of pixel centres; None where it stays."""


def draw_published(augmentation: Augmentation, size: int, *names: int | str) -> Drawn:
    """What the published run would do to a reference of `size` px: each part fires with its own probability, alone.

    Source: Yang et al. 2023, section 3.2, and what albumentations 0.4.3 made of the published code's call.
    """
    # All numbers are drawn, whatever fires: a probability changes its own part of the augmentation and no other.
    numbers = generator(*names).random(12)
    flip, rotate, blur, elastic = numbers[:4] < (augmentation.flip, augmentation.rotate, augmentation.blur, augmentation.elastic)
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


def augment(augmentation: Augmentation, reference: Reference, *names: int | str) -> Reference:
    """The reference as the presets `paper` and `none` change it: a pure function of it and of the names."""
    if augmentation.preset == "none":
        return reference
    return apply(draw_published(augmentation, len(reference), *names), reference)


def prepare_reference(
    augmentation: Augmentation,
    geometry: ReferenceGeometry,
    picture: Picture,
    outline: Bool[np.ndarray, "height width"] | None,
    size: int,
    *names: int | str,
) -> Reference:
    """A reference as it is stored -> what the encoder sees of it in training: a pure function of it and of the names.

    Args:
        augmentation: which preset, and how often its parts fire.
        geometry: the model's.
        picture: RGB, 0-255.
        outline: which of its pixels are the object's, where that is known and the preset needs it.
        size: side of the encoder's square, px.
        names: what the draw is for.
    """
    if augmentation.preset == "strong":
        # Imported where it is asked for: the other presets need no albumentations, which takes two seconds.
        from pbe_train.data.strong import augment_strongly

        return augment_strongly(augmentation.strong, geometry, picture, outline, size, *names)
    return augment(augmentation, fit_reference(picture, size, geometry), *names)
