"""The trainer as a program of its own: forked from a process that has imported it, as an import takes seconds; or by torchrun.

    torchrun --nproc-per-node 2 tests/pbe_train/programs.py RECORDS --config ... (options of train.py)

Each process leaves RECORDS/start<restarts of torchrun>-rank<rank>-<process id>.jsonl, one line a (step, slot): every sample that
reached the loop.
"""

import hashlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np

from pbe_core.errors import run_program
from pbe_train import train as train_module
from pbe_train.data.training_dataset import Batch, Batches, TrainingDataset, kill_workers, load_batches
from pbe_train.training import setup

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.pbe_train.programs"])

# (step, slot) -> key of the sample, diffusion time, hash of the noise, hash of all that the model sees.
Seen = dict[tuple[int, int], tuple[str, int, str, str]]


def start(options: Sequence[str], log: Path, records: Path | None = None, **environment: object) -> ForkServerProcess:
    """`python pbe_train/train.py OPTIONS`, on the CPU, in a session of its own; what it prints goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    given = {"CUDA_VISIBLE_DEVICES": "", **{key: str(value) for key, value in environment.items()}}
    process = FORKS.Process(target=_run, args=(list(options), log, records, given))
    process.start()
    return process


def start_ranks(ranks: int, options: Sequence[str], folder: Path) -> list[ForkServerProcess]:
    """As torchrun starts them: the run, the records and a log of each rank lie in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    given = [f"--out={folder / 'run'}", *options]
    return [
        start(given, folder / f"log{rank}", folder / "records", RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(ranks)
    ]


def _run(options: list[str], log: Path, records: Path | None, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["train", *options]
    if records:
        setup.load_batches = record_to(records)
    try:
        run_program(train_module.main)
    finally:
        kill_workers()  # What is registered with atexit is not called in such a process.


def exit_with_import_of(name: str) -> None:
    """Exits with 1 if the trainer has imported a module."""
    sys.exit(name in sys.modules)


def record_to(folder: Path) -> Callable[..., Batches]:
    """A `load_batches` whose batches are written down when the loop takes them."""
    folder.mkdir(parents=True, exist_ok=True)

    def load(items: TrainingDataset, first_step: int, ranks: int, rank: int) -> Batches:
        path = folder / f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-rank{rank}-{os.getpid()}.jsonl"
        return Recorded(load_batches(items, first_step, ranks, rank), path)

    return load


class Recorded(Batches):
    """The batches of `load_batches`, written to a file one by one."""

    def __init__(self, batches: Batches, path: Path) -> None:
        super().__init__(batches.items, batches.sampler)
        self._pairs = iter(self.sampler)
        self._path = path

    def __next__(self) -> Batch:
        batch = super().__next__()
        channels = self.items.reader.info.vae.latent_channels
        lines, pairs = [], next(self._pairs)
        keys = self.items.keys(pairs[0][0])
        for place, (step, slot) in enumerate(pairs):
            planes = batch.planes[place].numpy()
            rest = batch.reference[place].numpy().tobytes() + bytes([batch.dropped[place]])
            line = [step, slot, keys[slot], int(batch.timestep[place]), hashed(planes[-channels:]), hashed(planes, rest)]
            lines.append(json.dumps(line) + "\n")
        with self._path.open("a") as file:
            file.write("".join(lines))
        return batch


def hashed(array: np.ndarray, rest: bytes = b"") -> str:
    return hashlib.sha256(array.tobytes() + rest).hexdigest()[:16]


def read_records(folder: Path, name: str = "*") -> Seen:
    """What was recorded by the processes whose file is called so; a (step, slot) that came twice must have been the same."""
    seen: Seen = {}
    for path in sorted(folder.glob(f"{name}.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # Else its process was killed in the middle.
                step, slot, *what = json.loads(line)
                assert seen.setdefault((step, slot), tuple(what)) == tuple(what), f"{path}: step {step}, slot {slot} changed"
    return seen


if __name__ == "__main__":
    setup.load_batches = record_to(Path(sys.argv.pop(1)))
    run_program(train_module.main)
