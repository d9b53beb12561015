"""What is measured of steps, kept on the device: no step waits for a number to come back.

step ──add──▶ sums on the device ──read──▶ sums over all ranks ──(copy, while steps go on)──▶ numbers
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pbe_train.config import TIMESTEPS
from pbe_train.training.ranks import Ranks

QUARTERS = 4


class Measures:
    """Losses and gradient norms of the steps since the last reading, on one rank.

    A loss that is not finite is left out of the means; its step is known to `Reading.skipped`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros(QUARTERS, device=self.device, dtype=torch.float64)
        self.counts = torch.zeros(QUARTERS, device=self.device, dtype=torch.float64)
        self.steps: list[int] = []
        self.norms: list[Float[Tensor, ""]] = []
        self.skipped: list[Bool[Tensor, ""]] = []
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

    def add_step(self, step: int, gradient_norm: Float[Tensor, ""], skipped: Bool[Tensor, ""]) -> None:
        """A step; the gradient is that of all ranks, and so are norm and whether it was skipped."""
        self.steps.append(step)
        self.norms.append(gradient_norm.detach())
        self.skipped.append(skipped)
        self.finite.append([])

    def state(self) -> dict[str, list[float]]:
        """What was added since the last reading, for a checkpoint; waits for the device."""
        norms = torch.stack(self.norms).tolist() if self.norms else []
        skipped = torch.stack(self.skipped).double().tolist() if self.skipped else []
        return {
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
            "steps": [float(step) for step in self.steps],
            "norms": norms,
            "skipped": skipped,
        }

    def restore(self, states: Sequence[Mapping[str, Sequence[float]]], ranks: Ranks) -> None:
        """Go on from the states of all ranks of a checkpoint, with as many ranks as then, or with others."""
        same = len(states) == ranks.count
        mine = [states[ranks.rank]] if same else list(states) if ranks.rank == 0 else []
        for state in mine:
            self.sums += torch.tensor(state["sums"], device=self.device, dtype=torch.float64)
            self.counts += torch.tensor(state["counts"], device=self.device, dtype=torch.float64)
        if states:  # The same on all ranks.
            self.steps = [int(step) for step in states[0]["steps"]]
            self.norms = [torch.tensor(norm, device=self.device) for norm in states[0]["norms"]]
            self.skipped = [torch.tensor(bool(flag), device=self.device) for flag in states[0]["skipped"]]
            self.finite = [[] for _ in range(len(self.steps) + 1)]

    def read(self, ranks: Ranks) -> "Reading":
        """Sum up over the ranks, and begin anew. All ranks must call."""
        losses = ranks.sum(torch.cat([self.sums, self.counts]))
        steps = torch.stack([torch.stack(self.norms).double(), torch.stack(self.skipped).double()]).flatten()
        reading = Reading(self.steps, torch.cat([losses, steps]), self.finite)
        self._restart()
        return reading


class Reading:
    """Numbers on their way from the device."""

    def __init__(
        self, steps: Sequence[int], numbers: Float[Tensor, " numbers"], finite: Sequence[Sequence[Bool[Tensor, " _"]]] = ()
    ) -> None:
        self.steps = list(steps)
        self.finite = finite
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def ready(self) -> bool:
        """Whether they have come."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

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

    def skipped(self) -> list[int]:
        """Steps whose gradient was not finite, and which changed nothing."""
        flags = self._list()[2 * QUARTERS + len(self.steps) :]
        return [step for step, flag in zip(self.steps, flags, strict=True) if flag]

    def offending(self) -> list[int]:
        """Of the last step that was skipped, which of this rank's samples had a loss that is not finite; waits for the device."""
        last = self.steps.index(self.skipped()[-1])
        losses = [finite for part in self.finite[last] for finite in part.tolist()]
        return [place for place, finite in enumerate(losses) if not finite]

    def _list(self) -> list[float]:
        if self._event:
            self._event.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers
