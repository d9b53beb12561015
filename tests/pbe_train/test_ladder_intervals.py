"""Intervals over seeds and pairs: against numbers computed by hand, textbook cases, and the truth they should hold."""

import numpy as np
import pytest
from scipy.stats import t

from pbe_train.ladder.intervals import bootstrap, difference, estimate


def test_by_hand():
    """MS of seeds 13.5, of pairs 4.5, of the rest 0.5: variance (13.5 + 4) / 6, freedom 17.5^2 / 13.5^2."""
    found = estimate(np.array([[1.0, 2, 3], [3, 5, 7]]))
    assert (found.value, found.by_seed, found.seeds, found.pairs) == (3.5, (2.0, 5.0), 2, 3)
    assert found.freedom == pytest.approx(306.25 / 182.25)
    reach = t.ppf(0.975, 306.25 / 182.25) * (17.5 / 6) ** 0.5
    assert (found.low, found.high) == pytest.approx((3.5 - reach, 3.5 + reach))


def test_where_pairs_do_not_matter_it_is_students_interval_of_the_seeds():
    """Of 1, 2 and 3: 2 +- 4.3027 / root 3, as every textbook has it."""
    found = estimate(np.array([[1.0, 1], [2, 2], [3, 3]]))
    assert found.freedom == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)


def test_where_seeds_do_not_matter_it_is_that_of_the_pairs():
    """More seeds of the same answers make nobody surer."""
    answers = np.random.default_rng(0).normal(0.3, 1, 400)
    for seeds in (2, 5):
        found = estimate(np.tile(answers, (seeds, 1)))
        reach = 1.959964 * answers.std(ddof=1) / 20
        assert (found.low, found.high) == pytest.approx((answers.mean() - reach, answers.mean() + reach), rel=1e-5)


def test_pairs_without_a_score_are_left_out_and_one_seed_has_no_interval():
    scores = np.array([[1.0, np.nan, 3], [2, 4, 8]])
    assert (estimate(scores).value, estimate(scores).pairs) == (3.5, 2)
    assert estimate(scores[1:]).low is None
    assert not estimate(scores[1:]).is_clear
    assert estimate(np.full((2, 2), np.nan)).value is None
    assert difference(scores[1:], scores[1:] - 9, "up")[1] == "not told apart"


@pytest.mark.parametrize(
    ("shift", "better", "verdict"),
    [
        (1.0, "up", "better"),
        (1.0, "down", "worse"),
        (-1.0, "up", "worse"),
        (-1.0, "down", "better"),
        (1.0, "neither", "more"),
        (-1.0, "neither", "less"),
        (0.0, "up", "not told apart"),
    ],
)
def test_verdicts(shift: float, better: str, verdict: str):
    """What pairs and seeds have in common, however large, does not hide a difference."""
    random = np.random.default_rng(1)
    before = random.normal(0, 50, (1, 60)) + random.normal(0, 20, (3, 1)) + random.normal(0, 0.1, (3, 60))
    found, word = difference(before + shift + random.normal(0, 0.1, (3, 60)), before, better)
    assert word == verdict
    assert found.value == pytest.approx(shift, abs=0.05)


def coverage(of_seeds: float, of_pairs: float, seeds: int = 3, pairs: int = 80, draws: int = 600) -> tuple[float, float, float]:
    """How often the interval, the bootstrap's and the one of seeds alone hold the truth, 0."""
    random = np.random.default_rng(2)
    hits = np.zeros(3)
    for _ in range(draws):
        crossed = random.normal(0, of_seeds, (seeds, 1)) + random.normal(0, of_pairs, (1, pairs))
        scores = crossed + random.normal(0, 1, (seeds, pairs))
        found, means = estimate(scores), scores.mean(1)
        reach = t.ppf(0.975, seeds - 1) * means.std(ddof=1) / seeds**0.5
        ends = ((found.low, found.high), bootstrap(scores, 200), (means.mean() - reach, means.mean() + reach))
        hits += [low <= 0 <= high for low, high in ends]
    return tuple(hits / draws)


def test_the_interval_holds_the_truth_where_the_other_two_do_not():
    """The reason for the choice. Seeds that differ much: the bootstrap is too narrow. Pairs that do: seeds alone know nothing."""
    own, resampled, _ = coverage(of_seeds=0.6, of_pairs=0.5)
    assert own > 0.91
    assert resampled < 0.88
    own, _, alone = coverage(of_seeds=0, of_pairs=2)
    assert own == pytest.approx(0.95, abs=0.03)
    assert alone < 0.85
