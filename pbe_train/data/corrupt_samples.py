"""Corrupt samples: the error that names one, and how many a run replaces before it stops (`loader.on_corrupt`)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pbe_core.errors import InputError
from pbe_core.words import number_of

# Keys in the error; the others were printed before.
NAMED = 10


class Replaced(NamedTuple):
    """A sample that could not be read, and gave its slot to another one. Plain strings: it travels with a batch."""

    shard: str
    """Name of its shard."""
    key: str
    """Its key."""
    why: str
    """What is wrong with it."""


class CorruptSample(InputError):
    """One sample, or the whole shard that it lies in, cannot be read. Anything else that is wrong is another `InputError`."""

    def __init__(self, message: str, replaced: Replaced) -> None:
        super().__init__(message)
        self.message = message
        self.replaced = replaced

    def __reduce__(self) -> tuple[type["CorruptSample"], tuple[str, Replaced]]:
        return CorruptSample, (self.message, self.replaced)


class CorruptSamples:
    """The corrupt samples that a run has read, each counted once however many epochs read it.

    A resumed run counts anew.

    Args:
        most: corrupt samples that are allowed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: dict[tuple[str, str], str] = {}

    def add(self, found: Iterable[Sequence[str]]) -> list[str]:
        """Count what was replaced; one line for each sample that is new.

        Args:
            found: (shard, key, why) of each, of all ranks, in any order.

        Raises:
            InputError: there are more than `most`; names the first of them and counts each shard's.
        """
        lines = []
        for shard, key, why in found:
            if (shard, key) not in self.seen:
                self.seen[shard, key] = why
                lines.append(f"replaced: shard {shard}, sample {key}: {why}")
        if len(self.seen) > self.most:
            raise InputError(self._too_many())
        return lines

    def _too_many(self) -> str:
        counts: dict[str, int] = {}
        for shard, _ in self.seen:
            counts[shard] = counts.get(shard, 0) + 1
        shards = ", ".join(f"{shard}.tar ({count})" for shard, count in sorted(counts.items()))
        named = "; ".join(f"{key} of {shard} ({why})" for (shard, key), why in list(self.seen.items())[:NAMED])
        more = f"; and {len(self.seen) - NAMED} more" if len(self.seen) > NAMED else ""
        return (
            f"{number_of(len(self.seen), 'sample')} {'is' if len(self.seen) == 1 else 'are'} damaged, "
            f"more than loader.max_corrupt_samples {self.most}, in {shards}: {named}{more}. "
            "Delete these shards and run the build again, or raise the limit"
        )
