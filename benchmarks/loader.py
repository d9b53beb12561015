"""How fast samples reach the model on one core: from our shards, the published way from photos, and streamed by webdataset.

    ours        TrainingDataset.make: random access, decoding, posterior draws, noise, mask, the whole augmentation
    published   the same boxes from their photos' JPEGs, and the published chain of augmentation (published_recipe.py)
    streamed    the same shards as a stream through `webdataset`, with the same decoding, draws and augmentation as ours

Usage:  python -m benchmarks.loader
        python -m benchmarks.loader --photos FOLDER_WITH_JPEGS --results benchmarks/results/loader.json
        prints the table; writes it only where --results says so

All in one run and one thread, the ways in turns, there and back; figures are medians of the turns, ratios are of CPU time. The
settings are the paper's, views are 512 px. In the place of the VAE stands noise of the right shape: decoding does not care. The
published way has no latents: its two VAE encodings a sample, in the training step, are not counted. Files are in the page cache.

`streamed` leaves out what random access pays for: no index, no CRC-32. It sees samples in the order of the tars.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from unittest.mock import patch

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # Before anything imports albumentations.

import cv2
import numpy as np
import torch
import webdataset
from rich.console import Console
from rich.table import Table

import pipelines.dataset.pack
from benchmarks import published_recipe
from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.packing import HOW_TO_INSTALL, IDENTITY, NullEncoder, by_photo, plan, planned_rows
from benchmarks.packing_world import draw_photos, find_photos, make_world
from pbe_core.errors import InputError, run_program
from pbe_core.images.crop import Rectangle
from pbe_core.images.decode import photo_size
from pbe_core.photo_files import photo_path
from pbe_train.config import TrainSettings
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import ShardReader, TrainingSample
from pbe_train.data.training_dataset import TrainingDataset
from pipelines.config import BuildSettings
from pipelines.dataset.finalize import finalize
from pipelines.dataset.folder import ShardFolder
from pipelines.dataset.pack import ShardPacker
from pipelines.dataset.plan_shards import Plan
from pipelines.geometry import box_in_photo
from schemas.dataset import VaeIdentity

SAMPLES, SHARD_SAMPLES, AT_ONCE, TURNS = 400, 100, 200, 7
FEWEST = 8
REFERENCE = 224
VAE = VaeIdentity(source="noise", sha256="0" * 64, config={}, scaling_factor=0.18215, latent_channels=4, downsampling=8)
OURS, PUBLISHED, STREAMED = "ours", "published way", "webdataset, streamed"
GOALS = {PUBLISHED: ">= 15", STREAMED: ">= 1"}
TABLE_WIDTH = 100


@dataclass(frozen=True)
class Measurement:
    """One row of the table: medians over the turns."""

    way: str
    samples: int
    """In each turn."""
    seconds: float
    cpu_seconds: float
    samples_per_second: float
    cpu_ms_per_sample: float
    turns: list[float]
    """CPU seconds of each turn."""


@dataclass(frozen=True)
class Comparison:
    """How many times as many samples ours makes in the same CPU time."""

    what: str
    ratio: float
    goal: str


class NoiseEncoder(NullEncoder):
    """In the place of the VAE: noise of the right shape, standard deviations not negative."""

    def encode_samples(self, views: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """As `NullEncoder.encode_samples`."""
        shape = super().encode_samples(views, masks).shape
        return np.abs(np.random.default_rng(0).standard_normal(shape, np.float32)).astype(np.float16)


def build(folder: Path, files: Sequence[Path], samples: int, shard_samples: int) -> BuildSettings:
    """Photos -> a finished dataset in `folder / "dataset"`; returns its settings."""
    make_world(folder / "world", files, samples)
    settings = plan(folder / "world", folder / "dataset", shard_samples)
    with patch.object(pipelines.dataset.pack, "load_encoder", lambda *_: NoiseEncoder()):
        packer = ShardPacker(settings, IDENTITY, "cpu")
    planned = Plan(settings.out / "plan.parquet").shards
    records = [packer.pack(number).record or {} for number in range(len(planned))]
    finalize(settings, ShardFolder(settings), IDENTITY, VAE, records, planned)
    return settings


def train_settings(dataset: Path) -> TrainSettings:
    """The paper's, but for the networks, which are not loaded."""
    return TrainSettings(dataset=dataset, model={"encoder": "none", "vae": "none"})


def make_ours(items: TrainingDataset, samples: int) -> Callable[[], None]:
    """Each call makes the next `samples` items, as a worker process does."""
    steps = iter(range(1_000_000))

    def make() -> None:
        step = next(steps)
        for slot in range(samples):
            items[[(step, slot)]]

    return make


class FromMembers(ShardReader):
    """In the place of a ShardReader: the sample is the one that was streamed last."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.folder = reader.folder
        self.info = reader.info
        self.counts = reader.counts
        self.shards = reader.shards
        self.members: Mapping[str, bytes] = {}

    def read_for_training(
        self,
        place: SampleLocation,
        choose: Callable[[str, int], int],
        outlined: bool = False,
        choose_references: Callable[[str, int], tuple[int, ...]] | None = None,
    ) -> TrainingSample:
        """Decode what was streamed, with the reader's own decoders."""
        members = {name.replace(".", "_"): data for name, data in self.members.items() if isinstance(data, bytes)}
        return self.reader.decode_for_training(members, str(self.members["__key__"]), choose, outlined)


