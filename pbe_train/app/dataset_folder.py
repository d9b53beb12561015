"""A dataset's files for the viewer, here or behind a URL: which shard holds which sample, rows of the index, bytes of samples.

    place of a sample ──shard_records.parquet──▶ shard, position ──index──▶ row ──▶ byte ranges in shards/<shard>.tar

A sample's place is its row in `index.parquet`. Where that table has many shards, its footer alone takes hundreds of MB to hold
and seconds to read; rows are then read from the shards' own parts of the index, `shards/<shard>.index.parquet`. Behind a URL the
index comes to the cache as it does for a training, and of shards the bytes that are asked for: none is fetched whole.
"""

import io
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from pbe_core.dataset_reader import member_places, read_dataset
from pbe_core.errors import InputError, NetworkError
from pbe_core.storage import RemoteFolder, is_url, public_url
from pbe_train.data.remote_shards import fetch_tables
from schemas.tables import INDEX, REFERENCE_PLACES

LARGE_FOOTER = 4_000_000
"""Bytes of a footer of `index.parquet` beyond which parts are read instead: its tables of row groups take ten times as much."""
HELD_SHARDS = 128
"""Shards whose rows of the index are kept, a few hundred kB each."""
ALL_COLUMNS = (*INDEX.names, REFERENCE_PLACES.name)
TILE_COLUMNS = ("key", "split", "shard", "position", "object_id", "label", "label_name", "ref_jpg")
"""What a grid shows of a sample. Its other columns are read when all of it is shown."""
_FOOTER_END = 8

Row = dict[str, Any]


class Located(NamedTuple):
    """Where a sample is."""

    shard: str
    position: int
    """Among the shard's samples."""


