"""Photos where they lie: a folder whose files the annotations name, or a photo store, which says where in its tars each one is.

a folder of photos that the annotations name   ──┐
a photo store: status.parquet, index.parquet, tars ──┴─▶ read_photo_bytes
"""

import functools
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt8, UInt64

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError, file_error
from pbe_core.randomness import hash_column
from pbe_core.storage import RemoteFolder
from schemas.outcomes import OK
from schemas.tables import FAILURE_CODES

STORE_RECORD = "store.json"
STORE_VERSION = 1
_TABLES = ("status.parquet", "index.parquet")
_KEYS_AT_ONCE = 1_000_000
_NAME = ["split", "photo_id"]


def read_photo_bytes(
    row: Mapping[str, Any], photos: Path, url: str | None = None, storage: Mapping[str, Any] = MappingProxyType({})
) -> bytes:
    """A photo's file as it is.

    Args:
        row: of the plan, or of another table: split, photo_id, file_name.
        photos: the photo folder or photo store; of a store behind a URL, the folder for its tables.
        url: of that store.
        storage: options of fsspec for it.

    Raises:
        PhotoError: it is not there or cannot be read; of a store, also if it could not be crawled, or is not what was crawled.
    """
    if url or is_store(photos):
        return open_photo_store(photos, url, storage).read(row["split"], row["photo_id"])
    path = photo_path(photos, row["split"], row["photo_id"], row["file_name"])
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(error, path) from None


def photo_path(root: Path, split: str, photo_id: str, file_name: str | None = None) -> Path:
    """Where a photo lies.

    Args:
        root: the photo folder.
        split: of the photo.
        photo_id: for photos that are named by it, as those of Open Images: <root>/<split>/<id>.jpg, or
            <root>/<split>_<first digit of the id>/<id>.jpg.
        file_name: below the root, or below the root's folder of the split, where the source names files.

    Raises:
        PhotoError: with code `missing`, if it is in none of its places; `unreadable`, if one of them cannot be looked at.
    """
    if file_name is not None:
        candidates = list(dict.fromkeys([root / file_name, root / split / file_name]))
    else:
        candidates = [root / split / f"{photo_id}.jpg", root / f"{split}_{photo_id[0]}" / f"{photo_id}.jpg"]
    failure = PhotoError("missing", f"no file {candidates[0]}{''.join(f' (nor {path})' for path in candidates[1:])}")
    for path in candidates:
        # The annotation readers refuse names that lead out of the folder; so do we.
        if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
            continue
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except ValueError:  # A name that no file can have, with a zero byte in it.
            continue
        except OSError as error:
            of_file = file_error(error, path)
            if not isinstance(of_file, PhotoError):
                raise
            if of_file.code != "missing":  # It may still lie in the other place.
                failure = of_file
    raise failure


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
    """Random access to the photos of a store. Holds about 70 bytes for each photo; threads may share it."""

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
            self.sha256 = hash_bytes(index["sha256"])
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors.
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
        if hashlib.sha256(data).digest() != self.sha256[place].tobytes():
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


def hash_bytes(hashes: pa.ChunkedArray) -> UInt8[np.ndarray, "hashes 32"]:
    """SHA-256 from hex digits, of which many would be most of what a table holds.

    Raises:
        ValueError: one is none.
    """
    found = [np.zeros((0, 32), np.uint8)]
    for chunk in hashes.chunks:
        lengths = pc.binary_length(chunk).to_numpy(zero_copy_only=False)
        if not (lengths == 64).all():
            raise ValueError("a SHA-256 in the index is none")
        _, offsets, digits = chunk.buffers()
        start = int(np.frombuffer(offsets, np.int32)[chunk.offset]) if len(chunk) else 0
        text = np.frombuffer(digits or b"", np.uint8)[start : start + 64 * len(chunk)].tobytes()
        found.append(np.frombuffer(bytes.fromhex(text.decode()), np.uint8).reshape(-1, 32))
    return np.concatenate(found)


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


def photo_keys(photos: pa.Table) -> UInt64[np.ndarray, " photos"]:
    """What a photo is known by: a hash of its split and id, the same in every build."""
    keys = [np.zeros(0, np.uint64)]
    # Part by part: the names of all photos of a large store need not stand in one array, which ends at 2 GiB.
    for part in photos.select(list(_NAME)).to_batches(max_chunksize=_KEYS_AT_ONCE):
        split, photo_id = (part.column(name).cast(pa.string()) for name in _NAME)
        keys.append(hash_column(pc.binary_join_element_wise(split, photo_id, "/"), "photo"))
    return np.concatenate(keys)
