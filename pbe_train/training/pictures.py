"""Pictures during training: fixed held-out samples, painted with fixed noise, so that two steps can be compared."""

from PIL import Image

from pbe_core.images.sheets import Picture, sheet
from pbe_core.progress import Progress
from pbe_train.config import TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.shards import ShardReader
from pbe_train.evaluation.held_out import HeldOut, paint_held_out, read_held_out, reconstruct, spread_places
from pbe_train.model.pipeline import Run, SamplingSettings
from pbe_train.training.ema import MovingAverage


class Pictures:
    """Fixed held-out samples, painted with fixed noise at several guidance scales: progress that one can see."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.settings = run.settings.pictures
        self.guidance = self.settings.guidance
        if run.settings.guidance_dropout == 0 and set(self.guidance) != {1.0}:
            self.guidance = (1.0,)
            print("guidance_dropout 0 leaves the null vector untrained: pictures are painted with guidance 1 alone", flush=True)
        reader = open_split(run.settings, self.settings.split)
        places, tolerant = spread_places(reader.counts, self.settings.count), run.settings.loader.on_corrupt == "replace"
        self.samples: list[HeldOut] = read_held_out(reader, places, run.settings.seed, leave_out_damaged=tolerant)
        self.sources = [
            given.sample.view if given.sample.view is not None else made
            for given, made in zip(self.samples, reconstruct(run, self.samples), strict=True)
        ]

    def count(self) -> int:
        """How many views `draw` paints."""
        return len(self.samples) * len(self.guidance)

    def draw(self, step: int, average: MovingAverage | None, work: Progress | None = None) -> Picture:
        """Paint with the averaged weights, where there are any, and write `pictures/step-XXXXXXXX.png`; `work` counts views."""
        if average:
            with average.in_place():
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
        return SamplingSettings(guidance, self.settings.sampling_steps, self.settings.scheduler)


def open_split(settings: TrainSettings, split: str) -> ShardReader:
    """A split of the dataset, or the training split where it is not there or empty."""
    reader = open_reader(settings)
    splits = reader.info.splits
    if split in splits and splits[split].samples:
        return open_reader(settings, split)
    print(f"{reader.folder}: no samples in a split `{split}`; pictures show samples of `{settings.split}`", flush=True)
    return reader
