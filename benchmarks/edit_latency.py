"""How long an edit takes at the published size, beside diffusers' PaintByExamplePipeline with its defaults.

Usage:  python -m venv peer && peer/bin/pip install diffusers==0.36.0 "transformers<5" torch
        python -m benchmarks.edit_latency --peer peer/bin/python     # 20 minutes on two quiet cores, and 8 GB of free memory
        python -m benchmarks.edit_latency --rows "default steps" "+ bf16"   # some rows again; the others stay in the file

Each row is a process of its own: random weights of Stable Diffusion v1's U-Net with 9 input channels, of CLIP ViT-L/14 with the
conditioner and of the VAE; one edit of a photo of the view's size, from pictures in memory to a picture in memory, without the
loading of the model. `+` is the row before it and one thing more. A pass is one item through the U-Net, so guidance
takes two. Writes benchmarks/results/edit_latency.json.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.memory import high_water_mb
from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress
from pbe_train.checkpoints.known_sizes import CLIP_SIZES, VAE_SIZES
from pbe_train.config import TIMESTEPS, ModelSettings, TrainSettings, UNetSettings
from pbe_train.editing.paint_by_example import edit
from pbe_train.editing.placing import check_compiler, place
from pbe_train.editing.prepacked import can_prepack
from pbe_train.editing.speed import PLAIN, TYPES, Way
from pbe_train.model.paint_model import assemble, new_unet
from pbe_train.model.pipeline import Run, RunIdentity, SamplingSettings
from pbe_train.model.sampling import PUBLISHED_SCHEDULER, PUBLISHED_STEPS, guided_at
from pbe_train.model.schedulers import begin, make_scheduler

FILE = RESULTS / "edit_latency.json"
PACKAGES = ("torch", "diffusers", "transformers")
PEER = Path(__file__).with_name("edit_latency_peer.py")
NEEDED_GB = 8.0
CPU = torch.device("cpu")
LAST, HALF = Way("fp32", True), Way("bf16", True)
# As far as this processor packs weights.
PACKED, PACKED_HALF = (way._replace(prepacked=can_prepack(CPU, TYPES[way.precision])) for way in (LAST, HALF))


@dataclass(frozen=True)
class Ours:
    """What a row of ours has."""

    how: SamplingSettings
    way: Way = PLAIN
    compiled: bool = False


DEFAULT, EXACT = SamplingSettings(), SamplingSettings(exact=True)
LATE = (0.0, 0.83)
ROWS = {
    "exact published": Ours(replace(EXACT, steps=PUBLISHED_STEPS, scheduler=PUBLISHED_SCHEDULER)),
    "default steps": Ours(EXACT),
    "+ nothing twice, one batch": Ours(DEFAULT),
    "+ channels-last": Ours(DEFAULT, LAST),
    "+ prepacked": Ours(DEFAULT, PACKED),
    "+ bf16": Ours(DEFAULT, PACKED_HALF),
    "bf16, compile": Ours(DEFAULT, HALF, compiled=True),
    "fp32, interval 0-0.83": Ours(SamplingSettings(guidance_interval=LATE), PACKED),
    "fp32, reuse 2": Ours(SamplingSettings(reuse=2), PACKED),
    "fp32, reuse 3": Ours(SamplingSettings(reuse=3), PACKED),
    "fp32, interval 0-0.83, reuse 2": Ours(SamplingSettings(guidance_interval=LATE, reuse=2), PACKED),
    "fp32, interval 0-0.83, reuse 3": Ours(SamplingSettings(guidance_interval=LATE, reuse=3), PACKED),
    "bf16, interval 0-0.83, reuse 2": Ours(SamplingSettings(guidance_interval=LATE, reuse=2), PACKED_HALF),
    "bf16, interval 0-0.83, reuse 3": Ours(SamplingSettings(guidance_interval=LATE, reuse=3), PACKED_HALF),
}
"""Ours; a row that begins with + is the one before it and one thing more."""


def sizes_of(tiny: bool) -> dict[str, Any]:
    """Configurations of U-Net, encoder and VAE, and the view's px: the published ones, or a rehearsal's."""
    settings, clip, vae = UNetSettings(), {**CLIP_SIZES}, {**VAE_SIZES}
    if tiny:
        settings = UNetSettings(block_out_channels=(32, 64), attention=(True, False), layers_per_block=1, cross_attention_dim=32)
        clip |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 56}
        vae |= {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    with torch.device("meta"):
        config = new_unet(settings, 4).config
    unet = {name: value for name, value in config.items() if name[0] != "_"}
    return {"unet": unet, "clip": clip, "vae": vae, "view_px": 64 if tiny else 512}


def make(sizes: dict[str, Any], row: Ours) -> Run:
    """The model with random weights, in the row's way."""
    torch.manual_seed(0)
    blocks = (sizes["clip"]["num_hidden_layers"] + 1) // 5
    model_settings = ModelSettings(encoder="none", vae="none", conditioner_blocks=blocks, mask_to_latent="nearest")
    settings = TrainSettings.model_validate({"dataset": "none", "out": "none", "model": model_settings.model_dump()})
    unet = UNet2DConditionModel.from_config(sizes["unet"])
    model = assemble(model_settings, unet, CLIPVisionModel(CLIPVisionConfig(**sizes["clip"])))
    vae = Autoencoder(AutoencoderKL.from_config(sizes["vae"]).eval().requires_grad_(False))
    identity = RunIdentity(
        dataset_fingerprint="",
        dataset_samples="",
        precision="fp32",
        vae_sha256="",
        encoder_sha256="",
        unet=sizes["unet"],
        latent_channels=4,
        scaling_factor=sizes["vae"]["scaling_factor"],
        view_size=sizes["view_px"],
    )
    run = place(Run(model.eval().requires_grad_(False), vae, settings, identity, 0), CPU, row.way, False)
    run.model.compiled_edits = row.compiled
    return run


