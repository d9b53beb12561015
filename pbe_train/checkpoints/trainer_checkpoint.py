"""The trainer's own checkpoints: `<out>/checkpoints/step-00000500/`, complete or absent; written in the background.

    model.safetensors      the trained parameters (the frozen encoder is named in state.json, by source and hash, and so is the
                           base that a LoRA is trained beside)
    ema.safetensors        their moving average, where one is kept
    optimizer.safetensors  AdamW's two moments of each parameter
    state.json             step, settings, dataset, hashes of the frozen networks, size and SHA-256 of each file above

A folder is written under a temporary name, flushed to disk and renamed; so one that bears a step's name is whole, unless someone
changed it later, which its hashes tell. The step number is the only state of the loader and of the random draws.
"""

import errno
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tenacity
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, sync
from pbe_core.weight_files import save_tensors
from pbe_core.words import number_of
from pbe_train.config import CHANGEABLE, TrainSettings, with_names_of_today
from pbe_train.model.pipeline import RunIdentity

CHECKPOINT_NAME = re.compile(r"step-\d{8}")
# How often a checkpoint is tried to be written, and the first pause in s; each pause is twice as long as the one before.
ATTEMPTS, SECONDS_BETWEEN = 4, 5


class FileRecord(BaseModel):
    """Size and hash of a file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class CheckpointState(BaseModel):
    """The content of `state.json`."""

    # JSON has no infinity, and the gradient's norm of a skipped step is one.
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, ser_json_inf_nan="strings")

    step: int
    """Steps done."""
    optimizer_step: int
    """Steps that AdamW has counted: the same less those that were skipped."""
    settings: dict[str, Any]
    """Settings of the run, in full."""
    identity: RunIdentity
    """What the run trains on and with."""
    files: dict[str, FileRecord]
    """Size and hash of each file beside this one."""
    measures: list[dict[str, list[float]]] = []
    """Of each rank, sums over the steps since the last line of metrics, so that the next line is as if nothing had stopped."""
    scaler: dict[str, int | float] = {}
    """Scale of the loss, where it is scaled (fp16)."""


def save_checkpoint(
    out: Path,
    step: int,
    settings: TrainSettings,
    identity: RunIdentity,
    parts: Mapping[str, Mapping[str, Tensor]],
    optimizer_step: int,
    measures: Sequence[dict[str, list[float]]] = (),
    scaler: Mapping[str, int | float] | None = None,
    began_at: int | None = None,
) -> Path:
    """Write a checkpoint, then remove all but the newest `settings.keep_last`.

    If the run went back to an earlier checkpoint, later ones are set aside as `left-step-XXXXXXXX` before its own first one
    appears, so that `auto` goes on with the new branch; nothing deletes them.

    Args:
        out: the run folder.
        step: as in `CheckpointState`, like `settings`, `identity`, `optimizer_step`, `measures` and `scaler`.
        settings: of the run.
        identity: of the run.
        parts: file name without ending (`model`, `ema`, `optimizer`) -> named tensors.
        optimizer_step: steps that AdamW has counted.
        measures: of each rank.
        scaler: of the loss.
        began_at: the step that the run went on from, if this is its first checkpoint since.
    """
    parent = out / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    sweep_partial(out)
    folder, partial = parent / f"step-{step:08d}", parent / f".step-{step:08d}.partial"
    try:
        partial.mkdir(exist_ok=True)
        state = CheckpointState(
            step=step,
            optimizer_step=optimizer_step,
            settings=settings.model_dump(mode="json"),
            identity=identity,
            files={f"{name}.safetensors": _write_part(partial / f"{name}.safetensors", part) for name, part in parts.items()},
            measures=list(measures),
            scaler=dict(scaler or {}),
        )
        (partial / "state.json").write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sync(partial / "state.json")
        sync(partial)
        # Before the new one appears: a crash in between leaves the run where it went back to, not on the branch it left.
        if began_at is not None:
            _set_aside([path for path in list_checkpoints(out) if int(path.name.removeprefix("step-")) > began_at])
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # On a full disk it would take the space of other things.
        raise
    try:
        sync(parent)
        _prune(out, settings.keep_last)
    except OSError as error:
        # The new one is there. Another process may be reading or deleting an old one, on NFS for example.
        print(f"{folder}: is written; an older checkpoint could not be removed ({error})", file=sys.stderr, flush=True)
    return folder


def save_weights(folder: Path, step: int, settings: TrainSettings, identity: RunIdentity, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint to paint with, to start from and to pass on: the weights alone, in half precision, into `folder`.

    Raises:
        InputError: a weight is beyond what half precision holds.
    """
    halves = {name: value.to("cpu", torch.float16) for name, value in weights.items()}
    if beyond := [name for name, value in halves.items() if not value.isfinite().all()]:
        raise InputError(
            f"{number_of(len(beyond), 'tensor')} with numbers beyond the 65,504 of half precision, first {beyond[0]}; pass on "
            "the run's own checkpoint instead"
        )
    record = _write_part(folder / "model.safetensors", halves)
    state = CheckpointState(
        step=step,
        optimizer_step=0,
        settings=settings.model_dump(mode="json"),
        identity=identity,
        files={"model.safetensors": record},
    )
    (folder / "state.json").write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _write_part(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    save_tensors({key: value.detach().contiguous() for key, value in tensors.items()}, path)
    record = FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))
    sync(path)
    return record