class DatasetFolder:
    """The files of one dataset. Threads may share it.

    Args:
        place: folder or URL.
        storage: options of fsspec for a URL.
        cache: folder for what comes from URLs.

    Raises:
        InputError: there is no finished dataset, or it cannot be reached.
    """

    def __init__(self, place: str, storage: Mapping[str, Any], cache: Path) -> None:
        self.name = public_url(place).rstrip("/")
        self.storage = dict(storage)
        self.remote = RemoteFolder(place, storage) if is_url(place) else None
        self.folder = fetch_tables(place, storage, cache) if self.remote else Path(place)
        self.info = read_dataset(self.folder)
        records = _read_records(self.folder / "shard_records.parquet")
        self.shards: list[str] = records["shard"].to_pylist()
        self.split_of: dict[str, str] = dict(zip(self.shards, records["split"].to_pylist(), strict=True))
        self.ends: Int64[np.ndarray, " shards"] = np.cumsum(records["samples"].to_numpy(), dtype=np.int64)
        self._shard_numbers = {shard: number for number, shard in enumerate(self.shards)}
        self._index: tuple[pq.ParquetFile, dict[str, int]] | None = None
        # pyarrow's ParquetFile buffers what it reads, and two threads that read one take it from each other.
        self._reading = threading.Lock()
        self._held: OrderedDict[str, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        if strange := [shard for shard in self.shards if not re.fullmatch("[A-Za-z0-9_-]+", shard)]:
            raise InputError(f"{self.name}: shard_records.parquet names a shard {strange[0][:40]!r}, which no build does")
        if self.samples != sum(counts.samples for counts in self.info.splits.values()):
            raise InputError(f"{self.name}: shard_records.parquet and dataset.json tell different numbers; run the build again")

    @property
    def samples(self) -> int:
        """How many there are."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def start(self, shard: str) -> int:
        """The place of a shard's first sample."""
        number = self._shard_numbers[shard]
        return int(self.ends[number - 1]) if number else 0

    def locate(self, place: int) -> Located:
        """Where a sample is. Raises InputError where there is none."""
        if not 0 <= place < self.samples:
            raise InputError(f"{self.name}: no sample {place}; there are {self.samples:,}, from 0")
        number = int(np.searchsorted(self.ends, place, side="right"))
        return Located(self.shards[number], place - self.start(self.shards[number]))

    def ranges(self, split: str | None) -> list[tuple[int, int]]:
        """First and one after the last place of a split, or of all; several where the dataset was extended."""
        found: list[tuple[int, int]] = []
        for shard, end in zip(self.shards, self.ends.tolist(), strict=True):
            if split is not None and self.split_of[shard] != split:
                continue
            start = self.start(shard)
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
        return [(start, end) for start, end in found if start < end]

    def rows(self, places: Sequence[int], columns: Collection[str]) -> list[Row]:
        """Rows of the index, in the order of the places.

        Raises:
            InputError: a place that does not exist, or a table that cannot be read.
        """
        found = []
        for place in places:
            shard, position = self.locate(place)
            table = self._shard_rows(shard) if set(columns) <= set(TILE_COLUMNS) else _by_position(self._read_rows(shard))
            there = [name for name in columns if name in table.column_names]
            found.append({**table.slice(position, 1).select(there).to_pylist()[0], "place": place})
        return found

    def members(self, row: Row, names: Collection[str] | None = None) -> dict[str, bytes]:
        """Members of a sample, as they were written.

        Args:
            row: of the index; of its members, at least those that are asked for.
            names: such as `ref.jpg`; all by default.

        Raises:
            InputError: the shard is missing or cannot be reached, or the bytes are not those that were written.
        """
        places = member_places(row) if names is None else {name: _place_of(row, name) for name in names}
        where, found = f"{self.name}/shards/{row['shard']}.tar", {}
        # Members are adjacent, but a few bytes of one need not wait for the rest.
        first = min(place["offset"] for place in places.values())
        last = max(place["offset"] + place["length"] for place in places.values())
        data = self._read(f"shards/{row['shard']}.tar", first, last)
        for name, place in places.items():
            start = place["offset"] - first
            found[name] = data[start : start + place["length"]]
            if zlib.crc32(found[name]) != place["crc32"]:
                raise InputError(
                    f"{where}: {name} of sample {row['key']} is not what was written (CRC-32); delete the shard and run the "
                    "build again"
                )
        return found

    def table(self, name: str) -> Path:
        """A table of the dataset as a local file; from a URL it is brought to the cache. Raises InputError: it is not there."""
        path = self.folder / name
        with self._lock:
            if self.remote and not path.is_file():
                try:
                    self.remote.download(name, path)
                except OSError as error:
                    raise InputError(f"{self.name}/{name}: cannot be had ({_words(error)})") from None
        if not path.is_file():
            raise InputError(f"{self.name}/{name}: missing; run the same build command again, which makes what is missing")
        return path

    def _shard_rows(self, shard: str) -> pa.Table:
        """What tiles show of a shard's rows of the index, by position."""
        with self._lock:
            if shard not in self._held:
                self._held[shard] = _by_position(self._read_rows(shard, TILE_COLUMNS))
                while len(self._held) > HELD_SHARDS:
                    self._held.popitem(last=False)
            self._held.move_to_end(shard)
            return self._held[shard]

    def _read_rows(self, shard: str, columns: Sequence[str] = ALL_COLUMNS) -> pa.Table:
        index = self.folder / "index.parquet"
        try:
            with self._reading:
                if self._index is None and footer_bytes(index) <= LARGE_FOOTER:
                    opened = pq.ParquetFile(index)
                    self._index = opened, groups_of_shards(opened)
                if self._index:
                    return self._index[0].read_row_group(self._index[1][shard], columns=list(columns), use_threads=False)
            data = self._read(f"shards/{shard}.index.parquet")
            with pq.ParquetFile(io.BytesIO(data)) as part:
                return part.read(columns=list(columns), use_threads=False)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise InputError(f"{self.name}: the index of {shard} cannot be read ({_words(error)}); run the build again") from None

    def _read(self, name: str, first: int = 0, last: int | None = None) -> bytes:
        """A file of the dataset, or its bytes from `first` to before `last`."""
        try:
            if self.remote:
                return self.remote.read(name, first if last is not None else None, last)
            with (self.folder / name).open("rb") as file:
                if last is None:
                    return file.read()
                return os.pread(file.fileno(), last - first, first)
        except FileNotFoundError:
            way_out = "is all of the dataset there?" if self.remote else "copy it here, or run the same build command again"
            raise InputError(f"{self.name}/{name}: missing; {way_out}") from None
        except (NetworkError, OSError) as error:
            raise InputError(f"{self.name}/{name}: cannot be read ({_words(error)})") from None


def _place_of(row: Row, name: str) -> dict[str, int]:
    place: dict[str, int] = row[column] if (column := name.replace(".", "_")) in row else member_places(row)[name]
    return place


def _by_position(rows: pa.Table) -> pa.Table:
    return rows.take(pc.sort_indices(rows["position"]))


def footer_bytes(table: Path) -> int:
    """Size of the footer of a Parquet file, as its last 8 bytes tell. Raises OSError."""
    with table.open("rb") as file:
        file.seek(-_FOOTER_END, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def groups_of_shards(index: pq.ParquetFile) -> dict[str, int]:
    """Shard -> its row group in `index.parquet`, from the statistics. Each row group is one shard."""
    column = INDEX.names.index("shard")
    described = [index.metadata.row_group(number) for number in range(index.metadata.num_row_groups)]
    return {one.column(column).statistics.min: number for number, one in enumerate(described) if one.num_rows}


def _read_records(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:  # `read_table` would first load for a second what reads many files at once.
            return file.read(columns=["shard", "split", "samples"])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({_words(error)}); run the same build command again, which makes it") from None


def _words(error: Exception) -> str:
    # An OSError's text has the path of this machine, which the sentence has already.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]
