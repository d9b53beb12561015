"""Results as lines of a table, for the terminal and for the page: their titles, the order of the scores, numbers in their units.

Models come first, in the order given; the rows that bound them follow, once where several results agree on them.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pbe_core.judges.judge import JudgeIdentity
from pbe_core.words import number_of
from pbe_train.evaluation.results import FEW_PAIRS, Evaluation, PairRow, RowScores, Value

_KINDS_OF_SCORES = ("FID", "FD", "KID", "CMMD", "QS")
"""Of sets, in this order; where pictures are few, what is less biased comes first."""
_KINDS_WHERE_FEW = ("KID", "CMMD", "QS", "FID", "FD")
_PAIR_SCORES = ("CLIP score", "-I", "recognised", "copying", "PSNR outside", "seam")
_LOWER_IS_BETTER = ("FID", "FD", "KID", "CMMD", "seam", "copying")
_JUDGE_KINDS = {
    "QS": ("clip",),
    "CLIP": ("clip",),
    "CMMD": ("clip",),
    "DINO": ("dinov2",),
    "FD-DINOv2": ("dinov2",),
}
_FORMATS = {
    "FID": (1, 2),
    "FD": (1, 2),
    "KID": (1000, 2),
    "QS": (1, 2),
    "CLIP score": (1, 2),
    "recognised": (100, 1),
    "PSNR outside": (1, 1),
    "seam": (1, 2),
}
"""Factor from value to what is shown, and decimals; elsewhere 1 and 3."""
_MEANINGS = {
    "FID": "Fréchet distance between Inception's features of pictures and of the real set; clean and legacy differ in resizing.",
    "FD": "Fréchet distance on another network's features; not comparable with FID.",
    "KID": "unbiased kernel distance (cubic polynomial) on the features in brackets, shown × 1000; around 0 for equal sets.",
    "CMMD": "kernel distance (Gaussian, sigma 10) on normalised CLIP features, × 1000 as published.",
    "QS": "mean likelihood of each picture's CLIP features under a mixture fitted on real photos, 0–100.",
    "CLIP score": "cosine of CLIP features, painted region against reference, × 100, as the published script computes it.",
    "-I": "cosine of the judge's features, painted region against reference.",
    "recognised": "share of pairs whose region is nearest to its own reference among all candidates.",
    "copying": "1 = the region has the reference's pixels, 0 = it is as far from them as another photo of the class.",
    "PSNR outside": "outside the mask, painted against photo; ∞ = equal.",
    "seam": "step across the mask's border beyond the photo's own, in grey levels of 255; 0 = no seam visible.",
    "copy-paste": "the reference, resized to the mask's bounding box and pasted: what a model must not collapse to.",
    "nothing painted": "the photo as it is.",
    "real view": "the true picture, as a perfect painter would make it: the ceiling.",
    "VAE reconstruction": "the true picture put through the VAE around the mask: the ceiling of any painter in its latents.",
}


@dataclass(frozen=True)
class Line:
    """A row of one result under the title that it is shown by."""

    title: str
    row: RowScores
    result: int
    """Place of its result among those shown."""

    @property
    def pairs(self) -> int:
        """Pairs that its scores are of; the most, where they differ."""
        return max((value.count for value in self.row.scores.values()), default=0)


def lines_of(results: Sequence[Evaluation]) -> list[Line]:
    """All rows of the results, models first; a row that bounds stands once where its scores are the same in several results."""
    models: list[Line] = []
    bounds: list[Line] = []
    for place, result in enumerate(results):
        for row in result.rows:
            if not row.is_bound:
                models.append(Line(_model_title(row), row, place))
            elif row.scores not in [line.row.scores for line in bounds if line.row.name == row.name]:
                bounds.append(Line(row.name, row, place))
    models = _distinct(models)
    return [*models, *_distinct(bounds, models)]


def match_rows(lines: Iterable[Line], result: int, rows: Sequence[RowScores]) -> list[tuple[Line, RowScores]]:
    """Rows of a part of a result (a class, a size) with the lines that they belong to; those of no line are left out."""
    by_name = {line.row.name: line for line in lines if line.result == result}
    return [(by_name[row.name], row) for row in rows if row.name in by_name]


def score_names(rows: Iterable[RowScores], count: int) -> tuple[list[str], list[str]]:
    """Scores of sets and of pairs that any of the rows has a value of, in the order in which they are shown.

    Args:
        rows: any rows.
        count: pictures; below `FEW_PAIRS`, KID and CMMD come before Fréchet distances.
    """
    rows = list(rows)
    kinds = _KINDS_WHERE_FEW if count < FEW_PAIRS else _KINDS_OF_SCORES
    sets = dict.fromkeys(name for row in rows for name, value in row.set_scores.items() if _is_there(value))
    pairs = dict.fromkeys(name for row in rows for name, value in row.pair_scores.items() if _is_there(value))
    return sorted(sets, key=lambda name: _rank(name, kinds)), sorted(pairs, key=lambda name: _rank(name, _PAIR_SCORES))


def few_pairs_warning(count: int) -> str | None:
    """What a reader of a small set's scores must know; null for a set that is large enough."""
    if count >= FEW_PAIRS:
        return None
    return (
        f"{number_of(count, 'picture')}, fewer than {FEW_PAIRS:,}: the bias of FID and of every Fréchet distance is larger than "
        "most effects, so KID and CMMD stand first. Fréchet distances compare rows of this table, not with other sets or papers."
    )


