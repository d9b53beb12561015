"""How much memory it takes to train a LoRA of the published-size model, beside training all of its weights.

Usage:  python -m benchmarks.lora_memory                       # needs 17 GB of free memory, and some minutes of a CPU

Each way is a process of its own, measured by the kernel (the largest resident memory): random weights of the sizes of the preset
`lora`, two steps (forward, backward, norm of the gradient, AdamW) in fp32 on a made-up view of 512 px, batch 1, gradient
checkpointing. Of the frozen vision encoder, which both hold alike, there are 2 of its 24 layers, so that all weights' training
fits; the missing 1.1 GB would be added to both. The LoRA is then written, and loaded by diffusers' own `load_lora_adapter` onto
a U-Net with the base's weights, which must give what ours gives. Writes benchmarks/results/lora_memory.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.memory import high_water_mb
from benchmarks.train_step import make_batch
from pbe_core.errors import InputError, run_program
from pbe_core.settings import load_settings, preset
from pbe_core.vae import weights_sha256
from pbe_train.checkpoints.lora_export import folded, write_diffusers_lora
from pbe_train.checkpoints.lora_files import DIFFUSERS_FILE
from pbe_train.checkpoints.networks import CLIP_SIZES, unet_config
from pbe_train.config import LoraSettings, TrainSettings
from pbe_train.model.lora import is_lora, layers_of
from pbe_train.model.paint_model import PaintByExampleModel, assemble, prepare, with_lora
from pbe_train.training.optimizer import make_optimizer

FILE = RESULTS / "lora_memory.json"
PACKAGES = ("torch", "diffusers", "peft")
WAYS = ("lora", "full")
STEPS = 2
VIEW = 512
ENCODER_LAYERS = 2
NEEDED_GB = {"lora": 9.0, "full": 18.0}
# Random weights have no use for a small rate, and what is compared should show.
LEARNING_RATE = 1e-2
ALPHA_OVER_RANK = 2.0
"""Not 1, so that a loader that loses alpha is found out."""


def settings_of() -> TrainSettings:
    """The preset's, as they are for these measurements."""
    settings = load_settings(TrainSettings, "train", ["--model.gradient_checkpointing=true", "--precision=fp32"], preset("lora"))
    assert settings.lora
    lora = settings.lora.model_copy(update={"alpha": ALPHA_OVER_RANK * settings.lora.rank})
    optimizer = settings.optimizer.model_copy(update={"learning_rate": LEARNING_RATE})
    return settings.model_copy(update={"lora": lora, "optimizer": optimizer})


def make_model(settings: TrainSettings) -> PaintByExampleModel:
    """The model with random weights."""
    torch.manual_seed(0)
    config = unet_config(str(settings.model.pretrained))
    unet = UNet2DConditionModel.from_config({**config, "in_channels": 2 * config["out_channels"] + 1})
    encoder = CLIPVisionModel(CLIPVisionConfig(**{**CLIP_SIZES, "num_hidden_layers": ENCODER_LAYERS}))
    return assemble(settings.model, unet, encoder)


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Two steps; the LoRA is written, too. Returns a row of the result."""
    settings = settings_of()
    model = make_model(settings)
    if way == "lora":
        assert settings.lora
        with_lora(model, settings.lora, weights_sha256(model.kept()))
    model = prepare(model, settings.model, torch.device("cpu")).train()
    trained = model.trained()
    optimizer = make_optimizer(trained, settings.optimizer)
    given = make_batch(model, settings.model, VIEW, 1, torch.device("cpu"))
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        mse_loss(model(*given), given[0]).backward()
        nn.utils.clip_grad_norm_(trained.values(), float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(round(time.perf_counter() - began, 1))
    row = {"way": way, "trained_millions": round(sum(each.numel() for each in trained.values()) / 1e6, 2), "seconds": seconds}
    row["weights_millions"] = round(sum(each.numel() for each in model.parameters()) / 1e6, 1)
    if way == "lora":
        assert settings.lora
        row |= {"rank": settings.lora.rank, "targets": list(settings.lora.targets)}
        write(model, settings.lora, folder / DIFFUSERS_FILE)
        row["file_mb"] = round((folder / DIFFUSERS_FILE).stat().st_size / 1e6, 1)
    row["peak_mb"] = round(high_water_mb() or 0)
    return row | (compare(model.eval(), given, folder) if way == "lora" else {})


def write(model: PaintByExampleModel, lora: LoraSettings, path: Path) -> None:
    """The U-Net's LoRA, as an export has it."""
    layers = layers_of({name: value.detach() for name, value in model.kept().items()}, lora.scale)
    unet = {name.removeprefix("unet."): folded(layer) for name, layer in layers.items() if name.startswith("unet.")}
    write_diffusers_lora(path, unet)


@torch.no_grad()
def compare(model: PaintByExampleModel, given: tuple[Tensor, ...], folder: Path) -> dict[str, Any]:
    """How far diffusers' U-Net with the file is from ours, and how far that is from the base's; both relative to its size."""
    seen, condition = torch.cat(given[:3], 1), model.conditioner(given[4])
    # The base's tensors themselves: a copy would take memory.
    base = {name.replace(".base_layer.", "."): value for name, value in model.unet.state_dict().items() if not is_lora(name)}
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(model.unet.config)
    plain.load_state_dict(base, assign=True)
    plain.eval()

    def output(unet: nn.Module) -> Tensor:
        return unet(seen, given[3], encoder_hidden_states=condition).sample  # type: ignore[no-any-return]

    ours, before = output(model.unet), output(plain)
    plain.load_lora_adapter(str(folder), weight_name=DIFFUSERS_FILE, prefix="unet")
    theirs = output(plain)
    shown = {"largest_output": ours, "largest_change_by_lora": ours - before, "largest_difference_to_diffusers": ours - theirs}
    return {name: float(f"{value.abs().max():.3g}") for name, value in shown.items()}


def main() -> None:
    """All ways, one after the other, or one of them in this process (`--way`, which prints its row)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to measure; rows of others stay in the file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="of the CPU; by default PyTorch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.way:
        with tempfile.TemporaryDirectory(prefix="lora-memory-") as folder:
            print(json.dumps(measure(options.way, Path(folder))))
        return
    for way in options.ways:
        print(measure_apart(way, options.threads), flush=True)


def measure_apart(way: str, threads: int | None) -> dict[str, Any]:
    """Measure in a process of its own, and put the row into the file of results.

    Raises:
        InputError: too little memory is free, or the process failed.
    """
    free = psutil.virtual_memory().available / 1e9
    if free < NEEDED_GB[way]:
        raise InputError(f"{free:.1f} GB of memory are free, and {way} needs {NEEDED_GB[way]:g}; end other programs first")
    words = [sys.executable, "-m", "benchmarks.lora_memory", "--way", way]
    machine = describe_machine()
    done = subprocess.run(words + (["--threads", str(threads)] if threads else []), capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{way} failed (status {done.returncode}): {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    row = json.loads(done.stdout.splitlines()[-1])
    known = {row["way"]: row for row in json.loads(FILE.read_bytes())["ways"]} if FILE.is_file() else {}
    rows = {**known, way: {**row, "date": today(), "machine": machine, "versions": describe_versions(PACKAGES)}}
    peaks = [rows[each]["peak_mb"] for each in WAYS if each in rows]
    share = round(peaks[0] / peaks[1], 3) if len(peaks) == len(WAYS) else None
    result = {"view_px": VIEW, "share_of_full": share, "ways": [rows[each] for each in WAYS if each in rows]}
    FILE.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return row


if __name__ == "__main__":
    run_program(main)
