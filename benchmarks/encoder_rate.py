"""How many pictures a second the VAE's encoder takes: what the length of a build depends on.

Usage:  python -m benchmarks.encoder_rate --size 512 --batch 8 --precision fp32 --seconds 30
        python -m benchmarks.encoder_rate --size 512 --precision bf16 --device cuda --vae CompVis/stable-diffusion-v1-4

measures the encoder as a build uses it (pictures come from and latents go to the CPU's memory), prints the table and puts the
rate into pipelines/dataset/rates/encoder_rates.json. Without --vae it is that of Stable Diffusion v1 with random
weights: the same arithmetic, nothing to download.

The file holds `{"rows": [...]}`, each row with

    kind                 "measured", or "computed" for GPUs that nobody has measured yet
    device               as torch.cuda.get_device_name() tells it, or the CPU's model name
    vae                  "stable-diffusion-v1", or what --vae was: a hub id, or the end of a folder's path
    precision            fp32, bf16, fp16
    size_px              side of the picture
    pictures_per_second
    gflop_per_picture    counted, not measured; equal for VAEs of equal architecture, whatever they are called
    seconds, pictures, batch, torch, date                          if measured: for how long, over how many, when
    threads, cpu_share                                             if measured on a CPU; the share of the time that they had it
    known_as, arithmetic, peak_tflops, utilisation, assumption     if computed: from what

Rows are sorted by device, vae, precision and size_px; no two agree in all four. A new measurement takes the place of an old one,
and no row is computed where one is measured. A run without --vae also computes the rows of its --size anew.

Computed rows are gflop_per_picture against a share of the datasheet's peak: right to a factor of two perhaps. Measure before
renting a hundred of them.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import today
from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError, run_program
from pbe_core.machine import cpu_name, device_name
from pbe_core.settings import REPOSITORY
from pbe_core.vae_kinds import AUTOENCODER_KL, VaeSizes, vae_sizes
from pbe_train.checkpoints.networks import VAE_SIZES
from pbe_train.config import Precision
from pbe_train.training.flops import arithmetic_of, find_gpu
from pipelines.config import LatentSettings
from pipelines.dataset.estimate import RATES
from pipelines.dataset.pack import Encoder, load_encoder

TABLE = RATES / "encoder_rates.json"
ALONE = 0.75  # Share of the CPU's time; below it a rate says little.
KEY = ("device", "vae", "precision", "size_px")
STABLE_DIFFUSION = "stable-diffusion-v1"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
# 36.3 pictures/s of 2,391 GFLOP, the best published training rate of Stable Diffusion's U-Net at 512 px on an A100, are 28 % of
# its peak. The encoder is of the same convolutions and attention; nobody seems to have published its own rate.
UTILISATION = 0.28
ASSUMPTION = (
    "the encoder takes the same share of the peak as the best published training of this family's U-Net at 512 px, on an A100"
)


# Of those whose peaks are known, the ones that a plan tells of.
GPU_NAMES = (
    "Tesla V100-SXM2-32GB",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA L4",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA H200",
)


def gflop_per_picture(sizes: VaeSizes, size: int) -> float:
    """GFLOP (a multiplication and an addition are two) of encoding one picture of `size` x `size` px, counted on shapes alone."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Autoencoder.unloaded(sizes).encode(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops() / 1e9)


def computed_rows(size: int) -> list[dict[str, Any]]:
    """What GPUs should do with Stable Diffusion's encoder."""
    gflop = gflop_per_picture(vae_sizes(AUTOENCODER_KL, VAE_SIZES), size)
    rows = []
    for device in GPU_NAMES:
        gpu = find_gpu(device)
        assert gpu, device
        for precision in PRECISIONS:
            # PyTorch lets convolutions of fp32 tensors run in TF32 where the GPU has it; that is what a build then does.
            arithmetic = arithmetic_of(gpu, precision, tf32=True)
            if precision not in (arithmetic, "fp32"):
                continue
            rows.append(
                {
                    "kind": "computed",
                    "device": device,
                    "vae": STABLE_DIFFUSION,
                    "precision": precision,
                    "size_px": size,
                    "pictures_per_second": round(UTILISATION * gpu.teraflops[arithmetic] * 1000 / gflop, 2),
                    "gflop_per_picture": round(gflop, 1),
                    "known_as": gpu.known_as,
                    "arithmetic": arithmetic,
                    "peak_tflops": gpu.teraflops[arithmetic],
                    "utilisation": UTILISATION,
                    "assumption": ASSUMPTION,
                }
            )
    return rows


