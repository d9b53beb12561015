"""A folder behind a URL that fsspec reads (s3://bucket/dataset, gs://...): listed, read whole or in ranges, written file by file.

An object store shows an object only when all of it has arrived, so what is there is whole; whether it is the right thing, say
the records that are written after it.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from schemas.errors import InputError
from schemas.files import atomic_file

_LOCAL = ("file", "local")


def is_url(place: object) -> bool:
    """Whether a setting names a place behind a URL, and not a local folder."""
    return re.match("[a-z][a-z0-9+.-]*://", str(place)) is not None


class RemoteFolder:
    """One folder of an object store. Names of files are relative to it, with / between."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Nothing is asked yet.

        Args:
            url: of the folder, with its protocol.
            options: as fsspec takes them for that protocol: key, secret, endpoint_url, ...

        Raises:
            InputError: fsspec does not know the protocol, or lacks a library for it, or takes no such options.
        """
        self.url = url.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url, **{"use_listings_cache": False, **options})
        except (ImportError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.url}: cannot be opened ({_first_line(error)}); known are s3:// and, installed, gs://"
            ) from None
        if set(_LOCAL) & set([self.files.protocol] if isinstance(self.files.protocol, str) else self.files.protocol):
            raise InputError(f"{url}: give a local folder without file://")

    def check(self) -> None:
        """Make sure that the place can be reached.

        Raises:
            InputError: it cannot: no such bucket, no credentials, no network.
        """
        bucket = self.root.split("/")[0]
        try:
            self.files.ls(bucket, refresh=True)
        except Exception as error:  # Each store has its own; all of them mean the same to a person.
            raise InputError(
                f"{self.url}: {bucket} cannot be listed ({_first_line(error)}); does it exist, and are credentials set "
                f"(as its own tools read them, or as options of fsspec in the settings)?"
            ) from None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Name -> bytes of each file directly in a folder; none where it is not there."""
        path = self.path(folder)
        try:
            found = self.files.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        start = len(self.root) + 1
        return {entry["name"][start:]: entry["size"] for entry in found if entry["type"] == "file" and entry["name"] != path}

    def size(self, name: str) -> int | None:
        """Bytes of a file; null where it is not there."""
        try:
            size: int = self.files.info(self.path(name), refresh=True)["size"]
        except FileNotFoundError:
            return None
        return size

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes from `start` to before `end`. Raises FileNotFoundError, or another OSError."""
        data: bytes = self.files.cat_file(self.path(name), start=start, end=end)
        return data

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Several files, at once where the store can; those that are not there are left out."""
        paths = {self.path(name): name for name in names}
        if not paths:
            return {}
        found = self.files.cat(list(paths), on_error="return")
        problems = [each for each in found.values() if isinstance(each, Exception) and not isinstance(each, FileNotFoundError)]
        if problems:
            raise problems[0]
        return {paths[path.lstrip("/")]: data for path, data in found.items() if not isinstance(data, Exception)}

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local one, wholly or not at all."""
        with atomic_file(to) as temporary:
            self.files.get_file(self.path(name), str(temporary))

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file here. Raises OSError where not all of it has arrived."""
        self.files.put_file(str(file), self.path(name))
        sent, arrived = file.stat().st_size, self.size(name)
        if sent != arrived:
            raise OSError(f"{self.url}/{name}: {sent:,} bytes were sent and {arrived or 0:,} have arrived")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self.files.pipe_file(self.path(name), data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self.path(name))

    def path(self, name: str) -> str:
        """A file as the file system behind the URL calls it."""
        return f"{self.root}/{name}".rstrip("/")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
