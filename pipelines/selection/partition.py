"""Partition by photo: everything that a source has, spilled to disk in buckets; memory holds one bucket of photos at a time.

    batches ──collect──▶ half a million rows ──sort by bucket──▶ file 0, file 1, ...   (Arrow, one record batch per bucket)
    bucket b  =  what every file has of it;  neighbouring buckets are read together while they are small

A bucket is a split and the first bits of a photo's hash, so all rows of a photo are in one (the partitions of a Grace hash join,
Kitsuregawa et al. 1983). Memory is the same for any number of rows up to some 50 million; files take about 100 bytes a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64, UInt64

from pbe_core.progress import Progress
from pbe_core.randomness import hash_column, mix, name_hash
from pipelines.annotations.source import Source
from pipelines.config import SPLITS
from pipelines.selection.rules import FLAG_MISSING, REASONS, is_photo_id
from pipelines.threads import OneBehind, read_ahead
from schemas.tables import BOXES, COORDINATES, FLAGS, PHOTOS

ROWS_PER_FILE = 500_000
ROWS_AT_ONCE = 200_000
# The order in which splits come out.
SORTED_SPLITS = tuple(sorted(SPLITS))
_BITS = 8
_BUCKETS = len(SORTED_SPLITS) << _BITS
_BOX_ROW = pa.schema(
    [
        ("photo", pa.uint64()),
        ("photo_id", pa.string()),
        ("label", pa.int32()),
        *[(name, pa.float64()) for name in COORDINATES],
        *[(name, pa.int8()) for name in FLAGS],
        ("segmentation", pa.string()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("problem", pa.int8()),
        ("detail", pa.string()),
    ]
)
_PAIRED_ROW = pa.schema(
    [*_BOX_ROW, ("group", pa.string()), ("group_hash", pa.uint64()), ("references", BOXES.field("references").type)]
)
_PHOTO_ROW = pa.schema(
    [
        ("photo", pa.uint64()),
        *[(name, PHOTOS.field(name).type) for name in PHOTOS.names if name not in ("split", "licence")],
        ("licence", pa.int32()),
    ]
)
_MASK_ROW = pa.schema(
    [
        ("photo", pa.uint64()),
        ("label", pa.int32()),
        *[(name, pa.float64()) for name in COORDINATES],
        ("segmentation", pa.string()),
    ]
)
_SIZE_ROW = pa.schema([("photo", pa.uint64()), ("width", pa.int32()), ("height", pa.int32())])


class Vocabulary:
    """A growing list of different words, each known by its place: text that is compared millions of times becomes numbers."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words: list[str] = []
        self._places: dict[str, int] = {}
        for word in words:
            self.place(word)

    def place(self, word: str) -> int:
        """The number of a word; a new one is added."""
        if word not in self._places:
            self._places[word] = len(self.words)
            self.words.append(word)
        return self._places[word]

    def encode(self, column: pa.DictionaryArray) -> Int32[np.ndarray, " rows"]:
        """Numbers of a column's words; -1 where it is null."""
        places = np.array([*(-1 if word is None else self.place(word) for word in column.dictionary.to_pylist()), -1], np.int32)
        numbers: np.ndarray = places[column.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
        return numbers

    def decode(self, numbers: Int32[np.ndarray, " rows"]) -> pa.DictionaryArray:
        """A column of words from their numbers; null where negative."""
        indices = pa.array(numbers, pa.int32(), mask=numbers < 0)
        return pa.DictionaryArray.from_arrays(indices, pa.array(self.words, pa.string()))


REASON_WORDS = Vocabulary(REASONS)


class SpillFiles:
    """Rows sorted into buckets on disk. In a `with` block `add` any number of times, then `finish`; then `read`."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, buckets: int = _BUCKETS) -> None:
        self.folder = folder
        self.name = name
        self.schema = schema
        self.buckets = buckets
        self.counts = np.zeros(buckets, np.int64)
        self._files: list[tuple[Path, Int64[np.ndarray, " buckets"]]] = []
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_buckets: list[Int64[np.ndarray, " rows"]] = []
        self._waiting_rows = 0
        # Sorting and writing take as long as reading does.
        self._write = OneBehind(self._write_file)

    def __enter__(self) -> "SpillFiles":
        return self

    def __exit__(self, *error: Any) -> None:
        self._write.__exit__(*error)

    def add(self, batch: pa.RecordBatch, buckets: Int64[np.ndarray, " rows"]) -> None:
        """Take rows and the bucket of each."""
        self._waiting.append(batch)
        self._waiting_buckets.append(buckets)
        self._waiting_rows += len(batch)
        self.counts += np.bincount(buckets, minlength=self.buckets)
        if self._waiting_rows >= ROWS_PER_FILE:
            self._hand_over()

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
        """Write the rows that are waiting."""
        if self._waiting_rows:
            self._hand_over()
        self._write.wait()

    def _hand_over(self) -> None:
        self._write(self._waiting, np.concatenate(self._waiting_buckets))
        self._waiting, self._waiting_buckets, self._waiting_rows = [], [], 0

    def _write_file(self, batches: list[pa.RecordBatch], buckets: Int64[np.ndarray, " rows"]) -> None:
        table = pa.Table.from_batches(batches, schema=self.schema).combine_chunks()
        batches.clear()
        # 16 bits sort in linear time, and stably: rows of a bucket keep their order.
        table = table.take(pa.array(np.argsort(buckets.astype(np.uint16), kind="stable"))).combine_chunks()
        counts = np.bincount(buckets, minlength=self.buckets)
        ends = np.cumsum(counts)
        path = self.folder / f"{self.name}-{len(self._files):05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
            for bucket in np.flatnonzero(counts).tolist():
                writer.write_table(table.slice(ends[bucket] - counts[bucket], counts[bucket]))
        # The place of each bucket's record batch in the file; -1 for those that have none.
        self._files.append((path, np.where(counts > 0, np.cumsum(counts > 0) - 1, -1)))

    def read(self, buckets: range, names: Sequence[str] | None = None) -> pa.Table:
        """All rows of some buckets, those of a bucket in the order in which they came; all columns, or some alone."""
        schema = pa.schema([field for field in self.schema if names is None or field.name in names])
        options = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(name) for name in schema.names])
        parts = []
        for path, places in self._files:
            here = [int(place) for place in places[buckets.start : buckets.stop] if place >= 0]
            if here:
                # Not memory-mapped: mapped pages would stay, and count as memory until the machine needs them elsewhere.
                with pa.OSFile(str(path)) as file:
                    reader = pa.ipc.open_file(file, options=options)
                    parts += [reader.get_batch(place) for place in here]
        return pa.Table.from_batches(parts, schema=schema).combine_chunks()

    def read_column(self, buckets: range, name: str) -> pa.Array:
        """One column of some buckets, without reading the others."""
        return self.read(buckets, [name])[name].combine_chunks()


@dataclass
class Partitions:
    """All input, grouped by photo on disk. Labels, files and licences are places in their vocabularies."""

    boxes: SpillFiles
    photos: SpillFiles
    sizes: SpillFiles
    """Of photos, px, as the duplicate scan found them."""
    masks: SpillFiles
    """Object masks, where the source has tables of them."""
    labels: Vocabulary = field(default_factory=Vocabulary)
    files: Vocabulary = field(default_factory=Vocabulary)
    licences: Vocabulary = field(default_factory=Vocabulary)

    def parts(self) -> list[range]:
        """Buckets to read at once; each part is of one split, and of neighbouring hashes."""
        return self.boxes.together([split << _BITS for split in range(len(SORTED_SPLITS))])

    def groups_of(self, split: str) -> UInt64[np.ndarray, " groups"]:
        """Hashes of the groups that have boxes in a split, sorted; 8 bytes each."""
        start = SORTED_SPLITS.index(split) << _BITS
        found = [np.zeros(0, np.uint64)]
        for part in self.parts() if "group_hash" in self.boxes.schema.names else ():
            if start <= part.start < start + (1 << _BITS):
                found.append(np.unique(self.boxes.read_column(part, "group_hash").to_numpy()))
        hashes: np.ndarray = np.setdiff1d(np.concatenate(found), np.zeros(1, np.uint64))
        return hashes

    def split_of(self, part: range) -> str:
        """The split of a part."""
        return SORTED_SPLITS[part.start >> _BITS]

    def in_split(self, part: range, split: str) -> range:
        """The buckets of the same photo ids in another split."""
        moved = (SORTED_SPLITS.index(split) - (part.start >> _BITS)) << _BITS
        return range(part.start + moved, part.stop + moved)


def partition_by_photo(source: Source, seed: int, folder: Path, sizes: Iterable[pa.RecordBatch] = ()) -> Partitions:
    """Read everything that a source has into files below `folder`.

    `sizes` are rows of `schemas.tables.SURVEY`: how large photos are, from a duplicate scan.
    """
    partitions = Partitions(
        boxes=SpillFiles(folder, "boxes", _PAIRED_ROW if source.groups else _BOX_ROW),
        photos=SpillFiles(folder, "photos", _PHOTO_ROW),
        sizes=SpillFiles(folder, "sizes", _SIZE_ROW),
        masks=SpillFiles(folder, "masks", _MASK_ROW),
    )
    with partitions.boxes, partitions.photos, partitions.sizes, partitions.masks:
        _fill(partitions, source, seed, sizes)
    return partitions


def _fill(partitions: Partitions, source: Source, seed: int, sizes: Iterable[pa.RecordBatch]) -> None:
    with Progress("reading", source.rows, "boxes") as progress:
        for batch in read_ahead(source.read_boxes()):
            for split, part in _by_split(batch):
                photo = photo_hashes(part.column("photo_id"), seed)
                rows = _box_rows(part, photo, partitions)
                # Ids that are none would all be one photo, and one bucket: each is a photo of its own instead.
                alone = ~is_photo_id(part.column("photo_id"))
                if alone.any():
                    file, number = (rows.column(name).to_numpy().astype(np.uint64) for name in ("file", "row"))
                    photo = np.where(alone, mix(number ^ mix(file)), photo)
                    rows = rows.set_column(0, "photo", pa.array(photo))
                partitions.boxes.add(rows, _buckets(split, photo))
            progress.update(len(batch))
        progress.set(progress.done, total=progress.done)
    partitions.boxes.finish()
    with Progress("reading", unit="photos") as progress:
        for batch in source.read_photos():
            for split, part in _by_split(batch):
                licence = pa.array(partitions.licences.encode(part.column("licence")))
                _add_photos(partitions.photos, split, part, seed, {"licence": licence})
            progress.update(len(batch))
    partitions.photos.finish()
    for batch in sizes:
        for split, part in _by_split(batch):
            sides = {name: part.column(name).cast(pa.int32()) for name in ("width", "height")}
            _add_photos(partitions.sizes, split, part, seed, sides)
    partitions.sizes.finish()
    if source.read_masks:
        with Progress("reading", unit="object masks") as progress:
            for batch in source.read_masks():
                for split, part in _by_split(batch):
                    label = pa.array(partitions.labels.encode(part.column("label")))
                    _add_photos(partitions.masks, split, part, seed, {"label": label})
                progress.update(len(batch))
    partitions.masks.finish()


def _add_photos(files: SpillFiles, split: str, part: pa.RecordBatch, seed: int, changed: dict[str, pa.Array]) -> None:
    photo = photo_hashes(part.column("photo_id"), seed)
    columns = {"photo": pa.array(photo), **changed}
    arrays = [columns[name] if name in columns else part.column(name) for name in files.schema.names]
    files.add(pa.RecordBatch.from_arrays(arrays, schema=files.schema), _buckets(split, photo))


def photo_hashes(photo_ids: pa.Array, seed: int) -> UInt64[np.ndarray, " photos"]:
    """What photos are known by and ordered by; the same in every split, so that an id that is in two of them is found."""
    return hash_column(photo_ids, seed, "photo order")


def _buckets(split: str, photo: UInt64[np.ndarray, " photos"]) -> Int64[np.ndarray, " photos"]:
    """The bucket of each photo: first by split, then by hash."""
    return (SORTED_SPLITS.index(split) << _BITS) + (photo >> np.uint64(64 - _BITS)).astype(np.int64)


def _by_split(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of each split; mostly there is one."""
    column = batch.column("split")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words = column.dictionary.to_pylist()
    for place, word in enumerate(words):
        part = batch if len(words) == 1 else batch.filter(pc.equal(column.indices, place))
        if len(part):
            yield word, part


def _box_rows(batch: pa.RecordBatch, photo: UInt64[np.ndarray, " rows"], partitions: Partitions) -> pa.RecordBatch:
    schema = partitions.boxes.schema
    columns = {name: batch.column(name) for name in schema.names if name in batch.schema.names}
    columns["photo"] = pa.array(photo)
    columns["label"] = pa.array(partitions.labels.encode(batch.column("label")))
    columns["file"] = pa.array(partitions.files.encode(batch.column("file")))
    columns["problem"] = pa.array(REASON_WORDS.encode(batch.column("problem")).astype(np.int8))
    for name in COORDINATES:
        # + 0.0: -0.0 is the same place as 0.0, and must not look otherwise in a file.
        columns[name] = pa.array(columns[name].fill_null(np.nan).to_numpy(zero_copy_only=False) + 0.0)
    for name in FLAGS:
        columns[name] = columns[name].fill_null(FLAG_MISSING)
    if "group_hash" in schema.names:
        columns["group_hash"] = pa.array(group_hashes(batch.column("group")))
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def group_hashes(groups: pa.Array) -> UInt64[np.ndarray, " boxes"]:
    """What groups are known by: a hash of any text; 0 for a box without a group."""
    words = groups.dictionary_encode()
    hashes = np.array([*(name_hash("group", word) for word in words.dictionary.to_pylist()), 0], np.uint64)
    found: np.ndarray = hashes[words.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return found
