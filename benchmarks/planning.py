"""How long `pbe plan` takes for all boxes of Open Images, and in how much memory: tables, plan, estimate and report.

    ours             all rows: selected by the paper's rules, cut into shards, hashed, estimated, counted and drawn
    ours, a tenth    a tenth of the photos and rows: does memory grow with the dataset?
    floor            all rows: the files are hashed, as the fingerprint needs, the boxes are parsed, and as many bytes as our
                     tables take are written and hashed
    beside           all rows, by the program of another checkout (--beside)

Usage:  python -m benchmarks.planning --folder DIR --make --beside ANOTHER_CHECKOUT
        prints the table and writes benchmarks/results/planning.json

Each is a program of its own, started anew each time, its files in the page cache; ours and the other take turns. CPU seconds are
of the process and all its children and differ little where other programs run; seconds by the clock do. Memory is PSS, as in
`benchmarks.selection`.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import Run, run_in
from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.make_annotations import BOX_FILE, TRAIN_ROWS
from benchmarks.selection import TENTH, made, warm_up
from pbe_core.errors import InputError, run_program
from pbe_core.files import file_sha256
from pbe_core.settings import REPOSITORY

TABLES = ("objects.parquet", "rejects.parquet", "same_photos.parquet", "plan.parquet")


@dataclass(frozen=True)
class Planned:
    """One row of the table; of several turns the medians."""

    way: str
    rows: int
    turns: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Of all turns the largest."""


def plan_with(checkout: Path, annotations: Path, out: Path) -> Run:
    """Run a checkout's plan.py in a folder of its own.

    Raises:
        InputError: it failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    given = {"source.annotations": annotations, "source.photos": annotations, "source.splits": '["train"]', "out": out}
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    command = ["pipelines/plan.py", "--config", "configs/open_images.yaml", *options]
    return run_in(checkout, command, out.with_suffix(".log"), memory=True)


def do_floor(annotations: Path, tables: Path, out: Path) -> None:
    """What no plan can do without: hash the input, parse the boxes, write tables of that size, and hash them."""
    for path in sorted(annotations.iterdir()):
        file_sha256(path)
    with pa_csv.open_csv(annotations / f"{BOX_FILE}.csv") as reader:
        for _ in reader:
            pass
    for name in TABLES:
        shutil.copyfile(tables / name, out / name)
        file_sha256(out / name)


def check_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tables: schema, row groups and rows. Bytes are also a matter of how they are written."""
    for name in TABLES:
        with pq.ParquetFile(one / name) as mine, pq.ParquetFile(other / name) as theirs:
            groups = range(mine.num_row_groups)
            if not mine.schema_arrow.equals(theirs.schema_arrow, check_metadata=True) or len(groups) != theirs.num_row_groups:
                return False
            if not all(mine.read_row_group(group).equals(theirs.read_row_group(group)) for group in groups):
                return False
    return True


def summed_up(way: str, rows: int, runs: list[Run]) -> Planned:
    """A row of the table."""
    seconds, cpu = (median(getattr(run, name) for run in runs) for name in ("seconds", "cpu_seconds"))
    return Planned(way, rows, len(runs), round(seconds, 2), round(cpu, 2), round(max(run.peak_mb or 0 for run in runs), 1))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder that holds, or is to hold, the annotations")
    parser.add_argument("--make", action="store_true", help="make the annotations if they are not there")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="boxes in all (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="how often each is run (default: %(default)s)")
    parser.add_argument("--beside", type=Path, help="another checkout, to be run in turns with this one")
    parser.add_argument("--results", type=Path, default=RESULTS / "planning.json", help="file to write (default: %(default)s)")
    parser.add_argument("--floor", type=Path, nargs=3, help=argparse.SUPPRESS)  # How this program starts itself.
    given = parser.parse_args()
    if given.floor:
        do_floor(*given.floor)
        return
    if given.turns < 1:
        raise InputError(f"--turns {given.turns}: must be 1 or more")
    machine = describe_machine()
    folder, few = (made(given.folder, rows, given.make).resolve() for rows in (given.rows, given.rows // TENTH))
    ways = {"ours": REPOSITORY} | ({"beside": given.beside.resolve()} if given.beside else {})
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        places = {name: Path(scratch).resolve() / name for name in (*ways, "tenth", "floor")}
        warm_up(folder)
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for _ in range(given.turns):
            for way, checkout in ways.items():
                runs[way].append(plan_with(checkout, folder, places[way]))
        same = check_same(places["ours"], places["beside"]) if given.beside else None
        tenth = [plan_with(REPOSITORY, few, places["tenth"])]
        places["floor"].mkdir()
        floor = ["-m", "benchmarks.planning", "--folder", ".", "--floor", *map(str, (folder, places["ours"], places["floor"]))]
        lowest = [run_in(REPOSITORY, floor, Path(scratch) / "floor.log", memory=True)]
    rows = [summed_up(way, given.rows, found) for way, found in runs.items()]
    rows += [summed_up("ours, a tenth", given.rows // TENTH, tenth), summed_up("floor", given.rows, lowest)]
    print_rows(rows, same)
    result = {
        "date": today(),
        "machine": machine,
        "versions": describe_versions(["matplotlib", "numpy", "psutil", "pyarrow"]),
        "same_tables": same,
        "ways": [asdict(row) for row in rows],
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")


def print_rows(rows: list[Planned], same: bool | None) -> None:
    """The table; the first row is ours."""
    table = Table("way", *["rows", "seconds", "CPU s", "peak MB", "times ours (CPU)"])
    for row in rows:
        numbers = [f"{row.rows:,}", f"{row.seconds:,.1f}", f"{row.cpu_seconds:,.1f}", f"{row.peak_mb:,.0f}"]
        table.add_row(row.way, *numbers, f"{row.cpu_seconds / rows[0].cpu_seconds:.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console = Console()
    console.print(table)
    if same is not None:
        console.print(f"the tables of both are {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    run_program(main)
