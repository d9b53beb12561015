"""Held-out samples during training: their loss, and pictures of them. Both are fixed, so that steps and runs can be compared."""

from collections import Counter
from contextlib import nullcontext

import torch
from PIL import Image

from pbe_core.images.sheets import Picture, sheet
from pbe_core.progress import Progress
from pbe_train.config import TRAIN_SPLIT, VALIDATION_SPLIT, TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import Batch, TrainingDataset
from pbe_train.evaluation.held_out import HeldOut, paint_held_out, read_held_out, reconstruct, spread_places
from pbe_train.model.diffusion import Denoiser, noise_losses
from pbe_train.model.pipeline import Run, SamplingSettings
from pbe_train.model.sampling import GUIDANCE, STEPS
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.distributed import Distributed
from pbe_train.training.optimizer import EMA

# Samples whose loss is measured, or all that the split has.
SAMPLES = 256
# Of the pictures: how many samples, guidance scales, one column each (1 = no guidance), and denoising steps.
PAINTED = 6
SCALES = (1.0, GUIDANCE)
SAMPLING_STEPS = STEPS


class Validation:
    """Fixed samples of the validation split, without augmentation and with their condition; each rank holds its share of them.

    Sample, mask, timestep and noise are drawn as the training's are, for step 0 of a run with a global batch of all of them: they
    are the same at every step, on any number of ranks. Where views have several shapes, each has its share of the samples.
    """

    def __init__(self, settings: TrainSettings, distributed: Distributed, reference_size: int) -> None:
        """Read the samples. Raises InputError where the split is not there, or damaged."""
        reader = open_reader(settings, VALIDATION_SPLIT)
        none = settings.augmentation.model_copy(update={"preset": "none"})
        size = settings.global_batch // (distributed.world_size * settings.accumulation)
        self.samples = 0
        self.batches: list[Batch] = []
        for bucket, count in share_out(reader, SAMPLES).items():
            fixed = settings.model_copy(update={"global_batch": count, "condition_dropout": 0.0, "augmentation": none})
            items = TrainingDataset(fixed, reader, reference_size, stratified=True, bucket=bucket)
            slots = range(count)[distributed.rank :: distributed.world_size]
            self.samples += count
            for start in range(0, len(slots), size):
                loaded = items[[(0, slot) for slot in slots[start : start + size]]]
                if isinstance(loaded, Exception):
                    raise loaded
                self.batches.append(loaded.batch)
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
        for batch in self.batches:
            moved = Batch(*(tensor.to(distributed.device) for tensor in batch))
            with distributed.autocast(precision):
                total += noise_losses(model, self.schedule, moved).double().sum()
            if work:
                work.update()
        return float(distributed.sum(total)) / self.samples


def share_out(reader: ShardReader, samples: int) -> dict[tuple[int, ...], int]:
    """How many samples of each shape of views are measured, so that all have their share of `samples`, and one at least."""
    there: Counter[tuple[int, ...]] = Counter()
    for bucket, count in zip(reader.buckets, reader.counts, strict=True):
        there[bucket] += count
    of_all = min(1.0, samples / there.total())
    return {bucket: max(1, round(count * of_all)) for bucket, count in sorted(there.items()) if count}


def make_validation(
    settings: TrainSettings, reader: ShardReader, distributed: Distributed, reference_size: int
) -> Validation | None:
    """The held-out samples, if the dataset of `reader` has any and the settings want their loss."""
    if not settings.validation.every:
        return None
    if not has_validation(reader):
        if distributed.rank == 0:
            print(f"no samples in a split `{VALIDATION_SPLIT}`: no loss of held-out samples is measured", flush=True)
        return None
    return Validation(settings, distributed, reference_size)


def has_validation(reader: ShardReader) -> bool:
    """Whether the reader's dataset holds out samples."""
    splits = reader.info.splits
    return VALIDATION_SPLIT in splits and splits[VALIDATION_SPLIT].samples > 0


class Pictures:
    """Fixed held-out samples, painted with fixed noise at several guidance scales: progress that one can see."""

    def __init__(self, run: Run, reader: ShardReader) -> None:
        """Read the samples of the dataset of `reader`: held-out ones, where there are any."""
        self.run = run
        self.guidance: tuple[float, ...] = SCALES
        if run.settings.condition_dropout == 0:
            self.guidance = (1.0,)
            print("condition_dropout 0 leaves the null vector untrained: pictures are painted with guidance 1 alone", flush=True)
        if has_validation(reader):
            reader = open_reader(run.settings, VALIDATION_SPLIT)
        else:
            shown = f"no samples in a split `{VALIDATION_SPLIT}`; pictures show samples of `{TRAIN_SPLIT}`"
            print(f"{reader.folder}: {shown}", flush=True)
        places, tolerant = spread_places(reader.counts, PAINTED), run.settings.loader.on_corrupt == "replace"
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
        references, seeds = [given.sample.reference for given in self.samples], range(len(self.samples))
        with ema.in_place() if ema else nullcontext():
            columns = [
                paint_held_out(
                    self.run,
                    self.samples,
                    references,
                    seeds,
                    SamplingSettings(guidance, SAMPLING_STEPS),
                    progress=work,
                )
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
