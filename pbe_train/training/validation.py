"""Held-out samples during training: their loss, and pictures of them. Both are fixed, so that steps and runs can be compared."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pbe_core.images.sheets import Picture, sheet
from pbe_core.progress import Progress
from pbe_train.config import TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import Batch, TrainingDataset
from pbe_train.evaluation.held_out import HeldOut, paint_held_out, read_held_out, reconstruct, spread_places
from pbe_train.model.diffusion import Denoiser, noise_losses
from pbe_train.model.pipeline import Run, SamplingSettings
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.distributed import Distributed
from pbe_train.training.optimizer import EMA

# Samples whose loss is measured, or all that the split has.
SAMPLES = 256
# Of the pictures: guidance scales, one column each (1 = no guidance), and the scheduler.
GUIDANCE = (1.0, 5.0)
SCHEDULER = "DPMSolverMultistepScheduler"


class Validation:
    """Fixed samples of the validation split, without augmentation and with their condition; each rank holds its share of them.

    Sample, mask, timestep and noise are drawn as the training's are, for step 0 of a run with a global batch of all of them: they
    are the same at every step, on any number of ranks.
    """

    def __init__(self, settings: TrainSettings, distributed: Distributed, reference_size: int) -> None:
        """Read the samples. Raises InputError where the split is not there, or damaged."""
        reader = open_reader(settings, settings.validation.split)
        count = min(SAMPLES, sum(reader.counts))
        fixed = settings.model_copy(
            update={
                "global_batch": count,
                "condition_dropout": 0.0,
                "timesteps": "stratified",
                "augmentation": settings.augmentation.model_copy(update={"preset": "none"}),
            }
        )
        items = TrainingDataset(fixed, reader, reference_size)
        size = settings.global_batch // (distributed.world_size * settings.accumulation)
        slots = range(count)[distributed.rank :: distributed.world_size]
        self.samples = count
        self.batches = [_make_batch(items, list(slots[start : start + size])) for start in range(0, len(slots), size)]
        self.schedule = training_schedule(settings.prediction)

    @torch.no_grad()
    def loss(self, model: Denoiser, distributed: Distributed, precision: str, work: Progress | None = None) -> float:
        """Mean over all samples. All ranks must call.

        Args:
            model: in whichever mode it is.
            distributed: the ranks that share the samples.
            precision: of the arithmetic.
            work: counts batches.
        """
        total = torch.zeros(1, device=distributed.device, dtype=torch.float64)
        for losses in self._losses(model, distributed, precision):
            total += losses.double().sum()
            if work:
                work.update()
        return float(distributed.sum(total)) / self.samples

    def _losses(self, model: Denoiser, distributed: Distributed, precision: str) -> Iterator[Float[Tensor, " batch"]]:
        for batch in self.batches:
            moved = Batch(*(tensor.to(distributed.device) for tensor in batch))
            with distributed.autocast(precision):
                yield noise_losses(model, self.schedule, moved)


def _make_batch(items: TrainingDataset, slots: list[int]) -> Batch:
    loaded = items[[(0, slot) for slot in slots]]
    if isinstance(loaded, Exception):
        raise loaded
    return loaded.batch


def make_validation(settings: TrainSettings, distributed: Distributed, reference_size: int) -> Validation | None:
    """The held-out samples, if there are any and the settings want their loss."""
    if not settings.validation.every:
        return None
    if not _has_samples(open_reader(settings), settings.validation.split):
        if distributed.rank == 0:
            print(f"no samples in a split `{settings.validation.split}`: no loss of held-out samples is measured", flush=True)
        return None
    return Validation(settings, distributed, reference_size)


class Pictures:
    """Fixed held-out samples, painted with fixed noise at several guidance scales: progress that one can see."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.settings = run.settings.pictures
        self.guidance: tuple[float, ...] = GUIDANCE
        if run.settings.condition_dropout == 0:
            self.guidance = (1.0,)
            print("condition_dropout 0 leaves the null vector untrained: pictures are painted with guidance 1 alone", flush=True)
        reader = open_reader(run.settings)
        if _has_samples(reader, split := run.settings.validation.split):
            reader = open_reader(run.settings, split)
        else:
            shown = run.settings.split
            print(f"{reader.folder}: no samples in a split `{split}`; pictures show samples of `{shown}`", flush=True)
        places, tolerant = spread_places(reader.counts, self.settings.count), run.settings.loader.on_corrupt == "replace"
        self.samples: list[HeldOut] = read_held_out(reader, places, run.settings.seed, leave_out_damaged=tolerant)
        self.sources = [
            given.sample.view if given.sample.view is not None else made
            for given, made in zip(self.samples, reconstruct(run, self.samples), strict=True)
        ]

    def count(self) -> int:
        """How many views `draw` paints."""
        return len(self.samples) * len(self.guidance)

    def draw(self, step: int, ema: EMA | None, work: Progress | None = None) -> Picture:
        """Paint with the averaged weights, where there are any, and write `pictures/step-XXXXXXXX.png`; `work` counts views."""
        if ema:
            with ema.in_place():
                return self.draw(step, None, work)
        references, seeds = [given.sample.reference for given in self.samples], range(len(self.samples))
        columns = [
            paint_held_out(self.run, self.samples, references, seeds, self._how(guidance), progress=work)
            for guidance in self.guidance
        ]
        rows = []
        for number, given in enumerate(self.samples):
            masked = self.sources[number].copy()
            masked[given.mask] = 127
            rows.append([self.sources[number], masked, references[number], *(column[number] for column in columns)])
        headings = ["source", "masked", "reference", *(f"guidance {scale:g}" for scale in self.guidance)]
        picture: Picture = sheet(rows, headings, [given.sample.label_name for given in self.samples])
        folder = self.run.settings.out / "pictures"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"step-{step:08d}.png")
        return picture

    def _how(self, guidance: float) -> SamplingSettings:
        return SamplingSettings(guidance, self.settings.sampling_steps, SCHEDULER)


def _has_samples(reader: ShardReader, split: str) -> bool:
    splits = reader.info.splits
    return split in splits and splits[split].samples > 0
