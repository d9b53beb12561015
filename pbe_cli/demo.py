"""All of it on the tiny world, in the current folder: photos, shards, a model, and a picture of what it paints.

    data/tiny/photos ──▶ data/tiny/dataset ──▶ runs/tiny ──▶ runs/tiny/demo.png

All but the first step are programs of their own. Stopped, the same command goes on where it was. Two CPU cores, no GPU and no
network are enough: about eight minutes with all steps.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from pbe_core.errors import InputError, run_program

PHOTOS = Path("data/tiny/photos")
DATASET = Path("data/tiny/dataset")
RUN = Path("runs/tiny")
# Of the tiny world's 2,150 photos 150 are for validation.
VALIDATION_SHARE = 150 / 2000


def main() -> int:
    """Make what is missing, step by step; returns the exit status of the step that failed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--photos", type=int, default=2000, help="photos to train on, if they are not drawn yet")
    parser.add_argument("--steps", type=int, help="training steps, by default those of the preset; with a few, shapes are blobs")
    options = parser.parse_args()
    if options.photos < 1 or (options.steps is not None and options.steps < 1):
        raise InputError(f"--photos {options.photos}, --steps {options.steps}: must be 1 or more")
    if not (PHOTOS / "class-descriptions-boxable.csv").is_file():  # Written last.
        from tiny_world.make_photos import make_world

        make_world(PHOTOS, options.photos, max(16, round(options.photos * VALIDATION_SHARE)), seed=0, processes=1)
    given = ["--steps", str(options.steps)] if options.steps else []
    steps = [
        ["pbe_cli", "build", "--config", "tiny"],
        # The last step draws the picture.
        ["pbe_cli", "train", "--config", "tiny", "--pictures.every", "0", *given],
        ["pbe_train.demo", "--model", str(RUN), "--dataset", str(DATASET), "--out", str(RUN / "demo.png"), "--guidance", "2"],
    ]
    for module, *rest in steps:
        status = run_module(module, rest)
        if status:
            return status
    return 0


def run_module(module: str, arguments: list[str]) -> int:
    """`python -m MODULE`, to its end; returns its exit status. It is stopped as this program is, and says itself what it kept."""
    with subprocess.Popen([sys.executable, "-m", module, *arguments]) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while True:
            try:
                status = process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:  # The terminal tells both.
                continue


if __name__ == "__main__":
    run_program(main)
