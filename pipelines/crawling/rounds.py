"""A photo store: rounds, each a frozen list of photos to get, and parts, which workers make of a round's units.

    wanted photos without an outcome ──▶ round: a table whose row group n is unit n ──▶ part n

    photos as they come ──▶ tar(s), temporary ──┐
    what became of each ──▶ table, temporary ───┴─ synced, renamed ──▶ commit record, last: now the part is done

A part counts if it was made in the newest round, or if the record of the newest round names it. So a process that was thought
dead, and that stores its part when the next round has set out to get the same photos, does no harm: its part does not count.
Files bear the name of their attempt and the record names them, so that two attempts at one part cannot mix: the last record wins
and the other's files are swept away when the next run begins.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.files import TarWriter, atomic_file, sync, write_atomically
from pbe_core.files import sweep as sweep_files
from pbe_core.photo_files import STORE_RECORD, STORE_VERSION, check_store, is_store
from schemas.outcomes import OK
from schemas.tables import PHOTO_INDEX, STORED_PHOTOS, WANTED, with_plain_words

# Small enough to copy and to hash in seconds, large enough that a million photos are some hundred files.
TAR_BYTES = 1_000_000_000
_LOST_KEYS = ".keys.parquet"
_PART_NAME_LENGTH = 13
_INDEX = with_plain_words(PHOTO_INDEX)


@dataclass(frozen=True)
class Round:
    """One run's frozen list; unit n is row group n of its table."""

    store: Path
    number: int
    sizes: tuple[int, ...]
    """Photos of each unit."""
    placeholders: tuple[str, ...]
    """SHA-256 of pictures that are known to say that a photo is gone."""

    def read_unit(self, unit: int) -> list[dict[str, Any]]:
        """The wanted photos of a unit."""
        rows: list[dict[str, Any]] = (
            pq.ParquetFile(self.store / f"rounds/{self.number:06d}.parquet").read_row_group(unit).to_pylist()
        )
        return rows


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


