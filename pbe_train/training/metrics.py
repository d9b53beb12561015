"""What is measured of steps, kept on the device: no step waits for a number to come back.

step ──add──▶ sums on the device ──collect──▶ sums over all ranks ──(copy, while steps go on)──▶ numbers
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pbe_train.config import TIMESTEPS, TrainSettings
from pbe_train.data.training_dataset import Batches
from pbe_train.training.distributed import Distributed

QUARTERS = 4
# Keys of samples that an error names.
MOST_SHOWN = 8


class Metrics:
    """Losses and gradient norms of the steps since the last line of metrics, on one rank.

    A loss that is not finite is left out of the means; `PendingMetrics.nonfinite_steps` names its step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros(QUARTERS, device=self.device, dtype=torch.float64)
        self.counts = torch.zeros(QUARTERS, device=self.device, dtype=torch.float64)
        self.steps: list[int] = []
        self.norms: list[Float[Tensor, ""]] = []
        self.nonfinite: list[Bool[Tensor, ""]] = []
        # Of each step, in the order in which its samples came; none of steps before a run was resumed.
        # The last batch of an epoch, or of a part, may be smaller than the others: `_`.
        self.finite: list[list[Bool[Tensor, " _"]]] = [[]]

    def add_losses(self, losses: Float[Tensor, " batch"], timestep: Int64[Tensor, " batch"]) -> None:
        """Losses of samples, by their diffusion time."""
        quarter = timestep * QUARTERS // TIMESTEPS
        finite = losses.detach().isfinite()
        self.sums.index_add_(0, quarter, torch.where(finite, losses.detach(), 0).double())
        self.counts.index_add_(0, quarter, finite.double())
        self.finite[-1].append(finite)

    def add_step(self, step: int, gradient_norm: Float[Tensor, ""], nonfinite: Bool[Tensor, ""]) -> None:
        """A step; the gradient is that of all ranks, and so are its norm and whether it was not finite."""
        self.steps.append(step)
        self.norms.append(gradient_norm.detach())
        self.nonfinite.append(nonfinite)
        self.finite.append([])

    def state(self) -> dict[str, list[float]]:
        """What was added since the last line, for a checkpoint; waits for the device."""
        return {
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
            "steps": [float(step) for step in self.steps],
            "norms": [float(norm) for norm in self.norms],
            "skipped": [float(flag) for flag in self.nonfinite],
        }

    def restore(self, states: Sequence[Mapping[str, Sequence[float]]], distributed: Distributed) -> None:
        """Go on from the states of all ranks of a checkpoint, with as many ranks as then, or with others."""
        same = len(states) == distributed.world_size
        mine = [states[distributed.rank]] if same else list(states) if distributed.rank == 0 else []
        for state in mine:
            self.sums += torch.tensor(state["sums"], device=self.device, dtype=torch.float64)
            self.counts += torch.tensor(state["counts"], device=self.device, dtype=torch.float64)
        if states:  # The same on all ranks.
            self.steps = [int(step) for step in states[0]["steps"]]
            self.norms = [torch.tensor(norm, device=self.device) for norm in states[0]["norms"]]
            self.nonfinite = [torch.tensor(bool(flag), device=self.device) for flag in states[0]["skipped"]]
            self.finite = [[] for _ in range(len(self.steps) + 1)]

    def collect(self, distributed: Distributed, learning_rate: float = 0.0, data_wait: float = 0.0) -> "PendingMetrics":
        """Sum up over the ranks, and begin anew. All ranks must call.

        Args:
            distributed: the ranks.
            learning_rate: of the last step.
            data_wait: seconds that steps waited for data.
        """
        losses = distributed.sum(torch.cat([self.sums, self.counts]))
        steps = torch.stack([torch.stack(self.norms).double(), torch.stack(self.nonfinite).double()]).flatten()
        pending = PendingMetrics(self.steps, torch.cat([losses, steps]), self.finite, learning_rate, data_wait)
        self._restart()
        return pending


