"""Scores on real photos order what people order: blur, noise, shifts, other photos, pasted references.

The judge is a small network of fixed random filters: what these scores do is to be seen without learnt weights, too.
"""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pbe_train.evaluation.distances import bootstrap, cmmd, frechet_distance, kernel_distance
from pbe_train.evaluation.pair_scores import copy_paste, copying, seam

SIZE = 64
DISTANCES = [frechet_distance, kernel_distance, cmmd]


def read(path: Path) -> np.ndarray:
    return cv2.resize(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), (SIZE, SIZE), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def photos(real_data) -> dict[str, list[np.ndarray]]:
    """Eight photos of each of 24 categories."""
    folders = sorted(path for path in (real_data / "caltech101" / "photos").iterdir() if path.is_dir())[:24]
    return {folder.name: [read(path) for path in sorted(folder.iterdir())[:8]] for folder in folders}


def features(pictures) -> np.ndarray:
    """Means and spreads of 12 random filters' rectified answers at two sizes: [pictures, 48]."""
    filters = torch.randn((12, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    filters -= filters.mean((1, 2, 3), keepdim=True)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    found = []
    for scale in (1, 4):
        answers = torch.relu(torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(pixels, scale), filters))
        found += [answers.mean((2, 3)), answers.std((2, 3))]
    return torch.cat(found, 1).numpy()


def blurred(picture, by):
    return cv2.GaussianBlur(picture, (0, 0), by)


def noisy(picture, by):
    noise = np.random.default_rng(int(picture.astype(int).sum())).normal(0, 15 * by, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def moved(picture, by):
    return np.pad(picture, ((0, 0), (by, 0), (0, 0)), "edge")[:, :SIZE]


@pytest.fixture(scope="module")
def damaged(photos) -> dict[str, np.ndarray]:
    """Features of half of each category's photos, as they are and damaged, and of the other half."""
    half = [picture for pictures in photos.values() for picture in pictures[:4]]
    found = {"others": features([picture for pictures in photos.values() for picture in pictures[4:]]), "real": features(half)}
    found["moved"] = features([moved(picture, 1) for picture in half])
    for damage in (blurred, noisy):
        found |= {f"{damage.__name__} {by}": features([damage(picture, by) for picture in half]) for by in (0.6, 1, 2, 4)}
    return found


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_order_damage(damaged, distance):
    """More blur and more noise are farther, from other photos and from the same ones; a shift by a pixel is less than either."""
    for damage in ("blurred", "noisy"):
        for others in ("others", "real"):
            found = [distance(damaged[f"{damage} {by}"], damaged[others]) for by in (0.6, 1, 2, 4)]
            assert found == sorted(found)
            # Against others, chance is as large as the least damage; against themselves there is none.
            assert distance(damaged["real"], damaged[others]) < found[0 if others == "real" else 2]
        assert distance(damaged["moved"], damaged["real"]) < distance(damaged[f"{damage} 0.6"], damaged["real"])


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_order_of_photos_does_not_matter(damaged, distance):
    one, two = damaged["real"], damaged["others"]
    expected = pytest.approx(distance(one, two), rel=1e-7)
    assert distance(one[::-1].copy(), two) == expected
    assert distance(one, np.roll(two, 7, axis=0)) == expected
    assert distance(two, one) == expected


def test_two_halves_of_one_set_are_of_one_kind(photos):
    """KID's interval holds 0 for two halves of the photos, and not for half of the categories against the others."""
    everything = features([picture for pictures in photos.values() for picture in pictures])
    order = np.random.default_rng(0).permutation(len(everything))
    half = len(order) // 2
    low, high = bootstrap("kernel", everything[order[:half]], everything[order[half:]], 500, 0)
    assert low < 0 < high
    blurs = features([blurred(picture, 1) for pictures in photos.values() for picture in pictures])
    assert bootstrap("kernel", everything[order[:half]], blurs[order[half:]], 500, 0)[0] > 0


def test_pasted_references_are_caught(photos):
    """Pasted, resized, brighter, compressed: `copying` tells each from a photo of the class that is painted in its place."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[14:46, 10:52] = True
    pasted, changed, same_class, untouched, seams = [], [], [], [], []
    names = list(photos)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        reference, another, third = (picture[6:58, 4:60] for picture in photos[name][:3])
        photo = photos[other][0]
        copy = copy_paste(photo, mask, reference)
        pasted.append(copying(copy, mask, reference, another))
        bright = np.clip(moved(copy, 1).astype(int) + 8, 0, 255).astype(np.uint8)
        encoded = cv2.imdecode(cv2.imencode(".jpg", bright, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR)
        changed.append(copying(encoded, mask, reference, another))
        same_class.append(copying(copy_paste(photo, mask, third), mask, reference, another))
        untouched.append(copying(photo, mask, reference, another))
        seams.append(seam(photo, copy, mask))
    assert set(pasted) == {1.0}
    assert np.mean(np.array(changed) > np.array(same_class)) > 0.95
    assert np.median(changed) > 0.6
    assert abs(np.median(same_class)) < 0.15
    assert np.median(untouched) < 0.1
    assert np.median(seams) > 10