def lower_is_better(score: str) -> bool:
    """Whether a smaller value of the score is the better one."""
    return kind_of(score) in _LOWER_IS_BETTER


def header(score: str) -> str:
    """The score's name with its unit and an arrow towards the better: `KID (clip) × 1000 ↓`."""
    unit = {"KID": " ×\N{NO-BREAK SPACE}1000", "PSNR outside": ", dB", "recognised": ", %"}.get(kind_of(score), "")
    return f"{score}{unit}\N{NO-BREAK SPACE}{'↓' if lower_is_better(score) else '↑'}"


def meaning(score: str) -> str:
    """What a score, or a row that bounds, is; empty for one that this version does not know."""
    return _MEANINGS.get(kind_of(score), "")


def show_score(score: str, value: float | None) -> str:
    """A value as it is shown under `header`: ∞, – for what is not defined."""
    if value is None:
        return "–"
    if value == math.inf:
        return "∞"
    text = f"{in_units(score, value):,.{_FORMATS.get(kind_of(score), (1, 3))[1]}f}"
    return text.replace("-", "" if not text.strip("-0.") else "\N{MINUS SIGN}")


def show_pair_score(score: str, value: float | None) -> str:
    """A value of one pair: as a mean is shown, but that one pair is recognised or is not."""
    if kind_of(score) == "recognised" and value in (0, 1):
        return "yes" if value else "no"
    return show_score(score, value)


def in_units(score: str, value: float) -> float:
    """A value in the unit that `header` gives."""
    return _FORMATS.get(kind_of(score), (1, 3))[0] * value


def show_value(score: str, value: Value | None) -> str:
    """The value alone, without its interval."""
    return "∞" if value and value.infinite else show_score(score, value.value if value else None)


def show_interval(score: str, value: Value | None) -> str:
    """`[11.20, 12.80]`, the 95 % interval; empty where none is known."""
    if value is None or value.low is None or value.high is None or value.infinite:
        return ""
    return f"[{show_score(score, value.low)}, {show_score(score, value.high)}]"


def judges_of(score: str, judges: Sequence[JudgeIdentity]) -> list[str]:
    """Names of the judges that a score comes from; none for scores of pixels."""
    named = re.search(r"\((.*)\)$", score)
    brackets = ({named[1], f"inception-{named[1]}"} if kind_of(score) == "FID" else {named[1]}) if named else set()
    own = [judge.name for judge in judges if judge.name in brackets or score.lower() == f"{judge.name}-I".lower()]
    kinds = next((kinds for start, kinds in _JUDGE_KINDS.items() if score.startswith(start)), ())
    return own or [judge.name for judge in judges if judge.kind in kinds]


def dependent_scores(scores: Iterable[str], result: Evaluation) -> set[str]:
    """Scores whose judge has the conditioner's weights: they tell how the model likes its own eyes."""
    own = {name for name, independent in result.independent.items() if not independent}
    return {score for score in scores if own.intersection(judges_of(score, result.judges))}


def pair_score(pair: PairRow, row: str, score: str) -> float | None:
    """A score of one pair's picture in a row; null where there is none."""
    return pair.scores.get(row, {}).get(score)


def kind_of(score: str) -> str:
    """What kind a score is of: `KID` for `KID (clip)`, `-I` for `DINO-I` and `DINO-I (small)`."""
    if re.search(r"-I( \(.*\))?$", score):
        return "-I"
    return re.split(r"-DINOv2|∞|-infinity| \(", score)[0]


def _rank(score: str, kinds: Sequence[str]) -> int:
    kind = kind_of(score)
    return kinds.index(kind) if kind in kinds else len(kinds)


def _is_there(value: Value) -> bool:
    return value.infinite or value.value is not None


def _model_title(row: RowScores) -> str:
    """The row's name, which its user may have chosen, and its step where the name does not tell it."""
    told = row.step is None or f"step {row.step:,}" in row.name
    return row.name if told else f"{row.name}, step {row.step:,}"


def _distinct(lines: Sequence[Line], models: Sequence[Line] = ()) -> list[Line]:
    """Lines with titles that differ: of those called alike, each is told by its row's name, its result's model or its number."""
    shown: list[Line] = []
    of_result = {line.result: line.title for line in reversed(models)}
    for line in lines:
        alike = [other for other in lines if other.title == line.title]
        marks = (
            lambda one: one.row.name,
            lambda one: of_result.get(one.result, ""),
            lambda one: f"result {one.result + 1}",
            lambda one: f"result {one.result + 1}, {one.row.name}",
        )
        mark = next(mark for mark in marks if len({mark(other) for other in alike}) == len(alike) or mark is marks[-1])
        shown.append(line if len(alike) == 1 else Line(f"{line.title} ({mark(line)})", line.row, line.result))
    return shown
