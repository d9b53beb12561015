"""A small dataset that is really built, to look into: with rejects, failures, both kinds of masks, and strangers' words."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import build_options, made_once, run_build
from tiny_world.make_photos import make_world

MALLORY = '<b onclick="alert(1)">Mallory</b>'
"""The author of all validation photos; what is said to be their address is a script."""
NO_ADDRESS = "javascript:void(0)"
SHARD = 10
RULES = ("--selection.min_area", "0.06")
"""More are rejected than by default."""


@pytest.fixture(scope="session")
def built(shared_folder: Path) -> Path:
    """The dataset's folder; its photos are in `built-photos` beside it, of which three were gone when it was built."""
    out = shared_folder / "built"
    with made_once(out) as missing:
        if missing:
            own = photos_of(out)
            make_world(own, 16, 8, 7, 1)
            defame(own / "validation-images-boxable-with-rotation.csv")
            hidden = sorted((own / "train").glob("*.jpg"))[3:6]
            for path in hidden:
                path.rename(path.with_suffix(".gone"))
            run_build(*build_options(own, out), "--shards.samples", str(SHARD), *RULES)
    return out


def photos_of(built: Path) -> Path:
    return built.with_name("built-photos")


def defame(table: Path) -> None:
    """Let a stranger have written what photos' metadata say."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"Author": MALLORY, "OriginalURL": NO_ADDRESS}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read(dataset: Path, name: str) -> pa.Table:
    return pq.read_table(dataset / f"{name}.parquet")