def open_store(folder: Path, photos_of: str) -> None:
    """Make a photo store, or make sure that a folder is one.

    Args:
        folder: the store.
        photos_of: whose photos it holds (`SourceSettings.photos_of`): the same id means another photo elsewhere.

    Raises:
        InputError: something else is there, or it is a store of another version, or for other photos.
    """
    if is_store(folder):
        check_store(folder, photos_of)
        return
    try:
        sweep_files(folder)
        if folder.is_dir() and not all(_is_begun(path) for path in folder.iterdir()):
            raise InputError(
                f"{folder}: this folder holds something else than a photo store; photos are crawled into a folder of their own: "
                f"give another --source.photos (and this one as a source, --crawl.sources, if it holds photos)"
            )
        for name in ("parts", "rounds"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be a folder ({error.strerror}); set build.source.photos to another place") from None
    write_atomically(folder / STORE_RECORD, json.dumps({"version": STORE_VERSION, "photos_of": photos_of}, indent=1).encode())


def _is_begun(path: Path) -> bool:
    """Whether a file or folder is of a store that was only about to be made when its process was killed."""
    return path.name == ".lock" or (path.name in ("parts", "rounds") and path.is_dir() and next(path.iterdir(), None) is None)


def read_parts(store: Path) -> list[Part]:
    """All parts that count, in order."""
    found = [read_part(store / "parts" / f"{name}.json") for name in due_parts(store)]
    return [part for part in found if part]


def due_parts(store: Path) -> list[str]:
    """Names of the parts that count where they are whole, in order: of the newest round, and those that its record names."""
    newest = latest_round(store)
    earlier = read_round_record(store, newest)["parts"] if newest else []
    return sorted({*earlier, *(path.stem for path in (store / "parts").glob(f"{newest:06d}-*.json"))})


def sweep(store: Path, parts: Iterable[Part]) -> None:
    """Take away what does not count from among the parts. Only while nobody else writes.

    What attempts left that died, or came too late, is removed. A part that should count and is damaged goes to `damaged/`, where
    a person may still want what is left of it. The keys of its photos are noted there: what earlier parts say of them counts no
    more, so that they will be asked for again.
    """
    known = {name: part.name for part in parts for name in (*part.files, f"{part.name}.json")}
    damaged = set(due_parts(store)) - set(known.values())
    for name in damaged:
        (store / "damaged").mkdir(exist_ok=True)
        number, unit = map(int, name.split("-"))
        with atomic_file(store / "damaged" / f"{name}{_LOST_KEYS}") as temporary:
            keys = pq.ParquetFile(_round_file(store, number, "parquet")).read_row_group(unit, ["key"])
            pq.write_table(keys, temporary)
    for path in list((store / "parts").iterdir()):
        if path.name in known:
            continue
        if path.name[:_PART_NAME_LENGTH] in damaged:
            path.replace(store / "damaged" / path.name)
        else:
            path.unlink()
    for folder in (store, store / "rounds", store / "damaged"):
        sweep_files(folder)


def lost_keys(store: Path) -> dict[str, tuple[int, pa.Array]]:
    """Name of each part that was found damaged -> its round, and the keys of its photos."""
    found = {}
    for path in sorted((store / "damaged").glob(f"*{_LOST_KEYS}")):
        keys = pq.read_table(path, columns=["key"])["key"].combine_chunks()
        found[path.name] = int(path.name.partition("-")[0]), keys
    return found


def freeze_round(store: Path, photos: pa.Table, per_unit: int, parts: Iterable[Part], placeholders: Collection[str]) -> Round:
    """Begin a round: from here on, parts of earlier rounds that are not named in its record do not count.

    Args:
        store: the photo store.
        photos: what to get, as a table of `WANTED`.
        per_unit: photos of a unit.
        parts: that count so far.
        placeholders: as in `Round`.
    """
    number = max((int(path.stem) for path in (store / "rounds").iterdir() if path.stem.isdigit()), default=0) + 1
    with atomic_file(_round_file(store, number, "parquet")) as temporary:
        pq.write_table(photos.cast(WANTED), temporary, row_group_size=per_unit)
    known = tuple(sorted(placeholders))
    record = {"photos": len(photos), "parts": [part.name for part in parts], "placeholders": known}
    write_atomically(_round_file(store, number, "json"), json.dumps(record, indent=1).encode())
    sizes = tuple(min(per_unit, len(photos) - start) for start in range(0, len(photos), per_unit))
    return Round(store, number, sizes, known)


def photos_to_ask(store: Path, wanted: pa.Table, again: Collection[str]) -> pa.Table:
    """The wanted photos of which there is no word yet, and those that are to be asked for again.

    Args:
        store: the photo store, merged.
        wanted: table of `WANTED`.
        again: codes that do not count; with `ok` or `placeholder` among them, photos come with what is known of them, `before`.
    """
    status = pq.read_table(store / "status.parquet", columns=["key", "code"])
    settled = pc.invert(pc.is_in(status["code"].cast(pa.string()), pa.array(list(again), pa.string())))
    asked = wanted.filter(pc.invert(pc.is_in(wanted["key"], status["key"].filter(settled).combine_chunks())))
    tables = {OK: "index.parquet", "placeholder": "quarantine.parquet"}
    return _with_before(asked, [store / name for code, name in tables.items() if code in again])


def quarantined(
    store: Path, list_photos: Callable[[], pa.Table], keys: pa.Array, known: pa.Array, sources: Sequence[str]
) -> pa.Table:
    """The wanted photos that turned out to be placeholders in this run, and may be had from a later source.

    Args:
        store: the photo store, merged.
        list_photos: gives the wanted photos, a table of `WANTED`; called only where there are such.
        keys: of the wanted photos.
        known: keys of photos that were in the quarantine before this run.
        sources: `crawl.sources`.
    """
    rows = pq.read_table(store / "quarantine.parquet", columns=["key", "source"])
    skip = pc.add(pc.index_in(rows["source"].cast(pa.string()), pa.array(sources, pa.string())), 1)
    rows = rows.append_column("skip", pc.fill_null(skip, 0).cast(pa.int16()))
    later = pc.and_(pc.less(rows["skip"], len(sources)), pc.invert(pc.is_in(rows["key"], known)))
    rows = rows.filter(pc.and_(later, pc.is_in(rows["key"], keys)))
    if not len(rows):
        return WANTED.empty_table()
    wanted = list_photos()
    asked = wanted.filter(pc.is_in(wanted["key"], rows["key"].combine_chunks()))
    place = pc.index_in(asked["key"], rows["key"].combine_chunks())
    asked = asked.set_column(asked.schema.get_field_index("skip"), "skip", rows["skip"].take(place))
    return _with_before(asked, [store / "quarantine.parquet"])


def quarantined_keys(store: Path) -> pa.Array:
    """Keys of the photos that are placeholders."""
    return pq.read_table(store / "quarantine.parquet", columns=["key"])["key"].combine_chunks()


def _with_before(asked: pa.Table, tables: Sequence[Path]) -> pa.Table:
    """Photos with what tables know of them, `before`."""
    if not tables:
        return asked
    rows = pa.concat_tables([pq.read_table(table).cast(_INDEX) for table in tables])
    place = pc.index_in(asked["key"], rows["key"].combine_chunks())
    kind = WANTED.field("before").type
    columns = [rows[field.name].take(place).combine_chunks() for field in kind]
    before = pa.StructArray.from_arrays(columns, fields=list(kind), mask=pc.is_null(place).combine_chunks())
    return asked.set_column(asked.schema.get_field_index("before"), "before", before)


def _round_file(store: Path, number: int, kind: str) -> Path:
    return store / "rounds" / f"{number:06d}.{kind}"


def read_round_record(store: Path, number: int) -> dict[str, Any]:
    """The record of a round: how many photos it set out to get, and which parts count that were there before it."""
    path = _round_file(store, number, "json")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        content["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; put it back from a copy: it says which parts of the store count") from None
    return content


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