def measured_row(settings: LatentSettings, device: str, size: int, seconds: float, vae: str) -> dict[str, Any]:
    """Encode pictures of noise for `seconds` after one batch to warm up."""
    encoder = load_encoder(settings, device)
    noise = np.random.default_rng(0).uniform(-1, 1, (settings.batch_size, 3, size, size))
    pictures = torch.from_numpy(noise.astype(np.float32))
    encoder.encode(pictures)
    processor_start = time.process_time()
    batches, taken = time_encoder(encoder, pictures, seconds)
    # Below 1 somebody else took the CPU, and the encoder's threads then wait for each other: rates up to five times too low.
    on_cpu = {
        "threads": settings.threads,
        "cpu_share": round((time.process_time() - processor_start) / taken / settings.threads, 2),
    }
    return {
        "kind": "measured",
        "device": device_name() if device == "cuda" else cpu_name(),
        "vae": vae,
        "precision": settings.precision,
        "size_px": size,
        "pictures_per_second": float(f"{batches * len(pictures) / taken:.4g}"),
        "gflop_per_picture": round(gflop_per_picture(encoder.vae.sizes, size), 1),
        "seconds": round(taken, 1),
        "pictures": batches * len(pictures),
        "batch": settings.batch_size,
        "torch": torch.__version__,
        "date": today(),
        **(on_cpu if device == "cpu" else {}),
    }


def time_encoder(encoder: Encoder, pictures: torch.Tensor, seconds: float) -> tuple[int, float]:
    """Number of batches encoded, and the seconds that they took: at least `seconds`, at least one batch."""
    start = time.perf_counter()
    batches, taken = 0, 0.0
    while taken < seconds or not batches:
        encoder.encode(pictures)  # Ends with the latents in the CPU's memory, so the device has nothing left to do.
        batches += 1
        taken = time.perf_counter() - start
    return batches, taken


def merge_rows(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a key, sorted: the newer one, but a measured one before a computed one."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (*old, *new):
        key = tuple(row[name] for name in KEY)
        if row["kind"] == "measured" or rows.get(key, row)["kind"] == "computed":
            rows[key] = row
    return [rows[key] for key in sorted(rows)]


def vae_name(source: str) -> str:
    """What to call a VAE in the results: a hub id as it is, a folder by its path in the repository or by its own name."""
    folder = next((path for path in (Path(source).expanduser(), REPOSITORY / source) if path.is_dir()), None)
    if folder is None:
        return source
    folder = folder.resolve()
    return folder.relative_to(REPOSITORY).as_posix() if folder.is_relative_to(REPOSITORY) else folder.name


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The table to print."""
    table = Table("device", "VAE", "precision", "px", "pictures/s", "kind")
    for column in table.columns:
        column.overflow = "fold"
        column.justify = "right" if column.header in ("px", "pictures/s") else "left"
    for row in rows:
        cells = [row["vae"], row["precision"], str(row["size_px"]), f"{row['pictures_per_second']:.4g}", row["kind"]]
        table.add_row(row.get("known_as", row["device"]), *cells)
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in px (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures encoded at once (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--vae", help="folder or hub id (default: Stable Diffusion v1's architecture with random weights)")
    parser.add_argument("--seconds", type=float, default=30, help="to measure for (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use; take --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        if given.vae is None:
            AutoencoderKL.from_config(VAE_SIZES).save_pretrained(folder)
        name = STABLE_DIFFUSION if given.vae is None else vae_name(given.vae)
        settings = LatentSettings(
            vae=given.vae or folder, precision=given.precision, batch_size=given.batch, threads=given.threads
        )
        row = measured_row(settings, given.device, given.size, given.seconds, name)
    if row.get("cpu_share", 1) < ALONE:
        print(f"warning: the encoder had the CPU for {row['cpu_share']:.0%} of the time; measure again when the machine is idle")
    old = json.loads(TABLE.read_text())["rows"] if TABLE.is_file() else []
    rows = merge_rows(old, [row, *(computed_rows(given.size) if given.vae is None else [])])
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    Console().print(table_of(rows))


if __name__ == "__main__":
    run_program(main)
