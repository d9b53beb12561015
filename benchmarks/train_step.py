"""How many samples a second a training step takes, and what each of the ways to make it faster brings.

Usage:  python -m benchmarks.train_step --preset open_images --device cuda --batch-sizes 1 2 4 8 16 32 64
        python -m benchmarks.train_step --preset tiny --device cpu --batch-sizes 32 --seconds 20

measures whole steps (forward, backward, norm of the gradient, AdamW) of the preset's model with random weights on made-up
batches: nothing is downloaded, and no dataset is needed. Each way is the one before it and one thing more; the last one, a CUDA
graph, takes a GPU and is left out on a CPU. For each, batch sizes
are gone through until the memory is used up. At the batch size at which the last way was fastest, latents that are there are then
compared with encoding the view and the masked view in every step, by a VAE of the preset's size in bf16.

Rows are written to benchmarks/results/train_step.<device>.json as they are measured, `{"device": ..., "rows": [...]}`, each with

    preset, way, batch     no two rows agree in all three; a new measurement takes the place of an old one
    samples_per_second     null: out of memory
    milliseconds_per_step
    mfu                    share of the datasheet's dense peak in the way's arithmetic; null for devices without one
    peak_memory_gb         most memory that tensors took, in 10^9 bytes; null on a CPU
    first_step_seconds     with compilation, if any
    gflop_per_sample       counted; what encoding takes is told apart
    arithmetic, steps, view_px, torch, cuda, diffusers, transformers, python, date
    threads, cpu_share     on a CPU; the share of the time that the threads had it
"""

import argparse
import contextlib
import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.machine import RESULTS, describe_versions, today
from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError, run_program
from pbe_core.machine import cpu_name, device_name
from pbe_core.settings import load_settings, preset
from pbe_train.checkpoints.networks import unloaded_model, unloaded_vae, vae_sizes
from pbe_train.config import ModelSettings, Precision, TrainSettings
from pbe_train.cost import configured_view
from pbe_train.model.paint_model import PaintByExampleModel, prepare
from pbe_train.training.cuda_graph import Recording, prepare_device
from pbe_train.training.flops import arithmetic_of, encode_flops, find_gpu, latent_cells, step_flops, utilisation

KEY = ("preset", "way", "batch")
ALONE = 0.75  # Share of the CPU's time; below it a rate says little.
WARM_UP = 3
ENCODED_AT_ONCE = 8  # Pictures; the encoder's own activations would otherwise bound the batch.
PLAIN = {"one_token_shortcut": False, "channels_last": False, "compile": False, "gradient_checkpointing": False}


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    name: str
    bf16: bool
    options: dict[str, bool]
    """Of `ModelSettings`."""
    recorded: bool = False
    """Whether a step is a CUDA graph."""


WAYS = (
    Way("plain", False, PLAIN),
    Way("+ bf16", True, PLAIN),
    Way("+ channels-last", True, {**PLAIN, "channels_last": True}),
    Way("+ compile", True, {**PLAIN, "channels_last": True, "compile": True}),
    Way("+ one-token", True, ALL := {**PLAIN, "channels_last": True, "compile": True, "one_token_shortcut": True}),
    Way("+ CUDA graph", True, ALL, recorded=True),
)
FROM_LATENTS, ENCODING = "from latents", "encoding in each step"

Step = Callable[[], None]


