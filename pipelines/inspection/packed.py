"""What a finished dataset's own shards hold, for the report: no estimate, and nothing that was planned and failed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from pbe_core.dataset_reader import take_rows
from pbe_core.errors import InputError
from pbe_core.randomness import hash_column
from pbe_core.sample_codec import decode_masks
from pipelines.dataset.counts import chosen_places, read_batches
from schemas.sample import SampleRecord


def packed_objects(folder: Path) -> UInt64[np.ndarray, " objects"]:
    """Hashes (`hash_column`) of the ids of all objects that have a sample, sorted. Holds 8 bytes for each sample.

    Raises:
        InputError: the index is not there or damaged.
    """
    batches = read_batches(folder / "index.parquet", ["object_id"])
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *(hash_column(batch.column(0)) for batch in batches)]))


def packed_mask_shares(folder: Path, count: int, seed: int) -> dict[str, list[float]] | None:
    """Shares of the view's area that objects' boxes and masks cover, of a seeded sample of `count` samples.

    Returns:
        `object`, and each kind of mask: shares, 0 to 1. Nothing where shards are not in this folder, as of a build into a bucket.

    Raises:
        InputError: the index or a sample is damaged.
    """
    shares: dict[str, list[float]] = {"object": [], "box": [], "bessel": []}
    try:
        for record, covered in _read_some(folder, count, seed):
            left, top, right, bottom = record.box_in_view
            shares["object"].append((right - left) * (bottom - top) / covered[1] ** 2)
            for kind, share in zip(record.mask_kinds, covered[0], strict=True):
                shares[kind].append(share)
    except FileNotFoundError:
        return None
    return shares


def _read_some(folder: Path, count: int, seed: int) -> Iterator[tuple[SampleRecord, tuple[list[float], int]]]:
    """Record of each chosen sample, the share that each of its masks covers, and the view's side in px."""
    index = folder / "index.parquet"
    places = chosen_places(index, count, seed).tolist()
    for row in take_rows(index, places, ["key", "shard", "json", "mask_json"]):
        path = folder / "shards" / f"{row['shard']}.tar"
        record, masks = (_read_member(path, row[name]) for name in ("json", "mask_json"))
        try:
            decoded = decode_masks(masks)
            yield SampleRecord.model_validate_json(record), (decoded.mean(axis=(1, 2)).tolist(), decoded.shape[-1])
        except ValueError as error:
            cause = " ".join(str(error).split())
            raise InputError(f"{path}, key {row['key']}: damaged ({cause}); pipelines/verify.py tells all that is") from None


def _read_member(path: Path, place: dict[str, Any]) -> bytes:
    with path.open("rb") as file:
        file.seek(place["offset"])
        return file.read(place["length"])