class CheckpointWriter:
    """Writes checkpoints in the background: a step waits for a copy of the weights, not for the disk.

    A second checkpoint waits for the first, so that memory holds one copy, on the CPU. As a context manager it ends when all is
    written. `began_at` is the step that the run goes on from.
    """

    def __init__(self, settings: TrainSettings, identity: RunIdentity, began_at: int) -> None:
        self.settings = settings
        self.identity = identity
        self._began_at: int | None = began_at
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except OSError as error:
            if kind is None:
                raise
            print(f"{error}", file=sys.stderr, flush=True)  # Beside what else went wrong.

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        optimizer_step: int,
        measures: Sequence[dict[str, list[float]]] = (),
        scaler: Mapping[str, int | float] | None = None,
        last: bool = False,
    ) -> None:
        """Copy named tensors, and begin to write them; arguments as of `save_checkpoint`. Raises as `wait` does.

        With `last` nothing changes the tensors any more: they are not copied, and this waits until they are on disk.
        """
        self.wait()
        if not last:
            parts = {part: {name: t.detach().to("cpu", copy=True) for name, t in own.items()} for part, own in parts.items()}
        given = (self.settings.out, step, self.settings, self.identity, parts, optimizer_step, measures, scaler, self._began_at)
        self._writing = self._pool.submit(_save_in_the_end, *given)
        self._began_at = None
        if last:
            self.wait()

    def check(self) -> None:
        """Raises OSError as soon as it is known that the checkpoint before could not be written; waits for nothing."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint before is on disk. Raises OSError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(OSError),
    stop=tenacity.stop_after_attempt(ATTEMPTS),
    wait=tenacity.wait_exponential(multiplier=SECONDS_BETWEEN),
    reraise=True,
)
def _save_in_the_end(out: Path, step: int, *given: Any) -> Path:
    try:
        return save_checkpoint(out, step, *given)
    except (OSError, SafetensorError) as error:
        print(f"{out / 'checkpoints'}: checkpoint of step {step} could not be written ({error})", file=sys.stderr, flush=True)
        if isinstance(error, OSError):
            raise
        # The number of the system's error is in the text alone: 28 for a full disk.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(out / "checkpoints")) from None


def sweep_partial(out: Path) -> None:
    """Remove checkpoints that were half written, or half removed, when a process was killed. The caller holds the run's lock."""
    for leftover in (out / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _prune(out: Path, kept: int) -> None:
    for old in list_checkpoints(out)[:-kept]:
        # By another name first: a crash in between must not leave half of a checkpoint under a step's name.
        removed = old.with_name(f".{old.name}.partial")
        old.rename(removed)
        shutil.rmtree(removed)


def _set_aside(left: Sequence[Path]) -> None:
    for path in left:
        endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        aside = next(other for ending in endings if not (other := path.with_name(f"left-{path.name}{ending}")).exists())
        path.rename(aside)
        print(f"{path}: this run went back to before it; set aside as {aside.name}, delete it if not needed", flush=True)


def list_checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name))


