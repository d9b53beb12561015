"""Strong augmentation is strong: measured, because a port by name once removed it silently.

The figures are those of 400 draws with albumentations 0.4.3, at 224 px.
"""

import cv2
import numpy as np
import pytest
from PIL import Image

from pbe_train.config import AugmentationSettings
from pbe_train.data.augment import Drawn, apply, augment, draw_published
from pbe_train.data.fitting import fit_reference

DRAWS = 2000


def displacements(settings: AugmentationSettings, size: int) -> tuple[np.ndarray, np.ndarray]:
    """How far pixels are moved, in px: those of the result that come from inside the reference; and the mean of each draw.

    Flips are left aside.
    """
    y, x = np.mgrid[: size : size // 16, : size : size // 16]
    there = np.stack([x, y, np.ones_like(x)], -1)
    found = []
    for number in range(DRAWS):
        drawn = draw_published(settings, size, "test", number)
        came_from = there @ np.linalg.inv(np.eye(3) if drawn.map is None else drawn.map).T
        inside = ((came_from >= 0) & (came_from <= size - 1))[..., :2].all(-1)
        found.append(np.linalg.norm((there - came_from)[inside], axis=-1))
    return np.concatenate(found), np.array([moved.mean() for moved in found if len(moved)])


def only(**parts: float) -> AugmentationSettings:
    return AugmentationSettings(**dict.fromkeys(("flip", "rotate", "blur", "elastic"), 0.0) | parts)


@pytest.mark.parametrize(("size", "mean", "extreme"), [(224, 36, 62), (64, 36 * 64 / 224, 62 * 64 / 224)])
def test_the_affine_map_is_as_strong_as_in_the_published_run(size, mean, extreme):
    """In proportion at other sizes."""
    moved, _ = displacements(only(elastic=1), size)
    assert moved.mean() == pytest.approx(mean, rel=0.1)
    assert np.percentile(moved, 95) == pytest.approx(extreme, rel=0.1)


def test_the_chain_is_as_strong_as_in_the_published_run():
    moved, means = displacements(AugmentationSettings(), 224)
    assert moved.mean() == pytest.approx(13.8, rel=0.15)
    assert (means > 1).mean() == pytest.approx(0.62, abs=0.05)


def test_rotations_are_within_20_degrees():
    angles = []
    for number in range(DRAWS):
        drawn = draw_published(only(rotate=1), 224, "test", number)
        assert drawn.map is not None
        angles.append(np.degrees(np.arctan2(drawn.map[1, 0], drawn.map[0, 0])))
        assert np.allclose(drawn.map @ (111.5, 111.5, 1), (111.5, 111.5, 1))
    assert -20 <= min(angles) < -19
    assert 19 < max(angles) <= 20
    assert np.std(angles) == pytest.approx(40 / np.sqrt(12), rel=0.05)


def test_what_was_drawn_is_what_is_done():
    """A bright dot lands where flip and map send it, and is as wide as blurred."""
    picture = np.zeros((224, 224, 3), np.uint8)
    cv2.circle(picture, (120, 100), 4, (255, 200, 100), -1)
    seen = 0
    for number in range(12):
        drawn = draw_published(AugmentationSettings(flip=0.5, rotate=1, elastic=1), 224, "dot", number)
        moved = apply(drawn, picture)
        expected = drawn.map @ (223 - 120 if drawn.flip else 120, 100, 1)
        if not np.all((expected > 10) & (expected < 213) | (expected == 1)):
            continue
        seen += 1
        labels = cv2.connectedComponentsWithStats((moved[..., 0] > 128).astype(np.uint8))[3][1:]
        assert np.linalg.norm(labels - expected[:2], axis=1).min() < 2
        assert np.linalg.norm(expected[:2] - (120, 100)) > 1
    assert seen > 5
    plain = np.zeros((32, 32, 3), np.uint8)
    plain[16, 16] = (250, 150, 50)
    assert np.array_equal(apply(Drawn(False, 5, None), plain)[14:19, 14:19], np.full((5, 5, 3), (10, 6, 2)))
    assert np.array_equal(apply(Drawn(True, None, None), picture), picture[:, ::-1])


def test_colours_stay_in_their_channels():
    picture = np.broadcast_to(np.array([10, 90, 200], np.uint8), (64, 64, 3)).copy()
    for number in range(20):
        assert np.array_equal(augment(AugmentationSettings(), picture, number), picture)


@pytest.mark.parametrize(("name", "share"), [("flip", 0.5), ("rotate", 0.5), ("blur", 0.3), ("elastic", 0.3)])
def test_each_part_fires_as_often_as_published_and_alone(name, share):
    """One seed for all parts would fire them together."""
    draws = [draw_published(AugmentationSettings(), 32, number) for number in range(DRAWS)]
    alone = [draw_published(only(**{name: share}), 32, number) for number in range(DRAWS)]
    fired = {
        "flip": [drawn.flip for drawn in alone],
        "blur": [drawn.kernel is not None for drawn in alone],
        "rotate": [drawn.map is not None for drawn in alone],
        "elastic": [drawn.map is not None for drawn in alone],
    }[name]
    assert np.mean(fired) == pytest.approx(share, abs=0.03)
    others = {"flip": [drawn.kernel is not None for drawn in draws]}.get(name, [drawn.flip for drawn in draws])
    assert abs(np.corrcoef(fired, others)[0, 1]) < 0.06


def test_blurs_are_of_3_to_7_px():
    kernels = [draw_published(only(blur=1), 32, number).kernel for number in range(DRAWS)]
    assert set(kernels) == {3, 5, 7}
    assert min(kernels.count(kernel) for kernel in (3, 5, 7)) > DRAWS / 4


def test_a_setting_changes_its_own_part_alone():
    """What the others draw does not depend on it."""
    for number in range(50):
        whole, less = (
            draw_published(settings, 64, number) for settings in (only(elastic=1, flip=0.5), only(elastic=1, blur=0.3))
        )
        assert np.array_equal(whole.map, less.map)


def test_augmentation_is_a_function_of_names():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    results = [augment(AugmentationSettings(), picture, 0, step) for step in range(20)]
    assert all(np.array_equal(augment(AugmentationSettings(), picture, 0, step), results[step]) for step in reversed(range(20)))
    assert len({result.tobytes() for result in results}) > 10


def test_none_is_none():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert all(np.array_equal(augment(AugmentationSettings(preset="none"), picture, step), picture) for step in range(50))


def test_squash_shows_the_whole_reference():
    picture = np.zeros((20, 80, 3), np.uint8)
    picture[:, 70:] = 255
    square = fit_reference(picture, 64, "squash")
    assert square.shape == (64, 64, 3)
    assert square[:, 60:].min() > 200
    assert square[:, :50].max() < 50


@pytest.mark.parametrize("side", [64, 70, 127, 129, 300, 1000])
def test_squash_is_antialiased_as_pillow_does_it(side):
    picture = np.random.default_rng(side).integers(0, 256, (side, 2 * side, 3), np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR))
    assert abs(fit_reference(picture, 64, "squash").astype(int) - expected).max() <= 1
