"""The schedulers of diffusers: which are taken, and whether each leads from noise to what the model points to.

What is right is known where the pictures are normal: then the best denoiser is a formula, and so is what it makes of a noise.
"""

import inspect
import re
from contextlib import suppress
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin

from pbe_core.errors import InputError
from pbe_train.config import TIMESTEPS
from pbe_train.model.diffusion import paint_latents
from pbe_train.model.sampling import SCHEDULER
from pbe_train.model.schedulers import SCHEDULERS, Scheduler, begin, make_scheduler, training_schedule

pytestmark = pytest.mark.usefixtures("unchecked")

MEAN, DEVIATION = 2.0, 0.5
SHARES = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64).square().neg().add(1).cumprod(0)
DRAWING = [name for name in SCHEDULERS if "Ancestral" in name or name.startswith(("DDPM", "SA", "LCM", "TCD"))]
"""Schedulers that draw noise on their way."""


class NormalPictures:
    """The best denoiser of latents that are normal with `MEAN` and `DEVIATION`, in the place of a model."""

    class conditioner:
        uncond_vector = torch.zeros(1, 1, 3)

    @staticmethod
    def predict(noisy, masked, mask_channel, timestep, condition):
        # Some schedulers stop between two timesteps.
        below, beyond = timestep.double().floor(), timestep.double().frac()
        spread = (1 / SHARES - 1).sqrt().log()
        between = torch.lerp(spread[below.long()], spread[(below.long() + 1).clamp(max=TIMESTEPS - 1)], beyond)
        share = (1 / (1 + (2 * between).exp()))[:, None, None, None]
        surprise = (noisy - share.sqrt() * MEAN) / (share * DEVIATION**2 + 1 - share)
        return ((1 - share).sqrt() * surprise).float()


def paint(scheduler: Scheduler, steps: int, side: int = 16, model: object = None) -> torch.Tensor:
    given = torch.zeros(1, 4, side, side), torch.ones(1, 1, side, side), torch.zeros(1, 1, 3)
    how = {"seeds": [0], "guidance": 1.0, "prediction": "epsilon"}
    return paint_latents(model or NormalPictures(), *given, scheduler=scheduler, steps=steps, **how)


def started(scheduler: Scheduler, steps: int) -> SchedulerMixin:
    """A scheduler before its first step."""
    made = make_scheduler(scheduler, "epsilon")
    begin(made, steps, torch.device("cpu"))
    return made


def first_noise() -> torch.Tensor:
    """What `paint` begins with."""
    seen = []

    class Watching(NormalPictures):
        @staticmethod
        def predict(noisy, *rest):
            seen.append(noisy)
            return noisy

    paint("DDIMScheduler", 1, model=Watching())
    return seen[0]


@pytest.fixture
def exact() -> torch.Tensor:
    """What the noise of `paint` becomes after infinitely many steps from the last timestep: normal numbers stay normal."""
    last = SHARES[-1]
    return MEAN + DEVIATION * (first_noise() - last.sqrt() * MEAN) / (last * DEVIATION**2 + 1 - last).sqrt()


@pytest.mark.parametrize("scheduler", [SCHEDULER, *(name for name in SCHEDULERS if name not in DRAWING)])
def test_more_steps_never_paint_worse(exact: torch.Tensor, scheduler: str):
    """Also where they do not divide 1000, and where diffusers counts one timestep too many (61)."""
    counts = [1, 3, 10, 61] + [334] * (scheduler != "LMSDiscreteScheduler")  # It computes an integral for each step.
    apart = [(paint(scheduler, steps) - exact).abs().mean().item() for steps in counts]
    assert all(later <= before + 1e-3 for before, later in pairwise(apart)), apart
    assert apart[3] < 0.03
    assert apart[-1] < 0.01


@pytest.mark.parametrize("scheduler", DRAWING)
def test_schedulers_that_draw_noise_come_to_the_mean_as_well(scheduler: str):
    for steps in (1, 10, 49):
        assert paint(scheduler, steps, side=48).mean().item() == pytest.approx(MEAN, abs=0.03)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_timesteps_begin_at_the_last_and_are_as_many_as_was_asked_for(scheduler: str):
    """Above all where rounding gives `trailing` of diffusers one too many."""
    rounded = [steps for steps in range(1, TIMESTEPS + 1) if len(np.arange(TIMESTEPS, 0, -TIMESTEPS / steps)) > steps]
    assert (rounded[0], len(rounded)) == (61, 62)
    made = make_scheduler(scheduler, "epsilon")
    for steps in (1, 2, 7, 334, 501, 1000, *rounded):
        begin(made, steps, torch.device("cpu"))
        times = torch.unique(made.timesteps).tolist()  # PNDM goes to its second timestep twice.
        assert len(times) == steps
        assert 0 <= times[0] < times[-1] + 1 == TIMESTEPS


