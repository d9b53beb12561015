"""From features to scores: of each row, for all pairs, for each class and for each object size.

All arithmetic is in float64. Set scores compare a row's pictures with the real ones; pair scores are means over pairs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int

from pbe_core.judges.judge import Judge
from pbe_train.evaluation.distances import (
    FEWEST_FOR_INTERVAL,
    Kind,
    bootstrap,
    bootstrap_mean,
    cmmd,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
)
from pbe_train.evaluation.features import Features
from pbe_train.evaluation.pair_scores import recognised
from pbe_train.evaluation.pair_sets import PairSet
from pbe_train.evaluation.quality import Mixture, quality_scores
from pbe_train.evaluation.results import PairRow, RowScores, Size, Value, size_of

MEAN_REPLICATES = 1000
FEWEST = 2
"""Pictures that a distance between two sets needs of each."""


@dataclass(frozen=True)
class Question:
    """What all rows are scored by.

    `references` are the features of the row of references, `candidates` those that a painted one is looked for among; `real` the
    features of the real pictures, `paired` whether these are the pairs' own, in their order; `replicates` resamples of a set
    score; `mixtures` are of judges' names.
    """

    pairs: PairSet
    judges: Sequence[Judge]
    references: Features
    candidates: Sequence[tuple[int, ...]] | None
    real: Features
    paired: bool
    seed: int
    replicates: int
    infinity: bool = False
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)


def score_row(
    question: Question,
    name: str,
    features: Features,
    pair_scores: Mapping[str, Float64[np.ndarray, " pairs"]],
    model: str | None = None,
    step: int | None = None,
) -> RowScores:
    """All scores of a row; `pair_scores` are those of `scores_of_pairs`."""
    real = question.paired and features["pixels/area"] is question.real.get("pixels/area")
    return RowScores(
        name=name,
        model=model,
        step=step,
        set_scores=scores_of_sets(question, features, distances=not real),
        pair_scores=means(pair_scores, question.seed),
    )


def scores_of_sets(question: Question, features: Features, distances: bool = True) -> dict[str, Value]:
    """Distances between a row's pictures and the real ones, and the quality score, by the name that tables show.

    Without `distances`, of the real ones themselves, the quality score alone.
    """
    scores: dict[str, Value] = {}
    for judge in question.judges:
        name = judge.identity.name
        made, real = (side[f"whole/{name}"].astype(np.float64) for side in (features, question.real))
        if distances and min(len(made), len(real)) >= FEWEST:
            scores |= _distances(question, judge, made, real)
        if name in question.mixtures:
            scores["QS"] = _mean(100 * quality_scores(question.mixtures[name], made), question.seed)
    return scores


def _distances(
    question: Question, judge: Judge, made: Float64[np.ndarray, "made width"], real: Float64[np.ndarray, "real width"]
) -> dict[str, Value]:
    name, kind = judge.identity.name, judge.identity.kind
    scores: dict[str, Value] = {}

    def add(score: str, distance: Kind, value: float) -> None:
        interval = bootstrap(distance, made, real, question.replicates, question.seed, paired=question.paired)
        scores[score] = Value.of(value, interval, len(made))

    add(f"KID ({name})", "kernel", kernel_distance(made, real, paired=question.paired))
    if kind == "clip":
        add(f"CMMD ({name})", "cmmd", cmmd(made, real))
    add(frechet_name(kind, name), "frechet", frechet_distance(made, real))
    if question.infinity and min(len(made), len(real)) >= FEWEST_FOR_INTERVAL:
        infinite = Value.of(frechet_infinity(made, real, question.seed, paired=question.paired), None, len(made))
        scores[re.sub("^(FID|FD)", "\\1∞", frechet_name(kind, name))] = infinite
    return scores


def frechet_name(kind: str, name: str) -> str:
    """What the field calls the Fréchet distance on a judge's features."""
    names = {"inception-clean": "FID (clean)", "inception-legacy": "FID (legacy)", "dinov2": "FD-DINOv2"}
    return names[kind] if kind in names and name == kind else f"FD ({name})"