@dataclass(frozen=True)
class Bench:
    """What all measurements of one run have in common."""

    preset: str
    model: ModelSettings
    view: int
    device: torch.device
    seconds: float

    def measure(self, way: Way, batch: int, encodes: bool = False) -> Iterator[dict[str, Any]]:
        """The row of one way at one batch size; or, if it `encodes`, the two rows of the last comparison.

        Raises:
            torch.OutOfMemoryError: as soon as the memory is used up.
        """
        settings = self.model.model_copy(update=way.options)
        if settings.compile:
            torch.compiler.reset()  # No graph of another way or batch size counts towards the limit of recompilations.
        if way.recorded:
            prepare_device(self.device)
        with self.device:
            model = prepare(unloaded_model(settings), settings, self.device).train()
            # Values as they come: what is encoded has no influence on how long it takes.
            vae = unloaded_vae(settings.vae).to(torch.bfloat16, memory_format=torch.channels_last) if encodes else None
        flops = step_flops(settings, latent_cells(settings, self.view)).total
        trained = list(model.trained().values())
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True, capturable=way.recorded)
        given = make_batch(model, settings, self.view, batch, self.device)
        arithmetic = self._autocast(way)

        def step(latents: tuple[Tensor, Tensor]) -> None:
            with arithmetic():
                predicted = model(*latents, *given[2:])
                loss = mse_loss(predicted.float(), latents[0])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def encoding_step() -> None:
            assert vae
            view, masked = (encode(vae, pictures) for pictures in views)
            step((view, masked))

        one: Step = lambda: step((given[0], given[1]))  # noqa: E731 - it is what is recorded, if any is.
        yield self._row(way, FROM_LATENTS if encodes else way.name, batch, flops, record(one) if way.recorded else one)
        if encodes:
            views = [torch.rand(batch, 3, self.view, self.view, device=self.device) * 2 - 1 for _ in range(2)]
            more = {"gflop_of_encoding_per_sample": round(2 * encode_flops(settings.vae, self.view) / 1e9, 4)}
            yield {**self._row(way, ENCODING, batch, flops, encoding_step), **more}

    def _row(self, way: Way, name: str, batch: int, flops: float, step: Step) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        processor_start, start = time.process_time(), time.perf_counter()
        first, steps, taken = time_steps(step, self.seconds, torch.cuda.synchronize if cuda else lambda: None)
        share = (time.process_time() - processor_start) / (time.perf_counter() - start) / torch.get_num_threads()
        rate = batch * steps / taken
        gpu = find_gpu(device_name()) if cuda else None
        precision: Precision = "bf16" if way.bf16 else "fp32"
        arithmetic = arithmetic_of(gpu, precision, tf32=True) if gpu else precision
        mfu = utilisation(flops, rate, gpu.teraflops[arithmetic] * 1e12) if gpu else None
        return {
            **self.about(name, batch),
            "samples_per_second": float(f"{rate:.4g}"),
            "milliseconds_per_step": float(f"{taken / steps * 1000:.4g}"),
            "mfu": None if mfu is None else round(mfu, 4),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
            "first_step_seconds": round(first, 2),
            "gflop_per_sample": round(flops / 1e9, 4),
            "arithmetic": arithmetic,
            "steps": steps,
            **({} if cuda else {"threads": torch.get_num_threads(), "cpu_share": round(share, 2)}),
        }

    def about(self, way: str, batch: int) -> dict[str, Any]:
        """What every row begins with, one that ended for want of memory, too."""
        made_with = describe_versions(("torch", "diffusers", "transformers"))
        when = {"view_px": self.view, **made_with, "cuda": torch.version.cuda, "date": today()}
        return {"preset": self.preset, "way": way, "batch": batch, "samples_per_second": None, **when}

    def _autocast(self, way: Way) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        return lambda: torch.autocast(self.device.type, torch.bfloat16) if way.bf16 else contextlib.nullcontext()


def record(step: Step) -> Step:
    """The same step as a CUDA graph, after some that are computed as ever."""
    for _ in range(WARM_UP):
        step()
    return Recording(step, None).replay


