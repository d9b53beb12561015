"""How fast photos become packed samples, beside the published recipe, and how that scales. The VAE is left out of all of it.

    preparation    photo -> view, masks, reference, on one thread: ours (several objects a photo, or one) and the published way;
                   beside them the decoder of JPEGs alone, below which no preparation comes that decodes the whole photo
    masks          drawing alone: ours, and the published way
    pack           a whole shard by `ShardPacker.pack`, tar, index and record, against the packer's preparation alone
    workers        the same shards by one packing actor on Ray, and by two
    memory         peak of a process that packs a tenth of the samples, and of one that packs them all

Usage:  python -m benchmarks.packing --samples 1000
        python -m benchmarks.packing --samples 1000 --photos FOLDER_WITH_JPEGS
        prints the tables and writes benchmarks/results/packing.json

All is measured in one run, the ways of a part in turns, there and back, several times; figures are medians of the turns. Ratios
are of CPU time, which other programs disturb little, but for `workers` and where the table says so. Photos are drawn (1024 x 768
px, JPEG) or taken from a folder, under as many names as are needed; boxes are made up; settings are the paper's.

The published way (published_recipe.py) makes one mask for each sample; ours makes two, and stores the reference as a JPEG. In the
place of the VAE stands an encoder that gives zeros. The pace of workers is counted from where each has finished its first shard:
Ray's start, and loading, are not in it. `CPUs` are how many of them were at work at once: where two workers could not have two,
the machine was busy, and the ratio says nothing.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

import cv2
import numpy as np
import psutil
import ray
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import pipelines.dataset.pack
from benchmarks import published_recipe
from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.memory import high_water_mb, run_watched
from benchmarks.packing_world import HEIGHT, OBJECTS_PER_PHOTO, WIDTH, draw_photos, find_photos, make_world
from pbe_core.errors import InputError, run_program
from pbe_core.images.crop import whole_photo
from pbe_core.images.decode import photo_size
from pbe_core.photo_files import photo_path
from pbe_core.randomness import generator
from pbe_core.settings import REPOSITORY, load_settings, preset
from pipelines.config import BuildSettings
from pipelines.dataset.pack import ShardPacker, pack_on_ray
from pipelines.dataset.plan_shards import Plan, PlanRow
from pipelines.dataset.samples import Failure, draw_mask, prepare_photo
from pipelines.dataset.write_plan import select_and_plan
from pipelines.geometry import box_in_photo, extend_box, square_window

PARTS = ("preparation", "masks", "pack", "workers", "memory")
SAMPLES = 1000
FEWEST = 40
SHARDS = 20
TENTH = 10
TURNS = 15
WORKER_TURNS = 4
WORKERS = (1, 2)
AT_ONCE = 64
"""Samples prepared in one turn."""
MASKS_PER_BOX = 4
WORLD = "world"
IDENTITY = "benchmark"
LATENT_CHANNELS, DOWNSAMPLING = 8, 8
GOALS = {"masks": ">= 40", "pack": "<= 1.15", "workers": ">= 1.8", "memory": "1, flat"}
GOALS_OF_PREPARATION = (">= 6", ">= 4")
"""With several objects a photo, and with one."""
PUBLISHED = "published way"
HOW_TO_INSTALL = "left out: the published way; pip install bezier (or pip install '.[benchmarks]'), then run this again"
TABLE_WIDTH = 120


@dataclass(frozen=True)
class Measurement:
    """One row of the table: medians over the turns."""

    part: str
    way: str
    samples: int
    """In each turn; masks, where masks are drawn."""
    seconds: float
    cpu_seconds: float
    """Of all threads, or of all workers."""
    samples_per_second: float
    samples_per_cpu_second: float
    turns: list[float]
    """Seconds of each turn."""


@dataclass(frozen=True)
class Weight:
    """Memory of one process. MB are 10^6 bytes."""

    samples: int
    start_mb: float | None
    """The kernel's own peak (VmHWM) before the first shard, all being loaded; where the system tells."""
    high_water_mb: float | None
    """The same in the end."""
    peak_mb: float
    """PSS."""
    looks: int


