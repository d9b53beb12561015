"""Tars of photos, indexed in place: nothing is unpacked or copied, and a photo is later read at its offset.

    tars ──scan_tars──▶ members (tar, member, offset, length) ──match_members──▶ where each wanted photo lies

Names in an archive are text to be compared; none is ever used as a path. Both functions are pure but for reading the tars.
"""

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from pbe_core.errors import InputError
from schemas.tables import WORD, one_word

MEMBERS = pa.schema(
    [
        pa.field("member", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
    ]
)
# Longer than any path a system takes (PATH_MAX of Linux): such a member is left out, as no photo can be named so.
LONGEST_NAME = 4096
# What one member's headers may take in bytes, extensions included, which bounds the memory for them: real ones take a few blocks.
LARGEST_HEADERS = 2 << 20
# Of headers that hold for the rest of an archive; `git archive` writes one.
MOST_GLOBAL_HEADERS = 100
MEMBERS_PER_BATCH = 1 << 16
_LINKED = -1
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


def scan_tar(path: Path) -> pa.Table:
    """Where each regular file of a tar lies, in the archive's order (columns as in `MEMBERS`).

    Returns:
        member: its name as the archive writes it; bytes that are no UTF-8 appear as \\xNN. A name may come more than once
            (an archive that was appended to): as for tar, the last one counts.
        offset: of its first byte in the tar, in bytes.
        length: in bytes.

    Headers alone are read, by `tarfile`: ustar, GNU and pax. A hard link lies where the member before it that it names lies: so
    tar writes a file that has several names. Other links, folders, devices and sparse files are left out, and names longer than
    `LONGEST_NAME`. What follows the end mark is not read, as tar does not read it.

    Raises:
        InputError: the file cannot be read, is no tar, is a compressed one, is damaged or cut off, or has no end mark.
    Source: pax Interchange Format and ustar, POSIX.1-2017, pax, "Extended Description"; GNU tar 1.35 manual, "Basic Tar Format".
    """
    try:
        with _HeaderReader(io.FileIO(path)) as file:
            links: list[str] = []
            return _with_links(pa.Table.from_batches(_batches(_members(file, path), links), MEMBERS), links)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def scan_tars(paths: Iterable[Path]) -> pa.Table:
    """The members of several tars, one after the other: `scan_tar` with a first column `tar`, the path (dictionary-encoded).

    Raises:
        InputError: as `scan_tar` does, of the first tar that is none.
    """
    tables = [pa.Table.from_batches([], pa.schema([pa.field("tar", WORD), *MEMBERS]))]
    for path in paths:
        table = scan_tar(path)
        tables.append(table.add_column(0, pa.field("tar", WORD), one_word(str(path), len(table))))
    return pa.concat_tables(tables).unify_dictionaries()


def match_members(members: pa.Table, wanted: pa.Table) -> pa.Table:
    """Find photos among the members of tars, by the rules of `photos.photo_path` and then some.

    Args:
        members: of `scan_tars`: tar, member, offset, length.
        wanted: a row for each photo: split, photo_id, and file_name, null for photos that are named by their id.

    A photo lies at <file_name>, else <split>/<file_name>, else at the base name of <file_name>; one without a file name at
    <split>/<photo_id>.jpg, else <split>_<first digit of photo_id>/<photo_id>.jpg, else <photo_id>.jpg. Whatever folders an
    archive puts before these are ignored, and so are "./", "//" and a leading "/"; but a member that is named exactly as one of
    the first two goes before others, as in a folder. Where several members fit (of different folders or tars; of the same name
    in the same tar the last one counts), nobody can know which is meant: the next of the three is tried, and in the end the
    photo is not found. It is not guessed, because a wrong photo under a right box would go unnoticed.

    Returns:
        A row for each of `wanted`: tar (dictionary-encoded), offset, length, null where it is not found; and fits: 1 where it
        is found, else how many members have its base name.
    """
    members, paths = _last_of_each_name(members)
    tails: dict[int, _Tails] = {}
    row = np.full(len(wanted), -1, np.int64)
    fits = np.zeros(len(wanted), np.int64)
    *forms, base_name = _forms(wanted)
    tries: list[tuple[Any, Literal["alone", "first", "like others"]]]
    tries = [*((form, "alone") for form in forms), *((form, "first") for form in forms), (base_name, "like others")]
    for form, exact in tries:
        todo = np.flatnonzero(row < 0)
        found, count = _look_up(paths, tails, form.take(pa.array(todo)), exact)
        row[todo] = found
        fits[todo] = np.where(found < 0, count, 1)
    chosen = members.select(["tar", "offset", "length"]).take(pa.array(row, mask=row < 0))
    return chosen.append_column("fits", pa.array(fits, pa.int32()))


class _HeaderReader(io.BufferedReader):
    """A tar for `tarfile`, which believes every length it reads: no more than an allowance is read for one member's headers."""

    allowance = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.allowance:
            raise tarfile.HeaderError(f"headers of one member take more than {LARGEST_HEADERS:,} bytes, or less than none")
        self.allowance -= size
        return super().read(size)


def _members(file: _HeaderReader, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files and hard links of a tar.

    `tarfile` takes a damaged header for the end, follows lengths backwards and beyond the file, and keeps all members: the
    checks are here.
    """
    size = os.fstat(file.fileno()).st_size
    archive: tarfile.TarFile | None = None
    while True:
        start = archive.offset if archive else 0
        file.allowance = LARGEST_HEADERS
        try:
            if archive is None:
                archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="backslashreplace")
            member = archive.next()
            if member is None:
                _check_end(file, archive.offset)
                return
            if archive.offset <= start or member.size < 0:
                raise tarfile.HeaderError("a length is negative")
            if len(archive.pax_headers) > MOST_GLOBAL_HEADERS:
                raise tarfile.HeaderError(f"more than {MOST_GLOBAL_HEADERS} global headers")
        except MemoryError:
            raise
        except Exception as error:  # ValueError, RecursionError, ...: what tarfile raises on hostile headers is not listed.
            raise InputError(f"{path}: {_no_tar(file, start, error)}") from None
        # isreg() is true of sparse files, whose bytes do not lie in one piece and whose size is that of all of it.
        in_place = member.isreg() and not member.issparse()
        if archive.offset > size or (in_place and member.offset_data + member.size > size):
            raise InputError(
                f"{path}: cut off: the member at byte {start:,} ({member.name[:100]!a}) has {member.size:,} bytes, "
                f"and the file ends at byte {size:,}; fetch it again"
            )
        archive.members.clear()  # type: ignore[attr-defined]  # Else 1 KB stays for each member.
        if (in_place or member.islnk()) and len(member.name) <= LONGEST_NAME:
            yield member


def _check_end(file: _HeaderReader, offset: int) -> None:
    """`tarfile` has found no more members: is it because of the end mark, a block of zeros?"""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.HeaderError("no end mark; where this is all of it, `truncate -s +1024` adds one")
    if any(block):
        raise tarfile.HeaderError("no header there")


def _no_tar(file: _HeaderReader, start: int, error: Exception) -> str:
    """What to do about a file that `tarfile` cannot read on from byte `start`."""
    if start > 0:
        return f"damaged or cut off at byte {start:,} ({_first_line(error)}); fetch it again"
    file.seek(0)
    file.allowance = tarfile.BLOCKSIZE
    begin = file.read(tarfile.BLOCKSIZE)
    if not begin:
        return "not a tar: the file is empty; fetch it again"
    for magic, (kind, tool) in COMPRESSED.items():
        if begin.startswith(magic):
            return f"compressed with {kind}, and photos cannot be read out of the middle of that; run {tool} on it first"
    return f"not a tar ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _batches(members: Iterator[tarfile.TarInfo], links: list[str]) -> Iterator[pa.RecordBatch]:
    """Members as record batches: as Python objects, no more than a batch of them is in memory.

    A hard link has the offset `_LINKED`, and the name that it leads to goes to `links`.
    """
    names: list[str] = []
    places: list[tuple[int, int]] = []
    for member in members:
        names.append(member.name)
        places.append((_LINKED, 0) if member.islnk() else (member.offset_data, member.size))
        if member.islnk():
            links.append(member.linkname)
        if len(names) == MEMBERS_PER_BATCH:
            yield _batch(names, places)
            names, places = [], []
    yield _batch(names, places)


def _with_links(members: pa.Table, links: list[str]) -> pa.Table:
    """Members with each hard link where the one it names lies; without those that name none before them.

    Args:
        members: as `_batches` makes them.
        links: what the hard links name, in their order.
    """
    if not links:
        return members
    offsets, lengths = (members[name].to_numpy().copy() for name in ("offset", "length"))
    # Of all others nobody asks where they lie.
    asked = np.flatnonzero((offsets == _LINKED) | pc.is_in(members["member"], pa.array(links, pa.string())).to_numpy())
    places: dict[str, tuple[int, int]] = {}
    named = iter(links)
    for row, name in zip(asked, members["member"].take(pa.array(asked)).to_pylist(), strict=True):
        if offsets[row] == _LINKED:
            offsets[row], lengths[row] = places.get(next(named), (_LINKED, 0))
        if offsets[row] != _LINKED:
            places[name] = offsets[row], lengths[row]
    found = pa.table([members["member"], offsets, lengths], schema=MEMBERS)
    return found.filter(pa.array(offsets != _LINKED))


def _batch(names: list[str], places: list[tuple[int, int]]) -> pa.RecordBatch:
    offsets, lengths = np.array(places, np.int64).reshape(-1, 2).T
    return pa.record_batch([pa.array(names, pa.string()), pa.array(offsets), pa.array(lengths)], schema=MEMBERS)


@dataclass(frozen=True)
class _Paths:
    """Paths cut at their slashes, without the components that lead nowhere ("" and ".")."""

    components: pa.LargeStringArray
    """Of all paths, one path after the other."""
    ends: Int[np.ndarray, " n"]
    """Where each path's components end."""
    depth: Int[np.ndarray, " n"]
    """How many each path has."""

    def tails(self, rows: Int[np.ndarray, " rows"], count: int) -> pa.LargeStringArray:
        """The last `count` components of some paths that have as many, joined."""
        first = self.ends[rows] - count
        parts = [self.components.take(pa.array(first + number)) for number in range(count)]
        return pc.binary_join_element_wise(*parts, pa.scalar("/", pa.large_string()))

    def whole(self) -> pa.LargeStringArray:
        """The paths joined again."""
        offsets = pa.array(np.concatenate([[0], self.ends]), pa.int64())
        return pc.binary_join(pa.LargeListArray.from_arrays(offsets, self.components), pa.scalar("/", pa.large_string()))


@dataclass(frozen=True)
class _Tails:
    """The last few components of all paths that have as many, each different tail once."""

    values: pa.LargeStringArray
    fits: Int[np.ndarray, " values"]
    """How many paths end so."""
    row: Int[np.ndarray, " values"]
    """One of them; the one where there is one."""
    exact_fits: Int[np.ndarray, " values"]
    """How many paths are just this."""
    exact_row: Int[np.ndarray, " values"]


def _cut(paths: Any) -> _Paths:
    """Cut paths (an array of strings, null like empty)."""
    lists = pc.split_pattern(pc.fill_null(_one_array(paths), ""), "/")
    components = lists.flatten()
    keep = pc.invert(pc.is_in(components, pa.array(["", "."], pa.large_string())))
    kept = np.concatenate([[0], np.cumsum(keep.to_numpy(zero_copy_only=False))])
    bounds = kept[lists.offsets.to_numpy()]
    return _Paths(components.filter(keep), bounds[1:], np.diff(bounds))


def _one_array(column: Any) -> pa.LargeStringArray:
    """A column of strings, dictionary-encoded or not, as one array that may hold more than 2 GB."""
    column = pc.cast(column, pa.large_string())
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _last_of_each_name(members: pa.Table) -> tuple[pa.Table, _Paths]:
    """Without members that a later one of the same path in the same tar replaces."""
    paths = _cut(members["member"])
    names = paths.whole().dictionary_encode()
    tars = _one_array(members["tar"]).dictionary_encode().indices.to_numpy().astype(np.int64)
    key = tars * len(names.dictionary) + names.indices.to_numpy()
    _, from_the_end = np.unique(key[::-1], return_index=True)
    last = np.sort(len(key) - 1 - from_the_end)
    if len(last) == len(key):
        return members, paths
    members = members.take(pa.array(last))
    return members, _cut(members["member"])


def _forms(wanted: pa.Table) -> tuple[pa.LargeStringArray, pa.LargeStringArray, pa.LargeStringArray]:
    """The three names under which each photo is looked for, in this order."""
    split, photo_id, file_name = (_one_array(wanted[name]) for name in ("split", "photo_id", "file_name"))
    named = pc.is_valid(file_name)

    def joined(*parts: Any) -> pa.LargeStringArray:
        texts = [pa.scalar(part, pa.large_string()) if isinstance(part, str) else part for part in parts]
        return pc.binary_join_element_wise(*texts, pa.scalar("", pa.large_string()))

    by_id = joined(photo_id, ".jpg")
    first = pc.if_else(named, file_name, joined(split, "/", by_id))
    digit = pc.utf8_slice_codeunits(photo_id, 0, 1)
    second = pc.if_else(named, joined(split, "/", file_name), joined(split, "_", digit, "/", by_id))
    cut = _cut(file_name)
    has_base = cut.depth > 0
    bases = pa.array(np.where(has_base, cut.ends - 1, 0), mask=~has_base)
    return first, second, pc.if_else(named, cut.components.take(bases), by_id)


def _look_up(
    paths: _Paths, tails: dict[int, _Tails], wanted: Any, exact: Literal["alone", "first", "like others"]
) -> tuple[Int[np.ndarray, " wanted"], Int[np.ndarray, " wanted"]]:
    """The row of the only path that ends in each wanted one, -1 where none or several do, and how many do.

    `exact`: whether paths that are just the wanted one are looked at alone, go before those that end in it, or count like
    these. `tails` is filled for the next call.
    """
    names = _cut(wanted)
    row = np.full(len(wanted), -1, np.int64)
    fits = np.zeros(len(wanted), np.int64)
    for depth in np.unique(names.depth).tolist():
        if depth == 0:
            continue
        if depth not in tails:
            tails[depth] = _tails(paths, depth)
        known = tails[depth]
        asked = np.flatnonzero(names.depth == depth)
        code = pc.fill_null(pc.index_in(names.tails(asked, depth), value_set=known.values), -1).to_numpy()
        asked, code = asked[code >= 0], code[code >= 0]
        alike: Bool[np.ndarray, " asked"] = (known.exact_fits[code] > 0) & (exact != "like others") | (exact == "alone")
        fits[asked] = np.where(alike, known.exact_fits[code], known.fits[code])
        row[asked] = np.where(alike, known.exact_row[code], known.row[code])
    return np.where(fits == 1, row, -1), fits


def _tails(paths: _Paths, depth: int) -> _Tails:
    rows = np.flatnonzero(paths.depth >= depth)
    encoded = paths.tails(rows, depth).dictionary_encode()
    codes = encoded.indices.to_numpy()
    exact = paths.depth[rows] == depth
    return _Tails(encoded.dictionary, *_counted(codes, rows, encoded), *_counted(codes[exact], rows[exact], encoded))


def _counted(
    codes: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"], encoded: pa.DictionaryArray
) -> tuple[Int[np.ndarray, " values"], Int[np.ndarray, " values"]]:
    """How often each code comes, and a row where it does."""
    row = np.full(len(encoded.dictionary), -1, np.int64)
    row[codes] = rows
    return np.bincount(codes, minlength=len(row)), row
