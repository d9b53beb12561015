"""Diffusion: the training loss, and guided sampling.

Schedule, loss and guidance are those of Stable Diffusion 1.x: 1000 steps, betas linear in their square root from 0.00085 to
0.012, plain mean squared error of the predicted noise (or, by a setting, of the velocity).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from pbe_core.errors import InputError
from pbe_core.randomness import name_hash
from pbe_core.words import number_of
from pbe_train.config import TIMESTEPS, Prediction
from pbe_train.data.latents import normalise_reference
from pbe_train.data.training_dataset import Batch
from pbe_train.model.guided import Guided
from pbe_train.model.paint_model import PaintByExampleModel
from pbe_train.model.sampling import EVERYWHERE, Interval, guided_at
from pbe_train.model.schedulers import Scheduler, begin, make_scheduler, step

# The model, or its wrapper for many ranks: the arguments and the result of `PaintByExampleModel.forward`.
Denoiser = Callable[..., Tensor]


def noise_losses(model: Denoiser, schedule: DDPMScheduler, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean squared error of the predicted noise, or velocity, of each sample.

    The velocity is `sqrt(a) noise - sqrt(1 - a) latent`, with a the share of the latent's power in the noisy one: Salimans & Ho,
    Progressive distillation for fast sampling of diffusion models (2022), appendix D.
    """
    channels = (batch.planes.shape[1] - 1) // 3
    latent, masked, mask_channel, noise = torch.split(batch.planes, [channels, channels, 1, channels], dim=1)
    noisy = schedule.add_noise(latent, noise, batch.timestep)
    predicted = model(noisy, masked, mask_channel, batch.timestep, normalise_reference(batch.reference), batch.dropped)
    predicts_noise = schedule.config.prediction_type == "epsilon"
    target = noise if predicts_noise else schedule.get_velocity(latent, noise, batch.timestep)
    return mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))


@torch.no_grad()
def paint_latents(
    model: PaintByExampleModel,
    masked: Float[Tensor, "batch channels height width"],
    mask_channel: Float[Tensor, "batch 1 height width"],
    condition: Float[Tensor, "batch tokens features"],
    *,
    seeds: Sequence[int],
    guidance: float,
    guidance_interval: Interval = EVERYWHERE,
    steps: int,
    scheduler: Scheduler,
    prediction: Prediction,
    reuse: int = 1,
    exact: bool = False,
    watch: Callable[[int, int, Float[Tensor, "batch channels height width"]], None] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Denoise from pure noise: scaled latents of the painted views.

    Args:
        model: in eval mode.
        masked: masked-image latents, scaled.
        mask_channel: 1 - mask.
        condition: tokens of the references.
        seeds: one per item; an item's noise depends on its own seed alone, not on its neighbours.
        guidance: s in `null + s * (condition - null)`; 1 = the condition alone, which costs half.
        guidance_interval: shares of the schedule, from 0 (noise) to 1, between which guidance works; elsewhere it is 1.
            Kynkäänniemi et al., Applying guidance in a limited interval improves sample and distribution quality (2024).
        steps: denoising steps.
        scheduler: as `make_scheduler` takes it.
        prediction: what the model predicts. Guidance is the same for both: one is a linear function of the other.
        reuse: every so-many-th step goes through the whole U-Net, from 1; those between take its deep features as they were.
        exact: each pass is diffusers' own, alone, as it always was.
        watch: called after each step with its number, from 1, of how many, and the latents that the model then thinks it is
            coming to.

    Raises:
        InputError: the scheduler cannot make so many steps, or leads to no picture.
    """
    sampler = make_scheduler(scheduler, prediction)
    begin(sampler, steps, masked.device)
    # Drawn on the CPU, so that a seed means the same picture on every device.
    generators = [torch.Generator().manual_seed(name_hash("paint", seed, bits=32)) for seed in seeds]
    noise = torch.stack([torch.randn(masked.shape[1:], generator=generator) for generator in generators])
    latents = noise.to(masked.device) * sampler.init_noise_sigma
    predict = Guided(model, masked, mask_channel, condition, reuse, exact)
    for number, time in enumerate(sampler.timesteps):
        strength = guidance if guided_at(float(time), guidance_interval, TIMESTEPS) else 1.0
        predicted = predict(sampler.scale_model_input(latents, time), time, strength)
        stepped = step(sampler, number, predicted, latents, generators)
        if watch:
            watch(number + 1, len(sampler.timesteps), _foreseen(sampler, stepped, predicted, time, latents))
        latents = stepped.prev_sample
    if not latents.isfinite().all():
        raise InputError(
            f"{type(sampler).__name__} with {number_of(steps, 'step')}: came to infinite numbers; "
            "give fewer steps, or another scheduler"
        )
    painted: Tensor = latents
    return painted


def _foreseen(sampler: Any, stepped: Any, predicted: Tensor, time: Tensor, noisy: Tensor) -> Tensor:
    """The clean latents that a prediction points to: what the scheduler says, or what its schedule implies."""
    if getattr(stepped, "pred_original_sample", None) is not None:
        return stepped.pred_original_sample  # type: ignore[no-any-return]
    share: Tensor = sampler.alphas_cumprod.to(noisy.device)[int(time)]
    if sampler.config.prediction_type == "epsilon":
        return (noisy - (1 - share).sqrt() * predicted) / share.sqrt()
    return share.sqrt() * noisy - (1 - share).sqrt() * predicted
