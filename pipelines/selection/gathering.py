"""Everything that a source knows, read once and grouped by photo on disk: what memory holds later is one bucket of photos."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt64
from tqdm import tqdm

from pipelines.annotations.source import Source
from pipelines.config import SPLITS, BuildSettings
from pipelines.selection.rules import FLAG_MISSING, REASONS
from pipelines.selection.runs import Runs, Words, bucket_bits
from pipelines.selection.same_photo import read_survey
from schemas.randomness import hash_column
from schemas.tables import COORDINATES, FLAGS, PHOTOS

_BOX_RUN = pa.schema(
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
_PHOTO_RUN = pa.schema(
    [
        ("photo", pa.uint64()),
        *[(name, PHOTOS.field(name).type) for name in PHOTOS.names if name not in ("split", "licence")],
        ("licence", pa.int32()),
    ]
)
_SIZE_RUN = pa.schema([("photo", pa.uint64()), ("width", pa.int32()), ("height", pa.int32())])
# The order in which splits come out.
SORTED_SPLITS = tuple(sorted(SPLITS))


@dataclass
class Gathered:
    """All input, grouped by photo on disk."""

    boxes: Runs
    photos: Runs
    sizes: Runs
    labels: Words
    files: Words
    licences: Words
    bits: int
    photo_seed: tuple[int | str, ...]

    def bucket(self, split: int, photo: UInt64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """The bucket of each photo of a split (its place in `SORTED_SPLITS`): first by split, then by the photo's hash."""
        within = photo >> np.uint64(64 - self.bits) if self.bits else np.zeros_like(photo)
        return (split << self.bits) + within.astype(np.int64)

    @property
    def buckets(self) -> int:
        """How many there are."""
        return len(SORTED_SPLITS) << self.bits


def gather(source: Source, settings: BuildSettings, folder: Path) -> Gathered:
    """Everything that is read, grouped by photo."""
    bits = bucket_bits(source.rows)
    buckets = len(SORTED_SPLITS) << bits
    gathered = Gathered(
        boxes=Runs(folder, "boxes", _BOX_RUN, buckets),
        photos=Runs(folder, "photos", _PHOTO_RUN, buckets),
        sizes=Runs(folder, "sizes", _SIZE_RUN, buckets),
        labels=Words(),
        files=Words(),
        licences=Words(),
        bits=bits,
        photo_seed=(settings.seed, "photo order"),
    )
    with tqdm(total=source.rows, unit=" boxes", unit_scale=True, desc="reading", disable=None) as progress:
        for batch in source.read_boxes():
            for split, part in _by_split(batch):
                photo = hash_column(part.column("photo_id"), *gathered.photo_seed, split)
                gathered.boxes.add(_box_run(part, photo, gathered), gathered.bucket(SORTED_SPLITS.index(split), photo))
            progress.update(len(batch))
        progress.total = progress.n
    gathered.boxes.finish()
    for batch in source.read_photos():
        for split, part in _by_split(batch):
            photo = hash_column(part.column("photo_id"), *gathered.photo_seed, split)
            columns = {name: part.column(name) for name in _PHOTO_RUN.names if name in part.schema.names}
            columns |= {"photo": pa.array(photo), "licence": pa.array(gathered.licences.encode(part.column("licence")))}
            row = pa.RecordBatch.from_arrays([columns[name] for name in _PHOTO_RUN.names], schema=_PHOTO_RUN)
            gathered.photos.add(row, gathered.bucket(SORTED_SPLITS.index(split), photo))
    gathered.photos.finish()
    if settings.source.survey:
        for batch in read_survey(settings.source.survey).read_photos():
            for split, part in _by_split(batch):
                photo = hash_column(part.column("photo_id"), *gathered.photo_seed, split)
                arrays = [pa.array(photo), part.column("width").cast(pa.int32()), part.column("height").cast(pa.int32())]
                row = pa.RecordBatch.from_arrays(arrays, schema=_SIZE_RUN)
                gathered.sizes.add(row, gathered.bucket(SORTED_SPLITS.index(split), photo))
    gathered.sizes.finish()
    return gathered


def _by_split(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of each split; mostly there is one."""
    column = batch.column("split")
    if column.null_count:
        raise ValueError("an annotation reader gave rows without a split")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words = column.dictionary.to_pylist()
    if len(words) == 1:
        yield words[0], batch
        return
    for place, word in enumerate(words):
        rows = pc.equal(column.indices, place)
        part = batch.filter(rows)
        if len(part):
            yield word, part


def _box_run(batch: pa.RecordBatch, photo: UInt64[np.ndarray, " rows"], gathered: Gathered) -> pa.RecordBatch:
    columns = {name: batch.column(name) for name in _BOX_RUN.names if name in batch.schema.names}
    columns["photo"] = pa.array(photo)
    columns["label"] = pa.array(gathered.labels.encode(batch.column("label")))
    columns["file"] = pa.array(gathered.files.encode(batch.column("file")))
    columns["problem"] = pa.array(REASON_WORDS.encode(batch.column("problem")).astype(np.int8))
    for name in COORDINATES:
        columns[name] = columns[name].fill_null(np.nan)
    for name in FLAGS:
        columns[name] = columns[name].fill_null(FLAG_MISSING)
    return pa.RecordBatch.from_arrays([columns[name] for name in _BOX_RUN.names], schema=_BOX_RUN)


class _ReasonWords(Words):
    """The reasons in their order; a reader may not invent others."""

    def place(self, word: str) -> int:
        if len(self.words) == len(REASONS) and word not in self.words:
            raise ValueError(f"an annotation reader gave the problem {word!r}, which is none of schemas.tables.REJECT_REASONS")
        return super().place(word)


REASON_WORDS = _ReasonWords(REASONS)
