"""Random access to samples: `index.parquet` says where each member lies, `os.pread` fetches it.

Nothing is unpacked and nothing is streamed past: reading a sample costs one read of the bytes from its first to its last member.
Index rows and file handles are kept for the shards in use only. Evaluation reads whole samples (`read`), training what one item
needs of them (`read_for_training`); both check what they read: CRC-32 of each member, shapes, finite numbers.
"""

import errno
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float16, Int64, UInt8

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError, decode_jpeg
from pbe_core.images.rle import decode_pixels
from pbe_core.sample_codec import decode_array, latents_problem, mask_counts
from pbe_core.words import noun, number_of
from pbe_train.data.order import SampleLocation
from schemas.sample import other_reference
from schemas.tables import INDEX

# Columns of the index whose members are read. `json` tells people where a sample comes from; of it, the object's outline alone
# is trained on, and only where backgrounds are erased.
READ = ("latent_npy", "masked_npy", "mask_json", "ref_jpg", "view_jpg")
TRAINED_ON = READ[:4]
LOCATED = (*READ, "json")
# What systems say of a file, or a disk, that cannot be read. Anything else, too many open files for one, is no sample's damage.
_OF_ONE_FILE = (errno.EIO, errno.ESTALE, errno.EBADMSG)
Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class StoredSample:
    """What training and evaluation need of a sample.

    `latent` and `masked` hold posterior mean and standard deviation, unscaled; `masks` are True where the view may be repainted;
    `reference` and `view` are RGB, 0-255. `view` is None where the build kept none.
    """

    key: str
    label: str
    label_name: str
    latent: Float16[np.ndarray, "two_channels height width"]
    masked: Float16[np.ndarray, "masks two_channels height width"]
    masks: Bool[np.ndarray, "masks view_height view_width"]
    reference: UInt8[np.ndarray, "reference_height reference_width 3"]
    view: UInt8[np.ndarray, "view_height view_width 3"] | None


@dataclass(frozen=True)
class TrainingSample:
    """What one training item needs of a sample: of the K masks, the one that was chosen. Fields as in `StoredSample`."""

    key: str
    latent: Float16[np.ndarray, "two_channels height width"]
    masked: Float16[np.ndarray, "two_channels height width"]
    mask: Bool[np.ndarray, "view_height view_width"]
    reference: UInt8[np.ndarray, "reference_height reference_width 3"]
    outline: Bool[np.ndarray, "reference_height reference_width"] | None = None
    """Which pixels of the reference are the object's; None where that is not known, or was not asked for."""
    more: tuple[tuple[UInt8[np.ndarray, "_ _ 3"], Bool[np.ndarray, "_ _"] | None], ...] = ()
    """Further references that were asked for, each with its outline."""


class Replaced(NamedTuple):
    """A sample that could not be read, and gave its slot to another one. Plain strings: it travels with a batch."""

    shard: str
    """Name of its shard."""
    key: str
    """Its key."""
    why: str
    """What is wrong with it."""


class CorruptSample(InputError):
    """One sample, or the whole shard that it lies in, cannot be read. Anything else that is wrong is another `InputError`."""

    def __init__(self, message: str, replaced: Replaced) -> None:
        super().__init__(message)
        self.message, self.replaced = message, replaced

    def __reduce__(self) -> tuple[type["CorruptSample"], tuple[str, Replaced]]:
        return CorruptSample, (self.message, self.replaced)


class UnreadableShard(InputError):
    """A whole shard cannot be read, others may. `why` tells it in a few words."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class LocalShards:
    """Shards in the folder `shards` of a dataset. Goes to worker processes, so it can be pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, shard: str) -> str:
        """How to call a shard in errors."""
        return str(self.folder / "shards" / f"{shard}.tar")

    def open(self, shard: str) -> FileIO:
        """The tar of a shard, open for reading. Raises UnreadableShard, or InputError where others would fail as well."""
        where = self.where(shard)
        try:
            return FileIO(where)
        except FileNotFoundError:
            why = "the shard is missing"
            raise UnreadableShard(f"{where}: {why}; run the build again, it makes only what is missing", why) from None
        except OSError as error:
            if error.errno in _OF_ONE_FILE:
                raise UnreadableShard(f"{where}: {error.strerror}; is the disk sound?", str(error.strerror)) from None
            raise InputError(f"{where}: {error.strerror}; make it readable (or raise ulimit -n, for too many files)") from None

    def renew(self, shard: str) -> bool:
        """Asked where a shard is damaged: whether that was a copy of ours, and `open` gets another one now."""
        return False


