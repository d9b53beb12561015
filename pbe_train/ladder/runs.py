"""The trainings of a ladder: each a program of its own with a folder of its own, some at once, and none done twice.

    OUT/settings.json ──the same?──▶ OUT/runs/ARM-seedS.yaml ──pbe train──▶ OUT/runs/ARM-seedS/

A run that stopped goes on when the same command is given again; one that fails does not keep the others from their end.
"""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pbe_core.errors import InputError
from pbe_core.files import write_atomically
from pbe_core.progress import Progress
from pbe_core.settings import dump_settings
from pbe_core.vae import weights_sha256
from pbe_train.checkpoints.networks import read_pretrained
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint
from pbe_train.config import CHANGEABLE, TRAIN_SPLIT, TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.ladder.arms import Arm, flat, settings_of

SETTINGS_FILE = "settings.json"
FINISHED_FILE = "finished.json"
POLL_SECONDS = 0.5
LOOK_AGAIN_SECONDS = 10.0
"""At a folder that another process trains in."""
# What may change between two calls for one folder. Of the rest the trainer lets some change in a run that goes on, but runs that
# are compared with one another must not differ in it.
FREE = {"seed"} | CHANGEABLE - {
    "steps",
    "precision",
    "accumulation",
    "model.encoder",
    "model.attention",
    "model.one_token_shortcut",
    "model.channels_last",
    "model.compile",
    "model.gradient_checkpointing",
}


