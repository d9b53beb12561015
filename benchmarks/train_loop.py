"""What the training loop costs beyond forward, backward and the optimizer's step, and how long its steps wait for data.

    loop    pbe_train.train.train as a user starts it: worker processes, metrics, moving average, watchdog, waiting for signals
    bare    forward, backward, clip and AdamW on the same batches, which lie ready in memory

Usage:  python -m benchmarks.train_loop --dataset data/tiny/dataset
        python -m benchmarks.train_loop --results benchmarks/results/train_loop.json
        builds a dataset of the tiny preset from 200 photos into a temporary folder first, since how long a step takes does not
        depend on their number; prints the table; writes it only where --results says so. Other options go to the trainer.

The tiny preset on a CPU, in one thread. The ways go in turns, there and back, each turn going on where the way's last one ended,
so that both train on the same steps' batches; at the end their weights must be the same to the last bit, or what was compared is
not the same work. A turn's first steps, in which worker processes start, are not timed, nor are pictures, checkpoints and the
validation loss, which a run has seldom. Figures are medians over the turns. The overhead is the median of the turns' ratios of
CPU time of the training process, with all its threads: other programs on the machine change it little. Waiting is time by the
clock, which they do change.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # Before anything imports albumentations.

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pbe_train.train
from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from pbe_core.errors import InputError, run_program
from pbe_core.randomness import name_hash
from pbe_core.settings import REPOSITORY, load_settings, preset
from pbe_core.vae import weights_sha256
from pbe_train.checkpoints.from_pretrained import init_from_pretrained
from pbe_train.checkpoints.networks import load_dataset_vae
from pbe_train.config import TRAIN_SPLIT, TrainSettings
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import Batch, TrainingDataset
from pbe_train.model.diffusion import noise_losses
from pbe_train.model.paint_model import prepare
from pbe_train.model.schedulers import training_schedule
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pbe_train.training.optimizer import make_optimizer, set_learning_rate
from pbe_train.training.progress import Progress

TURNS, STEPS, LINE, PHOTOS = 7, 20, 5, 200
LOOP, BARE = "loop", "bare"
GOALS = {"time waiting for data": "< 2 %", "CPU time, loop / bare - 1": "< 5 %"}


@dataclass(frozen=True)
class Turn:
    """A turn of one way, without its first steps."""

    seconds_per_step: float
    cpu_seconds_per_step: float
    """Of the training process with all its threads, without its worker processes."""
    waiting: float
    """Share of the time in which a step waited for its batch; of batches in memory it is 0."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table: medians over the turns."""

    way: str
    seconds_per_step: float
    cpu_seconds_per_step: float
    waiting: float
    turns: list[float]
    """CPU seconds of a step in each turn."""


@dataclass(frozen=True)
class Finding:
    """A share, and what it should be."""

    what: str
    share: float
    goal: str


