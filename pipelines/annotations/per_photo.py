"""Annotations that come photo by photo -> a `Source`: all that YOLO, VOC, CVAT, Label Studio and readers of one's own share.

    a reader's generator ──▶ PhotoBoxes (name, size, split, boxes) ──▶ BOXES, PHOTOS: paths, ids, splits, sizes, object masks

A reader says what stands in its files; what is wrong with a row, or with a photo, it says too, and no row is lost.

The generator runs anew for each use: by opening, for the hash, for boxes, for photos. Memory holds an entry for each photo.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.images.decode import PhotoError
from pipelines.annotations.coco_file import compress_mask
from pipelines.annotations.photo_names import NoSuchFile, PhotoNames, PhotoSizes
from pipelines.annotations.source import (
    ONLY_LABEL,
    UNKNOWN_FLAGS,
    PhotoPlaces,
    RowProblem,
    Source,
    assign_splits,
    given,
    in_batches,
    is_text,
    photo_id_of,
    photo_places,
    place_box,
    shown,
    splits_are_their_own,
)
from pipelines.config import BuildSettings
from schemas.tables import BOXES, PHOTOS

Unit = Literal["pixel", "fraction"]
Edges = tuple[float, float, float, float]
"""Left, top, right, bottom."""
# Fractions written with few decimals, where the photo's size, and so the length of 1 px, is not known.
_FRACTION_SLACK = 1e-4
_PHOTOS_AT_ONCE = 1000


@dataclass(slots=True)
class Box:
    """A box as annotations have it, or what is wrong with it."""

    label: str | None
    """The class; `object` where the annotations have none."""
    edges: Sequence[float] | None
    """Left, top, right, bottom, x right and y down from the top left corner; null with a `problem`."""
    row: int = 1
    """Its place in the file, from 1."""
    unit: Unit = "pixel"
    """Of `edges` and of polygons."""
    segmentation: Any = None
    """The object's mask: polygons [[x, y, x, y, ...], ...], COCO's RLE of the photo ({"size": [height, width], "counts": ...}),
    or a function of the photo's width and height that returns compressed RLE; null where there is none."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """Of `schemas.tables.FLAGS`, 1 or 0; what is not there is unknown."""
    problem: RowProblem | None = None
    """Why it cannot be read."""


@dataclass(slots=True)
class PhotoBoxes:
    """A photo and all its boxes, as annotations have them."""

    name: Any
    """Of its file, as it stands there: `PhotoNames` reads it."""
    boxes: Sequence[Box]
    file: str
    """The annotation file, below the folder of annotations."""
    folder: str = ""
    """What stands before `name`: empty, or with a / at its end."""
    size: tuple[int, int] | None = None
    """Width and height in px, if the annotations say; else its header is asked where a box needs it."""
    split: str | None = None
    """train, validation or test; null where a hash of its id decides."""
    url: str | None = None
    licence: str | None = None


def open_photos(
    settings: BuildSettings,
    read: Callable[[], Iterable[PhotoBoxes]],
    files: Sequence[Path] = (),
    *,
    class_names: Mapping[str, str] | None = None,
    many_files: Callable[[], Iterable[tuple[str, Path]]] = tuple,
    notes: Sequence[str] = (),
    read_notes: Callable[[], Sequence[str]] = tuple,
) -> Source:
    """Make a `Source` of a function that yields a build's photos with their boxes.

    Args:
        settings: of the build.
        read: yields photos, always in the same order; what is wrong with a file as a whole it raises as `InputError`.
        files: that determine what is read.
        class_names: class id -> name, where labels are ids. A label that is not in it is an error of its row.
        many_files: further such files, too many to be told one by one, each with a name for it.
        notes: what a user should know about the files, a sentence each.
        read_notes: the same about what was last read.

    Raises:
        InputError: there is no photo; a setting that the annotations leave without effect; what `read` raises.
    """
    places = photo_places(settings)
    reader = _Reader(settings, places, read, many_files, read_notes)
    reader.look_through()
    where = str(settings.source.annotations)
    if not reader.photos:
        raise InputError(f"{where}: no photo with boxes here; set build.source.annotations to the folder or file that holds them")
    if reader.split_by_hash == 0 and "validation_share" in given(settings.source):
        raise splits_are_their_own(where)
    return Source(
        name=where,
        files=tuple(files),
        frame=settings.source.photo_frame,
        read_boxes=reader.read_boxes,
        read_photos=reader.read_photos,
        class_names=class_names or {},
        read_elsewhere=reader.hash_rest,
        rows=reader.rows,
        read_notes=reader.notes,
        notes=tuple(notes),
        no_masks="" if reader.outlined else "none of its boxes has an outline",
    )


