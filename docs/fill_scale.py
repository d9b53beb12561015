"""Fill the tables of docs/scale.md with what `python -m benchmarks.scale` found, so that the page says what the results say.

Usage:  python -m docs.fill_scale [--results benchmarks/results/scale_model.json] [--page docs/scale.md]
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.scale.check import LIMIT
from pbe_core.errors import InputError, run_program

_SHOWN_NODES = (1, 10, 100)
_BOUNDS = {"encoder": "GPUs", "requests": "bucket", "core": "cores"}
"""The model's word -> the page's."""
_BOUNDS_OF = {
    ("crawl of one bucket", "host"): "bucket",
    ("crawl of the web, as it is", "core"): "reading footers",  # All that a core does there, beside waiting for hosts.
}


def fill(page: str, result: Mapping[str, Any]) -> str:
    """The page with new rows in its three tables; what stands around them stays.

    Raises:
        InputError: the page lacks one of them.
    """
    tables = {
        "| what | calibrated on |": [_check(row) for row in result["checks"]],
        "| | nodes | days |": [_answer(row) for row in result["answers"] if row["nodes"] in _SHOWN_NODES],
        "| at | kind |": [_break(row) for row in result["breaks"]],
    }
    lines = page.splitlines()
    for head, rows in tables.items():
        first = next((place for place, line in enumerate(lines) if line.startswith(head)), None)
        if first is None:
            raise InputError(f"the page has no table that begins with `{head}`; put its head back, and the line below it")
        end = next(place for place in range(first, len(lines) + 1) if place == len(lines) or not lines[place].startswith("|"))
        lines[first + 2 : end] = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _check(row: Mapping[str, Any]) -> list[str]:
    error = f"{100 * row['error']:+.0f} %".replace("+0 ", "0 ").replace("-0 ", "0 ")
    values = [f"{_number(row[key])} {row['unit'].removeprefix('CPU ')}" for key in ("predicted", "measured")]
    what = row["what"].removesuffix(": CPU s").removesuffix(": MB")
    if row["what"].endswith(": CPU s"):
        what += ": CPU time"
    names = [row[key].replace("row_groups", "row groups") for key in ("calibrated_on", "checked_on")]
    return [what, *names, *values, error if abs(row["error"]) <= LIMIT else f"**{error}**"]


def _answer(row: Mapping[str, Any]) -> list[str]:
    low, middle, high = (f"{days:.0f}" if (days := row["days"][key]) >= 10 else f"{days:.1f}" for key in ("p10", "p50", "p90"))
    hours = f"{row['instance_hours']:,.0f}"
    bound = _BOUNDS_OF.get((row["way"], row["bound"])) or _BOUNDS.get(row["bound"], row["bound"])
    return [row["way"], str(row["nodes"]), middle, f"{low} to {high}", hours, bound, f"{row['lost_nodes']:,.0f}"]


def _break(row: Mapping[str, Any]) -> list[str]:
    at = (
        f"{row['photos'] / 1e6:,.0f} M photos"
        if row["photos"] is not None
        else f"{row['nodes']:,.{1 if row['nodes'] < 100 else 0}f} nodes"
    )
    return [at, row["kind"], row["name"], f"`{row['where']}`", row["why"], row["instead"]]


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def main() -> None:
    """Fill the page in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "scale_model.json", help="(default: %(default)s)")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_name("scale.md"), help="(default: %(default)s)")
    given = parser.parse_args()
    given.page.write_text(fill(given.page.read_text(), json.loads(given.results.read_text())))


if __name__ == "__main__":
    run_program(main)
