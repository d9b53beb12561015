"""A dataset behind a URL (s3://bucket/dataset): its tables come to a local folder, its shards to a bounded cache on first use.

    <cache>/datasets/<hash of the URL and of dataset.json>/    dataset.json, index.parquet, shard_records.parquet
    <cache>/shards/<SHA-256>.tar                               whole shards, named by what is in them
    <cache>/locks/<name>                                       empty files that processes lock (`flock`)

All processes of a machine share the cache. Of two that want a shard one fetches it, and the other finds it. A shard gets its name
when size and SHA-256 are those of its commit record. Before a fetch the shards that were opened longest ago are removed; who has
one open reads on, as a file that is open outlives its name. A build that changes the dataset writes another dataset.json, and so
other folders and names: what was fetched before is never taken for what is there now.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, NetworkError
from pbe_core.files import write_atomically
from pbe_core.storage import RemoteFolder, public_url
from pbe_train.config import TrainSettings
from pbe_train.data.shards import LocalShards, ShardReader, UnreadableShard

TABLES = ("index.parquet", "shard_records.parquet")
CHUNK_BYTES = 16_000_000
LOCKS = 256
# A network may fail for a moment: seconds before each further attempt at a shard.
PAUSES = (1.0, 5.0, 25.0)
# A worker that has just gone on to other shards may still hold the ones before: windows that are in use at once.
WINDOWS_IN_USE = 3


def open_reader(settings: TrainSettings, split: str) -> ShardReader:
    """A reader of a split of the settings' dataset, a local folder or a URL.

    Raises:
        InputError: there is no such dataset or split, the URL cannot be reached, or the cache is too small.
    """
    loader = settings.loader
    if not settings.dataset_url:
        return ShardReader(settings.dataset, split, 2 * loader.window)
    cache = loader.cache or Path.home() / ".cache" / "paint-by-example"
    folder = fetch_tables(settings.dataset_url, settings.storage, cache)
    contents = _read_records(folder, settings.dataset_url)
    splits = read_dataset(folder).splits
    sizes = sorted((contents[name].bytes for name in (splits[split].shards if split in splits else ())), reverse=True)
    needed, limit = sum(sizes[: WINDOWS_IN_USE * loader.window]), round(loader.cache_gb * 1e9)
    if needed > limit:
        raise InputError(
            f"loader.cache_gb {loader.cache_gb:g} is too small for loader.window {loader.window}: up to {needed / 1e9:.1f} GB of "
            f"shards are in use at once; raise it, or lower the window"
        )
    files = CachedShards(settings.dataset_url, settings.storage, contents, cache, limit)
    return ShardReader(folder, split, 2 * loader.window, files)


def fetch_tables(url: str, storage: Mapping[str, Any], cache: Path) -> Path:
    """Bring a remote dataset's tables to the cache, where they are not there yet; the folder that holds them.

    Raises:
        InputError: the URL cannot be reached, holds no dataset, or the cache cannot be written to.
    """
    remote, shown = RemoteFolder(url, storage), public_url(url)
    try:
        info = remote.read("dataset.json")
        folder = cache / "datasets" / hashlib.sha256(url.rstrip("/").encode() + b"\n" + info).hexdigest()[:16]
        for needed in (folder, cache / "shards", cache / "locks"):
            needed.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            if not (folder / name).is_file():
                remote.download(name, folder / name)
        write_atomically(folder / "dataset.json", info)
    except FileNotFoundError:
        raise InputError(
            f"{shown}: no dataset there, or not all of it (dataset.json, {', '.join(TABLES)}); is the URL right, and the build "
            "finished?"
        ) from None
    except NetworkError as error:
        raise InputError(
            f"{_words(error)}: does it exist, and are credentials set (as its own tools read them, or as options of fsspec: "
            "--storage)?"
        ) from None
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written to ({error.strerror}); give another folder, --loader.cache, or make room in this one"
        ) from None
    return folder


@dataclass(frozen=True)
class ShardContent:
    """What a shard's commit record says of its tar."""

    bytes: int
    sha256: str


