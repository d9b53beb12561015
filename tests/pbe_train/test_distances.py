"""Distances of sets of features: equal to plain formulas, right without full rank, and their intervals hold the truth."""

import functools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers

from pbe_core.errors import InputError
from pbe_train.evaluation import distances
from pbe_train.evaluation.distances import (
    bootstrap,
    bootstrap_mean,
    cmmd,
    frechet_distance,
    frechet_infinity,
    influences,
    kernel_distance,
)

DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance, "cmmd": cmmd}


def draw(random, n, m, width, shift=0.3, decay=0.5):
    """Two Gaussian sets whose variances fall off, as those of networks' features do; the second one wider and moved."""
    spread = np.arange(1, width + 1.0) ** -decay
    first, second = (random.standard_normal((count, width)) * spread for count in (n, m))
    return first, second * (1 + shift / 2) + shift * spread


def published_frechet(a, b):
    """The published formula, with a root of the matrix, which SciPy takes by a Schur decomposition."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(first + second) - 2 * np.trace(scipy.linalg.sqrtm(first @ second)).real


def plain_kernels(a, b):
    """All three kernel matrices, written out pair by pair."""
    return [np.array([[(np.dot(x, y) / len(x) + 1) ** 3 for y in two] for x in one]) for one, two in ((a, a), (b, b), (a, b))]


@given(seed=integers(0, 99), n=integers(30, 90), m=integers(30, 90), width=integers(2, 20))
@settings(max_examples=20, deadline=None)
def test_frechet_is_the_published_formula_where_that_has_full_rank(seed, n, m, width):
    first, second = draw(np.random.default_rng(seed), n, m, width)
    assert frechet_distance(first, second) == pytest.approx(published_frechet(first, second), rel=1e-8)


@pytest.mark.parametrize(("n", "m", "width"), [(12, 12, 40), (9, 70, 40), (70, 9, 40), (2, 3, 40)])
def test_frechet_with_fewer_pictures_than_features(n, m, width):
    """Against the same distance in the few directions in which pictures differ, where covariances may have full rank."""
    first, second = draw(np.random.default_rng(n), n, m, width)
    product = (first - first.mean(0)) @ (second - second.mean(0)).T / math.sqrt((n - 1) * (m - 1))
    shift = first.mean(0) - second.mean(0)
    variances = first.var(0, ddof=1).sum() + second.var(0, ddof=1).sum()
    expected = shift @ shift + variances - 2 * np.linalg.svd(product, compute_uv=False).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    # A rotation and more features that are constant change nothing.
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((width + 5, width + 5)))[0]
    wider = [np.pad(one, ((0, 0), (0, 5)), constant_values=3.0) @ turn for one in (first, second)]
    assert frechet_distance(*wider) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_known_gaussians():
    """Sets whose means and covariances are exactly those of a diagonal formula: sum of (m - m')^2 + (s - s')^2."""
    cross = np.concatenate([np.eye(3), -np.eye(3)]) * math.sqrt(5 / 2)
    first, second = cross * (1, 2, 3) + (0, 1, 0), cross * (2, 2, 5)
    assert frechet_distance(first, second) == pytest.approx(1 + 1 + 4, rel=1e-12)
    for seed in range(20):  # Rounding would put some of these below 0.
        same = np.random.default_rng(seed).standard_normal((30, 12))
        assert 0 <= frechet_distance(same, same[::-1].copy()) < 1e-12
    assert frechet_distance(first.astype(np.float32), second.astype(np.float32)) == pytest.approx(6, rel=1e-6)


def test_kernel_distance_is_the_mean_over_all_pairs(monkeypatch):
    first, second = draw(np.random.default_rng(0), 23, 31, 7)
    within, others, between = plain_kernels(first, second)
    expected = (within.sum() - np.trace(within)) / (23 * 22) + (others.sum() - np.trace(others)) / (31 * 30) - 2 * between.mean()
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(second, first) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(distances, "BLOCK", 5)
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased():
    """Over many draws of one kind its mean is 0, while CMMD's and the Fréchet distance's are not."""
    random = np.random.default_rng(3)
    found = np.array([[distance(*draw(random, 20, 20, 8, shift=0)) for distance in DISTANCES.values()] for _ in range(400)])
    error = found.std(0) / math.sqrt(len(found))
    assert abs(found[:, 1].mean()) < 3 * error[1]
    assert (found[:, [0, 2]].mean(0) > 10 * error[[0, 2]]).all()


def test_cmmd_is_as_published():
    """Against the published formula: mean kernels with the diagonal, of normalised features. Lengths do not matter."""
    first, second = draw(np.random.default_rng(0), 23, 31, 7)
    one, two = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (first, second))
    means = [np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean() for x, y in ((one, one), (two, two), (one, two))]
    assert cmmd(first, second) == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-9)
    assert cmmd(5 * first, second * np.linspace(1, 2, 31)[:, None]) == pytest.approx(cmmd(first, second), rel=1e-9)
    assert cmmd(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_infinity_takes_the_bias_away():
    """Twice as many pictures as features: the distance is six times the truth, its extrapolation is not."""
    random = np.random.default_rng(1)
    spread = np.arange(1, 65.0) ** -0.5
    truth = (0.15**2 + 0.1**2) * (spread**2).sum()
    pairs = [
        (random.standard_normal((110, 64)) * spread, (random.standard_normal((110, 64)) * 1.15 + 0.1) * spread) for _ in range(12)
    ]
    plain, without = (
        np.mean([one(*pair) for pair in pairs]) for one in (frechet_distance, lambda a, b: frechet_infinity(a, b, 1))
    )
    assert plain > 5 * truth
    assert abs(without - truth) < 0.15 * (plain - truth)
    assert frechet_infinity(*pairs[0], 1) == frechet_infinity(*pairs[0], 1) != frechet_infinity(*pairs[0], 2)


def test_frechet_infinity_of_pairs_draws_them_together():
    """Equal sets are 0 apart, whatever part of them is looked at; drawn each for itself, halves share fewer pictures."""
    features = np.random.default_rng(2).standard_normal((60, 16))
    assert frechet_infinity(features, features, 1, paired=True) == pytest.approx(0, abs=1e-9)
    assert frechet_infinity(features, features, 1) < -0.1


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_intervals_hold_the_truth(kind, paired, shift):
    """What the distance is on average for as many pictures, of other draws: in 95 % of intervals, and they are not far too wide.

    Of 60 intervals 52 or more hold it, which 95 % miss once in 350 times; their width is right to 45 %, but for sets of one kind.
    """
    random = np.random.default_rng(5)

    def pair():
        first, second = draw(random, 60, 60, 24, shift=shift)
        return first, (0.8 * first * (1 + shift / 2) + 0.6 * second if paired else second)

    distance = functools.partial(kernel_distance, paired=paired) if kind == "kernel" else DISTANCES[kind]
    found = np.array([distance(*pair()) for _ in range(300)])
    intervals = np.array([bootstrap(kind, *pair(), replicates=200, seed=number, paired=paired) for number in range(60)])
    assert ((intervals[:, 0] <= found.mean()) & (found.mean() <= intervals[:, 1])).sum() >= 52
    ratio = (intervals[:, 1] - intervals[:, 0]).mean() / (2 * 1.96 * found.std())
    assert 0.8 < ratio < (1.45 if shift else 2.2)


def test_pairs_are_drawn_together():
    """A picture and its noisy copy: much surer together than apart; a wrong order of one side loses that."""
    random = np.random.default_rng(0)
    first, _ = draw(random, 80, 80, 16)
    second = first + 0.1 * random.standard_normal(first.shape) + 0.2
    for kind in DISTANCES:
        widths = [np.ptp(bootstrap(kind, first, second, 200, 1, paired=paired)) for paired in (True, False)]
        assert widths[0] < 0.5 * widths[1]
        assert np.ptp(bootstrap(kind, first, second[::-1], 200, 1, paired=True)) > 1.5 * widths[0]


@pytest.mark.parametrize("kind", DISTANCES)
def test_intervals_depend_on_the_seed_alone(kind, monkeypatch):
    first, second = draw(np.random.default_rng(0), 30, 40, 8)
    interval = bootstrap(kind, first, second, 100, 1)
    low, high = interval
    assert low < DISTANCES[kind](first, second) < high
    assert bootstrap(kind, first, second, 100, 1) == interval
    assert (bootstrap(kind, first, second, 100, 2) == interval) == (kind == "frechet")
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert bootstrap(kind, first, second, 100, 1) == pytest.approx(interval, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(20, 50, 8), (50, 20, 30), (20, 50, 30), (12, 12, 30)])
def test_influences_are_the_distances_derivative(n, m, width):
    """The standard error against a jackknife that leaves each picture out in turn, which the first-order one comes near."""
    # Skewed, so that far pictures lie on the side to which the mean moves, or on the other: a wrong sign shows.
    first, second = (np.exp(one / 2) for one in draw(np.random.default_rng(0), n, m, width, shift=0.8))
    low, high = bootstrap("frechet", first, second)
    whole = frechet_distance(first, second)
    without = [[frechet_distance(np.delete(first, k, 0), second) for k in range(n)]]
    without.append([frechet_distance(first, np.delete(second, k, 0)) for k in range(m)])
    expected = math.sqrt(sum((len(one) - 1) * np.var(one) for one in without))
    assert (high - whole) / 1.959964 == pytest.approx(expected, rel=0.2)
    assert low == pytest.approx(max(0, 2 * whole - high))


@pytest.mark.parametrize("paired", [False, True])
def test_a_replicate_that_draws_each_picture_once_is_the_distance(paired):
    first, second = (torch.from_numpy(one) for one in draw(np.random.default_rng(0), 12, 12 if paired else 17, 8))
    once = [torch.ones((len(one), 2), dtype=torch.float64) for one in (first, second)]
    for kernel in (distances._cubic, distances._gaussian):
        for biased in (False, True):
            found = distances._weighted(first, second, *once, kernel, paired, biased)
            expected = distances._discrepancy(first, second, kernel, biased, paired)
            assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_partners_that_show_the_same_photo_do_not_pull_a_kernel_distance_below_0():
    """Copies with some noise: by the plain estimator each picture meets its own copy, which no other set would hold."""
    random = np.random.default_rng(0)
    first = [draw(random, 40, 40, 16)[0] for _ in range(30)]
    pairs = [(one, one + 0.01 * random.standard_normal(one.shape)) for one in first]
    plain, partners_apart = (np.array([kernel_distance(*pair, paired=paired) for pair in pairs]) for paired in (False, True))
    assert (plain < 0).all()
    assert abs(partners_apart.mean()) < 0.02 * abs(plain.mean())
    by_hand = sum(
        distances._cubic(*(torch.from_numpy(side[index][None]) for side, index in ((a, i), (b, j)))).item() * sign
        for a, b, sign in ((pairs[0][0], pairs[0][0], 1), (pairs[0][1], pairs[0][1], 1), (*pairs[0], -2))
        for i in range(40)
        for j in range(40)
        if i != j
    ) / (40 * 39)
    assert partners_apart[0] == pytest.approx(by_hand, rel=1e-6, abs=1e-9)
    with pytest.raises(InputError, match=r"cannot be paired$"):
        kernel_distance(first[0], first[0][:5], paired=True)


def test_the_smaller_set_decides_the_work():
    """Time grows with the third power of the rows whose eigenvalues are sought."""
    few, many = torch.ones((5, 40)), torch.ones((50, 40))
    assert len(distances._gram(few, many)) == len(distances._gram(many, few)) == 5
    assert len(distances._gram(many, many)) == 40


def test_two_halves_of_one_set_are_of_one_kind():
    """KID's interval holds 0; of another kind it does not."""
    random = np.random.default_rng(4)
    features, others = draw(random, 400, 200, 32)
    order = random.permutation(400)
    low, high = bootstrap("kernel", features[order[:200]], features[order[200:]], 200, 1)
    assert low < 0 < high
    assert bootstrap("kernel", features[:200], others, 200, 1)[0] > 0