def make_batch(
    model: PaintByExampleModel, settings: ModelSettings, view: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A batch as the model takes it: noisy latent, masked latent, keep map, timestep, reference, dropped."""
    channels, cells = vae_sizes(settings.vae).latent_channels, latent_cells(settings, view)
    side = model.conditioner.model.config.image_size
    with device:
        latents = [torch.randn(batch, channels, cells, cells) for _ in range(2)]
        keep, timestep = torch.ones(batch, 1, cells, cells), torch.arange(batch) * 37 % 1000
        return (*latents, keep, timestep, torch.randn(batch, 3, side, side), torch.arange(batch) % 5 == 0)  # type: ignore[return-value]


@torch.no_grad()
def encode(vae: Autoencoder, pictures: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w], in fp32, of pictures [B, 3, view, view] in [-1, 1], drawn from the VAE's posterior."""
    parts = []
    for part in pictures.split(ENCODED_AT_ONCE):
        mean, deviation = vae.encode(part.to(vae.dtype, memory_format=torch.channels_last))
        parts.append(mean if deviation is None else mean + deviation * torch.randn_like(mean))
    return torch.cat(parts).float() * vae.sizes.scaling_factor


def time_steps(step: Step, seconds: float, wait: Callable[[], None]) -> tuple[float, int, float]:
    """Seconds of the first step; number of steps measured after the warm-up, and the seconds that they took together.

    The device is waited for at the ends only, as the loop of a training does not wait either; so the number of steps is fixed
    before, from the time of the last step of the warm-up.
    """
    times = []
    for _ in range(WARM_UP):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    steps = max(3, round(seconds / times[-1]))
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return times[0], steps, time.perf_counter() - start


def run(bench: Bench, ways: Sequence[Way], batches: Sequence[int], compare: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure all ways at all batch sizes that fit, then the comparison with encoding; `keep` gets each row as it comes."""
    best = None
    for way in ways:
        rates: dict[int, float] = {}
        for batch in batches:
            rows = measured(bench, way, batch)
            for row in rows:
                keep(row)
            if rows[-1]["samples_per_second"] is None:
                break
            rates[batch] = rows[-1]["samples_per_second"]
        best = (way, max(rates, key=lambda batch: rates[batch])) if rates else None
    if compare and best:
        for row in measured(bench, *best, encodes=True):
            keep(row)


def measured(bench: Bench, way: Way, batch: int, encodes: bool = False) -> list[dict[str, Any]]:
    """The rows of a measurement; the last one has no rate where the memory did not suffice."""
    rows: list[dict[str, Any]] = []
    try:
        for row in bench.measure(way, batch, encodes):
            rows.append(row)  # noqa: PERF402 - what came before the memory ran out is kept.
    except torch.OutOfMemoryError:
        name = way.name if not encodes else (ENCODING if rows else FROM_LATENTS)
        rows.append(bench.about(name, batch))
    # Outside the handler: while the error is held, so are the frames below it and what lies in them.
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def merge_rows(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a key, the newer one, in the order in which they were first measured."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (*old, *new):
        rows[tuple(row[name] for name in KEY)] = row
    return list(rows.values())


def results_file(folder: Path, device: str) -> Path:
    """Where the rows of a device are kept."""
    return folder / f"train_step.{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def table_of(device: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The table to print; each rate beside that of the first way of the same preset and batch."""
    first = {(row["preset"], row["batch"]): row["samples_per_second"] for row in rows if row["way"] == WAYS[0].name}
    table = Table(title=device, title_justify="left")
    for column in ("preset", "way", "batch", "samples/s", "x plain", "MFU", "peak GB", "start s"):
        table.add_column(column, justify="left" if column in ("preset", "way") else "right", overflow="fold")
    for row in rows:
        rate = row["samples_per_second"]
        known = [row["preset"], row["way"], str(row["batch"])]
        if rate is None:
            table.add_row(*known, "out of memory")
            continue
        plain = first.get((row["preset"], row["batch"]))
        times = f"{rate / plain:.2f}" if plain else ""
        memory = "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f}"
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        table.add_row(*known, f"{rate:.4g}", times, mfu, memory, f"{row['first_step_seconds']:.1f}")
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="open_images", help="of configs/, its `train: model:` (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], help="(default: %(default)s)"
    )
    names = [way.name for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, default=names, help="some of the ways only (default: all)")
    parser.add_argument("--no-encoding", action="store_true", help="leave out the comparison with encoding in each step")
    parser.add_argument("--seconds", type=float, default=10, help="to measure each for (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use; take --device cpu --preset tiny")
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")  # TF32, as in a training that is not in fp32 throughout.
    config = preset(given.preset)
    settings = load_settings(TrainSettings, "train", ["--config", str(config)])
    device = device_name() if given.device == "cuda" else cpu_name()
    path = results_file(given.out, device)
    bench = Bench(given.preset, settings.model, configured_view(config)[0], torch.device(given.device), given.seconds)
    rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"] if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(row: dict[str, Any]) -> None:
        rows[:] = merge_rows(rows, [row])
        path.write_text(json.dumps({"device": device, "rows": rows}, indent=2) + "\n")
        rate = row["samples_per_second"]
        print(
            f"{row['way']}, batch {row['batch']}: " + ("out of memory" if rate is None else f"{rate:.4g} samples/s"), flush=True
        )
        if row.get("cpu_share", 1) < ALONE:
            print(f"warning: the step had the CPU for {row['cpu_share']:.0%} of the time; measure again when the machine is idle")

    ways = [way for way in WAYS if way.name in given.ways and (given.device == "cuda" or not way.recorded)]
    run(bench, ways, sorted(given.batch_sizes), not given.no_encoding, keep)
    Console().print(table_of(device, rows))


if __name__ == "__main__":
    run_program(main)
