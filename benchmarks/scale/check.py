"""The model beside runs that its constants are not from: predicted and measured, with the error.

What is predicted, from what: two processes from one; many rows, photos, parts or row groups from few; the committed 14.6 M rows
from the committed tenth. Within one part of the results all is of one machine; between machines nothing is predicted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS
from benchmarks.scale.constants import Constants, World, columns, line, read, way_of
from benchmarks.scale.crawl_model import Crawl, host_sizes, simulate_crawl
from benchmarks.scale.pack_model import Pack, simulate_pack

LIMIT = 0.15


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    calibrated_on: str
    checked_on: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def _committed_pace(crawl: Mapping[str, Any]) -> Iterator[Check]:
    """From CPU time by size to the pace: as fast as the cores allow that workers, Ray and the server share."""
    tenth, whole = way_of(crawl, "ours, a tenth"), way_of(crawl, "ours")
    each = sum(line(*columns([tenth, whole], "photos", key))[0] for key in ("cpu_seconds", "server_cpu_seconds"))
    names = "its CPU time (crawl.json)", f"{crawl['processes']} processes, {whole['photos']:,} photos"
    yield Check("crawl: steady pace", *names, "photos/s", crawl["machine"]["cpus"] / each, whole["steady_photos_per_second"])


def check_all(constants: Constants, world: World, results: Path = RESULTS) -> list[Check]:
    """Every check that the committed results allow."""
    scale, packing, selection, crawl = (read(results / f"{name}.json") for name in ("scale", "packing", "selection", "crawl"))
    return [
        *_crawl(constants, world, scale["crawl"]["measured"]),
        *_committed_pace(crawl),
        Check("law of hosts: the largest's photos", "the 100 largest", "the largest", "%", *_largest_host(world)),
        *_pack(constants, world, packing, scale["pack"]["measured"]),
        *_selection(selection),
        *_tables(scale["tables"]["measured"]),
        *_growing("photo store: making its tables", scale["store"]["measured"], "photos", "merge_cpu_seconds", "CPU s"),
        *_growing("photo store: memory of an actor", scale["store"]["measured"], "photos", "photo_store_bytes", "MB", 1e-6),
        *_growing("placeholders: memory", scale["hashes"]["measured"], "photos", "rise_mb", "MB"),
        *_footers(scale["footers"]["measured"]),
    ]


def _crawl(constants: Constants, world: World, runs: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """CPU time by the sizes, pace by the model with the constants of one process."""
    few, many, two = runs
    per_photo, fixed = line(*columns([few, many], "photos", "cpu_seconds"))
    each, own = line(*columns([few, many], "photos", "worker_cpu_seconds"))
    names = f"1 process, {few['photos']:,} and {many['photos']:,} photos", f"2 processes, {two['photos']:,} photos"
    # Starting is paid by each process.
    yield Check("crawl: CPU time of all processes", *names, "CPU s", fixed + own + per_photo * two["photos"], two["cpu_seconds"])
    yield Check("crawl: CPU time of the workers", *names, "CPU s", 2 * own + each * two["photos"], two["worker_cpu_seconds"])
    # As fast as one process was by the clock, and no faster than the cores allow that workers, Ray and the server share;
    # without hosts' limits, on a machine of two cores.
    served = line(*columns([few, many], "photos", "server_cpu_seconds"))[0]
    clock = replace(constants, crawl_cpu_s=max(1 / many["steady_photos_per_second"], per_photo + served))
    crawl = Crawl(two["photos"], 1, 1, 2, host_rate=1e9, host_slots=1e9, failures=False, decodes=False)
    rate = two["photos"] / simulate_crawl(crawl, clock, replace(world, cores=2), 0).seconds
    yield Check("crawl: steady pace", *names, "photos/s", rate, two["steady_photos_per_second"])
    growth, base = line(*columns([few, many], "photos", "driver_mb"))
    yield Check("crawl: memory of the driver", *names, "MB", base + growth * two["photos"], two["driver_mb"])


def _pack(constants: Constants, world: World, packing: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Check]:
    """Two actors from one, in the committed run and in that of scale.json."""
    committed = [way_of(packing, way) for way in ("1 worker", "2 workers")]
    for name, (one, two) in (("packing.json", committed), ("scale.json", own["workers"])):
        clock = replace(constants, **{f"pack_{kind}s": one[f"{kind}seconds"] / one["samples"] for kind in ("", "cpu_")})
        pack = Pack(two["samples"], 1, 2, gpus=False, bucket=False, failures=False, shard_samples=50)
        seconds = simulate_pack(pack, clock, replace(world, cores=2), 0).seconds
        labels = f"1 actor, {one['samples']} samples ({name})", f"2 actors, {two['samples']} samples"
        yield Check("pack: pace", *labels, "samples/s", two["samples"] / seconds, two["samples"] / two["seconds"])
        cpu = one["cpu_seconds"] / one["samples"] * two["samples"]
        yield Check("pack: CPU time", *labels, "CPU s", cpu, two["cpu_seconds"])


def _selection(selection: Mapping[str, Any]) -> Iterator[Check]:
    """The committed tenth, and all rows."""
    tenth, whole = way_of(selection, "ours, 10%"), way_of(selection, "ours")
    labels = f"{tenth['rows']:,} boxes (selection.json)", f"{whole['rows']:,} boxes"
    yield Check("selection: seconds", *labels, "s", tenth["seconds"] * whole["rows"] / tenth["rows"], whole["seconds"])
    yield Check("selection: memory of the driver", *labels, "MB", tenth["peak_mb"], whole["peak_mb"])


def _tables(runs: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """From two hundredths and a tenth of the rows: a hundredth, and all."""
    tiny, few, many, whole = runs
    for name, size, key, unit in (
        ("select: CPU time", "boxes", "select_cpu_seconds", "CPU s"),
        ("plan: CPU time", "objects", "plan_cpu_seconds", "CPU s"),
        ("list of wanted photos: CPU time", "photos", "wanted_cpu_seconds", "CPU s"),
        ("list of wanted photos: memory of the driver", "photos", "wanted_rise_mb", "MB"),
    ):
        slope, base = line(*columns([few, many], size, key))
        for run in (tiny, whole):
            labels = f"{few['boxes']:,} and {many['boxes']:,} boxes", f"{run['boxes']:,} boxes"
            yield Check(name, *labels, unit, base + slope * run[size], run[key])


def _largest_host(world: World) -> tuple[float, float]:
    """Percent of the photos, by the law and as seen."""
    sizes = host_sizes(10**9, 10_000, world, np.random.default_rng(0))
    return 100 * float(sizes.max()) / 1e9, 100 * world.largest_host


def _growing(
    what: str, runs: Sequence[Mapping[str, Any]], size: str, key: str, unit: str, factor: float = 1.0
) -> Iterator[Check]:
    """The largest of three sizes from the two others."""
    slope, base = line(*columns(runs[:2], size, key))
    labels = f"{runs[0][size]:,} and {runs[1][size]:,} {size}", f"{runs[2][size]:,} {size}"
    yield Check(what, *labels, unit, factor * (base + slope * runs[2][size]), factor * runs[2][key])


def _footers(runs: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    for table in sorted({run["table"] for run in runs}):
        own = [run for run in runs if run["table"] == table]
        for key, unit, factor in (("footer_bytes", "MB", 1e-6), ("parse_cpu_seconds", "CPU s", 1.0)):
            yield from _growing(f"footer of {table}: {unit}", own, "row_groups", key, unit, factor)
