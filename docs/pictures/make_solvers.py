"""Draw docs/pictures/solvers.png: how near each scheduler comes to the converged solution, by how many predictions it takes.

Usage:  python -m docs.pictures.make_solvers [--results benchmarks/results/solvers.json] [--out docs/pictures/solvers.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from benchmarks.machine import RESULTS
from benchmarks.solvers import BEFORE, CHOSEN, PUBLISHED
from pbe_core.errors import run_program
from pbe_core.pages.svg import FAINT, FIRST, INK, SECOND, STYLE, THIRD
from pbe_train.model.sampling import STEPS

COLOURS = {INK: "#23262b", FAINT: "#d9dbdd", FIRST: "#3a6ea5", SECOND: "#d07a2d", THIRD: "#5a9e6f"}
NAMED = {CHOSEN: COLOURS[FIRST], BEFORE: COLOURS[THIRD], PUBLISHED: COLOURS[SECOND]}
SIZE_INCHES, DPI = (7.6, 3.4), 130


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A chart for each guidance: lines of the named ways above those of all others."""
    scales = sorted({row["guidance"] for row in rows})
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    for axes, guidance in zip(figure.subplots(1, len(scales), sharey=True, squeeze=False)[0], scales, strict=True):
        draw_guidance(axes, [row for row in rows if row["guidance"] == guidance])
        axes.set_title(f"guidance {guidance:g}", loc="left")
    figure.axes[0].set_ylabel("error of the latents, RMS, %")
    figure.axes[0].legend(fontsize=8, loc="lower left")
    return figure


def draw_guidance(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Error over passes, both logarithmic, and the published default as a level."""
    for way in sorted({row["way"] for row in rows}, key=lambda way: way in NAMED):
        points = sorted((row["passes"], 100 * row["latents"]["mean"]) for row in rows if row["way"] == way)
        look = (
            {"color": NAMED[way], "label": way, "marker": "o", "markersize": 3.5} if way in NAMED else {"color": COLOURS[FAINT]}
        )
        axes.plot(*zip(*points, strict=True), **look)
        if way == PUBLISHED:
            axes.axhline(points[-1][1], color=NAMED[way], linestyle=":", linewidth=1)
        if way == CHOSEN:
            axes.plot(
                *next(point for point in points if point[0] == STEPS), "o", color=NAMED[way], markersize=9, fillstyle="none"
            )
    axes.set(xscale="log", yscale="log", xlabel="predictions, of two passes each")
    ticks = [8, 10, 15, 20, 30, 50]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "solvers.json", help="what `benchmarks.solvers` wrote")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "solvers.png", help="the picture (default: %(default)s)"
    )
    given = parser.parse_args()
    with mpl.rc_context({key: COLOURS.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}):
        draw(json.loads(given.results.read_text(encoding="utf-8"))["rows"]).savefig(given.out, dpi=DPI)
    # 64 colours of the picture's own: a third of the bytes.
    Image.open(given.out).convert("RGB").quantize(64).save(given.out, optimize=True)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_program(main)
