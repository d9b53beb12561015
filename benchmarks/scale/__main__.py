"""Crawl and pack a billion photos on paper: days, instance-hours, where it breaks, and how far the model is from small runs.

Usage:  python -m benchmarks.scale [--photos 1_000_000_000] [--hosts 10_000] [--nodes 1 10 100] [--seeds 20]
        prints the tables and writes benchmarks/results/scale_model.json

Constants are read from the committed results (`constants.py`); `python -m benchmarks.scale.measure` makes those of scale.json.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, today
from benchmarks.scale.breaks import Break, find_breaks, table_sizes
from benchmarks.scale.check import LIMIT, Check, check_all
from benchmarks.scale.constants import Constants, World, read_constants
from benchmarks.scale.crawl_model import Crawled, by_host, from_bucket, simulate_crawl
from benchmarks.scale.crawl_model import today as as_today
from benchmarks.scale.pack_model import Packed, on_gpus, simulate_pack
from pbe_core.errors import run_program

PERCENTILES = (10, 50, 90)
_DAY = 86_400.0
_AT_ONCE = 64
_WIDTH = 150

Way = Callable[[int, int], Crawled | Packed]
"""Nodes and seed -> what became of it."""


def ways_of(photos: int, hosts: int, constants: Constants, world: World) -> dict[str, Way]:
    """What is simulated."""

    def crawl(make: Callable[[int], Any], nodes: int, seed: int) -> Crawled:
        return simulate_crawl(make(nodes), constants, world, seed)

    def pack(at_once: int, nodes: int, seed: int) -> Packed:
        return simulate_pack(on_gpus(photos, nodes, constants, world, at_once), constants, world, seed)

    def crawl_of_fast_hosts(nodes: int, seed: int) -> Crawled:
        return simulate_crawl(by_host(photos, hosts, nodes, world), constants, fast, seed)

    # Ten requests at once are then 20 a second or more at every host.
    fast = replace(world, latency_s=0.25, latency_spread=0.25)

    return {
        "crawl of the web, as it is": partial(crawl, lambda nodes: as_today(photos, hosts, nodes, constants, world)),
        "crawl of the web, hosts divided": partial(crawl, lambda nodes: by_host(photos, hosts, nodes, world)),
        "the same, no host slow": crawl_of_fast_hosts,
        "crawl of one bucket": partial(crawl, lambda nodes: from_bucket(photos, nodes, world)),
        "pack, as it is": partial(pack, 1),
        "pack, 64 requests of the driver at once": partial(pack, _AT_ONCE),
    }


def answer(ways: Mapping[str, Way], nodes: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """Days and instance-hours of each way on each number of nodes, as percentiles over seeds."""
    rows = []
    for (name, way), count in ((item, count) for item in ways.items() for count in nodes):
        found = [way(count, seed) for seed in range(seeds)]
        days = np.array([one.seconds for one in found]) / _DAY
        low, middle, high = np.percentile(days, PERCENTILES).tolist()
        bounds = [one.bound for one in found]
        rows.append(
            {
                "way": name,
                "nodes": count,
                "days": {f"p{percent}": round(value, 3) for percent, value in zip(PERCENTILES, (low, middle, high), strict=True)},
                "instance_hours": round(24 * middle * count, 1),
                "bound": max(set(bounds), key=bounds.count),
                "lost_nodes": float(np.median([one.lost_nodes for one in found])),
                **extra(found),
            }
        )
    return rows


def extra(found: Sequence[Crawled | Packed]) -> dict[str, Any]:
    """What only one of the two tells."""
    crawled = [one for one in found if isinstance(one, Crawled)]
    if crawled:
        names = ("ok", "gone", "left", "largest_host", "most_seconds")
        medians = {name: float(np.median([getattr(one, name) for one in crawled])) for name in names}
        return {"days_of_nine_tenths": round(medians.pop("most_seconds") / _DAY, 3), **medians}
    packed = [one for one in found if isinstance(one, Packed)]
    return {"packing_days": round(float(np.median([one.packing_seconds for one in packed])) / _DAY, 3)}


def table_of_checks(checks: Sequence[Check]) -> Table:
    """Predicted and measured side by side."""
    table = Table("what", "from", "for", "predicted", "measured", "unit", "error", title="The model beside runs")
    for one in checks:
        mark = "" if abs(one.error) <= LIMIT else " !"
        numbers = f"{one.predicted:,.4g}", f"{one.measured:,.4g}"
        table.add_row(one.what, one.calibrated_on, one.checked_on, *numbers, one.unit, f"{one.error:+.1%}{mark}")
    return table


def table_of_answers(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Days by nodes."""
    table = Table("way", "nodes", *[f"days, p{percent}" for percent in PERCENTILES], "instance-hours", "bound by", "nodes lost")
    for row in rows:
        days = [f"{value:,.1f}" for value in row["days"].values()]
        table.add_row(
            row["way"], f"{row['nodes']}", *days, f"{row['instance_hours']:,.0f}", row["bound"], f"{row['lost_nodes']:.0f}"
        )
    return table


def table_of_breaks(breaks: Sequence[Break]) -> Table:
    """First things first."""
    table = Table("at", "kind", "what", "where", "why", title="Where it ends")
    for one in breaks:
        at = f"{one.photos / 1e6:,.0f} M photos" if one.photos is not None else f"{one.nodes:,.1f} nodes"
        table.add_row(at, one.kind, one.name, one.where, one.why)
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=10**9, help="(default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 3, 10, 30, 100], help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale_model.json", help="file to write (default: %(default)s)")
    given = parser.parse_args()
    constants, world = read_constants(), World()
    checks, breaks = check_all(constants, world), find_breaks(constants, world)
    answers = answer(ways_of(given.photos, given.hosts, constants, world), given.nodes, given.seeds)
    console = Console(width=_WIDTH)
    for table in (table_of_checks(checks), table_of_answers(answers), table_of_breaks(breaks)):
        console.print(table)
    result = {
        "date": today(),
        "photos": given.photos,
        "hosts": given.hosts,
        "seeds": given.seeds,
        "constants": asdict(constants),
        "world": asdict(world),
        "checks": [{**asdict(one), "error": round(one.error, 4)} for one in checks],
        "answers": answers,
        "table_bytes": table_sizes(constants, given.photos),
        "breaks": [asdict(one) for one in breaks],
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")
    print(given.results)


if __name__ == "__main__":
    run_program(main)
