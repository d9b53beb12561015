"""Quality scores: equal to scikit-learn's mixture and to the published script's numbers; a saved mixture runs no code."""

import pickle

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from pbe_core.errors import InputError
from pbe_train.evaluation.quality import Mixture, fit_mixture, log_likelihoods, quality_scores


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.standard_normal((400, 24)) * np.linspace(0.1, 2, 24) + random.integers(0, 3, (400, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def mixture(features) -> Mixture:
    return fit_mixture(features, 3, components=5)


def test_scores_are_scikit_learns(features, mixture):
    """The same fit by its class, and the same log-likelihoods, for what it was fitted on and for pictures far off."""
    theirs = GaussianMixture(5, covariance_type="full", random_state=0)
    theirs.weights_, theirs.means_, theirs.precisions_cholesky_ = mixture.weights, mixture.means, mixture.precisions
    for seen in (features, 10 * features, features[:1]):
        expected = theirs.score_samples(seen.astype(np.float64))
        assert log_likelihoods(mixture, seen) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # It is fitted, not just started: no worse than a single Gaussian, and its components share all pictures.
    assert log_likelihoods(mixture, features).mean() > log_likelihoods(fit_mixture(features, 3, 1), features).mean()
    assert mixture.weights.sum() == pytest.approx(1)
    assert mixture.count == 400


def test_quality_is_the_published_scripts(features, mixture):
    """Its arithmetic: the likelihood less 0, over 300, clipped, and the mean x 100. Pictures beyond the last whole 50 count."""
    likelihoods = log_likelihoods(mixture, features[:123])
    # Features that are c times as large add -24 ln c to all: with these c some are below 0, above 300, or neither.
    for middle in (0.0, 150.0, 300.0):
        c = np.exp((np.median(likelihoods) - middle) / 24)
        scaled = Mixture(mixture.weights, c * mixture.means, mixture.precisions / c, mixture.count)
        scores = [(number - 0) / (300 - 0) for number in log_likelihoods(scaled, c * features[:123].astype(float))]
        published = np.clip(scores, 0, 1)
        ours = quality_scores(scaled, c * features[:123].astype(float))
        assert ours == pytest.approx(published, abs=1e-12)
        assert 100 * ours.mean() == pytest.approx(sum(published) / len(published) * 100)
        assert np.median(ours) == pytest.approx(middle / 300)
        assert len(ours) == 123
        assert (0 in ours, 1 in ours) == (middle == 0, middle == 300)


def test_likely_pictures_score_higher(features, mixture):
    """Real, noisy, and none of these pictures: in that order."""
    noise = np.random.default_rng(1).standard_normal(features.shape)
    means = [log_likelihoods(mixture, features + level * noise).mean() for level in (0, 0.5, 5)]
    assert means == sorted(means, reverse=True)


def test_a_fit_depends_on_its_seed_alone(features, mixture):
    assert np.array_equal(fit_mixture(features, 3, components=5).means, mixture.means)
    assert not np.array_equal(fit_mixture(features, 4, components=5).means, mixture.means)


def test_a_saved_mixture_is_the_same(features, mixture, tmp_path):
    mixture.save(tmp_path / "mixture.npz")
    again = Mixture.load(tmp_path / "mixture.npz")
    assert again.count == 400
    assert np.array_equal(log_likelihoods(again, features), log_likelihoods(mixture, features))
    assert [path.name for path in tmp_path.iterdir()] == ["mixture.npz"]


def harm_by_pickle(path, mixture):
    """What the published script loads: a pickle. This one makes a file where it is loaded."""

    class Harm:
        def __reduce__(self):
            return (open, (str(path.with_name("ran")), "w"))

    path.write_bytes(pickle.dumps(Harm()))


def harm_by_object(path, mixture):
    np.savez(path, weights=np.array([{}]), means=mixture.means, precisions=mixture.precisions, format=1, count=1)


def harm_by_shape(path, mixture):
    np.savez(path, weights=mixture.weights, means=mixture.means[:, 1:], precisions=mixture.precisions, format=1, count=1)


def harm_by_nan(path, mixture):
    np.savez(path, weights=mixture.weights * np.nan, means=mixture.means, precisions=mixture.precisions, format=1, count=1)


def harm_by_cutting(path, mixture):
    mixture.save(path)
    path.write_bytes(path.read_bytes()[:1000])


def harm_by_other_array(path, mixture):
    with path.open("wb") as file:
        np.save(file, mixture.means)


@pytest.mark.parametrize(
    "harm", [harm_by_pickle, harm_by_object, harm_by_shape, harm_by_nan, harm_by_cutting, harm_by_other_array]
)
def test_a_file_that_is_no_mixture_is_refused(harm, mixture, tmp_path):
    harm(tmp_path / "mixture.npz", mixture)
    with pytest.raises(InputError, match=r"mixture\.npz: .*fit (it|the mixture) anew"):
        Mixture.load(tmp_path / "mixture.npz")
    assert not (tmp_path / "ran").exists()


def test_bad_input_is_one_line(features, mixture, tmp_path):
    with pytest.raises(InputError, match=r"mixture\.npz: no such file"):
        Mixture.load(tmp_path / "mixture.npz")
    with pytest.raises(InputError, match=r"^features: 23 numbers a picture, the mixture was fitted on 24; use the same judge$"):
        quality_scores(mixture, features[:, 1:])
    with pytest.raises(InputError, match=r"^features of 39 pictures: a mixture of 20 needs 40 or more$"):
        fit_mixture(features[:39], 0)
    bad = features.copy()
    bad[5, 5] = np.nan
    for use in (lambda: fit_mixture(bad, 0, 2), lambda: quality_scores(mixture, bad)):
        with pytest.raises(InputError, match=r"^features: 1 of 400 pictures have NaN or infinity; the judge is damaged$"):
            use()