def bounds(points: Sequence[Sequence[float]], width: float, height: float) -> Edges:
    """The upright box around points (x, y), as far as it lies in a photo of this size, in the same unit."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    left, right = (min(max(value, 0.0), width) for value in (min(xs), max(xs)))
    top, bottom = (min(max(value, 0.0), height) for value in (min(ys), max(ys)))
    return left, top, right, bottom


def turned(points: Sequence[tuple[float, float]], about: tuple[float, float], degrees: float) -> list[tuple[float, float]]:
    """Points (x, y) in px, turned clockwise, as seen on a screen, about one of them."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = about
    return [(x + (a - x) * cosine - (b - y) * sine, y + (a - x) * sine + (b - y) * cosine) for a, b in points]


def corners(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """The four corners of a box, clockwise from the top left."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


@dataclass
class _Reader:
    settings: BuildSettings
    places: PhotoPlaces
    read: Callable[[], Iterable[PhotoBoxes]]
    many_files: Callable[[], Iterable[tuple[str, Path]]]
    own_notes: Callable[[], Sequence[str]]
    photos: int = 0
    rows: int = 0
    outlined: bool = False
    """Whether any box has an object mask, or may have one."""
    split_by_hash: int = 0
    """Photos whose split the annotations do not say."""
    useless: int = 0
    """Object masks that cannot be used, of the boxes that were last read."""
    first_useless: str = ""
    names: PhotoNames = field(init=False)
    sizes: PhotoSizes = field(init=False)

    def __post_init__(self) -> None:
        self.names = PhotoNames(self.places.roots, self.places.here)
        self.sizes = PhotoSizes(self.settings.source, self.places.roots, self.places.here)

    def look_through(self) -> None:
        for photo in self.read():
            self.photos += 1
            self.rows += len(photo.boxes)
            self.outlined |= any(box.segmentation is not None for box in photo.boxes)
            self.split_by_hash += photo.split is None

    def read_boxes(self) -> Iterator[pa.RecordBatch]:
        self.useless, self.first_useless = 0, ""
        yield from in_batches(self._boxes(), BOXES)

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._photo_rows(), PHOTOS)

    def hash_rest(self) -> dict[str, str]:
        """Hashes of the many files, and of which photos there are: paths and sizes depend on what lies in the photo folder."""
        files = hashlib.sha256()
        for name, path in self.many_files():
            files.update(repr((name, file_sha256(path))).encode())
        digest = hashlib.sha256()
        for row in self._photo_rows():
            digest.update(repr([row[name] for name in ("photo_id", "file_name", "width", "height")]).encode())
        return {"files of single photos": files.hexdigest(), "paths and sizes of photos": digest.hexdigest()}

    def notes(self) -> list[str]:
        """What a user should know about the boxes that were read."""
        notes = list(self.own_notes())
        if self.useless:
            notes.append(
                f"outlines that cannot be used: {self.useless:,}; their boxes are taken without one; for example "
                f"{self.first_useless}"
            )
        return notes + self.names.notes()

    def _placed(self) -> Iterator[tuple[PhotoBoxes, str | None, str | None, RowProblem | None, str]]:
        """Each photo of the wanted splits, with its path below the photo folder, its id (both null where its name leads nowhere),
        what is wrong with its name, and its split.
        """
        owner: dict[str, str] = {}
        remaining = iter(self.read())
        while batch := list(itertools.islice(remaining, _PHOTOS_AT_ONCE)):
            found: list[tuple[PhotoBoxes, str | None, str | None, RowProblem | None]] = []
            for photo in batch:
                path, photo_id, wrong = None, None, None
                try:
                    path = self.names.path_of(photo.name, photo.folder)
                    photo_id = photo_id_of(path)
                    if (other := owner.setdefault(photo_id, path)) != path:
                        path, photo_id = None, None
                        text = f"photo {shown(photo.name)} and {shown(other)} get the same id; rename one of the files"
                        wrong = RowProblem("bad_row", text)
                except NoSuchFile as error:
                    wrong = RowProblem("unknown_photo", f"its photo is {shown(photo.name)}, and {error.found}")
                except ValueError as error:
                    wrong = RowProblem("bad_row", f"its photo, {shown(photo.name)}, {error}")
                found.append((photo, path, photo_id, wrong))
            by_hash = [photo_id for photo, _, photo_id, _ in found if photo.split is None and photo_id]
            share = self.settings.source.validation_share
            split_of = dict(zip(by_hash, assign_splits(by_hash, self.settings.seed, share), strict=True))
            for photo, path, photo_id, wrong in found:
                split = photo.split or split_of.get(photo_id or "", self.settings.source.splits[0])
                if split in self.settings.source.splits:
                    yield photo, path, photo_id, wrong, split

    def _photo_rows(self) -> Iterator[dict[str, Any]]:
        for photo, path, photo_id, _, split in self._placed():
            if path is None or photo_id is None:
                continue
            size = photo.size
            if size or any(_needs_size(box) for box in photo.boxes):
                with contextlib.suppress(PhotoError):  # Its boxes are rows with this problem.
                    size = self.sizes.of(photo_id, split, path, photo.size)
            yield {
                "split": split,
                "photo_id": photo_id,
                "file_name": path,
                "width": size and size[0],
                "height": size and size[1],
                "url": photo.url,
                "licence": photo.licence,
            }

    def _boxes(self) -> Iterator[dict[str, Any]]:
        for photo, path, photo_id, wrong, split in self._placed():
            for box in photo.boxes:
                row = {**UNKNOWN_FLAGS, "split": split, "photo_id": photo_id, "file": photo.file, "row": box.row}
                try:
                    if wrong and not (box.problem and box.problem.reason == "bad_row"):
                        raise wrong
                    self._fill(row, box, photo, str(path))
                except RowProblem as problem:
                    row.update(problem=problem.reason, detail=f"{photo.file}, row {box.row}: {problem}")
                yield row

    def _fill(self, row: dict[str, Any], box: Box, photo: PhotoBoxes, path: str) -> None:
        """Fill the row, up to its first problem in the order of `REJECT_REASONS`, which is raised."""
        if box.problem:
            row["label"] = box.label if is_text(box.label) else None
            raise box.problem
        if box.label is not None and not is_text(box.label):
            raise RowProblem("bad_row", f"its label, {shown(box.label)}, is no text")
        row["label"] = box.label
        size, unmeasured = photo.size, None
        if size or _needs_size(box):
            try:
                size = self.sizes.of(row["photo_id"], row["split"], path, photo.size)
            except PhotoError as error:
                unmeasured = f"the size of its photo, {shown(photo.name)}, is not given and cannot be read ({error})"
        if box.unit == "pixel" and size is None:
            raise RowProblem("unknown_photo", unmeasured or "")
        whole = (float(size[0]), float(size[1])) if size and box.unit == "pixel" else (1.0, 1.0)
        slack = (1.0, 1.0) if box.unit == "pixel" else (1 / size[0], 1 / size[1]) if size else (_FRACTION_SLACK, _FRACTION_SLACK)
        place_box(row, [float(edge) for edge in box.edges or ()], whole, slack, box.unit)
        row.update(box.flags)
        if box.segmentation is None:
            return
        try:
            if size is None:
                raise ValueError(unmeasured)
            row["segmentation"] = _mask(box, *size)
        except ValueError as error:
            self.useless += 1
            self.first_useless = self.first_useless or f"{photo.file}, row {box.row}: {error}"


def _needs_size(box: Box) -> bool:
    return box.problem is None and (box.unit == "pixel" or box.segmentation is not None)


def _mask(box: Box, width: int, height: int) -> str | None:
    """The object mask of a photo of this size as compressed RLE. Raises ValueError, with what is wrong in words."""
    if callable(box.segmentation):
        mask: str | None = box.segmentation(width, height)
        return mask
    polygons = box.segmentation
    if box.unit == "fraction" and isinstance(polygons, list):
        polygons = [
            [value * side for value, side in zip(part, itertools.cycle((width, height)), strict=False)] for part in polygons
        ]
    try:
        return compress_mask(polygons, width, height)
    except ValueError as error:
        raise ValueError(f"its outline {error}") from None


def only_label(label: str | None) -> str:
    """A label, or the one of all boxes where the annotations have none."""
    return label or ONLY_LABEL