@dataclass(frozen=True)
class Comparison:
    """A ratio of two rows."""

    part: str
    what: str
    ratio: float
    goal: str


@dataclass(frozen=True)
class Pace:
    """Of packing actors, once all were at work."""

    samples: int
    seconds: float
    cpu_seconds: float


class NullEncoder:
    """In the place of the VAE: zeros of the right shape."""

    means_only = False

    def encode_samples(self, views: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """[samples, size, size, 3] and [samples, K, size, size] -> float16 [samples, 1 + K, 2C, size / 8, size / 8]."""
        side = views.shape[1] // DOWNSAMPLING
        return np.zeros((len(views), 1 + masks.shape[1], LATENT_CHANNELS, side, side), np.float16)


def leave_out_the_vae() -> None:
    """Packers of this process get an encoder that does nothing. Ray's workers call this before anything else."""
    pipelines.dataset.pack.load_encoder = lambda settings, device, shapes: NullEncoder()


def plan(world: Path, out: Path, shard_samples: int) -> BuildSettings:
    """Select and plan as a build does, with the paper's settings; returns these."""
    options = {
        "source.annotations": world,
        "source.photos": world,
        "source.splits": '["train"]',
        "out": out,
        "shards.samples": shard_samples,
        "ray.cpus_per_actor": 1,
        "ray.gpus_per_actor": 0,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    settings = load_settings(BuildSettings, "build", words, preset("open_images"))
    select_and_plan(settings)
    (out / "shards").mkdir(exist_ok=True)
    return settings


def planned_rows(settings: BuildSettings, number: int) -> list[PlanRow]:
    """Rows of one shard of the plan."""
    plan = Plan(settings.out / "plan.parquet")
    return plan.rows(list(plan.shards)[number])


def by_photo(rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
    """Rows that stand together and are of one photo."""
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.photo_id)]


def take_turns(part: str, ways: Mapping[str, Callable[[], None]], samples: int) -> dict[str, Measurement]:
    """Run the ways one after the other, then back, and so on: a machine that grows slower meanwhile favours none of them."""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(TURNS):
        for way in list(ways) if turn % 2 == 0 else reversed(ways):
            start, cpu_start = time.perf_counter(), time.process_time()
            ways[way]()
            taken[way].append((time.perf_counter() - start, time.process_time() - cpu_start))
    found = {}
    for way, turns in taken.items():
        seconds, cpu_seconds = (statistics.median(times) for times in zip(*turns, strict=True))
        rates = samples / seconds, samples / cpu_seconds
        found[way] = Measurement(part, way, samples, seconds, cpu_seconds, *rates, [round(wall, 4) for wall, _ in turns])
    return found


def compared(part: str, what: str, ratio: float, goal: str | None = None) -> Comparison:
    """With its goal, or the part's."""
    return Comparison(part, what, round(ratio, 3), GOALS[part] if goal is None else goal)


def cpu_ratio(one: Measurement, other: Measurement) -> float:
    """How many times as many samples `one` makes in the same CPU time."""
    return one.samples_per_cpu_second / other.samples_per_cpu_second


def measure_preparation(settings: BuildSettings) -> tuple[list[Measurement], list[Comparison]]:
    """Photo -> all but the latents, on one thread."""
    rows = planned_rows(settings, 0)[:AT_ONCE]
    photos = by_photo(rows)
    paths = {photo[0].photo_id: photo_path(settings.source.photos, "train", photo[0].photo_id) for photo in photos}
    boxes = [(path := paths[row.photo_id], box_in_photo(vars(row), *photo_size(path, frame="stored"))) for row in rows]

    def ours(groups: list[list[PlanRow]]) -> None:
        for group in groups:
            for outcome in prepare_photo(group, settings):
                if isinstance(outcome, Failure):
                    raise InputError(f"photo {paths[outcome.photo_id].resolve()}: {outcome.code}, {outcome.detail}")

    def published() -> None:
        random = Random(0)
        for path, box in boxes:
            published_recipe.prepare_sample(path, box, random)

    def decoder(groups: list[list[PlanRow]]) -> None:
        for group in groups:
            Image.open(io.BytesIO(files[group[0].photo_id])).load()

    files = {name: path.read_bytes() for name, path in paths.items()}
    shares = {f"{OBJECTS_PER_PHOTO} objects a photo": photos, "1 object a photo": [[row] for row in rows]}
    ways = {f"ours, {share}": partial(ours, groups) for share, groups in shares.items()}
    ways |= {f"decoder alone, {share}": partial(decoder, groups) for share, groups in shares.items()}
    if published_recipe.is_installed():
        ways[PUBLISHED] = published
    found = take_turns("preparation", ways, len(rows))
    ratios = []
    for share, goal in zip(shares, GOALS_OF_PREPARATION, strict=True):
        mine, alone = found[f"ours, {share}"], found[f"decoder alone, {share}"]
        if PUBLISHED in found:
            theirs = found[PUBLISHED]
            ratios.append(compared("preparation", f"{mine.way}, to the {PUBLISHED}", cpu_ratio(mine, theirs), goal))
            ratios.append(compared("preparation", f"{alone.way}, to the {PUBLISHED}", cpu_ratio(alone, theirs), "the limit"))
        ratios.append(compared("preparation", f"decoder's share of {mine.way}", cpu_ratio(mine, alone), ""))
    return list(found.values()), ratios


def measure_masks(settings: BuildSettings) -> tuple[list[Measurement], list[Comparison]]:
    """Masks alone, from a box to the mask of a view: ours is drawn at its size, the other at the photo's, and then resized."""
    frame, options = whole_photo(WIDTH, HEIGHT), settings.masks
    rows = planned_rows(settings, 0)[:AT_ONCE]
    boxes = [box_in_photo(vars(row), WIDTH, HEIGHT) for row in rows]

    def ours() -> None:
        for number, (box, window) in enumerate(zip(boxes, windows, strict=True)):
            for mask in range(MASKS_PER_BOX):
                names = (settings.seed, f"object {number}", "view", 0, "mask", mask)
                extended = extend_box(box, frame, options.max_extension, generator(*names, "extension"))
                visible = window.rectangle().intersection(frame)
                draw_mask(box, extended.intersection(visible), window, visible, settings, generator(*names, "shape"))

    def published() -> None:
        random = Random(0)
        for box in boxes:
            for _ in range(MASKS_PER_BOX):
                extended = published_recipe.extend_box(box, WIDTH, HEIGHT, random)
                mask = published_recipe.draw_mask(box, extended, WIDTH, HEIGHT, random)
                left, top, side = published_recipe.square_crop(extended, WIDTH, HEIGHT, random) or (0, 0, max(WIDTH, HEIGHT))
                published_recipe.resized(mask[:, top : top + side, left : left + side])

    windows = [
        square_window(box, WIDTH, HEIGHT, settings.views.zoom, settings.views.max_zoom, generator(number, "window"))
        for number, box in enumerate(boxes)
    ]
    ways = {"ours": ours} | ({PUBLISHED: published} if published_recipe.is_installed() else {})
    found = take_turns("masks", ways, len(boxes) * MASKS_PER_BOX)
    ratios = [cpu_ratio(found["ours"], found[PUBLISHED])] if PUBLISHED in found else []
    return list(found.values()), [compared("masks", f"ours, to the {PUBLISHED}", ratio) for ratio in ratios]


def forget_records(settings: BuildSettings) -> None:
    """So that shards are packed again: those that have a record are not."""
    for path in (settings.out / "shards").glob("*-*.json"):
        path.unlink()


def measure_pack(settings: BuildSettings) -> tuple[list[Measurement], list[Comparison]]:
    """What latents' arrays, encoding, tar, index and record add to the preparation."""
    leave_out_the_vae()
    packer = ShardPacker(settings, IDENTITY, "cpu")
    rows = planned_rows(settings, 0)

    def prepare() -> None:
        failures: list[Failure] = []
        for _ in packer._prepared(rows, failures, None):  # The packer's own: as many threads, as far ahead.
            pass
        assert not failures

    def pack() -> None:
        forget_records(settings)
        assert (packer.pack(0).record or {})["samples"] == len(rows)

    found = take_turns("pack", {"preparation alone": prepare, "whole pack": pack}, len(rows))
    alone, whole = found["preparation alone"], found["whole pack"]
    return list(found.values()), [
        compared("pack", "whole pack, to preparation alone: CPU time", cpu_ratio(alone, whole)),
        compared("pack", "whole pack, to preparation alone: seconds", alone.samples_per_second / whole.samples_per_second),
    ]


def measure_workers(settings: BuildSettings) -> tuple[list[Measurement], list[Comparison]]:
    """One packing actor and two, on the real Ray."""
    ray.init(
        num_cpus=max(WORKERS),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Workers find the hook by its module's name, unless this program is that module itself.
        runtime_env={"worker_process_setup_hook": leave_out_the_vae, "env_vars": {"PYTHONPATH": str(REPOSITORY)}},
    )
    paces: dict[int, list[Pace]] = {actors: [] for actors in WORKERS}
    for turn in range(WORKER_TURNS):
        for actors in WORKERS if turn % 2 == 0 else reversed(WORKERS):
            paces[actors].append(pace_of(settings, actors))
    ray.shutdown()
    found = []
    for actors, turns in paces.items():
        samples = turns[0].samples
        seconds, cpu_seconds = (statistics.median(getattr(turn, name) for turn in turns) for name in ("seconds", "cpu_seconds"))
        taken = [round(turn.seconds, 4) for turn in turns]
        way = f"{actors} worker{'s' if actors > 1 else ''}"
        rates = samples / seconds, samples / cpu_seconds
        found.append(Measurement("workers", way, samples, seconds, cpu_seconds, *rates, taken))
    one, two = found
    return found, [compared("workers", f"{two.way}, to {one.way}: seconds", two.samples_per_second / one.samples_per_second)]


def pace_of(settings: BuildSettings, actors: int) -> Pace:
    """Pack all shards, and look at what came after each actor's first one."""
    counts = list(Plan(settings.out / "plan.parquet").shards.values())
    chosen = settings.model_copy(update={"ray": settings.ray.model_copy(update={"actors": actors})})
    forget_records(settings)
    samples, began, cpu_began = 0, 0.0, 0.0
    for done, (group, error) in enumerate(pack_on_ray(chosen, IDENTITY, list(range(len(counts)))), start=1):
        if error:
            raise RuntimeError(error)
        if done > actors:
            samples += counts[group]
        if done == actors:
            began, cpu_began = time.perf_counter(), actors_cpu_seconds()
        if done == len(counts):  # While the actors are still there.
            return Pace(samples, time.perf_counter() - began, actors_cpu_seconds() - cpu_began)
    raise AssertionError("every shard is reported")


def actors_cpu_seconds() -> float:
    """CPU time so far of the packing actors that are alive; Ray names processes after what they do."""
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # It ended while we looked.
            if " ".join(process.cmdline()).startswith("ray::PackingActor"):
                times = process.cpu_times()
                spent += times.user + times.system
    return spent


def measure_memory(folder: Path, samples: int) -> tuple[list[Weight], list[Comparison]]:
    """Peaks of two fresh processes."""
    weights = [weigh(folder, samples, shards) for shards in (SHARDS // TENTH, SHARDS)]
    # PSS shrinks where other programs use the same libraries at the time: the kernel's peak where there is one.
    tenth, whole = (weight.high_water_mb or weight.peak_mb for weight in weights)
    return weights, [compared("memory", "all samples, to a tenth of them: peak", whole / tenth)]


def weigh(folder: Path, samples: int, shards: int) -> Weight:
    """Pack so many shards in a fresh process, and watch it.

    Raises:
        InputError: it failed.
    """
    report, log = folder / "report.json", folder / "log.txt"
    command = [sys.executable, "-m", "benchmarks.packing", "--samples", str(samples), "--folder", str(folder)]
    command += ["--run", str(shards)]
    sampler = run_watched(command, log, f"packing {shards} shards")
    return Weight(peak_mb=round(sampler.peak_mb, 1), looks=sampler.samples, **json.loads(report.read_text()))


def run_packer(folder: Path, samples: int, shards: int) -> None:
    """What `weigh` watches."""
    leave_out_the_vae()
    settings = plan(folder / WORLD, folder / "many_shards", samples // SHARDS)
    packer = ShardPacker(settings, IDENTITY, "cpu")
    forget_records(settings)
    start_mb = high_water_mb()
    records = [packer.pack(group).record for group in range(shards)]
    packed = sum(record["samples"] for record in records if record)
    weight = {"samples": packed, "start_mb": start_mb, "high_water_mb": high_water_mb()}
    (folder / "report.json").write_text(json.dumps(weight))


def tables_of(measurements: Sequence[Measurement], weights: Sequence[Weight], comparisons: Sequence[Comparison]) -> list[Table]:
    """The tables to print."""
    rates = Table("part", "way", "samples", "seconds", "samples/s", "CPU ms each", "CPUs")
    for one in measurements:
        numbers = f"{one.samples:,}", f"{one.seconds:.2f}", f"{one.samples_per_second:,.1f}"
        rates.add_row(
            one.part, one.way, *numbers, f"{1000 / one.samples_per_cpu_second:.2f}", f"{one.cpu_seconds / one.seconds:.2f}"
        )
    memory = Table("part", "samples", "MB before", "peak MB", "peak PSS MB")
    for weight in weights:
        kernels = ("-" if peak is None else f"{peak:,.0f}" for peak in (weight.start_mb, weight.high_water_mb))
        memory.add_row("memory", f"{weight.samples:,}", *kernels, f"{weight.peak_mb:,.0f}")
    ratios = Table("part", "ratio of", "measured", "goal")
    for ratio in comparisons:
        ratios.add_row(ratio.part, ratio.what, f"{ratio.ratio:.2f}", ratio.goal)
    for table, first in ((rates, 2), (memory, 1), (ratios, 2)):
        for column in table.columns[first:]:
            column.justify = "right"
    return [table for table in (rates, memory, ratios) if table.row_count]


def measure(folder: Path, parts: Sequence[str], samples: int) -> tuple[list[Measurement], list[Weight], list[Comparison]]:
    """All that was asked for, in a folder that holds the world."""
    world = folder / WORLD
    many, whole = plan(world, folder / "many_shards", samples // SHARDS), plan(world, folder / "one_shard", samples // TENTH)
    works = {
        "preparation": lambda: measure_preparation(whole),
        "masks": lambda: measure_masks(whole),
        "pack": lambda: measure_pack(whole),
        "workers": lambda: measure_workers(many),
        "memory": lambda: measure_memory(folder, samples),
    }
    measurements: list[Measurement] = []
    weights: list[Weight] = []
    comparisons: list[Comparison] = []
    for part in parts:
        found, ratios = works[part]()
        (weights if part == "memory" else measurements).extend(found)
        comparisons += ratios
    return measurements, weights, comparisons


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder with JPEGs (default: photos are drawn)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="for workers and memory (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS / "packing.json", help="file to write (default: %(default)s)")
    # How this program starts itself to have its memory watched.
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.samples < FEWEST:
        raise InputError(f"--samples {given.samples}: at least {FEWEST}, since they are cut into {SHARDS} shards")
    # One thread is one thread.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if given.run:
        run_packer(given.folder, given.samples, given.run)
        return
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = find_photos(given.photos) if given.photos else draw_photos(folder / "drawn")
        make_world(folder / WORLD, files, given.samples)
        measurements, weights, comparisons = measure(folder, given.parts, given.samples)
        photo_bytes = round(statistics.fmean(path.stat().st_size for path in files))
    console = Console(width=TABLE_WIDTH)
    for table in tables_of(measurements, weights, comparisons):
        console.print(table)
    packages = ["numpy", "opencv-python-headless", "pillow", "pyarrow", "ray", "torch"]
    if published_recipe.is_installed():
        packages.append("bezier")
    else:
        console.print(HOW_TO_INSTALL)
    result = {
        "date": today(),
        "machine": machine,
        "versions": describe_versions(sorted(packages)),
        "photos": {"drawn": not given.photos, "files": len(files), "mean_bytes": photo_bytes},
        "objects_per_photo": OBJECTS_PER_PHOTO,
        "ways": [asdict(one) for one in measurements],
        "memory": [asdict(one) for one in weights],
        "ratios": [asdict(one) for one in comparisons],
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
