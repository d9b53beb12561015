"""Strong augmentation is strong: measured, because a port by name once removed it silently."""

import cv2
import numpy as np
import pytest

from pbe_train.config import AugmentationSettings
from pbe_train.data.augment import Augmentation, ThreePointAffine, squash


def displacement(matrix: np.ndarray, size: int) -> float:
    """How far an affine map moves the pixels of a square on average, in px."""
    y, x = np.mgrid[:size, :size]
    points = np.stack([x, y, np.ones_like(x)], -1)
    return float(np.linalg.norm(points @ matrix.T - points[..., :2], axis=-1).mean())


@pytest.mark.parametrize(("size", "expected"), [(224, 36.0), (64, 36.0 * 64 / 224)])
def test_the_affine_map_is_as_strong_as_in_the_published_run(size, expected):
    """36 px on average at 224 px, measured with albumentations 0.4.3 (paper.md, section 1); proportional at other sizes."""
    transform = ThreePointAffine(p=1.0)
    transform.set_random_seed(0)
    maps = [transform.get_params_dependent_on_data({"shape": (size, size, 3)}, {})["matrix"] for _ in range(600)]
    assert np.mean([displacement(matrix, size) for matrix in maps]) == pytest.approx(expected, rel=0.1)


def test_the_affine_map_is_what_moves_the_pixels():
    """The map that was drawn is the one applied: a bright dot lands where the map sends it."""
    transform = ThreePointAffine(p=1.0)
    picture = np.zeros((224, 224, 3), np.uint8)
    cv2.circle(picture, (120, 100), 4, (255, 255, 255), -1)
    transform.set_random_seed(3)
    matrix = transform.get_params_dependent_on_data({"shape": picture.shape}, {})["matrix"]
    moved = transform.apply(picture, matrix)
    expected = matrix @ (120, 100, 1)
    labels = cv2.connectedComponentsWithStats((moved[..., 0] > 128).astype(np.uint8))[3][1:]
    assert np.linalg.norm(labels - expected, axis=1).min() < 2
    assert np.linalg.norm(expected - (120, 100)) > 5


def fired(settings: AugmentationSettings, draws: int = 400) -> np.ndarray:
    """Share of draws that change a picture."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    augment = Augmentation(settings)
    return np.array([not np.array_equal(augment(picture, "test", number), picture) for number in range(draws)])


@pytest.mark.parametrize(("name", "share"), [("flip", 0.5), ("rotate", 0.5), ("blur", 0.3), ("elastic", 0.3)])
def test_each_transform_fires_as_often_as_published(name, share):
    others = dict.fromkeys({"flip", "rotate", "blur", "elastic"} - {name}, 0.0)
    assert fired(AugmentationSettings(**others)).mean() == pytest.approx(share, abs=0.08)


def test_transforms_fire_independently():
    """Seeding each transform alike would fire all four together: 50 % of draws instead of 1 - .5 * .5 * .7 * .7 = 88 %."""
    assert fired(AugmentationSettings()).mean() == pytest.approx(0.8775, abs=0.06)


def test_augmentation_is_a_function_of_names():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    augment, other = Augmentation(AugmentationSettings()), Augmentation(AugmentationSettings())
    results = [augment(picture, 0, step) for step in range(20)]
    assert all(np.array_equal(other(picture, 0, step), results[step]) for step in reversed(range(20)))
    assert len({result.tobytes() for result in results}) > 10


def test_none_is_none():
    assert not fired(AugmentationSettings(preset="none"), 50).any()


def test_squash_shows_the_whole_reference():
    picture = np.zeros((20, 80, 3), np.uint8)
    picture[:, 70:] = 255
    square = squash(picture, 64)
    assert square.shape == (64, 64, 3)
    assert square[:, 60:].min() > 200
    assert square[:, :50].max() < 50
