"""The loss on fixed held-out samples with fixed noise: a curve that does not jitter with what a step happens to draw."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pbe_core.progress import Progress
from pbe_train.config import TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.training_dataset import Batch, TrainingDataset
from pbe_train.model.diffusion import Denoiser, noise_losses
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.ranks import Ranks


class Validation:
    """Fixed samples of the validation split, without augmentation and with their condition; each rank holds its share of them.

    Sample, mask, timestep and noise are drawn as the training's are, for step 0 of a run with a global batch of all of them: they
    are the same at every step, on any number of ranks.
    """

    def __init__(self, settings: TrainSettings, ranks: Ranks, reference_size: int) -> None:
        """Read the samples. Raises InputError where the split is not there, or damaged."""
        reader = open_reader(settings, settings.validation.split)
        count = min(settings.validation.samples, sum(reader.counts))
        fixed = settings.model_copy(
            update={
                "global_batch": count,
                "guidance_dropout": 0.0,
                "timesteps": "stratified",
                "augmentation": settings.augmentation.model_copy(update={"preset": "none"}),
            }
        )
        items = TrainingDataset(fixed, reader, reference_size)
        size = settings.global_batch // (ranks.count * settings.accumulation)
        slots = range(count)[ranks.rank :: ranks.count]
        self.samples = count
        self.batches = [_made(items, list(slots[start : start + size])) for start in range(0, len(slots), size)]
        self.schedule = training_schedule(settings.prediction)

    @torch.no_grad()
    def loss(self, model: Denoiser, ranks: Ranks, precision: str, work: Progress | None = None) -> float:
        """Mean over all samples. All ranks must call.

        Args:
            model: in whichever mode it is.
            ranks: who share the samples.
            precision: of the arithmetic.
            work: counts batches.
        """
        total = torch.zeros(1, device=ranks.device, dtype=torch.float64)
        for losses in self._losses(model, ranks, precision):
            total += losses.double().sum()
            if work:
                work.update()
        return float(ranks.sum(total)) / self.samples

    def _losses(self, model: Denoiser, ranks: Ranks, precision: str) -> Iterator[Float[Tensor, " batch"]]:
        for batch in self.batches:
            moved = Batch(*(tensor.to(ranks.device) for tensor in batch))
            with ranks.autocast(precision):
                yield noise_losses(model, self.schedule, moved)


def _made(items: TrainingDataset, slots: list[int]) -> Batch:
    loaded = items[[(0, slot) for slot in slots]]
    if isinstance(loaded, Exception):
        raise loaded
    return loaded.batch
