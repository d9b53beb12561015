"""Scores as tables for the terminal: what bounds the models stands apart, a small set's warning stands first."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from pbe_train.evaluation.lines import (
    Line,
    dependent_scores,
    few_pairs_warning,
    header,
    lines_of,
    score_names,
    show_interval,
    show_value,
)
from pbe_train.evaluation.results import Evaluation, check_comparable

_NAME_WIDTH, _NARROW_NAME_WIDTH = 24, 17
_SCORE_WIDTH = 17  # `[184.20, 193.18]` with its frame; wider ones are folded where the terminal is too narrow for them.
_DISTRIBUTIONS = "Distributions: the set of pictures against the real set"
_MEANS = "Pairs: means over all pairs"


def score_tables(results: Sequence[Evaluation]) -> "ScoreTables":
    """Tables of the scores of sets and of the means over pairs, of all rows of the results; to be printed with rich.

    Raises:
        InputError: the results' recipes differ; names in what.
    """
    check_comparable(results)
    return ScoreTables(results)


@dataclass(frozen=True)
class ScoreTables:
    """What `score_tables` gives: as many scores stand in one table as the terminal is wide."""

    results: Sequence[Evaluation]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = min(result.count for result in self.results)
        lines = lines_of(self.results)
        sets, means = score_names((line.row for line in lines), count)
        dependent = set[str]().union(*(dependent_scores([*sets, *means], result) for result in self.results))
        if warning := few_pairs_warning(count):
            yield Text(f"{warning}\n", style="yellow")
        name_width = _NAME_WIDTH if options.max_width > 100 else _NARROW_NAME_WIDTH
        for title, scores in ((_DISTRIBUTIONS, sets), (_MEANS, means)):
            each = max(1, (options.max_width - name_width - 11) // _SCORE_WIDTH)
            for start in range(0, len(scores), each):
                yield _table("" if start else title, scores[start : start + each], lines, dependent, name_width)
        yield Text("↓ lower is better, ↑ higher is better; brackets hold 95 % intervals.", style="dim")
        if dependent:
            yield Text("* The judge has the conditioner's weights: the score is not independent of the model.", style="dim")
        for note in dict.fromkeys(note for result in self.results for note in result.notes):
            yield Text(note, style="dim")


def _table(title: str, scores: Sequence[str], lines: Sequence[Line], dependent: set[str], name_width: int) -> Table:
    columns = [Column(escape(header(score) + " *" * (score in dependent)), justify="right", overflow="fold") for score in scores]
    name = Column("pictures", overflow="fold", min_width=10, max_width=name_width)
    table = Table(name, Column("pairs", justify="right", no_wrap=True), *columns, title=title or None, title_justify="left")
    for place, line in enumerate(lines):
        last_model = not line.row.is_bound and place + 1 < len(lines) and lines[place + 1].row.is_bound
        cells = [_cell(line, score) for score in scores]
        style = "dim" if line.row.is_bound else ""
        table.add_row(escape(line.title), f"{line.pairs:,}", *cells, style=style, end_section=last_model)
    return table


def _cell(line: Line, score: str) -> str:
    value = line.row.scores.get(score)
    other = f"n = {value.count:,}" if value and value.count != line.pairs else ""
    return escape("\n".join(part for part in (show_value(score, value), show_interval(score, value), other) if part))
