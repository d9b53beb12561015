"""Draw docs/pictures/scale_*.png: days by nodes, where today's design ends, and the model beside the runs.

Usage:  python -m docs.pictures.make_scale [--results benchmarks/results/scale_model.json] [--out docs/pictures]
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from benchmarks.machine import RESULTS
from benchmarks.scale.check import LIMIT
from pbe_core.errors import run_program

COLOURS = ("#b0413e", "#31688e", "#35806a", "#8a6d1d", "#7a4f9e", "#555555")
_KINDS = {"error": COLOURS[0], "memory": COLOURS[3], "pace": COLOURS[1]}
_DPI = 100


def draw_days(axes: Axes, result: Mapping[str, Any]) -> None:
    """Days by nodes, with the band between the tenth and the ninetieth percentile."""
    for name, colour in zip(dict.fromkeys(row["way"] for row in result["answers"]), COLOURS, strict=True):
        rows = [row for row in result["answers"] if row["way"] == name]
        nodes = [row["nodes"] for row in rows]
        low, middle, high = ([row["days"][key] for row in rows] for key in ("p10", "p50", "p90"))
        axes.plot(nodes, middle, "o-", color=colour, label=name, markersize=4)
        axes.fill_between(nodes, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(
        xscale="log", yscale="log", xlabel="nodes", ylabel="days", title=f"{result['photos']:,} photos, {result['hosts']:,} hosts"
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def draw_breaks(axes: Axes, result: Mapping[str, Any]) -> None:
    """At how many photos what ends."""
    rows = [row for row in result["breaks"] if row["photos"] is not None][::-1]
    for place, row in enumerate(rows):
        axes.barh(place, row["photos"], left=0, color=_KINDS[row["kind"]], height=0.65)
        axes.text(row["photos"] * 1.1, place, f"{row['photos'] / 1e6:,.0f} M", va="center", fontsize=8)
    axes.axvline(result["photos"], color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    most = max([result["photos"], *(row["photos"] for row in rows)])
    axes.set(xscale="log", xlim=(1e6, 6 * most), xlabel="photos (dashed: what is asked for)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _KINDS.values()]
    axes.legend(handles, ["stops with an error", "out of memory", "slower"], frameon=False, fontsize=8, loc="upper right")
    axes.grid(axis="x", alpha=0.25)


def draw_checks(axes: Axes, result: Mapping[str, Any]) -> None:
    """Errors of the predictions, in percent."""
    rows = result["checks"][::-1]
    errors = [100 * row["error"] for row in rows]
    colours = [COLOURS[2] if abs(error) <= 100 * LIMIT else COLOURS[0] for error in errors]
    axes.barh(range(len(rows)), errors, color=colours, height=0.65)
    axes.axvspan(-100 * LIMIT, 100 * LIMIT, color="grey", alpha=0.15, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['what']}: {row['checked_on'].replace('_', ' ')}" for row in rows], fontsize=7)
    axes.set(xlabel="how much more is predicted than was measured (%; grey: within 15 %)")
    axes.grid(axis="x", alpha=0.25)


PICTURES: dict[str, tuple[Callable[[Axes, Mapping[str, Any]], None], tuple[float, float]]] = {
    "scale_days": (draw_days, (6.8, 5.2)),
    "scale_breaks": (draw_breaks, (8.4, 4.6)),
    "scale_checks": (draw_checks, (8.4, 5.6)),
}
"""Name -> what draws it, and its size in inches."""


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "scale_model.json", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: %(default)s)")
    given = parser.parse_args()
    result = json.loads(given.results.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    for name, (draw, size) in PICTURES.items():
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes, result)
        path = given.out / f"{name}.png"
        figure.savefig(path, dpi=_DPI)
        plt.close(figure)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_program(main)
