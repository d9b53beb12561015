"""References from other photos: which boxes of an object's group are cut for it, beside its own.

    accepted objects ──spilled──▶ rows of groups, in memory ──▶ for each object: members in other photos, the first by a hash
    too large to be objects ────────────────┘                   of (seed, object, member), one of a photo ──▶ `references`

Which ones an object gets is a pure function of names: of the seed, its own id and theirs. Memory holds one row of each box that
has a group. Time grows with the sum of squares of the groups' sizes: a group of 10,000 boxes takes about a second.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64, UInt64

from pbe_core.randomness import hash_column, mix, name_hash
from pipelines.annotations.groups import folder_of
from pipelines.config import BuildSettings
from pipelines.selection.partition import group_hashes
from schemas.tables import REFERENCE

_FIELDS = [field.name for field in REFERENCE]
_NUMBER = re.compile(r"([0-9]+)$")


@dataclass(frozen=True)
class Members:
    """Boxes that have a group, sorted by it; arrays of equal length."""

    rows: pa.Table
    """Columns of `schemas.tables.REFERENCE`."""
    group: UInt64[np.ndarray, " members"]
    own: UInt64[np.ndarray, " members"]
    """A hash of the object's id."""
    photo: UInt64[np.ndarray, " members"]
    """A hash of the photo's id."""
    folder: Int64[np.ndarray, " members"]
    """A number for each folder of photos."""
    frame: Int64[np.ndarray, " members"]
    """The number at the end of the photo's name; -1 where there is none."""

    @classmethod
    def of(cls, tables: Sequence[pa.Table]) -> "Members":
        """The boxes of these tables that have a group."""
        rows = pa.concat_tables(tables)
        group = group_hashes(rows["group"].combine_chunks())
        own = hash_column(rows["object_id"].combine_chunks(), "member")
        # Within a group by hash: no order of rows decides.
        order = np.lexsort((own, group))
        order = order[group[order] != 0]
        rows = rows.take(pa.array(order))
        names = [name or own for name, own in zip(rows["file_name"].to_pylist(), rows["photo_id"].to_pylist(), strict=True)]
        folders = np.unique([folder_of(name) for name in names], return_inverse=True)[1] if names else np.zeros(0, np.int64)
        frames = np.array([frame_of(name) for name in names], np.int64)
        photo = hash_column(rows["photo_id"].combine_chunks(), "photo of a member")
        return cls(rows.select(_FIELDS), group[order], own[order], photo, folders.astype(np.int64), frames)

    @functools.cached_property
    def places(self) -> dict[int, int]:
        """`own` -> place."""
        return {own: place for place, own in enumerate(self.own.tolist())}

    def others(self, own: int, count: int, frames: tuple[int, int] | None, seed: int) -> Int64[np.ndarray, " drawn"]:
        """Places of the members that are drawn for the one at a place: `count` at most, of as many other photos.

        Args:
            own: place of the object.
            count: how many at most.
            frames: smallest and largest distance of frame numbers, in one folder; null: any other photo.
            seed: of the build.
        """
        first, last = np.searchsorted(self.group, self.group[own], "left"), np.searchsorted(self.group, self.group[own], "right")
        places = np.arange(first, last)
        places = places[self._fits(places, own, frames)]
        rank = mix(self.own[places] ^ mix(self.own[own : own + 1] ^ np.uint64(name_hash(seed, "references"))))
        places = places[np.argsort(rank, kind="stable")]
        each_photo = np.sort(np.unique(self.photo[places], return_index=True)[1])
        drawn: np.ndarray = places[each_photo[:count]]
        return drawn

    def _fits(
        self, places: Int64[np.ndarray, " members"], own: int, frames: tuple[int, int] | None
    ) -> Bool[np.ndarray, " members"]:
        fits: np.ndarray = self.photo[places] != self.photo[own]
        if frames:
            distance = np.abs(self.frame[places] - self.frame[own])
            numbered = (self.frame[places] >= 0) & (self.frame[own] >= 0) & (self.folder[places] == self.folder[own])
            fits &= numbered & (distance >= frames[0]) & (distance <= frames[1])
        return fits


class ReferenceDraw:
    """Fills the column `references` of accepted objects."""

    def __init__(self, settings: BuildSettings, left_out: set[str], folder: Path) -> None:
        """Nothing is drawn yet.

        Args:
            settings: of the build.
            left_out: ids of photos that must not be used.
            folder: for temporary files.
        """
        self.settings = settings
        self.left_out = left_out
        self.folder = folder

    def draw(self, parts: Iterator[pa.Table], shown_only: Sequence[pa.Table]) -> Iterator[pa.Table]:
        """The same parts with `references`: those that the source names, or those drawn among the object's group.

        Args:
            parts: accepted objects, with columns `group`, `references` and `object_id`.
            shown_only: boxes that are no objects and may be references; complete only when `parts` is through.
        """
        paths: list[Path] = []
        columns = ["group", "object_id", *_FIELDS]
        grouped: list[pa.Table] = []
        for part in parts:
            paths.append(self.folder / f"accepted-{len(paths):05d}.arrow")
            with pa.OSFile(str(paths[-1]), "wb") as file, pa.ipc.new_file(file, part.schema) as writer:
                writer.write_table(part.unify_dictionaries().combine_chunks())
            grouped.append(_plain(part.filter(part["group"].is_valid()).select(columns)))
        members = None
        if self.settings.references.others and grouped:
            members = Members.of([*grouped, *(_plain(table.select(columns)) for table in shown_only)])
        for path in paths:
            with pa.OSFile(str(path)) as file:
                yield self._with_references(pa.ipc.open_file(file).read_all(), members)

    def _with_references(self, part: pa.Table, members: Members | None) -> pa.Table:
        named = [
            [each for each in references or () if each["photo_id"] not in self.left_out]
            for references in part["references"].to_pylist()
        ]
        if members is not None:
            count, frames, seed = self.settings.references.others, self.settings.references.frames, self.settings.seed
            own = hash_column(part["object_id"].combine_chunks(), "member").tolist()
            told = pc.and_(part["group"].is_valid(), part["references"].is_null()).to_numpy()
            drawn = {row: members.others(members.places[own[row]], count, frames, seed) for row in np.flatnonzero(told).tolist()}
            taken = members.rows.take(pa.array(np.concatenate([np.zeros(0, np.int64), *drawn.values()]))).to_pylist()
            for row, places in drawn.items():
                named[row], taken = taken[: len(places)], taken[len(places) :]
        kind = part.schema.field("references").type
        return part.set_column(part.schema.get_field_index("references"), "references", pa.array(named, kind))


def frame_of(name: str) -> int:
    """The number that a photo's name ends with, before its ending: 123 for `video/000123.jpg`; -1 where there is none."""
    found = _NUMBER.search(name.rpartition(".")[0] or name)
    return int(found[1]) if found and len(found[1]) < 19 else -1


def _plain(table: pa.Table) -> pa.Table:
    """With words as strings: dictionaries of many parts would have to be made one."""
    fields = [pa.field(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type) for field in table.schema]
    return table.cast(pa.schema(fields))


def named_photos(part: pa.Table) -> list[dict[str, Any]]:
    """The photos of the references in rows of objects or plan: split, photo_id, file_name and url of each, as often as named."""
    if "references" not in part.column_names:
        return []
    return [
        {"split": split, **{name: each[name] for name in ("photo_id", "file_name", "url")}}
        for split, references in zip(part["split"].to_pylist(), part["references"].to_pylist(), strict=True)
        for each in references or ()
    ]
