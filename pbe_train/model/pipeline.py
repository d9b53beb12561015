"""A trained model that paints: from masked views and references to painted views."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import BaseModel, ConfigDict, model_serializer
from torch import Tensor

from pbe_core.autoencoder import Autoencoder
from pbe_core.buckets import Shape, nearest_bucket
from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.images.crop import Size, width_height
from pbe_train.config import MaskChannel, TrainSettings
from pbe_train.data.latents import normalise_reference, to_mask_channel, to_pictures
from pbe_train.data.references import fit_reference
from pbe_train.model.diffusion import paint_latents
from pbe_train.model.paint_model import PaintByExampleModel
from pbe_train.model.sampling import EVERYWHERE, GUIDANCE, SCHEDULER, STEPS, Interval
from pbe_train.model.schedulers import Scheduler
from schemas.dataset import Normalisation, leave_out

DECODED_AT_ONCE = 4
# What shows an object: one photo of it, or several.
References = AnyPhoto | Sequence[AnyPhoto]
# Called after each denoising step with its number, from 1, of how many, and a function that decodes what the model is coming to.
Watch = Callable[[int, int, Callable[[], UInt8[np.ndarray, "batch view_height view_width 3"]]], None]


@dataclass(frozen=True)
class SamplingSettings:
    """How to denoise. `guidance` 1 means none; `scheduler` is as `pbe_train.model.schedulers.make_scheduler` takes it;
    `guidance_interval`, `reuse` and `exact` are as `pbe_train.model.diffusion.paint_latents` takes them.
    """

    guidance: float = GUIDANCE
    steps: int = STEPS
    scheduler: Scheduler = SCHEDULER
    guidance_interval: Interval = EVERYWHERE
    reuse: int = 1
    exact: bool = False


class RunIdentity(BaseModel):
    """What a run trains on and with; enough, with the settings, to sample from it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    dataset_fingerprint: str
    """Fingerprint of the dataset: of its plan and settings."""
    dataset_samples: str
    """Hash of how many samples each of the split's shards has. A build that is run again when more photos have come keeps its
    fingerprint, and orders its samples otherwise."""
    precision: str
    """Arithmetic of forward and backward pass: what `auto` was on the run's GPUs."""
    vae_sha256: str
    """Hash of the VAE's weights."""
    encoder_sha256: str
    """Hash of the vision encoder's weights."""
    unet: dict[str, Any]
    """diffusers' configuration of the U-Net."""
    latent_channels: int
    """C of the VAE."""
    scaling_factor: float
    """Latents are multiplied by this for the U-Net."""
    view_size: int
    """S, side of a view in px; with `buckets`, of a square as large as the largest of them."""
    buckets: tuple[Shape, ...] | None = None
    """Shapes of the views, width and height in px, as in the dataset. Null and left out of the file: squares."""
    vae_normalisation: Normalisation | None = None
    """What is done to the VAE's own latents before they are scaled, as in the dataset. Null and left out of the file: nothing."""
    mask_channel: MaskChannel = "keep"
    """What 1 means in the mask that the U-Net sees. Left out of the file where it is `keep`."""
    base_sha256: str | None = None
    """Of a LoRA, the hash of the weights that it is trained beside: U-Net and conditioner. Null and left out of the file: all
    weights are the run's own."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        usual = {"vae_normalisation": None, "buckets": None, "mask_channel": "keep", "base_sha256": None}
        return leave_out(write(self), usual)

    def view_shape(self, width: int, height: int, size: Size | None = None) -> Shape:
        """Width and height in px at which a photo of `width` x `height` px is worked at: `size`, or as in training."""
        if size is not None:
            return width_height(size)
        return nearest_bucket(width, height, self.buckets) if self.buckets else (self.view_size, self.view_size)


@dataclass(frozen=True)
class Run:
    """A trained model with all that painting needs. The model is in eval mode while it paints."""

    model: PaintByExampleModel
    vae: Autoencoder
    settings: TrainSettings
    identity: RunIdentity
    step: int
    offloaded_from: torch.device | None = None
    """The device that the networks are brought to one at a time; null where they stay on theirs."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.offloaded_from or self.model.conditioner.uncond_vector.device

    def arithmetic(self) -> AbstractContextManager[object]:
        """Inside this block networks with weights of 16 bits take inputs of 32; what needs 32 bits is computed in them."""
        dtype = self.model.conditioner.uncond_vector.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def reference_size(self) -> int:
        """Side of the encoder's input in px."""
        return int(self.model.conditioner.model.config.image_size)

    def paint(
        self,
        masked: Float[Tensor, "batch channels height width"],
        masks: Bool[np.ndarray, "batch view_height view_width"],
        references: Sequence[References],
        seeds: Sequence[int],
        how: SamplingSettings,
        watch: Watch | None = None,
    ) -> UInt8[np.ndarray, "batch view_height view_width 3"]:
        """Paint references into views; the whole view as decoded, not yet blended with the view itself.

        Args:
            masked: masked-image latents, scaled.
            masks: edit regions, True = repaint.
            references: RGB, 0-255, any sizes; of an item several, if they show the same object.
            seeds: one per item.
            how: guidance, steps, scheduler.
            watch: called after each step.
        """
        was_training = self.model.training
        self.model.eval()
        mask_channel = to_mask_channel(masks, (masked.shape[-2], masked.shape[-1]), self.settings.model.mask_to_latent)
        with self.arithmetic():
            latents = paint_latents(
                self.model,
                masked.to(self.device),
                mask_channel.to(self.device),
                self.condition(references),
                seeds=seeds,
                guidance=how.guidance,
                guidance_interval=how.guidance_interval,
                steps=how.steps,
                scheduler=how.scheduler,
                prediction=self.settings.prediction,
                reuse=how.reuse,
                exact=how.exact,
                watch=watch and (lambda step, of, foreseen: watch(step, of, lambda: self.decode(foreseen))),
            )
        self.model.train(was_training)
        return self.decode(latents)

    @torch.no_grad()
    def condition(self, references: Sequence[References]) -> Float[Tensor, "batch tokens features"]:
        """Condition tokens of objects; of one that several references show, the mean of theirs (ours, not the paper's).

        Raises:
            InputError: several references, and a model that sees all tokens: those of different photos do not correspond.
        """
        shown = [[each] if isinstance(each, np.ndarray) else list(each) for each in references]
        counts = [len(each) for each in shown]
        if max(counts) > 1 and self.settings.model.tokens == "all":
            raise InputError("several references of one object need a model of class tokens; this one sees all tokens: give one")
        with self.arithmetic():
            tokens = self.model.conditioner(self._see([photo for each in shown for photo in each]))
        return torch.stack([part.mean(dim=0) for part in torch.split(tokens, counts)])

    @torch.no_grad()
    def encode_pixels(
        self, pixels: Float[Tensor, "batch 3 view_height view_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Pixels in [-1, 1] -> scaled latents (posterior means)."""
        with self.arithmetic():
            mean = self.vae.encode(pixels.to(self.device)).mean
        return mean.float() * self.identity.scaling_factor

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch channels height width"]
    ) -> UInt8[np.ndarray, "batch view_height view_width 3"]:
        """Scaled latents -> views; a few at a time, as the decoder needs far more memory a view than the U-Net."""
        parts = torch.split(latents / self.identity.scaling_factor, DECODED_AT_ONCE)
        with self.arithmetic():
            return np.concatenate([to_pictures(self.vae.decode(part.to(self.device))) for part in parts])

    @torch.no_grad()
    def embed(self, pictures: Sequence[AnyPhoto]) -> Float[Tensor, "pictures hidden"]:
        """Class-token features of the vision encoder, at unit length."""
        with self.arithmetic():
            features = self.model.conditioner.model(pixel_values=self._see(pictures)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=1).cpu()

    def _see(self, pictures: Sequence[AnyPhoto]) -> Float[Tensor, "batch 3 reference reference"]:
        geometry = self.settings.model.reference_geometry
        squares = np.stack([fit_reference(picture, self.reference_size, geometry) for picture in pictures])
        return normalise_reference(torch.from_numpy(squares).to(self.device))


def check_guidance(run: Run, guidance: float) -> None:
    """Refuse guidance from a null vector that was never trained.

    Raises:
        InputError: guidance other than 1 for a run that never dropped the condition, or what is no finite number.
    """
    if not isinstance(guidance, int | float | np.floating | np.integer) or not np.isfinite(guidance):
        raise InputError(f"guidance {guidance!r}: must be a finite number")
    if guidance != 1 and run.settings.condition_dropout == 0:
        raise InputError(
            f"guidance {guidance:g}: the run was trained with condition_dropout 0, so its null vector means nothing; "
            "give guidance 1"
        )


def check_size(run: Run, size: Size | None) -> None:
    """Refuse a working size that does not halve evenly down to the U-Net's lowest level.

    Raises:
        InputError: with the sizes that fit.
    """
    step = run.vae.sizes.downsampling * 2 ** (len(run.identity.unet["block_out_channels"]) - 1)
    if size is not None and any(side < step or side % step for side in width_height(size)):
        shown = size if isinstance(size, int) else f"{size[0]}x{size[1]}"
        shapes = ", ".join(f"{width}x{height}" for width, height in run.identity.buckets or ())
        raise InputError(
            f"size {shown}: must be a multiple of {step} px; the model was trained at {shapes or run.identity.view_size}"
        )
