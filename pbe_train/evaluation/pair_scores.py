"""Scores of one pair: what was painted beside the photo, the mask and the reference. Pure functions of pictures, and of features.

    photo, mask, reference ──copy_paste──▶ the baseline that pastes        picture ──psnr_outside | seam──▶ is the rest untouched?
    picture, mask ──cut_region | published_clip_pictures──▶ for judges     picture ──copying──▶ is it the reference's pixels?

Pictures are RGB, 0-255; photo, picture and mask of a pair are of one size; mask True = repainted. Lengths in px.
"""

import math

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.crop import resize

CLIP_SIZE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COPY_CELLS = 32
"""Cells along a side of the box that `copying` compares: finer than what a class has in common, coarser than small shifts."""


def region_box(mask: AnyMask) -> tuple[int, int, int, int]:
    """Bounding box of the mask: top, bottom, left, right; the ends are exclusive.

    Raises:
        InputError: the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        raise InputError(f"mask of {mask.shape[1]} x {mask.shape[0]} px: no pixel is set; a pair needs a region to repaint")
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def cut_region(picture: AnyPhoto, mask: AnyMask) -> AnyPhoto:
    """The picture inside the mask's bounding box. Raises: as `region_box`."""
    top, bottom, left, right = region_box(mask)
    return picture[top:bottom, left:right]


def copy_paste(photo: AnyPhoto, mask: AnyMask, reference: AnyPhoto) -> AnyPhoto:
    """The reference resized to the mask's bounding box, without regard to its aspect, and pasted where the mask is set.

    What models collapse to that learn to copy (paper, section 3.2): nothing can be nearer to the reference.
    """
    top, bottom, left, right = region_box(mask)
    pasted = photo.copy()
    inside = mask[top:bottom, left:right]
    pasted[top:bottom, left:right][inside] = resize(reference, right - left, bottom - top)[inside]
    return pasted


def psnr_outside(photo: AnyPhoto, picture: AnyPhoto, mask: AnyMask) -> float:
    """Peak signal-to-noise ratio of what was to be kept, in dB; infinite where no pixel outside the mask differs.

    10 log10(255^2 / mean squared difference), over pixels and channels; 48 dB is one grey level. Infinite also where the mask
    covers the whole photo: nothing was to be kept, and nothing is lost.
    """
    _check_sizes(mask, photo, picture)
    difference = photo[~mask].astype(np.float64) - picture[~mask]
    error = float(np.mean(difference**2)) if difference.size else 0.0
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def seam(photo: AnyPhoto, picture: AnyPhoto, mask: AnyMask) -> float:
    """How many grey levels the step across the mask's border is larger than steps beside it, and than the photo has there.

    Along each line of pixels that crosses the border, horizontally or vertically, with o the last pixels outside and i the first
    inside, ... o3 o2 o1 | i1 i2 i3 i4 ..., the step across is |i2 - o1|, mean over channels, and those beside it are
    |o1 - o3| and |i4 - i2|, of equal length:

        excess = mean over crossings of |i2 - o1| - (|o1 - o3| + |i4 - i2|) / 2,        seam = excess(picture) - excess(photo)

    i2, not i1: a border that fades in over 1.5 px, as edits' do, is one step. 0 = no seam beyond the photo's own gradients, and
    exactly that for an untouched photo; about s for a region that is s levels brighter; texture without a step adds nothing.
    From -510 to 510: below 0 where the photo has an edge of its own at the border and the picture none. NaN where no line has
    four pixels inside next to three outside: the whole photo is masked, or the mask is thinner than 4 px both ways.
    """
    _check_sizes(mask, photo, picture)
    sums = np.zeros(2)
    count = 0
    for turned in (False, True):
        inside = mask.T if turned else mask
        pictures = [(one.transpose(1, 0, 2) if turned else one).astype(np.float64) for one in (picture, photo)]
        for flipped in (False, True):
            step = -1 if flipped else 1
            sides = inside[:, ::step]
            # Columns o3 o2 o1 i1 i2 i3 i4.
            width = sides.shape[1] - 6
            if width < 1:
                continue
            wanted = (False, False, False, True, True, True, True)
            crosses = np.logical_and.reduce([sides[:, k : k + width] == side for k, side in enumerate(wanted)])
            count += int(crosses.sum())
            for number, one in enumerate(pictures):
                o3, o1, i2, i4 = (one[:, ::step][:, k : k + width][crosses] for k in (0, 2, 4, 6))
                excess = np.abs(i2 - o1) - (np.abs(o1 - o3) + np.abs(i4 - i2)) / 2
                sums[number] += excess.mean(1).sum()
    return float(sums[0] - sums[1]) / count if count else math.nan


def copying(picture: AnyPhoto, mask: AnyMask, reference: AnyPhoto, other: AnyPhoto) -> float:
    """How much nearer the painted region is to the reference's pixels than another photo of its class is; 1 or less.

        1 - |picture - reference| / |other - reference|

    1 = the reference's own pixels, placed as `copy_paste` places them; 0 = as far from them as the other photo placed so; below 0
    = farther. |.| is the root mean square difference in the masked part of the box, of the mean colours of 32 x 32 cells, so that
    noise and shifts of a few px cost little, and brightness as much as it differs. NaN where the other photo is the reference.

    Args:
        picture: what was painted, the whole photo.
        mask: its region.
        reference: what was to be painted.
        other: another photo of the same class, cropped as references are.
    """
    _check_sizes(mask, picture)
    top, bottom, left, right = region_box(mask)
    inside = mask[top:bottom, left:right]
    region = _cells(picture[top:bottom, left:right], inside)
    placed, others = (_cells(resize(one, right - left, bottom - top), inside) for one in (reference, other))
    distance, scale = (float(np.sqrt(np.mean((one - placed) ** 2))) for one in (region, others))
    return 1 - distance / scale if scale > 0 else math.nan


def published_clip_pictures(
    picture: AnyPhoto, mask: AnyMask, reference: AnyPhoto
) -> tuple[Float32[np.ndarray, "3 224 224"], Float32[np.ndarray, "3 224 224"]]:
    """The painted region and the reference as the published CLIP score shows them to ViT-B/32, normalised.

    The picture is normalised, cut from the mask's first row and column to its last, the last being left out, and resized as a
    tensor: bilinear without antialiasing, the default of torchvision then (0.12), without regard to aspect. The reference is
    resized by Pillow (bicubic with antialiasing, its default since 7.0) and then normalised. A region of one row or column,
    of which published code leaves nothing, keeps it. For a mask that is no rectangle published code cuts from the first to the
    last masked pixel in reading order, which may be no box at all: here it is the bounding box.

    Source: Paint-by-Example, eval_tool/clip_score/test_bench_dataset.py and environment.yaml (2023-05).
    """
    _check_sizes(mask, picture)
    top, bottom, left, right = region_box(mask)
    region = _normalised(picture[top : max(top + 1, bottom - 1), left : max(left + 1, right - 1)])
    size = (CLIP_SIZE, CLIP_SIZE)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(region)[None], size, mode="bilinear", align_corners=False, antialias=False
    )
    shown = Image.fromarray(reference).resize(size, Image.Resampling.BICUBIC)
    return resized[0].numpy(), _normalised(np.asarray(shown))


def recognised(region: Float[np.ndarray, " _"], candidates: Float[np.ndarray, "_ _"]) -> bool:
    """Whether a region's features lie strictly nearest, by cosine, to those of candidate 0.

    A tie, as between regions that all look alike, is no recognition, and nor is anything that is not a number.
    """
    one, many = region.astype(np.float64), candidates.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = many @ one / (np.linalg.norm(many, axis=1) * np.linalg.norm(one))
    return bool((cosines[0] > cosines[1:]).all() and np.isfinite(cosines[0]))


def _check_sizes(mask: AnyMask, *pictures: AnyPhoto) -> None:
    for picture in pictures:
        if picture.shape[:2] != mask.shape:
            sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (mask, picture))
            raise InputError(f"mask and picture are of {sizes} px; they need the photo's size")


def _normalised(picture: AnyPhoto) -> Float32[np.ndarray, "3 height width"]:
    """Channels first, as CLIP was trained with; in the order of torchvision's ToTensor and Normalize, in single precision."""
    scaled = picture.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (CLIP_MEAN, CLIP_STD))
    return np.ascontiguousarray((scaled - mean) / std)


def _cells(region: AnyPhoto, inside: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, "cells 3"]:
    """Mean colours of the masked pixels of each cell of a grid over the box; cells without any are left out."""
    height, width = (min(length, COPY_CELLS) for length in inside.shape)
    # Area averaging of pixels that count and of how many do: their quotient is the mean of those that do.
    share = cv2.resize(inside.astype(np.float64), (width, height), interpolation=cv2.INTER_AREA)
    masked = np.where(inside[..., None], region, 0).astype(np.float64)
    colours = cv2.resize(masked, (width, height), interpolation=cv2.INTER_AREA)
    counted = share > 0
    means: np.ndarray = colours[counted] / share[counted][:, None]
    return means
