"""The story of a ladder: train, evaluate, compare, show. `pbe_train/ablations.py` is its command line."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from pbe_core.errors import InputError
from pbe_core.files import lock_folder
from pbe_core.settings import load_settings
from pbe_core.words import number_of
from pbe_train.config import TrainSettings
from pbe_train.ladder.arms import choose_arms, with_sizes_of_start
from pbe_train.ladder.comparison import Ladder, compare
from pbe_train.ladder.report import write_reports
from pbe_train.ladder.runs import TrainingRun, claim, list_runs, train_all
from pbe_train.ladder.scores import FOLDER, HowPainted, check_evaluation, score_runs

IN_USE = "another process runs this ladder; wait until it has ended, or give another --out"
REPLICATES = 2000


def climb(options: argparse.Namespace, trainer: Sequence[str]) -> int:
    """Train what is missing, evaluate what is finished, and write table, page and JSON; returns the exit status.

    Args:
        options: of `pbe_train.ablations.parse_options`.
        trainer: options of the trainer, for all runs alike.

    Raises:
        InputError: something is missing or damaged, does not fit together, or the folder is another ladder's.
    """
    first = os.environ.get("RANK", "0") == "0"
    settings = read_settings(options, trainer)
    arms = choose_arms(options.arms, settings)
    settings = with_sizes_of_start(settings)
    runs = list_runs(arms, options.seeds, settings, options.out)
    failed: dict[str, str] = {}
    how = how_painted(options)
    if options.only is None:
        check_evaluation(how)
    if first:
        claim(options.out, settings)
    if options.only != "evaluate":
        print(f"{number_of(len(arms), 'arm')} x {number_of(options.seeds, 'seed')}, {settings.steps:,} steps each", flush=True)
        with lock_folder(options.out, IN_USE):
            outcome = train_all(runs, trainer_options(options, trainer), launcher(options), workers_of(options))
        if outcome.stopped_by:
            print("stopped: what was trained is saved, and the same command goes on from there", file=sys.stderr)
            return 128 + outcome.stopped_by
        failed = outcome.failed
    done = [run for run in runs if run.finished]
    if done and options.launch and options.only is None:
        failed |= evaluate_shared(options)
    elif done and options.only != "train":
        # Finished runs may be looked at while others are trained.
        with lock_folder(options.out / FOLDER, IN_USE) if first else nullcontext():
            evaluate(how, settings, runs, failed, options.out)
    if first:
        tell(runs, failed, options.only)
    return int(bool(failed))


def read_settings(options: argparse.Namespace, trainer: Sequence[str]) -> TrainSettings:
    """The preset's settings with the command line's over them: those of the last arm. Raises InputError: as the trainer does."""
    steps = [] if options.steps is None else [f"--steps={options.steps}"]
    return load_settings(TrainSettings, "train", ["--config", str(options.config), f"--out={options.out}", *steps, *trainer])


def trainer_options(options: argparse.Namespace, trainer: Sequence[str]) -> list[str]:
    """What a run's config file does not hold: threads, which depend on the machine, and a dataset's credentials."""
    # torchrun's processes share the cores out among themselves.
    threads = [] if options.launch else ["--threads", str(max(1, options.threads // workers_of(options)))]
    given = [place for place, word in enumerate(trainer) if word.partition("=")[0] == "--storage"]
    return [*threads, *(word for place in given for word in trainer[place : place + (1 if "=" in trainer[place] else 2)])]


def launcher(options: argparse.Namespace) -> list[str]:
    """What a module's `-m` stands behind."""
    return options.launch or [sys.executable]


def workers_of(options: argparse.Namespace) -> int:
    """Trainings at once: by default one a core up to two on a CPU, and one where it may take the GPUs."""
    alone = options.launch or torch.cuda.is_available()
    return int(options.workers or (1 if alone else min(2, options.threads)))


def how_painted(options: argparse.Namespace) -> HowPainted:
    """What the options say of the evaluation."""
    return HowPainted(
        pairs=options.pairs,
        judges=options.judge,
        guidance=options.guidance,
        sampling_steps=options.sampling_steps,
        count=options.count,
        batch=options.batch,
        threads=options.threads,
    )


def evaluate(
    how: HowPainted,
    settings: TrainSettings,
    runs: Sequence[TrainingRun],
    failed: dict[str, str],
    out: Path,
) -> None:
    """Score the finished runs, compare the arms, and write what came of it."""
    scored = score_runs([run for run in runs if run.finished], how, out / FOLDER)
    if scored is None:
        return
    ladder: Ladder = compare(scored, runs, how, settings, failed, REPLICATES)
    write_reports(ladder, out)


def evaluate_shared(options: argparse.Namespace) -> dict[str, str]:
    """The evaluation by as many processes as trained; what failed."""
    words, place = sys.argv[1:], 0
    while place < len(words):
        if words[place].partition("=")[0] == "--launch":
            del words[place : place + (1 if "=" in words[place] else 2)]
        else:
            place += 1
    status = subprocess.run([*options.launch, "-m", "pbe_train.ablations", *words, "--only", "evaluate"]).returncode
    return {"the evaluation": f"exit status {status}; its message stands above"} if status else {}


def tell(runs: Sequence[TrainingRun], failed: dict[str, str], only: str | None) -> None:
    """Say what is still missing, and what failed."""
    if missing := [run.name for run in runs if not run.finished and run.name not in failed]:
        print(f"not finished, and left out: {', '.join(missing)}", file=sys.stderr)
        if only == "evaluate" and len(missing) == len(runs):
            raise InputError("no run is finished: there is nothing to evaluate")
    for name, cause in failed.items():
        print(f"error: {name}: {cause}", file=sys.stderr)
    if failed:
        print("the same command tries what failed again, and keeps the rest", file=sys.stderr)
