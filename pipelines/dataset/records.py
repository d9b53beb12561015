"""Commit records of shards: which of them are done. With `upload`, the records and files that count are those behind the URL.

A shard is done when its record is there, was made from this plan, and fits its part of the index and the tar, of the latter by
its size, or, when asked for, by its hash. What is known of a shard stays known when its record is gone: the keys in its part of
the index, which are not to be lost when it is packed again.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, sweep
from pbe_core.images.decode import PhotoError
from pbe_core.progress import Progress
from pbe_core.storage import RemoteFolder
from pipelines.config import BuildSettings
from pipelines.dataset.samples import OF_PHOTOS
from pipelines.photos import read_photo
from schemas.tables import INDEX

Record = dict[str, Any]
_CHUNK = 2**24
_ENDINGS = (".tar", ".index.parquet", ".json")
# Of more files than these, a listing of all is asked for at once.
_FEW = 30
# Records may list many failed samples, so they are not all in memory at once.
_READ_AT_ONCE = 200
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-[0-9]{6,}")


class Damaged(Exception):
    """A file of a shard is not what its commit record says."""


class ShardFolder:
    """The folder `shards` of a dataset, wherever it is."""

    def __init__(self, settings: BuildSettings) -> None:
        """Nothing is read yet. Raises InputError where `upload` cannot be opened."""
        self.local = settings.out / "shards"
        self.remote = RemoteFolder(settings.upload, settings.storage) if settings.upload else None
        self.place = f"{self.remote.url}/shards" if self.remote else str(self.local)

    def read_records(self, shards: Collection[str], fingerprints: Collection[str]) -> dict[str, Record]:
        """Shard -> commit record, of those shards that are done; without the list of its failed samples (`failed_samples`).

        Args:
            shards: names of the planned ones.
            fingerprints: of the plans whose shards belong here.
        """
        sizes = self._sizes([f"{shard}{ending}" for shard in shards for ending in _ENDINGS])
        names = [f"{shard}.json" for shard in shards if f"{shard}.json" in sizes]
        found: dict[str, Record] = {}
        for start in range(0, len(names), _READ_AT_ONCE):
            for name, data in self._read_all(names[start : start + _READ_AT_ONCE]).items():
                shard, record = name.removesuffix(".json"), _parse(data)
                if record and _is_done(shard, record, fingerprints, sizes):
                    found[shard] = {key: value for key, value in record.items() if key != "failed_samples"}
        done = {shard: found[shard] for shard in shards if shard in found}
        if self.remote:  # Reading them all would take long; sealing looks at them anyway.
            return done
        return {
            shard: record for shard, record in done.items() if self._sha256(f"{shard}.index.parquet") == record["index_sha256"]
        }

    def failed_samples(self, shard: str) -> list[dict[str, Any]]:
        """What could not be packed into a shard that is done: rows of `schemas.tables.FAILURES` without the shard."""
        record = _parse(self._read_all([f"{shard}.json"])[f"{shard}.json"])
        assert record, "its record was read before"
        failed: list[dict[str, Any]] = record["failed_samples"]
        return failed

    def packed_keys(self, shard: str) -> frozenset[str]:
        """Keys of the samples that a shard holds, or held when its part of the index was written; none if that is not there."""
        try:
            data = self._read_part(shard)
            return frozenset(pq.read_table(pa.BufferReader(data), columns=["key"])["key"].to_pylist())
        except (FileNotFoundError, pa.ArrowException):
            return frozenset()

    def sweep(self) -> None:
        """Remove what attempts left that were killed."""
        sweep(self.local)

    def unplanned(self, planned: Collection[str], fingerprints: Collection[str]) -> list[str]:
        """Shards of this dataset that the plan has no more: nothing could be packed into them, and an extension planned it
        elsewhere. Files of anybody else are not among them.
        """
        names = {name.removesuffix(".json") for name in self._sizes() if name.endswith(".json")}
        others = sorted(name for name in names.difference(planned) if _SHARD_NAME.fullmatch(name))
        return [shard for shard, record in self.read_records(others, fingerprints).items() if not record["samples"]]

    def remove(self, shard: str) -> None:
        """Remove a shard's files, its record last: until then it can be told whose they are."""
        for ending in _ENDINGS:
            (self.local / f"{shard}{ending}").unlink(missing_ok=True)
            if self.remote:
                self.remote.remove(f"shards/{shard}{ending}")

    def rehash(self, records: Mapping[str, Record]) -> dict[str, str]:
        """Read all files of these shards again; shard -> what is wrong, of those that are not what their record says.

        Raises:
            InputError: a file cannot be read, which says nothing about what is in it.
        """
        wrong = {}
        total = sum(record["bytes"] for record in records.values())
        with Progress("verifying shards", total, "B") as progress:
            for shard, record in records.items():
                for name, sha256 in ((f"{shard}.tar", record["sha256"]), (f"{shard}.index.parquet", record["index_sha256"])):
                    try:
                        if self._sha256(name) != sha256:
                            wrong[shard] = f"shards/{name} is not what was written (SHA-256)"
                    except FileNotFoundError:
                        wrong[shard] = f"shards/{name} is not there"
                    except OSError as error:
                        raise InputError(
                            f"{self.place}/{name}: cannot be read ({error}); nothing was changed: mend that and run this again, "
                            f"or remove this file to have its shard made again"
                        ) from None
                progress.update(record["bytes"])
        return wrong

    def index_part(self, record: Record) -> pa.Table:
        """A shard's part of the index.

        Raises:
            Damaged: it is not what its record says.
        """
        try:
            data = self._read_part(record["shard"])
        except FileNotFoundError:
            raise Damaged(f"shards/{record['shard']}.index.parquet is not there") from None
        if hashlib.sha256(data).hexdigest() != record["index_sha256"]:
            raise Damaged(f"shards/{record['shard']}.index.parquet is not what was written (SHA-256)")
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

    def _read_part(self, shard: str) -> bytes:
        name = f"{shard}.index.parquet"
        return self.remote.read(f"shards/{name}") if self.remote else (self.local / name).read_bytes()

    def _sha256(self, name: str) -> str:
        if not self.remote:
            return file_sha256(self.local / name)
        digest, size = hashlib.sha256(), self.remote.size(f"shards/{name}") or 0
        for start in range(0, size, _CHUNK):
            digest.update(self.remote.read(f"shards/{name}", start, min(start + _CHUNK, size)))
        return digest.hexdigest()


def can_be_mended(failed_samples: Iterable[Mapping[str, Any]], settings: BuildSettings) -> bool:
    """Whether a photo that failed when a shard was packed can be used now: it came later, or was replaced."""
    failed = [failure for failure in failed_samples if failure["code"] in OF_PHOTOS]
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
        if file_sha256(folder / name) != sha256:
            return f"{name} on disk is not what was written (SHA-256); is the disk sound?"
    return None