def locate_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest one of a run folder; None where it is neither."""
    if path.is_dir() and (CHECKPOINT_NAME.fullmatch(path.name) or (path / "state.json").is_file()):
        return path
    saved = list_checkpoints(path)
    return saved[-1] if saved else None


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None for one that stands alone, as exported weights do."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else None


def find_checkpoint(out: Path, resume: str) -> Path | None:
    """The checkpoint that the `resume` setting means; None to start anew.

    Raises:
        InputError: `never` in a folder that holds checkpoints already, a path that is neither a run nor a checkpoint, or a run
            folder that is itself a checkpoint.
    """
    if (out / "state.json").is_file():
        # Whoever loads it would get the weights that are there now, and never those of a run in it.
        raise InputError(
            f"{out}: holds weights and is no run folder; to start from them give --model.pretrained {out} and another --out"
        )
    saved = list_checkpoints(out)
    if resume == "auto" or (saved and _was_asked_for(saved[-1], resume)):
        return saved[-1] if saved else None
    elsewhere = resume != "never" and not Path(resume).resolve().is_relative_to(out.resolve())
    if saved and (resume == "never" or elsewhere):
        which = f", and --resume {resume} is another run's" if elsewhere else ""
        raise InputError(f"{saved[-1]}: this run folder is in use{which}; give another --out, or --resume auto")
    if resume == "never":
        return None
    folder = locate_checkpoint(Path(resume))
    if not folder:
        known = f"; {out} has {', '.join(path.name for path in saved)}" if saved else ""
        raise InputError(f"{resume}: no checkpoint here; --resume takes auto, never, a run folder or a checkpoint folder{known}")
    return folder


def _was_asked_for(newest: Path, resume: str) -> bool:
    """Whether the run that wrote a checkpoint was itself given this path to go on from: then the same command goes on with it."""
    try:
        given = json.loads((newest / "state.json").read_bytes())["settings"]["resume"]
    except (OSError, ValueError, KeyError, TypeError):  # Damaged: `read_state` says so.
        return False
    return resume != "never" and given == resume


def read_state(folder: Path) -> CheckpointState:
    """The state of a checkpoint, after the sizes of its files were checked.

    Raises:
        InputError: `state.json` or another file is missing, cut short or not what it should be.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise InputError(f"{path}: missing, so this checkpoint was not written to its end; {_way_out(folder)}")
    try:
        state = CheckpointState.model_validate_json(path.read_bytes())
        state = state.model_copy(update={"settings": with_names_of_today(state.settings)})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] in ("missing", "extra_forbidden"):
            raise InputError(
                f"{path}: was written by another version of this program ({'.'.join(map(str, first['loc']))}: {first['msg']}); "
                "use that one, or begin a new run"
            ) from None
        raise InputError(f"{path}: damaged ({first['msg']}); {_way_out(folder)}") from None
    for name, record in state.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            found = "missing" if size is None else f"{size} bytes, state.json says {record.bytes}"
            raise InputError(f"{file}: {found}; {_way_out(folder)}")
    return state


def read_file(folder: Path, state: CheckpointState, name: str) -> dict[str, Tensor]:
    """All tensors of one file (`model`, `ema` or `optimizer`) of a checkpoint, after its hash was checked.

    Raises:
        InputError: the file is not there or not what state.json says.
    """
    path = folder / f"{name}.safetensors"
    if path.name not in state.files:
        raise InputError(f"{folder}: this checkpoint has no {path.name}; it has {', '.join(state.files)}")
    if file_sha256(path) != state.files[path.name].sha256:
        raise InputError(f"{path}: SHA-256 is not that in state.json, the file is damaged; {_way_out(folder)}")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def read_part(folder: Path, state: CheckpointState, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `read_file`, of tensors that must have the names and shapes of `expected`, no more and no fewer.

    Raises:
        InputError: the file is not what state.json says, or does not fit the model.
    """
    path, tensors = folder / f"{name}.safetensors", read_file(folder, state, name)
    odd = set(tensors.keys() ^ expected.keys())
    odd |= {key for key in tensors.keys() & expected.keys() if tensors[key].shape != expected[key].shape}
    if odd:
        raise InputError(
            f"{path}: does not fit the model of its settings ({min(odd)} and {len(odd) - 1} more); "
            "it was written by another version of this program"
        )
    return tensors


def check_resumable(folder: Path, state: CheckpointState, settings: TrainSettings, identity: RunIdentity) -> None:
    """Refuse to go on where the settings, the data or a frozen network would make it another run.

    Raises:
        InputError: with what differs.
    """
    if "optimizer.safetensors" not in state.files:
        raise InputError(
            f"{folder}: holds weights alone, without the optimizer's moments that a run goes on with; to start a new run "
            f"from them give --model.pretrained {folder} and no --resume"
        )
    saved, asked = dict(_flatten(state.settings)), dict(_flatten(settings.model_dump(mode="json")))
    differences = [
        f"{key} {saved.get(key)!r} -> {asked.get(key)!r}"
        for key in sorted(saved.keys() | asked.keys())
        if saved.get(key) != asked.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in CHANGEABLE)
    ]
    before, now = state.identity.model_dump(mode="json"), identity.model_dump(mode="json")
    differences += [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if key != "unet" and before.get(key) != now[key]]
    if before["dataset_fingerprint"] == now["dataset_fingerprint"] and before["dataset_samples"] != now["dataset_samples"]:
        raise InputError(
            f"{folder}: its dataset had other samples in its shards then (was it built again with more photos?), so that their "
            "order is another one; give another --out for a new run, or the dataset as it was"
        )
    if differences:
        raise InputError(
            f"{folder}: was trained otherwise: {'; '.join(differences)}. Use its settings, or give another --out for a new run"
        )
    if settings.steps < state.step:
        raise InputError(f"{folder}: is at step {state.step} already; give --steps {state.step} or more")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _way_out(folder: Path) -> str:
    if CHECKPOINT_NAME.fullmatch(folder.name):
        return f"delete {folder} to go on from the checkpoint before it"
    return "give another checkpoint"
