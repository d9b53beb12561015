"""Grouping more rows than memory holds: rows come in any order and go out bucket by bucket, all rows of a photo in one bucket.

    batches ──collect──▶ half a million rows ──sort by bucket──▶ run 0, run 1, ...   (Arrow files, one record batch per bucket)
    bucket b  =  what every run has of it;  neighbouring buckets are read together while they are small

There are many small buckets, and as many of them are read at once as make a certain number of rows: memory stays the same for any
number of rows (up to some 50 million; from there it grows with them, slowly). The files take about 100 bytes a row for the
time of the run (a Grace hash join's partitions, Kitsuregawa et al. 1983).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64

ROWS_PER_RUN = 500_000
ROWS_AT_ONCE = 200_000


class Runs:
    """Rows sorted into buckets on disk. `add` any number of times, then `finish`, then `read`."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, buckets: int) -> None:
        self.folder = folder
        self.name = name
        self.schema = schema
        self.buckets = buckets
        self.counts = np.zeros(buckets, np.int64)
        self._files: list[tuple[Path, Int64[np.ndarray, " buckets"]]] = []
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_buckets: list[Int64[np.ndarray, " rows"]] = []
        self._waiting_rows = 0

    def add(self, batch: pa.RecordBatch, buckets: Int64[np.ndarray, " rows"]) -> None:
        """Take rows and the bucket of each."""
        self._waiting.append(batch)
        self._waiting_buckets.append(buckets)
        self._waiting_rows += len(batch)
        self.counts += np.bincount(buckets, minlength=self.buckets)
        if self._waiting_rows >= ROWS_PER_RUN:
            self._write()

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    def together(self, borders: Sequence[int]) -> list[range]:
        """Ranges of buckets to read at once: each of about `ROWS_AT_ONCE` rows, none across a border; all buckets, in order."""
        ranges, start, rows = [], 0, 0
        for bucket, count in enumerate(self.counts.tolist()):
            if bucket > start and (rows + count > ROWS_AT_ONCE or bucket in borders):
                ranges.append(range(start, bucket))
                start, rows = bucket, 0
            rows += count
        return [*ranges, range(start, self.buckets)]

    def finish(self) -> None:
        """Write what is still waiting."""
        if self._waiting_rows:
            self._write()

    def read(self, buckets: range) -> pa.Table:
        """All rows of some buckets, those of a bucket in the order in which they came."""
        return self._read(buckets, self.schema.names)

    def read_columns(self, buckets: range, names: Sequence[str]) -> list[pa.Array]:
        """Some columns of some buckets, without reading the others."""
        table = self._read(buckets, names)
        return [table[name].combine_chunks() for name in names]

    def _read(self, buckets: range, names: Sequence[str]) -> pa.Table:
        fields = sorted(self.schema.get_field_index(name) for name in names)
        schema = pa.schema([self.schema.field(field) for field in fields])
        parts = []
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        for path, places in self._files:
            here = [int(place) for place in places[buckets.start : buckets.stop] if place >= 0]
            if here:
                # Not memory-mapped: mapped pages would stay, and count as memory until the machine needs them elsewhere.
                with pa.OSFile(str(path)) as file:
                    reader = pa.ipc.open_file(file, options=options)
                    parts += [reader.get_batch(place) for place in here]
        return pa.Table.from_batches(parts, schema=schema).combine_chunks()

    def _write(self) -> None:
        table = pa.Table.from_batches(self._waiting, schema=self.schema).combine_chunks()
        buckets = np.concatenate(self._waiting_buckets)
        self._waiting, self._waiting_buckets, self._waiting_rows = [], [], 0
        # 16 bits sort in linear time, and stably: rows of a bucket keep their order.
        order = np.argsort(buckets.astype(np.uint16 if self.buckets <= 1 << 16 else np.uint32), kind="stable")
        counts = np.bincount(buckets, minlength=self.buckets)
        ends = np.cumsum(counts)
        table = table.take(pa.array(order)).combine_chunks()
        path = self.folder / f"{self.name}-{len(self._files):05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
            for bucket in np.flatnonzero(counts).tolist():
                writer.write_table(table.slice(ends[bucket] - counts[bucket], counts[bucket]))
        # The place of each bucket's record batch in the file; -1 for those that have none.
        self._files.append((path, np.where(counts > 0, np.cumsum(counts > 0) - 1, -1)))


class Words:
    """A growing list of different words, each known by its place: text that is compared millions of times becomes numbers."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words: list[str] = []
        self._places: dict[str, int] = {}
        for word in words:
            self.place(word)

    def __len__(self) -> int:
        return len(self.words)

    def place(self, word: str) -> int:
        """The number of a word; a new one is added."""
        if word not in self._places:
            self._places[word] = len(self.words)
            self.words.append(word)
        return self._places[word]

    def encode(self, column: pa.DictionaryArray) -> Int32[np.ndarray, " rows"]:
        """Numbers of a column's words; -1 where it is null."""
        places = np.array([*(-1 if word is None else self.place(word) for word in column.dictionary.to_pylist()), -1], np.int32)
        indices = column.indices.fill_null(len(places) - 1).to_numpy(zero_copy_only=False)
        numbers: np.ndarray = places[indices]
        return numbers

    def decode(self, numbers: Int32[np.ndarray, " rows"]) -> pa.DictionaryArray:
        """A column of words from their numbers; null where negative."""
        indices = pa.array(numbers, pa.int32(), mask=numbers < 0)
        return pa.DictionaryArray.from_arrays(indices, pa.array(self.words, pa.string()))
