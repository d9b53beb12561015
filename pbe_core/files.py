"""Files that are either whole or not there: written beside, synced, renamed; and what killed writers left is swept away.

    folder/.NAME.<mark>.tmp, locked by who writes it ──sync──▶ rename ──▶ folder/NAME

The lock (`flock`) dies with the process, however that dies. So a temporary file that nobody has locked is of a dead attempt,
whatever machine, container or program that was on, and `sweep` takes it away. `TarWriter` writes tars whose bytes depend on their
content alone.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pbe_core.errors import InputError

# Where a file system has no locks, only its age tells whether somebody may still be writing.
_LONGEST_SILENCE_SECONDS = 24 * 3600
_TAR_BLOCK = 512

_ours: dict[Path, int] = {}
"""What this process is writing -> the descriptor that holds its lock. Some network file systems grant a process its own again."""


def _let_go() -> None:
    """A fork holds no lock of its parent: orphans of one that was killed must not keep its files."""
    for descriptor in _ours.values():
        os.close(descriptor)
    _ours.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write `path` so that a crash at any moment leaves the old file, or none, but never a part.

    Yields a temporary name in the same folder, its own for each attempt, so that two writers at once do no harm: the last rename
    wins. On success the file is synced and renamed and the folder synced; on an exception the temporary file is removed. What
    attempts at the same file left that were killed is removed first.
    """
    sweep(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with _locked(temporary, os.O_RDWR | os.O_CREAT):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder `.NAME.<mark>.tmp` for what is needed within the block alone; `sweep` removes those of killed attempts."""
    folder = parent / f".{name}.{uuid.uuid4().hex}.tmp"
    with _locked(folder, os.O_RDONLY | os.O_DIRECTORY):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files and folders of attempts that were killed; those that somebody is writing stay.

    Args:
        folder: where they are; it need not be there.
        name: of one file or folder whose attempts they are; all by default.

    Where the file system has no locks, what has not changed for a day is removed. Where locks are of each machine's own (Lustre
    with `localflock`), an attempt on another machine may lose its file; it fails then, and is tried again.
    """
    ours = re.compile(rf"\.{re.escape(name) if name else '.+'}\.[0-9a-f]{{32}}\.tmp")  # Nothing of anybody else's.
    try:
        found = [entry.name for entry in os.scandir(folder) if ours.fullmatch(entry.name)]
    except OSError:  # Not there, or not to be looked at: who writes there says so.
        return
    for leftover in found:
        if folder / leftover not in _ours:
            _remove_if_dead(folder / leftover)


def _remove_if_dead(path: Path) -> None:
    """Remove a temporary file or folder that nobody is writing any more."""
    try:
        # NFS locks only what is open for writing, and a folder cannot be.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # It has just got its name, say.
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = True
    except (BlockingIOError, PermissionError):
        dead = False
    except OSError:
        dead = time.time() - os.fstat(descriptor).st_mtime > _LONGEST_SILENCE_SECONDS
    # While the lock is held: who is only about to write to it waits for that, and then finds it gone.
    with contextlib.suppress(OSError):
        if dead and path.is_dir():
            shutil.rmtree(path)
        elif dead:
            path.unlink()
    os.close(descriptor)


@contextmanager
def _locked(temporary: Path, flags: int) -> Iterator[None]:
    """Hold the lock of a temporary file or folder, opened with these flags: while the block runs, nobody sweeps it away.

    Lustre and NFS can be mounted without locks, and NFS locks no folders, which is no reason not to write.
    """
    while True:
        if flags & os.O_DIRECTORY:
            temporary.mkdir(exist_ok=True)
        descriptor = os.open(temporary, flags, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(descriptor), temporary.stat()):
                break
        except FileNotFoundError:  # Swept away between the two.
            pass
        os.close(descriptor)
    _ours[temporary] = descriptor
    try:
        yield
    finally:
        if _ours.pop(temporary, None) is not None:  # Not in a fork.
            os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes to `path`, wholly or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def lock_folder(folder: Path, message: str) -> Iterator[None]:
    """Keep other processes out of a folder as long as this one lives; the lock dies with it, however it dies.

    Processes that it forks have no part in the lock: orphans of one that was killed must not keep its successor out.

    Args:
        folder: made where it is not there; the lock is its file `.lock`.
        message: what to tell a person where another process has it.

    Raises:
        InputError: another process has it, or the folder cannot be written to.

    Where the file system has no locks, it says so on stderr and goes on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written to ({error.strerror}); give another folder, or make this one writable"
        ) from None
    # A lock of this kind lasts until the last descriptor of the open file is closed, and a fork has one, too.
    os.register_at_fork(after_in_child=file.close)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{folder}: {message}") from None
        except OSError as error:  # Lustre and NFS can be mounted without locks.
            print(f"{folder}: no locks on this file system ({error.strerror}): let no other process write here", file=sys.stderr)
        yield


def sync(path: Path) -> None:
    """Force a file, or a folder's entries (its renames), to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TarWriter:
    """Appends members to an uncompressed tar (POSIX.1-1988 ustar), hashes it, and knows where each member lies.

    The bytes depend on the content alone: time 0, no owner, no order of their own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.offset = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its bytes.

        Raises:
            ValueError: the name has more characters than a ustar header holds.
        """
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        place = self.offset
        self._write(data)
        self._write(b"\0" * (-len(data) % _TAR_BLOCK))
        return place

    def close(self) -> None:
        """Write the end of the archive; the file stays open."""
        self._write(b"\0" * (2 * _TAR_BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)