@dataclass(frozen=True)
class ShardRows:
    """A shard's part of the index, by position. Members are in the order of `LOCATED`; length -1: there is none."""

    keys: pa.StringArray
    labels: pa.StringArray
    label_names: pa.StringArray
    offsets: Int64[np.ndarray, "samples members"]
    lengths: Int64[np.ndarray, "samples members"]
    checksums: Int64[np.ndarray, "samples members"]
    others: pa.Array | None = None
    """Lists of places (`offset`, `length`, `crc32`) of references from other photos; None where the dataset has none."""

    def count_others(self, position: int) -> int:
        """References from other photos that a sample has."""
        return 0 if self.others is None else len(self.others[position].as_py() or ())

    @classmethod
    def of(cls, table: pa.Table) -> "ShardRows":
        """Rows of `schemas.tables.INDEX`, sorted by position."""

        def numbers(field: str, absent: int) -> Int64[np.ndarray, "samples members"]:
            columns = [pc.fill_null(pc.struct_field(table[name], field).cast(pa.int64()), absent).to_numpy() for name in LOCATED]
            return np.stack(columns, axis=1)

        keys, labels, names = (table[name].combine_chunks() for name in ("key", "label", "label_name"))
        others = table["refs_jpg"].combine_chunks() if "refs_jpg" in table.column_names else None
        return cls(keys, labels, names, numbers("offset", 0), numbers("length", -1), numbers("crc32", 0), others)


