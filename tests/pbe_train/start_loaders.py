"""Loads batches with worker processes until somebody ends it, and says who the workers are: what a training is to its loader.

    python -m tests.pbe_train.start_loaders CONFIG OUT METHOD        # METHOD: fork, spawn or forkserver

Prints a line of JSON, `{"workers": [process ids], "threads": [OpenCV's in each]}`, as soon as each worker has made a batch. For
each line that it reads it prints another one, when each worker has made batches since.
"""

import json
import os
import sys
from pathlib import Path

import cv2

from pbe_core.errors import InputError
from pbe_core.settings import load_settings
from pbe_train.config import TrainSettings
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import Loaded, TrainingDataset, load_batches

WORKERS = 2


class Telling(TrainingDataset):
    """TrainingDataset whose worker writes into the run's folder how many threads OpenCV has there."""

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Loaded | InputError:
        told = self.settings.out / f"{os.getpid()}.threads"
        if not told.exists():
            told.write_text(str(cv2.getNumThreads()))
        return super().__getitem__(pairs)


def main(config: str, out: str, method: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    options = ["--config", config, f"--out={out}", f"--loader.workers={WORKERS}", "--steps=1000"]
    settings = load_settings(TrainSettings, "train", options)
    batches = load_batches(Telling(settings, ShardReader(settings.dataset, "train"), 32), 0, 1, 0, method)
    for _ in range(WORKERS):
        next(batches)
    workers = batches.workers
    threads = [int((Path(out) / f"{worker}.threads").read_text()) for worker in workers]
    print(json.dumps({"workers": workers, "threads": threads}), flush=True)
    for _ in sys.stdin:
        # Those that were made before are taken first: four of each worker.
        for _ in range(5 * WORKERS):
            next(batches)
        print("another batch of each", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
