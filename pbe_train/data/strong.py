"""Our own strong augmentation, `augmentation.preset: strong`: what a user's reference may differ in from the crop of a photo.

    stored reference ─ erase ─▶ fit (squash or pad) ─ light, gamma, colour, resolution, blur, compression ─ pad ─▶
                                                                                flip, affine, elastic ─▶ square

    erase         references at hand are often cut out; and where the background is gone, the object alone is left to be painted
    light, gamma  the same object in another light: the model must take its light from the scene, not from the reference
    colour        white balance. Weak: an object's colour is a part of what it is, and is to be painted
    resolution    small photos, enlarged: their details are to be guessed, not their blockiness to be painted
    blur          out of focus, likewise
    compression   JPEG's blocks and fringes, likewise
    flip, affine  another pose and place within the crop, so that the model cannot paste the reference back (paper, section 3.2)
    elastic       another shape: an affine map alone leaves straight lines straight, so that it could be undone

All parts but three are transforms of albumentations. What a photo may have suffered comes first and spares the padding, which
looks the same in training as in use. What moves pixels fills with the padding's colour what comes from beyond the edge: a
reflection would show the object twice.

Compose.set_random_seed of albumentations gives one seed to all of its transforms, so that they fire together. Here each part is
drawn by its own name, and has generators of its own. Its ElasticTransform is not used: with numbers that move anything it takes
3 ms, and tears the edges, towards which it smooths noise that it repeats there: corners move by half the side. Nor is its
ImageCompression: it hands RGB to an encoder that takes BGR, so that red and blue are weighed as one another.
"""

import copy
import functools
from random import Random
from typing import Any

import albumentations
import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from pbe_core.randomness import generator, name_hash, uniform
from pbe_core.settings import Group
from pbe_train.config import ReferenceGeometry
from pbe_train.data.fitting import PADDING, Picture, Reference, fitted_size, pad, resize

PHOTO = ("light", "gamma", "colour", "resolution", "blur", "compression")
"""Parts that a photo may have suffered, in the order in which it does."""
POSE = ("flip", "affine", "elastic")
"""Parts that move pixels."""

BENT = 8 / 224
"""How far the elastic part moves a point of its grid, of the side, per axis, at most."""
CELLS = 8
"""Points of that grid per axis. They lie three times as far apart as they move, so that nothing folds."""
SHRUNK = 0.15, 0.6
"""To which share of their sides references of low resolution are shrunk."""
BLURS = 0.5 / 224, 2.5 / 224
"""Standard deviations, of the side, of the blur."""
QUALITIES = 25, 80
"""The least and the best quality of a JPEG."""
LEAST_SHOWN = 0.2
"""The least share of a reference that an outline must cover for the rest to be erased, as in the build's min_object_share."""


def augment_strongly(
    odds: Group,
    geometry: ReferenceGeometry,
    picture: Picture,
    outline: Bool[np.ndarray, "height width"] | None,
    size: int,
    *names: int | str,
) -> Reference:
    """A reference as it is stored -> what the encoder sees of it in training; a pure function, as `augment.prepare_reference`.

    Args:
        odds: how often each part fires, an `augment.Strong`.
        geometry: the model's.
        picture: RGB, 0-255.
        outline: which of its pixels are the object's; None where that is not known.
        size: side of the encoder's square, px.
        names: what the draw is for.
    """
    if outline is not None and fires("erase", odds, *names):
        picture = erase(picture, outline)
    picture = resize(picture, *fitted_size(picture, size, geometry))
    for part in PHOTO:
        if fires(part, odds, *names):
            picture = change(part, picture, size, *names)
    square = pad(picture, size)
    for part in POSE:
        if fires(part, odds, *names):
            square = change(part, square, size, *names)
    return square


def fires(part: str, odds: Group, *names: int | str) -> bool:
    """Whether a part is done: drawn by its own name, so that no other part has a say."""
    probability: float = getattr(odds, part)
    return uniform(*names, part, "fires") < probability


