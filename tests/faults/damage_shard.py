"""Damage to one real shard, again and again: verify.py must find each, and name the sample whose member is hurt.

    python -m tests.faults.damage_shard

Builds a small dataset of the tiny world. Then, one at a time: the tar of its largest shard is cut at the beginning of every
member and at random places, single bits of tar, part of the index and record are flipped, and what verify.py says is looked at
before the file is put back. Prints a table; status 1 if anything was missed.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pbe_core.dataset_reader import member_places
from pipelines.dataset.verify import verify_dataset
from tests.conftest import build_options, run_build
from tiny_world.make_photos import make_world

BLOCK = 512


@dataclass(frozen=True)
class Damage:
    """One thing that is done to one file."""

    kind: str
    name: str
    """Of the file, in the folder of shards."""
    offset: int
    """Where it is cut, or the byte of which a bit is flipped."""
    bit: int | None = None
    """Null cuts."""
    key: str | None = None
    """The sample one of whose members is hurt, or of several the first; null where it is none."""

    def apply(self, data: bytes) -> bytes:
        """The damaged content."""
        if self.bit is None:
            return data[: self.offset]
        return data[: self.offset] + bytes([data[self.offset] ^ 1 << self.bit]) + data[self.offset + 1 :]


def damages(folder: Path, shard: str, cuts: int, flips: int, others: int, every: int, seed: int) -> Iterator[Damage]:
    """All that is to be done.

    Args:
        folder: of the shards.
        shard: name of the one to be damaged.
        cuts: random places at which the tar is cut.
        flips: bits of the tar.
        others: bits of the part of the index, and of the record.
        every: of the beginnings of members, each so-many-th is cut at.
        seed: of all that is random.
    """
    rng = random.Random(seed)
    rows = pq.read_table(folder / f"{shard}.index.parquet").to_pylist()
    members = ((at["offset"], at["length"], row["key"], name) for row in rows for name, at in member_places(row).items())
    places = sorted(members)
    tar = f"{shard}.tar"
    size = (folder / tar).stat().st_size

    def flip(offset: int) -> Damage:
        # Headers and padding have no checksum in the index: the tar's hash tells, and no sample is named.
        kind, key = "end of the archive", None
        for start, length, own, name in places:
            if offset < start + length + -length % BLOCK:
                inside = offset - start
                kind, key = ("header", None) if inside < 0 else (name, own) if inside < length else ("padding", None)
                break
        return Damage(f"bit of the tar: {kind}", tar, offset, rng.randrange(8), key)

    for start, _, key, _ in places[::every]:
        yield Damage("tar cut where a member begins", tar, start - BLOCK, None, key)
    for offset in rng.sample(range(1, size), cuts):
        first = next((key for start, length, key, _ in places if offset < start + length), None)
        yield Damage("tar cut anywhere", tar, offset, None, first)
    yield from (flip(rng.randrange(size)) for _ in range(flips))
    # Headers and padding are few of a tar's bytes: some are flipped on purpose.
    for start, length, *_ in rng.sample(places, max(1, others // 5)):
        yield flip(start - 1 - rng.randrange(BLOCK))
        if length % BLOCK:
            yield flip(start + length)
    for name, kind in ((f"{shard}.index.parquet", "bit of the part of the index"), (f"{shard}.json", "bit of the commit record")):
        size = (folder / name).stat().st_size
        yield from (Damage(kind, name, rng.randrange(size), rng.randrange(8)) for _ in range(others))


def damage_one_by_one(dataset: Path, shard: str, todo: list[Damage]) -> Iterator[tuple[Damage, bool, bool]]:
    """Do each damage to a whole dataset, look, and put the file back; whether it was found, and whether its sample was named."""
    for damage in todo:
        path = dataset / "shards" / damage.name
        whole = path.read_bytes()
        path.write_bytes(damage.apply(whole))
        try:
            findings = verify_dataset(dataset).findings
        finally:
            path.write_bytes(whole)
        yield damage, any(each.shard == shard for each in findings), any(each.key == damage.key for each in findings)


def main() -> int:
    """Build, damage, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50, help="random places at which the tar is cut (default: %(default)s)")
    parser.add_argument("--flips", type=int, default=200, help="random bits of the tar (default: %(default)s)")
    parser.add_argument("--others", type=int, default=50, help="random bits of index part and record (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        photos, dataset = Path(temporary) / "photos", Path(temporary) / "dataset"
        make_world(photos, 12, 8, 7, 1)
        run_build(*build_options(photos, dataset))
        folder = dataset / "shards"
        shard = max(folder.glob("*.tar"), key=lambda path: path.stat().st_size).stem
        results = [
            *damage_one_by_one(dataset, shard, [*damages(folder, shard, given.cuts, given.flips, given.others, 1, given.seed)])
        ]
        left = verify_dataset(dataset).findings
    table = Table("damage", "done", "found", "hurt a sample", "of these named", title="What verify.py found")
    kinds = Counter(damage.kind for damage, *_ in results)
    for kind, done in kinds.items():
        own = [each for each in results if each[0].kind == kind]
        named = [named for damage, _, named in own if damage.key]
        table.add_row(kind, *map(str, (done, sum(found for _, found, _ in own), len(named), sum(named))))
    Console(width=130).print(table)
    missed = [damage for damage, found, named in results if not found or (damage.key and not named)]
    print(*(f"MISSED: {damage}" for damage in missed), *(f"not whole afterwards: {finding}" for finding in left), sep="\n")
    return bool(missed or left)


if __name__ == "__main__":
    sys.exit(main())