def test_the_mean_of_scores():
    """Against the usual standard error; infinite scores make an infinite mean, and no NaN."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_mean(values, 1000, 1)
    assert (low, high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.03)
    assert bootstrap_mean(values, 1000, 1) == (low, high)
    assert bootstrap_mean(np.full(5, math.inf)) == (math.inf, math.inf)
    assert bootstrap_mean(np.array([1.0, 2.0, 3.0, math.inf]))[1] == math.inf
    assert np.isnan(bootstrap_mean(np.array([1.0]))).all()
    with pytest.raises(InputError, match=r"^scores: 1 of 2 are not numbers; leave them out"):
        bootstrap_mean(np.array([1.0, math.nan]))


@pytest.mark.parametrize(
    "distance", [*DISTANCES.values(), lambda a, b: frechet_infinity(a, b, 0), lambda a, b: bootstrap("kernel", a, b)]
)
def test_what_is_no_set_of_features_is_refused(distance):
    good = np.random.default_rng(0).standard_normal((6, 4))
    bad = good.copy()
    bad[3, 1], bad[5, 0] = math.nan, math.inf
    with pytest.raises(InputError, match=r"^features: 2 of 6 pictures of the second set have NaN or infinity, first number 3; "):
        distance(good, bad)
    with pytest.raises(InputError, match=r"^features: the first set has 1 of the 2 pictures that a distance needs at least$"):
        distance(good[:1], good)
    with pytest.raises(InputError, match=r"^features: of 4 and 3 numbers a picture; both sets need the same judge$"):
        distance(good, good[:, :3])


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("paired", [False, True])
def test_four_pictures_have_an_interval_though_a_replicate_may_be_of_one(kind, paired):
    first, second = draw(np.random.default_rng(0), 4, 4, 8)
    low, high = bootstrap(kind, first, second, 1000, 0, paired=paired)
    assert low < high


def test_too_few_pictures_for_an_interval():
    few = np.random.default_rng(0).standard_normal((3, 4))
    for kind in DISTANCES:
        assert np.isnan(bootstrap(kind, few, few)).all()
    with pytest.raises(InputError, match=r"needs 4$"):
        frechet_infinity(few, few, 0)
    with pytest.raises(InputError, match=r"cannot be paired$"):
        bootstrap("kernel", few, np.ones((4, 4)), paired=True)
    with pytest.raises(InputError, match="0 throughout"):
        cmmd(few, np.zeros((3, 4)))


def left_out(distance, first, second):
    """Jackknife: what the distance loses as each pair is left out, times n - 1."""
    whole, n = distance(first, second), len(first)
    keep = [np.arange(n) != one for one in range(n)]
    return np.array([(n - 1) * (whole - distance(first[rest], second[rest])) for rest in keep])


def test_influences_are_what_leaving_out_a_pair_gives():
    """Of KID exactly, but for (n - 1) / (n - 2); of a Frechet distance ever more nearly for more pairs."""
    random = np.random.default_rng(4)
    first = random.normal(0, 1, (300, 4))
    second = 0.7 * first + random.normal(0.5, 0.6, (300, 4))
    moved = influences("kernel", first, second)
    assert moved.mean() == pytest.approx(0, abs=1e-12)
    expected = left_out(lambda a, b: kernel_distance(a, b, paired=True), first, second)
    assert moved == pytest.approx(expected * 298 / 299, rel=1e-6, abs=1e-9)
    moved, expected = influences("frechet", first, second), left_out(frechet_distance, first, second)
    assert moved.mean() == pytest.approx(0, abs=1e-12)
    assert np.corrcoef(moved, expected)[0, 1] > 0.999
    assert moved.std() == pytest.approx(expected.std(), rel=0.03)
    low, high = bootstrap("frechet", first, second, paired=True)
    assert (high - low) / 2 == pytest.approx(1.959964 * moved.std() / 300**0.5)
    with pytest.raises(InputError, match="cannot be paired"):
        influences("frechet", first, second[:-1])
