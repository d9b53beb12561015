"""Packing: shards of the plan -> tars, parts of the index and commit records, on all nodes of a Ray cluster.

    plan rows ──threads──▶ view, masks, reference ──VAE──▶ latents ──▶ tar (temporary name) ──rename──▶ index part ──▶ record

One shard is one unit of the pool (ray_pool.py); an actor returns what went wrong with it, never pixels. A shard whose actor is
lost goes to another one, so it may be packed twice, which commit records make harmless. The bytes are a function of plan, photos,
settings and VAE: members are sorted, times are 0, every draw goes by names, and batches are fixed by the settings.
"""

import itertools
import json
import math
import traceback
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from jaxtyping import Bool, Float16, Float32, UInt8

from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError, machine_error
from pbe_core.files import TarWriter, atomic_file, file_sha256, write_atomically
from pbe_core.progress import Progress
from pbe_core.sample_codec import Sample, encode_sample, find_problem, jpeg_bytes
from pbe_core.vae import load_vae
from pbe_core.words import noun, number_of
from pipelines.config import BuildSettings, LatentSettings, RaySettings
from pipelines.dataset.folder import Record, ShardFolder, ShardState, fetch_plan
from pipelines.dataset.plan_shards import Plan, PlanRow
from pipelines.dataset.samples import JPEG_QUALITY, Failure, Photos, Prepared, prepare_photo
from pipelines.on_ray import start_ray
from pipelines.ray_pool import actor_options, work_on_ray
from pipelines.threads import in_order
from schemas.dataset import shard_shape
from schemas.sample import MEMBER_NAMES, SampleRecord, other_reference
from schemas.tables import INDEX, REFERENCE_PLACES

# Photos prepared ahead of the encoder: enough to keep it busy, few enough that a shard never stands in memory whole.
PHOTOS_AHEAD = 8
_FEWER = "fewer packing actors need less: lower build.ray.actors, or raise build.ray.cpus_per_actor"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Item = TypeVar("Item")
Location = dict[str, dict[str, int] | None]
"""Member -> offset, length and CRC-32 of its bytes in the tar; null for an optional one that a sample lacks."""


def pack_on_ray(
    settings: BuildSettings, fingerprint: str, numbers: list[int], progress: Progress | None = None
) -> Iterator[tuple[int, str]]:
    """Pack shards on all nodes; yields (number, error or "") as they finish.

    Args:
        settings: of the build.
        fingerprint: of the plan.
        numbers: of the shards, in the order of the plan.
        progress: counts samples; shows those of shards that are not finished.

    Raises:
        InputError: the cluster has not what one actor is to have.
    """
    progress = progress or Progress("packing")
    progress.say("starting Ray")
    start_ray(settings.ray.address)
    actors, gpus = share_out(settings.ray, ray.cluster_resources())
    make = ray.remote(PackingActor).options(**actor_options(settings.ray.cpus_per_actor, gpus))
    device = "cuda" if gpus else "cpu"
    yield from work_on_ray(lambda: make.remote(settings, fingerprint, device), actors, numbers, progress, _FEWER)


def share_out(settings: RaySettings, resources: Mapping[str, float]) -> tuple[int, float]:
    """Number of actors, and GPUs of each, for a cluster's resources (`CPU`, `GPU`).

    Raises:
        InputError: the cluster cannot hold one actor.
    """
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    gpus_each = settings.gpus_per_actor
    if gpus_each is None:
        gpus_each = 1.0 if gpus >= 1 else 0.0
    fitting = int(min(cpus / settings.cpus_per_actor, gpus / gpus_each if gpus_each else math.inf))
    wanted = settings.actors or max(1, fitting)
    if wanted > fitting:
        raise InputError(
            f"{_units(settings.cpus_per_actor, gpus_each)} each for {number_of(wanted, 'packing actor')} do not fit into a Ray "
            f"cluster of {_units(cpus, gpus)}; lower build.ray.actors, cpus_per_actor or gpus_per_actor"
        )
    return wanted, gpus_each


def _units(cpus: float, gpus: float) -> str:
    return f"{cpus:g} {noun(cpus, 'CPUs')} and {gpus:g} {noun(gpus, 'GPUs')}"