class CachedShards(LocalShards):
    """Shards of a remote dataset, fetched whole on first use.

    Args:
        url: of the dataset.
        storage: options of fsspec for it. They go to worker processes through a pipe, and to no file.
        contents: shard -> what it must be.
        cache: folder for all datasets of this machine; it has folders `shards` and `locks`.
        limit: bytes of shards kept there, those that are being fetched included.
    """

    def __init__(
        self, url: str, storage: Mapping[str, Any], contents: Mapping[str, ShardContent], cache: Path, limit: int
    ) -> None:
        super().__init__(cache)
        self.url, self.storage, self.contents, self.limit = url, dict(storage), dict(contents), limit
        # What was found unreadable is not fetched again for each of its samples.
        self._unreadable: dict[str, tuple[str, str]] = {}
        self._renewed: set[str] = set()

    def where(self, shard: str) -> str:
        """As `LocalShards.where`."""
        return f"{public_url(self.url)}/shards/{shard}.tar (here {self.path(shard)})"

    def path(self, shard: str) -> Path:
        """Where a shard is, if it is here."""
        return self.folder / "shards" / f"{self.contents[shard].sha256}.tar"

    def open(self, shard: str) -> FileIO:
        """The tar of a shard, open for reading.

        Raises:
            UnreadableShard: it is not behind the URL, or not what its commit record says.
            InputError: the URL cannot be reached, or the disk is full.
        """
        if shard in self._unreadable:
            raise UnreadableShard(*self._unreadable[shard])
        with contextlib.suppress(FileNotFoundError):
            return self._open_here(shard)
        with self._locked(f"{int(self.contents[shard].sha256, 16) % LOCKS:03d}"):
            with contextlib.suppress(FileNotFoundError):  # Another process has fetched it meanwhile.
                return self._open_here(shard)
            return self._fetch(shard)

    def renew(self, shard: str) -> bool:
        """As `LocalShards.renew`: once for each shard, since then it is the dataset that is damaged."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        self.path(shard).unlink(missing_ok=True)
        return True

    def _open_here(self, shard: str) -> FileIO:
        file = FileIO(self.path(shard))
        now = time.time_ns()  # The kernel's own clock has ticks of milliseconds, and the oldest use goes first.
        os.utime(file.fileno(), ns=(now, now))
        return file

    def _fetch(self, shard: str) -> FileIO:
        """Bring a shard here and open it. For another name, which is overwritten by the next attempt if this one is killed."""
        where = f"{public_url(self.url)}/shards/{shard}.tar"
        part = self.path(shard).with_suffix(".part")
        try:
            for pause in (*PAUSES, None):
                try:
                    problem = self._copy(shard, part)
                    break
                except NetworkError as error:
                    if pause is None:
                        raise InputError(
                            f"{where}: {_words(error)}; once the network is back, the same command goes on"
                        ) from None
                    time.sleep(pause)
            if problem:
                self._unreadable[shard] = f"{where}: {problem}; run the build again, which makes it anew", problem
                raise UnreadableShard(*self._unreadable[shard])
            file = FileIO(part)
            with contextlib.suppress(FileNotFoundError):  # Removed for others, where the cache is far too small for all of them.
                part.replace(self.path(shard))
            return file
        except OSError as error:
            raise InputError(
                f"{part.parent}: {error.strerror} while {where} was fetched; mend that, or give another folder: --loader.cache"
            ) from None
        finally:
            part.unlink(missing_ok=True)

    def _copy(self, shard: str, part: Path) -> str | None:
        """Bring a shard into `part`; returns what is wrong with it."""
        name, content = f"shards/{shard}.tar", self.contents[shard]
        remote, digest = RemoteFolder(self.url, self.storage), hashlib.sha256()
        size = remote.size(name)
        if size is None:
            return "the shard is missing"
        if size != content.bytes:
            return f"the shard has {size:,} bytes, not {content.bytes:,} as written"
        with self._reserved(part, size) as file:
            for start in range(0, size, CHUNK_BYTES):
                data = remote.read(name, start, min(start + CHUNK_BYTES, size))
                digest.update(data)
                file.write(data)
        return None if digest.hexdigest() == content.sha256 else "the shard is not what was written (SHA-256)"

    def _reserved(self, part: Path, size: int) -> BinaryIO:
        """Remove what was opened longest ago, and make a file of this size: others count it, and a full disk is told at once."""
        with self._locked("room"):
            part.unlink(missing_ok=True)
            kept = {}
            for path in part.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):  # A fetch that failed has removed it.
                    kept[path] = path.stat()
            used = sum(stat.st_size for stat in kept.values())
            for path in sorted(kept, key=lambda path: kept[path].st_mtime_ns):
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= kept[path].st_size
            file = part.open("wb")
            os.posix_fallocate(file.fileno(), 0, size)
            return file

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read_records(folder: Path, url: str) -> dict[str, ShardContent]:
    """Shard -> what its commit record says of its tar."""
    columns = pq.read_table(folder / "shard_records.parquet", columns=["shard", "bytes", "sha256"]).to_pydict()
    contents = {
        shard: ShardContent(size, sha256)
        for shard, size, sha256 in zip(columns["shard"], columns["bytes"], columns["sha256"], strict=True)
    }
    for split in read_dataset(folder).splits.values():
        for shard in split.shards:
            if shard not in contents:
                raise InputError(f"{public_url(url)}: shard_records.parquet has no {shard}; run the build again")
    return contents


def _words(error: OSError) -> str:
    return " ".join(str(error).split())[:200]
