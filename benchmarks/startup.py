"""What commands cost before their work begins: CPU time of starting, of this checkout and beside it of another one.

    pbe --help, pbe build --help, pbe edit --help, pbe train --help
    plan of the tiny world               52 photos: starting is nearly all of it
    build with nothing to do             the same command again, in the folder of a finished dataset
    two packing actors                   a Ray of our own and two actors on it, until both have their VAE
    edit until the model is loaded       the tiny world's finished model, as `pbe edit` loads it

Usage:  python -m benchmarks.startup --beside ANOTHER_CHECKOUT
        prints the table and writes benchmarks/results/startup.json

CPU seconds are of the process and all its children, user and system, bytecode warm: of `--turns` turns the median, the two
checkouts after one another in each. Each checkout builds its own dataset first.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.checkout import run_in
from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from pbe_core.errors import InputError, run_program
from pbe_core.settings import REPOSITORY

HELPS = {" ".join(["pbe", *name, "--help"]): ["-m", "pbe_cli", *name, "--help"] for name in ([], ["build"], ["edit"], ["train"])}
PLAN, AGAIN, ACTORS = "plan of the tiny world", "build with nothing to do", "two packing actors"
EDIT = "edit until the model is loaded"
_PHOTOS = """
import sys
from pathlib import Path
from tiny_world.make_photos import make_world
make_world(Path(sys.argv[1]), 36, 16, 7, 1)
"""
_ACTORS = """
import sys
import ray
from pbe_core.settings import load_settings, preset
from pipelines.config import BuildSettings
from pipelines.dataset.pack import PackingActor
from pipelines.on_ray import start_ray
from pipelines.ray_pool import actor_options
settings = load_settings(BuildSettings, "build", sys.argv[1:], preset("tiny"))
start_ray("local")
made = ray.remote(PackingActor).options(**actor_options(0.5))
actors = [made.remote(settings, "", "cpu") for _ in range(2)]
ray.get([actor.ready.remote() for actor in actors])
"""
_EDIT = """
from pbe_train.editing.paint_by_example import PaintByExample
PaintByExample.from_pretrained("tiny_world/weights/model")
"""


@dataclass(frozen=True)
class Started:
    """One row of the table; CPU seconds are medians."""

    command: str
    turns: int
    cpu_seconds: float
    beside_cpu_seconds: float | None
    """Of the other checkout."""


def commands(world: Path, folder: Path) -> dict[str, list[str]]:
    """Name -> arguments of Python; `world` holds the tiny photos, and what is written goes below `folder`."""
    given = {
        "source.annotations": world,
        "source.photos": world,
        "shards.samples": 20,
        "ray.actors": 1,
        "ray.cpus_per_actor": 0.5,
    }
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    build = ["-m", "pbe_cli", "build", *options, "--out", str(folder / "dataset")]
    return {
        **HELPS,
        PLAN: ["-m", "pbe_cli", "plan", *options, "--out", str(folder / "plan")],
        AGAIN: build,
        ACTORS: ["-c", _ACTORS, *options, "--out", str(folder / "dataset")],
        EDIT: ["-c", _EDIT],
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout, to be run in turns with this one")
    parser.add_argument("--turns", type=int, default=5, help="how often each is run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="of the commands, those whose names begin so")
    parser.add_argument("--results", type=Path, default=RESULTS / "startup.json", help="file to write (default: %(default)s)")
    given = parser.parse_args()
    if given.turns < 1:
        raise InputError(f"--turns {given.turns}: must be 1 or more")
    machine = describe_machine()
    checkouts = [REPOSITORY, *([given.beside.resolve()] if given.beside else [])]
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(checkouts, Path(scratch), given.turns, tuple(given.only or [""]))
    table = Table("until it works", *["CPU s", "beside", "of that"])
    for row in rows:
        other = row.beside_cpu_seconds
        share = "" if other is None else f"{row.cpu_seconds / other:.0%}"
        table.add_row(row.command, f"{row.cpu_seconds:.2f}", "" if other is None else f"{other:.2f}", share)
    Console().print(table)
    versions = describe_versions(["diffusers", "psutil", "pyarrow", "ray", "torch", "transformers"])
    result = {"date": today(), "machine": machine, "versions": versions, "commands": [asdict(row) for row in rows]}
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")


def measure(checkouts: list[Path], scratch: Path, turns: int, beginnings: tuple[str, ...]) -> list[Started]:
    """All commands in turns; ours is the first checkout."""
    world, log = scratch / "photos", scratch / "log.txt"
    run_in(checkouts[0], ["-c", _PHOTOS, str(world)], log)
    asked = []
    for number, checkout in enumerate(checkouts):
        folder = scratch / str(number)
        folder.mkdir()
        asked.append({name: words for name, words in commands(world, folder).items() if name.startswith(beginnings)})
        if {AGAIN, ACTORS} & asked[-1].keys():
            run_in(checkout, commands(world, folder)[AGAIN], log)
    rows = []
    for name in asked[0]:
        for checkout, own in zip(checkouts, asked, strict=True):  # The first time writes bytecode.
            run_in(checkout, own[name], log)
        spent = [
            [run_in(checkout, own[name], log).cpu_seconds for checkout, own in zip(checkouts, asked, strict=True)]
            for _ in range(turns)
        ]
        medians = [round(median(column), 3) for column in zip(*spent, strict=True)]
        rows.append(Started(name, turns, medians[0], medians[1] if len(medians) > 1 else None))
    return rows


if __name__ == "__main__":
    run_program(main)
