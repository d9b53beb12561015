"""Losses of the tiny preset's first steps, and on which machine they were computed: what tests/pbe_train/test_golden.py compares.

    python -m tests.pbe_train.golden        # writes tests/pbe_train/golden_losses.json anew, in a minute

To be run where a change of the numbers is meant, or where the libraries in constraints.txt have changed; say which in the commit.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch

from pbe_core.settings import REPOSITORY
from tests.conftest import build_options, run_build
from tiny_world.make_photos import make_world

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 20
PRECISIONS = ("bf16", "fp32")
"""The first is what the preset says."""
LIBRARIES = ("torch", "numpy", "opencv-python-headless", "albumentations", "diffusers", "transformers")
TOLERANCE = 0.02
"""Relative, on another machine; it is far more than lies between the two precisions on one machine."""
# What decides, besides torch's own word for the CPU, which kernels of bf16 are taken.
CPU_FLAGS = ("avx512_bf16", "amx_bf16", "amx_int8", "amx_tile")


class Golden(TypedDict):
    """The content of golden_losses.json."""

    machine: dict[str, str]
    """What the last bits of a loss depend on."""
    shards: str
    """SHA-256 over the training shards."""
    losses: dict[str, list[float]]
    """Precision -> loss of each step."""


def machine() -> dict[str, str]:
    """Versions, and the kind of CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = first.get("flags", "").split()
    cpu = [platform.machine(), torch.backends.cpu.get_cpu_capability(), first.get("vendor_id", "")]
    return {
        **{name: version(name) for name in LIBRARIES},
        "cpu": " ".join([*cpu, *(flag for flag in CPU_FLAGS if flag in flags)]),
    }


def shards_sha256(dataset: Path) -> str:
    """Hash over all bytes of the training shards, in order of their names."""
    total = hashlib.sha256()
    for path in sorted((dataset / "shards").glob("train-*.tar")):
        total.update(path.read_bytes())
    return total.hexdigest()


def train(dataset: Path, out: Path, precision: str) -> list[float]:
    """The losses of the first steps, by the program as a user starts it, on one thread of the CPU."""
    fixed = {"steps": STEPS, "log_every": 1, "threads": 1, "loader.workers": 0, "pictures.every": 0, "validation.every": 0}
    options = [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    if precision != PRECISIONS[0]:
        options += ["--precision", precision]
    places = ["--config", "configs/tiny.yaml", "--dataset", str(dataset), "--out", str(out)]
    command = [sys.executable, "pbe_train/train.py", *places, *options]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=hidden, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines]


def compare(golden: Golden, precision: str, losses: Sequence[float], here: dict[str, str], shards: str) -> str | None:
    """What is wrong with losses that were computed `here` from `shards`; null where nothing is.

    To the last bit on a machine of the file's kind, to `TOLERANCE` on another one.
    """
    expected = golden["losses"][precision]
    others = [
        f"{name} {golden['machine'].get(name)} -> {here.get(name)}" for name in here if golden["machine"].get(name) != here[name]
    ]
    tolerance = TOLERANCE if others else 0.0
    apart = [abs(found - known) / abs(known) for found, known in zip(losses, expected, strict=True)]
    wrong = [step for step, distance in enumerate(apart, 1) if not distance <= tolerance]  # Not a number is wrong, too.
    if not wrong:
        return None
    worst = max(apart, key=lambda distance: math.inf if math.isnan(distance) else distance)
    how = f"compared to {tolerance:.0%}, since the machine is another: {'; '.join(others)}" if others else "compared exactly"
    data = "the same" if shards == golden["shards"] else "others, so look at the pipeline first"
    return (
        f"{precision}: {len(wrong)} of {len(expected)} losses are not those of {FILE.name}, from step {wrong[0]}, "
        f"by up to {worst:.1e} ({how}); the shards are {data}. Where the change is meant: python -m tests.pbe_train.golden"
    )


def main() -> None:
    """Build the dataset of the tests, train, write the file."""
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        photos, dataset = folder / "photos", folder / "dataset"
        make_world(photos, 36, 16, 7, 1)
        run_build(*build_options(photos, dataset), "--ray.actors", "2")
        losses = {precision: train(dataset, folder / precision, precision) for precision in PRECISIONS}
        golden = Golden(machine=machine(), shards=shards_sha256(dataset), losses=losses)
    FILE.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE}: {STEPS} losses each of {', '.join(PRECISIONS)} on {golden['machine']['cpu']}")


if __name__ == "__main__":
    main()
