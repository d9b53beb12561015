"""How far two sets of pictures lie apart, by their features: FID, KID, CMMD; and how sure that is.

    features [n, d], [m, d] ──frechet_distance | kernel_distance | cmmd──▶ distance
                            ──bootstrap──▶ its 95 % interval

Pure functions, float64 inside. A feature is a row; each picture has one. All distances are squared ones, in units of the features
squared where they have a unit.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.randomness import generator

Features = Float[np.ndarray, "_ _"]
Kernel = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["frechet", "kernel", "cmmd"]

# Kernels are made in blocks of some pictures of one set against all of the other, of so many entries: 32 MB.
BLOCK = 4_000_000
# Below so many pictures of a set nothing is said about how sure a distance is.
FEWEST_FOR_INTERVAL = 4
SIGMA, SCALE = 10.0, 1000.0
"""Of CMMD: width of its kernel, for features of length 1, and the factor it is shown with."""
SIZES = 15
"""How many sizes `frechet_infinity` looks at; the smallest is `SMALLEST` of all pictures."""
SMALLEST = 0.5


def frechet_distance(a: Features, b: Features) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians with the sets' means and covariances; 0 or more, 0 = the same.

    On Inception's features it is FID. It is biased upwards, the more so the fewer pictures: below 2,048 by more than most changes
    of a model are worth. Covariances are divided by n - 1, as in all published codes.

        |m_a - m_b|^2 + tr A + tr B - 2 tr (AB)^(1/2),    tr (AB)^(1/2) = sum of singular values of X_a X_b^T

    where X are the centred features over the root of n - 1. The singular values come from a symmetric eigenvalue problem of
    min(n, m, d) rows, so a set with fewer pictures than features (covariance without full rank) is no special case, and nothing
    is added to it. Published codes take all d eigenvalues or a root of AB itself: those that are 0 come as noise, whose roots add
    up to 1e-6 of the distance (tests/compat/metrics.py); pytorch-fid and clean-fid add 1e-6 to both diagonals where the root is
    not finite, which it was with no set and SciPy tried.

    Raises:
        InputError: features of another width, not finite, or of fewer than two pictures.
    Source: Dowson & Landau, The Fréchet distance between multivariate normal distributions (1982); Heusel et al. (2017).
    """
    first, second = _checked(a, b)
    shift, left, right = _spread_of(first, second)
    values = torch.linalg.eigvalsh(_gram(left, right))
    distance = shift @ shift + left.square().sum() + right.square().sum() - 2 * values.clamp(min=0).sqrt().sum()
    return max(0.0, float(distance))


