"""Strong augmentation of the reference: without it the model learns to paste the reference back.

The published run used albumentations 0.4.3, whose `ElasticTransform` was in fact a strong random affine map (`alpha_affine=50`)
with a negligible elastic part. In albumentations 2 the transform of that name moves nothing, so the map is written out here.
"""

import random

import albumentations
import cv2
import numpy as np
from jaxtyping import UInt8

from pbe_train.config import AugmentationSettings
from schemas.randomness import generator, name_hash

Reference = UInt8[np.ndarray, "size size 3"]


class ThreePointAffine(albumentations.ImageOnlyTransform):  # type: ignore[misc]
    """The affine map that moves each corner of a triangle around the centre by up to `reach` of the side, per axis.

    Source: `elastic_transform` of albumentations 0.4.3 with its default `alpha_affine=50`, which the published run applied at
    224 px (50/224 of the side); the transform's elastic part at its defaults moves nothing that can be measured.
    """

    def __init__(self, reach: float = 50 / 224, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.reach = reach

    def get_params_dependent_on_data(self, params: dict[str, tuple[int, ...]], data: dict[str, object]) -> dict[str, np.ndarray]:
        """Draw the map."""
        size = params["shape"][0]
        centre, third = size // 2, size // 3
        corners = np.array(
            [[centre + third, centre + third], [centre + third, centre - third], [centre - third, centre - third]], np.float32
        )
        moved = corners + self.random_generator.uniform(-self.reach * size, self.reach * size, corners.shape).astype(np.float32)
        return {"matrix": cv2.getAffineTransform(corners, moved)}

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params: object) -> np.ndarray:
        """Move the pixels; what comes from beyond the edge is reflected."""
        height, width = img.shape[:2]
        shape = (width, height)
        moved: np.ndarray = cv2.warpAffine(img, matrix, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return moved


class Augmentation:
    """The chain of transforms that the settings ask for, as a function of a reference and the names that seed it."""

    def __init__(self, settings: AugmentationSettings) -> None:
        chain = [
            albumentations.HorizontalFlip(p=settings.flip),
            albumentations.Rotate(limit=20, p=settings.rotate, border_mode=cv2.BORDER_REFLECT_101),
            albumentations.Blur(blur_limit=(3, 7), p=settings.blur),
            ThreePointAffine(p=settings.elastic),
        ]
        self.compose = albumentations.Compose(chain if settings.preset == "paper" else [])

    def __call__(self, reference: Reference, *names: int | str) -> Reference:
        """Augment a reference; the result is a pure function of it and of the names."""
        # One generator for the whole chain. `set_random_seed` would give every transform the same seed, and so the same first
        # number: flip, rotation, blur and affine map would then fire together or not at all.
        self.compose.set_random_state(generator(*names, "numbers"), random.Random(name_hash(*names, "choices")))
        augmented: np.ndarray = self.compose(image=reference)["image"]
        return augmented


def squash(picture: UInt8[np.ndarray, "height width 3"], size: int) -> Reference:
    """Resize to a square without keeping the aspect, as published: the encoder sees all of the reference and nothing else."""
    shrinks = min(picture.shape[:2]) >= size
    resized: np.ndarray = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized
