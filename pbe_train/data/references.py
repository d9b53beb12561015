"""A reference of any size -> the encoder's square, for training, validation, editing and evaluation; in training, augmented.

    squash   the whole square is the reference, its aspect is lost                        (as published)
    pad      the aspect is kept: longer side = side of the square, centred on PADDING

Always antialiased. The published code trains on references that it resizes without antialias, and edits with references that
Pillow resizes with it. A dataset built with `references.resize: published` holds the former as squares, which pass unchanged.

Without augmentation the model learns to paste the reference back. Presets `paper` and `strong`:

paper. The published run used albumentations 0.4.3, whose `ElasticTransform` was in fact a strong random affine map
(`alpha_affine=50`) with a negligible elastic part. In albumentations 2 the transform of that name moves nothing, so the published
distribution is written out here; rotation and affine map are one map, so that pixels are interpolated once.

strong. Our own: what a user's reference may differ in from the crop of a photo.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from torch.nn.functional import interpolate

from pbe_core.errors import InputError
from pbe_core.images.crop import pad
from pbe_core.randomness import generator, name_hash, uniform
from pbe_train.config import AugmentationPreset, ReferenceGeometry
from pbe_train.data.latents import CLIP_MEAN
from schemas.dataset import DatasetInfo

Picture = UInt8[np.ndarray, "_ _ 3"]
Reference = UInt8[np.ndarray, "size size 3"]
Map = Float64[np.ndarray, "3 3"]

PADDING = tuple(round(255 * mean) for mean in CLIP_MEAN)
"""RGB, 0-255, of what is no reference: the mean that the encoder subtracts, so that it sees 0 (of 255, off by 0.3 at most). Mid
grey, 127, would be up to a third of a standard deviation away, and bluish."""

ROTATION = 20
"""Largest angle, degrees (paper, section 3.2)."""
REACH = 50 / 224
"""How far the affine map moves a corner, per axis, at most: 50 px at 224 px, of the side."""
BLUR_KERNELS = (3, 5, 7)
"""Sides of the box blur, px."""

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


PAPER = {
    "flip": 0.5,  # Left and right change places.
    "rotate": 0.5,  # Within 20 degrees.
    "blur": 0.3,  # A box of 3 to 7 px.
    "elastic": 0.3,  # The random affine map.
}
"""Probabilities of the parts of the preset `paper`."""
STRONG = {
    # Everything beside the object becomes the encoder's mean colour, where its outline is known and covers at least 20 %.
    "erase": 0.3,
    "light": 0.5,  # Brightness and contrast change by up to 20 %.
    "gamma": 0.3,  # A power of 0.65 to 1.5: dark and bright parts change unlike.
    "colour": 0.3,  # Hue turns by up to 12 degrees, saturation changes by up to 16 % of its range.
    "resolution": 0.3,  # Shrunk to 15 to 60 % of the side and enlarged again.
    "blur": 0.2,  # A Gaussian blur of 0.5 to 2.5 px at 224 px.
    "compression": 0.2,  # Written as a JPEG of quality 25 to 80.
    "flip": 0.5,  # Left and right change places.
    "affine": 0.8,  # Scaled by 0.7 to 1.25, turned within 25 degrees, sheared within 12 per axis, moved by up to 10 %.
    "elastic": 0.3,  # Bent: pixels move by 5 px at 224 px on average, neighbours together.
}
"""Those of `strong`; each is drawn by a name of its own, whatever the others do."""


@dataclass(frozen=True)
class Augmentation:
    """A preset, and the probabilities of its parts."""

    preset: AugmentationPreset = "paper"
    paper: Mapping[str, float] = field(default_factory=PAPER.copy)
    strong: Mapping[str, float] = field(default_factory=STRONG.copy)

    @property
    def needs_outlines(self) -> bool:
        """Whether the objects' own pixels are asked for, which costs a sample's reading a member more."""
        return self.preset == "strong" and self.strong["erase"] > 0


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
    if augmentation.preset != "strong":
        square = fit_reference(picture, size, geometry)
        return apply(draw_published(augmentation.paper, size, *names), square) if augmentation.preset == "paper" else square
    fired = {part for part, odds in augmentation.strong.items() if uniform(*names, part, "fires") < odds}
    if outline is not None and "erase" in fired:
        picture = erase(picture, outline)
    picture = resize(picture, *fitted_size(picture, size, geometry))
    for part in PHOTO:
        if part in fired:
            picture = change(part, picture, size, *names)
    square = pad(picture, size, PADDING)
    for part in POSE:
        if part in fired:
            square = change(part, square, size, *names)
    return square


def fit_reference(picture: Picture, size: int, geometry: ReferenceGeometry) -> Reference:
    """A reference as the encoder sees it.

    Args:
        picture: RGB, 0-255, of any size.
        size: side of the square, px.
        geometry: the model's.
    """
    return pad(resize(picture, *fitted_size(picture, size, geometry)), size, PADDING)


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
    pixels = torch.from_numpy(np.require(picture, requirements=["C", "W"]))
    # The fast way is for strides of channels-last, which `pixels.permute(2, 0, 1)[None]` does not have.
    batch = pixels.reshape(1, *picture.shape).permute(0, 3, 1, 2)
    resized = interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


class Drawn(NamedTuple):
    """What was drawn for one reference, in the order in which it is done."""

    flip: bool
    """Whether left and right change places."""
    kernel: int | None
    """Side of the box blur, px; None for no blur."""
    map: Map | None
    """Where a pixel goes, in homogeneous coordinates (x, y, 1) of pixel centres; None where it stays."""


def draw_published(odds: Mapping[str, float], size: int, *names: int | str) -> Drawn:
    """What the published run would do to a reference of `size` px: each part fires with its own probability, alone.

    Source: Yang et al. 2023, section 3.2, and what albumentations 0.4.3 made of the published code's call.
    """
    # All numbers are drawn, whatever fires: a probability changes its own part of the augmentation and no other.
    numbers = generator(*names).random(12)
    flip, rotate, blur, elastic = numbers[:4] < [odds[part] for part in ("flip", "rotate", "blur", "elastic")]
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
    """The transform of each part, for squares of this side in px; `STRONG` says what they come to."""
    import albumentations  # Here, since it takes two seconds, and the other presets need none of it.

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