def scores_of_pairs(question: Question, features: Features) -> dict[str, Float64[np.ndarray, " pairs"]]:
    """Each pair's scores, by the name that tables show; NaN where one is not defined."""
    scores: dict[str, Float64[np.ndarray, " pairs"]] = {}
    for judge in question.judges:
        name, kind = judge.identity.name, judge.identity.kind
        own = "" if name == kind else f" ({name})"
        if f"published/{name}" in features:
            scores[f"CLIP score{own}"] = 100 * _cosines(features[f"published/{name}"], question.references[f"published/{name}"])
        if f"region/{name}" in features:
            region, reference = features[f"region/{name}"], question.references[f"region/{name}"]
            scores[{"clip": f"CLIP-I{own}", "dinov2": f"DINO-I{own}"}.get(kind, f"{name}-I")] = _cosines(region, reference)
            if question.candidates is not None:
                asked = zip(region, question.candidates, strict=True)
                scores[f"recognised ({name})"] = np.array(
                    [recognised(each, reference[list(numbers)]) if numbers else np.nan for each, numbers in asked], np.float64
                )
    for name in ("copying", "seam", "PSNR outside"):
        scores[name] = features[f"pixels/{name}"].astype(np.float64)
    return scores


def means(
    scores: Mapping[str, Float64[np.ndarray, " pairs"]], seed: int, chosen: Int[np.ndarray, " some"] | None = None
) -> dict[str, Value]:
    """Means over pairs, all or some, with their intervals."""
    return {name: _mean(values if chosen is None else values[chosen], seed, name) for name, values in scores.items()}


def by_group(
    rows: Mapping[str, Mapping[str, Float64[np.ndarray, " pairs"]]], groups: Sequence[str], seed: int
) -> dict[str, list[RowScores]]:
    """For each group of pairs, the means of each row; `groups` names each pair's group, empty for none."""
    named = np.array(groups)
    found = {}
    for group in sorted(set(groups) - {""}):
        chosen = np.flatnonzero(named == group)
        found[group] = [
            RowScores(name=row, set_scores={}, pair_scores=means(scores, seed, chosen)) for row, scores in rows.items()
        ]
    return found


def pair_rows(
    pairs: PairSet, areas: Float64[np.ndarray, " pairs"], rows: Mapping[str, Mapping[str, Float64[np.ndarray, " pairs"]]]
) -> list[PairRow]:
    """The scores of each pair."""
    return [
        PairRow(
            id=pair.id,
            label=pair.label,
            area=float(areas[number]),
            scores={
                row: {name: None if np.isnan(values[number]) else float(values[number]) for name, values in scores.items()}
                for row, scores in rows.items()
            },
        )
        for number, pair in enumerate(pairs.pairs)
    ]


def sizes_of(areas: Float64[np.ndarray, " pairs"]) -> list[Size]:
    """The object size of each pair."""
    return [size_of(float(area)) for area in areas]


def _mean(values: Float64[np.ndarray, " pairs"], seed: int, name: str = "") -> Value:
    """The mean of those that are defined. Of PSNRs it is that of the mean squared error, as some of them may be infinite."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Value(value=None, count=0)
    if name.startswith("recognised"):
        return Value.of(float(values.mean()), wilson(float(values.sum()), len(values)), len(values))
    if not name.startswith("PSNR"):
        return Value.of(float(values.mean()), bootstrap_mean(values, MEAN_REPLICATES, seed), len(values))
    errors = 10 ** (-values / 10)
    low, high = bootstrap_mean(errors, MEAN_REPLICATES, seed)
    return Value.of(_decibel(errors.mean()), (_decibel(high), _decibel(low)), len(values))


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share, right also near 0 and 1, where resamples are all alike.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    z = 1.959964
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _decibel(error: float) -> float:
    return float(-10 * np.log10(error)) if error > 0 else np.inf


def _cosines(a: Float[np.ndarray, "pairs width"], b: Float[np.ndarray, "pairs width"]) -> Float64[np.ndarray, " pairs"]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Float64[np.ndarray, " pairs"] = np.divide((a * b).sum(1), lengths, out=np.full(len(a), np.nan), where=lengths > 0)
    return cosines