class ShardReader:
    """Reads any sample of one split of a dataset.

    Args:
        folder: the dataset folder; of a remote dataset, the local one that its tables were brought to.
        split: name of the split.
        open_shards: shards whose index rows and file handle are kept.
        files: where the shards are, if not in that folder.

    Raises:
        InputError: no dataset, no such split, or an index that does not fit `dataset.json`.
    """

    def __init__(self, folder: Path, split: str, open_shards: int = 64, files: LocalShards | None = None) -> None:
        self.folder = folder
        self.split = split
        self.open_shards = open_shards
        self.files = files or LocalShards(folder)
        self.info = read_dataset(folder)
        if split not in self.info.splits:
            raise InputError(f"{folder / 'dataset.json'}: no split `{split}`; it has {', '.join(self.info.splits)}")
        self.shards = self.info.splits[split].shards
        self.counts = self._count_samples()
        self._open: OrderedDict[str, tuple[FileIO, ShardRows]] = OrderedDict()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path, str, int, LocalShards]]:
        # A worker process that is not forked opens its own files.
        return ShardReader, (self.folder, self.split, self.open_shards, self.files)

    def read(self, place: SampleLocation) -> StoredSample:
        """Read and decode all of the sample at a place; its reference is from another photo, the first, where there is one.

        Raises:
            CorruptSample: the shard is missing, or the sample damaged.
        """

        def decode(members: dict[str, bytes], rows: ShardRows) -> StoredSample:
            count = self.info.masks_per_view
            return StoredSample(
                key=rows.keys[place.position].as_py(),
                label=rows.labels[place.position].as_py(),
                label_name=rows.label_names[place.position].as_py(),
                latent=self._latents(members["latent_npy"], place.shard).copy(),
                masked=self._latents(members["masked_npy"], place.shard, count).copy(),
                masks=np.stack(self._masks(members["mask_json"], place.shard, range(count))),
                reference=decode_jpeg(members.get(other_column(1), members["ref_jpg"])),
                view=decode_jpeg(members["view_jpg"]) if "view_jpg" in members else None,
            )

        return self._read(place, (*READ, other_column(1)), decode)

    def read_for_training(
        self,
        place: SampleLocation,
        choose: Callable[[str, int], int],
        outlined: bool = False,
        choose_references: Callable[[str, int], tuple[int, ...]] | None = None,
    ) -> TrainingSample:
        """Read and decode what an item needs of the sample at a place.

        Args:
            place: of the sample.
            choose: (key, K) -> which of the K masks, 0..K-1.
            outlined: whether it needs the object's outline.
            choose_references: (key, references from other photos) -> which are read: 0 is the own crop, n that of ref_n.jpg. By
                default the own one.

        Raises:
            CorruptSample: the shard is missing, or the sample damaged.
        """
        chosen: tuple[int, ...] = (0,)

        def wanted(rows: ShardRows) -> tuple[str, ...]:
            nonlocal chosen
            if choose_references:
                chosen = choose_references(rows.keys[place.position].as_py(), rows.count_others(place.position))
            return (*TRAINED_ON[:-1], *map(other_column, chosen), *(("json",) if outlined else ()))

        def decode(members: dict[str, bytes], rows: ShardRows) -> TrainingSample:
            return self.decode_for_training(members, rows.keys[place.position].as_py(), choose, outlined, chosen, place.shard)

        return self._read(place, wanted, decode)

    def decode_for_training(
        self,
        members: Mapping[str, bytes],
        key: str,
        choose: Callable[[str, int], int],
        outlined: bool = False,
        chosen: tuple[int, ...] = (0,),
        shard: int = 0,
    ) -> TrainingSample:
        """What an item needs, of a sample's members (named as columns of the index; references as `other_column` says).

        They are those of a sample in this shard.

        Raises:
            ValueError: a member is damaged, or does not fit `dataset.json`.
            PhotoError: the reference is damaged.
        """
        count = self.info.masks_per_view
        kind = choose(key, count)
        latent = self._latents(members["latent_npy"], shard)
        masked = self._latents(members["masked_npy"], shard, count)[kind]
        (mask,) = self._masks(members["mask_json"], shard, [kind])
        references = [decode_jpeg(members[other_column(number)]) for number in chosen]
        outlines = []
        for number, reference in zip(chosen, references, strict=True):
            height, width = reference.shape[:2]
            outlines.append(decode_outline(members["json"], height, width, number) if outlined else None)
        more = tuple(zip(references[1:], outlines[1:], strict=True))
        # Copies, because PyTorch wants to be able to write what it reads.
        return TrainingSample(key, latent.copy(), masked.copy(), mask, references[0], outlines[0], more)

    def key(self, place: SampleLocation) -> str:
        """The key of the sample at a place, from the index alone."""
        key: str = self._index_rows(self.shards[place.shard]).keys[place.position].as_py()
        return key

    @property
    def buckets(self) -> list[tuple[int, ...]]:
        """Of each shard the shape of its views, width and height in px; nothing where the dataset has one size."""
        return [self.info.view_shape(name) if self.info.buckets else () for name in self.shards]

    def cells(self, shard: int) -> tuple[int, int]:
        """Rows and columns of the latents in a shard."""
        width, height = self.info.view_shape(self.shards[shard])
        return height // self.info.vae.downsampling, width // self.info.vae.downsampling

    def samples_hash(self) -> str:
        """A hash of the split's shards and how many samples each has: what the order of samples depends on."""
        pairs = [f"{name} {count}" for name, count in zip(self.shards, self.counts, strict=True)]
        return hashlib.sha256("\n".join(pairs).encode()).hexdigest()

    def labels(self) -> list[tuple[SampleLocation, str, str]]:
        """SampleLocation, key and label of every sample of the split; for evaluation, which draws from small splits."""
        found: list[tuple[SampleLocation, str, str]] = []
        for number, name in enumerate(self.shards):
            rows = self._index_rows(name)
            pairs = zip(rows.keys.to_pylist(), rows.labels.to_pylist(), strict=True)
            found += [(SampleLocation(number, position), key, label) for position, (key, label) in enumerate(pairs)]
        return found

    def label_names(self) -> dict[str, str]:
        """What people call each label of the split."""
        names: dict[str, str] = {}
        for shard in self.shards:
            rows = self._index_rows(shard)
            names.update(zip(rows.labels.to_pylist(), rows.label_names.to_pylist(), strict=True))
        return names

    def _read(
        self,
        place: SampleLocation,
        wanted: tuple[str, ...] | Callable[[ShardRows], tuple[str, ...]],
        decode: Callable[[dict[str, bytes], ShardRows], Decoded],
    ) -> Decoded:
        """Fetch the members of a sample, compare their CRC-32, and decode them; whatever is wrong becomes a CorruptSample.

        Members that a shard's rows of the index decide about are asked of them.
        """
        name = self.shards[place.shard]
        try:
            file, rows = self._open_shard(name)
            names = wanted if isinstance(wanted, tuple) else wanted(rows)
            return decode(_fetch(file, rows, place.position, names), rows)
        except UnreadableShard as error:
            raise CorruptSample(str(error), Replaced(name, self.key(place), error.why)) from None
        except (ValueError, EOFError, OSError, PhotoError) as error:
            if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
                raise
            if self.files.renew(name):
                self._open.pop(name)[0].close()
                return self._read(place, wanted, decode)
            key, problem = self.key(place), " ".join(str(error).split())
            raise CorruptSample(
                f"{self.files.where(name)}: sample {key} is damaged ({problem}); delete the shard and run the build again",
                Replaced(name, key, problem),
            ) from error

    def _latents(self, data: bytes, shard: int, *count: int) -> Float16[np.ndarray, "*count stored height width"]:
        """The posteriors in a member, read-only. Raises ValueError where they do not fit `dataset.json`, or are none."""
        vae = self.info.vae
        shape = (*count, vae.stored_channels, *self.cells(shard))
        latents = decode_array(data)
        if latents.dtype != np.float16 or latents.shape != shape:
            raise ValueError(f"an array is {latents.dtype} {list(latents.shape)}, dataset.json says float16 {list(shape)}")
        if problem := latents_problem(latents, means_only=vae.deterministic):
            raise ValueError(problem)
        return latents

    def _masks(self, data: bytes, shard: int, kinds: Iterable[int]) -> list[Bool[np.ndarray, "height width"]]:
        """These of the K masks in a member. Raises ValueError where they do not fit `dataset.json`, or one is empty."""
        counts, height, width = mask_counts(data)
        if len(counts) != self.info.masks_per_view or (width, height) != self.info.view_shape(self.shards[shard]):
            raise ValueError(f"{number_of(len(counts), 'mask')} of {width}x{height} px, which does not fit dataset.json")
        masks = [decode_pixels(counts[kind], height, width) for kind in kinds]
        if not all(mask.any() for mask in masks):
            raise ValueError("a mask is empty")
        return masks

    def _count_samples(self) -> list[int]:
        """Samples of each shard, from the statistics of the index: each of its row groups is one shard."""
        path = self.folder / "index.parquet"
        if not path.is_file():
            raise InputError(f"{path}: the dataset has no index; run the build again, it will finish what is missing")
        with pq.ParquetFile(path) as index:
            if missing := set(INDEX.names) - set(index.schema_arrow.names):
                raise InputError(f"{path}: column {min(missing)} is missing; the index is of another version, build it again")
            # Of millions of samples the table of row groups alone takes a third of a second to read, which no shard needs again.
            self._metadata = index.metadata
        column = INDEX.names.index("shard")
        described = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
        self._groups = {one.column(column).statistics.min: number for number, one in enumerate(described) if one.num_rows}
        sizes = [described[self._groups[name]].num_rows if name in self._groups else 0 for name in self.shards]
        expected = self.info.splits[self.split].samples
        if sum(sizes) != expected:
            raise InputError(
                f"{path}: {sum(sizes)} {noun(sum(sizes), 'samples')} of split `{self.split}`, "
                f"dataset.json says {expected}; run the build again"
            )
        if not expected:
            raise InputError(f"{self.folder}: split `{self.split}` holds no sample; build the dataset from more photos")
        return sizes

    def _index_rows(self, name: str) -> ShardRows:
        path = self.folder / "index.parquet"
        try:
            with pq.ParquetFile(path, metadata=self._metadata) as index:
                rows = index.read_row_group(self._groups[name])
        except (OSError, pa.ArrowException) as error:
            problem = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: cannot be read ({problem}); run the build again") from None
        return ShardRows.of(rows.take(pc.sort_indices(rows["position"])))

    def _open_shard(self, name: str) -> tuple[FileIO, ShardRows]:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= self.open_shards:
            self._open.popitem(last=False)[1][0].close()
        self._open[name] = self.files.open(name), self._index_rows(name)
        return self._open[name]


