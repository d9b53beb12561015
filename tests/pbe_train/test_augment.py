"""Strong augmentation is strong: measured, because a port by name once removed it silently.

The figures are those of 400 draws with albumentations 0.4.3, at 224 px.
"""

import io
import warnings
from random import Random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pbe_core.randomness import generator
from pbe_core.settings import REPOSITORY
from pbe_train.data.latents import normalise_reference
from pbe_train.data.references import (
    PADDING,
    PAPER,
    PHOTO,
    POSE,
    STRONG,
    Augmentation,
    Drawn,
    apply,
    change,
    draw_published,
    erase,
    fit_reference,
    moves,
    prepare_reference,
    resize,
    transforms,
)

DRAWS = 800
PARTS = tuple(STRONG)


def only(**parts: float) -> dict[str, float]:
    return dict.fromkeys(PAPER, 0.0) | parts


def of_strong(**parts: float) -> Augmentation:
    """These parts of the preset, and no other."""
    return Augmentation("strong", strong=dict.fromkeys(PARTS, 0.0) | parts)


def drawn_picture(height: int = 224, width: int = 224) -> np.ndarray:
    """Smooth, coloured, and with fine detail; nowhere dark or bright enough to be clipped at once."""
    random = np.random.default_rng(0)
    coarse = cv2.resize(random.integers(60, 190, (9, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(coarse + random.integers(-20, 21, (height, width, 1)), 0, 255).astype(np.uint8)


def prepare(given: Augmentation, picture: np.ndarray, *names: int | str, outline=None, geometry="squash", size=224):
    return prepare_reference(given, geometry, picture, outline, size, *names)


def displacements(odds: dict[str, float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """How far pixels are moved, in px: those of the result that come from inside the reference; and the mean of each draw.

    Flips are left aside.
    """
    y, x = np.mgrid[: size : size // 16, : size : size // 16]
    there = np.stack([x, y, np.ones_like(x)], -1)
    found = []
    for number in range(DRAWS):
        drawn = draw_published(odds, size, "test", number)
        came_from = there @ np.linalg.inv(np.eye(3) if drawn.map is None else drawn.map).T
        inside = ((came_from >= 0) & (came_from <= size - 1))[..., :2].all(-1)
        found.append(np.linalg.norm((there - came_from)[inside], axis=-1))
    return np.concatenate(found), np.array([moved.mean() for moved in found if len(moved)])


@pytest.mark.parametrize("size", [224, 64])
def test_the_chain_and_its_affine_map_are_as_strong_as_in_the_published_run(size):
    """In proportion at other sizes."""
    moved, _ = displacements(only(elastic=1), size)
    assert moved.mean() == pytest.approx(36 * size / 224, rel=0.1)
    assert np.percentile(moved, 95) == pytest.approx(62 * size / 224, rel=0.1)
    moved, means = displacements(PAPER, size)
    assert moved.mean() == pytest.approx(13.8 * size / 224, rel=0.15)
    assert (means > 1 * size / 224).mean() == pytest.approx(0.62, abs=0.05)


def test_rotations_are_within_20_degrees_and_blurs_of_3_to_7_px():
    drawn = [draw_published(only(rotate=1, blur=1), 224, "test", number) for number in range(DRAWS)]
    angles = [np.degrees(np.arctan2(one.map[1, 0], one.map[0, 0])) for one in drawn]
    assert all(np.allclose(one.map @ (111.5, 111.5, 1), (111.5, 111.5, 1)) for one in drawn)
    assert -20 <= min(angles) < -19
    assert 19 < max(angles) <= 20
    assert np.std(angles) == pytest.approx(40 / np.sqrt(12), rel=0.05)
    kernels = [one.kernel for one in drawn]
    assert set(kernels) == {3, 5, 7}
    assert min(kernels.count(kernel) for kernel in (3, 5, 7)) > DRAWS / 4


def test_what_was_drawn_is_what_is_done():
    """A bright dot lands where flip and map send it, and is as wide as blurred; colours stay in their channels."""
    picture = np.zeros((224, 224, 3), np.uint8)
    cv2.circle(picture, (120, 100), 4, (255, 200, 100), -1)
    seen = 0
    for number in range(12):
        drawn = draw_published(only(flip=0.5, rotate=1, elastic=1), 224, "dot", number)
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
    even = np.broadcast_to(np.array([10, 90, 200], np.uint8), (64, 64, 3)).copy()
    assert all(np.array_equal(prepare(Augmentation(), even, number, size=64), even) for number in range(20))


@pytest.mark.parametrize("name", list(PAPER))
def test_each_part_fires_as_often_as_published_and_alone(name):
    """One seed for all parts would fire them together; and what the others draw does not depend on it."""

    def fired(part: str, drawn: Drawn) -> bool:
        return {"flip": drawn.flip, "blur": drawn.kernel is not None}.get(part, drawn.map is not None)

    draws = [draw_published(PAPER, 32, number) for number in range(DRAWS)]
    alone = [draw_published(only(**{name: PAPER[name]}), 32, number) for number in range(DRAWS)]
    own = [fired(name, drawn) for drawn in alone]
    assert np.mean(own) == pytest.approx(PAPER[name], abs=0.045)
    other = "blur" if name == "flip" else "flip"
    assert abs(np.corrcoef(own, [fired(other, drawn) for drawn in draws])[0, 1]) < 0.1
    whole, less = (draw_published(odds, 64, 1) for odds in (only(elastic=1, flip=0.5), only(elastic=1, blur=0.3)))
    assert np.array_equal(whole.map, less.map)


def test_the_published_preset_is_a_function_of_names_and_none_is_none():
    picture = drawn_picture(90, 140)
    squashed = fit_reference(picture, 64, "squash")
    results = [prepare(Augmentation(), picture, 0, step, size=64) for step in range(20)]
    assert len({result.tobytes() for result in results}) > 10
    for step in reversed(range(20)):
        assert np.array_equal(prepare(Augmentation(), picture, 0, step, size=64), results[step])
        assert np.array_equal(apply(draw_published(PAPER, 64, 0, step), squashed), results[step])
        assert np.array_equal(prepare(Augmentation("none"), picture, step, size=64), squashed)


@pytest.mark.parametrize("side", [64, 70, 129, 1000])
def test_squash_is_antialiased_as_pillow_does_it(side):
    picture = np.random.default_rng(side).integers(0, 256, (side, 2 * side, 3), np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR))
    assert abs(fit_reference(picture, 64, "squash").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [224, 64])
def test_the_elastic_part_bends(size):
    """By some 5 px at 224 px, smoothly, and not as an affine map does; nowhere does the picture fold. A dot lands accordingly."""
    y, x = np.mgrid[:size, :size]
    places = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3).astype(float)
    dot = cv2.circle(np.zeros((size, size, 3), np.uint8), (size // 2, size // 2), size // 56, (255, 255, 255), -1)
    for number in range(20):
        moved = moves(size, generator(number, "elastic")).astype(float)
        lengths = np.linalg.norm(moved, axis=-1) * 224 / size
        assert 3 < lengths.mean() < 8
        assert lengths.max() < 20
        straight, _, _, _ = np.linalg.lstsq(places, moved.reshape(-1, 2), rcond=None)
        bent = moved.reshape(-1, 2) - places @ straight
        assert np.linalg.norm(bent, axis=-1).mean() * 224 / size > 2.5
        (xy, xx), (yy, yx) = np.gradient(moved[..., 0]), np.gradient(moved[..., 1])
        assert ((1 + xx) * (1 + yy) - xy * yx).min() > 0
        row, column = np.argwhere((change("elastic", dot, size, number) > 128).all(-1)).mean(0)
        whence = np.array([column, row]) + moved[round(row), round(column)]
        assert np.abs(whence - size // 2).max() < 1.5


def test_the_affine_part_is_stronger_than_the_published_chain():
    """That one moves pixels by 13.8 px on average; here the parts of the map stay within what is promised."""
    transform, moved, scales = transforms(224)["affine"], [], []
    y, x = np.mgrid[:224:8, :224:8]
    for number in range(200):
        transform.set_random_state(generator(number), Random(number))
        transform(image=np.zeros((224, 224, 3), np.uint8))
        matrix = transform.get_applied_params()["matrix"]
        moved.append(np.linalg.norm(np.stack([x, y, np.ones_like(x)], -1) @ matrix[:2].T - np.stack([x, y], -1), axis=-1).mean())
        scales.append(np.sqrt(np.linalg.det(matrix[:2, :2])))
    assert 24 < np.mean(moved) < 36
    assert 0.6 < min(scales) < 0.75
    assert 1.15 < max(scales) < 1.3


@pytest.mark.parametrize(
    ("part", "least", "most"),
    [("light", 8, 40), ("gamma", 6, 30), ("colour", 3, 20), ("resolution", 3, 30), ("blur", 3, 30), ("compression", 1, 15)],
)
def test_what_a_photo_suffers_is_felt(part, least, most):
    """Mean change of a pixel's channel, 0-255, over 50 draws; the picture is still the picture."""
    picture = drawn_picture()
    changed = [change(part, picture, 224, number).astype(int) for number in range(50)]
    assert least < np.mean([abs(one - picture).mean() for one in changed]) < most
    assert min(np.corrcoef(one.ravel(), picture.ravel())[0, 1] for one in changed) > 0.6
    assert len({one.tobytes() for one in changed}) > 25  # Qualities of a JPEG are whole numbers.


def test_a_compressed_picture_is_a_jpeg_of_the_picture():
    """As Pillow writes and reads it, at a quality of the range; not of the picture with red and blue exchanged."""
    picture = np.clip(drawn_picture() * np.array([1.1, 0.8, 0.4]) + (20, 0, 60), 0, 255).astype(np.uint8)
    files = []
    for quality in range(25, 81):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        files.append(np.asarray(Image.open(buffer)).astype(int))
    for number in range(10):
        compressed = change("compression", picture, 224, number)
        assert min(np.abs(file - compressed).max() for file in files) <= 1


def test_each_part_of_strong_fires_as_often_as_is_set_and_alone():
    """One seed for all parts, as albumentations' own seeding gives them, would fire them together."""
    picture, outline = drawn_picture(), np.tri(224, dtype=bool)
    untouched = prepare(of_strong(), picture, 0, outline=outline)
    assert np.array_equal(untouched, picture)
    fired = []
    for part in PARTS:
        given = of_strong(**{part: STRONG[part]})
        done = [prepare(given, picture, number, outline=outline) for number in range(300)]
        fired.append([not np.array_equal(one, untouched) for one in done])
        assert np.mean(fired[-1]) == pytest.approx(STRONG[part], abs=0.09), part
    assert np.abs(np.corrcoef(fired) - np.eye(len(PARTS))).max() < 0.25


def test_strong_is_a_function_of_names():
    """In whatever order draws are asked for, for all parts together, and whatever the other parts do."""
    picture, outline = drawn_picture(120, 200), np.tri(120, 200, dtype=bool)
    given = of_strong(**dict.fromkeys(PARTS, 0.7))
    results = [prepare(given, picture, 0, step, outline=outline) for step in range(20)]
    assert all(np.array_equal(prepare(given, picture, 0, step, outline=outline), results[step]) for step in reversed(range(20)))
    assert len({result.tobytes() for result in results}) == 20
    assert not np.array_equal(prepare(given, picture, 1, 0, outline=outline), results[0])
    mirrored = picture[:, ::-1].copy()
    bent, turned = prepare(of_strong(elastic=1), picture, 0), prepare(of_strong(flip=1, elastic=1), mirrored, 0)
    assert np.abs(bent.astype(int) - turned).max() <= 1  # The two are resized, each from its own side.


def test_an_erased_background_is_the_outlines_to_the_byte():
    """It stays where the outline covers too little: then all other parts do what they do without an outline."""
    picture = drawn_picture(40, 60)
    outline = np.random.default_rng(2).random((40, 60)) < 0.4
    erased = erase(picture, outline)
    assert np.array_equal(erased[outline], picture[outline])
    assert set(map(tuple, erased[~outline].tolist())) == {PADDING}
    for odds, shown, expected in ((1, outline, erased), (0, outline, picture), (1, None, picture)):
        assert np.array_equal(prepare(of_strong(erase=odds), picture, 0, outline=shown), fit_reference(expected, 224, "squash"))
    parts, few = of_strong(**dict.fromkeys(PARTS, 1)), np.zeros((40, 60), bool)
    few[:, :11] = True  # 18 %
    assert np.array_equal(prepare(parts, picture, 3, outline=few), prepare(parts, picture, 3))
    few[:, 11] = True  # 20 %
    assert not np.array_equal(erase(picture, few), picture)


def test_what_a_photo_suffers_spares_the_padding_and_what_moves_pixels_makes_more_of_it():
    wide = drawn_picture(100, 300)
    rows = (224 - round(100 * 224 / 300)) // 2
    for number in range(10):
        suffered = prepare(of_strong(**dict.fromkeys(PHOTO, 1)), wide, number, geometry="pad")
        assert set(map(tuple, suffered[:rows].reshape(-1, 3).tolist())) == {PADDING}
        assert not np.array_equal(suffered, fit_reference(wide, 224, "pad"))
    corners = [
        prepare(of_strong(affine=1), drawn_picture(), number)[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() for number in range(30)
    ]
    assert any(list(PADDING) in four for four in corners)


@settings(max_examples=25)
@given(
    height=st.integers(1, 400), width=st.integers(1, 400), geometry=st.sampled_from(["squash", "pad"]), number=st.integers(0, 99)
)
def test_strong_takes_whatever_a_shard_holds(height, width, geometry, number):
    """References of a pixel's height, too, after which there is nothing left to shrink."""
    picture = np.full((height, width, 3), 77, np.uint8)
    parts = of_strong(**dict.fromkeys(PARTS, 1))
    made = prepare(parts, picture, number, outline=np.ones((height, width), bool), geometry=geometry, size=64)
    assert (made.shape, made.dtype) == ((64, 64, 3), np.uint8)


@settings(max_examples=60)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_padding_keeps_the_aspect_and_adds_nothing(height, width):
    """The longer side fills the square, the shorter one is in proportion to half a pixel, and in the middle."""
    square = fit_reference(np.full((height, width, 3), 255, np.uint8), 64, "pad")
    inside = (square == 255).all(-1)
    assert set(map(tuple, square[~inside].tolist())) <= {PADDING}
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    found = len(rows), len(columns)
    assert inside.sum() == found[0] * found[1]
    assert max(found) == 64
    longer = max(height, width)
    for length, side in zip(found, (height, width), strict=True):
        assert abs(length - side * 64 / longer) <= (0.5 if side * 64 >= longer else 1)
    for line in (rows, columns):
        assert abs(line[0] - (63 - line[-1])) <= 1


def test_padding_is_what_the_encoder_sees_as_nothing():
    square = fit_reference(np.zeros((1, 64, 3), np.uint8), 64, "pad")
    assert normalise_reference(torch.from_numpy(square)[None])[..., 0, 0].abs().max() < 0.01


def test_all_parts_are_named_and_the_guide_has_their_probabilities():
    assert {*PHOTO, *POSE, "erase"} == {*transforms(32), "compression", "elastic", "erase"} == set(PARTS)
    guide = (REPOSITORY / "docs" / "training.md").read_text()
    for part, probability in STRONG.items():
        assert f"\n| `{part}` | {probability} | " in guide


def test_a_picture_that_may_not_be_written_to_is_resized_without_a_word():
    """The strides decide how fast PyTorch is, and no byte."""
    draw = np.random.default_rng(0)
    for sides in draw.integers(3, 300, (30, 4)).tolist():
        picture = draw.integers(0, 256, (*sides[:2], 3), np.uint8)
        planes = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].contiguous()
        expected = torch.nn.functional.interpolate(planes, sides[2:], mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        picture.setflags(write=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = resize(picture, *sides[2:])
        assert found.flags.c_contiguous
        assert (found == expected.numpy()).all()
