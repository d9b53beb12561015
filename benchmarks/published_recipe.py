"""A sample as the published recipe prepares it, from its description: what `benchmarks/packing.py` compares with.

    photo ──decoded──▶ float tensor of the whole photo ─┐
      │                float mask of the whole photo ───┴──square crop, resize──▶ view, mask, masked view
      └──decoded again──▶ box + 10 px ──▶ 224 x 224 reference

Every sample decodes its photo twice and draws one mask, at the photo's size: an arbitrary shape as an RGB picture that becomes
three channels of floats, its points by six evaluations of their curve each. Where that leaves something open, this takes the
faster way: boxes are known beforehand, views are resized without antialiasing. A photo's EXIF is ignored both times. What the
loader then does to the reference, `published_augmentation`, is a trainer's work and not a build's. Needs the package `bezier`.

Source: Yang et al. 2023, section 4.1, and the published loader (https://github.com/Fantasy-Studio/Paint-by-Example,
ldm/data/open-images.py), of which nothing is copied here.
"""

import importlib.util
from functools import partial
from pathlib import Path
from random import Random

import albumentations
import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate

from pbe_core.images.crop import Rectangle

VIEW, REFERENCE = 512, 224
PADDING = 10
MAX_EXTENSION, MAX_ZOOM = 0.4, 0.6
BESSEL_SHARE = 0.5
POINTS_PER_EDGE, STEP, JITTER = 18, 0.05, 5
GREY_MEAN = GREY_STD = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def is_installed() -> bool:
    """Whether the package is there that this way evaluates its curves with."""
    return importlib.util.find_spec("bezier") is not None


def prepare_sample(
    path: Path, box: Rectangle, random: Random, augmentation: albumentations.Compose | None = None
) -> dict[str, torch.Tensor]:
    """View, mask (1 = keep), masked view and reference of one object.

    Args:
        path: the photo's file.
        box: the object's, photo px.
        random: the source of every choice.
        augmentation: of the reference.
    """
    photo = Image.open(path).convert("RGB")
    again = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION), cv2.COLOR_BGR2RGB)
    width, height = photo.size

    reference = cut_reference(again, box)
    if augmentation:
        reference = augmentation(image=reference)["image"]

    extended = extend_box(box, width, height, random)
    mask = draw_mask(box, extended, width, height, random)
    view = normalised(to_tensor(np.asarray(photo)), GREY_MEAN, GREY_STD)
    square = square_crop(extended, width, height, random)
    if square:  # Otherwise the whole photo is squashed, as published.
        left, top, side = square
        view, mask = view[:, top : top + side, left : left + side], mask[:, top : top + side, left : left + side]
    view, mask = resized(view), resized(mask)
    return {
        "view": view,
        "mask": mask,
        "masked": view * mask,
        "reference": normalised(to_tensor(reference), CLIP_MEAN, CLIP_STD),
    }


def published_augmentation() -> albumentations.Compose:
    """The published chain, called by name in today's albumentations.

    Its elastic transform moves nothing there; that of the version of then (0.4.3) smoothed fields of float64 and warped twice.
    """
    return albumentations.Compose(
        [
            albumentations.Resize(REFERENCE, REFERENCE),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Rotate(limit=20),
            albumentations.Blur(p=0.3),
            albumentations.ElasticTransform(p=0.3),
        ]
    )


def extend_box(box: Rectangle, width: int, height: int, random: Random) -> Rectangle:
    """Each side pushed outward by a uniform random share, up to 0.4, of the free space on that side; all in whole px."""
    left, top, right, bottom = whole_pixels(box)
    return Rectangle(
        left - random.randint(0, int(MAX_EXTENSION * left)),
        top - random.randint(0, int(MAX_EXTENSION * top)),
        right + random.randint(0, int(MAX_EXTENSION * (width - right))),
        bottom + random.randint(0, int(MAX_EXTENSION * (height - bottom))),
    )


def whole_pixels(box: Rectangle) -> tuple[int, int, int, int]:
    """A box cut to whole px towards the origin: one that ends within the photo's last pixel does not touch its edge."""
    return int(box.x_min), int(box.y_min), int(box.x_max), int(box.y_max)


