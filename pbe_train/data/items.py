"""What the model trains on at (step, slot): a pure function of the settings and these two numbers, whoever computes it.

    order ──▶ sample ─┬─ latent ── draw ───────────▶ planes: view latent C
                      ├─ masked, one of K ── draw ─▶         masked-view latent C
                      ├─ its mask ── shrink ───────▶         keep map 1
                      │                noise ──────▶         noise C
                      └─ reference ── squash, augment ──▶ reference
                                timestep, drop

So a run has no loader state and no random state: resumed at step k, or cut into other ranks, it goes on exactly as it would have.
"""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pbe_train.data.augment import Augmentation, squash
from pbe_train.config import TrainSettings
from pbe_train.data.latents import draw_posterior, keep_map, to_tensor
from pbe_train.data.order import SampleOrder, rank_slots
from pbe_train.data.shards import ShardReader
from schemas.errors import InputError
from schemas.randomness import generator

TIMESTEPS = 1000


class Batch(NamedTuple):
    """A micro-batch, packed into few tensors."""

    planes: Float[Tensor, "batch planes height width"]
    """Stacked: latent of the view (C, scaled), of the masked view (C, scaled), keep map (1), noise (C)."""
    reference: UInt8[Tensor, "batch 3 reference reference"]
    """The augmented reference, RGB, 0-255."""
    timestep: Int64[Tensor, " batch"]
    """Diffusion time, 0..999."""
    dropped: Bool[Tensor, " batch"]
    """Whether the null vector replaces the condition."""


class Items(Dataset[Batch | InputError]):
    """Maps a list of (step, slot) to the batch of their items.

    Bad input is returned, not raised: a DataLoader would wrap what a worker raises into a page of traceback.
    """

    def __init__(self, settings: TrainSettings, reader: ShardReader, reference_size: int) -> None:
        self.settings = settings
        self.reader = reader
        self.reference_size = reference_size
        self.order = SampleOrder(reader.counts, settings.loader.window, settings.seed)
        self.augment = Augmentation(settings.augmentation)

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Batch | InputError:
        """The batch of these (step, slot) pairs."""
        try:
            made = [self.make(step, slot) for step, slot in pairs]
        except InputError as error:
            return error
        planes, references, timesteps, dropped = zip(*made, strict=True)
        return Batch(
            torch.stack(planes), to_tensor(np.stack(references)), torch.tensor(timesteps), torch.tensor(dropped, dtype=torch.bool)
        )

    def make(
        self, step: int, slot: int
    ) -> tuple[Float[Tensor, "planes height width"], UInt8[np.ndarray, "reference reference 3"], int, bool]:
        """One item: planes, augmented reference, timestep, whether the condition is dropped."""
        settings, seed = self.settings, self.settings.seed
        epoch, place = self.order.at(step, slot, settings.global_batch)
        sample = self.reader.read(place)
        kind = int(generator(seed, "train", "mask", epoch, sample.key).integers(len(sample.masks)))

        vae = self.reader.info.vae
        shape = (vae.latent_channels, *sample.latent.shape[1:])
        draws = generator(seed, "train", step, slot, "latents").standard_normal((3, *shape), np.float32)
        latent = draw_posterior(sample.latent, draws[0], vae.scaling_factor)
        masked = draw_posterior(sample.masked[kind], draws[1], vae.scaling_factor)
        keep = keep_map(sample.masks[kind : kind + 1], shape[-1], settings.model.mask_to_latent)[0]
        planes = torch.cat([torch.from_numpy(latent), torch.from_numpy(masked), keep, torch.from_numpy(draws[2])])

        reference = self.augment(squash(sample.reference, self.reference_size), seed, "train", step, slot, "augmentation")
        timestep = int(generator(seed, "train", step, slot, "timestep").integers(TIMESTEPS))
        dropped = bool(generator(seed, "train", step, slot, "dropout").random() < settings.guidance_dropout)
        return planes, reference, timestep, dropped


class SlotSampler(Sampler[list[tuple[int, int]]]):
    """The (step, slot) pairs of one rank's micro-batches, from one step to another."""

    def __init__(self, first_step: int, last_step: int, slots: list[list[int]]) -> None:
        self.first_step = first_step
        self.last_step = last_step
        self.slots = slots

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Micro-batches in order."""
        for step in range(self.first_step, self.last_step):
            for slots in self.slots:
                yield [(step, slot) for slot in slots]

    def __len__(self) -> int:
        """Number of micro-batches."""
        return (self.last_step - self.first_step) * len(self.slots)


def load_batches(items: Items, first_step: int, ranks: int, rank: int) -> Iterator[Batch]:
    """One rank's micro-batches from `first_step` to the last step of the settings.

    Raises:
        InputError: the global batch cannot be cut evenly (at once), or a shard is missing or damaged (while iterating).
    """
    settings = items.settings
    try:
        slots = rank_slots(settings.global_batch, settings.accumulation, ranks, rank)
    except ValueError as error:
        raise InputError(str(error)) from None
    return _iterate(items, SlotSampler(first_step, settings.steps, slots))


def _iterate(items: Items, sampler: SlotSampler) -> Iterator[Batch]:
    # Before workers are forked, not in them: a fork of OpenCV's running thread pool waits for ever when it is resized.
    cv2.setNumThreads(1)
    workers = items.settings.loader.workers
    loader: DataLoader[Batch | InputError] = DataLoader(
        items,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
