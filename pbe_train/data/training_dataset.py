"""What the model trains on at (step, slot): a pure function of the settings and these two numbers, whoever computes it.

    order ──▶ sample ─┬─ latent ── draw ───────────▶ planes: view latent C
                      ├─ masked, one of K ── draw ─▶         masked-image latent C
                      ├─ its mask ── shrink ───────▶         mask channel 1
                      │                noise ──────▶         noise C
                      └─ reference ── augment, fit ─────▶ reference
                                timestep, drop

A sample that cannot be read stops the run, or is replaced by another one that is as much a function of (seed, step, slot).
So a run has no loader state and no random state: resumed at step k, or cut into other ranks, it goes on exactly as it would have.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pbe_core.errors import InputError
from pbe_core.randomness import generator, name_hash, uniform
from pbe_train.config import TIMESTEPS, TrainSettings
from pbe_train.data.latents import draw_posterior, to_mask_channel
from pbe_train.data.order import BucketOrder, SampleLocation, choose_mask, choose_references, rank_slots
from pbe_train.data.references import Augmentation, check_geometry, prepare_reference
from pbe_train.data.shards import CorruptSample, Replaced, ShardReader, TrainingSample

# Samples drawn for one slot before it is given up: with one sample in ten damaged, once in 10^10 slots.
ATTEMPTS = 10
# Forked workers start in milliseconds and share the dataset's tables with the run. Only Linux forks a process with threads well.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Batch(NamedTuple):
    """A micro-batch, packed into few tensors."""

    planes: Float[Tensor, "batch planes height width"]
    """Stacked: latent of the view (C, scaled), of the masked image (C, scaled), mask channel (1), noise (C)."""
    reference: UInt8[Tensor, "references reference reference 3"]
    """The augmented reference, RGB, 0-255; where a sample is shown several, those of a sample together."""
    timestep: Int64[Tensor, " batch"]
    """Diffusion time, 0..999."""
    dropped: Bool[Tensor, " batch"]
    """Whether the null vector replaces the condition."""


class Loaded(NamedTuple):
    """What a worker hands over: a batch, and which samples gave their slots to others (`loader.on_corrupt: replace`)."""

    batch: Batch
    replaced: Sequence[Replaced]


class TrainingDataset(Dataset[Loaded | InputError]):
    """Maps a list of (step, slot) to the batch of their items.

    Bad input is returned, not raised: a DataLoader would wrap what a worker raises into a page of traceback.

    Args:
        settings: of the run.
        reader: of the split.
        reference_size: side of the encoder's square, px.
        stratified: a step has one diffusion time from each of `global_batch` equal parts of the range, instead of any.
        bucket: the only shape of views to take, if not all (`ShardReader.buckets`).
    """

    def __init__(
        self,
        settings: TrainSettings,
        reader: ShardReader,
        reference_size: int,
        stratified: bool = False,
        bucket: tuple[int, ...] | None = None,
    ) -> None:
        check_geometry(settings.model.reference_geometry, reader.folder, reader.info)
        self.settings = settings
        self.reader = reader
        self.reference_size = reference_size
        self.stratified = stratified
        self.augmentation = Augmentation(preset=settings.augmentation.preset)
        taken = [bucket is None or own == bucket for own in reader.buckets]
        counts = [count if take else 0 for count, take in zip(reader.counts, taken, strict=True)]
        self.order = BucketOrder(counts, settings.loader.window, settings.seed, reader.buckets)

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Loaded | InputError:
        """The batch of these (step, slot) pairs, all of steps that have views of one shape."""
        cells = self.reader.cells(self.order.at(*pairs[0], self.settings.global_batch)[1].shard)
        planes = np.empty((len(pairs), 3 * self.reader.info.vae.latent_channels + 1, *cells), np.float32)
        shown = self.settings.references.per_sample
        references = np.empty((len(pairs), shown, self.reference_size, self.reference_size, 3), np.uint8)
        try:
            made = [self._fill(planes[place], references[place], *pair) for place, pair in enumerate(pairs)]
        except InputError as error:
            return error
        timesteps, dropped, replaced = zip(*made, strict=True)
        batch = Batch(
            torch.from_numpy(planes),
            torch.from_numpy(references).flatten(0, 1),
            torch.tensor(timesteps),
            torch.tensor(dropped, dtype=torch.bool),
        )
        return Loaded(batch, [one for some in replaced for one in some])

    def keys(self, step: int) -> list[str]:
        """Keys of the samples of a step's global batch, by slot."""
        places = (self.order.at(step, slot, self.settings.global_batch)[1] for slot in range(self.settings.global_batch))
        return [self.reader.key(place) for place in places]

    def _fill(
        self,
        planes: Float32[np.ndarray, "planes height width"],
        reference: UInt8[np.ndarray, "shown reference reference 3"],
        step: int,
        slot: int,
    ) -> tuple[int, bool, list[Replaced]]:
        """Put an item into its places in a batch; timestep, whether the condition is dropped, what could not be read."""
        settings, seed = self.settings, self.settings.seed
        epoch, place = self.order.at(step, slot, settings.global_batch)
        sample, replaced = self._read(step, slot, epoch, place)

        vae = self.reader.info.vae
        channels = vae.latent_channels
        latent, masked, mask_channel, noise = np.split(planes, [channels, 2 * channels, 2 * channels + 1])
        draws = torch.Generator().manual_seed(noise_seed(seed, step * settings.global_batch + slot))
        for drawn in (latent, masked, noise):
            torch.from_numpy(drawn).normal_(generator=draws)
        draw_posterior(sample.latent, latent, vae.scaling_factor)
        draw_posterior(sample.masked, masked, vae.scaling_factor)
        mask_channel[:] = to_mask_channel(sample.mask[None], planes.shape[-2:], settings.model.mask_to_latent)[0].numpy()

        names = (seed, "train", step, slot, "augmentation")
        geometry = settings.model.reference_geometry
        for number, seen in enumerate([(sample.reference, sample.outline), *sample.more]):
            own = (*names, number) if number else names
            reference[number] = prepare_reference(self.augmentation, geometry, *seen, self.reference_size, *own)
        timestep = choose_timestep(seed, step, slot, settings.global_batch if self.stratified else None)
        dropped = uniform(seed, "train", step, slot, "dropout") < settings.condition_dropout
        return timestep, dropped, replaced

    def _read(self, step: int, slot: int, epoch: int, place: SampleLocation) -> tuple[TrainingSample, list[Replaced]]:
        """The sample of a slot, or the one that takes its place, and what could not be read before."""
        replaced: list[Replaced] = []
        choose, draw = partial(choose_mask, self.settings.seed, epoch), self.settings.references
        choose_other = partial(choose_references, self.settings.seed, epoch, cross_photo=draw.cross_photo, count=draw.per_sample)
        while True:
            try:
                return self.reader.read_for_training(place, choose, self.augmentation.needs_outlines, choose_other), replaced
            except CorruptSample as error:
                if self.settings.loader.on_corrupt == "stop":
                    raise InputError(f"{error}, or train without it: --loader.on_corrupt replace") from None
                if len(replaced) == ATTEMPTS:
                    raise InputError(
                        f"{error}; {ATTEMPTS} samples that were to replace one another are all damaged, so most of the dataset "
                        "seems to be"
                    ) from None
                replaced.append(error.replaced)
                place = self.order.replacement(step, slot, len(replaced) - 1)


