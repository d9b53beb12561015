"""Which sample stands where: the order of an epoch as a pure function of (seed, epoch, index); and which of its masks is used.

    shards     0 1 2 3 4 5 6 7        all shards, shuffled:                3 6 0 7 2 5 1 4
    windows   [3 6 0] [7 2 5] [1 4]   `window` neighbours of that order;   the samples of a window are shuffled together

Slot `s` of step `t` takes position `t * global_batch + s` of the endless row of epochs; so a step may straddle two epochs, and
no sample is dropped at an epoch's end.

A sample is one view of an object with its K masks. Where a dataset has several views of an object, each is a sample of its own,
so an epoch shows them all; of the masks it shows one (`choose_mask`). A sample that cannot be read gives its slot to another one
(`SampleOrder.replacement`); that is the one case in which an epoch lacks a sample.

Invariants: every epoch holds each sample exactly once, whatever `window` is. The order does not depend on the number of ranks or
workers. Memory is one permutation of the shards and one of a window's samples. Trade-off: two samples of one shard never lie
further apart than a window, so `window` times the samples of a shard is the mixing length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pbe_core.randomness import generator, uniform
from pbe_core.words import number_of


class SampleLocation(NamedTuple):
    """Where a sample lies: number of the shard in its split, and position in the shard."""

    shard: int
    position: int


class SampleOrder:
    """The global order of samples.

    Args:
        counts: samples of each shard.
        window: shards whose samples are shuffled together.
        seed: the order is a pure function of it.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.window = window
        self.seed = seed
        self.samples = int(self.counts.sum())
        self._epoch: tuple[int, Int64[np.ndarray, " shards"], Int64[np.ndarray, " windows"]] | None = None
        self._window: tuple[tuple[int, int], Int64[np.ndarray, " samples"]] | None = None

    def at(self, step: int, slot: int, global_batch: int) -> tuple[int, SampleLocation]:
        """Epoch and sample of a slot in a step's global batch."""
        epoch, index = divmod(step * global_batch + slot, self.samples)
        return epoch, self.locate(epoch, index)

    def locate(self, epoch: int, index: int) -> SampleLocation:
        """The sample at `index` (0 <= index < samples) of an epoch."""
        shards, starts = self._shuffle_shards(epoch)
        number = int(np.searchsorted(starts, index, side="right")) - 1
        members = shards[number * self.window : (number + 1) * self.window]
        ends = np.cumsum(self.counts[members])
        place = int(self._shuffle_window(epoch, number, int(ends[-1]))[index - starts[number]])
        member = int(np.searchsorted(ends, place, side="right"))
        return SampleLocation(int(members[member]), place - int(ends[member] - self.counts[members[member]]))

    def replacement(self, step: int, slot: int, attempt: int) -> SampleLocation:
        """The sample that takes a slot whose own cannot be read, drawn from the whole split; `attempt` counts from 0.

        A function of seed, step and slot, never of what was found damaged before, so that a resumed run draws the same one.
        """
        number = int(generator(self.seed, "train", step, slot, "replacement", attempt).integers(self.samples))
        shard = int(np.searchsorted(np.cumsum(self.counts), number, side="right"))
        return SampleLocation(shard, number - int(self.counts[:shard].sum()))

    def _shuffle_shards(self, epoch: int) -> tuple[Int64[np.ndarray, " shards"], Int64[np.ndarray, " windows"]]:
        """The epoch's order of shards, and the index at which each window starts. Only the last epoch asked for is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = generator(self.seed, "train", "shards", epoch).permutation(len(self.counts)).astype(np.int64)
            sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
            self._epoch = epoch, shards, np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        return self._epoch[1], self._epoch[2]

    def _shuffle_window(self, epoch: int, number: int, size: int) -> Int64[np.ndarray, " samples"]:
        if self._window is None or self._window[0] != (epoch, number):
            shuffled = generator(self.seed, "train", "window", epoch, number).permutation(size).astype(np.int64)
            self._window = (epoch, number), shuffled
        return self._window[1]


def choose_mask(seed: int, epoch: int, key: str, masks: int) -> int:
    """Which of a sample's K masks, 0..K-1, an epoch uses: uniform, and drawn anew for each epoch and each key."""
    return int(generator(seed, "train", "mask", epoch, key).integers(masks))


def choose_references(seed: int, epoch: int, key: str, others: int, cross_photo: float, count: int) -> tuple[int, ...]:
    """Which references an epoch shows of a sample: 0 is its own crop, n is that of ref_n.jpg, from another photo.

    Args:
        seed: of the run.
        epoch: counted from 0.
        key: of the sample.
        others: references from other photos that it has.
        cross_photo: share of samples that are shown these.
        count: how many at once; own crops alone are all the same one.
    """
    if not others or uniform(seed, "train", "cross photo", epoch, key) >= cross_photo:
        return (0,) * count
    order = generator(seed, "train", "references", epoch, key).permutation(others)
    return tuple(int(order[place % others]) + 1 for place in range(count))


def rank_slots(global_batch: int, accumulation: int, ranks: int, rank: int) -> list[list[int]]:
    """The slots of a step's global batch that one rank works on, one list per micro-batch.

    Ranks take equal, contiguous slices, so that a step means the same on any number of ranks.

    Raises:
        ValueError: the global batch cannot be cut into `ranks * accumulation` equal parts.
    """
    size, rest = divmod(global_batch, ranks * accumulation)
    if rest or not size:
        raise ValueError(
            f"global_batch {global_batch} cannot be cut evenly into "
            f"{number_of(ranks, 'rank')} x {number_of(accumulation, 'micro-batch', 'micro-batches')} (accumulation)"
        )
    first = rank * size * accumulation
    return [list(range(first + part * size, first + (part + 1) * size)) for part in range(accumulation)]
