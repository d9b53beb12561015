"""How fast boxes become objects, and in how much memory: our selection against the published way and against the floor.

    ours             all rows: read, indexed, selected with every rule on, written as objects and rejects
    ours, a tenth    a tenth of the photos and rows, made for it: does memory grow with the dataset?
    published way    a tenth of the rows: pandas reads the CSV, then Python goes through photos and boxes with the area rule alone
    floor            all rows: Arrow streams the CSV and the area rule alone is applied and counted; nothing is kept

Usage:  python -m benchmarks.selection --folder DIR --make --rows 14_600_000
        prints the table and writes benchmarks/results/selection.json

Each way runs in a fresh process of its own, one after the other, its files in the page cache. Seconds are those of the work,
without starting Python. Memory is the peak, over samples every 50 ms, of what the process and all its children hold, imports
included (PSS: pages that n processes share count 1/n); the results also have VmHWM, the kernel's own peak of the one process.

The published way is timed to its advantage: the published script also decodes each photo to learn its size, looks up photos one
by one, and reads the CSV anew for each of its 16 photo folders. It is extrapolated to all rows linearly.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.make_annotations import BOX_FILE, EDGES, TRAIN_PHOTOS, TRAIN_ROWS, make_annotations
from benchmarks.memory import high_water_mb, run_watched
from pbe_core.errors import InputError, run_program

MIN_AREA, MAX_AREA = 0.02, 0.8  # Share of the photo (paper).
TENTH = 10
TABLE_WIDTH = 110
EVERY_RULE = {
    "source.splits": ["train"],
    "source.same_photo": "drop",
    "selection.min_area": MIN_AREA,
    "selection.max_area": MAX_AREA,
    "selection.min_side": 64,
    "selection.max_aspect": 4,
    # Two of three boxes of Open Images are occluded: that flag would leave little for the rules after it.
    "selection.reject_flags": ["group_of", "depiction", "inside", "truncated"],
    "selection.unknown_flags": "reject",
    "selection.include_labels": ["Clothing", "Person", "Plant", "Animal", "Food", "Furniture", "Vehicle"],
    "selection.exclude_labels": ["Human face", "Flower"],
    "selection.near_duplicate_iou": 0.9,
    "selection.nested_share": 0.95,
    "selection.max_per_photo": 5,
    "selection.max_per_class": 50_000,
    "selection.class_smoothing": 0.3,
    "selection.subset": 0.9,
    "selection.all_reasons": True,
}


@dataclass(frozen=True)
class Outcome:
    """What one process did."""

    seconds: float
    """Wall time of the work."""
    accepted: int
    """Boxes accepted."""
    rejected: int | None
    """Boxes rejected with a reason, where the way tells."""
    imports_mb: float | None
    """VmHWM, the kernel's peak of the process itself, in MB, when all was imported and nothing done; where the system tells."""
    high_water_mb: float | None
    """The same in the end."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table. MB are 10^6 bytes."""

    way: str
    rows: int
    seconds: float
    rows_per_second: float
    seconds_for_all_rows: float
    """The same, where all rows were read; else extrapolated linearly."""
    extrapolated: bool
    peak_mb: float
    imports_mb: float | None
    high_water_mb: float | None
    samples: int
    """How often memory was looked at."""
    accepted: int
    rejected: int | None


def select_ours(folder: Path, scratch: Path) -> tuple[int, int]:
    """Our selection with every rule on; returns how many boxes were accepted and rejected."""
    from pbe_core.settings import load_settings, preset
    from pipelines.config import BuildSettings
    from pipelines.selection.objects import select_objects

    given = {"out": str(scratch), "source.annotations": str(folder), "source.photos": str(folder), **EVERY_RULE}
    options = [word for key, value in given.items() for word in (f"--{key}", option_text(value))]
    settings = load_settings(BuildSettings, "build", options, preset("open_images"))
    select_objects(settings, scratch)
    objects, rejects = (pq.read_metadata(scratch / f"{name}.parquet").num_rows for name in ("objects", "rejects"))
    return objects, rejects


def select_published(table: Path) -> dict[str, list[list[float]]]:
    """The way of the published script: photo -> its accepted boxes (x_min, x_max, y_min, y_max), box by box in Python."""
    import pandas as pd

    accepted: dict[str, list[list[float]]] = {}
    for photo, rows in pd.read_csv(table).groupby("ImageID"):
        kept = []
        for box in rows[list(EDGES)].values.tolist():
            x_min, x_max, y_min, y_max = box
            if MIN_AREA <= (x_max - x_min) * (y_max - y_min) <= MAX_AREA:
                kept.append(box)
        if kept:
            accepted[photo] = kept
    return accepted


def select_floor(table: Path) -> int:
    """How many boxes the area rule accepts: reading the numbers and nothing else. No selection of this file can be faster."""
    accepted = 0
    with pa_csv.open_csv(table, convert_options=pa_csv.ConvertOptions(include_columns=list(EDGES))) as reader:
        for batch in reader:
            x_min, x_max, y_min, y_max = (batch.column(name) for name in EDGES)
            area = pc.multiply(pc.subtract(x_max, x_min), pc.subtract(y_max, y_min))
            passes = pc.and_(pc.greater_equal(area, MIN_AREA), pc.less_equal(area, MAX_AREA))
            accepted += pc.sum(passes).as_py() or 0
    return accepted


