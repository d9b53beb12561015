"""Tars whose bytes depend on their content alone: time 0, no owner, no order of their own. Hashed while they are written."""

import hashlib
import tarfile
from typing import BinaryIO

_BLOCK = 512


class TarWriter:
    """Appends members to an uncompressed tar (POSIX.1-1988 ustar) and knows where each lies."""

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
        self._write(b"\0" * (-len(data) % _BLOCK))
        return place

    def close(self) -> None:
        """Write the end of the archive; the file stays open."""
        self._write(b"\0" * (2 * _BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)