def test_the_published_timesteps_are_there_for_who_asks():
    """By an object, or by name; an option that is left at diffusers' default is not chosen."""
    published, ours = list(range(981, 0, -20)), list(range(999, 0, -20))
    for given in (DDIMScheduler(timestep_spacing="leading"), 'DDIMScheduler(timestep_spacing="leading")'):
        assert started(given, 50).timesteps.tolist() == published
    assert started(DDIMScheduler(), 50).timesteps.tolist() == started("DDIMScheduler", 50).timesteps.tolist() == ours


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_where_steps_divide_the_schedule_nothing_is_painted_otherwise_than_diffusers_does(name: str, spacing: str):
    theirs = make_scheduler(getattr(diffusers, name)(timestep_spacing=spacing), "epsilon")
    theirs.set_timesteps(20)
    latents = first_noise()
    for time in theirs.timesteps:
        latents = theirs.step(NormalPictures.predict(latents, None, None, time.expand(1), None), time, latents).prev_sample
    assert torch.equal(paint(f"{name}(timestep_spacing='{spacing}')", 20), latents)


def test_the_model_is_told_the_timestep_of_the_noise():
    """In diffusers this option lays noise levels otherwise than the timesteps beside them."""
    assert torch.equal(paint(EulerDiscreteScheduler(interpolation_type="log_linear"), 20), paint("EulerDiscreteScheduler", 20))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_whatever_options_are_given_something_is_painted_or_one_line_said(name: str):
    """Spacings, and noise levels by formulas, of which several may share a timestep. One step may be too few."""
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    sigmas = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    chosen = [{option: True} for option in sigmas if option in taken]
    chosen += [{"timestep_spacing": spacing} for spacing in ("leading", "linspace") if "timestep_spacing" in taken]
    for options in chosen or [{}]:
        given = getattr(diffusers, name)(**options)
        with suppress(InputError):
            paint(given, 1, side=2)
        for steps in (2, 12):
            paint(given, steps, side=2)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        ("DPMSolverMultistepScheduler(use_beta_sigmas=True)", 50),
        ("UniPCMultistepScheduler(use_beta_sigmas=True)", 50),
        ("DPMSolverSinglestepScheduler(use_beta_sigmas=True)", 61),
    ],
)
def test_two_noise_levels_of_one_timestep_are_both_gone_through(exact: torch.Tensor, scheduler: str, steps: int):
    """Diffusers looks a scheduler's first timestep up, takes the second of two that are the same, and has one too few."""
    assert (paint(scheduler, steps) - exact).abs().mean() < 0.03


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("other", [{}, {"rescale_betas_zero_snr": True}, {"beta_start": 0.5, "trained_betas": [0.5] * 1000}])
def test_a_schedulers_own_options_are_kept_and_its_schedule_is_not(kind: type, other: dict):
    """Also in what it leaves at its default, which diffusers notes, and would not have changed."""
    taken = inspect.signature(kind.__init__).parameters
    own = {"use_karras_sigmas": True} if "use_karras_sigmas" in taken else {}
    given = kind(**own, prediction_type="v_prediction", **{name: value for name, value in other.items() if name in taken})
    made = make_scheduler(given, "epsilon")
    assert made is not given
    assert torch.equal(made.alphas_cumprod, training_schedule("epsilon").alphas_cumprod)
    assert made.config.prediction_type == "epsilon"
    assert not made.config.get("clip_sample", False)
    assert {name: made.config[name] for name in own} == own


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        ("LCMScheduler", 60, "^LCMScheduler with 60 steps: .*give another number"),
        ("DDIMScheduler", 1001, "^DDIMScheduler with 1,001 steps: .* give fewer steps$"),
        ("DDIMScheduler(timestep_spacing='leading')", 1, "^DDIMScheduler with 1 step: from timestep 1 "),
        ("DDIMScheduler(timestep_spacing='leading')", 1000, "with 1,000 steps: from timestep 1000 "),
        ("DEISMultistepScheduler(use_karras_sigmas=True)", 1, "a noise of 14.6"),
        ("DDPMScheduler(variance_type='learned')", 3, "^DDPMScheduler with 3 steps: TypeError in diffusers.*; give another"),
        ("UNet2DModel", 3, "no scheduler for the schedule of the training; give one of DDIM"),
        ("FlowMatchEulerDiscreteScheduler", 3, "no scheduler for the schedule"),
        ("CogVideoXDDIMScheduler", 3, "no scheduler for the schedule"),
        ("DDIMScheduler(eta=1)", 3, "eta is no option that may be chosen; those are .*timestep_spacing"),
        ("DDIMScheduler(beta_start=0.1)", 3, "beta_start is no option that may be chosen"),
        ("DPMSolverMultistepScheduler(algorithm_type='dpmsolver')", 3, "`final_sigmas_type` zero .*; give other options"),
        ("DDIMScheduler(timestep_spacing=leading)", 3, "no scheduler; give a name"),
        ("DDIMScheduler(", 3, "no scheduler; give a name"),
        ("DDIMScheduler('leading')", 3, "no scheduler; give a name"),
        ("__import__('os').getcwd()", 3, "no scheduler; give a name"),
    ],
)
def test_what_cannot_be_painted_with_is_one_line(scheduler: str, steps: int, message: str):
    with pytest.raises(InputError, match=message) as caught:
        paint(scheduler, steps)
    assert "\n" not in str(caught.value)
    assert re.match(re.escape(scheduler.partition("(")[0]), str(caught.value))
