"""The plan: which sample goes into which shard, frozen before anything is packed.

    objects ──views──▶ samples ──order by hash of the photo──▶ cut every `shards.samples` ──▶ plan.parquet, plan.json

A sample's place depends on names and settings alone. The fingerprint holds all that determines the shards' bytes; a folder with
another fingerprint is refused, with the difference spelled out.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import selection
from pipelines.annotations import open_images
from pipelines.config import BuildSettings
from schemas.dataset import FORMAT_VERSION, VaeIdentity
from schemas.errors import InputError
from schemas.files import atomic_file, write_atomically
from schemas.randomness import name_hash
from schemas.tables import PLAN, REJECTS

PLAN_RECORD = "plan.json"
# Those that decode, resize, draw and encode.
_LIBRARIES = ("paint-by-example", "diffusers", "numpy", "opencv-python-headless", "pillow", "torch")


def fingerprint(settings: BuildSettings, vae: VaeIdentity) -> dict[str, Any]:
    """What determines the shards' bytes: contents of the annotation files, settings, the VAE's weights, versions of the code.

    Folders' names are not part of it: moving the inputs changes nothing. Nor are the photos, which would have to be read for it:
    a photo is known by its id, and each sample records the SHA-256 of the file that it was cut from.
    """
    folder, splits = settings.source.annotations, settings.source.splits
    class_file = open_images.class_file(folder)
    inputs = [
        *open_images.annotation_files(folder, splits).values(),
        *open_images.metadata_files(folder, splits).values(),
        *([class_file] if class_file else []),
    ]
    chosen = settings.model_dump(mode="json", exclude={"out", "ray"})
    chosen["source"] = {name: chosen["source"][name] for name in ("splits", "max_photo_pixels")}
    del chosen["latents"]["vae"]
    return {
        "format_version": FORMAT_VERSION,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "inputs": {path.name: _file_sha256(path) for path in inputs},
        "vae": vae.sha256,
        "settings": chosen,
    }


def fingerprint_hash(content: dict[str, Any]) -> str:
    """A fingerprint as 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def freeze_plan(settings: BuildSettings, content: dict[str, Any]) -> Path:
    """Make the plan of a dataset folder, or take the one that is there if its fingerprint is the same.

    Writes objects.parquet, rejects.parquet, plan.parquet and, last, plan.json: the fingerprint and the number of boxes read.

    Raises:
        InputError: the folder holds a plan with another fingerprint, or no box is accepted.
    """
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    stored = out / PLAN_RECORD
    if stored.is_file():
        difference = _difference(json.loads(stored.read_text())["fingerprint"], content)
        if difference:
            raise InputError(
                f"{stored}: this folder was planned with other inputs or settings ({'; '.join(difference)}); "
                f"give another --out, or remove the folder"
            )
        return out / "plan.parquet"
    objects, boxes = _read_objects(settings, out)
    with atomic_file(out / "plan.parquet") as temporary, pq.ParquetWriter(temporary, PLAN) as writer:
        planned = plan_samples(objects, settings)
        for _, rows in _shards(planned):
            writer.write_table(rows, row_group_size=len(rows))
    write_atomically(stored, json.dumps({"boxes": boxes, "fingerprint": content}, indent=1).encode())
    return out / "plan.parquet"


def plan_samples(objects: pa.Table, settings: BuildSettings) -> pa.Table:
    """Objects -> rows of the plan, ordered by split, then by a hash of the photo: shards mix classes, a photo is decoded once."""
    samples = pa.concat_tables(
        [
            objects.append_column("view", pa.repeat(pa.scalar(view, pa.int32()), len(objects))).append_column(
                "key", pc.binary_join_element_wise(objects["object_id"], str(view), "_")
            )
            for view in range(settings.views.per_object)
        ]
    )
    photos = samples["photo_id"].combine_chunks().dictionary_encode()
    hashes = np.array([name_hash(settings.seed, "photo order", photo) for photo in photos.dictionary.to_pylist()], np.uint64)
    samples = samples.append_column("order", pa.array(hashes[photos.indices.to_numpy()]))
    samples = samples.sort_by([(name, "ascending") for name in ("split", "order", "object_id", "view")])

    splits = samples["split"].to_numpy(zero_copy_only=False)
    _, first, within = np.unique(splits, return_index=True, return_inverse=True)
    place = np.arange(len(samples)) - first[within]
    number = place // settings.shards.samples
    names = [f"{split}-{shard:06d}" for split, shard in zip(splits, number, strict=True)]
    samples = samples.append_column("shard", pa.array(names, pa.string()))
    samples = samples.append_column("position", pa.array(place % settings.shards.samples, pa.int32()))
    return samples.select(PLAN.names).cast(PLAN)


def planned_shards(plan: Path) -> dict[str, int]:
    """Shard -> number of planned samples; the n-th shard is row group n of the plan. Reads the footer alone."""
    metadata = pq.ParquetFile(plan).metadata
    column = PLAN.get_field_index("shard")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return {group.column(column).statistics.min: group.num_rows for group in groups}


def _read_objects(settings: BuildSettings, out: Path) -> tuple[pa.Table, int]:
    """Read and divide all boxes; writes objects.parquet and rejects.parquet. Returns the objects and the number of boxes read."""
    source = settings.source
    files = open_images.annotation_files(source.annotations, source.splits)
    accepted: list[pa.Table] = [selection.empty_selection().objects]
    with (
        atomic_file(out / "rejects.parquet") as temporary,
        pq.ParquetWriter(temporary, REJECTS) as rejects,
    ):
        boxes = 0
        for split, path in files.items():
            for batch in open_images.read_boxes(path, split):
                boxes += len(batch)
                selected = selection.select(batch, settings.selection)
                accepted.append(selected.objects)
                rejects.write_table(selection.as_rejects(selected.rejects))
        unique = selection.drop_duplicates(pa.concat_tables(accepted))
        rejects.write_table(selection.as_rejects(unique.rejects))
    if not len(unique.objects):
        raise InputError(
            f"{source.annotations}: none of the {boxes} boxes of {', '.join(files)} is accepted; "
            f"see {out / 'rejects.parquet'} for the reasons, and build.selection"
        )
    objects = selection.with_names(unique.objects, open_images.read_class_names(open_images.class_file(source.annotations)))
    objects = selection.as_objects(_with_metadata(objects, settings))
    with atomic_file(out / "objects.parquet") as temporary:
        pq.write_table(objects, temporary)
    return objects, boxes


def _with_metadata(objects: pa.Table, settings: BuildSettings) -> pa.Table:
    """Add url, author and licence of each object's photo where the source has them."""
    files = open_images.metadata_files(settings.source.annotations, settings.source.splits)
    if not files:
        return objects
    photo_ids = objects["photo_id"].combine_chunks().unique()
    joined = objects.join(open_images.read_metadata(list(files.values()), photo_ids), keys="photo_id", join_type="left outer")
    return joined.sort_by([("split", "ascending"), ("object_id", "ascending")])


def _shards(planned: pa.Table) -> list[tuple[str, pa.Table]]:
    names = planned["shard"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
    ends = np.r_[starts[1:], len(names)]
    return [(names[start], planned.slice(start, end - start)) for start, end in zip(starts, ends, strict=True)]


def _difference(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two fingerprints differ, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    if old == new:
        return []
    return [f"{name}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
