"""Moving average of the weights: smoother than any single step, and what one samples with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pbe_train.model.paint_model import copy_values


class MovingAverage:
    """Exponential moving average of named parameters.

    Args:
        parameters: the live weights; the average starts as a copy of them.
        decay: share of the old average that a step keeps; early steps keep less, so that the start is soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.live = dict(parameters)
        self.average = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live weights after optimizer step `step` (counted from 1).

        Source of the ramp: `ExponentialMovingAverage` of TensorFlow, min(decay, (1 + step) / (10 + step)).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The live parameters hold the average inside the block, and their own values again after it."""
        own = {name: value.detach().clone() for name, value in self.live.items()}
        copy_values(self.average, self.live)
        try:
            yield
        finally:
            copy_values(own, self.live)
