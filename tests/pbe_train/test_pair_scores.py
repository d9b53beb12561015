"""Scores of one pair: what each means at its ends, and that it gets worse as the picture does."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis.strategies import booleans, integers
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.crop import Window, paste
from pbe_train.evaluation import pair_scores
from pbe_train.evaluation.pair_scores import (
    copy_paste,
    copying,
    cut_region,
    psnr_outside,
    published_clip_pictures,
    recognised,
    region_box,
    seam,
)

sizes, seeds = integers(12, 70), integers(0, 999)


def scene(seed, height, width):
    """A smooth picture with some edges and fine grain, as photos are."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 6, 3), np.uint8)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
    picture[height // 3 :, : width // 2] += random.normal(0, 40, 3)
    return np.clip(picture + random.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def box_mask(height, width, top, bottom, left, right):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def any_mask(seed, height, width, smooth):
    """A box or a blob, which may touch the photo's edges."""
    random = np.random.default_rng(seed)
    top, left = random.integers(0, height - 5), random.integers(0, width - 5)
    mask = box_mask(height, width, top, random.integers(top + 5, height + 1), left, random.integers(left + 5, width + 1))
    if not smooth:
        return mask
    blobs = cv2.GaussianBlur(random.random((height, width)), (0, 0), 4) > 0.49
    return mask & blobs | box_mask(height, width, top, top + 5, left, left + 5)


def moved(picture, by):
    return np.roll(picture, by, axis=1)


@given(seed=seeds, height=sizes, width=sizes, smooth=booleans())
@settings(max_examples=40, deadline=None)
def test_an_untouched_photo(seed, height, width, smooth):
    """No seam, no loss outside; and where only the masked part is another, the loss outside stays nil."""
    photo, mask = scene(seed, height, width), any_mask(seed, height, width, smooth)
    found = seam(photo, photo, mask)
    assert found == 0 or math.isnan(found)
    assert psnr_outside(photo, photo, mask) == math.inf
    side = max(height, width)
    painted = paste(photo, np.full((side, side, 3), 255 * (seed % 2), np.uint8), mask, Window(0, 0, side))
    assert psnr_outside(photo, painted, mask) == math.inf
    copied = copy_paste(photo, mask, scene(seed + 1, 30, 20))
    assert psnr_outside(photo, copied, mask) == math.inf
    assert (copied[mask] != photo[mask]).any()
    top, bottom, left, right = region_box(mask)
    assert mask[top].any()
    assert mask[bottom - 1].any()
    assert mask[:, left].any()
    assert mask[:, right - 1].any()
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert cut_region(photo, mask).shape == (bottom - top, right - left, 3)


def test_psnr_is_in_decibels():
    """One grey level everywhere outside is 48.13 dB; what lies inside does not count."""
    photo, mask = np.full((20, 30, 3), 100, np.uint8), box_mask(20, 30, 5, 10, 5, 10)
    changed = photo + 1
    assert psnr_outside(photo, changed, mask) == pytest.approx(20 * math.log10(255))
    changed[mask] = 0
    assert psnr_outside(photo, changed, mask) == pytest.approx(20 * math.log10(255))
    assert psnr_outside(photo, 255 - photo * 0, ~mask) == pytest.approx(20 * math.log10(255 / 155))
    # A tenth of the pixels, ten levels off in one channel of three.
    changed = photo.copy()
    changed[:2, :, 0] += 10
    error = 100 * 60 / ((600 - 25) * 3)
    assert psnr_outside(photo, changed, mask) == pytest.approx(10 * math.log10(255**2 / error))
    assert psnr_outside(photo, 0 * photo, np.ones((20, 30), bool)) == math.inf


@given(seed=seeds, step=integers(-60, 60), smooth=booleans())
@settings(max_examples=40, deadline=None)
def test_a_seam_is_as_high_as_the_step(seed, step, smooth):
    """On grey, and the same where the border fades in as edits' borders do: those are seen no less."""
    photo, mask = np.full((40, 50, 3), 120, np.uint8), any_mask(seed, 40, 50, smooth)
    stepped = np.where(mask[..., None], np.uint8(120 + step), photo)
    found = seam(photo, stepped, mask)
    assert math.isnan(found) or found == pytest.approx(abs(step))
    if not smooth:
        faded = paste(photo, np.full((50, 50, 3), 120 + step, np.uint8), mask, Window(0, 0, 50))
        assert math.isnan(found) or seam(photo, faded, mask) == pytest.approx(abs(step), rel=0.15, abs=1)


def test_a_seam_counts_on_each_side():
    """A step along one side of a square is worth the same whichever side that is: a picture is turned, and with it the step."""
    photo, mask = np.full((48, 48, 3), 100, np.uint8), box_mask(48, 48, 12, 36, 12, 36)
    stepped = photo.copy()
    stepped[12:20, 12:36] += np.linspace(40, 5, 8).astype(np.uint8)[:, None, None]
    found = [seam(photo, np.rot90(stepped, turns).copy(), mask) for turns in range(4)]
    assert found == pytest.approx([found[0]] * 4)
    assert found[0] > 10


def test_texture_is_no_seam():
    """Grain inside the region costs nothing; brightness of its own does, the more the brighter."""
    photo, mask = scene(3, 80, 90), box_mask(80, 90, 20, 60, 25, 70)
    random = np.random.default_rng(0)
    grain = np.where(mask[..., None], np.clip(photo + random.normal(0, 25, photo.shape), 0, 255), photo).astype(np.uint8)
    brighter = [
        np.where(mask[..., None], np.clip(photo.astype(int) + more, 0, 255), photo).astype(np.uint8) for more in (0, 15, 30, 60)
    ]
    found = [seam(photo, one, mask) for one in brighter]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] > 30
    assert abs(seam(photo, grain, mask)) < 6
    # Another place of the photo, moved in, makes a seam; a blurred one, whose border is right, hardly any.
    blurred = np.where(mask[..., None], cv2.GaussianBlur(photo, (0, 0), 1.5), photo)
    assert seam(photo, np.where(mask[..., None], photo[::-1, ::-1], photo), mask) > 15
    assert abs(seam(photo, blurred, mask)) < 4


def test_where_no_border_can_be_seen():
    photo = scene(0, 30, 40)
    for mask in (np.ones((30, 40), bool), box_mask(30, 40, 10, 13, 10, 13), ~box_mask(30, 40, 10, 12, 10, 12)):
        assert math.isnan(seam(photo, 255 - photo, mask))
    # Three sides of four at the photo's edge: the fourth is looked at.
    mask = box_mask(30, 40, 0, 30, 0, 20)
    assert seam(np.zeros_like(photo), np.where(mask[..., None], np.uint8(9), np.zeros_like(photo)), mask) == 9


@given(
    seed=seeds, height=sizes, width=sizes, smooth=booleans(), reference_height=integers(1, 90), reference_width=integers(1, 90)
)
@settings(max_examples=40, deadline=None)
def test_copies_are_caught(seed, height, width, smooth, reference_height, reference_width):
    """1 for what copy-paste makes, 0 for another photo pasted; whatever sizes and masks."""
    photo, mask = scene(seed, height, width), any_mask(seed, height, width, smooth)
    reference, other = scene(seed + 1, reference_height, reference_width), scene(seed + 2, 33, 44)
    assert copying(copy_paste(photo, mask, reference), mask, reference, other) == 1
    assert copying(copy_paste(photo, mask, other), mask, reference, other) == pytest.approx(0, abs=1e-12)
    assert math.isnan(copying(photo, mask, reference, reference))


@pytest.mark.parametrize("seed", range(5))
def test_copies_that_are_disguised(seed):
    """Shifts, brightness, noise, JPEG and a faded border: less than 1, the more the less, and far above another photo."""
    photo, reference, other = scene(seed, 160, 200), scene(seed + 10, 90, 70), scene(seed + 20, 90, 70)
    mask = box_mask(160, 200, 30, 130, 40, 150)
    copied = copy_paste(photo, mask, reference)
    for change in (
        lambda by: moved(copied, by),
        lambda by: np.clip(copied.astype(int) + 4 * by, 0, 255).astype(np.uint8),
        lambda by: np.clip(copied + np.random.default_rng(0).normal(0, 4 * by, copied.shape), 0, 255).astype(np.uint8),
    ):
        found = [copying(change(by), mask, reference, other) for by in (0, 1, 2, 4, 8)]
        assert found == sorted(found, reverse=True)
        assert found[0] == 1
        assert found[2] > 0.8
        assert found[-1] > 0.3
    faded = paste(photo, np.pad(copied, ((0, 40), (0, 0), (0, 0))), mask, Window(0, 0, 200))
    encoded = cv2.imdecode(cv2.imencode(".jpg", copied, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR)
    assert copying(faded, mask, reference, other) > 0.8
    assert copying(encoded, mask, reference, other) > 0.9
    assert copying(copy_paste(photo, mask, 255 - reference), mask, reference, other) < 0
    # Photos that have nothing to do with each other are about as far from the reference as the other one is.
    strangers = [copying(scene(number, 160, 200), mask, reference, other) for number in range(100, 120)]
    assert max(strangers) < 0.5
    assert abs(np.mean(strangers)) < 0.3


def test_a_copy_is_more_than_its_colours():
    """Detail counts: what a picture of the same colours at the same places has, as any of the class may, is no copy."""
    blocks = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    reference, other = (np.repeat(np.repeat(one, 5, 0), 5, 1) for one in (blocks, blocks[::-1]))
    mask = box_mask(100, 100, 10, 90, 10, 90)
    photo = np.zeros((100, 100, 3), np.uint8)
    alike = copy_paste(photo, mask, cv2.GaussianBlur(reference, (0, 0), 8))
    assert copying(alike, mask, reference, other) < 0.5
    assert copying(copy_paste(photo, mask, cv2.GaussianBlur(reference, (0, 0), 1)), mask, reference, other) > 0.7


@given(seed=seeds, height=sizes, width=sizes)
@settings(max_examples=20, deadline=None)
def test_cells_are_mean_colours_of_masked_pixels(seed, height, width):
    """Of one colour inside, whatever lies outside and however few pixels of a cell are masked."""
    mask = any_mask(seed, height, width, True)
    picture = np.where(mask[..., None], np.uint8(77), scene(seed, height, width))
    assert pair_scores._cells(picture, mask) == pytest.approx(77)


def published_pictures(picture, mask, reference):
    """The published script's steps, in its order, on PIL's and torch's functions; torchvision's are named beside them."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])

    def to_tensor(image):  # ToTensor, Normalize
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return pixels.sub(mean[:, None, None]).div(std[:, None, None])

    places = np.flatnonzero(mask.astype(np.uint8).ravel() * 255 == 255)
    (first_row, first_column), (last_row, last_column) = (
        np.unravel_index(place, mask.shape) for place in (places.min(), places.max())
    )
    crop = to_tensor(Image.fromarray(picture))[:, first_row:last_row, first_column:last_column]
    # Resize of torchvision 0.12 on a tensor: interpolate without antialias.
    crop = torch.nn.functional.interpolate(crop[None], size=[224, 224], mode="bilinear", align_corners=False)[0]
    return crop.numpy(), to_tensor(Image.fromarray(reference).resize((224, 224)).convert("RGB")).numpy()


@given(seed=seeds, height=integers(12, 400), width=integers(12, 400))
@example(seed=0, height=400, width=500)
@settings(max_examples=15, deadline=None)
def test_clip_is_shown_what_the_published_script_shows(seed, height, width):
    """Smaller regions and larger ones than it sees: the latter tell whether the resizing is antialiased."""
    picture, reference = scene(seed, height, width), scene(seed + 1, 60, 300)
    for mask in (any_mask(seed, height, width, False), np.ones((height, width), bool)):
        ours, theirs = published_clip_pictures(picture, mask, reference), published_pictures(picture, mask, reference)
        for one, other in zip(ours, theirs, strict=True):
            assert np.abs(one - other).max() <= 1e-5
            assert one.dtype == np.float32


def test_clip_is_shown_the_region_alone():
    """Not the last row and column, nor anything around; of one row or column what there is: no region is without a score."""
    picture, mask = np.zeros((50, 60, 3), np.uint8), box_mask(50, 60, 10, 30, 20, 50)
    picture[10:29, 20:49] = 255
    shown, _ = published_clip_pictures(picture, mask, picture)
    assert np.ptp(shown, axis=(1, 2)).max() < 1e-5
    for thin in (box_mask(50, 60, 10, 11, 20, 50), box_mask(50, 60, 10, 30, 20, 21), box_mask(50, 60, 28, 29, 48, 49)):
        shown, _ = published_clip_pictures(picture, thin, picture)
        assert shown.shape == (3, 224, 224)
        assert shown == pytest.approx(np.broadcast_to(shown[:, :1, :1], shown.shape))
        assert shown[0, 0, 0] == pytest.approx((1 - 0.48145466) / 0.26862954, rel=1e-5)
    whole, _ = published_clip_pictures(picture, np.ones((50, 60), bool), picture)
    assert whole.shape == (3, 224, 224)


def test_a_tie_is_no_recognition():
    """The right candidate stands first, and argmax would return it."""
    candidates = np.array([[1.0, 0], [0, 1], [1, 1]], np.float32)
    assert recognised(np.array([3.0, 0.1], np.float32), candidates)
    assert not recognised(np.array([0.1, 3.0], np.float32), candidates)
    assert not recognised(np.ones(2, np.float32), np.ones((8, 2), np.float32))
    # Lengths do not matter.
    assert recognised(np.array([3.0, 0.1], np.float32), candidates * np.array([[0.1], [9], [9]], np.float32))
    for damaged in (np.zeros(2), np.full(2, math.nan), np.array([math.inf, 0])):
        assert not recognised(damaged, candidates)
        assert not recognised(damaged, candidates[:1])


def test_what_is_no_pair_is_refused():
    photo, empty = scene(0, 30, 40), np.zeros((30, 40), bool)
    for use in (
        region_box,
        lambda mask: cut_region(photo, mask),
        lambda mask: copy_paste(photo, mask, photo),
        lambda mask: copying(photo, mask, photo, photo),
    ):
        with pytest.raises(InputError, match=r"^mask of 40 x 30 px: no pixel is set; a pair needs a region to repaint$"):
            use(empty)
    for use in (
        lambda mask: psnr_outside(photo, photo, mask),
        lambda mask: seam(photo, photo, mask),
        lambda mask: copying(photo, mask, photo, photo),
    ):
        with pytest.raises(InputError, match=r"^mask and picture are of 30 x 20 and 40 x 30 px; they need the photo's size$"):
            use(np.ones((20, 30), bool))
