"""AdamW and the moving average of the weights: their steps, the learning rate, and what a checkpoint keeps of them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pbe_core.errors import InputError
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, read_part
from pbe_train.config import OptimizerSettings, Place, TrainSettings
from pbe_train.model.paint_model import PaintByExampleModel, copy_values, laid_out_as
from pbe_train.training.tiered_adamw import MOMENTS, TieredAdamW


def cast_weights(model: PaintByExampleModel, settings: TrainSettings, precision: str) -> dict[str, Tensor]:
    """Make all weights of a model bf16, where model.weights says so; returns the fp32 values that the optimizer is to keep.

    Args:
        model: on the CPU, in fp32.
        settings: of the run.
        precision: what the settings' precision comes to on this machine.

    Raises:
        InputError: that is not bf16.
    """
    if settings.model.weights == "fp32":
        return {}
    if precision != "bf16":
        raise InputError(
            f"model.weights bf16 is computed in bf16, and precision {settings.precision} comes to {precision} on this machine; "
            "set precision to bf16, or model.weights to fp32"
        )
    copied = model.trained() if settings.optimizer.place == "cpu" else {}
    masters = {name: value.data.contiguous() for name, value in copied.items()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)
    return masters


def make_optimizer(
    trained: dict[str, nn.Parameter],
    settings: OptimizerSettings,
    seed: int = 0,
    masters: Mapping[str, Tensor] | None = None,
    recorded: bool = False,
) -> torch.optim.AdamW | TieredAdamW:
    """AdamW over everything that is trained: PyTorch's own where weights and moments are fp32 and on the device.

    Args:
        trained: name -> parameter.
        settings: of AdamW.
        seed: of the run; random rounding of bf16 weights is named by it.
        masters: fp32 copies of bf16 weights, on the CPU.
        recorded: whether its steps are to be recorded as CUDA graphs; of PyTorch's own alone.
    """
    whole = all(parameter.dtype == torch.float32 for parameter in trained.values())
    if whole and settings.state == "fp32" and settings.place == "device":
        device = next(iter(trained.values())).device
        # Where a recorded step finds it. In the type that the device's kernel computes with, so that it is one number everywhere.
        rate = torch.tensor(
            settings.learning_rate, dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device
        )
        if recorded:  # PyTorch warns of each step before the recording.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        return torch.optim.AdamW(trained.values(), lr=rate, weight_decay=settings.weight_decay, fused=True, capturable=recorded)
    return TieredAdamW(trained, settings, seed, masters or {})


def clip_gradients(trained: Mapping[str, nn.Parameter], largest: float) -> Float[Tensor, ""]:
    """The norm of the gradient over all parameters, which is shortened to `largest` where it is longer; 0 = it stays."""
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return nn.utils.clip_grad_norm_(trained.values(), largest or float("inf"))
    # Norms of bf16 tensors would have the 8 bits of bf16.
    norm: Tensor = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
    if largest:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_unless(nonfinite: Bool[Tensor, ""], optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer; where `nonfinite`, one that changes neither weights nor moments. The host does not wait."""
    # What a gradient scaler tells a fused optimizer: torch.amp.GradScaler does the same.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, steps: int) -> None:
    """Tell the optimizer that of step `step`, which counts from 0."""
    rate = learning_rate(settings, step, steps)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        group["step"] = step


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up, then constant, and linear cool-down at the end of `steps`; `step` counts from 0."""
    warm = (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
    cool = (steps - step) / (settings.cooldown * steps) if settings.cooldown else 1.0
    return settings.learning_rate * min(1.0, warm, cool)


class EMA:
    """Exponential moving average of named parameters: smoother than any single step, and what one samples with.

    Args:
        parameters: the live weights; the average, in fp32, starts as a copy of them.
        decay: share of the old average that a step keeps; early steps keep less, so that the start is soon forgotten.
        place: where the average lies.
        masters: fp32 copies of bf16 weights, which are averaged in their place.
        recorded: whether steps are to be recorded as CUDA graphs; of fp32 weights and an average beside them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        place: Place = "device",
        masters: Mapping[str, Tensor] | None = None,
        recorded: bool = False,
    ) -> None:
        self.decay = decay
        self.live = dict(parameters)
        self.averaged = dict(masters or parameters)
        device = torch.device("cpu") if place == "cpu" else None
        self.average = {
            name: self.averaged[name].detach().to(value.device if device is None else device, torch.float32, copy=True)
            for name, value in parameters.items()
        }
        # In a tensor, so that a recorded step can be told another one. With a number a GPU averages all weights in a few kernels,
        # with tensors in one each, which the host has to launch where they are not recorded.
        self._share: float | Tensor = torch.zeros((), device=next(iter(self.average.values())).device) if recorded else 0.0
        self._alike = all(
            value.dtype == torch.float32 and value.device == self.average[name].device for name, value in self.averaged.items()
        )

    def update(self, step: int) -> None:
        """Take in the live weights after optimizer step `step` (counted from 1)."""
        self.set_decay(step)
        self.average_in()

    def set_decay(self, step: int) -> None:
        """How much of the average step `step` (counted from 1) is to keep.

        Source of the ramp: `ExponentialMovingAverage` of TensorFlow, min(decay, (1 + step) / (10 + step)).
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        if isinstance(self._share, Tensor):
            self._share.fill_(share)
        else:
            self._share = share

    @torch.no_grad()
    def average_in(self) -> None:
        """Take in the live weights."""
        if self._alike:
            share = [self._share] * len(self.average) if isinstance(self._share, Tensor) else self._share
            torch._foreach_lerp_(list(self.average.values()), list(self.averaged.values()), share)
            return
        for name, average in self.average.items():  # One at a time: a copy of all of them would take the memory that is saved.
            average.lerp_(self.averaged[name].to(average.device, torch.float32), self._share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The live parameters hold the average inside the block, and their own values again after it."""
        own = {name: value.detach().to(self.average[name].device, copy=True) for name, value in self.live.items()}
        copy_values(self.average, self.live)
        try:
            yield
        finally:
            copy_values(own, self.live)


