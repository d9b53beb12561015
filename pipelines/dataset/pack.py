"""Packing: one planned shard -> one tar, its part of the index, and its commit record.

    plan rows ──threads──▶ view, masks, reference ──VAE──▶ latents ──▶ tar (temporary name) ──rename──▶ index part ──▶ record

A shard is done when its record is there and fits the tar (records.py). The bytes are a function of plan, photos, settings and
VAE: members are sorted, times are 0, every draw goes by names.
"""

import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.files import TarWriter, atomic_file, write_atomically
from pbe_core.sample_codec import Sample, encode_sample, find_problem, jpeg_bytes
from pbe_core.words import number_of
from pipelines.config import BuildSettings
from pipelines.dataset.encode import load_encoder, samples_per_batch
from pipelines.dataset.records import ShardFolder
from pipelines.dataset.samples import Failure, Prepared, Row, prepare_photo
from pipelines.dataset.upload import fetch_plan
from pipelines.dataset.write_plan import accepted_fingerprints
from pipelines.threads import in_order
from schemas.sample import MEMBER_NAMES, SampleRecord
from schemas.tables import INDEX

# Photos prepared ahead of the encoder: enough to keep it busy, few enough that a shard never stands in memory whole.
PHOTOS_AHEAD = 8

Item = TypeVar("Item")


