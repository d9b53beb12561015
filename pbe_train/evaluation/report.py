"""Results as one HTML page that holds all it shows: scores, curves over steps, sizes, classes, the best and the worst pairs.

    [Shown(evaluation, folders of pictures), ...] ──lines──▶ tables, curves ──┐
    pair set ──extremes of one score──▶ small pictures ───────────────────────┴─▶ page of at most 6 MB

Ids, labels and names come from foreign files: the template escapes all text, and the page's Content-Security-Policy lets it load
nothing and run one script, which sorts tables, by its hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

import pbe_core.pages
from pbe_core.errors import InputError
from pbe_core.files import write_atomically
from pbe_core.pages.page import render_template, script_source
from pbe_core.words import number_of
from pbe_train.evaluation import lines as shown_lines
from pbe_train.evaluation.curves import step_curves
from pbe_train.evaluation.lines import (
    Line,
    dependent_scores,
    few_pairs_warning,
    lines_of,
    match_rows,
    meaning,
    pair_score,
    score_names,
)
from pbe_train.evaluation.pair_sets import PairSet
from pbe_train.evaluation.results import SIZES, Evaluation, RowScores, check_comparable
from pbe_train.evaluation.thumbnails import Card, ShownPair, encode_within, extremes, read_thumbnails

LARGEST_PAGE = 6_000_000
"""Bytes: what a mail takes."""
SHOWN_CLASSES = 200
_SHOWN_MODELS = 6
"""Models that are shown by class and size, and with a picture of each pair: the last ones, of one training the newest."""
_EXTREMES = 20
_CHOSEN = ("CLIP score", "DINO-I", "CLIP-I")


@dataclass(frozen=True)
class Shown:
    """A result, and where the pictures of its rows lie, by the rows' names; rows without a folder are shown without pictures."""

    evaluation: Evaluation
    folders: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Class:
    """A class, or a size: its name, its pairs, and its rows with the lines that they belong to."""

    name: str
    pairs: int
    rows: list[tuple[Line, RowScores]]

    def row(self, line: Line) -> RowScores | None:
        """The row of one line; null where the class has none."""
        return next((row for own, row in self.rows if own.title == line.title), None)


def write_report(results: Sequence[Shown], out: Path, pairs: PairSet | None = None, by: str | None = None) -> None:
    """Write the page to `out`, wholly or not at all.

    Args:
        results: one or several, of the same pairs and recipe.
        out: the HTML file; folders above it are made.
        pairs: the pairs of the results, for pictures; null writes a page without pictures.
        by: the pair score by which pairs are the best and the worst, of the first result's last model; by default the CLIP score,
            or the first that there is.

    Raises:
        InputError: recipes differ, `by` is not among the scores, or a photo, mask or reference cannot be read.
    """
    evaluations = [result.evaluation for result in results]
    check_comparable(evaluations)
    lines = lines_of(evaluations)
    chosen = choose_score(lines, by)
    best, worst = _read_extremes(results, lines, chosen, pairs) if pairs and chosen else ([], [])
    room = LARGEST_PAGE // 2
    while True:
        cards = encode_within([*best, *worst], room)
        page = render_page(evaluations, lines, chosen, cards[: len(best)], cards[len(best) :]).encode()
        beyond = len(page) - LARGEST_PAGE
        if beyond <= 0 or room <= 0:
            break
        room = sum(card.length for card in cards) - beyond
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def choose_score(lines: Sequence[Line], by: str | None) -> str | None:
    """The pair score that pairs and classes are shown by: the one asked for, or the best known; null where there is none.

    Raises:
        InputError: the one asked for is not there.
    """
    scores = score_names((line.row for line in lines), 0)[1]
    if by is not None and by not in scores:
        raise InputError(f"no pair score is called {by!r}; there are: {', '.join(scores) or 'none'}")
    return by or next((score for score in (*_CHOSEN, *scores) if score in scores), None)


