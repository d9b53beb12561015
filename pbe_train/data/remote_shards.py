"""A dataset behind a URL (s3://bucket/dataset): its tables come to a local folder, its shards to a bounded cache on first use.

    <cache>/datasets/<hash of the URL>/<hash of dataset.json>/    dataset.json, index.parquet, shard_records.parquet
    <cache>/shards/<SHA-256>.tar                                  whole shards, named by what is in them
    <cache>/locks/<name>                                          empty files that processes lock

All processes of a machine share the cache, and need no word with one another but for locks of the system (`flock`), which end
with the process that holds them, however it ends:

    read     a shared lock on the shard itself, as long as it is open
    fetch    a lock on one of 256 names: of two that want a shard one fetches it, and the other finds it
    evict    one at a time, oldest use first; a shard that is locked is in use and stays

A shard is fetched under another name, to its full size from the start, so that what others are fetching counts as well and a full
disk is told at once; it gets its own name when size and SHA-256 are those of its commit record. A build that changes the dataset
writes another dataset.json, and so other folders and names: what was fetched before is never taken for what is there now.
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
from typing import Any

import pyarrow.parquet as pq
import tenacity

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, NetworkError
from pbe_core.files import file_sha256, sync, write_atomically
from pbe_core.storage import RemoteFolder, public_url
from pbe_train.config import TrainSettings
from pbe_train.data.shards import ShardFiles, ShardReader, UnreadableShard

TABLES = ("index.parquet", "shard_records.parquet")
CHUNK_BYTES = 16_000_000
LOCKS = 256
# A network may fail for a moment: seconds before each further attempt at a shard.
PAUSES = (1.0, 5.0, 25.0)
# A worker that has just gone on to other shards may still hold the ones before: windows that are in use at once.
WINDOWS_IN_USE = 3


# How long to wait for other processes where they have the whole cache in use.
PATIENCE_SECONDS = 60.0


class NoRoom(InputError):
    """The cache is full of shards that are in use."""


@dataclass(frozen=True)
class ShardContent:
    """What a shard's commit record says of its tar."""

    bytes: int
    sha256: str