def make_streamed(dataset: Path, reader: ShardReader, samples: int) -> Callable[[], None]:
    """Each call makes the next `samples` items of a stream of all shards, over and over."""
    source = FromMembers(reader)
    items = TrainingDataset(train_settings(dataset), source, REFERENCE)
    urls = [str(dataset / "shards" / f"{name}.tar") for name in reader.shards]

    def stream() -> Iterator[Mapping[str, bytes]]:
        while True:
            yield from webdataset.WebDataset(urls, shardshuffle=False)

    streamed = stream()
    steps = iter(range(1_000_000))

    def make() -> None:
        step = next(steps)
        for slot in range(samples):
            source.members = next(streamed)
            items[[(step, slot)]]

    return make


def make_published(settings: BuildSettings, samples: int) -> Callable[[], None]:
    """Each call makes the same boxes' samples from their photos."""
    rows = planned_rows(settings, 0)
    paths = {photo[0].photo_id: photo_path(settings.source.photos, "train", photo[0].photo_id) for photo in by_photo(rows)}
    boxes: list[tuple[Path, Rectangle]] = [
        (path := paths[row.photo_id], box_in_photo(vars(row), *photo_size(path, frame="stored"))) for row in rows
    ]
    augmentation = published_recipe.published_augmentation()
    numbers = iter(range(1_000_000))

    def make() -> None:
        random = Random(0)
        for _ in range(samples):
            number = next(numbers)
            path, box = boxes[number % len(boxes)]
            published_recipe.prepare_sample(path, box, random, augmentation)

    return make


def take_turns(ways: Mapping[str, Callable[[], None]], samples: Mapping[str, int]) -> dict[str, Measurement]:
    """Run the ways one after the other, then back, and so on, after one turn that is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(-1, TURNS):
        for way in list(ways) if turn % 2 == 0 else reversed(ways):
            start, cpu_start = time.perf_counter(), time.process_time()
            ways[way]()
            if turn >= 0:
                taken[way].append((time.perf_counter() - start, time.process_time() - cpu_start))
    found = {}
    for way, turns in taken.items():
        seconds, cpu_seconds = (statistics.median(times) for times in zip(*turns, strict=True))
        rate, each = samples[way] / seconds, 1000 * cpu_seconds / samples[way]
        found[way] = Measurement(way, samples[way], seconds, cpu_seconds, rate, each, [round(cpu, 4) for _, cpu in turns])
    return found


def measure(folder: Path, files: Sequence[Path], samples: int) -> tuple[list[Measurement], list[Comparison]]:
    """Build the dataset and let the ways take turns."""
    shard_samples, at_once = min(SHARD_SAMPLES, samples // 2), min(AT_ONCE, samples)
    settings = build(folder, files, samples, shard_samples)
    reader = ShardReader(settings.out, "train")
    items = TrainingDataset(train_settings(settings.out), reader, REFERENCE)
    counts = {OURS: at_once, STREAMED: at_once}
    ways = {OURS: make_ours(items, at_once), STREAMED: make_streamed(settings.out, reader, at_once)}
    if published_recipe.is_installed():
        counts[PUBLISHED] = max(1, at_once // 4)  # It takes so much longer.
        ways[PUBLISHED] = make_published(settings, counts[PUBLISHED])
    found = take_turns(ways, counts)
    ratios = [
        Comparison(f"{OURS}, to {way}", round(found[way].cpu_ms_per_sample / found[OURS].cpu_ms_per_sample, 3), goal)
        for way, goal in GOALS.items()
        if way in found
    ]
    return list(found.values()), ratios


def tables_of(measurements: Sequence[Measurement], comparisons: Sequence[Comparison]) -> list[Table]:
    """The tables to print."""
    rates, ratios = Table("way", "samples", "samples/s", "CPU ms each", "CPUs"), Table("CPU time", "measured", "goal")
    for one in measurements:
        numbers = f"{one.samples_per_second:,.1f}", f"{one.cpu_ms_per_sample:.2f}", f"{one.cpu_seconds / one.seconds:.2f}"
        rates.add_row(one.way, f"{one.samples:,}", *numbers)
    for ratio in comparisons:
        ratios.add_row(ratio.what, f"{ratio.ratio:.2f}", ratio.goal)
    for table in (rates, ratios):
        for column in table.columns[1:]:
            column.justify = "right"
    return [table for table in (rates, ratios) if table.row_count]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder with JPEGs (default: photos are drawn)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in the dataset (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"file to write, as {RESULTS.name}/loader.json (default: none)")
    parser.add_argument("--keep", type=Path, help="new folder to leave the dataset in, as for benchmarks.gpu --dataset")
    given = parser.parse_args()
    if given.samples < FEWEST:
        raise InputError(f"--samples {given.samples}: at least {FEWEST}")
    # One thread is one thread.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = find_photos(given.photos) if given.photos else draw_photos(folder / "drawn")
        measurements, comparisons = measure(folder, files, given.samples)
        if given.keep:
            shutil.copytree(folder / "dataset", given.keep)
        photo_bytes = round(statistics.fmean(path.stat().st_size for path in files))
    console = Console(width=TABLE_WIDTH)
    for table in tables_of(measurements, comparisons):
        console.print(table)
    packages = ["albumentations", "numpy", "opencv-python-headless", "pillow", "pyarrow", "torch", "webdataset"]
    if published_recipe.is_installed():
        packages.append("bezier")
    else:
        console.print(HOW_TO_INSTALL)
    if given.results:
        result = {
            "date": today(),
            "machine": machine,
            "versions": describe_versions(sorted(packages)),
            "photos": {"drawn": not given.photos, "files": len(files), "mean_bytes": photo_bytes},
            "ways": [asdict(one) for one in measurements],
            "ratios": [asdict(one) for one in comparisons],
        }
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