def _fetch(file: FileIO, rows: ShardRows, position: int, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The members of a sample that are there. Raises ValueError where one is not what was written."""
    columns = zip(
        rows.offsets[position].tolist(), rows.lengths[position].tolist(), rows.checksums[position].tolist(), strict=True
    )
    there = {name: place for name, place in zip(LOCATED, columns, strict=True) if name in wanted and place[1] >= 0}
    if rows.others is not None:
        others = {other_column(number): place for number, place in enumerate(rows.others[position].as_py() or (), start=1)}
        there |= {name: (place["offset"], place["length"], place["crc32"]) for name, place in others.items() if name in wanted}
    # The members are adjacent, so one read fetches them all.
    first = min(offset for offset, _, _ in there.values())
    last = max(offset + length for offset, length, _ in there.values())
    data = memoryview(os.pread(file.fileno(), last - first, first))
    members = {}
    for name, (offset, length, checksum) in there.items():
        members[name] = bytes(data[offset - first : offset - first + length])
        if zlib.crc32(members[name]) != checksum:
            raise ValueError(f"{'.'.join(name.rsplit('_', 1))} is not what was written (CRC-32)")
    return members


def other_column(number: int) -> str:
    """What a reference is called among members: `ref_jpg` is the own crop (0), `ref_1_jpg` that of ref_1.jpg."""
    return other_reference(number).replace(".", "_") if number else "ref_jpg"


def decode_outline(data: bytes, height: int, width: int, number: int = 0) -> Bool[np.ndarray, "{height} {width}"] | None:
    """Which pixels of the reference are the object's, of the bytes of `json`; None where that is not known.

    Args:
        data: the JSON.
        height: of the reference, px.
        width: as well.
        number: which reference: 0 is the own crop, n that of ref_n.jpg.

    Raises:
        ValueError: no JSON object with that field, or the outline is not the reference's.
    """
    try:
        record = json.loads(data)
        counts = record["references"][number - 1]["mask"] if number else record["reference_mask"]
        return None if counts is None else decode_pixels(counts, height, width)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"reference_mask: {error}") from None