def kernel_distance(a: Features, b: Features, *, paired: bool = False) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, unbiased; about 0, of either sign, for sets of one kind.

    On Inception's features it is KID. Over all pairs of pictures: libraries draw subsets of 50 to 1,000 pictures, whose mean is
    the same but for chance. Tables usually show it x 1000; this is the plain value. Memory does not grow with n x m.

    Args:
        a: one set's features.
        b: the other's.
        paired: picture i of both sets is of pair i, and shows the same photo around the region. A picture then does not meet its
            partner either: they are alike because they are partners, and the distance would be far below 0 for small sets.

    Raises:
        InputError: as `frechet_distance`, or paired sets of different sizes.
    Source: Binkowski et al., Demystifying MMD GANs (ICLR 2018); estimator: Gretton et al. (JMLR 2012), equation 3.
    """
    first, second = _checked(a, b)
    if paired:
        _check_paired(first, second)
    return _discrepancy(first, second, _cubic, biased=False, paired=paired)


def cmmd(a: Features, b: Features) -> float:
    """CMMD of CLIP's features, which are normalised here: squared discrepancy with a Gaussian kernel, x 1000; 0 or more.

    As in the published code the kernel's width is 10, and a picture's pair with itself counts (the biased estimator of Gretton et
    al., equation 5): sets of n pictures of one kind give about 1000 (1 - k) (1/n + 1/m), k the mean kernel of two pictures: some
    0.01 for 1,000. Published values are of ViT-L/14 at 336 px.

    Raises:
        InputError: as `frechet_distance`, or a feature that is 0 throughout.
    Source: Jayasumana et al., Rethinking FID (CVPR 2024); its code: google-research/cmmd, distance.py.
    """
    return SCALE * _discrepancy(*_normalised(*_checked(a, b)), _gaussian, biased=True)


def frechet_infinity(a: Features, b: Features, seed: int, *, paired: bool = False) -> float:
    """Fréchet distance that sets without end would have: a line through distances over 1 / number of pictures, where that is 0.

    Published, only the painted set is shortened (5,000 to 50,000 pictures, against all real ones). Here both are small, so both
    are shortened by the same shares, half of the pictures to all, in 15 steps. May be negative. As the bias goes, so grows the
    spread: 1 to 3 times that of the distance itself.

    Args:
        a: one set's features.
        b: the other's.
        seed: of which pictures are drawn.
        paired: picture i of both sets is of pair i; they are drawn together. Else halves would share fewer photos than the whole
            sets do, and the line would fall far below: of equal sets, which are 0 apart, to minus their bias.

    Raises:
        InputError: as `frechet_distance`, or fewer than four pictures.
    Source: Chong & Forsyth, Effectively unbiased FID and inception score (CVPR 2020).
    """
    first, second = (tensor.numpy() for tensor in _checked(a, b))
    if min(len(first), len(second)) < FEWEST_FOR_INTERVAL:
        raise InputError(f"features: sets of {len(first)} and {len(second)} pictures; FID-infinity needs {FEWEST_FOR_INTERVAL}")
    shares = np.linspace(SMALLEST, 1, SIZES)
    distances = []
    for number, share in enumerate(shares):
        parts = []
        for name, features in (("a", first), ("b", second)):
            order = generator(seed, "frechet infinity", "a" if paired else name, number).permutation(len(features))
            parts.append(features[order[: max(2, round(share * len(features)))]])
        distances.append(frechet_distance(*parts))
    return float(np.polyfit(1 / shares, distances, 1)[1])


def bootstrap(
    kind: Kind, a: Features, b: Features, replicates: int = 1000, seed: int = 0, *, paired: bool = False
) -> tuple[float, float]:
    """95 % interval of a distance: in which it would lie for as many other pictures of the same kinds. NaN for fewer than four.

    It holds the distance's expectation for this many pictures, its bias included; compare only sets of equal size.

    Fréchet: resampled with repetition, sets have fewer different pictures, and the distance grows by more than its spread. So the
    interval is the distance +- 1.96 standard errors by the infinitesimal jackknife: the spread of each picture's influence on the
    distance, exact where a bootstrap would be a guess of it, in the time of one distance. It has no replicates and no seed.
    Kernels: pictures are weighted by multinomial counts, and no picture meets itself or its repetition; replicates are centred on
    the distance, 2.5 % lie below and above. For two sets of one kind the interval is up to 1.7 times too wide.

    Args:
        kind: `frechet`, `kernel` or `cmmd`.
        a: one set's features.
        b: the other's.
        replicates: of kernels.
        seed: of kernels.
        paired: picture i of both sets is of pair i; they are drawn together.

    Raises:
        InputError: as the distance, or paired sets of different sizes.
    Source: Efron, The jackknife, the bootstrap and other resampling plans (1982), chapter 6.
    """
    first, second = _checked(a, b)
    if paired:
        _check_paired(first, second)
    if min(len(first), len(second)) < FEWEST_FOR_INTERVAL:
        return float("nan"), float("nan")
    if kind == "frechet":
        reach = 1.959964 * _frechet_error(first, second, paired)
        distance = frechet_distance(a, b)
        return max(0.0, distance - reach), distance + reach
    left = _weights(len(first), replicates, seed, kind, "a")
    right = left if paired else _weights(len(second), replicates, seed, kind, "b")
    if kind == "kernel":
        value, scale = kernel_distance(a, b, paired=paired), 1.0
        found = _weighted(first, second, left, right, _cubic, paired, biased=False)
    else:
        value, scale = cmmd(a, b), SCALE
        found = _weighted(*_normalised(first, second), left, right, _gaussian, paired, biased=True)
    # A replicate of one picture alone, which few pictures may give, has no discrepancy.
    found = found[found.isfinite()]
    low, high = np.quantile((found - found.mean()).numpy(), (0.025, 0.975))
    return value + scale * float(low), value + scale * float(high)


def influences(kind: Literal["frechet", "kernel"], a: Features, b: Features) -> Float64[np.ndarray, " pairs"]:
    """How each pair weighs in the distance of paired sets: how fast the distance grows with the pair's share; their mean is 0.

    Distance + influence is a value for each pair whose mean is the distance, and whose standard error is the distance's: for many
    pairs, what leaving each one out in turn would give. So a distance can be compared as means over pairs are.

    Args:
        kind: of `frechet_distance`, or of `kernel_distance` of paired sets.
        a: one set's features; picture i of both sets is of pair i.
        b: the other's.

    Raises:
        InputError: as the distance, or sets of different sizes.
    Source: Efron, The jackknife, the bootstrap and other resampling plans (1982), chapter 6.
    """
    first, second = _checked(a, b)
    _check_paired(first, second)
    if kind == "frechet":
        of_first, of_second = _frechet_influences(first, second)
        found: np.ndarray = (of_first + of_second).numpy()
        return found
    n, sums = len(first), torch.zeros(len(first), dtype=torch.float64)
    for x, y, factor in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
        for rows, part, own in _blocks(x, y, _cubic):
            sums[rows] += factor * part.sum(1)
            sums[rows.start : rows.start + len(own)] -= factor * own
    means = sums / (n - 1)
    moved: np.ndarray = (2 * (means - means.mean())).numpy()
    return moved


def bootstrap_mean(values: Float[np.ndarray, " _"], replicates: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values of independent pairs; NaN for fewer than two. Infinite values are allowed.

    Raises:
        InputError: a value is NaN: what is not defined is to be left out before.
    """
    if np.isnan(values).any():
        raise InputError(f"scores: {np.isnan(values).sum()} of {len(values)} are not numbers; leave them out before the mean")
    if len(values) < 2:
        return float("nan"), float("nan")
    random = generator(seed, "bootstrap", "mean")
    numbers = values.astype(np.float64)
    means = np.array([numbers[random.integers(0, len(numbers), len(numbers))].mean() for _ in range(replicates)])
    # No interpolation: between two infinities it gives NaN.
    low, high = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def _checked(a: Features, b: Features) -> tuple[Tensor, Tensor]:
    """Both sets in float64, of one width, finite, and of two pictures at least."""
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features: of {a.shape[1]} and {b.shape[1]} numbers a picture; both sets need the same judge")
    for name, features in (("first", a), ("second", b)):
        if len(features) < 2:
            raise InputError(f"features: the {name} set has {len(features)} of the 2 pictures that a distance needs at least")
        if not (finite := np.isfinite(features).all(1)).all():
            place = int(np.flatnonzero(~finite)[0])
            raise InputError(
                f"features: {len(features) - finite.sum()} of {len(features)} pictures of the {name} set have NaN or infinity, "
                f"first number {place}; the judge's weights or that picture is damaged"
            )
    return torch.from_numpy(a.astype(np.float64)), torch.from_numpy(b.astype(np.float64))


