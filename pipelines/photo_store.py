"""Photos of a photo store, read by its tables: each one checked against the SHA-256 that it was stored with."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pbe_core.storage import RemoteFolder
from pipelines.photo_list import photo_keys
from schemas.outcomes import OK
from schemas.tables import FAILURE_CODES

STORE_RECORD = "store.json"
STORE_VERSION = 1
_TABLES = ("status.parquet", "index.parquet")


def is_store(folder: Path) -> bool:
    """Whether a folder is a photo store."""
    return (folder / STORE_RECORD).is_file()


def check_store(folder: Path, photos_of: str) -> None:
    """Make sure that a store is one that this program reads, of these photos.

    Raises:
        InputError: it is not.
    """
    path = folder / STORE_RECORD
    try:
        content = json.loads(path.read_bytes())
        version, made_for = content["version"], content["photos_of"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; put it back, or give another source.photos") from None
    if version != STORE_VERSION:
        raise InputError(f"{folder}: a photo store of version {version}; this program reads {STORE_VERSION}")
    if made_for != photos_of:
        raise InputError(
            f"{folder}: this photo store holds photos of {made_for}, and the same id may mean another photo in {photos_of}; give "
            f"another --source.photos, or, if the annotations have only been moved, write their new place into {path}"
        )


class PhotoStore:
    """Random access to the photos of a store. Holds about 110 bytes for each photo; threads may share it."""

    def __init__(self, folder: Path, remote: RemoteFolder | None = None) -> None:
        """Read the store's tables.

        Args:
            folder: where the tables are, and the photos.
            remote: where the photos are instead.

        Raises:
            InputError: the store has none, or they are damaged.
        """
        self.folder = folder
        self.remote = remote
        try:
            status = pq.read_table(folder / "status.parquet", columns=["key", "code"])
            index = pq.read_table(folder / "index.parquet", columns=["key", "file", "offset", "length", "sha256"])
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{folder}: this photo store has no tables, or they are damaged ({error}); "
                f"run pipelines/crawl.py again, which makes them"
            ) from None
        self.status_keys = status["key"].to_numpy()
        self.codes = status["code"].combine_chunks()
        self.keys = index["key"].to_numpy()
        self.files = index["file"].combine_chunks()
        self.offsets = index["offset"].to_numpy()
        self.lengths = index["length"].to_numpy()
        self.sha256 = index["sha256"].combine_chunks()

    def read(self, split: str, photo_id: str) -> bytes:
        """A photo's file.

        Raises:
            PhotoError: with the code of its failure, `not_crawled` or `changed`.
        """
        key = photo_keys(pa.table({"split": [split], "photo_id": [photo_id]}))[0]
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise self._failure(key, f"{split}/{photo_id}")
        name = self.files[place].as_py()
        offset, length = int(self.offsets[place]), int(self.lengths[place])
        data = self._read_remote(name, offset, length) if self.remote else self._read_local(name, offset, length)
        if hashlib.sha256(data).hexdigest() != self.sha256[place].as_py():
            raise PhotoError("changed", f"{name}: {split}/{photo_id} is not the photo that was crawled (SHA-256)")
        return data

    def _read_local(self, name: str, offset: int, length: int) -> bytes:
        # A relative name is of a tar in the store, an absolute one of a file that is used where it lies.
        path = self.folder / name
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            detail = f"{path}: {error.strerror}; where files that are used in place were moved, run pipelines/crawl.py --refresh"
            raise PhotoError("changed", detail) from None

    def _read_remote(self, name: str, offset: int, length: int) -> bytes:
        assert self.remote is not None
        if name.startswith("/"):
            detail = f"{name} lies on the machine that crawled it, not in {self.remote.url}; crawl it from a copy"
            raise PhotoError("changed", detail)
        try:
            return self.remote.read(name, offset, offset + length)
        except FileNotFoundError:
            raise PhotoError("changed", f"{self.remote.url}/{name}: not there any more") from None

    def _failure(self, key: np.uint64, name: str) -> PhotoError:
        place = int(np.searchsorted(self.status_keys, key))
        if place == len(self.status_keys) or self.status_keys[place] != key:
            detail = f"{self.folder} has no word of {name}; run pipelines/crawl.py with this build's settings"
            return PhotoError("not_crawled", detail)
        code = self.codes[place].as_py()
        if code == OK:
            return PhotoError("not_crawled", f"{self.folder}: its tables were being made anew; run again")
        return PhotoError(code, FAILURE_CODES[code])


def fetch_store(url: str, options: Mapping[str, Any], folder: Path) -> RemoteFolder:
    """Bring the record and the tables of a store behind a URL here, as far as they are not.

    Raises:
        InputError: there is no such store, or it cannot be reached.
    """
    remote = RemoteFolder(url, options)
    remote.check()
    sizes = remote.sizes()
    for name in (STORE_RECORD, *_TABLES):
        if name not in sizes:
            raise InputError(f"{url}: no photo store, there is no {name}; bring all of a store there, parts/ and tables")
        path = folder / name
        if not path.is_file() or path.stat().st_size != sizes[name]:
            folder.mkdir(parents=True, exist_ok=True)
            remote.download(name, path)
    return remote


def open_photo_store(folder: Path, url: str | None = None, options: Mapping[str, Any] = MappingProxyType({})) -> PhotoStore:
    """The store of a folder, or of a URL with its tables in that folder; read once in each process until its tables change."""
    if url:
        return _opened_remote(folder, url, json.dumps(dict(options), sort_keys=True))
    try:
        changed = (folder / "status.parquet").stat().st_mtime_ns
    except OSError:
        changed = 0
    return _opened(folder, changed)


@functools.lru_cache(maxsize=1)
def _opened_remote(folder: Path, url: str, options: str) -> PhotoStore:
    return PhotoStore(folder, fetch_store(url, json.loads(options), folder))


@functools.lru_cache(maxsize=2)
def _opened(folder: Path, changed: int) -> PhotoStore:
    return PhotoStore(folder)
