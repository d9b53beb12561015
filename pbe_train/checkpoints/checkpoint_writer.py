"""Checkpoints in the background: copied in a moment, written while training goes on, tried again where the disk refuses."""

import errno
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tenacity
from safetensors import SafetensorError
from torch import Tensor

from pbe_train.checkpoints.trainer_checkpoint import save_checkpoint
from pbe_train.config import TrainSettings
from pbe_train.model.identity import RunIdentity

# How often a checkpoint is tried to be written, and the first pause in s; each pause is twice as long as the one before.
ATTEMPTS, SECONDS_BETWEEN = 4, 5


class CheckpointWriter:
    """Writes checkpoints in the background: a step waits for a copy of the weights, not for the disk.

    One at a time: a second checkpoint waits for the first, so that memory holds one copy, on the CPU. What the disk refuses is
    tried again some times, from that copy. A context manager, so that nobody leaves before all is written.

    Args:
        settings: of the run.
        identity: of the run.
        began_at: the step that the run goes on from.
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
        scaler: Mapping[str, int | float] = MappingProxyType({}),
        last: bool = False,
    ) -> None:
        """Copy named tensors, and begin to write them; arguments as of `save_checkpoint`. Raises as `wait` does.

        With `last` nothing changes the tensors any more: they are not copied, and this waits until they are on disk.
        """
        self.wait()
        copies = parts if last else _on_the_cpu(parts)
        given = (self.settings.out, step, self.settings, self.identity, copies, optimizer_step, measures, scaler, self._began_at)
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


def _on_the_cpu(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        part: {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()} for part, tensors in parts.items()
    }


@tenacity.retry(
    retry=tenacity.retry_if_exception_type((OSError, SafetensorError)),
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
        # What the system said stands in the text alone: a full disk (28), say.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(out / "checkpoints")) from None
