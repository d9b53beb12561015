"""The ladder as a chart: for each score the arms from left to right, each seed a point, the mean with its 95 % interval."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pbe_core.pages.svg import FAINT, FIRST, INK, SECOND, STYLE, THIRD, WIDTH, inline_svg
from pbe_train.evaluation.lines import header, in_units, kind_of
from pbe_train.ladder.comparison import Ladder

LIGHT = {INK: "#23262b", FAINT: "#d9dbdd", FIRST: "#3a6ea5", SECOND: "#d07a2d", THIRD: "#5a9e6f"}
"""Colours of a picture file, which no style sheet turns light or dark: the light page's."""
PAGE = {colour: colour for colour in LIGHT}
HEIGHT = 1.9  # inches of a row of charts
COLUMNS = 2
# Where the paper's text says which way each arm moves: better than the one before, and away from pasting.
PUBLISHED: Mapping[str, str] = {"recognised": "up", "FID": "down", "FD": "down", "KID": "down", "CMMD": "down", "copying": "down"}


def draw_inline(ladder: Ladder) -> Markup:
    """All charts as one <svg> element of the page."""
    return inline_svg(draw(ladder, PAGE), "ladder")


def draw(ladder: Ladder, colours: Mapping[str, str]) -> Figure:
    """All charts, two in a row.

    Args:
        ladder: with one score or more.
        colours: what becomes of the style's placeholders.
    """
    style = {key: colours.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with mpl.rc_context(style):
        rows = -(-len(ladder.scores) // COLUMNS)
        figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes, score in zip(grid, ladder.scores, strict=False):
            _draw_score(axes, ladder, score, colours)
        for axes in grid[len(ladder.scores) :]:
            axes.set_axis_off()
    return figure


def _draw_score(axes: Axes, ladder: Ladder, score: str, colours: Mapping[str, str]) -> None:
    for place, arm in enumerate(ladder.arms):
        cell = ladder.cells[arm.name][score]
        seeds = [in_units(score, value) for value in cell.by_seed]
        shifts = np.linspace(-0.12, 0.12, len(seeds)) if len(seeds) > 1 else [0.0] * len(seeds)
        axes.plot([place + 0.22 + shift for shift in shifts], seeds, "o", color=colours[SECOND], markersize=3, alpha=0.8)
        if cell.value is None:
            continue
        middle = in_units(score, cell.value)
        axes.plot([place - 0.12], [middle], "s", color=colours[FIRST], markersize=4.5)
        if cell.low is not None and cell.high is not None:
            ends = in_units(score, cell.low), in_units(score, cell.high)
            axes.plot([place - 0.12] * 2, ends, color=colours[FIRST], linewidth=1.8, solid_capstyle="butt")
    axes.set_title(header(score).replace("\N{NO-BREAK SPACE}", " "), loc="left", pad=6)
    axes.set_xlim(-0.6, len(ladder.arms) - 0.4)
    # In two rows: side by side they would run into one another.
    titles = ["\n" * (place % 2) + arm.title for place, arm in enumerate(ladder.arms)]
    axes.set_xticks(range(len(ladder.arms)), titles, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y")
    direction = PUBLISHED.get(kind_of(score))
    if direction:
        _draw_published(axes, direction, colours[THIRD])


def _draw_published(axes: Axes, direction: str, colour: str) -> None:
    """An arrow beside the chart: which way the paper's text says that it goes from arm to arm."""
    start, end = (0.12, 0.8) if direction == "up" else (0.8, 0.12)
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.4, "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (1.03, end), (1.03, start), "axes fraction", "axes fraction", arrowprops=arrow)
    axes.annotate("paper", (1.03, 0.86), xycoords="axes fraction", ha="center", fontsize=8, color=colour)
