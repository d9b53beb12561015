"""Which classes a build takes, and how many objects of each: `include_labels`, `exclude_labels`, `max_per_class`.

Classes go by name or id, each with what lies below it in the hierarchy.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from pbe_core.errors import InputError
from pipelines.annotations.source import Source
from pipelines.config import SelectionSettings

# Numbers in the histogram, over all classes: 32 MB.
_CELLS = 1 << 22


@dataclass(frozen=True)
class ClassChoice:
    """For each word of a list of labels: whether the source lists it, and whether the settings include it."""

    known: Bool[np.ndarray, " labels"]
    chosen: Bool[np.ndarray, " labels"]


def choose_classes(labels: Sequence[str], source: Source, settings: SelectionSettings) -> ClassChoice:
    """Whether each label is known and chosen.

    Args:
        labels: class ids as they stand in the boxes.
        source: for names and hierarchy.
        settings: `include_labels` and `exclude_labels`.

    Raises:
        InputError: a name in the settings is no class of the source, or of several.
    """
    included = below(settings.include_labels, source, "include_labels", labels)
    excluded = below(settings.exclude_labels, source, "exclude_labels", labels)
    known = [not source.class_names or label in source.class_names for label in labels]
    chosen = [(not settings.include_labels or label in included) and label not in excluded for label in labels]
    return ClassChoice(np.array(known, bool), np.array(chosen, bool))


def class_notes(labels: Sequence[str], source: Source, settings: SelectionSettings) -> Iterator[str]:
    """What a user of Open Images may not expect of `include_labels` and `exclude_labels`: classes without those below them.

    Args:
        labels: class ids as they stand in the boxes.
        source: for names and hierarchy.
        settings: the two lists; `choose_classes` accepts all their words.
    """
    for key, words in (("include_labels", settings.include_labels), ("exclude_labels", settings.exclude_labels)):
        if not words:
            continue
        if not source.subclasses:
            yield (
                f"selection.{key} means {', '.join(words)} alone, and nothing below: no class hierarchy is read "
                f"(bbox_labels_600_hierarchy.json belongs beside the annotations; docs/selection.md#files-of-open-images)"
            )
            continue
        nodes = {*source.subclasses, *(child for children in source.subclasses.values() for child in children)}
        outside = [word for word in words if _class_id(word, source.class_names, {*nodes, *labels}, key) not in nodes]
        if outside:
            yield f"selection.{key}: {', '.join(outside)}: not in the class hierarchy, so nothing is below"


def below(wanted: Iterable[str], source: Source, key: str, present: Sequence[str] = ()) -> set[str]:
    """The ids of the wanted classes and of all classes below them in the hierarchy.

    Raises:
        InputError: a name that is no class of the source, or that several classes bear.
    """
    stack = [_class_id(word, source.class_names, {*source.subclasses, *present}, key) for word in wanted]
    found: set[str] = set()
    while stack:
        label = stack.pop()
        if label not in found:
            found.add(label)
            stack += source.subclasses.get(label, ())
    return found


def _class_id(word: str, names: Mapping[str, str], others: set[str], key: str) -> str:
    if word in names or word in others:
        return word
    found = [label for label, name in names.items() if name.casefold() == word.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"selection.{key}: several classes are called {word!r}: {', '.join(found)}; give the id of one")
    close = difflib.get_close_matches(word.casefold(), [name.casefold() for name in names.values()], n=3)
    meant = sorted({name for name in names.values() if name.casefold() in close})
    hint = f"did you mean {', '.join(meant)}?" if meant else "give a class's name or id as the source's class list has it"
    raise InputError(f"selection.{key}: the source has no class {word!r}; {hint}")


def quotas(counts: Int64[np.ndarray, "..."], cap: int, smoothing: float) -> Int64[np.ndarray, "..."]:
    """Objects that each class may keep: all n up to the cap, then cap * (n / cap) ** smoothing, rounded down.

    Source: exponential smoothing of language frequencies in sampling (Conneau et al. 2020, section 3.1), counted from the cap.
    """
    beyond = cap * (np.maximum(counts, cap) / cap) ** smoothing * (1 + 1e-9)  # What is whole but for rounding stays whole.
    allowed: np.ndarray = np.minimum(counts, np.floor(beyond).astype(np.int64))
    return allowed


class ClassQuota:
    """How many objects each class of each split keeps, and which ones, without holding the objects: `count` all, then `limits`.

    objects ──count──▶ quota of each class ──histogram of priorities──▶ the bin in which the quota ends ──look there──▶ limit

    Each object has a priority, a hash of its name; a class keeps those of the smallest. So the choice depends on names alone, and
    what a smaller cap keeps, a larger one keeps too.
    """

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
