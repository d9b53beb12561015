"""What fine-tuning on small GPUs takes, measured beside what `pbe cost` counts: peak memory and time of a step, preset by preset.

    python -m benchmarks.tiers                                  # the four presets, on this machine's GPU
    python -m benchmarks.tiers --tiers 8 12 --steps 20
    python -m benchmarks.tiers --device cpu --world CONFIG      # at the sizes of a small config, to try the program

Each preset is run in a process of its own, so that nothing of the one before is left: whole steps of the optimizer, with the
preset's micro-batches, on a model with random weights and made-up batches. Nothing is downloaded, and no dataset is needed.

Rows are written to benchmarks/results/tiers.<device>.json as they come, a new one in the place of an old one of its preset:

    preset, batch, accumulation
    peak_gb                 most memory that tensors took on the GPU, in 10^9 bytes; null on a CPU, or out of memory
    reserved_gb             most that PyTorch held from the GPU, with what it could not use
    counted_gb              what `pbe cost` says of the same settings
    host_gb                 what lies in the CPU's memory, counted
    seconds_per_step        of the optimizer, after the first
    samples_per_second      null: out of memory
    optimizer_seconds       of a step, without forward and backward pass
    view_px, torch, cuda, diffusers, transformers, python, date
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import RESULTS, describe_versions, today
from benchmarks.train_step import make_batch, results_file
from pbe_core.errors import InputError, run_program
from pbe_core.machine import cpu_name, device_name
from pbe_core.settings import load_settings, preset
from pbe_train.checkpoints.networks import unloaded_model
from pbe_train.config import TrainSettings
from pbe_train.cost import TIERS, own_batch, view_size
from pbe_train.model.paint_model import prepare
from pbe_train.training.flops import latent_cells
from pbe_train.training.memory import training_memory
from pbe_train.training.optimizer import EMA, cast_weights, clip_gradients, make_optimizer, set_learning_rate, step_unless


class Steps:
    """The trainer's own parts, and its step, on made-up batches."""

    def __init__(self, settings: TrainSettings, view: int, batch: int, device: torch.device) -> None:
        self.settings, self.device = settings, device
        model = unloaded_model(settings.model)
        masters = cast_weights(model, settings, "bf16")
        self.model = prepare(model, settings.model, device).train()
        self.trained = self.model.trained()
        self.optimizer = make_optimizer(self.trained, settings.optimizer, settings.seed, masters)
        self.ema = EMA(self.trained, settings.ema_decay, settings.ema_place, masters) if settings.ema_decay else None
        self.given = make_batch(self.model, settings.model, view, batch, device)
        self.done = 0
        self.optimizer_seconds = 0.0

    def step(self) -> None:
        """As `train_step`."""
        parts = self.settings.accumulation
        for _ in range(parts):
            torch.autograd.backward(self.loss() / parts)
        start = self._now()
        norm = clip_gradients(self.trained, self.settings.optimizer.gradient_clip)
        set_learning_rate(self.optimizer, self.settings.optimizer, self.done, self.settings.steps)
        step_unless(~norm.isfinite(), self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.ema:
            self.ema.update(self.done)
        self.optimizer_seconds = self._now() - start

    def loss(self) -> Tensor:
        """Of one micro-batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision != "fp32"):
            predicted = self.model(*self.given)
        return (predicted.float() - self.given[0]).square().mean()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def settings_of(gigabytes: int, world: Path | None) -> TrainSettings:
    """A preset's settings; with `world`, the networks and the batch of that config under the preset's ways to save memory."""
    path = preset(f"finetune_{gigabytes}gb")
    settings = load_settings(TrainSettings, "train", ["--config", str(path)])
    if world is None:
        return settings
    small = load_settings(TrainSettings, "train", ["--config", str(world)])
    ways = {name: getattr(settings.model, name) for name in ("gradient_checkpointing", "weights", "train")}
    model = small.model.model_copy(update=ways)
    update = {"model": model, "dataset": small.dataset, "global_batch": small.global_batch, "accumulation": small.global_batch}
    return settings.model_copy(update=update)


def measure(gigabytes: int, device: str, steps: int, world: Path | None) -> dict[str, Any]:
    """The row of a preset."""
    settings, place = settings_of(gigabytes, world), torch.device(device)
    view, _ = view_size(settings.dataset, world or preset(f"finetune_{gigabytes}gb"))
    batch, cuda = own_batch(settings), device == "cuda"
    cells = latent_cells(settings.model, view)
    counted = training_memory(settings, cells, [batch], bf16=settings.precision != "fp32", gpu=cuda)[batch]
    made_with = describe_versions(("torch", "diffusers", "transformers"))
    row: dict[str, Any] = {
        "preset": f"finetune_{gigabytes}gb",
        "batch": batch,
        "accumulation": settings.accumulation,
        "peak_gb": None,
        # Nothing is painted here.
        "counted_gb": round((counted.kept - counted.painting + max(counted.working, counted.gradients + counted.step)) / 1e9, 3),
        "host_gb": round(counted.host / 1e9, 3),
        "samples_per_second": None,
        "view_px": view,
        **made_with,
        "cuda": torch.version.cuda,
        "date": today(),
    }
    try:
        run = Steps(settings, view, batch, place)
        run.step()
        start = run._now()
        for _ in range(steps):
            run.step()
        seconds = (run._now() - start) / steps
    except torch.OutOfMemoryError:
        return row
    row |= {"seconds_per_step": round(seconds, 3), "optimizer_seconds": round(run.optimizer_seconds, 3)}
    row["samples_per_second"] = float(f"{batch * settings.accumulation / seconds:.4g}")
    if cuda:
        row |= {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}
        row |= {"reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3)}
    return row


def table_of(device: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The table to print."""
    table = Table(title=device, title_justify="left")
    for column in ("preset", "batch", "peak GB", "counted GB", "CPU GB", "samples/s", "s a step", "of it optimizer"):
        table.add_column(column, justify="left" if column == "preset" else "right", overflow="fold")
    for row in rows:
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        known = [row["preset"], f"{row['accumulation']} x {row['batch']}", peak]
        known += [f"{row['counted_gb']:.2f}", f"{row['host_gb']:.2f}"]
        if row["samples_per_second"] is None:
            table.add_row(*known, "out of memory")
        else:
            rate, seconds = row["samples_per_second"], row["seconds_per_step"]
            table.add_row(*known, f"{rate:.4g}", f"{seconds:.3g}", f"{row['optimizer_seconds']:.3g}")
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", type=int, nargs="+", choices=TIERS, default=TIERS, help="in GB (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="to measure, after a first one (default: %(default)s)")
    parser.add_argument("--world", type=Path, help="a config whose networks, view and batch are taken, such as configs/tiny.yaml")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine has no GPU that PyTorch can use; try --device cpu --world configs/tiny.yaml"
        )
    device = device_name() if given.device == "cuda" else cpu_name()
    path = given.out / results_file(given.out, device).name.replace("train_step", "tiers")
    rows = {row["preset"]: row for row in json.loads(path.read_bytes())["rows"]} if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for gigabytes in given.tiers:
            row = pool.apply(measure, (gigabytes, given.device, given.steps, given.world))
            rows[row["preset"]] = row
            path.write_text(json.dumps({"device": device, "rows": list(rows.values())}, indent=2) + "\n", encoding="utf-8")
            print(f"{row['preset']}: counted {row['counted_gb']} GB, peak {row['peak_gb']} GB", flush=True)
    Console().print(table_of(device, list(rows.values())))


if __name__ == "__main__":
    run_program(main)