class Bare:
    """Forward, backward, clip and AdamW, and nothing else; starts from the weights that a run of these settings starts from."""

    def __init__(self, settings: TrainSettings, ranks: Distributed, reader: ShardReader) -> None:
        torch.manual_seed(name_hash(settings.seed, "train", "weights", bits=32))
        model, _ = init_from_pretrained(settings, load_dataset_vae(settings.model.vae, reader.folder, reader.info))
        self.model = prepare(model, settings.model, ranks.device).train()
        self.settings, self.ranks = settings, ranks
        self.trained = self.model.trained()
        self.optimizer = make_optimizer(self.trained, settings.optimizer)
        self.schedule = training_schedule(settings.prediction)

    def step(self, batch: Batch, step: int) -> None:
        """One optimizer step."""
        with self.ranks.autocast(self.settings.precision):
            losses = noise_losses(self.model, self.schedule, batch)
        torch.autograd.backward(losses.mean())
        nn.utils.clip_grad_norm_(self.trained.values(), self.settings.optimizer.gradient_clip or float("inf"))
        set_learning_rate(self.optimizer, self.settings.optimizer, step, self.settings.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def turn(self, batches: Sequence[Batch], first: int, line: int) -> Turn:
        """These batches from step `first` on, all but the first `line` of them timed."""
        for number, batch in enumerate(batches):
            if number == line:
                start, cpu = time.perf_counter(), time.process_time()
            self.step(batch, first + number)
        timed = len(batches) - line
        return Turn((time.perf_counter() - start) / timed, (time.process_time() - cpu) / timed, 0.0)


class Clocked(Progress):
    """Notes the CPU time of this process at each line of metrics."""

    clock: ClassVar[dict[int, float]] = {}

    def log(self, step: int, figures: Mapping[str, float], now: float, wait_seconds: float) -> None:
        """As `Progress.log`."""
        super().log(step, figures, now, wait_seconds)
        self.clock[step] = time.process_time()


def build(folder: Path) -> Path:
    """The tiny dataset, as `make shards` builds it, in `folder / "dataset"`."""
    photos, out = folder / "photos", folder / "dataset"
    options = ["--source.annotations", str(photos), "--source.photos", str(photos), "--out", str(out)]
    for command in (
        ["-m", "tiny_world.make_photos", "--out", str(photos), "--train", str(PHOTOS), "--validation", "16"],
        ["pipelines/build.py", "--config", str(preset("tiny")), *options],
    ):
        done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{' '.join(command)} failed: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
    return out


def settings_of(dataset: Path, out: Path, steps: int, line: int, options: Sequence[str] = ()) -> TrainSettings:
    """The tiny preset, with nothing that happens seldom."""
    seldom = ["--pictures.every=0", "--validation.every=0", f"--checkpoint_every={10**9}", "--keep_last=1"]
    given = ["--threads=1", f"--dataset={dataset}", f"--out={out}", f"--steps={steps}", f"--log_every={line}", *seldom, *options]
    return load_settings(TrainSettings, "train", given, preset("tiny"))


def loop_turn(settings: TrainSettings, ranks: Distributed, first: int) -> Turn:
    """Train from step `first` to the last step of the settings; the lines of metrics tell how long that took."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        train(settings, ranks)
    lines = [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
    # The first line of a turn has the start of the worker processes in it.
    begin = first + settings.log_every
    timed = [line for line in lines if line["step"] > begin]
    seconds = [settings.global_batch / line["samples_per_second"] for line in timed]
    waiting = sum(line["data_wait"] * each for line, each in zip(timed, seconds, strict=True)) / sum(seconds)
    cpu = (Clocked.clock[settings.steps] - Clocked.clock[begin]) / (settings.steps - begin)
    return Turn(statistics.fmean(seconds), cpu, waiting)


def batches_of(items: TrainingDataset, first: int, steps: int) -> list[Batch]:
    """The batches of so many steps, in memory. Raises InputError where they cannot be made."""
    found = []
    for step in range(first, first + steps):
        loaded = items[[(step, slot) for slot in range(items.settings.global_batch)]]
        if isinstance(loaded, InputError):
            raise loaded
        found.append(loaded.batch)
    return found


def measure(
    dataset: Path, folder: Path, turns: int, steps: int, line: int, options: Sequence[str] = ()
) -> tuple[list[Measurement], list[Finding], str]:
    """Let the ways take turns.

    Args:
        dataset: of the tiny preset.
        folder: to train in.
        turns: of each way.
        steps: of a turn.
        line: steps between two lines of metrics; so many are not timed at a turn's begin.
        options: for the trainer, over the preset's.

    Returns:
        A row for each way, the shares, and the hash of the weights that both came to.

    Raises:
        InputError: the dataset cannot be read.
    """
    settings = settings_of(dataset, folder / "run", steps, line, options)
    ranks = Distributed(0, 1, torch.device("cpu"))
    torch.set_num_threads(settings.threads or 1)
    pbe_train.train.Progress = Clocked  # type: ignore[misc]
    reader = ShardReader(dataset, TRAIN_SPLIT)
    bare = Bare(settings, ranks, reader)
    items = TrainingDataset(settings, reader, bare.model.conditioner.model.config.image_size)

    def run_loop(first: int) -> Turn:
        return loop_turn(settings_of(dataset, folder / "run", first + steps, line, options), ranks, first)

    def run_bare(first: int) -> Turn:
        return bare.turn(batches_of(items, first, steps), first, line)

    ways: dict[str, Callable[[int], Turn]] = {LOOP: run_loop, BARE: run_bare}
    taken: dict[str, list[Turn]] = {way: [] for way in ways}
    for number in range(turns):
        for way in list(ways) if number % 2 == 0 else reversed(ways):
            taken[way].append(ways[way](number * steps))
    return rows_of(taken), findings_of(taken), agreed_weights(settings, bare)


def agreed_weights(settings: TrainSettings, bare: Bare) -> str:
    """The hash of the weights that both ways came to.

    Raises:
        RuntimeError: they came to different ones.
    """
    (looped,) = json.loads((settings.out / "finished.json").read_text())["weights_sha256"]
    if looped != (own := weights_sha256(bare.model.kept())):
        raise RuntimeError(f"loop and bare steps did not train the same: weights {looped[:12]} and {own[:12]}")
    return own


def rows_of(taken: Mapping[str, Sequence[Turn]]) -> list[Measurement]:
    """A row for each way: medians."""
    rows = []
    for way, turns in taken.items():
        fields = ("seconds_per_step", "cpu_seconds_per_step", "waiting")
        medians = (statistics.median(getattr(turn, field) for turn in turns) for field in fields)
        rows.append(Measurement(way, *medians, [round(turn.cpu_seconds_per_step, 4) for turn in turns]))
    return rows


def findings_of(taken: Mapping[str, Sequence[Turn]]) -> list[Finding]:
    """Waiting and overhead: of each turn, then their median."""
    pairs = zip(taken[LOOP], taken[BARE], strict=True)
    overhead = statistics.median(loop.cpu_seconds_per_step / bare.cpu_seconds_per_step - 1 for loop, bare in pairs)
    shares = (statistics.median(turn.waiting for turn in taken[LOOP]), overhead)
    return [Finding(what, share, goal) for (what, goal), share in zip(GOALS.items(), shares, strict=True)]


def tables_of(rows: Sequence[Measurement], findings: Sequence[Finding]) -> list[Table]:
    """The tables to print."""
    ways, shares = Table("way", "CPU ms a step", "ms a step", "waiting"), Table("share", "measured", "goal")
    for row in rows:
        ways.add_row(
            row.way, f"{1000 * row.cpu_seconds_per_step:.1f}", f"{1000 * row.seconds_per_step:.1f}", f"{row.waiting:.2%}"
        )
    for one in findings:
        shares.add_row(one.what, f"{one.share:.2%}", one.goal)
    for table in (ways, shares):
        for column in table.columns[1:]:
            column.justify = "right"
    return [ways, shares]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="of the tiny preset (default: it is built into a temporary folder)")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a turn (default: %(default)s)")
    parser.add_argument("--line", type=int, default=LINE, help="first steps of a turn, not timed (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"file to write, as {RESULTS.name}/train_loop.json (default: none)")
    given, options = parser.parse_known_args()
    if given.turns < 1 or given.line < 1 or given.steps < 2 * given.line or given.steps % given.line:
        raise InputError(
            f"--steps {given.steps}: must be a multiple of --line {given.line}, at least twice that, in 1 turn or more"
        )
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = (given.dataset or build(Path(scratch))).resolve()
        rows, findings, weights = measure(dataset, Path(scratch), given.turns, given.steps, given.line, options)
    console = Console()
    for table in tables_of(rows, findings):
        console.print(table)
    if given.results:
        result = {
            "date": today(),
            "machine": machine,
            "versions": describe_versions(["numpy", "torch"]),
            "turns": given.turns,
            "timed_steps": given.steps - given.line,
            "weights_sha256": weights,
            "ways": [asdict(row) for row in rows],
            "shares": [asdict(one) for one in findings],
        }
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
