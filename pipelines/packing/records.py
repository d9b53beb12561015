"""Commit records of shards: which of them are done. With `upload`, the records and files that count are those behind the URL.

A shard is done when its record is there, was made from this plan, and fits its part of the index and the tar, of the latter by
its size, or, when asked for, by its hash.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.config import BuildSettings
from pipelines.packing.samples import OF_PHOTOS
from pipelines.photo_folder import read_photo
from schemas.photos import PhotoError
from schemas.remote import RemoteFolder
from schemas.tables import INDEX

Record = dict[str, Any]
_CHUNK = 2**24
_ENDINGS = (".tar", ".index.parquet", ".json")
# Of more files than these, a listing of all is asked for at once.
_FEW = 30


class ShardFolder:
    """The folder `shards` of a dataset, wherever it is."""

    def __init__(self, settings: BuildSettings) -> None:
        """Nothing is read yet. Raises InputError where `upload` cannot be opened."""
        self.local = settings.out / "shards"
        self.remote = RemoteFolder(settings.upload, settings.storage) if settings.upload else None

    def read_records(self, shards: Collection[str], fingerprints: Collection[str]) -> dict[str, Record]:
        """Shard -> commit record, of those shards that are done.

        Args:
            shards: names of the planned ones.
            fingerprints: of the plans whose shards belong here.
        """
        sizes = self._sizes([f"{shard}{ending}" for shard in shards for ending in _ENDINGS])
        names = [f"{shard}.json" for shard in shards if f"{shard}.json" in sizes]
        found = {name.removesuffix(".json"): _parse(data) for name, data in self._read_all(names).items()}
        done = {
            shard: record for shard in shards if (record := found.get(shard)) and _is_done(shard, record, fingerprints, sizes)
        }
        if self.remote:  # Reading them all would take long; sealing looks at them anyway.
            return done
        return {
            shard: record for shard, record in done.items() if self._sha256(f"{shard}.index.parquet") == record["index_sha256"]
        }

    def sweep(self) -> None:
        """Remove what attempts left that were killed. One that is still at it would fail, and be tried again."""
        for leftover in self.local.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def remove_unplanned(self, planned: Collection[str]) -> None:
        """Remove shards that the plan has no more: nothing could be packed into them, and an extension planned it elsewhere."""
        for name in self._sizes():
            shard = name.partition(".")[0]
            if name.removeprefix(shard) in _ENDINGS and shard not in planned and shard != "sizes":
                (self.local / name).unlink(missing_ok=True)
                if self.remote:
                    self.remote.remove(f"shards/{name}")

    def rehash(self, records: Mapping[str, Record]) -> dict[str, str]:
        """Read all files of these shards again; shard -> what is wrong, of those that are not what their record says."""
        wrong = {}
        total = sum(record["bytes"] for record in records.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="verifying shards", smoothing=0.1) as progress:
            for shard, record in records.items():
                for name, sha256 in ((f"{shard}.tar", record["sha256"]), (f"{shard}.index.parquet", record["index_sha256"])):
                    try:
                        if self._sha256(name) != sha256:
                            wrong[shard] = f"shards/{name} is not what was written (SHA-256)"
                    except OSError as error:
                        wrong[shard] = f"shards/{name} cannot be read ({error})"
                progress.update(record["bytes"])
        return wrong

    def index_part(self, record: Record) -> pa.Table:
        """A shard's part of the index.

        Raises:
            OSError: it is not what its record says.
        """
        name = f"{record['shard']}.index.parquet"
        data = self.remote.read(f"shards/{name}") if self.remote else (self.local / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != record["index_sha256"]:
            raise OSError(f"shards/{name} is not what was written (SHA-256)")
        return pq.read_table(pa.BufferReader(data), schema=INDEX)

    def forget(self, shard: str) -> None:
        """Remove a shard's record: from here on it is not done."""
        (self.local / f"{shard}.json").unlink(missing_ok=True)
        if self.remote:
            self.remote.remove(f"shards/{shard}.json")

    def publish(self, record: Record) -> None:
        """Make sure that a shard's local files are what was written; with `upload`, bring them there, the record last.

        Raises:
            OSError: a file is not what was written, or has not arrived whole.
        """
        if not self.remote:
            return
        shard = record["shard"]
        wrong = _local_files(self.local, record)
        if wrong:
            raise OSError(f"{self.local}: {wrong}")
        for ending in _ENDINGS:  # The record last.
            self.remote.upload(self.local / f"{shard}{ending}", f"shards/{shard}{ending}")
        for ending in reversed(_ENDINGS):
            (self.local / f"{shard}{ending}").unlink()

    def _sizes(self, names: Collection[str] | None = None) -> dict[str, int]:
        """Name -> bytes of all files that are there, or of these."""
        if self.remote and (names is None or len(names) > _FEW):
            return {name.removeprefix("shards/"): size for name, size in self.remote.sizes("shards").items()}
        if self.remote:
            sizes = {name: self.remote.size(f"shards/{name}") for name in names or ()}
            return {name: size for name, size in sizes.items() if size is not None}
        found = {}
        for name in os.listdir(self.local) if names is None else names:
            with contextlib.suppress(FileNotFoundError):  # Never there, or of an attempt that has just ended.
                found[name] = (self.local / name).stat().st_size
        return found

    def _read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        if self.remote:
            found = self.remote.read_all(f"shards/{name}" for name in names)
            return {name.removeprefix("shards/"): data for name, data in found.items()}
        return {name: (self.local / name).read_bytes() for name in names}

    def _sha256(self, name: str) -> str:
        if not self.remote:
            with (self.local / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest, size = hashlib.sha256(), self.remote.size(f"shards/{name}") or 0
        for start in range(0, size, _CHUNK):
            digest.update(self.remote.read(f"shards/{name}", start, min(start + _CHUNK, size)))
        return digest.hexdigest()


def can_be_mended(record: Record, settings: BuildSettings) -> bool:
    """Whether a photo that failed when this shard was packed can be used now: it came later, or was replaced."""
    failed = [failure for failure in record["failed_samples"] if failure["code"] in OF_PHOTOS]
    photos = {(failure["split"], failure["photo_id"]): failure for failure in failed}
    for photo in photos.values():
        try:
            read_photo({**photo, "rotation": None}, settings.source)
        except PhotoError:
            continue
        return True
    return False


def _parse(data: bytes) -> Record | None:
    try:
        content: Record = json.loads(data)
    except ValueError:
        return None
    return content


def _is_done(shard: str, record: Record, fingerprints: Collection[str], sizes: Mapping[str, int]) -> bool:
    try:
        return (
            record["shard"] == shard
            and record["fingerprint"] in fingerprints
            and record["bytes"] == sizes[f"{shard}.tar"]
            and record["index_bytes"] == sizes[f"{shard}.index.parquet"]
        )
    except (KeyError, TypeError):
        return False


def _local_files(folder: Path, record: Record) -> str | None:
    """What is wrong with the files of a shard as they lie on disk."""
    for name, sha256 in (
        (f"{record['shard']}.tar", record["sha256"]),
        (f"{record['shard']}.index.parquet", record["index_sha256"]),
    ):
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return f"{name} on disk is not what was written (SHA-256); is the disk sound?"
    return None