def noise_seed(seed: int, number: int) -> int:
    """The seed of what is drawn for one sample's latents: another one for each of 2^32 samples in a row.

    PyTorch, which draws tens of thousands of normal numbers in a quarter of numpy's time, keeps 32 bits of a seed. Hashes cut
    to that would give one sample in sixty of the published run the noise of another one.

    Args:
        seed: of the run.
        number: of the sample, counted over all steps' global batches from 0.
    """
    # An odd factor makes no two numbers the same, and spreads their bits (Knuth, The Art of Computer Programming 3, section 6.4).
    return (name_hash(seed, "train", "latents", bits=32) + number * 0x9E3779B1) % 2**32


def choose_timestep(seed: int, step: int, slot: int, strata: int | None) -> int:
    """Diffusion time of a slot, uniform in 0..999.

    Args:
        seed: of the run.
        step: counted from 0.
        slot: in the global batch.
        strata: the global batch, each of whose slots then has an equal part of the times of its own, in a random order: every
            step sees all of them, and its loss varies less. Source: Kingma et al., Variational diffusion models (2021), section
            I.1. Null draws each alone.
    """
    draw = uniform(seed, "train", step, slot, "timestep")
    if strata is None:
        return int(draw * TIMESTEPS)
    part = int(generator(seed, "train", step, "strata").permutation(strata)[slot])
    return int((part + draw) * TIMESTEPS / strata)


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


