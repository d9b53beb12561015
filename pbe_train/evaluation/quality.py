"""Quality score (QS): how likely a picture's features are under a Gaussian mixture that was fitted on real pictures.

    real features ──fit_mixture──▶ Mixture ──save──▶ mixture.npz        features ──quality_scores──▶ 0-1 each; mean x 100 = QS

As published (Paint-by-Example, eval_tool/gmm/gmm_score_coco.py, from GIQA's gmm_score.py and get_gmm.py: Gu et al., GIQA:
Generated Image Quality Assessment, ECCV 2020): features of CLIP ViT-B/32 as they come, not normalised and without PCA, of whole
pictures prepared as CLIP prepares them (short side to 224 px, centre square); scikit-learn's mixture of 20 Gaussians with full
covariances; log-likelihood / 300, clipped to 0-1.

Published code goes through whole batches of 50 and drops the pictures beyond the last; here none is dropped. Its mixture is a
pickle to download, fitted on COCO 2017, with a fit that is not published; here nothing that is loaded runs code. So a QS compares
with published ones only where the mixture was fitted on those photos, and even then but for the fit's start.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64
from scipy.special import logsumexp

from pbe_core.errors import InputError
from pbe_core.files import atomic_file
from pbe_core.randomness import name_hash

Features = Float[np.ndarray, "_ _"]
LIKELIHOOD_OF_ONE = 300.0
"""Log-likelihood (natural) that counts as 1; 0 counts as 0. A number of the published code, for CLIP's 512 features."""
COMPONENTS = 20
"""As published."""
FEWEST_FOR_MIXTURE = 2 * COMPONENTS
"""Pictures that it is fitted on."""
FORMAT = 1
FIELDS = {"weights": 1, "means": 2, "precisions": 3}


@dataclass(frozen=True)
class Mixture:
    """A mixture of k Gaussians over d features.

    Attributes:
        weights: share of each component; they sum to 1.
        means: centre of each.
        precisions: for each, the upper triangular P with P P^T = inverse of its covariance.
        count: pictures it was fitted on. Fewer than some d of each component make likelihoods that only those pictures reach.
    """

    weights: Float64[np.ndarray, " k"]
    means: Float64[np.ndarray, "k d"]
    precisions: Float64[np.ndarray, "k d d"]
    count: int

    @property
    def mark(self) -> str:
        """What tells it from others, for people: pictures it was fitted on, and a hash of its numbers."""
        digest = hashlib.sha256()
        for name in FIELDS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return f"{len(self.weights)} Gaussians of {self.count} pictures, {digest.hexdigest()[:12]}"

    def save(self, path: Path) -> None:
        """Write it as .npz, without pickles; the file is whole or not there."""
        arrays = {name: getattr(self, name) for name in FIELDS}
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, format=FORMAT, count=self.count, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Mixture":
        """Read what `save` wrote; nothing in the file can run code.

        Raises:
            InputError: there is no such file, or it is none of ours.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: np.asarray(file[name], np.float64) for name in FIELDS}
                version, count = int(file["format"]), int(file["count"])
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; it is made from the features of real pictures") from None
        except (ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, AttributeError):
            raise InputError(
                f"{path}: no Gaussian mixture as this program saves it; fit it anew (pickles are not read)"
            ) from None
        shape = arrays["precisions"].shape
        fits = all(arrays[name].shape == shape[:axes] for name, axes in FIELDS.items()) and len(shape) == 3
        if version != FORMAT or not fits or shape[1] != shape[2] or not all(np.isfinite(one).all() for one in arrays.values()):
            raise InputError(f"{path}: damaged, or of another version of this program; fit the mixture anew")
        return cls(**arrays, count=count)


def fit_mixture(features: Features, seed: int, components: int = COMPONENTS) -> Mixture:
    """Fit a mixture with full covariances on the features of real pictures, as they come from CLIP ViT-B/32.

    scikit-learn's defaults, as GIQA's script has them: start by k-means, up to 100 steps, 1e-6 added to variances.

    Raises:
        InputError: fewer than two pictures a component, or features that are not finite.
    """
    # It takes 2 s to import, and nothing else needs it.
    from sklearn.mixture import GaussianMixture

    if len(features) < 2 * components:
        raise InputError(f"features of {len(features)} pictures: a mixture of {components} needs {2 * components} or more")
    model = GaussianMixture(components, covariance_type="full", random_state=name_hash(seed, "mixture", bits=32))
    model.fit(_checked(features))
    return Mixture(model.weights_, model.means_, model.precisions_cholesky_, len(features))


def quality_scores(mixture: Mixture, features: Features) -> Float64[np.ndarray, " _"]:
    """The score of each picture, 0-1: log-likelihood / 300, clipped. Their mean x 100 is QS.

    Raises:
        InputError: features of another width than the mixture's, or not finite.
    """
    return np.clip(log_likelihoods(mixture, features) / LIKELIHOOD_OF_ONE, 0, 1)


def log_likelihoods(mixture: Mixture, features: Features) -> Float64[np.ndarray, " _"]:
    """Natural logarithm of the mixture's density at each picture's features, in float64. Raises: as `quality_scores`."""
    width = mixture.means.shape[1]
    if features.shape[1] != width:
        raise InputError(
            f"features: {features.shape[1]} numbers a picture, the mixture was fitted on {width}; use the same judge"
        )
    numbers = _checked(features)
    parts = []
    for weight, mean, precision in zip(mixture.weights, mixture.means, mixture.precisions, strict=True):
        distance = np.sum(((numbers - mean) @ precision) ** 2, axis=1)
        volume = np.sum(np.log(np.diagonal(precision)))
        parts.append(np.log(weight) + volume - (width * np.log(2 * np.pi) + distance) / 2)
    likelihoods: np.ndarray = logsumexp(np.stack(parts), axis=0)
    return likelihoods


def _checked(features: Features) -> Float64[np.ndarray, "_ _"]:
    if not (finite := np.isfinite(features).all(1)).all():
        raise InputError(f"features: {(~finite).sum()} of {len(features)} pictures have NaN or infinity; the judge is damaged")
    return features.astype(np.float64)
