"""Losses of the tiny preset's first steps, and on which machine they were computed: what tests/pbe_train/test_golden.py compares.

    python -m tests.pbe_train.golden        # writes tests/pbe_train/golden_losses.json anew, in a minute

To be run where a change of the numbers is meant, or where the libraries in constraints.txt have changed; say which in the commit.
"""

import hashlib
import json
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pbe_core.settings import load_settings, preset
from pbe_train.config import TrainSettings
from pbe_train.train import train as run
from pbe_train.training.distributed import Distributed
from tests.conftest import build_options, run_build
from tiny_world.make_photos import make_world

FILE = Path(__file__).with_name("golden_losses.json")
"""`machine`: what the last bits of a loss depend on; `shards`: SHA-256 over those of training; `losses` of each precision."""
STEPS = 8
PRECISIONS = ("bf16", "fp32")
LIBRARIES = ("torch", "numpy", "opencv-python-headless", "albumentations", "diffusers", "transformers")
TOLERANCE = 0.02
"""Relative, on another machine; it is far more than lies between the two precisions on one machine."""
# What decides, besides torch's own word for the CPU, which kernels of bf16 are taken.
CPU_FLAGS = ("avx512_bf16", "amx_bf16", "amx_int8", "amx_tile")


def machine() -> dict[str, str]:
    """Versions, and the kind of CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = first.get("flags", "").split()
    cpu = [platform.machine(), torch.backends.cpu.get_cpu_capability(), first.get("vendor_id", "")]
    known = {name: version(name) for name in LIBRARIES}
    return {**known, "cpu": " ".join([*cpu, *(flag for flag in CPU_FLAGS if flag in flags)])}


def shards_sha256(dataset: Path) -> str:
    """Hash over all bytes of the training shards, in order of their names."""
    total = hashlib.sha256()
    for path in sorted((dataset / "shards").glob("train-*.tar")):
        total.update(path.read_bytes())
    return total.hexdigest()


def train(dataset: Path, out: Path, precision: str) -> list[float]:
    """The losses of the first steps, on one thread of the CPU."""
    fixed = {"steps": STEPS, "log_every": 1, "threads": 1, "loader.workers": 0, "pictures.every": 0, "validation.every": 0}
    given = {"dataset": dataset, "out": out, "precision": precision, **fixed}
    settings = load_settings(TrainSettings, "train", [f"--{key}={value}" for key, value in given.items()], preset("tiny"))
    torch.set_num_threads(1)
    run(settings, Distributed(0, 1, torch.device("cpu")))
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines]


def compare(golden: dict[str, Any], precision: str, losses: Sequence[float], here: dict[str, str], shards: str) -> str | None:
    """What is wrong with losses that were computed `here` from `shards`; null where nothing is.

    To the last bit on a machine of the file's kind, to `TOLERANCE` on another one.
    """
    others = [
        f"{name} {golden['machine'].get(name)} -> {here[name]}" for name in here if golden["machine"].get(name) != here[name]
    ]
    tolerance = TOLERANCE if others else 0.0
    apart = [abs(found - known) / known for found, known in zip(losses, golden["losses"][precision], strict=True)]
    wrong = [step for step, distance in enumerate(apart, 1) if not distance <= tolerance]  # Not a number is wrong, too.
    if not wrong:
        return None
    how = f"compared to {tolerance:.0%}, since the machine is another: {'; '.join(others)}" if others else "compared exactly"
    data = "the same" if shards == golden["shards"] else "others, so look at the pipeline first"
    return (
        f"{precision}: {len(wrong)} of {len(apart)} losses are not those of {FILE.name}, from step {wrong[0]} on ({how}); the "
        f"shards are {data}. Where the change is meant: python -m tests.pbe_train.golden"
    )


def main() -> None:
    """Build the dataset of the tests, train, write the file."""
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        photos, dataset = folder / "photos", folder / "dataset"
        make_world(photos, 36, 16, 7, 1)
        run_build(*build_options(photos, dataset), "--ray.actors", "2")
        losses = {precision: train(dataset, folder / precision, precision) for precision in PRECISIONS}
        golden = {"machine": machine(), "shards": shards_sha256(dataset), "losses": losses}
    FILE.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
