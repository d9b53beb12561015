"""How long an evaluation looks at its pictures: features and distances of two sets of PNGs, ours beside torch-fidelity's.

    python -m benchmarks.evaluation [--pictures 3500] [--torch-fidelity PYTHON] [--results FILE]

Two folders of drawn pictures of 512 px are compared by FID and KID on Inception's features (random weights: the arithmetic is the
same, nothing to download). Each way is a process of its own and they take turns: ours on all cores, torch-fidelity on all cores,
ours in one process on one core, and ours in two processes on a core each. Peak memory is that of the largest process.

torch-fidelity has an environment of its own, which `python -m tests.compat.judges --venv FOLDER` makes; without it that way is
left out. FIDs of both ways are printed: their resizing differs (TensorFlow's and PyTorch's), so they differ, but not by much.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from pbe_core.errors import InputError, run_program

SIZE = 512
TURNS = 2
THEIRS = "torch-fidelity"
WAYS = ("ours", THEIRS, "one process, one core", "two processes, a core each")
# Beside a PyTorch for the CPU, torchvision's wheel of PyPI lacks an operator, which nothing here calls.
FOREIGN = """
import resource, sys, time
import torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torch_fidelity import calculate_metrics
first, second, weights, pictures, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
began = time.perf_counter()
found = calculate_metrics(
    input1=first, input2=second, fid=True, kid=True, cuda=False, batch_size=64, cache=False, verbose=False,
    kid_subset_size=min(1000, int(pictures)),
    feature_extractor_weights_path=weights, samples_find_deep=True,
)
seconds = time.perf_counter() - began
print(seconds, found["frechet_inception_distance"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@dataclass(frozen=True)
class Measurement:
    """One way: pictures are those of both sets; MB are 10^6 bytes, of the largest process."""

    way: str
    pictures: int
    seconds: float
    pictures_per_second: float
    peak_mb: float
    fid: float | None


def main() -> None:
    """Draw, measure in turns, print, write."""
    options = parse_options()
    if options.look:
        look(options)
        return
    ways = [way for way in options.ways if way != THEIRS or options.torch_fidelity]
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        draw_sets(world, options.pictures)
        measured = {way: [] for way in ways}
        for turn in range(options.turns):
            for way in ways:
                measured[way].append(measure(way, world, options, turn))
                print(f"{way}: {measured[way][-1].pictures_per_second:.1f} pictures/s", file=sys.stderr)
    best = [min(measured[way], key=lambda one: one.seconds) for way in ways]
    Console().print(make_table(best))
    content = {
        "date": today(),
        "machine": machine,
        "versions": describe_versions(["torch", "numpy", "pillow"]),
        "turns": options.turns,
        "rows": [asdict(one) for one in best],
    }
    options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw_sets(world: Path, count: int) -> None:
    """Two folders of pictures with edges and noise, which cost what photos cost to decode; and the judge's weights."""
    import torch

    from tests.compat.judge_files import inception_tensors

    torch.save(inception_tensors(), world / "inception.pth")
    for name, seed in (("first", 0), ("second", 1)):
        (world / name).mkdir()
        random = np.random.default_rng(seed)
        for number in range(count):
            coarse = random.integers(0, 256, (16, 16, 3), np.uint8)
            photo = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int16)
            noise = random.integers(-12, 13, photo.shape, np.int16)
            Image.fromarray((photo + noise).clip(0, 255).astype(np.uint8)).save(
                world / name / f"{number:06d}.png", compress_level=1
            )


def measure(way: str, world: Path, options: argparse.Namespace, turn: int) -> Measurement:
    """One way, once. Raises: InputError: its program fails."""
    cpus = os.cpu_count() or 1
    threads = str(cpus if way in ("ours", THEIRS) else 1)
    pictures = 2 * options.pictures
    if way == THEIRS:
        command = [
            str(options.torch_fidelity),
            "-c",
            FOREIGN,
            str(world / "first"),
            str(world / "second"),
            str(world / "inception.pth"),
        ]
        seconds, fid, peak = map(float, run([[*command, str(options.pictures), threads]])[0].split())
        return Measurement(way, pictures, seconds, pictures / seconds, peak / 1e6, fid)
    processes = 2 if way.startswith("two") else 1
    cache = world / f"features {way} {turn}"
    command = [sys.executable, "-m", "benchmarks.evaluation", "--look", str(world), "--cache", str(cache), "--threads", threads]
    outputs = [
        json.loads(line)
        for line in run(
            [
                [*command, "--pictures", str(options.pictures), "--rank", str(rank), "--world", str(processes)]
                for rank in range(processes)
            ]
        )
    ]
    seconds, fid = max(one["seconds"] for one in outputs), None
    if processes == 1:
        fid = outputs[0]["fid"]
    return Measurement(way, pictures, seconds, pictures / seconds, max(one["peak"] for one in outputs) / 1e6, fid)


def run(commands: list[list[str]]) -> list[str]:
    """The last line of each program; all run at once."""
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise InputError("a program that was measured failed; what it printed stands above")
    return [output.strip().splitlines()[-1] for output in outputs]


def look(options: argparse.Namespace) -> None:
    """Ours: what `pbe evaluate` does with a row and the real pictures. One of two processes leaves the distances to nobody."""
    import torch

    from pbe_core.judges.judge import load_judge
    from pbe_train.evaluation.distances import frechet_distance, kernel_distance
    from pbe_train.evaluation.features import extract, look_at_real, read_features
    from pbe_train.evaluation.real_photos import open_real_photos

    torch.set_num_threads(options.threads)
    if options.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[options.rank]})
    judge = load_judge(f"inception-legacy={options.look / 'inception.pth'}")
    began = time.perf_counter()
    for name in ("first", "second"):
        photos = open_real_photos(options.look / name, None)
        look_at, folder = look_at_real(photos, [judge], "png"), options.cache / name
        extract(look_at, options.pictures, [judge], folder, threads=options.threads, rank=options.rank, world=options.world)
    fid = None
    if options.world == 1:
        first, second = (
            read_features(options.cache / name, options.pictures)["whole/inception-legacy"] for name in ("first", "second")
        )
        fid = frechet_distance(first, second)
        kernel_distance(first, second)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "fid": fid, "peak": peak}))


def make_table(rows: list[Measurement]) -> Table:
    """The measurements for people."""
    table = Table(title="Features and distances of two sets (FID, KID)", title_justify="left")
    for heading in ("way", "pictures", "seconds", "pictures/s", "peak MB", "FID"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        fid = "" if row.fid is None else f"{row.fid:.4f}"
        table.add_row(
            row.way, f"{row.pictures:,}", f"{row.seconds:.1f}", f"{row.pictures_per_second:.1f}", f"{row.peak_mb:,.0f}", fid
        )
    return table


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=3500, help="of each set (default: %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=TURNS, help="of each way, of which the fastest counts (default: %(default)s)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="(default: all)")
    parser.add_argument("--torch-fidelity", type=Path, metavar="PYTHON", help="a Python that has torch-fidelity 0.4.0")
    parser.add_argument("--results", type=Path, default=RESULTS / "evaluation.json", help="file to write (default: %(default)s)")
    # For the processes that are measured.
    for name, kind in (("--look", Path), ("--cache", Path), ("--threads", int), ("--rank", int), ("--world", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
