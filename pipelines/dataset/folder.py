"""A dataset's folder, here or behind a URL (`upload`): what each of its shards is, and its tables on their way there and back.

    commit record ──fits plan, tar, part of the index──▶ packed | stale | missing
    URL ──fetch_tables──▶ work folder ──select, plan──▶ share_tables ──▶ URL ──▶ the nodes that pack

A shard's commit record is written last, and so are the records of the tables; an old selection.json is removed before new
tables go to a URL. So what has its record is whole. With `upload`, the records and files behind the URL count.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, sweep
from pbe_core.images.decode import PhotoError
from pbe_core.progress import Progress
from pbe_core.storage import RemoteFolder
from pipelines.config import BuildSettings
from pipelines.dataset.samples import OF_PHOTOS
from pipelines.dataset.write_plan import foreign_shards
from pipelines.photos import read_photo

TABLES = ("objects.parquet", "rejects.parquet", "same_photos.parquet", "plan.parquet", "index.parquet")
RECORDS = ("estimate.json", "selection.json", "plan.json", "dataset.json")
Record = dict[str, Any]
_CHUNK = 2**24
_ENDINGS = (".tar", ".index.parquet", ".json")
# The sizes of more files than these come from a listing of all.
_FEW = 30
# Records may list many failed samples, so they are not all in memory at once.
_READ_AT_ONCE = 200
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-[0-9]{6,}")


@dataclass(frozen=True)
class ShardState:
    """What a shard of the plan is."""

    name: Literal["packed", "kept", "stale", "missing"]
    """`packed`: its commit record is of this plan and fits its files, and no sample that failed can be made now. `stale`: the
    same, but a photo that failed, a reference's too, can be used now. `kept`: it was packed again, and would have lost samples
    or references whose photos cannot be used any more, so it is as it was. `missing`: it has no commit record that fits."""
    record: Record | None = None
    """Its commit record without the list of its failed samples."""


class ShardFolder:
    """The folder `shards` of a dataset, wherever it is."""

    def __init__(self, settings: BuildSettings) -> None:
        """Nothing is read yet. Raises InputError where `upload` cannot be opened."""
        self.settings = settings
        self.local = settings.out / "shards"
        self.remote = RemoteFolder(settings.upload, settings.storage) if settings.upload else None
        self.place = f"{self.remote.url}/shards" if self.remote else str(self.local)

    def states(self, planned: Mapping[str, int], fingerprints: Collection[str]) -> dict[str, ShardState]:
        """What each shard is: this one function decides which are packed.

        Args:
            planned: shard -> planned samples.
            fingerprints: of the plans whose shards belong here.
        """
        records = self.read_records(planned, fingerprints)
        return {shard: self._state(shard, samples, records.get(shard)) for shard, samples in planned.items()}

    def _state(self, shard: str, samples: int, record: Record | None) -> ShardState:
        if record is None:
            return ShardState("missing")
        # What failed in a shard before the dataset was extended is planned in another one.
        stale = record["samples"] < samples and photos_came(self.failed_samples(shard), self.settings)
        if record.get("lost_references") and not stale:
            stale = photos_came(self.lost_references(shard), self.settings)
        return ShardState("stale" if stale else "packed", record)

    def state_after(self, shard: str, before: ShardState, error: str, fingerprints: Collection[str]) -> ShardState:
        """What a shard is after it was packed. The commit record decides: a worker may be lost before it answers.

        Args:
            shard: its name.
            before: what it was.
            error: what the worker said went wrong, or nothing.
            fingerprints: as of `states`.
        """
        record = self.read_records([shard], fingerprints).get(shard)
        if record is None or (error and record == before.record):
            return ShardState("missing", record)
        return ShardState("kept" if record == before.record else "packed", record)

    def read_records(self, shards: Collection[str], fingerprints: Collection[str]) -> dict[str, Record]:
        """Shard -> commit record, of those shards whose record is of such a plan and fits their files, without `failed_samples`.

        The tar is known by its size, the part of the index by its hash, or, behind a URL, by its size.
        """
        sizes = self._sizes([f"{shard}{ending}" for shard in shards for ending in _ENDINGS])
        names = [f"{shard}.json" for shard in shards if f"{shard}.json" in sizes]
        found: dict[str, Record] = {}
        for start in range(0, len(names), _READ_AT_ONCE):
            for name, data in self._read_all(names[start : start + _READ_AT_ONCE]).items():
                shard, record = name.removesuffix(".json"), _parse(data)
                if record and _fits(shard, record, fingerprints, sizes):
                    found[shard] = {key: value for key, value in record.items() if key not in ("failed_samples", "lost")}
        return {
            shard: found[shard]
            for shard in shards
            if shard in found and (self.remote or self._sha256(f"{shard}.index.parquet") == found[shard]["index_sha256"])
        }

    def failed_samples(self, shard: str) -> list[dict[str, Any]]:
        """What could not be packed into a shard whose record fits: rows of `schemas.tables.FAILURES` without the shard."""
        return self._list_in(shard, "failed_samples")

    def lost_references(self, shard: str) -> list[dict[str, Any]]:
        """References that could not be cut for samples of a shard whose record fits: `LostReference` with key and split."""
        return self._list_in(shard, "lost")

    def _list_in(self, shard: str, name: str) -> list[dict[str, Any]]:
        record = _parse(self._read_all([f"{shard}.json"])[f"{shard}.json"])
        assert record, "its record was read before"
        listed: list[dict[str, Any]] = record[name]
        return listed

    def packed_keys(self, shard: str) -> frozenset[str]:
        """Keys of the samples that a shard holds, or held when its part of the index was written; none if that is not there.

        They are known without a record: a shard that is packed again must not lose them unseen.
        """
        try:
            data = self._read_part(shard)
            return frozenset(pq.read_table(pa.BufferReader(data), columns=["key"])["key"].to_pylist())
        except (FileNotFoundError, pa.ArrowException):
            return frozenset()

    def sweep(self) -> None:
        """Remove what killed attempts left."""
        sweep(self.local)

    def unplanned(self, planned: Collection[str], fingerprints: Collection[str]) -> list[str]:
        """Shards of this dataset that the plan has no more: they hold no sample, and an extension planned these elsewhere."""
        names = {name.removesuffix(".json") for name in self._sizes() if name.endswith(".json")}
        others = sorted(name for name in names.difference(planned) if _SHARD_NAME.fullmatch(name))
        return [shard for shard, record in self.read_records(others, fingerprints).items() if not record["samples"]]

    def remove(self, shard: str) -> None:
        """Remove a shard's files, its record last: until then it can be told whose they are."""
        for ending in _ENDINGS:
            (self.local / f"{shard}{ending}").unlink(missing_ok=True)
            if self.remote:
                self.remote.remove(f"shards/{shard}{ending}")

    def forget(self, shard: str) -> None:
        """Remove a shard's record: from here on it is missing."""
        (self.local / f"{shard}.json").unlink(missing_ok=True)
        if self.remote:
            self.remote.remove(f"shards/{shard}.json")

    def rehash(self, records: Iterable[Record]) -> dict[str, str]:
        """Read all files of these shards again; shard -> what is wrong, of those that are not what their record says.

        Raises:
            InputError: a file cannot be read, which says nothing about what is in it.
        """
        records, wrong = list(records), {}
        with Progress("verifying shards", sum(record["bytes"] for record in records), "B") as progress:
            for record in records:
                for name, sha256 in _hashes(record):
                    try:
                        if self._sha256(name) != sha256:
                            wrong[record["shard"]] = f"shards/{name} is not what was written (SHA-256)"
                    except FileNotFoundError:
                        wrong[record["shard"]] = f"shards/{name} is not there"
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
            InputError: it is not what its record says; the record is removed, so that the next build packs the shard again.
        """
        name, problem = f"{record['shard']}.index.parquet", "is not what was written (SHA-256)"
        try:
            data = self._read_part(record["shard"])
            if hashlib.sha256(data).hexdigest() == record["index_sha256"]:
                return pq.read_table(pa.BufferReader(data))
        except FileNotFoundError:
            problem = "is not there"
        self.forget(record["shard"])
        raise InputError(f"{self.place}/{name} {problem}; run the build again, which packs this shard anew")

    def publish(self, record: Record) -> None:
        """With `upload`, read a shard's local files again and bring them there, the record last.

        Raises:
            OSError: a file is not what was written, or has not arrived whole.
        """
        if not self.remote:
            return
        for name, sha256 in _hashes(record):
            if file_sha256(self.local / name) != sha256:
                raise OSError(f"{self.local}: {name} on disk is not what was written (SHA-256); is the disk sound?")
        for ending in _ENDINGS:
            self.remote.upload(self.local / f"{record['shard']}{ending}", f"shards/{record['shard']}{ending}")
        for ending in reversed(_ENDINGS):
            (self.local / f"{record['shard']}{ending}").unlink()

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


def photos_came(failed_samples: Iterable[Mapping[str, Any]], settings: BuildSettings) -> bool:
    """Whether a photo that failed when a shard was packed can be used now: it came later, or was replaced."""
    failed = [failure for failure in failed_samples if failure["code"] in OF_PHOTOS]
    photos = {(failure["split"], failure["photo_id"]): failure for failure in failed}
    for photo in photos.values():
        with contextlib.suppress(PhotoError):
            read_photo({**photo, "rotation": None}, settings.source)
            return True
    return False


def fetch_tables(remote: RemoteFolder, work: Path) -> None:
    """Bring what a build starts from: tables and records that are not here, or here as they were.

    Raises:
        InputError: the URL cannot be reached, or holds shards that no build of ours left.
    """
    remote.check(writing=True)
    if remote.sizes("shards") and not remote.read_all(("plan.json", "selection.json")):
        raise InputError(foreign_shards(f"{remote.url}/shards"))
    sizes = remote.sizes()
    here = remote.read_all(name for name in RECORDS if name in sizes)
    same = all(_content(work / name) == here.get(name) for name in RECORDS)
    hashes = _recorded_hashes(here.get("selection.json"))
    if not same:
        for name in RECORDS:  # One that is only here would tell of a dataset that was removed there.
            (work / name).unlink(missing_ok=True)
    for name in (*TABLES, *RECORDS):
        path = work / name
        if name not in sizes:
            continue
        if name in hashes:
            here_already = path.is_file() and file_sha256(path) == hashes[name]
        else:
            here_already = same and path.is_file() and path.stat().st_size == sizes[name]
        if not here_already:
            remote.download(name, path)


def fetch_plan(remote: RemoteFolder, work: Path) -> None:
    """Bring what a node packs from, where it is not here already: the plan that selection.json names.

    Raises:
        OSError: what came is not what is recorded.
    """
    right = _recorded_hashes(remote.read("selection.json"))["plan.parquet"]
    plan = work / "plan.parquet"
    if not (plan.is_file() and file_sha256(plan) == right):
        remote.download(plan.name, plan)
        if file_sha256(plan) != right:
            raise OSError(f"{remote.url}/plan.parquet is not what selection.json says (SHA-256)")


def share_tables(remote: RemoteFolder, work: Path) -> None:
    """Bring the tables of a plan to the URL, where they are not there yet."""
    records = remote.read_all(RECORDS)
    if all(records.get(name) == _content(work / name) for name in ("selection.json", "plan.json")):
        return
    remote.remove("selection.json")
    share(remote, work, (*(name for name in TABLES if name != "index.parquet"), "selection.json", "plan.json"))


def share(remote: RemoteFolder, work: Path, names: Iterable[str]) -> None:
    """Bring files to the URL, in this order, where they are here."""
    for name in names:
        if (work / name).is_file():
            remote.upload(work / name, name)


def _hashes(record: Record) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of a shard's tar and part of the index."""
    yield f"{record['shard']}.tar", record["sha256"]
    yield f"{record['shard']}.index.parquet", record["index_sha256"]


def _parse(data: bytes) -> Record | None:
    try:
        content: Record = json.loads(data)
    except ValueError:
        return None
    return content


def _fits(shard: str, record: Record, fingerprints: Collection[str], sizes: Mapping[str, int]) -> bool:
    try:
        return (
            record["shard"] == shard
            and record["fingerprint"] in fingerprints
            and record["bytes"] == sizes[f"{shard}.tar"]
            and record["index_bytes"] == sizes[f"{shard}.index.parquet"]
        )
    except (KeyError, TypeError):
        return False


def _recorded_hashes(selection: bytes | None) -> dict[str, str]:
    """Table -> SHA-256; none where the record cannot be read, which is told when it is used."""
    try:
        hashes: dict[str, str] = json.loads(selection or b"{}").get("sha256", {})
    except ValueError:
        return {}
    return hashes


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