def measure(name: str, tiny: bool, few: int | None) -> dict[str, Any]:
    """A row of ours: one edit, and where it is compiled, the one after it."""
    row, sizes = ROWS[name], sizes_of(tiny)
    if row.compiled:
        check_compiler(offload=False)
    run, px = make(sizes, row), sizes["view_px"]
    noise = np.random.default_rng(0)
    photo, reference = (noise.integers(0, 256, (px, px, 3), np.uint8) for _ in range(2))
    mask = np.zeros((px, px), bool)
    mask[px // 4 : -px // 4, px // 4 : -px // 4] = True
    passes: list[int] = []
    run.model.unet.conv_out.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    how = replace(row.how, steps=few) if few else row.how
    result: dict[str, Any] = {}
    for again in range(1 + row.compiled):
        passes.clear()
        ends: list[tuple[float, int]] = []

        def watch(step: int, of: int, made: object, ends: list[tuple[float, int]] = ends) -> None:
            ends.append((time.perf_counter(), sum(passes)))

        began = time.perf_counter()
        painted = edit(run, [photo], [mask], [reference], [0], how, watch=watch)
        assert painted[0].shape == (px, px, 3)
        seconds = time.perf_counter() - began
        if row.compiled and not again:
            result["first_edit_seconds"] = round(seconds, 2)
    return result | {
        "seconds": seconds,
        "steps": [(end - start, after - before) for (start, before), (end, after) in itertools.pairwise(ends)],
        "passes": sum(passes),
        "peak_mb": high_water_mb(),
        "all_passes": count_passes(row.how),
        "versions": describe_versions(PACKAGES),
    }


def count_passes(how: SamplingSettings) -> int:
    """How many passes all timesteps take that a scheduler stops at."""
    scheduler = make_scheduler(how.scheduler, "epsilon")
    begin(scheduler, how.steps, CPU)
    return sum(1 + guided_at(time, how.guidance_interval, TIMESTEPS) for time in scheduler.timesteps.tolist())


def keeps_features(name: str) -> bool:
    """Whether steps of a row differ in length: of a few of them nothing can be reckoned, and their median means nothing."""
    return name in ROWS and ROWS[name].how.reuse > 1


def as_row(name: str, told: dict[str, Any], few: int | None) -> dict[str, Any]:
    """A row of the file, from what a process told. Of a few steps, passes left out are reckoned from the median of a pass."""
    steps = told["steps"]
    seconds, passes = told["seconds"], told["passes"]
    # Of steps by their own passes: a pipeline may tell of fewer steps than it makes.
    a_pass = statistics.median(taken / made for taken, made in steps)
    if few:
        seconds, passes = seconds + (told["all_passes"] - passes) * a_pass, told["all_passes"]
    row = {
        "row": name,
        "seconds": round(seconds, 2),
        "passes": passes,
        "seconds_a_pass": None if keeps_features(name) else round(a_pass, 3),
        "peak_mb": round(told["peak_mb"]),
        "reckoned_from_steps": len(steps) if few else None,
    }
    return row | ({"first_edit_seconds": told["first_edit_seconds"]} if "first_edit_seconds" in told else {})


def measure_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a row in a process of its own.

    Raises:
        InputError: too little memory is free, or the process failed.
    """
    free = psutil.virtual_memory().available / 1e9
    if free < NEEDED_GB and not options.tiny:
        raise InputError(f"{free:.1f} GB of memory are free, and {NEEDED_GB:g} are needed; end other programs first")
    if name == "peer":
        given = {**sizes_of(options.tiny), "few": options.few, "threads": options.threads}
        words = [options.peer, str(PEER), json.dumps(given)]
    else:
        words = [sys.executable, "-m", "benchmarks.edit_latency", "--row", name]
        words += ["--tiny"] if options.tiny else []
        chosen = {"--few": options.few, "--threads": options.threads}
        words += [word for option, value in chosen.items() if value for word in (option, str(value))]
    machine = describe_machine()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name} failed (status {done.returncode}): {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return {**as_row(name, told, options.few), "date": today(), "machine": machine, "versions": told["versions"]}


def write(file: Path, row: dict[str, Any], view_px: int) -> list[dict[str, Any]]:
    """Put a row into the file; all rows, with how many times as fast as the peer's each is."""
    known = {each["row"]: each for each in json.loads(file.read_bytes())["rows"]} if file.is_file() else {}
    known[row["row"]] = row
    rows = [known[name] for name in ("peer", *ROWS) if name in known]
    if "peer" in known:
        for each in rows:
            each["times_peer"] = round(known["peer"]["seconds"] / each["seconds"], 2)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"view_px": view_px, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return rows


def main() -> None:
    """All rows, one after the other, or one of them in this process (`--row`, which prints what was measured)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python that has diffusers 0.36; without it there is no row of the peer's")
    parser.add_argument("--rows", nargs="+", choices=("peer", *ROWS), help="to measure; rows of others stay in the file")
    parser.add_argument(
        "--few",
        type=int,
        help="steps to time instead of all, from 3; the rest is reckoned, and the file says so (not with reuse)",
    )
    parser.add_argument("--threads", type=int, help="of the CPU; by default PyTorch's own choice")
    parser.add_argument("--results", type=Path, default=FILE, help="file to write (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with networks of no size")
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.few is not None and options.few < 3:
        raise InputError(f"--few {options.few}: give 3 steps or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.row:
        print(json.dumps(measure(options.row, options.tiny, options.few)))
        return
    few = options.few
    names = options.rows or [*(["peer"] if options.peer else []), *ROWS]
    if "peer" in names and not options.peer:
        raise InputError("--rows peer: give the Python that has diffusers 0.36 with --peer")
    rows: list[dict[str, Any]] = []
    for name in names:
        options.few = None if keeps_features(name) else few
        with Progress(name):
            rows = write(options.results, measure_apart(name, options), sizes_of(options.tiny)["view_px"])
    table = Table("way", "s an edit", "passes", "s a pass", "peak MB", "x peer")
    for each in rows:
        shown = [
            each["row"],
            f"{each['seconds']:.1f}",
            str(each["passes"]),
            f"{each['seconds_a_pass']:.2f}" if each["seconds_a_pass"] else "-",
            f"{each['peak_mb']:,}",
        ]
        table.add_row(*shown, f"{each['times_peer']:.1f}" if "times_peer" in each else "-")
    Console().print(table)


if __name__ == "__main__":
    run_program(main)