class PackingActor:
    """A Ray actor around `ShardPacker`. An unexpected exception fails its shard and is returned as text, not lost."""

    def __init__(self, settings: BuildSettings, fingerprint: str, device: str) -> None:
        self.packer = ShardPacker(settings, fingerprint, device)

    def ready(self) -> None:
        """Returns once the actor has its place and its VAE."""

    def work(self, number: int) -> str:
        """Pack a shard; returns what went wrong, with its traceback where that may help, or nothing."""
        try:
            self.packer.pack(number)
        except InputError as error:
            return str(error)
        except OSError as error:  # A full disk, say: the message has it all.
            return machine_error(error) or traceback.format_exc()
        except Exception:
            return traceback.format_exc()
        return ""

    def done(self) -> float:
        """Samples of the shard at hand that are packed, or have failed."""
        return self.packer.samples_done


class _Keep(Exception):
    """A shard is not to be replaced by what was packed; holds what it is."""

    def __init__(self, state: ShardState) -> None:
        self.state = state


class ShardPacker:
    """Packs shards, one at a time; holds the VAE. Made once per Ray actor, or once in a test."""

    def __init__(self, settings: BuildSettings, fingerprint: str, device: str) -> None:
        self.settings = settings
        self.fingerprint = fingerprint
        self.encoder = load_encoder(settings.latents, device, len(settings.views.shapes))
        self.folder = ShardFolder(settings)
        self.folder.local.mkdir(parents=True, exist_ok=True)
        if self.folder.remote:  # This may be another node than that of the driver, which has put it there.
            fetch_plan(self.folder.remote, settings.out)
        self.plan = Plan(settings.out / "plan.parquet")
        self.samples_done = 0
        """Of the shard at hand, those that failed included."""

    def pack(self, number: int) -> ShardState:
        """Pack the shard of this number in the plan, unless it is packed: its last worker may have died before it answered.

        Returns:
            `packed`; or `kept`, where it lacks samples whose photos came, and would lose others, or references, whose photos are
            gone.

        Raises:
            InputError: there is no such shard, or it is damaged, and photos of samples that were in it are gone.
        """
        shard = list(self.plan.shards)[number]
        rows = self.plan.rows(shard)
        keys_before = self.folder.packed_keys(shard)
        before = self.folder.states({shard: len(rows)}, [self.fingerprint])[shard]
        if before.name == "packed":
            return before
        failures: list[Failure] = []
        self.samples_done = 0
        try:
            with atomic_file(self.folder.local / f"{shard}.tar") as temporary:
                tar, packed = self._write_tar(temporary, rows, failures, shard_shape(shard))
                lost = [failure for failure in failures if failure.key in keys_before]
                self._check_replaced(shard, before, lost, self._loses_references(shard, before, keys_before, packed))
                # From here to the new record this shard is missing.
                self.folder.forget(shard)
        except _Keep as keep:
            return keep.state
        return ShardState("packed", self._record(shard, rows, tar, packed, failures))

    def _write_tar(
        self, path: Path, rows: list[PlanRow], failures: list[Failure], shape: tuple[int, int] | None
    ) -> tuple[TarWriter, list[tuple[SampleRecord, Location]]]:
        """Write all samples that can be made, views of this shape; failures go to the list. Returns records and locations."""
        packed: list[tuple[SampleRecord, Location]] = []
        with path.open("wb") as file:
            tar = TarWriter(file)
            for sample in self._samples(rows, failures, shape):
                packed.append((sample.record, add_sample(tar, sample)))
                self.samples_done = len(packed) + len(failures)
            tar.close()
        return tar, packed

    def _record(
        self,
        shard: str,
        rows: list[PlanRow],
        tar: TarWriter,
        packed: list[tuple[SampleRecord, Location]],
        failures: list[Failure],
    ) -> Record:
        """Write a shard's part of the index and, last, its commit record."""
        index = self.folder.local / f"{shard}.index.parquet"
        paired = "references" in self.plan.columns
        parts = [_index_row(shard, position, *sample) for position, sample in enumerate(packed)]
        with atomic_file(index) as temporary:
            schema = pa.schema([*INDEX, REFERENCE_PLACES], metadata=INDEX.metadata) if paired else INDEX
            pq.write_table(pa.Table.from_pylist(parts, schema=schema), temporary)
        record = {
            "shard": shard,
            "split": rows[0].split,
            "fingerprint": self.fingerprint,
            "planned": len(rows),
            "samples": len(packed),
            "failed": len(failures),
            "bytes": tar.offset,
            "sha256": tar.digest.hexdigest(),
            "index_bytes": index.stat().st_size,
            "index_sha256": file_sha256(index),
            "failures": dict(sorted(Counter(failure.code for failure in failures).items())),
            "masks": dict(sorted(Counter(kind for sample, _ in packed for kind in sample.mask_kinds).items())),
            "padded_views": sum(sample.padded for sample, _ in packed),
            "failed_samples": [vars(failure) for failure in failures],
        }
        if paired:
            record |= count_references([sample for sample, _ in packed])
        write_atomically(self.folder.local / f"{shard}.json", json.dumps(record, indent=1).encode())
        self.folder.publish(record)
        return record

    def _loses_references(
        self, shard: str, before: ShardState, keys_before: frozenset[str], packed: list[tuple[SampleRecord, Location]]
    ) -> bool:
        """Whether a sample that is in the shard would lose a reference that it has there."""
        now = [(sample.key, lost.photo_id) for sample, _ in packed for lost in sample.lost_references]
        if not now or not before.record:
            return False
        known = {(lost["key"], lost["photo_id"]) for lost in self.folder.lost_references(shard)}
        return any(one[0] in keys_before and one not in known for one in now)

    def _check_replaced(self, shard: str, before: ShardState, lost: list[Failure], fewer_references: bool) -> None:
        """Raise `_Keep` where the shard is not to be replaced, InputError where it would lose samples that nothing else has."""
        now: Record | None = self.folder.read_records([shard], [self.fingerprint]).get(shard)
        if now and now != before.record:
            raise _Keep(ShardState("packed", now))  # A worker that was taken for lost has packed it meanwhile.
        if (lost or fewer_references) and now:
            raise _Keep(ShardState("kept", now))
        if lost:
            photos = sorted({failure.photo_id for failure in lost})
            raise InputError(
                f"{shard} held {number_of(len(lost), 'sample')} that cannot be made again, since their photos cannot be used any "
                f"more ({', '.join(photos[:3])}{', ...' if len(photos) > 3 else ''}: {lost[0].code}): put these photos back, or "
                f"remove {self.folder.place}/{shard}.index.parquet to do without the samples"
            )

    def _samples(self, rows: list[PlanRow], failures: list[Failure], shape: tuple[int, int] | None) -> Iterator[Sample]:
        """Finished samples in plan order; failures go to the list."""
        size = samples_per_batch(self.settings.latents.batch_size, self.settings.masks.per_view)
        means_only = self.encoder.means_only
        for batch in _batched(self._prepared(rows, failures, shape), size):
            views, masks = np.stack([sample.view for sample in batch]), np.stack([sample.masks for sample in batch])
            for sample, encoded in zip(batch, self.encoder.encode_samples(views, masks), strict=True):
                kept = sample.record.split in self.settings.views.keep
                view = jpeg_bytes(sample.view, JPEG_QUALITY) if kept else None
                problem = find_problem(sample.record, encoded[0], encoded[1:], sample.masks, means_only=means_only)
                if problem:
                    raise ValueError(
                        f"sample {sample.record.key}: {problem} (latents.precision {self.settings.latents.precision})"
                    )
                yield Sample(sample.record, encoded[0], encoded[1:], sample.masks, sample.reference, view, sample.others)

    def _prepared(self, rows: list[PlanRow], failures: list[Failure], shape: tuple[int, int] | None) -> Iterator[Prepared]:
        photos = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.photo_id)]
        # The encoder has a thread of its own; OpenCV's would only be in the way of these.
        threads = max(1, round(self.settings.ray.cpus_per_actor))
        others = Photos(self.settings)
        cv2.setNumThreads(1)
        with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
            for outcomes in in_order(
                pool, lambda group: prepare_photo(group, self.settings, shape, others), photos, PHOTOS_AHEAD + threads
            ):
                for outcome in outcomes:
                    if isinstance(outcome, Failure):
                        failures.append(outcome)
                    else:
                        yield outcome


