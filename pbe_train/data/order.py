"""Which sample stands where: the order of an epoch as a pure function of (seed, epoch, index); and which of its masks is used.

    shards     0 1 2 3 4 5 6 7        all shards, shuffled:                3 6 0 7 2 5 1 4
    windows   [3 6 0] [7 2 5] [1 4]   `window` neighbours of that order;   the samples of a window are shuffled together

Slot `s` of step `t` takes position `t * global_batch + s` of the endless row of epochs; so a step may straddle two epochs, and
no sample is dropped at an epoch's end.

A sample is one view of an object with its K masks. Where a dataset has several views of an object, each is a sample of its own,
so an epoch shows them all; of the masks it shows one (`choose_mask`). A sample that cannot be read gives its slot to another one
(`SampleOrder.replacement`); that is the one case in which an epoch lacks a sample.

Where views have several shapes (`BucketOrder`), a step has samples of one bucket: each bucket has an endless row of epochs of its
own, and steps go to the buckets in turn, as often as each has samples.

    buckets    a: 600, b: 300, c: 100 samples      steps   a b a a c a b a b a | a b a a c ...

Invariants: every epoch holds each sample exactly once, whatever `window` is. The order does not depend on the number of ranks or
workers. Memory is one permutation of the shards and one of a window's samples. Trade-off: two samples of one shard never lie
further apart than a window, so `window` times the samples of a shard is the mixing length.
"""

from collections.abc import Sequence
from fractions import Fraction
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
        names: of a bucket, so that its order is none of another's; none for a dataset that is all one.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int, names: tuple[int, ...] = ()) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.window = window
        self.seed = seed
        self.names = names
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
            shards = generator(self.seed, "train", "shards", *self.names, epoch).permutation(len(self.counts)).astype(np.int64)
            sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
            self._epoch = epoch, shards, np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        return self._epoch[1], self._epoch[2]

    def _shuffle_window(self, epoch: int, number: int, size: int) -> Int64[np.ndarray, " samples"]:
        if self._window is None or self._window[0] != (epoch, number):
            shuffled = generator(self.seed, "train", "window", *self.names, epoch, number).permutation(size).astype(np.int64)
            self._window = (epoch, number), shuffled
        return self._window[1]


class BucketOrder:
    """The global order of samples of several shapes: every step takes its whole global batch from one bucket.

    The k-th step of a bucket of n samples takes positions k * global_batch .. (k + 1) * global_batch - 1 of the bucket's own
    endless row of epochs. So each of its samples comes once in each of its epochs, and what is left at an epoch's end is not
    dropped, but shares a step with the next epoch's first samples. A bucket of fewer samples than the global batch repeats some
    in one step.

    Which bucket a step has: its k-th step has the time (k + 1/2) / n, and steps are in the order of their times (Webster's method
    of sharing out seats). After any number of steps each bucket has had its share of them, n by all samples, to about one step.
    With one bucket this is `SampleOrder`.

    Args:
        counts: samples of each shard.
        window: as in `SampleOrder`.
        seed: likewise.
        buckets: of each shard what its views have in common; none is needed where all are alike.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int, buckets: Sequence[tuple[int, ...]]) -> None:
        numbers: dict[tuple[int, ...], list[int]] = {}
        for shard, bucket in enumerate(buckets):
            numbers.setdefault(bucket, []).append(shard)
        # By name, so that it does not matter which shard is the first.
        self.buckets = sorted(bucket for bucket, shards in numbers.items() if any(counts[shard] for shard in shards))
        self.samples = int(sum(counts))
        self._shards = [numbers[bucket] for bucket in self.buckets]
        self._orders = [
            SampleOrder([counts[shard] for shard in shards], window, seed, bucket)
            for bucket, shards in zip(self.buckets, self._shards, strict=True)
        ]
        self._turn: tuple[int, tuple[int, int]] | None = None

    def bucket(self, step: int) -> tuple[int, ...]:
        """The bucket that a step's samples are of."""
        return self.buckets[self._turn_of(step)[0]]

    def at(self, step: int, slot: int, global_batch: int) -> tuple[int, SampleLocation]:
        """Epoch of the step's bucket, and sample, of a slot in a step's global batch."""
        number, turn = self._turn_of(step)
        epoch, place = self._orders[number].at(turn, slot, global_batch)
        return epoch, self._global(number, place)

    def replacement(self, step: int, slot: int, attempt: int) -> SampleLocation:
        """As of `SampleOrder`, drawn from the step's bucket."""
        number, _ = self._turn_of(step)
        return self._global(number, self._orders[number].replacement(step, slot, attempt))

    def _global(self, number: int, place: SampleLocation) -> SampleLocation:
        return SampleLocation(self._shards[number][place.shard], place.position)

    def _turn_of(self, step: int) -> tuple[int, int]:
        """Number of a step's bucket, and how many of its steps there were before. Only the last step asked for is kept."""
        if self._turn is None or self._turn[0] != step:
            self._turn = step, _turn_of(step, [order.samples for order in self._orders])
        return self._turn[1]


def _turn_of(step: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Which of some buckets with so many samples has a step, and how many steps it had before; exact in whole numbers."""
    # Up to this time no more than `step` steps were: each bucket's share, rounded, is at most a half above it.
    time = Fraction(max(0, step - len(sizes)), sum(sizes))
    had = [(2 * size * time + 1) // 2 for size in sizes]
    while True:
        number = min(range(len(sizes)), key=lambda bucket: (Fraction(2 * had[bucket] + 1, sizes[bucket]), bucket))
        if sum(had) == step:
            return number, had[number]
        had[number] += 1


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
