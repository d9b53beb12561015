"""A folder behind a URL that fsspec reads (s3://bucket/dataset, gs://...): listed, read whole or in ranges, written file by file.

An object store shows an object only when all of it has arrived, so what is there is whole; whether it is the right thing, say
the records that are written after it.
"""

import contextlib
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from pbe_core.errors import InputError, NetworkError
from pbe_core.files import atomic_file
from pbe_core.words import number_of

_LOCAL = ("file", "local")
_PROBE = ".write-test"
"""Written and removed by `check`, so that a place which is only read is told before hours of work. Always the same name: where
things can be written and not removed, there is one at most."""
_PROBED = b"paint-by-example"
_OLD_STORE = "a store from before 2025 needs request_checksum_calculation: when_required (docs/building.md)"


def is_url(place: object) -> bool:
    """Whether a setting names a place behind a URL, and not a local folder."""
    return re.match("[a-z][a-z0-9+.-]*://", str(place)) is not None


def public_url(text: str) -> str:
    """A URL without what may be a key or a password: what stands before @ and behind ? or #. Any other text as it is."""
    parts = re.match(r"([a-z][a-z0-9+.-]*://)(?:[^/?#]*@)?([^?#]*)", text, re.IGNORECASE)
    return parts[1] + parts[2] if parts else text


class RemoteFolder:
    """One folder of an object store. Names of files are relative to it, with / between.

    What a store's library raises, each in its own way, is a FileNotFoundError or a NetworkError, both of them OSErrors.
    """

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
        except (ImportError, ValueError, TypeError, OSError) as error:  # Some protocols connect at once.
            raise InputError(
                f"{self.url}: cannot be opened ({_first_line(error)}); known are s3:// and, installed, gs://"
            ) from None
        if set(_LOCAL) & set([self.files.protocol] if isinstance(self.files.protocol, str) else self.files.protocol):
            raise InputError(f"{url}: give a local folder without file://")

    def check(self, writing: bool = False) -> None:
        """Make sure that the place can be reached. The folder need not be there, only its bucket.

        Args:
            writing: also write a small file there, look at its size, and remove it.

        Raises:
            InputError: it cannot: no such bucket, no credentials, no network; or it cannot be written to.
        """
        bucket = self.root.split("/")[0]
        try:
            self._look(bucket)
        except Exception as error:  # Each store has its own; all of them mean the same to a person.
            place = bucket if isinstance(error, FileNotFoundError) else self.root
            raise InputError(
                f"{self.url}: {place} cannot be listed ({_first_line(error)}); does it exist, and are credentials set "
                f"(as its own tools read them, or as options of fsspec in the settings)?"
            ) from None
        if writing:
            try:
                self.files.pipe_file(self.path(_PROBE), _PROBED)
                try:
                    arrived = self.files.info(self.path(_PROBE), refresh=True)["size"]
                finally:
                    self.files.rm_file(self.path(_PROBE))
            except Exception as error:
                raise InputError(
                    f"{self.url}: cannot be written to ({_first_line(error)}); "
                    f"the credentials must allow to write and to remove files there; {_OLD_STORE}"
                ) from None
            # Such a store may keep the lengths and the checksum that come with a body, and say nothing.
            if arrived != len(_PROBED):
                raise InputError(
                    f"{self.url}: {len(_PROBED)} bytes have arrived as {arrived}, so files are not kept as they are; {_OLD_STORE}"
                )

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Name -> bytes of each file directly in a folder; none where it is not there."""
        path = self.path(folder)
        try:
            with self._in_words(folder):
                found = self.files.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        start = len(self.root) + 1
        return {entry["name"][start:]: entry["size"] for entry in found if entry["type"] == "file" and entry["name"] != path}

    def size(self, name: str) -> int | None:
        """Bytes of a file; null where it is not there."""
        try:
            with self._in_words(name):
                size: int = self.files.info(self.path(name), refresh=True)["size"]
        except FileNotFoundError:
            return None
        return size

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes from `start` to before `end`. Raises FileNotFoundError, or another OSError."""
        with self._in_words(name):
            data: bytes = self.files.cat_file(self.path(name), start=start, end=end)
        return data

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Several files, at once where the store can; those that are not there are left out."""
        paths = {self.path(name): name for name in names}
        if not paths:
            return {}
        with self._in_words():
            found = self.files.cat(list(paths), on_error="return")
            for each in found.values():
                if isinstance(each, Exception) and not isinstance(each, FileNotFoundError):
                    raise each
        return {paths[path.lstrip("/")]: data for path, data in found.items() if not isinstance(data, Exception)}

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local one, wholly or not at all."""
        with atomic_file(to) as temporary, self._in_words(name):
            self.files.get_file(self.path(name), str(temporary))

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file here. Raises OSError where not all of it has arrived."""
        with self._in_words(name):
            self.files.put_file(str(file), self.path(name))
        sent, arrived = file.stat().st_size, self.size(name)
        if sent != arrived:
            raise NetworkError(f"{self.url}/{name}: {number_of(sent, 'byte')} sent, and {arrived or 0:,} have arrived")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self._in_words(name):
            self.files.pipe_file(self.path(name), data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._in_words(name):
            self.files.rm_file(self.path(name))

    def path(self, name: str) -> str:
        """A file as the file system behind the URL calls it."""
        return f"{self.root}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _in_words(self, name: str = "") -> Iterator[None]:
        """Make a NetworkError of what goes wrong, but for FileNotFoundError, what this machine's disk says, and our defects."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            of_disk = isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
            # Python's own are defects; libraries have others for a network that fails, and not all of these are OSErrors.
            if of_disk or (type(error).__module__ == "builtins" and not isinstance(error, OSError)):
                raise
            raise NetworkError(f"{f'{self.url}/{name}'.rstrip('/')}: {_first_line(error)}") from error

    def _look(self, bucket: str) -> None:
        """Ask for the folder, and not for all of its bucket: credentials may be for the folder alone."""
        try:
            self.files.ls(self.root, refresh=True)
        except FileNotFoundError:
            try:
                self.files.info(bucket, refresh=True)
            except FileNotFoundError:
                raise
            except OSError:  # It must not be looked at, so it is there.
                pass


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
