"""The schedulers of diffusers: which are taken, and whether each leads from noise to what the model points to.

What is right is known where the pictures are normal: then the best denoiser is a formula, and so is what it makes of a noise.
"""

import inspect
import re
from collections.abc import Callable
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin

from pbe_core.errors import InputError
from pbe_train.config import TIMESTEPS
from pbe_train.model.diffusion import paint_latents
from pbe_train.model.schedulers import Scheduler, begin, make_scheduler, training_schedule

# Without the check of argument types that tests put around it: the denoiser is no `PaintByExampleModel`.
paint_unchecked = inspect.unwrap(paint_latents)

MEAN, DEVIATION = 2.0, 0.5
SHARES = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64).square().neg().add(1).cumprod(0)
STRAIGHT = (
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
)
"""Schedulers that draw no noise on their way."""
DRAWING = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Those that do."""


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
    return paint_unchecked(model or NormalPictures(), *given, scheduler=scheduler, steps=steps, **how)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    """What the noise of `paint` becomes after infinitely many steps from the last timestep: normal numbers stay normal."""
    last = SHARES[-1]
    return MEAN + DEVIATION * (first_noise() - last.sqrt() * MEAN) / (last * DEVIATION**2 + 1 - last).sqrt()


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


@pytest.mark.parametrize("scheduler", STRAIGHT)
def test_more_steps_never_paint_worse(exact: torch.Tensor, scheduler: str):
    """Also where they do not divide 1000, and where diffusers counts one timestep too many (61)."""
    counts = [1, 3, 10, 50, 61, 334, 501, 1000]
    if scheduler == "LMSDiscreteScheduler":  # It computes an integral for each step, which takes long.
        counts = counts[:-3]
    apart = [(paint(scheduler, steps) - exact).abs().mean().item() for steps in counts]
    assert all(later <= before + 1e-3 for before, later in pairwise(apart)), apart
    assert apart[3] < 0.03
    assert apart[-1] < 0.005


@pytest.mark.parametrize("scheduler", DRAWING)
def test_schedulers_that_draw_noise_come_to_the_mean_as_well(scheduler: str):
    most = 50 if scheduler in ("LCMScheduler", "TCDScheduler") else 501
    for steps in (1, 10, 49, most):
        assert paint(scheduler, steps, side=48).mean().item() == pytest.approx(MEAN, abs=0.03)


def test_all_schedulers_that_are_taken_are_tested_here():
    taken = set()
    for name in dir(diffusers):
        try:
            taken.add(type(make_scheduler(name, "epsilon")).__name__)
        except InputError:
            continue
    assert taken == {*STRAIGHT, *DRAWING}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_timesteps_begin_at_the_last_and_are_as_many_as_was_asked_for(scheduler: str):
    made = make_scheduler(scheduler, "epsilon")
    for steps in range(1, TIMESTEPS + 1):
        begin(made, steps, torch.device("cpu"))
        times = torch.unique(made.timesteps).tolist()  # PNDM goes to its second timestep twice.
        assert len(times) == steps
        assert 0 <= times[0] < times[-1] + 1 == TIMESTEPS


def test_the_published_timesteps_are_there_for_who_asks():
    """By an object, or by name; an option that is left at diffusers' default is not chosen."""
    published = list(range(981, 0, -20))
    for given in (DDIMScheduler(timestep_spacing="leading"), 'DDIMScheduler(timestep_spacing="leading")'):
        assert start(given, 50).timesteps.tolist() == published
    for given in (DDIMScheduler(), "DDIMScheduler"):
        assert start(given, 50).timesteps.tolist() == list(range(999, 0, -20))


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_where_steps_divide_the_schedule_nothing_is_painted_otherwise_than_diffusers_does(name: str, spacing: str):
    theirs = make_scheduler(getattr(diffusers, name)(timestep_spacing=spacing), "epsilon")
    theirs.set_timesteps(20)
    latents = first_noise()
    for time in theirs.timesteps:
        latents = theirs.step(NormalPictures.predict(latents, None, None, time.expand(1), None), time, latents).prev_sample
    assert torch.equal(paint(f"{name}(timestep_spacing='{spacing}')", 20), latents)


def start(scheduler: Scheduler, steps: int) -> SchedulerMixin:
    """A scheduler before its first step."""
    made = make_scheduler(scheduler, "epsilon")
    begin(made, steps, torch.device("cpu"))
    return made


def said(do: Callable[[int], object], steps: int) -> str:
    """What is wrong with so many steps, in one line; nothing where all is well."""
    try:
        do(steps)
    except InputError as error:
        return str(error)
    return ""


def test_the_model_is_told_the_timestep_of_the_noise():
    """In diffusers this option lays noise levels otherwise than the timesteps beside them."""
    assert torch.equal(paint(EulerDiscreteScheduler(interpolation_type="log_linear"), 20), paint("EulerDiscreteScheduler", 20))


SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@pytest.mark.parametrize("name", [*STRAIGHT, *DRAWING])
def test_whatever_options_are_given_something_is_painted_or_one_line_said(name: str):
    """Spacings, and noise levels by formulas, of which several may share a timestep."""
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    chosen = [{option: True} for option in SIGMAS if option in taken]
    chosen += [{"timestep_spacing": spacing} for spacing in ("leading", "linspace") if "timestep_spacing" in taken]
    most = 50 if name in ("LCMScheduler", "TCDScheduler") else TIMESTEPS
    for options in chosen or [{}]:
        given = kind(**options)
        told = {steps: said(lambda steps, given=given: paint(given, steps, side=2), steps) for steps in (1, 2, 3, 50)}
        assert [steps for steps, problem in told.items() if problem] in ([], [1]), options
        assert not told[1] or "and would paint noise; give another number" in told[1]
        if not name.startswith("KDPM2"):  # These take seconds to set so many timesteps.
            problem = said(lambda steps, given=given: start(given, steps), most)
            assert not problem or options == {"timestep_spacing": "leading"}


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        *((f"{name}(use_beta_sigmas=True)", 50) for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")),
        ("DEISMultistepScheduler(use_beta_sigmas=True)", 1000),
        ("DPMSolverSinglestepScheduler(use_beta_sigmas=True)", 61),
        ("DPMSolverMultistepScheduler(use_karras_sigmas=True)", 999),
    ],
)
def test_two_noise_levels_of_one_timestep_are_both_gone_through(exact: torch.Tensor, scheduler: str, steps: int):
    """Diffusers looks a scheduler's first timestep up, takes the second of two that are the same, and has one too few."""
    assert (paint(scheduler, steps) - exact).abs().mean() < 0.03


def test_a_schedulers_own_options_are_kept_and_its_schedule_is_not():
    other = {"beta_start": 0.5, "trained_betas": [0.5] * 1000, "prediction_type": "v_prediction"}
    given = DPMSolverMultistepScheduler(use_karras_sigmas=True, **other)
    made = make_scheduler(given, "epsilon")
    assert made is not given
    assert made.config.use_karras_sigmas
    assert (made.config.beta_start, made.config.prediction_type) == (0.00085, "epsilon")
    assert made.betas[0].item() == pytest.approx(0.00085)


@pytest.mark.parametrize("given", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True}, {"use_karras_sigmas": True}])
def test_a_scheduler_with_options_of_its_own_follows_the_schedule_of_the_training(given, options):
    """Also in what it leaves at its default, which diffusers notes, and would not have changed."""
    own = {name: value for name, value in options.items() if name in inspect.signature(given).parameters}
    made, expected = make_scheduler(given(**own), "epsilon"), training_schedule("epsilon")
    assert torch.equal(made.alphas_cumprod, expected.alphas_cumprod)
    assert not made.config.get("clip_sample", False)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        ("LCMScheduler", 60, "^LCMScheduler with 60 steps: .*give another number"),
        ("DDIMScheduler", 1001, "^DDIMScheduler with 1001 steps: .* give fewer steps$"),
        ("DDIMScheduler(timestep_spacing='leading')", 1, "^DDIMScheduler with 1 step: begins at timestep 1 "),
        ("DEISMultistepScheduler(use_karras_sigmas=True)", 1, "with 1 step: ends at a noise of 14.6"),
        ("DDPMScheduler(variance_type='learned')", 3, "^DDPMScheduler with 3 steps: TypeError in diffusers .*; give another"),
    ],
)
def test_steps_that_cannot_be_made_are_one_line(scheduler, steps, message):
    with pytest.raises(InputError, match=message) as caught:
        paint(scheduler, steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("UNet2DModel", "diffusers has no such scheduler"),
        ("EDMEulerScheduler", "does not sample on the schedule of the training"),
        ("FlowMatchEulerDiscreteScheduler", "does not sample on the schedule of the training"),
        ("DDIMInverseScheduler", "does not sample on the schedule of the training"),
        ("UnCLIPScheduler", ""),
        ("CogVideoXDDIMScheduler", "does not sample on the schedule of the training"),
        ("DDIMScheduler(eta=1)", "eta is no option that may be chosen; those are .*timestep_spacing"),
        ("DDIMScheduler(beta_start=0.1)", "beta_start is no option that may be chosen"),
        ("DDIMScheduler(prediction_type='sample')", "prediction_type is no option that may be chosen"),
        ("DPMSolverMultistepScheduler(algorithm_type='dpmsolver')", "`final_sigmas_type` zero .*; give other options"),
        ("DDIMScheduler(timestep_spacing=leading)", "diffusers has no such scheduler"),
        ("DDIMScheduler(", "diffusers has no such scheduler"),
        ("DDIMScheduler('leading')", "diffusers has no such scheduler"),
        ("__import__('os').getcwd()", "diffusers has no such scheduler"),
    ],
)
def test_other_schedulers_are_refused(name, message):
    with pytest.raises(InputError, match=f"^{re.escape(name.partition('(')[0])}.*: {message}"):
        make_scheduler(name, "epsilon")
