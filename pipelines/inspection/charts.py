"""Charts of a dataset, as inline SVG."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from pbe_core.pages.svg import FAINT, FIRST, INK, SECOND, SERIES, STYLE, WIDTH, inline_svg

_LONGEST_NAME = 30


@mpl.rc_context(STYLE)
def bar_chart(name: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> Markup:
    """Horizontal bars, the first label on top: one bar a label, its parts (one a series) side by side, the sum at its end."""
    figure, axes = _axes(0.24 * len(labels) + 0.8)
    ends = _bars(axes, labels, series, SERIES, 0.72)
    for place, end in enumerate(ends.tolist()):
        axes.annotate(f"{int(end):,}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, max(1, ends.max(initial=0)) * 1.12)  # Room for the longest bar's number.
    axes.grid(axis="x")
    _whole_numbers(axes.xaxis)
    _legend(axes, series)
    return inline_svg(figure, name)


@mpl.rc_context(STYLE)
def share_chart(name: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> Markup:
    """Horizontal bars of equal length, each divided into up to three parts; the second recedes."""
    figure, axes = _axes(0.3 * len(labels) + 0.75)
    totals = np.maximum(1, np.sum(list(series.values()), axis=0))
    shares = {part: np.array(counts) / totals for part, counts in series.items()}
    _bars(axes, labels, shares, (FIRST, FAINT, SECOND), 0.66)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    _legend(axes, series)
    return inline_svg(figure, name)


@mpl.rc_context(STYLE)
def share_histogram(
    name: str,
    edges: Sequence[float],
    series: Mapping[str, Sequence[int]],
    of: str,
    counted: str,
    rules: Mapping[str, float | None],
) -> Markup:
    """Histograms over shares (of a photo, of a view) on a logarithmic axis; settings that bound them as dashed lines."""
    figure, axes = _axes(2.9)
    low, high = _steps(axes, edges, series, rules)
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [step * 10.0**decade for decade in range(-6, 1) for step in steps]
    _logarithmic(axes, 10, low, high, ticks, lambda share: f"{100 * share:.6g} %")
    _label(axes, f"share of the {of}, logarithmic", counted, series, rules)
    return inline_svg(figure, name)


@mpl.rc_context(STYLE)
def aspect_histogram(
    name: str, edges: Sequence[float], series: Mapping[str, Sequence[int]], rules: Mapping[str, float | None]
) -> Markup:
    """Histograms over width / height on a logarithmic axis with 1:1 in its middle."""
    figure, axes = _axes(2.9)
    low, high = _steps(axes, edges, series, rules)
    reach, ticks = max(high, 1 / low), [2.0**power for power in range(-5, 6)]
    _logarithmic(axes, 2, 1 / reach, reach, ticks, lambda ratio: f"{ratio:.0f}:1" if ratio >= 1 else f"1:{1 / ratio:.0f}")
    _label(axes, "width : height, logarithmic", "objects", series, rules)
    return inline_svg(figure, name)


@mpl.rc_context(STYLE)
def count_chart(name: str, counts: Sequence[int], above: int, xlabel: str, ylabel: str) -> Markup:
    """Bars over 1, 2, 3 ...; what lies above the last number is one bar more."""
    figure, axes = _axes(2.6)
    used = len(counts) if above else max((place + 1 for place, count in enumerate(counts) if count), default=1)
    labels = [str(number + 1) for number in range(used)]
    heights = list(counts[:used])
    if above:
        labels.append(f"> {used}")
        heights.append(above)
    axes.bar(range(len(heights)), heights, width=0.8, color=FIRST)
    spacing = 1 if len(labels) <= 16 else 2
    shown = [*range(0, used, spacing), *([used] if above else [])]
    axes.set_xticks(shown, [labels[place] for place in shown])
    axes.set_xlim(-0.6, max(len(heights), 8) - 0.4)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    _whole_numbers(axes.yaxis)
    return inline_svg(figure, name)


@mpl.rc_context(STYLE)
def maps(name: str, grids: Mapping[str, Sequence[Sequence[int]]]) -> Markup:
    """Heat maps side by side, each over the photo stretched to a square and with its own scale."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="compressed")
    for axes, (title, grid) in zip(np.atleast_1d(figure.subplots(1, len(grids))), grids.items(), strict=True):
        # Not "none": browsers blur a picture of 32 px when they enlarge it.
        picture = axes.imshow(
            np.array(grid), extent=(0, 1, 1, 0), vmin=0, vmax=max(1, np.max(grid)), cmap="viridis", interpolation="nearest"
        )
        axes.set_title(title)
        axes.set_xticks([0, 1], ["left", "right"])
        axes.set_yticks([0, 1], ["top", "bottom"])
        for x_label, y_label in zip(axes.get_xticklabels(), axes.get_yticklabels(), strict=True):
            x_label.set_ha(x_label.get_text())
            y_label.set_va(y_label.get_text())
        axes.tick_params(length=0)
        bar = figure.colorbar(picture, ax=axes, aspect=24, pad=0.03)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    return inline_svg(figure, name)


