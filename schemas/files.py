"""Files that are either whole or not there: written beside, synced, renamed."""

import fcntl
import hashlib
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write `path` so that a crash at any moment leaves the old file, or none, but never a part.

    Yields a temporary name in the same folder, its own for each attempt, so that two writers at once do no harm: the last rename
    wins. On success the file is synced and renamed and the folder synced; on an exception the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
