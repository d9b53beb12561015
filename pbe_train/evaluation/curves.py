"""Scores over training steps, as inline SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pbe_core.pages.svg import INK, SERIES, STYLE, inline_svg
from pbe_train.evaluation.lines import Line, header, in_units, lower_is_better, show_score
from pbe_train.evaluation.results import Value

_SIZE = (4.6, 2.5)  # inches: half of the page's width at its text size
_LINE = 0.08  # of the axis's height: a line of text


@dataclass(frozen=True)
class Curve:
    """One score over steps, of one model or several."""

    score: str
    drawing: Markup
    told: str
    """The same in words."""


def step_curves(lines: Sequence[Line], scores: Sequence[str]) -> list[Curve]:
    """A curve for each score of which some model has values at two steps or more; lines without a step draw none."""
    runs: dict[str, list[Line]] = {}
    for line in lines:
        if line.row.step is not None and not line.row.is_bound:
            runs.setdefault(line.row.model or "model", []).append(line)
    curves = []
    for score in scores:
        series = {run: found for run, own in runs.items() if len(found := _points(own, score)) > 1}
        if series:
            bounds = {line.title: line.row.scores[score] for line in lines if line.row.is_bound and score in line.row.scores}
            told = "; ".join(_tell(run, score, points) for run, points in series.items())
            curves.append(Curve(score, draw_curve(score, series, bounds), told))
    return curves


@mpl.rc_context(STYLE)
def draw_curve(score: str, series: Mapping[str, Mapping[int, Value]], bounds: Mapping[str, Value]) -> Markup:
    """Values over steps with bands of their 95 % intervals; what bounds them as dashed lines, where it is near enough."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    for number, (run, points) in enumerate(series.items()):
        colour, style = SERIES[number % len(SERIES)], ("-", "--", ":")[number // len(SERIES) % 3]
        steps = list(points)
        middle, low, high = (
            [np.nan if end is None else in_units(score, end) for end in ends]
            for ends in zip(*((value.value, value.low, value.high) for value in points.values()), strict=True)
        )
        axes.plot(steps, middle, style, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=run)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    _draw_bounds(axes, {name: in_units(score, bound.value) for name, bound in bounds.items() if bound.value is not None})
    axes.set_title(header(score), loc="left", pad=22 if len(series) > 1 else 6)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), borderaxespad=0.2)
    return inline_svg(figure, f"steps {score}")


def _draw_bounds(axes: Axes, bounds: Mapping[str, float]) -> None:
    low, high = axes.get_ylim()
    reach = high - low  # Farther ones would press the curve flat.
    near = {name: bound for name, bound in sorted(bounds.items(), key=lambda one: one[1]) if low - reach <= bound <= high + reach}
    for bound in near.values():
        axes.axhline(bound, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    low, high = axes.get_ylim()
    line = _LINE * (high - low)
    axes.set_ylim(low, high + line if near else high)  # Room for a name above the last one.
    ends = [-np.inf, *near.values(), np.inf]
    right = True
    for (name, bound), before, after in zip(near.items(), ends, ends[2:], strict=False):
        right = not right or bound - before > line  # Of two that are close, the lower has its name below, at the other end.
        shift, below = (-2 if right else 2), after - bound <= line
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
        sides: Any = {"ha": "right" if right else "left", "va": "top" if below else "bottom"}
        axes.annotate(name, (float(right), bound), (shift, -2 if below else 1), **place, **sides)


def _points(lines: Sequence[Line], score: str) -> dict[int, Value]:
    """Step -> value, in the order of steps."""
    found = {line.row.step or 0: line.row.scores.get(score) for line in lines}
    return {step: value for step, value in sorted(found.items()) if value is not None and value.value is not None}


def _tell(run: str, score: str, points: Mapping[int, Value]) -> str:
    steps = list(points)
    best = (min if lower_is_better(score) else max)(steps, key=lambda step: points[step].value or 0)
    first, last, top = (show_score(score, points[step].value) for step in (steps[0], steps[-1], best))
    return f"{run}: {first} at step {steps[0]:,}, {last} at step {steps[-1]:,}, best {top} at step {best:,}"