def draw_mask(
    box: Rectangle, extended: Rectangle, width: int, height: int, random: Random
) -> Float[torch.Tensor, "1 height width"]:
    """A mask of the photo's size, 1 = keep and 0 = edit region: the extended box or, by the toss of a coin, Bessel curves."""
    if random.random() < BESSEL_SHARE:
        # A picture of three channels, all of which become floats; one of them is taken.
        canvas = Image.new("RGB", (width, height), (255, 255, 255))
        ImageDraw.Draw(canvas).polygon(bessel_points(box, extended, random), fill=(0, 0, 0))
        return to_tensor(np.asarray(canvas))[:1]
    region = np.zeros((height, width))
    x_min, y_min, x_max, y_max = extended.pixels()
    region[y_min:y_max, x_min:x_max] = 1
    return 1 - torch.from_numpy(np.array(Image.fromarray(region)))[None].to(torch.float32)


def bessel_points(box: Rectangle, extended: Rectangle, random: Random) -> list[tuple[float, float]]:
    """The outline of an arbitrary shape, photo px: points of a quadratic curve for each edge, each point moved by up to 5 px."""
    import bezier

    x, y = (box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2
    corners = [(box.x_min, box.y_min), (box.x_max, box.y_min), (box.x_max, box.y_max), (box.x_min, box.y_max)]
    controls = [(x, extended.y_min), (extended.x_max, y), (x, extended.y_max), (extended.x_min, y)]
    points = []
    for edge, control in enumerate(controls):
        nodes = np.asfortranarray(np.transpose([corners[edge], control, corners[(edge + 1) % 4]]))
        curve = bezier.Curve(nodes, degree=2)
        known_x, known_y = list[float](), list[float]()
        for number in range(1, POINTS_PER_EDGE + 1):
            # As published, which asks the curve anew each time that a coordinate is needed: six times for each point.
            at = partial(curve.evaluate, number * STEP)
            if at()[0][0] not in known_x and at()[1][0] not in known_y:
                points.append((at()[0][0] + random.randint(-JITTER, JITTER), at()[1][0] + random.randint(-JITTER, JITTER)))
                known_x.append(at()[0][0])
                known_y.append(at()[1][0])
    return points


def square_crop(extended: Rectangle, width: int, height: int, random: Random) -> tuple[int, int, int] | None:
    """Left, top and side of the square that becomes the view; None where the whole photo is squashed into it.

    A square photo is its own view. Of another photo, a square of its short side that holds the extended box is drawn, and all of
    its sides are trimmed by as much: up to 0.6 of the smallest margin between box and square. The published test compares the
    first and the last place of the square with `<=`: where both are one, the photo is squashed too.
    """
    if width == height:
        return 0, 0, width
    x_min, y_min, x_max, y_max = whole_pixels(extended)
    side = min(width, height)
    low, high, length = (x_min, x_max, width) if width > height else (y_min, y_max, height)
    first, last = max(0, high - side), min(low, length - side)
    if last <= first:
        return None
    start = random.randint(first, last)
    left, top = (start, 0) if width > height else (0, start)
    margin = min(x_min - left, y_min - top, left + side - x_max, top + side - y_max)
    trim = random.randint(0, int(MAX_ZOOM * margin))
    return left + trim, top + trim, side - 2 * trim


def cut_reference(photo: UInt8[np.ndarray, "height width 3"], box: Rectangle) -> UInt8[np.ndarray, "224 224 3"]:
    """The box padded by 10 px, and squashed to a square in one step: bilinear, without antialias."""
    height, width = photo.shape[:2]
    left, top, right, bottom = whole_pixels(box)
    crop = photo[max(0, top - PADDING) : min(height, bottom + PADDING), max(0, left - PADDING) : min(width, right + PADDING)]
    reference: np.ndarray = cv2.resize(crop, (REFERENCE, REFERENCE))
    return reference


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, C], 0-255 -> float32 [C, H, W], 0-1."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def normalised(picture: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Each channel less its mean, by its standard deviation."""
    return (picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def resized(picture: torch.Tensor) -> torch.Tensor:
    """[C, H, W] -> [C, 512, 512]."""
    return interpolate(picture[None], (VIEW, VIEW), mode="bilinear", align_corners=False)[0]
