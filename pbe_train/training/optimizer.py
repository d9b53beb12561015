"""AdamW over what is trained: its steps, its learning rate, and what a checkpoint keeps of it and of the weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, read_part
from pbe_train.config import OptimizerSettings
from pbe_train.model.paint_model import copy_values, laid_out_as
from pbe_train.training.ema import MovingAverage

# AdamW's running means of the gradient and of its square.
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(trained: dict[str, nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over everything that is trained."""
    return torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def step_unless(broken: Bool[Tensor, ""], optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer; where `broken`, one that changes neither weights nor moments. The device decides: nobody waits."""
    # What a gradient scaler tells a fused optimizer: torch.amp.GradScaler does the same.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int) -> None:
    """Linear warm-up, then constant; `step` counts from 0."""
    share = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share


def parts_of(
    kept: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
) -> dict[str, Mapping[str, Tensor]]:
    """All tensors that a resumed run needs: weights, their average, the optimizer's moments.

    Weights and average name every parameter, also those that have no effect and are not trained: released weights have them.
    """
    moments = {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in MOMENTS for name, parameter in trained.items()}
    return {"model": kept, "optimizer": moments, **({"ema": {**kept, **average.average}} if average else {})}


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """Steps that AdamW has counted, the same for all parameters; waits for the device."""
    return int(next(iter(optimizer.state.values()))["step"])


def resume(
    checkpoint: Path,
    state: CheckpointState,
    kept: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
) -> None:
    """Put everything back as `parts_of` found it."""
    copy_values(read_part(checkpoint, state, "model", kept), kept)
    if average:
        averaged = read_part(checkpoint, state, "ema", kept)
        copy_values({name: averaged[name] for name in average.average}, average.average)
    expected = {f"{kind}.{name}": parameter for kind in MOMENTS for name, parameter in trained.items()}
    moments = read_part(checkpoint, state, "optimizer", expected)
    for name, parameter in trained.items():
        own = {kind: laid_out_as(parameter, moments[f"{kind}.{name}"]) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.optimizer_step), device=parameter.device), **own}