def short_name(text: str) -> str:
    """A name that fits beside a bar, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _bars(
    axes: Axes, labels: Sequence[str], series: Mapping[str, Any], colours: Sequence[str], height: float
) -> Float[np.ndarray, " labels"]:
    """Draw horizontal bars, the parts of each side by side; returns where each ends."""
    places, ends = np.arange(len(labels)), np.zeros(len(labels))
    for (part, lengths), colour in zip(series.items(), colours, strict=False):
        axes.barh(places, lengths, left=ends, height=height, color=colour, label=part)
        ends = ends + np.array(lengths)
    axes.set_yticks(places, [short_name(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return ends


def _steps(
    axes: Axes, edges: Sequence[float], series: Mapping[str, Sequence[int]], rules: Mapping[str, float | None]
) -> tuple[float, float]:
    """Draw the outlines of histograms, the first filled. Returns the range that holds anything, a bin more to each side."""
    for number, ((part, counts), colour) in enumerate(zip(series.items(), SERIES, strict=False)):
        axes.stairs(counts, edges, color=colour, fill=not number, alpha=None if number else 0.85, linewidth=1.6, label=part)
    used = np.flatnonzero(np.sum(list(series.values()), axis=0))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, len(edges) - 2)
    limits = [rule for rule in rules.values() if rule]
    low = min([edges[max(0, first - 1)], *(0.9 * limit for limit in limits)])
    high = max([edges[min(len(edges) - 1, last + 2)], *(1.1 * limit for limit in limits)])
    # At least a factor of nine, so that the axis has numbers; but a share has no room above one.
    middle, reach = float(np.sqrt(low * high)), max(3.0, float(np.sqrt(high / low)))
    return middle / reach, max(high, min(edges[-1], middle * reach))


def _logarithmic(axes: Axes, base: int, low: float, high: float, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=base)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, below: str, counted: str, series: Mapping[str, Sequence[int]], rules: Mapping[str, float | None]) -> None:
    """What a histogram's axes are, its legend, and its rules as dashed lines."""
    axes.set_xlabel(below)
    axes.set_ylabel(counted)
    axes.grid(axis="y")
    _whole_numbers(axes.yaxis)
    axes.margins(y=0.16)  # Room for the names of the rules.
    axes.set_ylim(bottom=0)
    middle = np.sqrt(np.prod(axes.get_xlim()))
    for rule, value in rules.items():
        if value:
            axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            side, shift = ("left", 4) if value < middle else ("right", -4)
            place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side, "va": "top"}
            axes.annotate(rule, (value, 1), (shift, -2), fontsize=8, **place)
    _legend(axes, series)


def _legend(axes: Axes, series: Mapping[str, object]) -> None:
    """Above the drawing: nothing is hidden by it, whatever is drawn."""
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), borderaxespad=0.2)


def _whole_numbers(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
