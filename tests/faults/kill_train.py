"""kill -9 of a training at random moments: the run must come out as if nothing had been.

    python -m tests.faults.kill_train --kills 20 [--tier 8gb]

A training of the tests' small world is killed again and again, each time started by the same command, with its checkpoints
written every step and two loader processes, whose orphans may still be at it when the next run begins. A run that comes to its
end before all kills are spent is compared, and the next one begins. Weights, moving average, optimizer and all lines of metrics
but their times must be those of a run that nothing disturbed. Prints a line for each kill, and ends with an AssertionError if
anything is wrong. With `--tier`, weights, moments and average are kept as a preset for a small GPU keeps them.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.pbe_train.small_world import World, make_world
from tests.pbe_train.test_resume import Runs, newest, partial, status, straight, what_was_computed
from tests.pbe_train.tiers import OPTIONS

OFTEN = ["--checkpoint_every=1", "--keep_last=3", "--log_every=3", "--loader.workers=2"]


def train_command(config: Path, out: Path, steps: int) -> list[str]:
    """The program as a user starts it, on the CPU: a GPU does not add up in the same order each time."""
    program = ["env", "CUDA_VISIBLE_DEVICES=", sys.executable, "pbe_train/train.py", "--config", str(config), "--out", str(out)]
    return [*program, f"--steps={steps}", *OFTEN]


def kill_one(world: World, out: Path, options: list[str], kills: int, rng: random.Random) -> list[int]:
    """Kill a run at most so often, and let it come to its end; the steps that were saved at each kill."""
    hit: list[int] = []
    with Runs(world, out, *options) as runs:
        while len(hit) < kills:
            process, enough = runs.start(), newest(out) + rng.randint(1, 2)
            late = time.monotonic() + (rng.uniform(0, 2) if rng.random() < 0.15 else 1e9)
            while process.is_alive() and newest(out) < enough and time.monotonic() < late:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            if status(process) == 0:  # It was faster.
                return hit
            hit.append(newest(out))
            print(f"{out.name}: killed after step {hit[-1]}{', another checkpoint half written' if partial(out) else ''}")
        runs.finish()
    return hit


def run(kills: int, steps: int, seed: int, folder: Path, tier: str | None = None) -> list[int]:
    """The undisturbed run, then those that are hit, until all kills are spent; the steps that were saved at each kill."""
    torch.set_num_threads(1)  # As the runs that are killed: two threads add up in another order.
    world, rng = make_world(folder / "world"), random.Random(seed)
    options = [f"--steps={steps}", *OFTEN, *(OPTIONS[tier] if tier else [])]
    calm = what_was_computed(straight(world, folder / "calm", *options), steps)
    hit: list[int] = []
    for number in range(1, kills + 1):
        out = folder / f"run-{number}"
        hit += kill_one(world, out, options, kills - len(hit), rng)
        assert what_was_computed(out, steps) == calm, f"{out}: not what an undisturbed run computes"
        assert not partial(out)
        if len(hit) == kills:
            break
    return hit


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--tier", choices=OPTIONS, help="keep things as this preset for a small GPU does (default: none)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-train-") as folder:
        hit = run(given.kills, given.steps, given.seed, Path(folder), given.tier)
    print(f"{len(hit)} kills: all runs left the bytes and the metrics of an undisturbed one")


if __name__ == "__main__":
    main()
