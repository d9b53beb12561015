"""The paper's table of ablations, run again over any preset: arms that add one setting each, some seeds each, one evaluation.

    python -m pbe_train.ablations --config configs/tiny.yaml --pairs data/tiny/questions --judge NAME:KIND=WHERE

    arms x seeds ──pbe train──▶ OUT/runs/ARM-seedS ──pbe evaluate──▶ OUT/evaluation ──▶ OUT/table.md, index.html, ablations.json

Every other option (`--key value`) is the trainer's, for all runs alike. Stopped, the same command goes on where it was.
docs/ablations.md explains the arms, what is the same for all of them, and the intervals.
"""

import argparse
import os
import shlex
from pathlib import Path

from pbe_core.errors import InputError, run_program
from pbe_train.model.sampling import STEPS

QUICK = {"steps": 40, "seeds": 2, "count": 32, "sampling_steps": 8}
FULL = {"steps": None, "seeds": 3, "count": None, "sampling_steps": STEPS}
OWN = ("out", "seed", "resume", "threads")
"""Settings of the trainer that the runs get from here."""


def main() -> int:
    """Train, evaluate and report; returns the exit status."""
    options, trainer = parse_options()
    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.ladder.program import climb

    return climb(options, trainer)


def parse_options(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the options of the trainer in it.

    Raises:
        InputError: options that do not go together.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Every other option is the trainer's (python -m pbe_train.train --help), for all runs alike: "
        "--model.pretrained FOLDER, --dataset FOLDER, --optimizer.learning_rate 1e-4. docs/ablations.md explains the rest.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", default="configs/tiny.yaml", help="preset whose settings the last arm has (default: configs/tiny.yaml)")
    add("--out", type=Path, help="folder of runs, evaluation, table and page (default: runs/ablations, or -quick)")
    add("--pairs", type=Path, required=True, help="pair set that all runs paint, as of `pbe evaluate`")
    add("--judge", nargs="+", required=True, metavar="[NAME:]KIND=WHERE", help="networks that score, as of `pbe evaluate`")
    add("--arms", nargs="+", default=[], metavar="ARM", help="some of: baseline prior augmentation bottleneck guidance")
    add("--seeds", type=int, help="trainings of each arm, of seeds 0, 1, ... (default: 3)")
    add("--steps", type=int, help="steps of each training (default: the preset's)")
    add("--quick", action="store_true", help="few steps, seeds, pairs and sampling steps: does it run? It tells nothing else")
    add("--workers", type=int, help="trainings at once (default: 2 on a CPU with two cores or more, else 1)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of all trainings together (default: all cores)")
    add(
        "--launch", default="", metavar="COMMAND", help='what starts a training in place of Python: "torchrun --nproc-per-node 8"'
    )
    add("--only", choices=("train", "evaluate"), help="one phase alone; evaluate takes the runs that are finished")
    add("--guidance", type=float, default=5.0, help="that the last arm is painted with; the others have 1 (default: 5)")
    add("--sampling-steps", type=int, help=f"denoising steps (default: {STEPS})")
    add("--count", type=int, help="pairs of the set, drawn (default: all)")
    add("--batch", type=int, default=16, help="pairs painted at once (default: 16)")
    options, trainer = parser.parse_known_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out = options.out or Path("runs/ablations-quick" if options.quick else "runs/ablations")
    names = ("seeds", "steps", "workers", "threads", "sampling_steps", "count", "batch")
    if wrong := [name for name in names if getattr(options, name) is not None and getattr(options, name) < 1]:
        raise InputError(f"--{wrong[0].replace('_', '-')} {getattr(options, wrong[0])}: must be 1 or more")
    # A folder may be called `out`, or a setting's value `seed`.
    given = {word.removeprefix("--").partition("=")[0] for word in trainer if word.startswith("--")}
    if own := sorted(given.intersection(OWN)):
        raise InputError(f"--{own[0]}: each run gets its own; see --out, --seeds and --threads")
    if options.only == "evaluate" and options.launch:
        raise InputError(
            "--launch starts trainings; share an evaluation by starting this program so: torchrun ... --only evaluate"
        )
    if "RANK" in os.environ and options.only != "evaluate":
        raise InputError("under torchrun only the evaluation is shared (--only evaluate); trainings are started by --launch")
    options.launch = shlex.split(options.launch)
    return options, trainer


if __name__ == "__main__":
    run_program(main)
