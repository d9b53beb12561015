"""Where a run's metrics go: metrics.jsonl, TensorBoard, Weights & Biases if `wandb` is set, and a status line.

The status line has what is being done, and how much of it: steps, or what lies between two of them (pictures, the loss of
held-out samples, a checkpoint). On a terminal it is a bar, drawn each second. In a file or a pipe there is a line with each line
of metrics, and another one wherever there was none for half a minute.
"""

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pbe_core.errors import InputError
from pbe_core.files import sync, write_atomically
from pbe_core.images.sheets import Picture
from pbe_core.progress import DRAW_SECONDS, LINE_SECONDS, Beat, print_line
from pbe_core.progress import Progress as Work
from pbe_core.words import duration
from pbe_train.config import TrainSettings


class Progress:
    """Writes a run's metrics; on rank 0 only. A resumed run first drops the lines beyond its checkpoint.

    A context manager: the status line is drawn inside it.

    Args:
        settings: of the run.
        first_step: steps done before.
        flops: FLOPs that all ranks together could do in a second, and those of a sample; null where the device is not known.
    """

    def __init__(self, settings: TrainSettings, first_step: int, flops: tuple[float, float] | None = None) -> None:
        out = settings.out
        self.path = out / "metrics.jsonl"
        kept = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in kept if _step_of(line) <= first_step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        if not first_step:  # What an earlier start left, before its first checkpoint, is of no run.
            for path in (out / "tensorboard").glob("events.out.tfevents.*"):
                path.unlink()
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self.wandb = start_wandb(settings, first_step) if settings.wandb else None
        self.settings = settings
        self.flops = flops
        self.bar = tqdm(total=settings.steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self.started = self.logged = self.printed_at = time.monotonic()
        self.first_step = self.logged_step = self.step = first_step
        self.waited = 0.0
        self.losses: list[float] = []
        self.work: Work | None = None
        self.last_line = ""
        self._beat = Beat(DRAW_SECONDS, self._show)

    def __enter__(self) -> "Progress":
        self._beat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._beat.__exit__()
        self.bar.close()

    @contextmanager
    def during(self, kind: str, total: int | None = None, unit: str = "") -> Iterator[Work]:
        """The status line shows what is done inside the block, between two steps.

        Args:
            kind: what is done, as `pictures`.
            total: how many there are to do; null where nothing is counted.
            unit: what is counted, in the plural.
        """
        self.work = work = Work(kind, total, unit)
        try:
            yield work
        finally:
            self.work = None
            self._draw()
        if self.bar.disable and time.monotonic() - work.began > LINE_SECONDS:
            self._print(work.summary())

    def _print(self, text: str, step: int | None = None) -> None:
        self.printed_at = time.monotonic()
        print_line(f"step {self.step if step is None else step}/{self.settings.steps}  {text}")

    def _draw(self) -> None:
        self.bar.set_postfix_str(self.work.line() if self.work else self.last_line)

    def _show(self) -> None:
        work = self.work
        if not self.bar.disable:
            self._draw()
        elif time.monotonic() - self.printed_at >= LINE_SECONDS:
            self._print(work.line() if work else self._left())

    def _left(self) -> str:
        """By what a step has taken on average, with all that lay between two of them."""
        seconds, done = time.monotonic() - self.started, self.step - self.first_step
        if not done:
            return f"no step is done yet, {duration(seconds)}"
        return f"{duration(seconds / done * (self.settings.steps - self.step))} left"

    def log(self, step: int, figures: Mapping[str, float], now: float, wait_seconds: float) -> None:
        """One line of metrics, everywhere.

        Args:
            step: steps done.
            figures: with `loss`.
            now: when the step was done, in s of time.monotonic.
            wait_seconds: for data, since the line before.
        """
        seconds = now - self.logged
        rate = (step - self.logged_step) * self.settings.global_batch / seconds
        metrics = {**figures, "samples_per_second": rate, "data_wait": wait_seconds / seconds}
        if self.flops:
            peak, of_a_sample = self.flops
            metrics["mfu"] = of_a_sample * rate / peak
        if torch.cuda.is_available():
            metrics["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.add(step, metrics)
        self.logged, self.logged_step = now, step
        self.waited += wait_seconds
        self.losses.append(metrics["loss"])
        line = f"loss {metrics['loss']:.4f}  {rate:.1f} samples/s  data wait {metrics['data_wait']:.0%}"
        if "mfu" in metrics:
            line += f"  MFU {metrics['mfu']:.0%}"
        self.last_line = line
        self._draw()
        if self.bar.disable:  # Not a terminal: a plain line that a log file can hold.
            self._print(f"{line}  {self._left()}", step)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of a step, into metrics.jsonl and TensorBoard."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Force the lines to disk: those before a checkpoint are there when it is."""
        sync(self.path)

    def summary(self, nonfinite: int, replaced: int) -> None:
        """A table of what this process did."""
        seconds, steps = time.monotonic() - self.started, self.logged_step - self.first_step
        table = Table("", Column("", justify="right"), title="What was trained", title_justify="left")
        for name, value in {
            "steps, from and to": f"{self.first_step:,} to {self.logged_step:,}",
            "hours": f"{seconds / 3600:.2f}",
            "samples/s": f"{steps * self.settings.global_batch / seconds:,.1f}",
            "waited for data": f"{self.waited / seconds:.1%}",
            "loss, first and last line": f"{self.losses[0]:.4f} to {self.losses[-1]:.4f}" if self.losses else "none",
            "steps whose gradient was not finite": f"{nonfinite:,}",
            "damaged samples replaced": f"{replaced:,}",
        }.items():
            table.add_row(name, value)
        Console().print(table)

    def advance(self) -> None:
        """One more step is done."""
        self.step += 1
        self.bar.update()

    def show(self, step: int, picture: Picture) -> None:
        """Put a picture into TensorBoard."""
        self.board.add_image("pictures", np.asarray(picture), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({"pictures": wandb.Image(np.asarray(picture))}, step=step)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(settings: TrainSettings, first_step: int) -> Any:
    """A run of Weights & Biases, which needs not be installed otherwise; a training that goes on goes on with its own.

    Raises:
        InputError: it is not installed, or does not let us in.
    """
    try:
        import wandb
    except ImportError:
        raise InputError("train.wandb: the package is not installed; pip install wandb, or leave train.wandb null") from None
    known = settings.out / "wandb.txt"
    if first_step and known.exists():
        name = known.read_text(encoding="utf-8").strip()
    else:
        name = uuid.uuid4().hex
        known.write_text(f"{name}\n", encoding="utf-8")
    try:
        return wandb.init(
            project=settings.wandb,
            id=name,
            name=settings.out.name,
            dir=settings.out,
            resume="allow",
            config=settings.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        problem = " ".join(str(error).split())
        raise InputError(f"train.wandb: {problem}; `wandb login`, or WANDB_MODE=offline, or leave train.wandb null") from None


def _step_of(line: str) -> float:
    """The step of a line of metrics; beyond all steps for a line that was cut off when the machine stopped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def during(progress: Progress | None, kind: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Work]:
    """As `Progress.during`; on a rank that shows nothing, nothing is shown."""
    return progress.during(kind, total, unit) if progress else nullcontext(Work(kind, total, unit))