def _normalised(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    lengths = [features.norm(dim=1, keepdim=True) for features in (first, second)]
    if min(float(length.min()) for length in lengths) == 0:
        raise InputError("features: those of a picture are 0 throughout and have no direction; the judge's weights are damaged")
    return first / lengths[0], second / lengths[1]


def _spread_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Difference of the means; both sets centred, over the root of n - 1, so that X^T X is the covariance."""
    means = first.mean(0), second.mean(0)
    left, right = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((first, second), means, strict=True))
    return means[0] - means[1], left, right


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """A symmetric matrix of min(n, m, d) rows; the roots of its eigenvalues are the singular values of left right^T.

    Few rows with the same X^T X stand for the set with fewer pictures. Of the other, which may have tens of thousands, only its
    covariance is needed.
    """
    few, many = (left, right) if len(left) <= len(right) else (right, left)
    if len(few) > few.shape[1]:
        few = torch.linalg.qr(few, mode="r")[1]
    if len(many) > many.shape[1]:
        return few @ (many.T @ many) @ few.T
    product = few @ many.T
    return product @ product.T


def _frechet_error(first: Tensor, second: Tensor, paired: bool) -> float:
    """Standard error of the Fréchet distance: the root mean square of each picture's influence, over the root of n."""
    influences = _frechet_influences(first, second)
    if paired:
        return float((influences[0] + influences[1]).square().mean().div(len(first)).sqrt())
    return float(sum(one.square().mean() / len(one) for one in influences) ** 0.5)


def _frechet_influences(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of each picture of both sets: how the Fréchet distance changes as it gains weight.

    Of a picture x of A: 2 (m_a - m_b).x + |x|^2 - x^T T x, for x without the mean, T the matrix of the optimal transport from A
    to B. In the basis of the singular values, M = X_a X_b^T = U S V^T, the last is (n - 1) times a diagonal entry of U S U^T, and
    V S V^T has those of B.
    """
    if len(first) > len(second):
        return _frechet_influences(second, first)[::-1]
    shift, left, right = _spread_of(first, second)
    # The set with fewer pictures comes first; each is a basis Q times a triangle, unless it has fewer pictures than features.
    (basis, small), (other_basis, other_small) = (torch.linalg.qr(x) if len(x) > x.shape[1] else (None, x) for x in (left, right))
    product = small @ other_small.T
    squares, u = torch.linalg.eigh(product @ product.T)
    values = squares.clamp(min=0).sqrt()
    # What lies below is rounding: 0 / 0.
    kept = values > values[-1] * 1e-8
    values, u = values[kept], u[:, kept]
    v = product.T @ u / values
    influences = []
    for x, axis, vectors, direction in ((left, basis, u, 1), (right, other_basis, v, -1)):
        rows = vectors if axis is None else axis @ vectors
        moved = (len(x) - 1) * (x.square().sum(1) - rows.square() @ values)
        influence = moved + 2 * direction * (len(x) - 1) ** 0.5 * (x @ shift)
        influences.append(influence - influence.mean())
    return influences[0], influences[1]


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return torch.exp(-squares / (2 * SIGMA**2))


def _blocks(x: Tensor, y: Tensor, kernel: Kernel) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the kernel matrix in parts: where they lie, the part, and its entries on the whole matrix' diagonal."""
    step = max(1, BLOCK // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        part = kernel(x[rows], y)
        yield rows, part, part.diagonal(start) if start < len(y) else part.new_zeros(0)


def _discrepancy(x: Tensor, y: Tensor, kernel: Kernel, biased: bool, paired: bool = False) -> float:
    """Mean kernel within x plus that within y minus twice that between; not `biased`: without pictures' pairs with themselves,
    and, where sets are `paired`, with their partners.
    """
    total = 0.0
    for first, second, same, factor in ((x, x, True, 1), (y, y, True, 1), (x, y, paired, -2)):
        alone = same and not biased
        found = sum(float(part.sum()) - (float(own.sum()) if alone else 0) for _, part, own in _blocks(first, second, kernel))
        total += factor * found / (len(first) * (len(second) - alone))
    return total


def _check_paired(first: Tensor, second: Tensor) -> None:
    if len(first) != len(second):
        raise InputError(f"features: sets of {len(first)} and {len(second)} pictures cannot be paired")


def _weights(n: int, replicates: int, seed: int, *names: str) -> Tensor:
    """How often each picture is drawn in each replicate, [n, replicates]."""
    drawn = generator(seed, "bootstrap", *names).multinomial(n, np.full(n, 1 / n), replicates)
    return torch.from_numpy(drawn.T.astype(np.float64))


def _weighted(
    x: Tensor, y: Tensor, left: Shaped[Tensor, "_ _"], right: Shaped[Tensor, "_ _"], kernel: Kernel, paired: bool, biased: bool
) -> Tensor:
    """The discrepancy of each replicate. Pairs of a picture with itself, or its partner, are drawn as pictures are, if at all.

    Else a picture that is drawn k times would meet itself k^2 times, and sets would seem more alike than they are.
    """
    total = torch.zeros(left.shape[1], dtype=left.dtype)
    for first, second, one, two, own, sign in (
        (x, x, left, left, True, 1),
        (y, y, right, right, True, 1),
        (x, y, left, right, paired, -2),
    ):
        n, m = len(first), len(second)
        pairs, diagonal = torch.zeros(one.shape[1], dtype=one.dtype), torch.zeros(one.shape[1], dtype=one.dtype)
        for rows, part, entries in _blocks(first, second, kernel):
            pairs += (one[rows] * (part @ two)).sum(0)
            if own:
                pairs -= entries @ (one[rows] * two[rows])
                diagonal += entries @ one[rows]
        if not own:
            total = total + sign * pairs / (n * m)
            continue
        pairs /= n * n - (one * two).sum(0)
        total = total + sign * (((n - 1) * pairs + diagonal / n) / n if biased else pairs)
    return total
