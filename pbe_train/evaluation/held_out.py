"""Held-out samples: what pictures, demo and evaluation paint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from pbe_core.buckets import by_shape
from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.images.crop import Window, paste
from pbe_core.progress import Progress
from pbe_core.randomness import generator
from pbe_train.data.latents import posterior_mean
from pbe_train.data.order import SampleLocation
from pbe_train.data.references import check_geometry
from pbe_train.data.shards import CorruptSample, ShardReader, StoredSample
from pbe_train.model.pipeline import Run, SamplingSettings


@dataclass(frozen=True)
class HeldOut:
    """A sample with one of its masks."""

    sample: StoredSample
    kind: int

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height of the view, px."""
        return self.mask.shape[1], self.mask.shape[0]

    @property
    def mask(self) -> Bool[np.ndarray, "height width"]:
        """The edit region, True = repaint."""
        mask: Bool[np.ndarray, "height width"] = self.sample.masks[self.kind]
        return mask


def check_fits(run: Run, reader: ShardReader) -> None:
    """Refuse a dataset whose latents, views or references are not of the kind that the run was trained on.

    Raises:
        InputError: another VAE or another view size, or references without the aspect that the run keeps.
    """
    check_geometry(run.settings.model.reference_geometry, reader.folder, reader.info)
    info, identity = reader.info, run.identity
    if info.vae.sha256 != identity.vae_sha256:
        raise InputError(
            f"{reader.folder / 'dataset.json'}: the latents were made by {info.vae.source} (weights {info.vae.sha256[:12]}), the "
            f"run was trained with {run.settings.model.vae} (weights {identity.vae_sha256[:12]}); build the dataset with that VAE"
        )
    if (info.view_size, info.buckets) != (identity.view_size, identity.buckets):
        ours, theirs = (_shapes(each.view_size, each.buckets) for each in (info, identity))
        raise InputError(
            f"{reader.folder / 'dataset.json'}: views of {ours}, the run was trained at {theirs}; "
            "build the dataset with that size"
        )


def _shapes(size: int, buckets: Sequence[tuple[int, int]] | None) -> str:
    return ", ".join(f"{width}x{height}" for width, height in buckets or ()) + " px" if buckets else f"{size} px"


def read_held_out(
    reader: ShardReader, places: Sequence[SampleLocation], seed: int, leave_out_damaged: bool = False
) -> list[HeldOut]:
    """Read samples and draw one mask of each by its name.

    Raises:
        CorruptSample: one of them; with `leave_out_damaged`, that is told on stderr, and raised where no other is left.
    """
    samples = []
    for place in places:
        try:
            samples.append(reader.read(place))
        except CorruptSample as error:
            if not leave_out_damaged or (place == places[-1] and not samples):
                raise
            print(f"left out of the held-out samples: {error}", file=sys.stderr)
    return [draw_mask(one, seed) for one in samples]


def draw_mask(sample: StoredSample, seed: int) -> HeldOut:
    """A sample with one of its masks, drawn by its key."""
    return HeldOut(sample, int(generator(seed, "held out", sample.key).integers(len(sample.masks))))


def spread_places(counts: Sequence[int], number: int) -> list[SampleLocation]:
    """Up to `number` places spread evenly over the shards of a split."""
    ends = np.cumsum(counts)
    chosen = np.linspace(0, ends[-1], min(number, int(ends[-1])), endpoint=False).astype(int)
    shards = np.searchsorted(ends, chosen, side="right")
    return [
        SampleLocation(int(shard), int(index - ends[shard] + counts[shard])) for shard, index in zip(shards, chosen, strict=True)
    ]


def find_other(samples: Sequence[HeldOut], number: int) -> HeldOut:
    """The next sample of another label; the next one at all where there is no other label."""
    following = [samples[(number + offset) % len(samples)] for offset in range(1, len(samples) + 1)]
    return next((one for one in following if one.sample.label != samples[number].sample.label), following[0])


def reconstruct(run: Run, samples: Sequence[HeldOut]) -> list[UInt8[np.ndarray, "height width 3"]]:
    """The views as the VAE gives them back: the best that any painter in its latents can do."""
    decoded: dict[int, AnyPhoto] = {}
    for places in by_shape([one.shape for one in samples]):
        posteriors = np.stack([samples[place].sample.latent for place in places])
        latents = posterior_mean(posteriors, run.identity.latent_channels, run.identity.scaling_factor)
        decoded.update(zip(places, run.decode(latents), strict=True))
    return [decoded[place] for place in range(len(samples))]


def paint_held_out(
    run: Run,
    samples: Sequence[HeldOut],
    references: Sequence[AnyPhoto],
    seeds: Sequence[int],
    how: SamplingSettings,
    *,
    batch: int = 16,
    blend: bool = True,
    progress: Progress | None = None,
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Paint a reference into each sample's region.

    Args:
        run: a loaded run.
        samples: what to paint into.
        references: RGB, 0-255, any sizes; one per sample.
        seeds: one per sample.
        how: guidance, steps, scheduler.
        batch: samples painted at once.
        blend: where the view itself was kept, all around the region is its own; otherwise every px is the model's.
        progress: counts views, from the first step of the first ones on.
    """
    progress = progress or Progress("painting")
    painted: dict[int, AnyPhoto] = {}
    groups = by_shape([one.shape for one in samples])
    for part in (places[start : start + batch] for places in groups for start in range(0, len(places), batch)):
        shown = [samples[place] for place in part]
        masked = np.stack([one.sample.masked[one.kind] for one in shown])
        masks = np.stack([one.mask for one in shown])
        latents = posterior_mean(masked, run.identity.latent_channels, run.identity.scaling_factor)
        count = len(masks)

        def show(step: int, of: int, _: object, count: int = count) -> None:
            progress.partly(count * step / of)

        views = run.paint(latents, masks, [references[place] for place in part], [seeds[place] for place in part], how, show)
        progress.partly(0)
        progress.update(count)
        for place, one, view in zip(part, shown, views, strict=True):
            kept = one.sample.view if blend else None
            painted[place] = view if kept is None else paste(kept, view, one.mask, Window(0, 0, *one.shape))
    return [painted[place] for place in range(len(samples))]