class _Kept(Exception):
    """A shard is not to be replaced by what was packed; holds its record."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record


class ShardPacker:
    """Packs shards, one at a time; holds the VAE. Made once per Ray actor, or once in a test."""

    def __init__(self, settings: BuildSettings, fingerprint: str, device: str) -> None:
        self.settings = settings
        self.fingerprint = fingerprint
        self.encoder = load_encoder(settings.latents, device)
        self.shards = ShardFolder(settings)
        self.shards.local.mkdir(parents=True, exist_ok=True)
        if self.shards.remote:  # This may be another node than that of the driver, which has put them there.
            fetch_plan(self.shards.remote, settings.out)
        self.plan = pq.ParquetFile(settings.out / "plan.parquet")
        self.samples_done = 0
        """Of the shard at hand, those that failed included."""

    def pack(self, group: int) -> dict[str, Any]:
        """Pack row group `group` of the plan and return its commit record.

        A shard that holds all its samples stays as it is, and its record is returned: it is asked for where its worker died, or
        was cut off, before it could tell. So does one of which photos failed, where fewer samples would be left now.

        Raises:
            InputError: there is no such shard, or it is damaged, and photos of samples that were in it are gone.
        """
        rows = self.plan.read_row_group(group).to_pylist()
        shard = rows[0]["shard"]
        folder = self.shards.local
        packed_before = self.shards.packed_keys(shard)
        record_before = self.shards.read_records([shard], [self.fingerprint])
        if record_before and not record_before[shard]["failed"]:
            return record_before[shard]
        failures: list[Failure] = []
        records: list[SampleRecord] = []
        locations: list[Row] = []
        self.samples_done = 0
        try:
            with atomic_file(folder / f"{shard}.tar") as temporary, temporary.open("wb") as file:
                tar = TarWriter(file)
                for sample in self._samples(rows, failures):
                    records.append(sample.record)
                    locations.append(add_sample(tar, sample))
                    self.samples_done = len(records) + len(failures)
                tar.close()
                file.flush()
                record_now = self.shards.read_records([shard], [self.fingerprint])
                if record_now and record_now != record_before:
                    raise _Kept(record_now[shard])  # An attempt that was taken for lost has made it meanwhile.
                lost = [failure for failure in failures if failure.key in packed_before]
                if lost:
                    raise _Kept(self._old_record(shard, lost))
                # From here to the new record this shard is not done.
                self.shards.forget(shard)
        except _Kept as kept:
            return kept.record
        parts = [
            _index_row(shard, place, record, location)
            for place, (record, location) in enumerate(zip(records, locations, strict=True))
        ]
        index = folder / f"{shard}.index.parquet"
        with atomic_file(index) as temporary:
            pq.write_table(pa.Table.from_pylist(parts, schema=INDEX), temporary)
        record = {
            "shard": shard,
            "split": rows[0]["split"],
            "fingerprint": self.fingerprint,
            "planned": len(rows),
            "samples": len(records),
            "failed": len(failures),
            "bytes": tar.offset,
            "sha256": tar.digest.hexdigest(),
            "index_bytes": index.stat().st_size,
            "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
            "failures": dict(sorted(Counter(failure.code for failure in failures).items())),
            "masks": dict(sorted(Counter(kind for sample_record in records for kind in sample_record.mask_kinds).items())),
            "padded_views": sum(sample_record.padded for sample_record in records),
            "failed_samples": [vars(failure) for failure in failures],
        }
        write_atomically(folder / f"{shard}.json", json.dumps(record, indent=1).encode())
        self.shards.publish(record)
        return record

    def _old_record(self, shard: str, lost: list[Failure]) -> dict[str, Any]:
        """The record of a shard that is whole, and is not to be replaced by one that lacks these samples."""
        kept = self.shards.read_records([shard], accepted_fingerprints(self.settings.out))
        if kept:
            return kept[shard]
        photos = sorted({failure.photo_id for failure in lost})
        raise InputError(
            f"{shard} held {number_of(len(lost), 'sample')} that cannot be made again, since their photos cannot be used any "
            f"more ({', '.join(photos[:3])}{', ...' if len(photos) > 3 else ''}: {lost[0].code}): put these photos back, or "
            f"remove {self.shards.place}/{shard}.index.parquet to do without the samples"
        )

    def _samples(self, rows: list[Row], failures: list[Failure]) -> Iterator[Sample]:
        """Finished samples in plan order; failures go to the list."""
        size = samples_per_batch(self.settings.latents.batch_size, self.settings.masks.per_view)
        for batch in _batched(self._prepared(rows, failures), size):
            views, masks = np.stack([sample.view for sample in batch]), np.stack([sample.masks for sample in batch])
            for sample, encoded in zip(batch, self.encoder.encode_samples(views, masks), strict=True):
                kept = sample.record.split in self.settings.views.keep
                view = jpeg_bytes(sample.view, self.settings.references.jpeg_quality) if kept else None
                problem = find_problem(sample.record, encoded[0], encoded[1:], sample.masks)
                if problem:
                    raise ValueError(
                        f"sample {sample.record.key}: {problem} (latents.precision {self.settings.latents.precision})"
                    )
                yield Sample(sample.record, encoded[0], encoded[1:], sample.masks, sample.reference, view)

    def _prepared(self, rows: list[Row], failures: list[Failure]) -> Iterator[Prepared]:
        photos = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["photo_id"])]
        # The encoder has a thread of its own; OpenCV's would only be in the way of these.
        threads = max(1, round(self.settings.ray.cpus_per_actor))
        cv2.setNumThreads(1)
        with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
            for outcomes in in_order(pool, lambda group: prepare_photo(group, self.settings), photos, PHOTOS_AHEAD + threads):
                for outcome in outcomes:
                    if isinstance(outcome, Failure):
                        failures.append(outcome)
                    else:
                        yield outcome


def add_sample(tar: TarWriter, sample: Sample) -> dict[str, dict[str, int] | None]:
    """Write a sample's members, sorted; returns where each lies, None for the optional ones that it lacks."""
    members = encode_sample(sample)
    places: dict[str, dict[str, int] | None] = dict.fromkeys(MEMBER_NAMES)
    for name in sorted(members):
        offset = tar.add(f"{sample.record.key}.{name}", members[name])
        places[name] = {"offset": offset, "length": len(members[name]), "crc32": zlib.crc32(members[name])}
    return places


def _index_row(shard: str, position: int, record: SampleRecord, location: dict[str, Any]) -> Row:
    return {
        "key": record.key,
        "split": record.split,
        "shard": shard,
        "position": position,
        "object_id": record.object_id,
        "label": record.label,
        "label_name": record.label_name,
        **{name.replace(".", "_"): place for name, place in location.items()},
    }


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter; unlike `itertools.batched` in Python 3.11 as well."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