def render_page(
    evaluations: Sequence[Evaluation],
    lines: Sequence[Line],
    chosen: str | None,
    best: Sequence[Card],
    worst: Sequence[Card],
) -> str:
    """The page as HTML text: the same for the same results.

    Args:
        evaluations: results of one recipe.
        lines: of `lines_of` them.
        chosen: the pair score that pairs and classes are shown by.
        best: pairs with their small pictures, the best first.
        worst: the worst first.
    """
    first = evaluations[0]
    count = min(evaluation.count for evaluation in evaluations)
    sets, means = score_names((line.row for line in lines), count)
    scores = [*sets, *means]
    models, bounds = ([line for line in lines if line.row.is_bound == bound] for bound in (False, True))
    classes = collect_classes(evaluations, lines)
    sizes = _parts({size: [one.per_size.get(size, []) for one in evaluations] for size in SIZES}, lines)
    script = Path(pbe_core.pages.__file__).with_name("sort.js").read_text()
    return render_template(
        Path(__file__).with_name("report.html.jinja"),
        {name: getattr(shown_lines, name) for name in ("header", "show_pair_score", "show_value", "show_interval")}
        | {"number_of": number_of},
        first=first,
        count=count,
        warning=few_pairs_warning(count),
        lines=lines,
        models=models,
        bounds=bounds,
        sets=sets,
        means=means,
        scores=scores,
        dependent=set[str]().union(*(dependent_scores(scores, evaluation) for evaluation in evaluations)),
        meanings=_meanings([*scores, *(line.row.name for line in bounds)]),
        curves=step_curves(lines, scores),
        sizes=sizes,
        size_scores=_defined(sizes, count),
        size_limits=SIZES,
        classes=classes[:SHOWN_CLASSES],
        rest_classes=len(classes) - SHOWN_CLASSES,
        class_scores=_defined(classes, count),
        part_models=models[-_SHOWN_MODELS:],
        part_lines=[*models[-_SHOWN_MODELS:], *bounds],
        chosen=chosen,
        selected=select_line(lines),
        extremes={"Best": best, "Worst": worst},
        pair_score=pair_score,
        judges=list({judge.name: judge for one in evaluations for judge in one.judges}.values()),
        independent={name: value for one in evaluations for name, value in one.independent.items()},
        notes=list(dict.fromkeys(note for one in evaluations for note in one.notes)),
        script=Markup(script),
        script_source=Markup(script_source(script)),
    )


def collect_classes(evaluations: Sequence[Evaluation], lines: Sequence[Line]) -> list[Class]:
    """Classes of all results, those with most pairs first."""
    labels = dict.fromkeys(label for one in evaluations for label in one.per_class)
    classes = _parts({label: [one.per_class.get(label, []) for one in evaluations] for label in labels}, lines)
    return sorted(classes, key=lambda one: (-one.pairs, one.name))


def select_line(lines: Sequence[Line]) -> Line | None:
    """The line whose pairs are shown: the first result's last model, which of one training is the newest."""
    models = [line for line in lines if not line.row.is_bound]
    return next((line for line in reversed(models) if line.result == models[0].result), lines[0] if lines else None)


def _parts(rows: Mapping[str, Sequence[Sequence[RowScores]]], lines: Sequence[Line]) -> list[Class]:
    """Parts of the results, by name: each result's rows with their lines. Parts without rows are left out."""
    parts, titles = [], [line.title for line in lines]
    for name, by_result in rows.items():
        own = [pair for result, found in enumerate(by_result) for pair in match_rows(lines, result, found)]
        own.sort(key=lambda pair: titles.index(pair[0].title))
        counts = [value.count for _, row in own for value in row.scores.values()]
        if own:
            parts.append(Class(name, max(counts, default=0), own))
    return parts


def _defined(parts: Sequence[Class], count: int) -> list[str]:
    """Scores that any part has a value of, in their order."""
    sets, means = score_names((row for part in parts for _, row in part.rows), count)
    return [*sets, *means]


def _meanings(names: Sequence[str]) -> dict[str, str]:
    """Names of scores and of rows that bound, those of one meaning together -> the meaning."""
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(meaning(name), []).append(name)
    return {", ".join(own): text for text, own in alike.items() if text}


def _read_extremes(
    results: Sequence[Shown], lines: Sequence[Line], chosen: str, pairs: PairSet
) -> tuple[list[ShownPair], list[ShownPair]]:
    """The best and the worst pairs of the selected line with their pictures, those of the last lines that have a folder."""
    selected = select_line(lines)
    if selected is None:
        return [], []
    best, worst = extremes(results[selected.result].evaluation.pairs, selected.row.name, chosen, _EXTREMES)
    found = {line.title: results[line.result].folders.get(line.row.name) for line in lines}
    folders = {title: folder for title, folder in found.items() if folder}
    kept = dict(list(folders.items())[-_SHOWN_MODELS:])
    if selected.title in folders:
        kept = {selected.title: folders[selected.title]} | kept
    return read_thumbnails(best, pairs, kept), read_thumbnails(worst, pairs, kept)
