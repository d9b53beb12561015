"""Damage to one real shard: verify.py must find each, and name the sample whose member is hurt."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from pbe_core.dataset_reader import member_places
from pipelines.dataset.verify import verify_dataset

SHARD, BLOCK = "train-000001", 512
Change = Callable[[bytes], bytes]


def cut(offset: int) -> Change:
    return lambda data: data[:offset]


def flip(offset: int, bit: int = 0) -> Change:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


def damages(shards: Path) -> Iterator[tuple[str, Change, str | None]]:
    """File, what is done to it, and the key of the sample that is hurt: none where no member is."""
    rng, rows = random.Random(1), pq.read_table(shards / f"{SHARD}.index.parquet").to_pylist()
    members = sorted((at["offset"], at["length"], row["key"]) for row in rows for at in member_places(row).values())
    for offset, length, key in members[::12]:
        yield ".tar", cut(offset - BLOCK), key
        yield ".tar", cut(offset + length - 1), key
        yield ".tar", flip(offset + rng.randrange(length), rng.randrange(8)), key
        # Headers and padding have no checksum in the index: the tar's hash tells.
        yield ".tar", flip(offset - BLOCK + rng.randrange(BLOCK), rng.randrange(8)), None
        if length % BLOCK:
            yield ".tar", flip(offset + length), None
    for ending in (".index.parquet", ".json"):
        size = (shards / f"{SHARD}{ending}").stat().st_size
        yield from ((ending, flip(rng.randrange(size), rng.randrange(8)), None) for _ in range(6))


def test_all_damage_to_a_shard_is_found(dataset, tmp_path):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    todo = list(damages(copy / "shards"))
    assert len(todo) > 30
    for number, (ending, change, key) in enumerate(todo):
        path = copy / "shards" / f"{SHARD}{ending}"
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        found = {finding.key for finding in verify_dataset(copy).findings if finding.shard == SHARD}
        path.write_bytes(whole)
        assert found, f"damage {number} of {ending}"
        assert key is None or key in found, f"damage {number} of {ending}: {key}"
    assert verify_dataset(copy).findings == []
