"""AdamW and the moving average of the weights: their steps, the learning rate, and what a checkpoint keeps of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, read_part
from pbe_train.config import OptimizerSettings
from pbe_train.model.paint_model import PaintByExampleModel, copy_values, laid_out_as

# AdamW's running means of the gradient and of its square.
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(trained: dict[str, nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over everything that is trained."""
    return torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def step_unless(nonfinite: Bool[Tensor, ""], optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer; where `nonfinite`, one that changes neither weights nor moments. The host does not wait."""
    # What a gradient scaler tells a fused optimizer: torch.amp.GradScaler does the same.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, steps: int) -> None:
    """Linear warm-up, then constant, and linear cool-down at the end of `steps`; `step` counts from 0."""
    warm = (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
    cool = (steps - step) / (settings.cooldown * steps) if settings.cooldown else 1.0
    share = min(1.0, warm, cool)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share


class EMA:
    """Exponential moving average of named parameters: smoother than any single step, and what one samples with.

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


def parts_of(model: PaintByExampleModel, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Mapping[str, Tensor]]:
    """All tensors that a resumed run needs: weights, their average, the optimizer's moments.

    Weights and average name every parameter, also those that have no effect and are not trained: released weights have them.
    """
    saved, trained = model.kept(), model.trained()
    moments = {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in MOMENTS for name, parameter in trained.items()}
    return {"model": saved, "optimizer": moments, **({"ema": {**saved, **ema.average}} if ema else {})}


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """Steps that AdamW has counted, the same for all parameters; waits for the device."""
    return int(next(iter(optimizer.state.values()))["step"])


def resume(
    checkpoint: Path,
    state: CheckpointState,
    model: PaintByExampleModel,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> None:
    """Put everything back as `parts_of` found it."""
    saved, trained = model.kept(), model.trained()
    copy_values(read_part(checkpoint, state, "model", saved), saved)
    if ema:
        averaged = read_part(checkpoint, state, "ema", saved)
        copy_values({name: averaged[name] for name in ema.average}, ema.average)
    expected = {f"{kind}.{name}": parameter for kind in MOMENTS for name, parameter in trained.items()}
    moments = read_part(checkpoint, state, "optimizer", expected)
    for name, parameter in trained.items():
        own = {kind: laid_out_as(parameter, moments[f"{kind}.{name}"]) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.optimizer_step), device=parameter.device), **own}
