"""The schedulers of diffusers on the schedule of the training: which are taken, where they begin, how they step.

    name or object ──make_scheduler──▶ scheduler ──begin──▶ timesteps ──step──▶ latents with less noise

Timesteps begin at the last one of the training, where next to nothing but noise is left, whatever number of steps is asked for:
the spacing is `trailing` where a scheduler does not name another one. The `leading` of diffusers, its default for DDIM and PNDM,
begins at 981 for 50 steps, at 667 for 334 and at 501 for 501: there the model takes pure noise for a noisy picture, and paints
greyer the later it begins. Source: Lin et al., Common diffusion noise schedules and sample steps are flawed (2024), section 3.3.
"""

import ast
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pbe_train.config import TIMESTEPS, Prediction

SCHEDULE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
SPACING = "trailing"
"""How timesteps lie in the schedule, where a scheduler does not say."""
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Those that follow this schedule, and draw from no other generators than they are given."""
# Options that would lead to another schedule, or tell the model other timesteps than the noise has; and values that do not.
_ELSEWHERE = {
    "trained_betas": None,
    "use_flow_sigmas": False,
    "rescale_betas_zero_snr": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}
# Schedulers whose steps are all of one length, whatever their timesteps are.
_COUNTING_BACK = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")
_OTHERS = "give another number of steps, other options, or another scheduler"

# What `diffusers` samples with: one of its schedulers by name, the same with options as Python writes them, or an object.
Scheduler: TypeAlias = str | SchedulerMixin


def training_schedule(prediction: Prediction) -> DDPMScheduler:
    """The schedule by which latents are noised in training."""
    return DDPMScheduler.from_config(SCHEDULE, prediction_type=prediction)


def make_scheduler(scheduler: Scheduler, prediction: Prediction) -> Any:
    """A new sampler of diffusers, on the schedule of the training.

    Args:
        scheduler: the name of its class; a name with options, `DDIMScheduler(timestep_spacing="leading")`; or an object, whose
            options are kept, but for those of the schedule.
        prediction: what the model predicts.

    Raises:
        InputError: it is none of `SCHEDULERS`, or does not take the options.
    """
    name, chosen = _read(scheduler)
    if name not in SCHEDULERS:
        raise InputError(f"{name}: no scheduler for the schedule of the training; give one of {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    fixed = SCHEDULE | _ELSEWHERE | {"prediction_type": prediction}
    # `from_config` drops what a constructor does not take.
    if isinstance(scheduler, str) and (wrong := [option for option in chosen if option not in taken or option in fixed]):
        choice = ", ".join(option for option in list(taken)[1:] if option not in fixed)
        raise InputError(f"{name}: {wrong[0]} is no option that may be chosen; those are {choice}")
    options = {"timestep_spacing": SPACING} | chosen | fixed
    with _one_line(name, "give other options, or another scheduler"):
        return kind.from_config({key: value for key, value in options.items() if key in taken})


def begin(scheduler: Any, steps: int, device: torch.device) -> None:
    """Make a scheduler ready for the first of so many steps.

    Args:
        scheduler: of `make_scheduler`.
        steps: of denoising, from 1.
        device: of the latents.

    Raises:
        InputError: it cannot make so many steps, or leaves the schedule of the training with them, or leads to no picture.
    """
    what = f"{type(scheduler).__name__} with {number_of(steps, 'step')}"
    if steps > TIMESTEPS:
        raise InputError(f"{what}: the schedule of the training has {TIMESTEPS}; give fewer steps")
    with _one_line(what, _OTHERS):
        scheduler.set_timesteps(_Steps(steps), device=device)
    first, last = scheduler.timesteps.max(), scheduler.timesteps.min()
    # Some schedulers end where they begin, if there is but one step.
    left = float(scheduler.sigmas[-1]) if hasattr(scheduler, "sigmas") else 0.0
    if last < 0 or not TIMESTEPS / 2 <= first < TIMESTEPS or left > 1:
        raise InputError(f"{what}: from timestep {first:g} to {last:g} and a noise of {left:.1f} it paints no picture; {_OTHERS}")
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise it looks for the place of the first timestep, and of two that are the same takes the second one.
        scheduler.set_begin_index(0)


def step(
    scheduler: Any,
    number: int,
    predicted: Float[Tensor, "batch channels height width"],
    latents: Float[Tensor, "batch channels height width"],
    generators: Sequence[torch.Generator],
) -> Any:
    """One step of denoising: what the `step` of diffusers returns, with `prev_sample`.

    Args:
        scheduler: after `begin`.
        number: which step, from 0.
        predicted: by the model, at the timestep of this number.
        latents: noisy, at that timestep.
        generators: one for each item; only some schedulers draw noise.

    Raises:
        InputError: diffusers fails.
    """
    if type(scheduler).__name__ in _COUNTING_BACK:
        # They go back by 1000 // steps from each timestep, which leads past or short of the next one unless steps divide 1000.
        scheduler.num_inference_steps = Fraction(TIMESTEPS, _stride(scheduler.timesteps.tolist(), number))
    extra = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with _one_line(f"{type(scheduler).__name__} with {number_of(len(scheduler.timesteps), 'step')}", _OTHERS):
        return scheduler.step(predicted, scheduler.timesteps[number], latents, **extra)


def _stride(times: Sequence[int], number: int) -> int:
    """How far the step of this number goes: to the next timestep; from the last one beyond 0."""
    if number + 1 == len(times):
        return times[number] + 1
    if times[number + 1] == times[number]:
        # PNDM goes from its first timestep to the second one twice.
        return times[number - 1] - times[number]
    return times[number] - times[number + 1]


class _Steps(int):
    """A number of steps that divides the timesteps of a schedule evenly for `trailing`.

    For 62 numbers of steps, of which 61 is the least, `np.arange(1000, 0, -1000 / steps)` has one entry too many, by rounding:
    diffusers then goes on to timestep -1.
    """

    def __rtruediv__(self, timesteps: int) -> float:
        ratio = timesteps / int(self)
        return ratio if len(np.arange(timesteps, 0, -ratio)) <= self else ratio * (1 + 1e-12)


def _read(scheduler: Scheduler) -> tuple[str, dict[str, Any]]:
    """The name of a scheduler's class, and the options that were chosen for it."""
    if isinstance(scheduler, SchedulerMixin):
        # diffusers notes which options were left at their default.
        left = scheduler.config.get("_use_default_values", ())
        return type(scheduler).__name__, {
            key: value for key, value in scheduler.config.items() if key not in left and key[0] != "_"
        }
    try:
        match ast.parse(str(scheduler).strip(), mode="eval").body:
            case ast.Name(name):
                return name, {}
            case ast.Call(ast.Name(name), [], keywords):
                return name, {str(word.arg): ast.literal_eval(word.value) for word in keywords}
    except (SyntaxError, ValueError):
        pass
    raise InputError(f"{scheduler}: no scheduler; give a name, or one with options: DPMSolverMultistepScheduler(solver_order=3)")


@contextmanager
def _one_line(what: str, way_out: str) -> Iterator[None]:
    """Say in one line what diffusers cannot do with the options that it was given."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {type(error).__name__} in diffusers: {' '.join(str(error).split())}; {way_out}") from error