@dataclass(frozen=True)
class TrainingRun:
    """One training of the ladder."""

    arm: Arm
    seed: int
    settings: TrainSettings

    @property
    def name(self) -> str:
        """Of its folder, and of its row in the evaluation."""
        return f"{self.arm.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """What it writes."""
        return self.settings.out

    @property
    def finished(self) -> bool:
        """Whether it came to its last step, and its checkpoint is there."""
        try:
            step = json.loads((self.folder / FINISHED_FILE).read_bytes())["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return bool(step == self.settings.steps and locate_checkpoint(self.folder))

    def steps_done(self) -> int:
        """By its metrics; they may be some steps behind."""
        if self.finished:
            return self.settings.steps
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().splitlines()[1:] or [b""]
            return min(int(json.loads(lines[-1])["step"]), self.settings.steps)
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def list_runs(arms: Sequence[Arm], seeds: int, settings: TrainSettings, out: Path) -> list[TrainingRun]:
    """All runs, seed by seed, so that what is there early is of all arms."""
    places = [(arm, seed, out / "runs" / f"{arm.name}-seed{seed}") for seed in range(seeds) for arm in arms]
    return [TrainingRun(arm, seed, settings_of(arm, settings, seed, place)) for arm, seed, place in places]


def claim(out: Path, settings: TrainSettings) -> None:
    """Write down what all runs of a ladder share, or compare it with what the folder's runs were made with.

    Args:
        out: the ladder's folder.
        settings: the preset's.

    Raises:
        InputError: they differ, in a setting, in the start's weights or in the dataset.
    """
    reader = open_reader(settings, TRAIN_SPLIT)
    start = settings.model.pretrained
    shared: dict[str, Any] = {key: value for key, value in flat(settings.model_dump(mode="json")).items() if not is_free(key)}
    shared["start's weights"] = weights_sha256(dict(read_pretrained(start).unet)) if start else None
    shared["dataset's fingerprint"] = reader.info.fingerprint
    shared["dataset's samples"] = reader.samples_hash()
    path = out / SETTINGS_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: no folder can be made there ({error.strerror}); give another --out") from None
    if not path.exists() or not _has_begun(out):
        write_atomically(path, (json.dumps(shared, indent=1) + "\n").encode())
    try:
        there = json.loads(path.read_bytes())
        differing = [key for key in {**there, **shared} if there.get(key) != shared.get(key)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({str(error)[:100]}); give another --out, or remove the folder") from None
    if differing:
        told = ", ".join(f"{key} {_short(there.get(key))}, now {_short(shared.get(key))}" for key in differing[:4])
        raise InputError(f"{out}: its runs were made with {told}; give another --out, or remove the folder")


def _has_begun(out: Path) -> bool:
    """Whether a ladder's folder has a run to go on with, or one that is being trained.

    Where all failed at their start, as by a setting that is wrong, what they were to share binds nobody.
    """
    runs = [path for path in (out / "runs").glob("*") if path.is_dir()]
    return any(locate_checkpoint(run) for run in runs) or any(map(is_in_use, (out, *runs)))


def is_free(key: str) -> bool:
    """Whether a setting may change between two calls for one folder."""
    return key in FREE or key.partition(".")[0] in FREE


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else json.dumps(value)


def start_program(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program; what it prints goes to `log`, behind what is there. A terminal's Ctrl-C does not reach it by itself.

    It stays in the session of this one, by which Linux may share out the cores.
    """
    with log.open("ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0)


@dataclass
class Outcome:
    """How the trainings went."""

    failed: dict[str, str] = field(default_factory=dict)
    """Run -> why."""
    stopped_by: int = 0
    """The signal that ended them, or 0."""


def train_all(runs: Sequence[TrainingRun], options: Sequence[str], launch: Sequence[str], workers: int) -> Outcome:
    """Train what is not finished, `workers` at once. After SIGTERM or Ctrl-C the runs are asked to save, and waited for.

    Args:
        runs: of `list_runs`.
        options: further ones of the trainer, the same for all.
        launch: what starts a Python module: an interpreter, or torchrun and its options.
        workers: trainings at once.
    """
    waiting = [run for run in runs if not run.finished]
    total = sum(run.settings.steps for run in runs)
    outcome, running = Outcome(), dict[str, tuple[TrainingRun, subprocess.Popen[bytes]]]()
    not_before: dict[str, float] = {}
    if not waiting:
        return outcome
    with Stop() as stop, Progress("training", total, "steps", sum(run.steps_done() for run in runs)) as progress:
        try:
            while waiting or running:
                for run in waiting[:]:
                    if len(running) < workers and not_before.get(run.name, 0) <= time.monotonic():
                        if is_in_use(run.folder):  # By what a killed ladder left, or by a person.
                            not_before[run.name] = time.monotonic() + LOOK_AGAIN_SECONDS
                        else:
                            waiting.remove(run)
                            if not run.finished:  # Whoever had it may have come to its end.
                                running[run.name] = (run, _start(run, options, launch))
                _say(progress, runs, running, waiting)
                time.sleep(POLL_SECONDS)
                for name, (run, process) in list(running.items()):
                    if (status := process.poll()) is not None:
                        del running[name]
                        if not run.finished and not stop.signal:
                            outcome.failed[name] = _cause(run, status)
                            progress.note(f"{name} failed: {outcome.failed[name]}; the others go on")
                if stop.signal:
                    break
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
        outcome.stopped_by = stop.signal
    return outcome


def _start(run: TrainingRun, options: Sequence[str], launch: Sequence[str]) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.folder.with_suffix(".yaml")
    write_atomically(config, dump_settings(run.settings, "train").encode())
    return start_program([*launch, "-m", "pbe_train.train", "--config", str(config), *options], run.folder.with_suffix(".log"))


def _say(progress: Progress, runs: Sequence[TrainingRun], running: Mapping[str, object], waiting: Sequence[TrainingRun]) -> None:
    progress.set(sum(run.steps_done() for run in runs))
    held = "" if running else f"waiting for {waiting[0].name}, which another process trains" if waiting else ""
    done = sum(run.finished for run in runs)
    progress.say(f"{done} of {len(runs)} runs done; {held or 'at hand: ' + ', '.join(running)}")


def _cause(run: TrainingRun, status: int) -> str:
    """The last thing that a run said, and how it ended."""
    log = run.folder.with_suffix(".log")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = next((line for line in reversed(lines) if line.startswith("error:")), next(filter(None, reversed(lines)), ""))
    return f"{said.removeprefix('error: ').strip()[:300] or 'it said nothing'} (exit status {status}; {log})"


def is_in_use(folder: Path) -> bool:
    """Whether another process trains in a run folder: it holds the lock that the trainer takes."""
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # No such file, or no locks on this file system.
        return False
    return False


class Stop:
    """Notes the first SIGTERM or Ctrl-C inside its block, in place of ending the program."""

    def __init__(self) -> None:
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
