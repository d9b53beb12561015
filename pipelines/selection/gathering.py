"""Everything that a source knows, read once and grouped by photo on disk: what memory holds later is one bucket of photos."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt64

from pbe_core.progress import Progress
from pbe_core.randomness import hash_column, mix
from pipelines.annotations.source import Source
from pipelines.config import SPLITS, BuildSettings
from pipelines.selection.rules import FLAG_MISSING, REASONS, is_photo_id
from pipelines.selection.runs import Runs, Words
from pipelines.selection.same_photo import read_survey
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
# Where a photo is in several: which of them keeps it.
KEPT_FIRST = ("test", "validation", "train")
_BITS = 8


@dataclass
class Gathered:
    """All input, grouped by photo on disk."""

    boxes: Runs
    photos: Runs
    sizes: Runs
    labels: Words
    files: Words
    licences: Words

    def parts(self) -> list[range]:
        """Buckets to judge at once; each part is of one split, and of neighbouring hashes."""
        return self.boxes.together([split << _BITS for split in range(len(SORTED_SPLITS))])

    def split_of(self, part: range) -> str:
        """The split of a part."""
        return SORTED_SPLITS[part.start >> _BITS]

    def in_split(self, part: range, split: str) -> range:
        """The buckets of the same photo ids in another split."""
        moved = (SORTED_SPLITS.index(split) - (part.start >> _BITS)) << _BITS
        return range(part.start + moved, part.stop + moved)


def gather(source: Source, settings: BuildSettings, folder: Path) -> Gathered:
    """Everything that is read, grouped by photo."""
    buckets = len(SORTED_SPLITS) << _BITS
    gathered = Gathered(
        boxes=Runs(folder, "boxes", _BOX_RUN, buckets),
        photos=Runs(folder, "photos", _PHOTO_RUN, buckets),
        sizes=Runs(folder, "sizes", _SIZE_RUN, buckets),
        labels=Words(),
        files=Words(),
        licences=Words(),
    )
    with Progress("reading", source.rows, "boxes") as progress:
        for batch in source.read_boxes():
            for split, part in _by_split(batch):
                photo = photo_hashes(part.column("photo_id"), settings.seed)
                row = _box_run(part, photo, gathered)
                # Ids that are none would all be one photo, and one bucket: each is a photo of its own instead.
                alone = ~is_photo_id(part.column("photo_id"))
                if alone.any():
                    file, number = (row.column(name).to_numpy().astype(np.uint64) for name in ("file", "row"))
                    photo = np.where(alone, mix(number ^ mix(file)), photo)
                    row = row.set_column(0, "photo", pa.array(photo))
                gathered.boxes.add(row, _buckets(split, photo))
            progress.update(len(batch))
        progress.set(progress.done, total=progress.done)
    gathered.boxes.finish()
    with Progress("reading", unit="photos") as progress:
        for batch in source.read_photos():
            for split, part in _by_split(batch):
                photo = photo_hashes(part.column("photo_id"), settings.seed)
                columns = {name: part.column(name) for name in _PHOTO_RUN.names if name in part.schema.names}
                columns |= {"photo": pa.array(photo), "licence": pa.array(gathered.licences.encode(part.column("licence")))}
                row = pa.RecordBatch.from_arrays([columns[name] for name in _PHOTO_RUN.names], schema=_PHOTO_RUN)
                gathered.photos.add(row, _buckets(split, photo))
            progress.update(len(batch))
    gathered.photos.finish()
    if settings.source.survey:
        for batch in read_survey(settings.source.survey).read_photos():
            for split, part in _by_split(batch):
                photo = photo_hashes(part.column("photo_id"), settings.seed)
                arrays = [pa.array(photo), part.column("width").cast(pa.int32()), part.column("height").cast(pa.int32())]
                row = pa.RecordBatch.from_arrays(arrays, schema=_SIZE_RUN)
                gathered.sizes.add(row, _buckets(split, photo))
    gathered.sizes.finish()
    return gathered


def photo_hashes(photo_ids: pa.Array, seed: int) -> UInt64[np.ndarray, " photos"]:
    """What photos are known by and ordered by; the same in every split, so that an id that is in two of them is found."""
    return hash_column(photo_ids, seed, "photo order")


def _buckets(split: str, photo: UInt64[np.ndarray, " photos"]) -> Int64[np.ndarray, " photos"]:
    """The bucket of each photo: first by split, then by hash."""
    return (SORTED_SPLITS.index(split) << _BITS) + (photo >> np.uint64(64 - _BITS)).astype(np.int64)


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
        # + 0.0: -0.0 is the same place as 0.0, and must not look otherwise in a file.
        columns[name] = pa.array(columns[name].fill_null(np.nan).to_numpy(zero_copy_only=False) + 0.0)
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