def erase(
    picture: UInt8[np.ndarray, "height width 3"], outline: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The padding's colour wherever the object is not; the picture itself where the outline covers less than `LEAST_SHOWN` of it.

    The build's rule looks only at references that it cuts out itself, so datasets hold outlines of any share.
    """
    if outline.mean() < LEAST_SHOWN:
        return picture
    erased = picture.copy()
    erased[~outline] = PADDING
    return erased


def change(part: str, picture: Picture, size: int, *names: int | str) -> Picture:
    """Do one part, with numbers that depend on the names and on the part alone.

    Args:
        part: one of `PHOTO` or `POSE`.
        picture: RGB, 0-255.
        size: side of the square that it lies in, px: lengths are in proportion to it.
        names: what the draw is for.
    """
    if part == "elastic":
        return bend(picture, generator(*names, part))
    if part == "compression":
        return compress(picture, int(generator(*names, part).integers(*QUALITIES, endpoint=True)))
    if part == "resolution" and min(picture.shape[:2]) * SHRUNK[0] < 1:
        return picture  # OpenCV refuses to make pictures without a pixel.
    # A copy, as a transform keeps generators and what it drew last.
    transform = copy.copy(transforms(size)[part])
    transform.set_random_state(generator(*names, part), Random(name_hash(*names, part)))
    changed: np.ndarray = transform(image=picture)["image"]
    return changed


@functools.lru_cache
def transforms(size: int) -> dict[str, Any]:
    """The transform of each part, for squares of this side in px. What is not said here is as in `augment.Strong`."""
    return {
        "light": albumentations.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=1),
        "gamma": albumentations.RandomGamma(gamma_limit=(65, 150), p=1),
        # OpenCV's hues go up to 180, saturations to 255.
        "colour": albumentations.HueSaturationValue(hue_shift_limit=6, sat_shift_limit=40, val_shift_limit=0, p=1),
        "resolution": albumentations.Downscale(
            scale_range=SHRUNK, interpolation_pair={"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}, p=1
        ),
        "blur": albumentations.GaussianBlur(sigma_limit=(BLURS[0] * size, BLURS[1] * size), blur_limit=0, p=1),
        "flip": albumentations.HorizontalFlip(p=1),
        "affine": albumentations.Affine(
            scale=(0.7, 1.25),
            rotate=(-25, 25),
            shear=(-12, 12),
            translate_percent=(-0.1, 0.1),
            keep_ratio=True,
            border_mode=cv2.BORDER_CONSTANT,
            fill=PADDING,
            p=1,
        ),
    }


def compress(picture: Picture, quality: int) -> Picture:
    """The picture as it comes out of a JPEG of this quality, with colours at half the resolution, as most programs write it."""
    written: np.ndarray = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    read: np.ndarray = cv2.cvtColor(cv2.imdecode(written, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return read


def bend(square: Reference, random: np.random.Generator) -> Reference:
    """A smooth random deformation: the points of a coarse grid move, and what lies between them goes along.

    Source: free-form deformation (Rueckert et al., IEEE TMI 1999), with OpenCV's cubic interpolation in the place of B-splines.
    """
    size = len(square)
    whence = places(size) + moves(size, random)
    bent: np.ndarray = cv2.remap(square, whence, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=PADDING)
    return bent


def moves(size: int, random: np.random.Generator) -> Float32[np.ndarray, "size size 2"]:
    """Whence `bend` takes each pixel: x, y in px, relative to where it goes."""
    grid = random.uniform(-BENT * size, BENT * size, (CELLS, CELLS, 2)).astype(np.float32)
    smooth: np.ndarray = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return smooth


@functools.lru_cache
def places(size: int) -> Float32[np.ndarray, "size size 2"]:
    """The x, y of each pixel of a square."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return np.stack([x, y], axis=-1)
