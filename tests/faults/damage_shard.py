"""Damage to one real shard, again and again: verify.py must find each, and name the sample whose member is hurt.

    python -m tests.faults.damage_shard

Builds a small dataset of the tiny world by the real command. Then, one at a time: the tar of its largest shard is cut at the
beginning of every member and at random places, single bits of tar, index part and record are flipped, and what verify.py says is
looked at before the file is put back. Prints a table; status 1 if anything was missed.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pbe_core.dataset_reader import member_places
from pbe_core.settings import REPOSITORY
from pipelines.dataset.verify import verify_dataset
from tests.conftest import build_options, run_build
from tiny_world.make_photos import make_world

BLOCK = 512


@dataclass(frozen=True)
class Place:
    """Where one member lies in a tar, by the index."""

    key: str
    name: str
    offset: int
    length: int

    @property
    def start(self) -> int:
        """Where its header begins."""
        return self.offset - BLOCK

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + self.length + -self.length % BLOCK


def layout(part: Path) -> list[Place]:
    """All members of a shard in their order, by its part of the index."""
    rows = pq.read_table(part).to_pylist()
    found = [Place(row["key"], name, at["offset"], at["length"]) for row in rows for name, at in member_places(row).items()]
    return sorted(found, key=lambda place: place.offset)


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


@dataclass
class Report:
    """How much of what was done was found."""

    done: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    of_samples: Counter[str] = field(default_factory=Counter)
    """Damages that hurt a sample."""
    named: Counter[str] = field(default_factory=Counter)
    """Those of them where that sample was named."""
    missed: list[Damage] = field(default_factory=list)


def part_of(places: list[Place], offset: int) -> tuple[str, str | None]:
    """What lies at a place of a tar, and whose it is."""
    for place in places:
        if offset < place.end:
            inside = offset - place.offset
            return ("header" if inside < 0 else place.name, place.key) if inside < place.length else ("padding", None)
    return "end of the archive", None


def damages(folder: Path, shard: str, cuts: int, flips: int, others: int, every: int, seed: int) -> Iterator[Damage]:
    """All that is to be done, in a random order that is always the same.

    Args:
        folder: of the shards.
        shard: name of the one to be damaged.
        cuts: random places at which the tar is cut.
        flips: bits of the tar.
        others: bits of the index part, and of the record.
        every: of the beginnings of members, each so-many-th is cut at.
        seed: of all that is random.
    """
    rng = random.Random(seed)
    places = layout(folder / f"{shard}.index.parquet")
    name = f"{shard}.tar"
    size = (folder / name).stat().st_size
    for place in places[::every]:
        yield Damage("tar cut where a member begins", name, place.start, None, place.key)
    for offset in rng.sample(range(1, size), cuts):
        yield Damage(
            "tar cut anywhere",
            name,
            offset,
            None,
            next((each.key for each in places if offset < each.offset + each.length), None),
        )
    for offset in (rng.randrange(size) for _ in range(flips)):
        part, key = part_of(places, offset)
        # Headers and padding have no checksum in the index: the tar's hash tells, and no sample is named.
        yield Damage(f"bit of the tar: {part}", name, offset, rng.randrange(8), None if part == "header" else key)
    for other, kind in ((f"{shard}.index.parquet", "bit of the index part"), (f"{shard}.json", "bit of the commit record")):
        size = (folder / other).stat().st_size
        for offset in (rng.randrange(size) for _ in range(others)):
            yield Damage(kind, other, offset, rng.randrange(8))
    # Headers and padding are few of a tar's bytes: some are flipped on purpose.
    for place in rng.sample(places, max(1, others // 5)):
        yield Damage("bit of the tar: header", name, place.start + rng.randrange(BLOCK), rng.randrange(8))
        if place.length % BLOCK:
            yield Damage("bit of the tar: padding", name, place.offset + place.length, rng.randrange(8))


def damage_one_by_one(dataset: Path, shard: str, todo: list[Damage], by_command: int) -> Report:
    """Do each damage, look, and put the file back.

    Args:
        dataset: its folder, whole.
        shard: the one that is damaged.
        todo: the damages.
        by_command: so many of them, spread evenly, are looked for by the command itself too.
    """
    report = Report()
    for number, damage in enumerate(todo):
        path = dataset / "shards" / damage.name
        whole = path.read_bytes()
        path.write_bytes(damage.apply(whole))
        try:
            findings = verify_dataset(dataset, threads=1).findings
            found = any(finding.shard == shard for finding in findings)
            if by_command and number % max(1, len(todo) // by_command) == 0:
                command = [sys.executable, "pipelines/verify.py", str(dataset)]
                done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
                found = found and done.returncode == 1 and shard in done.stdout and "Traceback" not in done.stderr
        finally:
            path.write_bytes(whole)
        report.done[damage.kind] += 1
        report.found[damage.kind] += found
        if damage.key:
            report.of_samples[damage.kind] += 1
            report.named[damage.kind] += any(finding.key == damage.key for finding in findings)
        if not found:
            report.missed.append(damage)
    return report


def print_report(report: Report) -> None:
    """The table, and what was missed."""
    table = Table(title="What was done to a shard, and what verify.py found", title_justify="left")
    for name in ("damage", "done", "found", "hurt a sample", "of these named"):
        table.add_column(name, justify="left" if name == "damage" else "right")
    for kind, done in report.done.items():
        table.add_row(kind, *map(str, (done, report.found[kind], report.of_samples[kind], report.named[kind])))
    table.add_section()
    columns = (report.done, report.found, report.of_samples, report.named)
    table.add_row("all", *(str(column.total()) for column in columns))
    Console(width=130).print(table)
    for damage in report.missed:
        print(f"MISSED: {damage}")


def main() -> int:
    """Build, damage, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50, help="random places at which the tar is cut (default: %(default)s)")
    parser.add_argument("--flips", type=int, default=200, help="random bits of the tar (default: %(default)s)")
    parser.add_argument("--others", type=int, default=50, help="random bits of index part and record (default: %(default)s)")
    parser.add_argument("--commands", type=int, default=5, help="damages looked for by the command too (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", type=Path, help="a whole dataset that may be damaged; none builds one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        dataset = given.dataset
        if dataset is None:
            photos, dataset = Path(temporary) / "photos", Path(temporary) / "dataset"
            make_world(photos, 12, 8, 7, 1)
            run_build(*build_options(photos, dataset))
        folder = dataset / "shards"
        shard = max(folder.glob("*.tar"), key=lambda path: path.stat().st_size).stem
        todo = list(damages(folder, shard, given.cuts, given.flips, given.others, 1, given.seed))
        report = damage_one_by_one(dataset, shard, todo, given.commands)
        left = verify_dataset(dataset).findings
    print_report(report)
    if left:
        print(f"the dataset was not whole afterwards: {left[0]}")
    return bool(report.missed or left)


if __name__ == "__main__":
    sys.exit(main())
