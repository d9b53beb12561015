"""Splits for sources that have none of their own."""

from collections.abc import Sequence

import pyarrow as pa

from pbe_core.randomness import hash_column


def assign_splits(photo_ids: Sequence[str], seed: int, share: float) -> list[str]:
    """`validation` for a share of the photos, else `train`.

    A photo's split depends on its id and the seed alone: photos that come later change no other's, and a smaller share of
    validation lies within a larger one.

    Args:
        photo_ids: ASCII; all others get one and the same split.
        seed: of the build.
        share: of photos that become `validation`, 0 to 1.
    """
    if not photo_ids:
        return []
    places = hash_column(pa.array(photo_ids, pa.string()), seed, "split") * 2.0**-64
    return ["validation" if held_out else "train" for held_out in places < share]