def option_text(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def run_way(way: str, folder: Path, scratch: Path) -> Outcome:
    """Do the work of one way in this process."""
    table = folder / f"{BOX_FILE}.csv"
    works: dict[str, Callable[[], tuple[int, int | None]]] = {
        "ours": lambda: select_ours(folder, scratch),
        "published": lambda: (sum(map(len, select_published(table).values())), None),
        "floor": lambda: (select_floor(table), None),
    }
    # Imports are not the work: whoever selects has a program running already.
    for module in {"ours": ["pipelines.selection.objects"], "published": ["pandas"], "floor": []}[way]:
        importlib.import_module(module)
    imports_mb = high_water_mb()
    start = time.perf_counter()
    accepted, rejected = works[way]()
    return Outcome(time.perf_counter() - start, accepted, rejected, imports_mb, high_water_mb())


def measure(way: str, folder: Path, rows: int, all_rows: int) -> Measurement:
    """Run one way in a fresh process and watch it.

    Raises:
        InputError: it failed.
    """
    warm_up(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        report, log = Path(scratch) / "report.json", Path(scratch) / "log.txt"
        command = [sys.executable, "-m", "benchmarks.selection", "--folder", str(folder), "--run", way, "--report", str(report)]
        sampler = run_watched(command, log, f"`{way}` on {folder}")
        outcome = Outcome(**json.loads(report.read_text()))
    if outcome.rejected is not None and outcome.accepted + outcome.rejected != rows:
        raise AssertionError(
            f"{way}: {outcome.accepted} accepted + {outcome.rejected} rejected are not the {rows} rows of {folder}"
        )
    return Measurement(
        way if rows == all_rows else f"{way}, {rows / all_rows:.0%}",
        rows,
        round(outcome.seconds, 2),
        round(rows / outcome.seconds),
        round(outcome.seconds * all_rows / rows, 2),
        rows != all_rows,
        round(sampler.peak_mb, 1),
        outcome.imports_mb and round(outcome.imports_mb, 1),
        outcome.high_water_mb and round(outcome.high_water_mb, 1),
        sampler.samples,
        outcome.accepted,
        outcome.rejected,
    )


def warm_up(folder: Path) -> None:
    """Read all files once, so that none of the ways has to wait for the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def made(folder: Path, rows: int, make: bool) -> Path:
    """The folder of annotations with so many rows; made if asked for and not there.

    Raises:
        InputError: it is not there and `make` was not asked for.
    """
    path = folder / f"rows-{rows}"
    if path.is_dir():
        return path
    if not make:
        raise InputError(f"{path}: no such folder; add --make to have the annotations made (about 120 bytes a row)")
    unfinished = folder / f"rows-{rows}.unfinished"
    make_annotations(unfinished, rows, round(rows * TRAIN_PHOTOS / TRAIN_ROWS))
    return unfinished.rename(path)


def table_of(measurements: list[Measurement]) -> Table:
    """The table to print; the first measurement is ours."""
    table = Table("way", *["rows", "seconds", "rows/s", "peak MB", "accepted", "s for all rows", "times ours"])
    for one in measurements:
        ratio = one.seconds_for_all_rows / measurements[0].seconds_for_all_rows
        whole = f"{'about ' if one.extrapolated else ''}{one.seconds_for_all_rows:,.1f}"
        cells = [f"{one.rows:,}", f"{one.seconds:,.2f}", f"{one.rows_per_second:,}", f"{one.peak_mb:,.0f}", f"{one.accepted:,}"]
        table.add_row(one.way, *cells, whole, f"{ratio:.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder that holds, or is to hold, the annotations")
    parser.add_argument("--make", action="store_true", help="make the annotations if they are not there")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="boxes in all (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "selection.json", help="file to write (default: %(default)s)")
    # How this program starts itself for one way.
    parser.add_argument("--run", choices=("ours", "published", "floor"), help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        outcome = run_way(given.run, given.folder, given.report.parent / "out")
        given.report.write_text(json.dumps(asdict(outcome)))
        return
    machine = describe_machine()
    tenth = given.rows // TENTH
    whole_folder, tenth_folder = made(given.folder, given.rows, given.make), made(given.folder, tenth, given.make)
    measurements = [
        measure("ours", whole_folder, given.rows, given.rows),
        measure("ours", tenth_folder, tenth, given.rows),
        measure("published", tenth_folder, tenth, given.rows),
        measure("floor", whole_folder, given.rows, given.rows),
    ]
    growth = measurements[0].peak_mb / measurements[1].peak_mb - 1
    console = Console(width=TABLE_WIDTH)
    console.print(table_of(measurements))
    console.print(f"Ten times the rows take {growth:+.0%} memory. `about`: extrapolated linearly from a tenth of the rows.")
    result = {
        "date": today(),
        "machine": machine,
        "versions": describe_versions(["numpy", "pandas", "psutil", "pyarrow"]),
        "rows": given.rows,
        "photos": round(given.rows * TRAIN_PHOTOS / TRAIN_ROWS),
        "rules_of_ours": EVERY_RULE,
        "memory_growth_percent": round(100 * growth, 1),
        "ways": [asdict(one) for one in measurements],
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
