"""How to denoise: the defaults of whatever paints, the published way, and the interval of the schedule in which guidance works.

    0 ─────────── start ══════════════════ end ──────────── 1        noise ──▶ picture: share of the schedule that is behind
      condition alone      guidance, two passes     condition alone

Nothing is imported here but errors: command lines have their defaults before PyTorch is loaded.
"""

import argparse
import math
from collections.abc import Sequence

from pbe_core.errors import InputError

GUIDANCE = 5.0
"""The published one. The tiny world's small models paint best with 2."""
SCHEDULER, STEPS = "DPMSolverMultistepScheduler(use_karras_sigmas=True)", 17
"""DPM-Solver++ 2M on the noise levels of Karras et al., with the fewest steps whose mean error is below that of the published way
(docs/editing.md)."""
PUBLISHED_SCHEDULER, PUBLISHED_STEPS = 'PNDMScheduler(timestep_spacing="leading")', 50
"""PLMS, as the published code samples; 51 passes, since the second one is made twice."""
Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, 1.0)


def check_interval(interval: Sequence[float]) -> Interval:
    """Make sure that an interval of guidance is one.

    Args:
        interval: its start and its end, shares of the schedule from 0, noise, to 1, the picture.

    Raises:
        InputError: it is not two numbers from 0 to 1, the smaller one first.
    """
    try:
        start, end = (math.nan if isinstance(each, str | bool) else float(each) for each in interval)
    except (TypeError, ValueError):
        start = end = math.nan
    if not 0 <= start < end <= 1:
        shown = " ".join(map(str, interval)) if isinstance(interval, list | tuple) else interval
        raise InputError(
            f"guidance interval {shown}: give two shares of the schedule from 0 (noise) to 1 (the picture), the start below the "
            "end, such as 0.2 0.8"
        )
    return start, end


def guided_at(timestep: float, interval: Interval, timesteps: int) -> bool:
    """Whether a step at a timestep, of which the last one is all noise, lies in an interval: its start does, its end does not."""
    behind = (timesteps - 1 - timestep) / timesteps
    return interval[0] <= behind < interval[1]


def check_published(steps: int, scheduler: object, interval: Sequence[float]) -> None:
    """Make sure that nothing else was chosen beside the published way. Raises InputError: something was."""
    if (steps, scheduler, tuple(interval)) != (STEPS, SCHEDULER, EVERYWHERE):
        raise InputError(
            f"exact published: {PUBLISHED_STEPS} steps of PLMS, with guidance in each; leave steps, scheduler and interval out"
        )


def add_sampling_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The options of every command that paints: `guidance`, `guidance_interval`, `steps`, `scheduler`, `reuse`."""
    add = parser.add_argument
    add(
        "--guidance", type=float, default=GUIDANCE, help="how strongly to follow the reference; 1 = no guidance, in half the time"
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=EVERYWHERE,
        metavar=("START", "END"),
        help="where guidance works: shares of the schedule from 0 (noise) to 1 (the picture); steps elsewhere take half the time",
    )
    add("--steps", type=int, default=STEPS, help="denoising steps")
    add(
        "--scheduler",
        default=SCHEDULER,
        help="a scheduler of diffusers, also with options: 'DDIMScheduler(timestep_spacing=\"leading\")'",
    )
    add(
        "--reuse",
        type=int,
        default=1,
        help="every so-many-th step goes through the whole U-Net, those between take its deep features as they were: 2 is faster "
        "and paints a little otherwise",
    )
