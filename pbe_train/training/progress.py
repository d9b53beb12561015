"""What a run says about itself: metrics.jsonl, TensorBoard, and a status line."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pbe_train.data.items import Batch
from schemas.pictures import Picture


class Progress:
    """Writes a run's metrics; on rank 0 only. A resumed run first drops the lines beyond its checkpoint.

    Args:
        out: the run folder.
        first_step: steps done before.
        last_step: steps to be done in all.
    """

    def __init__(self, out: Path, first_step: int, last_step: int) -> None:
        self.path = out / "metrics.jsonl"
        kept = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in kept if _step_of(line) <= first_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        if not first_step:  # What an earlier start left, before its first checkpoint, is of no run.
            for path in (out / "tensorboard").glob("events.out.tfevents.*"):
                path.unlink()
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self.last_step = last_step
        self.bar = tqdm(total=last_step, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self.started = time.monotonic()
        self.first_step = first_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics, everywhere."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        line = f"loss {metrics['loss']:.4f}  {metrics['samples_per_second']:.1f} samples/s  data wait {metrics['data_wait']:.0%}"
        if self.bar.disable:  # Not a terminal: a plain line that a log file can hold.
            left = (time.monotonic() - self.started) / (step - self.first_step) * (self.last_step - step)
            print(f"step {step}/{self.last_step}  {line}  {left / 60:.1f} min left", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(line)

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update()

    def show(self, step: int, picture: Picture) -> None:
        """Put a picture into TensorBoard."""
        self.board.add_image("pictures", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self.board.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics; beyond all steps for a line that was torn when the machine stopped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Timed:
    """An iterator that adds up the time one waits for it."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.seconds = 0.0

    def __next__(self) -> Batch:
        """The next batch."""
        start = time.monotonic()
        batch = next(self.batches)
        self.seconds += time.monotonic() - start
        return batch

    def take_seconds(self) -> float:
        """The seconds waited since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
