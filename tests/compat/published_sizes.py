"""The published sizes, once and for real: random weights -> dataset -> two training steps -> export -> load -> an edit at 512 px.

    python -m tests.compat.published_sizes --scratch FOLDER

Random weights in the shape of Stable Diffusion v1-4 and CLIP ViT-L/14 stand in for the real ones, drawn photos for real ones;
what runs are the project's own programs, one after the other, each in a process of its own. Takes 40 GB of disk, 20 GB of memory
and ten minutes on two cores; prints a table of time and peak memory, and ends with status 2 where a program fails.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.packing_world import draw_photos, make_world
from pbe_core.errors import InputError, run_program
from pbe_core.settings import REPOSITORY
from pbe_train.checkpoints.networks import CLIP_SIZES, VAE_SIZES, new_unet_config

SAMPLES = 4


def make_networks(folder: Path) -> None:
    """Random weights of the published sizes in diffusers' layout, as the hub has the real ones, and CLIP's vision model."""
    torch.manual_seed(0)
    config = {**new_unet_config(), "in_channels": 4}
    unet = UNet2DConditionModel.from_config(config)
    print(f"U-Net: {sum(parameter.numel() for parameter in unet.parameters()) / 1e6:.1f} M parameters", flush=True)
    unet.save_pretrained(folder / "sd" / "unet")
    del unet
    AutoencoderKL.from_config(VAE_SIZES).save_pretrained(folder / "sd" / "vae")
    CLIPVisionModel(CLIPVisionConfig(**CLIP_SIZES)).save_pretrained(folder / "clip")


def run_measured(words: list[str]) -> tuple[float, float]:
    """Run a program of the project to its end; seconds, and GB that it had in memory at most.

    Raises:
        InputError: it failed.
    """
    print(f"$ {shlex.join(words)}", flush=True)
    started = time.monotonic()
    process = os.posix_spawn(sys.executable, [sys.executable, *words], {**os.environ, "PYTHONPATH": str(REPOSITORY)})
    _, status, usage = os.wait4(process, 0)
    if status:
        raise InputError(f"{shlex.join(words)}: failed with status {os.waitstatus_to_exitcode(status)}; see above")
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder with 40 GB of room")
    scratch = parser.parse_args().scratch.resolve()
    if scratch.exists() and any(scratch.iterdir()):
        raise InputError(f"--scratch {scratch}: not empty; give another folder")
    scratch.mkdir(parents=True, exist_ok=True)
    os.chdir(REPOSITORY)
    make_networks(scratch)
    make_world(scratch / "world", draw_photos(scratch / "drawn"), SAMPLES)
    photo = sorted((scratch / "drawn").iterdir())[0]
    mask = np.zeros(cv2.imread(str(photo)).shape[:2], np.uint8)
    mask[200:400, 300:560] = 255
    cv2.imwrite(str(scratch / "mask.png"), mask)

    preset, dataset, run = ["--config", "configs/open_images.yaml"], scratch / "dataset", scratch / "run"
    sources = {"source.annotations": scratch / "world", "source.photos": scratch / "world", "source.splits": '["train"]'}
    build = {**sources, "latents.vae": scratch / "sd", "out": dataset, "shards.samples": SAMPLES}
    model = {"model.pretrained": scratch / "sd", "model.vae": scratch / "sd", "model.encoder": scratch / "clip"}
    train = {**model, "model.gradient_checkpointing": "true", "dataset": dataset, "out": run, "steps": 2, "global_batch": 1}
    quiet = {"pictures.every": 0, "validation.every": 0, "loader.workers": 0, "log_every": 1, "ema_decay": 0}
    exported = scratch / "exported"
    export = ["-m", "pbe_train.export", *options({"model": run})]
    sample = ["-m", "pbe_train.sample", *options({"image": photo, "mask": scratch / "mask.png", "reference": photo, "steps": 2})]
    steps = {
        "build (4 samples, 12 encodings)": ["pipelines/build.py", *preset, *options(build)],
        "2 training steps, batch 1, fp32": ["pbe_train/train.py", *preset, *options(train | quiet)],
        "export, diffusers": [*export, *options({"out": exported, "format": "diffusers"})],
        "export, ldm": [*export, *options({"out": scratch / "ldm" / "model.ckpt", "format": "ldm"})],
        "2-step edit at 512 px": [*sample, *options({"model": run, "out": scratch / "edited.png"})],
        "2-step edit of the export": [*sample, *options({"model": exported, "out": scratch / "again.png"})],
    }
    table = Table("program", "minutes", "peak memory, GB")
    for name, words in steps.items():
        seconds, memory = run_measured(words)
        table.add_row(name, f"{seconds / 60:.1f}", f"{memory:.1f}")
    Console().print(table)
    check(scratch)


def options(values: dict[str, object]) -> list[str]:
    """As words of a command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def check(scratch: Path) -> None:
    """The run trained, what was exported is the run, and edits keep what is outside the mask."""
    (trained,) = (scratch / "run" / "checkpoints").glob("step-00000002/model.safetensors")
    before = load_file(next((scratch / "sd" / "unet").glob("*.safetensors")))
    after, exported = load_file(trained), load_file(next((scratch / "exported" / "unet").glob("*.safetensors")))
    name = "mid_block.resnets.0.conv1.weight"
    assert not torch.equal(before[name], after[f"unet.{name}"]), "two steps changed nothing"
    for key, value in exported.items():
        assert torch.equal(value, after[f"unet.{key}"]), f"{key} of the exported U-Net is not the run's"
    photo, mask = cv2.imread(str(sorted((scratch / "drawn").iterdir())[0])), cv2.imread(str(scratch / "mask.png"))[..., 0] > 0
    first, second = cv2.imread(str(scratch / "edited.png")), cv2.imread(str(scratch / "again.png"))
    assert np.array_equal(first[~mask], photo[~mask]), "an edit changes what is outside the mask"
    assert not np.array_equal(first[mask], photo[mask]), "an edit changes nothing"
    assert np.array_equal(first, second), "the export does not paint as the run"
    print("the export is the run, byte for byte, and edits alike; outside the mask nothing changed")


if __name__ == "__main__":
    run_program(main)
