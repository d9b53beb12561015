"""Random access to samples: `index.parquet` says where each member lies, `os.pread` fetches it.

Nothing is unpacked and nothing is streamed past: reading a sample costs one read of the bytes from its first to its last member.
Index rows and file handles are kept for the shards in use only.
"""

import os
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float16, UInt8

from pbe_train.data.order import Place
from schemas.dataset import read_dataset
from schemas.errors import InputError
from schemas.photos import PhotoError, decode_photo
from schemas.sample import SampleRecord, decode_array, decode_masks, find_problem
from schemas.tables import INDEX

# Columns of the index whose members are read; `json` tells people where a sample comes from and trains nothing.
READ = ("latent_npy", "masked_npy", "mask_png", "ref_jpg", "view_jpg")


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
    masks: Bool[np.ndarray, "masks size size"]
    reference: UInt8[np.ndarray, "reference_height reference_width 3"]
    view: UInt8[np.ndarray, "size size 3"] | None


class ShardReader:
    """Reads any sample of one split of a dataset.

    Args:
        folder: the dataset folder.
        split: name of the split.
        open_shards: shards whose index rows and file handle are kept.

    Raises:
        InputError: no dataset, no such split, or an index that does not fit `dataset.json`.
    """

    def __init__(self, folder: Path, split: str, open_shards: int = 64) -> None:
        self.folder = folder
        self.split = split
        self.open_shards = open_shards
        self.info = read_dataset(folder)
        if split not in self.info.splits:
            raise InputError(f"{folder / 'dataset.json'}: no split `{split}`; it has {', '.join(self.info.splits)}")
        self.shards = self.info.splits[split].shards
        self.counts, self._row_groups = self._count_samples()
        self._open: OrderedDict[str, tuple[int, pa.Table]] = OrderedDict()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path, str, int]]:
        # A worker process that is not forked opens its own files.
        return ShardReader, (self.folder, self.split, self.open_shards)

    def read(self, place: Place) -> StoredSample:
        """Read and decode the sample at a place.

        Raises:
            InputError: the shard is missing, or the sample damaged.
        """
        name = self.shards[place.shard]
        handle, table = self._open_shard(name)
        row = table.slice(place.position, 1).to_pylist()[0]
        where = f"{self.folder / 'shards' / name}.tar: sample {row['key']}"
        try:
            # The members are adjacent, so one read fetches them all.
            ranges = {member: row[member] for member in READ if row[member]}
            first = min(part["offset"] for part in ranges.values())
            last = max(part["offset"] + part["length"] for part in ranges.values())
            data = os.pread(handle, last - first, first)
            member = {key: data[part["offset"] - first :][: part["length"]] for key, part in ranges.items()}
            for key, part in ranges.items():
                if zlib.crc32(member[key]) != part["crc32"]:
                    raise ValueError(f"{key.replace('_', '.')} is not what was written (CRC-32)")
            latent, masked = decode_array(member["latent_npy"]), decode_array(member["masked_npy"])
            masks = decode_masks(member["mask_png"])
            self._check(latent, masked, masks)
            return StoredSample(
                key=row["key"],
                label=row["label"],
                label_name=row["label_name"],
                latent=latent,
                masked=masked,
                masks=masks,
                reference=decode_photo(member["ref_jpg"], frame="stored"),
                view=decode_photo(member["view_jpg"], frame="stored") if "view_jpg" in member else None,
            )
        except (ValueError, EOFError, PhotoError) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"{where} is damaged ({problem}); delete the shard and run the build again") from error

    def labels(self) -> list[tuple[Place, str, str]]:
        """Place, key and label of every sample of the split; for evaluation, which draws from small splits."""
        rows: list[tuple[Place, str, str]] = []
        for number, name in enumerate(self.shards):
            table = self._index_rows(name)
            pairs = zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)
            rows += [(Place(number, position), key, label) for position, (key, label) in enumerate(pairs)]
        return rows

    def _check(self, latent: np.ndarray, masked: np.ndarray, masks: np.ndarray) -> None:
        vae, size, count = self.info.vae, self.info.view_size, self.info.masks_per_view
        side = size // vae.downsampling
        expected = (2 * vae.latent_channels, side, side)
        found = latent.shape, masked.shape, masks.shape
        if found != (expected, (count, *expected), (count, size, size)):
            raise ValueError(f"latent, masked and masks are {found}, which does not fit dataset.json")
        # The layout's own check of the arrays. Of the record it asks only how many masks there are; `json` itself is not read.
        counted: dict[str, Any] = {"mask_kinds": ("box",) * count, "mask_polygons": ((),) * count}
        problem = find_problem(SampleRecord.model_construct(**counted), latent, masked, masks)
        if problem:
            raise ValueError(problem)

    def _count_samples(self) -> tuple[list[int], dict[str, list[int]]]:
        """Samples of each shard, and the row groups of the index that name it; read one row group at a time."""
        path = self.folder / "index.parquet"
        if not path.is_file():
            raise InputError(f"{path}: the dataset has no index; run the build again, it will finish what is missing")
        counts: Counter[str] = Counter()
        groups: dict[str, list[int]] = {}
        with pq.ParquetFile(path) as index:
            missing = set(INDEX.names) - set(index.schema_arrow.names)
            if missing:
                raise InputError(f"{path}: column {min(missing)} is missing; the index is of another version, build it again")
            for group in range(index.num_row_groups):
                for pair in pc.value_counts(index.read_row_group(group, columns=["shard"])["shard"]).to_pylist():
                    counts[pair["values"]] += pair["counts"]
                    groups.setdefault(pair["values"], []).append(group)
        sizes = [counts[name] for name in self.shards]
        expected = self.info.splits[self.split].samples
        if sum(sizes) != expected:
            raise InputError(
                f"{path}: {sum(sizes)} samples of split `{self.split}`, dataset.json says {expected}; run the build again"
            )
        if not expected:
            raise InputError(f"{self.folder}: split `{self.split}` holds no sample; build the dataset from more photos")
        return sizes, groups

    def _index_rows(self, name: str) -> pa.Table:
        with pq.ParquetFile(self.folder / "index.parquet") as index:
            table = index.read_row_groups(self._row_groups.get(name, []))
        rows = table.filter(pc.equal(table["shard"], name))
        return rows.take(pc.sort_indices(rows["position"]))

    def _open_shard(self, name: str) -> tuple[int, pa.Table]:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self.folder / "shards" / f"{name}.tar"
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise InputError(f"{path}: the shard is missing; run the build again, it makes only what is missing") from None
        if len(self._open) >= self.open_shards:
            _, (old, _) = self._open.popitem(last=False)
            os.close(old)
        self._open[name] = handle, self._index_rows(name)
        return self._open[name]
