"""How sure a mean over seeds and pairs is, and whether two arms can be told apart. Pure functions.

    scores [seeds, pairs] ──estimate──▶ mean, 95 % interval
    arm's scores, those of the arm before ──difference──▶ mean difference, 95 % interval, verdict

Seeds and pairs are crossed: each seed's model paints the same pairs. Both are drawn at random, of trainings and of questions that
could have been asked, so the mean varies with both:

    score[s, p] = mean + seed[s] + pair[p] + rest[s, p]
    var(mean)   = (MS_seeds + max(MS_pairs - MS_rest, 0)) / (seeds x pairs)

The interval is Student's, with the degrees of freedom of that sum: near seeds - 1 where seeds decide, many where pairs do. It is
the analysis that radiology makes of several readers who read the same cases.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float64
from scipy.special import stdtrit

from pbe_core.randomness import generator

Scores = Float64[np.ndarray, "seeds pairs"]
Verdict = Literal["better", "worse", "less", "more", "not told apart"]
Better = Literal["up", "down", "neither"]
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and pairs."""

    value: float | None
    """Null where no pair has the score."""
    low: float | None
    """End of the 95 % interval; null for one seed, whose spread nobody knows, and for one pair."""
    high: float | None
    seeds: int
    pairs: int
    by_seed: Sequence[float]
    """The mean of each seed."""
    freedom: float | None = None
    """Degrees of freedom of the interval."""
    bootstrap: tuple[float, float] | None = None
    """The same interval by resampling, which is too narrow for few seeds (docs/ablations.md)."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def within(self, least: float, most: float) -> "Estimate":
        """The same, its interval cut to what the mean can be."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(self.low, least), high=min(self.high, most))


def estimate(scores: Scores, replicates: int = 0) -> Estimate:
    """The mean with its interval.

    Args:
        scores: of each seed's model for each pair. A pair that lacks a score under any seed (NaN) is left out.
        replicates: of the bootstrap, which stands beside the interval; 0 = none.

    Source: Dorfman, Berbaum & Metz (Investigative Radiology 1992); degrees of freedom: Hillis (Statistics in Medicine 2007).
    """
    known = scores[:, ~np.isnan(scores).any(0)]
    seeds, pairs = known.shape
    if not known.size:
        return Estimate(None, None, None, seeds, pairs, ())
    by_seed, by_pair, mean = known.mean(1), known.mean(0), float(known.mean())
    shown = tuple(float(value) for value in by_seed)
    if seeds < 2 or pairs < 2:
        return Estimate(mean, None, None, seeds, pairs, shown)
    rest = known - by_seed[:, None] - by_pair + mean
    of_seeds = pairs * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    of_pairs = seeds * float(((by_pair - mean) ** 2).sum()) / (pairs - 1)
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (pairs - 1))
    both = of_seeds + max(of_pairs - of_rest, 0.0)
    # Seeds that agree to the last digit say nothing of their spread but that it is small beside that of the pairs.
    freedom = both**2 / (of_seeds**2 / (seeds - 1)) if of_seeds > 0 else np.inf
    reach = float(stdtrit(min(freedom, 1e6), (1 + LEVEL) / 2)) * (both / (seeds * pairs)) ** 0.5
    resampled = bootstrap(known, replicates) if replicates else None
    return Estimate(mean, mean - reach, mean + reach, seeds, pairs, shown, min(freedom, 1e6), resampled)


def difference(scores: Scores, before: Scores, better: Better, replicates: int = 0) -> tuple[Estimate, Verdict]:
    """An arm less the arm before, for the same seeds and pairs, and what it says at 95 %.

    Args:
        scores: of the arm.
        before: of the arm before, with the same seeds and pairs in the same order: what they have in common falls out.
        better: which way the score is the better one; `neither` where both ends are bad.
        replicates: as of `estimate`.
    """
    found = estimate(scores - before, replicates)
    if not found.is_clear or found.value is None:
        return found, "not told apart"
    rises = found.value > 0
    if better == "neither":
        return found, "more" if rises else "less"
    return found, "better" if rises == (better == "up") else "worse"


def bootstrap(scores: Scores, replicates: int) -> tuple[float, float]:
    """95 % interval of the mean by drawing seeds and pairs again, each with repetition and apart from the other.

    Three seeds have ten different draws, and their spread is underrated by a third of its square: the interval is too narrow.

    Source: Owen, The pigeonhole bootstrap (Annals of Applied Statistics 2007).
    """
    random = generator(0, "ladder", "bootstrap")
    seeds, pairs = scores.shape
    weights = [random.multinomial(n, np.full(n, 1 / n), replicates) / n for n in (seeds, pairs)]
    means = ((weights[0] @ scores) * weights[1]).sum(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