class CachedShards:
    """Shards of a remote dataset, fetched whole on first use (`ShardFiles`).

    Args:
        url: of the dataset.
        storage: options of fsspec for it. They go to worker processes through a pipe, and to no file.
        contents: shard -> what it must be.
        cache: folder for all datasets of this machine.
        limit: bytes of shards kept there.
    """

    def __init__(
        self, url: str, storage: Mapping[str, Any], contents: Mapping[str, ShardContent], cache: Path, limit: int
    ) -> None:
        self.url = url
        self.storage = dict(storage)
        self.contents = dict(contents)
        self.cache = ShardCache(cache, limit)
        # What was found unreadable is not fetched again for each of its samples.
        self._unreadable: dict[str, tuple[str, str]] = {}
        self._renewed: set[str] = set()

    def where(self, shard: str) -> str:
        """As `ShardFiles.where`."""
        return f"{public_url(self.url)}/shards/{shard}.tar (here {self.cache.path(self.contents[shard])})"

    def open(self, shard: str) -> FileIO:
        """The tar of a shard, open for reading and locked against eviction until it is closed.

        Raises:
            UnreadableShard: it is not behind the URL, or not what its commit record says.
            InputError: the URL cannot be reached, or the cache has no room.
        """
        content = self.contents[shard]
        if shard in self._unreadable:
            raise UnreadableShard(*self._unreadable[shard])
        while True:
            file = self.cache.open(content)
            if file:
                return file
            with self.cache.fetching(content) as part:
                if part:
                    self._fetch(shard, content, part)

    def renew(self, shard: str, file: FileIO) -> bool:
        """As `ShardFiles.renew`: once for each shard, since the check reads all of it."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        return self.cache.drop_if_damaged(self.contents[shard], file)

    def _fetch(self, shard: str, content: ShardContent, part: Path) -> None:
        name = f"shards/{shard}.tar"
        where = f"{public_url(self.url)}/{name}"
        for pause in (*PAUSES, None):
            try:
                problem = self._copy(name, content, part)
                break
            except NetworkError as error:
                if pause is None:
                    raise InputError(f"{where}: {_words(error)}; once the network is back, the same command goes on") from None
                time.sleep(pause)
            except OSError as error:
                raise InputError(
                    f"{self.cache.shards}: {error.strerror} while {where} was fetched; mend that, or give another folder: "
                    "--loader.cache"
                ) from None
        if problem:
            self._unreadable[shard] = f"{where}: {problem}; run the build again, which makes it anew", problem
            raise UnreadableShard(*self._unreadable[shard])

    def _copy(self, name: str, content: ShardContent, part: Path) -> str | None:
        """Bring a shard into `part`; returns what is wrong with it."""
        remote, digest = RemoteFolder(self.url, self.storage), hashlib.sha256()
        size = remote.size(name)
        if size is None:
            return "the shard is missing"
        if size != content.bytes:
            return f"the shard has {size:,} bytes, not {content.bytes:,} as written"
        with part.open("r+b") as file:
            for start in range(0, size, CHUNK_BYTES):
                data = remote.read(name, start, min(start + CHUNK_BYTES, size))
                digest.update(data)
                file.write(data)
        return None if digest.hexdigest() == content.sha256 else "the shard is not what was written (SHA-256)"


class ShardCache:
    """The shards that are kept on this machine.

    Args:
        folder: the cache; it has folders `shards` and `locks`.
        limit: bytes of all shards together, those that are being fetched included.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.shards = folder / "shards"

    def open(self, content: ShardContent) -> FileIO | None:
        """A shard, locked against eviction; None where it is not here."""
        while True:
            try:
                file = FileIO(self.path(content))
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:
                now = time.time_ns()  # The kernel's own clock has ticks of milliseconds.
                os.utime(file.fileno(), ns=(now, now))  # The oldest use goes first.
                return file
            file.close()  # Evicted after it was opened and before it was locked.

    def drop_if_damaged(self, content: ShardContent, file: FileIO) -> bool:
        """Remove a shard, open as `file`, that is not what was fetched any more; who has it open keeps it. False: it is sound."""
        path = self.path(content)
        try:
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return True  # Another process has found it out, and fetched it anew.
            sound = file_sha256(path) == content.sha256
        except FileNotFoundError:  # Or is about to.
            return True
        except OSError:  # The disk cannot read it.
            sound = False
        if not sound:
            with self._locked("room"):
                path.unlink(missing_ok=True)
        return not sound

    @contextlib.contextmanager
    def fetching(self, content: ShardContent) -> Iterator[Path | None]:
        """Hold the right to fetch a shard. Yields a file of its size to fill; it becomes the shard if the block ends well.

        Yields None where another process has brought the shard meanwhile.

        Raises:
            InputError: there is no room for it.
        """
        with self._locked(f"{int(content.sha256, 16) % LOCKS:03d}"):
            path = self.path(content)
            if path.exists():
                yield None
                return
            part = self.shards / f".{content.sha256}.part"
            self._reserve_in_the_end(part, content.bytes)
            try:
                yield part
                sync(part)
                with self._locked("room"):  # While room is made, no shard has two names, or none.
                    part.replace(path)
                sync(self.shards)
            finally:
                part.unlink(missing_ok=True)

    def _reserve_in_the_end(self, part: Path, size: int) -> None:
        """As `_reserve`; where other processes have all in use, it waits for them."""
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(NoRoom),
            stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
            wait=tenacity.wait_fixed(PATIENCE_SECONDS / 30),
            reraise=True,
        ):
            with attempt:
                self._reserve(part, size)

    def _reserve(self, part: Path, size: int) -> None:
        """Make room, and a file of this size."""
        with self._locked("room"):
            part.unlink(missing_ok=True)
            kept = {}
            for path in self.shards.iterdir():
                with contextlib.suppress(FileNotFoundError):  # What a fetch that failed had left.
                    kept[path] = path.stat()
            used = sum(stat.st_size for stat in kept.values())
            for path in sorted(kept, key=lambda path: kept[path].st_mtime_ns):
                if used + size <= self.limit:
                    break
                if self._remove(path):
                    used -= kept[path].st_size
            if used + size > self.limit:
                raise NoRoom(
                    f"{self.shards}: no room for a shard of {size / 1e9:.2f} GB, since {used / 1e9:.2f} of "
                    f"{self.limit / 1e9:.2f} GB are in use; raise loader.cache_gb, or lower loader.window"
                )
            with part.open("wb") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    part.unlink()
                    raise InputError(
                        f"{self.shards}: {error.strerror}, {size / 1e9:.2f} GB are needed; make room, or give another folder: "
                        "--loader.cache"
                    ) from None

    def _remove(self, path: Path) -> bool:
        """Remove a shard that nobody has open, or what a fetch left that was killed; False where it is in use."""
        if path.suffix == ".part":
            try:
                with self._locked(f"{int(path.name.split('.')[1], 16) % LOCKS:03d}", wait=False):
                    path.unlink(missing_ok=True)
            except BlockingIOError:
                return False
            return True
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink()
        return True

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """Hold a lock of this cache. Raises BlockingIOError where another has it and `wait` is false."""
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    def path(self, content: ShardContent) -> Path:
        """Where a shard is, if it is here."""
        return self.shards / f"{content.sha256}.tar"