def parts_of(model: PaintByExampleModel, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Mapping[str, Tensor]]:
    """All tensors that a resumed run needs: weights, their average, the optimizer's moments.

    Weights and average name every parameter, also those that have no effect and are not trained: released weights have them.
    """
    saved, trained = weights_of(model, optimizer), model.trained()
    moments = (
        optimizer.tensors()
        if isinstance(optimizer, TieredAdamW)
        else {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in MOMENTS for name, parameter in trained.items()}
    )
    return {"model": saved, "optimizer": moments, **({"ema": {**saved, **ema.average}} if ema else {})}


def weights_of(model: PaintByExampleModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name -> the weights that a checkpoint has: fp32 copies where bf16 parameters have them."""
    return {**model.kept(), **(optimizer.masters if isinstance(optimizer, TieredAdamW) else {})}


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """Steps that AdamW has counted, the same for all parameters; waits for the device."""
    if isinstance(optimizer, TieredAdamW):
        return int(optimizer.count)
    return int(next(iter(optimizer.state.values()))["step"])


def resume(
    checkpoint: Path,
    state: CheckpointState,
    model: PaintByExampleModel,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> None:
    """Put everything back as `parts_of` found it."""
    saved, trained = weights_of(model, optimizer), model.trained()
    copy_values(read_part(checkpoint, state, "model", saved), saved)
    if ema:
        averaged = read_part(checkpoint, state, "ema", saved)
        copy_values({name: averaged[name] for name in ema.average}, ema.average)
    if isinstance(optimizer, TieredAdamW):
        own = optimizer.tensors()
        copy_values(read_part(checkpoint, state, "optimizer", own), own)
        optimizer.resume(state.optimizer_step)
        return
    expected = {f"{kind}.{name}": parameter for kind in MOMENTS for name, parameter in trained.items()}
    moments = read_part(checkpoint, state, "optimizer", expected)
    for name, parameter in trained.items():
        own = {kind: laid_out_as(parameter, moments[f"{kind}.{name}"]) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.optimizer_step), device=parameter.device), **own}
