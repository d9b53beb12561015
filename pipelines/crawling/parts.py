"""Parts of a photo store: photos that are stored and recorded together, by one worker.

    photos as they come ──▶ tar(s), temporary ──┐
    what became of each ──▶ table, temporary ───┴─ synced, renamed ──▶ commit record, last: now the part is done

Files bear the name of their attempt and the record names them, so that two attempts at one part cannot mix: the last record wins
and the other's files are swept away when the next run begins.
"""

import hashlib
import json
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.files import TarWriter, sync, write_atomically
from schemas.outcomes import OK
from schemas.tables import STORED_PHOTOS

# Small enough to copy and to hash in seconds, large enough that a million photos are some hundred files.
TAR_BYTES = 1_000_000_000


class SupersededError(Exception):
    """A later run has begun: what this one found no longer counts."""


@dataclass(frozen=True)
class Part:
    """The commit record of a part."""

    round: int
    unit: int
    table: str
    """Name of its table below parts/."""
    table_sha256: str
    tars: dict[str, tuple[int, str]]
    """Name below parts/ -> bytes and SHA-256; none where no photo had to be stored."""
    photos: int
    """Rows of its table."""
    codes: dict[str, int]
    stored_bytes: int
    """Of the photos in its tars."""
    first_key: int
    last_key: int
    """Smallest and largest key of its photos."""

    @property
    def name(self) -> str:
        """What its record is called."""
        return part_name(self.round, self.unit)

    @property
    def files(self) -> list[str]:
        """All files below parts/ that belong to it, but for the record."""
        return [self.table, *self.tars]


def part_name(round_number: int, unit: int) -> str:
    """<round>-<unit>, in six digits each."""
    return f"{round_number:06d}-{unit:06d}"


def latest_round(store: Path) -> int:
    """Number of the last round that was frozen in a store; 0 if there is none."""
    return max((int(path.stem) for path in (store / "rounds").glob("*.json")), default=0)


def read_part(path: Path) -> Part | None:
    """The part of a commit record, or nothing if the record, or a file that it names, is missing or not whole.

    Raises:
        OSError: the folder cannot be read just now, which says nothing about the part.
    """
    try:
        content = json.loads(path.read_bytes())
        content["tars"] = {name: (int(size), str(sha256)) for name, (size, sha256) in content["tars"].items()}
        part = Part(**content)
        sizes = [(path.parent / name).stat().st_size == size for name, (size, _) in part.tars.items()]
        table_there = (path.parent / part.table).is_file()
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return part if all(sizes) and table_there and part.name == path.stem else None


@dataclass
class _Tar:
    name: str
    temporary: Path
    file: BinaryIO
    writer: TarWriter


@dataclass
class PartWriter:
    """Writes one attempt at a part."""

    store: Path
    round: int
    unit: int
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    rows: list[dict[str, Any]] = field(default_factory=list)
    _tars: list[_Tar] = field(default_factory=list)

    def add(self, row: dict[str, Any], data: bytes | None = None, extension: str = "") -> None:
        """Note what became of a photo and, if there are bytes, store them: its row then says where.

        Args:
            row: of `STORED_PHOTOS`.
            data: the photo's file.
            extension: of its name in the tar, for people who unpack it.
        """
        if data is not None:
            if not self._tars or self._tars[-1].writer.offset + len(data) > TAR_BYTES:
                self._tars.append(self._new_tar())
            tar = self._tars[-1]
            offset = tar.writer.add(f"{row['split']}/{row['photo_id']}.{extension}", data)
            row |= {"file": f"parts/{tar.name}", "offset": offset, "length": len(data)}
        self.rows.append(row)

    def commit(self) -> Part | None:
        """Make the part last: files first, the record at the end. Nothing if there is nothing to record.

        Raises:
            SupersededError: a later run has begun.
        """
        if not self.rows:
            return None
        self.check_round()
        folder = self.store / "parts"
        self.rows.sort(key=lambda row: row["key"])
        tars = {}
        for tar in self._tars:
            tar.writer.close()
            tar.file.close()
            sync(tar.temporary)
            tars[tar.name] = (tar.writer.offset, tar.writer.digest.hexdigest())
        name = f"{part_name(self.round, self.unit)}-{self.attempt}.parquet"
        temporary = folder / f".{name}.tmp"
        pq.write_table(pa.Table.from_pylist(self.rows, STORED_PHOTOS), temporary)
        sync(temporary)
        part = Part(
            round=self.round,
            unit=self.unit,
            table=name,
            table_sha256=hashlib.sha256(temporary.read_bytes()).hexdigest(),
            tars=tars,
            photos=len(self.rows),
            codes=dict(sorted(Counter(row["code"] for row in self.rows).items())),
            stored_bytes=sum(
                row["length"] for row in self.rows if row["code"] == OK and (row["file"] or "").removeprefix("parts/") in tars
            ),
            first_key=self.rows[0]["key"],
            last_key=self.rows[-1]["key"],
        )
        self.check_round()
        for tar in self._tars:
            tar.temporary.replace(folder / tar.name)
        temporary.replace(folder / name)
        sync(folder)
        write_atomically(folder / f"{part.name}.json", json.dumps(asdict(part), indent=1).encode())
        self._tars.clear()
        return part

    def abandon(self) -> None:
        """Leave nothing behind of an attempt that failed."""
        for tar in self._tars:
            tar.file.close()
            tar.temporary.unlink(missing_ok=True)
        (self.store / "parts" / f".{part_name(self.round, self.unit)}-{self.attempt}.parquet.tmp").unlink(missing_ok=True)

    def check_round(self) -> None:
        """Make sure that this run is the newest one.

        Raises:
            SupersededError: it is not.
        """
        if latest_round(self.store) != self.round:
            self.abandon()
            raise SupersededError(f"{self.store}: a later run than {self.round} has begun in this store")

    def _new_tar(self) -> _Tar:
        number = f"-{len(self._tars)}" if self._tars else ""
        name = f"{part_name(self.round, self.unit)}-{self.attempt}{number}.tar"
        temporary = self.store / "parts" / f".{name}.tmp"
        file = temporary.open("wb")
        return _Tar(name, temporary, file, TarWriter(file))
