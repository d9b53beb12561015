"""Diffusion: the noise schedule, the training loss, and guided sampling.

Schedule, loss and guidance are those of Stable Diffusion 1.x: 1000 steps, betas linear in their square root from 0.00085 to
0.012, the network predicts the noise, plain mean squared error.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from pbe_train.items import TIMESTEPS, Batch
from pbe_train.latents import normalise_reference
from pbe_train.model import PaintByExampleModel
from schemas.errors import InputError
from schemas.randomness import name_hash

SCHEDULE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


# The model, or its wrapper for many ranks: the arguments and the result of `PaintByExampleModel.forward`.
Denoiser = Callable[..., Tensor]


def training_schedule() -> DDPMScheduler:
    """The schedule by which latents are noised in training."""
    return DDPMScheduler.from_config(SCHEDULE)


def noise_loss(model: Denoiser, schedule: DDPMScheduler, batch: Batch) -> Float[Tensor, ""]:
    """Mean squared error of the predicted noise over a micro-batch."""
    channels = (batch.planes.shape[1] - 1) // 3
    latent, masked, keep, noise = torch.split(batch.planes, [channels, channels, 1, channels], dim=1)
    noisy = schedule.add_noise(latent, noise, batch.timestep)
    predicted = model(noisy, masked, keep, batch.timestep, normalise_reference(batch.reference), batch.dropped)
    return mse_loss(predicted.float(), noise)


def make_scheduler(name: str) -> Any:
    """A sampler of diffusers by the name of its class, on the schedule of the training.

    Raises:
        InputError: diffusers has no such scheduler.
    """
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise InputError(f"{name}: diffusers has no such scheduler; for example DDIMScheduler or DPMSolverMultistepScheduler")
    return kind.from_config(SCHEDULE)


@torch.no_grad()
def paint_latents(
    model: PaintByExampleModel,
    masked: Float[Tensor, "batch channels height width"],
    keep: Float[Tensor, "batch 1 height width"],
    reference: Float[Tensor, "batch 3 size size"],
    *,
    seeds: Sequence[int],
    guidance: float,
    steps: int,
    scheduler: str,
) -> Float[Tensor, "batch channels height width"]:
    """Denoise from pure noise: scaled latents of the painted views.

    Args:
        model: in eval mode.
        masked: scaled latents of the masked views.
        keep: 1 = keep, 0 = hole.
        reference: CLIP-normalised references.
        seeds: one per item; an item's noise depends on its own seed alone, not on its neighbours.
        guidance: s in `null + s * (condition - null)`; 1 = the condition alone, which costs half.
        steps: denoising steps.
        scheduler: name of a diffusers scheduler.
    """
    sampler = make_scheduler(scheduler)
    sampler.set_timesteps(steps, device=masked.device)
    # Drawn on the CPU, so that a seed means the same picture on every device.
    generators = [torch.Generator().manual_seed(name_hash("paint", seed, bits=32)) for seed in seeds]
    noise = torch.stack([torch.randn(masked.shape[1:], generator=generator) for generator in generators])
    latents = noise.to(masked.device) * sampler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
    condition = model.conditioner(reference)
    nothing = model.conditioner.uncond_vector.to(condition.dtype).expand_as(condition)
    for time in sampler.timesteps:
        noisy = sampler.scale_model_input(latents, time)
        times = time.to(masked.device).expand(len(noisy))
        predicted = model.predict(noisy, masked, keep, times, condition).float()
        if guidance != 1:
            without = model.predict(noisy, masked, keep, times, nothing).float()
            predicted = without + guidance * (predicted - without)
        latents = sampler.step(predicted, time, latents, **extra).prev_sample
    painted: Tensor = latents
    return painted


def decode_latents(
    vae: nn.Module, latents: Float[Tensor, "batch channels height width"], scale: float
) -> Float[Tensor, "batch 3 view view"]:
    """Scaled latents -> RGB, about [-1, 1]."""
    with torch.no_grad():
        return vae.decode(latents / scale).sample  # type: ignore[operator, no-any-return]
