"""Checks of a tar by its index: where each member must lie, and what stands between members' bytes."""

import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from schemas.sample import MEMBER_NAMES

BLOCK = 512
_END = 2 * BLOCK
# Where the fields of a ustar header begin (POSIX.1-1988).
_HEADER_FIELDS = {
    "name": 0, "mode": 100, "owner": 108, "group": 116, "size": 124, "time": 136, "checksum": 148, "type": 156, "link": 157,
    "magic": 257, "version": 263, "owner's name": 265, "group's name": 297, "device": 329, "prefix": 345, "padding": 500,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where one member lies in a tar, by the index."""

    key: str
    name: str
    offset: int
    length: int
    crc32: int

    @property
    def start(self) -> int:
        """Where its header begins."""
        return self.offset - BLOCK

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + self.length + -self.length % BLOCK


def layout(rows: Sequence[Mapping[str, Any]]) -> list[Place]:
    """All members in the order in which they must stand: samples by position, a sample's members by name."""
    return [
        Place(row["key"], name, location["offset"], location["length"], location["crc32"])
        for row in rows
        for name in sorted(MEMBER_NAMES)
        if (location := row[name.replace(".", "_")]) is not None
    ]


def check_layout(places: Sequence[Place], size: int) -> Iterator[tuple[str | None, str]]:
    """Members one after another without gaps, then the end of the archive and nothing more."""
    end = 0
    for place in places:
        if place.start != end:
            yield place.key, f"member {place.name} should begin at byte {end:,} of the tar, and the index says {place.start:,}"
        end = place.end
    if end + _END != size:
        yield None, f"by the index its tar ends at byte {end + _END:,}, and it has {size:,}"


def check_member(stored: bytes, place: Place) -> Iterator[str]:
    """A member's header as `TarWriter` writes it, its bytes as the index says, and zeros after them."""
    info = tarfile.TarInfo(f"{place.key}.{place.name}")
    info.size = place.length
    right = info.tobuf(tarfile.USTAR_FORMAT)
    if stored[:BLOCK] != right:
        bounds = [*_HEADER_FIELDS.values(), BLOCK]
        wrong = [
            name
            for name, start, end in zip(_HEADER_FIELDS, bounds, bounds[1:], strict=False)
            if stored[start:end] != right[start:end]
        ]
        yield f"the tar's header of member {place.name} is not as written ({', '.join(wrong)})"
    if zlib.crc32(stored[BLOCK : BLOCK + place.length]) != place.crc32:
        yield f"member {place.name} is not what was written (CRC-32)"
    if any(stored[BLOCK + place.length :]):
        yield f"the bytes between member {place.name} and the next one are not zero"


def check_end(file: BinaryIO, places: Sequence[Place]) -> Iterator[str]:
    """Zeros after the last member."""
    file.seek(places[-1].end if places else 0)
    if any(file.read(_END)):
        yield "the end of its tar is not zero"