class Batches(Iterator[Batch]):
    """One rank's micro-batches. Workers are started when the first one is asked for, and end with this object."""

    def __init__(self, items: TrainingDataset, sampler: SlotSampler, start_method: str = START_METHOD) -> None:
        self.items = items
        self.sampler = sampler
        self.start_method = start_method
        self.workers: list[int] = []
        """Their process ids, in the order in which they take turns."""
        self._loaded: Iterator[Loaded | InputError] | None = None
        self._replaced: list[Replaced] = []
        self._taken = 0

    def __next__(self) -> Batch:
        """The next micro-batch. Raises InputError where it cannot be made."""
        if self._loaded is None:
            self._loaded = self._start()
        loaded = next(self._loaded)
        self._taken += 1
        if isinstance(loaded, InputError):
            self._loaded = iter(())  # The workers end, and nothing more comes.
            raise loaded
        self._replaced += loaded.replaced
        return loaded.batch

    def describe_next(self) -> str:
        """Which process makes the next micro-batch, and of which samples, in words."""
        sampler, taken = self.sampler, self._taken
        if taken >= len(sampler):
            return "nothing more"
        step, slots = sampler.first_step + taken // len(sampler.slots), sampler.slots[taken % len(sampler.slots)]
        keys = self.items.keys(step)
        shown = ", ".join(keys[slot] for slot in slots[:8]) + (f" and {len(slots) - 8} more" if len(slots) > 8 else "")
        number = taken % max(1, len(self.workers))
        who = f"worker {number} (process {self.workers[number]})" if self.workers else "this process"
        return f"{who}, which makes the samples {shown}"

    def take_replaced(self) -> list[Replaced]:
        """The samples that gave their slots to others since this was last asked; one may be in it several times."""
        replaced, self._replaced = self._replaced, []
        return replaced

    def _start(self) -> Iterator[Loaded | InputError]:
        # Before workers are forked, not in them: a fork of OpenCV's running thread pool waits for ever when it is resized.
        cv2.setNumThreads(1)
        workers = self.items.settings.loader.workers
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            self.items,
            sampler=self.sampler,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_set_up_worker,
            multiprocessing_context=self.start_method if workers else None,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
        if workers:
            atexit.register(kill_workers)  # First: where the second of them cannot be started, the first one is there.
        loaded = iter(loader)
        # By their names, which count: the ids of processes start again from small ones.
        started = sorted(set(multiprocessing.active_children()) - others, key=lambda child: (len(child.name), child.name))
        self.workers = [child.pid or 0 for child in started]
        return loaded


def load_batches(items: TrainingDataset, first_step: int, ranks: int, rank: int, start_method: str = START_METHOD) -> Batches:
    """One rank's micro-batches from `first_step` to the last step of the settings.

    Args:
        items: of the run.
        first_step: steps done before.
        ranks: how many there are.
        rank: which one this is.
        start_method: of worker processes: `fork`, `spawn` or `forkserver`.

    Raises:
        InputError: the global batch cannot be cut evenly (at once), or a shard is missing or damaged (while iterating).
    """
    settings = items.settings
    try:
        slots = rank_slots(settings.global_batch, settings.accumulation, ranks, rank)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Batches(items, SlotSampler(first_step, settings.steps, slots), start_method)


def kill_workers() -> None:
    """Kill the loader's processes, which no other signal ends: at its exit Python would wait for one that hangs, without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises where one is killed.
    for child in multiprocessing.active_children():
        child.kill()


def _set_up_worker(worker: int) -> None:
    """Leave stopping to the parent, and end with it; keep OpenCV to one thread in a worker that was not forked."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    # Batch systems, torchrun and a terminal's Ctrl-C signal the whole process group. A worker that ended would end the run within
    # its step, unsaved; it goes when its parent has done with it, or is gone.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


def _end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that ended.

    PyTorch compares the id of a worker's parent every few seconds. A fork server's worker has the server for a parent, which
    stays as long as it has workers. So this waits for the end of a pipe that the asking process holds. A forked worker also holds
    the pipes of the workers before it, so they end one after the other.
    """
    asked_by = multiprocessing.parent_process()
    if asked_by:
        asked_by.join()
        os._exit(1)


class DevicePrefetcher(Iterator[Batch]):
    """The batches of an iterator, on the device; on a GPU the next one is copied on a stream of its own while a step computes."""

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: Batch | None = None
        self._seconds = 0.0

    def __next__(self) -> Batch:
        """The next batch."""
        start = time.monotonic()
        batch = self._take()
        self._seconds += time.monotonic() - start
        return batch

    def take_seconds(self) -> float:
        """The seconds that the caller waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _take(self) -> Batch:
        if not self._stream:
            return Batch(*(tensor.to(self.device) for tensor in next(self.batches)))
        batch = self._next or self._copied()
        if batch is None:
            raise StopIteration
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for tensor in batch:  # Its memory must not be given away while the step still reads it.
            tensor.record_stream(torch.cuda.current_stream(self.device))
        self._next = self._copied()
        return batch

    def _copied(self) -> Batch | None:
        host = next(self.batches, None)
        if host is None:
            return None
        with torch.cuda.stream(self._stream):
            return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in host))