class PendingMetrics:
    """A line of metrics whose numbers are on their way from the device.

    Attributes:
        time: s of time.monotonic, when they were collected.
    """

    def __init__(
        self,
        steps: Sequence[int],
        numbers: Float[Tensor, " numbers"],
        finite: Sequence[Sequence[Bool[Tensor, " _"]]],
        learning_rate: float,
        data_wait: float,
    ) -> None:
        self.steps = list(steps)
        self.finite = finite
        self.learning_rate, self.data_wait = learning_rate, data_wait
        self.time = time.monotonic()
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def ready(self) -> bool:
        """Whether the numbers are here; the methods below wait for them."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def figures(self) -> dict[str, float]:
        """The whole line."""
        nonfinite = len(self.nonfinite_steps())
        line = {**self.losses(), "gradient_norm": self.gradient_norm(), "nonfinite_steps": nonfinite}
        return line | {"learning_rate": self.learning_rate}

    def losses(self) -> dict[str, float]:
        """`loss`, the mean over all samples, and `loss_q1` (least noise) to `loss_q4`; those without a sample are left out."""
        sums, counts = self._list()[:QUARTERS], self._list()[QUARTERS : 2 * QUARTERS]
        quarters = {
            f"loss_q{number}": total / count for number, (total, count) in enumerate(zip(sums, counts, strict=True), 1) if count
        }
        return {"loss": sum(sums) / sum(counts) if sum(counts) else math.nan, **quarters}

    def gradient_norm(self) -> float:
        """Of the last step."""
        return self._list()[2 * QUARTERS + len(self.steps) - 1]

    def nonfinite_steps(self) -> list[int]:
        """Steps whose gradient was not finite, and which changed nothing."""
        flags = self._list()[2 * QUARTERS + len(self.steps) :]
        return [step for step, flag in zip(self.steps, flags, strict=True) if flag]

    def nonfinite_samples(self) -> list[int]:
        """Of the last such step, which of this rank's samples had a loss that is not finite; waits for the device."""
        last = self.steps.index(self.nonfinite_steps()[-1])
        losses = [finite for part in self.finite[last] for finite in part.tolist()]
        return [place for place, finite in enumerate(losses) if not finite]

    def _list(self) -> list[float]:
        if self._event:
            self._event.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


class NonfiniteSteps:
    """The steps since the run was started whose gradient was not finite; the same on all ranks, as the gradient is."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._samples: list[int] = []

    def add(self, pending: PendingMetrics) -> None:
        """Note those of a line of metrics."""
        if steps := pending.nonfinite_steps():
            self.steps += steps
            self._samples = pending.nonfinite_samples()

    def check(self, settings: TrainSettings, batches: Batches, distributed: Distributed) -> None:
        """Stop a run that has more of them than `max_nonfinite_steps`. All ranks must call.

        Raises:
            InputError: names the samples of the newest such step: those whose loss was not finite, or all, if each was.
        """
        if len(self.steps) <= settings.max_nonfinite_steps:
            return
        first, last = self.steps[0], self.steps[-1]
        keys, slots = batches.items.keys(last), [slot for part in batches.sampler.slots for slot in part]
        offending = [key for some in distributed.gather([keys[slots[place]] for place in self._samples]) for key in some]
        what = "whose samples with infinite losses were" if offending else "whose losses were finite and whose samples were"
        named = offending or keys
        shown = ", ".join(named[:MOST_SHOWN]) + (f" and {len(named) - MOST_SHOWN} more" if len(named) > MOST_SHOWN else "")
        raise InputError(
            f"{settings.out}: gradients were infinite or not a number in {number_of(len(self.steps), 'step')}, "
            f"more than max_nonfinite_steps {settings.max_nonfinite_steps}: from step {first + 1} to step {last + 1}, {what} "
            f"{shown}; these steps changed nothing: look at the samples, or start a new run with a lower "
            "--optimizer.learning_rate"
        )


class CorruptSamples:
    """The corrupt samples that a run has read, each counted once however many epochs read it; a resumed run counts anew.

    Args:
        most: corrupt samples that are allowed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: dict[tuple[str, str], str] = {}

    def add(self, found: Iterable[Sequence[str]]) -> list[str]:
        """Count what was replaced; one line for each sample that is new.

        Args:
            found: (shard, key, why) of each, of all ranks, in any order.

        Raises:
            InputError: there are more than `most`; names the first of them and counts each shard's.
        """
        lines = []
        for shard, key, why in found:
            if (shard, key) not in self.seen:
                self.seen[shard, key] = why
                lines.append(f"replaced: shard {shard}, sample {key}: {why}")
        if len(self.seen) > self.most:
            counts = Counter(shard for shard, _ in self.seen)
            shards = ", ".join(f"{shard}.tar ({count})" for shard, count in sorted(counts.items()))
            named = "; ".join(f"{key} of {shard} ({why})" for (shard, key), why in list(self.seen.items())[:MOST_SHOWN])
            more = f"; and {len(self.seen) - MOST_SHOWN} more" if len(self.seen) > MOST_SHOWN else ""
            raise InputError(
                f"{number_of(len(self.seen), 'sample')} {'is' if len(self.seen) == 1 else 'are'} damaged, "
                f"more than loader.max_corrupt_samples {self.most}, in {shards}: {named}{more}. "
                "Delete these shards and run the build again, or raise the limit"
            )
        return lines