def open_reader(settings: TrainSettings, split: str | None = None) -> ShardReader:
    """A reader of the settings' dataset, a local folder or a URL.

    Args:
        settings: of the run.
        split: another one than the training's.

    Raises:
        InputError: there is no such dataset or split, the URL cannot be reached, or the cache is too small.
    """
    split, loader = split or settings.split, settings.loader
    if not settings.dataset_url:
        return ShardReader(settings.dataset, split, 2 * loader.window)
    cache = loader.cache or Path.home() / ".cache" / "paint-by-example"
    folder = fetch_tables(settings.dataset_url, settings.storage, cache)
    shards = read_dataset(folder).splits
    contents = _read_records(folder, settings.dataset_url)
    limit = round(loader.cache_gb * 1e9)
    sizes = sorted((contents[name].bytes for name in (shards[split].shards if split in shards else ())), reverse=True)
    needed = sum(sizes[: WINDOWS_IN_USE * loader.window])
    if needed > limit:
        raise InputError(
            f"loader.cache_gb {loader.cache_gb:g} is too small for loader.window {loader.window}: up to {needed / 1e9:.1f} GB of "
            f"shards are in use at once; raise it, or lower the window"
        )
    files: ShardFiles = CachedShards(settings.dataset_url, settings.storage, contents, cache, limit)
    return ShardReader(folder, split, 2 * loader.window, files)


def fetch_tables(url: str, storage: Mapping[str, Any], cache: Path) -> Path:
    """Bring a remote dataset's tables to the cache, where they are not there yet; the folder that holds them.

    Raises:
        InputError: the URL cannot be reached, holds no dataset, or the cache cannot be written to.
    """
    remote, shown = RemoteFolder(url, storage), public_url(url)
    try:
        info = remote.read("dataset.json")
        home = cache / "datasets" / _short_hash(url.rstrip("/").encode())
        folder = home / _short_hash(info)
        for needed in (folder, cache / "shards", cache / "locks"):
            needed.mkdir(parents=True, exist_ok=True)
        with (home / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in TABLES:
                if not (folder / name).is_file():
                    remote.download(name, folder / name)
            if not (folder / "dataset.json").is_file():
                write_atomically(folder / "dataset.json", info)  # Last: it says that the others are there.
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


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _words(error: OSError) -> str:
    return " ".join(str(error).split())[:200]