def add_sample(tar: TarWriter, sample: Sample) -> Location:
    """Write a sample's members, sorted; returns where each lies, None for the optional ones that it lacks."""
    members = encode_sample(sample)
    places: Location = dict.fromkeys(MEMBER_NAMES)
    for name in sorted(members):
        offset = tar.add(f"{sample.record.key}.{name}", members[name])
        places[name] = {"offset": offset, "length": len(members[name]), "crc32": zlib.crc32(members[name])}
    return places


def _index_row(shard: str, position: int, record: SampleRecord, location: Location) -> dict[str, Any]:
    return {
        "key": record.key,
        "split": record.split,
        "shard": shard,
        "position": position,
        "object_id": record.object_id,
        "label": record.label,
        "label_name": record.label_name,
        **{name.replace(".", "_"): location[name] for name in MEMBER_NAMES},
        "refs_jpg": [location[other_reference(number)] for number in range(1, len(record.references) + 1)],
    }


def count_references(samples: Iterable[SampleRecord]) -> dict[str, Any]:
    """What a commit record says of references from other photos: how many, how many were lost by code, and these with photos."""
    made, lost = 0, []
    for sample in samples:
        made += len(sample.references)
        lost += [{"key": sample.key, "split": sample.split, **each.model_dump()} for each in sample.lost_references]
    codes = dict(sorted(Counter(each["code"] for each in lost).items()))
    return {"references": made, "lost_references": codes, "lost": lost}


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter; unlike `itertools.batched` in Python 3.11 as well."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@dataclass(frozen=True)
class Encoder:
    """A VAE on its device, in its precision.

    A compiled one sees batches of one size alone: torch.compile makes a program for each size, gives up after eight of them, and
    runs later ones uncompiled, so that bytes would depend on what an actor had packed before. With several shapes of views it may
    make one for each of them.
    """

    vae: Autoencoder
    device: torch.device
    dtype: torch.dtype
    threads: int
    batch_size: int | None = None
    """`latents.batch_size`, where the VAE is compiled: fewer samples are filled up to it, and what that gives is dropped."""

    @property
    def means_only(self) -> bool:
        """Whether there are no standard deviations."""
        return self.vae.sizes.deterministic

    def encode_samples(
        self, views: UInt8[np.ndarray, "samples height width 3"], masks: Bool[np.ndarray, "samples masks height width"]
    ) -> Float16[np.ndarray, "samples pictures stored rows columns"]:
        """Posteriors of each view, and of the view under each of its masks, the region set to 0 in [-1, 1] (mid grey).

        What goes to the device are bytes; the pictures are made there.
        """
        torch.set_num_threads(self.threads)
        count = len(views)
        if self.batch_size:
            missing = max(0, samples_per_batch(self.batch_size, masks.shape[1]) - count)
            views, masks = (np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) for part in (views, masks))
        view = torch.from_numpy(views).to(self.device).movedim(-1, 1).to(torch.float32)[:, None] / 127.5 - 1
        kept = ~torch.from_numpy(masks).to(self.device)[:, :, None]
        packed = self.encode(torch.cat([view, view * kept], dim=1).flatten(0, 1))
        return packed.reshape(len(views), 1 + masks.shape[1], *packed.shape[1:])[:count]

    @torch.inference_mode()
    def encode(self, pictures: Float32[torch.Tensor, "batch 3 height width"]) -> Float16[np.ndarray, "batch stored rows columns"]:
        """Posterior of each picture (values in [-1, 1]): mean, then standard deviation (if there is one), unscaled."""
        torch.set_num_threads(self.threads)  # A setting of the calling thread; sums are ordered by it, so the bytes depend on it.
        pixels = pictures.to(self.device, self.dtype, memory_format=torch.channels_last)
        packed: np.ndarray = self.vae.encode(pixels).stacked().to("cpu", torch.float16).numpy()
        return packed


def samples_per_batch(batch_size: int, masks: int) -> int:
    """Samples encoded at once: so many pictures at most, of a view and its masked views each, and one sample at least."""
    return max(1, batch_size // (1 + masks))


def load_encoder(settings: LatentSettings, device: str, shapes: int = 1) -> Encoder:
    """Load the VAE onto a device, `cpu` or `cuda`, for so many shapes of views."""
    dtype = _DTYPES[settings.precision]
    vae = load_vae(settings.vae).to(device, dtype, memory_format=torch.channels_last)
    if settings.compile:
        vae.compile_encoder(shapes)
    return Encoder(vae, torch.device(device), dtype, settings.threads, settings.batch_size if settings.compile else None)
