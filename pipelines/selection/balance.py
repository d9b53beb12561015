"""The cap per class: how many objects each class may keep, and which ones, without holding the objects.

    objects ──count──▶ quota of each class ──histogram of priorities──▶ the bin in which the quota ends ──look there──▶ limit

Each object has a priority, a hash of its name; a class keeps those of the smallest. So the choice depends on names alone, and
what a smaller cap keeps, a larger one keeps too.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64, UInt64

# Numbers in the histogram, over all classes: 32 MB.
_CELLS = 1 << 22


def quotas(counts: Int64[np.ndarray, "..."], cap: int, smoothing: float) -> Int64[np.ndarray, "..."]:
    """Objects that each class may keep: all n up to the cap, then cap * (n / cap) ** smoothing, rounded down.

    Source: exponential smoothing of language frequencies in sampling (Conneau et al. 2020, section 3.1), counted from the cap.
    """
    beyond = cap * (np.maximum(counts, cap) / cap) ** smoothing * (1 + 1e-9)  # What is whole but for rounding stays whole.
    allowed: np.ndarray = np.minimum(counts, np.floor(beyond).astype(np.int64))
    return allowed


class Balance:
    """Finds the limit of each group (a class in a split): `count` all objects, `narrow` over them once more, then `keeps`."""

    def __init__(self, groups: int) -> None:
        self.bits = max(0, (_CELLS // max(1, groups)).bit_length() - 1)
        self.histogram = np.zeros((groups, 1 << self.bits), np.int64)

    def count(self, group: Int64[np.ndarray, " objects"], priority: UInt64[np.ndarray, " objects"]) -> None:
        """Take objects into account."""
        cells = group.astype(np.int64) << self.bits | self._bin(priority)
        self.histogram += np.bincount(cells, minlength=self.histogram.size).reshape(self.histogram.shape)

    def limits(
        self, cap: int, smoothing: float, again: Iterable[tuple[Int64[np.ndarray, " objects"], UInt64[np.ndarray, " objects"]]]
    ) -> UInt64[np.ndarray, " groups"]:
        """The largest priority that each group keeps; the largest number there is where it keeps all, 0 where it has none.

        Args:
            cap: objects of a group that are always allowed.
            smoothing: how far larger groups may go beyond it.
            again: the same objects as were counted: (group, priority) in parts.
        """
        counts = self.histogram.sum(axis=1)
        allowed = quotas(counts, cap, smoothing)
        cumulated = self.histogram.cumsum(axis=1)
        cut = counts > allowed
        # The bin in which the quota is reached, and how many of it are still allowed.
        last = (cumulated < allowed[:, None]).sum(axis=1)
        before = np.where(last > 0, np.take_along_axis(cumulated, np.maximum(last - 1, 0)[:, None], axis=1)[:, 0], 0)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for group, priority in again:
            inside = cut[group] & (self._bin(priority) == last[group])
            found.append((group[inside], priority[inside]))
        limits = np.full(len(counts), np.iinfo(np.uint64).max, np.uint64)
        if found:
            groups, priorities = (np.concatenate(parts) for parts in zip(*found, strict=True))
            order = np.lexsort((priorities, groups))
            groups, priorities = groups[order], priorities[order]
            starts = np.searchsorted(groups, np.arange(len(counts)))
            wanted = np.flatnonzero(cut)
            limits[wanted] = priorities[starts[wanted] + (allowed - before)[wanted] - 1]
        return limits

    def _bin(self, priority: UInt64[np.ndarray, " objects"]) -> Int64[np.ndarray, " objects"]:
        if not self.bits:
            return np.zeros(len(priority), np.int64)
        return (priority >> np.uint64(64 - self.bits)).astype(np.int64)


def keeps(
    limits: UInt64[np.ndarray, " groups"], group: Int64[np.ndarray, " objects"], priority: UInt64[np.ndarray, " objects"]
) -> Bool[np.ndarray, " objects"]:
    """Whether each object stays."""
    kept: np.ndarray = priority <= limits[group]
    return kept
