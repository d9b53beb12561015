"""What a reference costs on its way into the encoder: our two presets of augmentation, beside the published chain called by name.

    paper       prepare_reference: fitted to 224 px, the published distribution
    strong      prepare_reference: fitted to 224 px, our own parts, the background erased where the draw says so
    published   the published chain of albumentations' transforms (published_recipe.py), from the same pixels

Usage:  python -m benchmarks.augment
        python -m benchmarks.augment --results benchmarks/results/augment.json
        prints the table; writes it only where --results says so

From the decoded reference, of the sizes that builds store, to the square of 224 px; all in one run and one thread, the ways in
turns, there and back. Figures are medians of the turns. References are drawn; what is in them costs nothing more or less, but for
the JPEGs of `compression`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # Before anything imports albumentations.

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.published_recipe import REFERENCE, published_augmentation
from pbe_core.errors import InputError, run_program
from pbe_train.config import AugmentationPreset
from pbe_train.data.references import Augmentation, prepare_reference

SAMPLES, TURNS = 400, 7
# Height and width, px, of stored references: the shorter side at 224 px or less, the longer at 448 at most.
SIZES = ((224, 224), (224, 300), (336, 224), (448, 224), (90, 140))
PRESETS: tuple[AugmentationPreset, ...] = ("paper", "strong")
PUBLISHED = "published chain, by name"
GOALS = {"paper": "<= 1.5", "strong": "<= 3"}


@dataclass(frozen=True)
class Measurement:
    """One row of the table: medians over the turns."""

    way: str
    samples: int
    """In each turn."""
    cpu_ms_per_sample: float
    goal: str | None
    turns: list[float]
    """CPU ms per sample of each turn."""


def draw_references() -> list[tuple[np.ndarray, np.ndarray]]:
    """A reference of each of `SIZES`, RGB, and which of its pixels are an object's: an ellipse."""
    random, found = np.random.default_rng(0), []
    for height, width in SIZES:
        coarse = random.integers(0, 256, (12, 12, 3), np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        outline = np.zeros((height, width), np.uint8)
        cv2.ellipse(outline, (width // 2, height // 2), (width // 3, height // 3), 0, 0, 360, 1, -1)
        found.append((picture, outline.astype(bool)))
    return found


def ways() -> dict[str, Callable[[int], np.ndarray]]:
    """Name of a way -> what makes its square of sample number so and so."""
    references = draw_references()
    chain = published_augmentation()

    def ours(preset: AugmentationPreset) -> Callable[[int], np.ndarray]:
        settings = Augmentation(preset)

        def make(number: int) -> np.ndarray:
            picture, outline = references[number % len(references)]
            return prepare_reference(settings, "squash", picture, outline, REFERENCE, "benchmark", number)

        return make

    def published(number: int) -> np.ndarray:
        square: np.ndarray = chain(image=references[number % len(references)][0])["image"]
        return square

    return {**{preset: ours(preset) for preset in PRESETS}, PUBLISHED: published}


def measure(samples: int) -> list[Measurement]:
    """Run the ways one after the other, then back, and so on, after one turn that is not counted."""
    made = ways()
    taken: dict[str, list[float]] = {way: [] for way in made}
    for turn in range(-1, TURNS):
        for way in list(made) if turn % 2 == 0 else reversed(made):
            start = time.process_time()
            for number in range(samples):
                made[way](number)
            if turn >= 0:
                taken[way].append(round(1000 * (time.process_time() - start) / samples, 4))
    return [Measurement(way, samples, statistics.median(turns), GOALS.get(way), turns) for way, turns in taken.items()]


def table_of(measurements: Sequence[Measurement]) -> Table:
    """The table to print."""
    table = Table("way", "samples", "CPU ms each", "goal")
    for one in measurements:
        table.add_row(one.way, f"{one.samples:,}", f"{one.cpu_ms_per_sample:.2f}", one.goal or "")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in each turn (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"file to write, as {RESULTS.name}/augment.json (default: none)")
    given = parser.parse_args()
    if given.samples < 1:
        raise InputError(f"--samples {given.samples}: at least 1")
    # One thread is one thread.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = describe_machine()
    measurements = measure(given.samples)
    Console().print(table_of(measurements))
    if given.results:
        result = {
            "date": today(),
            "machine": machine,
            "versions": describe_versions(["albumentations", "numpy", "opencv-python-headless", "torch"]),
            "sizes": SIZES,
            "ways": [asdict(one) for one in measurements],
        }
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
