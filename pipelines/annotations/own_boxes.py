"""Your own boxes: one CSV, JSON Lines or Parquet file with a box on each line, or a folder of photos (docs/own-data.md).

    photo,x_min,y_min,x_max,y_max,label          ours
    image,xmin,ymin,xmax,ymax,label              VoTT and many others: read, with a note
    filename,width,height,class,xmin,...         TensorFlow's examples: read, with a note
    photo,x,y,width,height                       corner and size, or centre and size? refused
    ...,lable,name                               refused, all names at once
    photo,...,group                              boxes that show the same instance
    photo,...,reference_photo,reference_x_min,...    a table of pairs: what is shown, and where else it is seen

Line by line in Python: about 25,000 rows a second on one core, where the file gives the sizes of photos. Where it does not and
coordinates are px, each photo's header is read once, in 0.1 ms; a PNG takes 20 ms (`pbe_core.images.decode.photo_size`). Memory
holds a batch of rows and an entry of about 0.7 kB for each photo.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pipelines.annotations.coco_file import is_given
from pipelines.annotations.csv_files import (
    Line,
)
from pipelines.annotations.groups import folder_of, split_names
from pipelines.annotations.own_lines import (
    CORNERS,
    FRACTION_SLACK,
    REFERENCE,
    REFERENCE_MASKS,
    check_unit,
    coordinate_of,
    count_lines,
    is_json,
    is_parquet,
    label_of,
    read_head,
    read_lines,
    reference_line,
    side_of,
    split_of,
    text_of,
)
from pipelines.annotations.own_masks import COLUMNS as MASK_COLUMNS
from pipelines.annotations.own_masks import WITHOUT_MASKS, mask_place, outline_of
from pipelines.annotations.photo_names import PhotoNames, PhotoSizes
from pipelines.annotations.source import (
    ONLY_LABEL,
    UNKNOWN_FLAGS,
    RowProblem,
    Source,
    assign_splits,
    given,
    in_batches,
    photo_id_of,
    photo_places,
    place_box,
    shown,
    splits_are_their_own,
)
from pipelines.config import BuildSettings, SourceSettings
from schemas.tables import BOXES, COORDINATES, PHOTOS


def open_source(settings: BuildSettings) -> Source:
    """Own boxes of a build: see `open_boxes`."""
    return open_boxes(settings.source, settings.seed, photo_places(settings).here)


def open_boxes(settings: SourceSettings, seed: int, here: bool = True) -> Source:
    """Open one CSV or JSON Lines file, gzipped or not, or a Parquet file, with a box on each line; or a folder of photos.

    Coordinates are px or fractions as `settings.unit` says, x right and y down from the top left corner of the photo in
    `settings.photo_frame`. Photos' names lead to files below the photo folder as `PhotoNames` reads them. Without labels every
    box is an `object`. Without a column `split`, a hash of the photo's id decides; rows whose photo is not known count under the
    first of `settings.splits`. Photos that share an instance are in one split: then a hash of the instance's name decides.

    Of a folder, each photo in it is one box, the whole photo. Where columns name references, rows of the same box are one box,
    and their references are its.

    Args:
        settings: of the source.
        seed: of the build.
        here: whether photos must lie in the photo folder; else they are in a photo store, or still to be fetched.

    Raises:
        InputError: the file cannot be read as UTF-8 text with a header or with objects, has a column of another name, or its
            first rows do not look like `settings.unit`; a setting that its columns leave without effect.
    """
    path = settings.annotations
    if path.is_dir():
        settings = settings.model_copy(update={"unit": "fraction"})
    columns, first, note = read_head(path)
    check_unit(path, settings.unit or "pixel", first)
    if settings.unit == "pixel" and not here and not {"width", "height"} <= set(columns):
        raise InputError(
            f"{path}: boxes in px need the sizes of photos that are still to be crawled; add columns width and height, or write "
            f"the boxes as fractions (source.unit: fraction)"
        )
    if REFERENCE[0] not in columns and any(name in columns for name in (*REFERENCE[1:], *REFERENCE_MASKS)):
        raise InputError(f"{path}: column {REFERENCE[0]} is missing, of which the others tell the box (docs/own-data.md)")
    if settings.unit == "fraction" and "segmentation" in columns and not here and not {"width", "height"} <= set(columns):
        raise InputError(
            f"{path}: outlines need the sizes of photos that are still to be crawled; add columns width and height, or take the "
            f"column segmentation away"
        )
    if "split" in columns and "validation_share" in given(settings):
        raise splits_are_their_own(str(path))
    roots = [settings.photos]
    reader = _Reader(path, settings, seed, columns, PhotoNames(roots, here), PhotoSizes(settings, roots, here))
    return Source(
        name=str(path),
        files=() if path.is_dir() else (path,),
        frame=settings.photo_frame,
        read_boxes=reader.read_boxes,
        read_photos=reader.read_photos,
        class_names={} if "label" in columns else {ONLY_LABEL: ONLY_LABEL},
        read_elsewhere=reader.hash_photos,
        read_notes=reader.names.notes,
        rows=count_lines(path),
        groups=reader.grouped,
        notes=(f"{path}: {note}",) if note else (),
        no_masks="" if set(MASK_COLUMNS) & set(columns) else WITHOUT_MASKS,
    )


# Rows and photos.


@dataclass(slots=True)
class _Photo:
    photo_id: str
    line: int  # Where it stands first.
    split: str | None = None
    width: int | None = None
    height: int | None = None
    url: str | None = None
    author: str | None = None
    licence: str | None = None
    outlined: bool = False  # Whether a line gives an outline, which counts in px.


@dataclass
class _Photos:
    """What is known about each photo from the lines read so far."""

    names: PhotoNames
    by_name: dict[str, _Photo] = field(default_factory=dict)  # By its path below the photo folder.
    path_of: dict[str | None, str] = field(default_factory=dict)  # Of names that are written otherwise.
    name_of: dict[str, str] = field(default_factory=dict)  # By photo id.

    def of(self, line: Line, columns: Sequence[str | None]) -> tuple[str, _Photo]:
        """The photo of a line: its file name, and what is known about it.

        Raises:
            RowProblem: `bad_row`, if the line cannot be read, or contradicts a line above it about the photo.
        """
        if line.problem:
            raise RowProblem("bad_row", f": {line.problem}")
        name = text_of(line, "photo")
        if name is None or name not in self.by_name:
            name = self.path_of.get(name) or self._find(name)
        split = split_of(line)
        if "split" in columns and split is None:
            raise RowProblem("bad_row", ", column split: is empty")
        fixed = {"split": split, "width": side_of(line, "width"), "height": side_of(line, "height")}
        if (fixed["width"] is None) != (fixed["height"] is None):
            raise RowProblem("bad_row", ", column width: of width and height only one is there")
        texts = {column: text_of(line, column) for column in ("url", "author", "licence")}

        photo = self.by_name.get(name)
        if photo is None:
            photo = _Photo(photo_id_of(name), line.number)
            if (other := self.name_of.setdefault(photo.photo_id, name)) != name:
                raise RowProblem("bad_row", f", column photo: {name!r} and {other!r} get the same id; rename one of the files")
            self.by_name[name] = photo
        for column, value in {**fixed, **texts}.items():
            before = getattr(photo, column)
            if column in fixed and None not in (before, value) and before != value:
                raise RowProblem(
                    "bad_row", f", column {column}: {value!r}, but {before!r} in line {photo.line} for the same photo"
                )
            if before is None:
                setattr(photo, column, value)
        photo.outlined |= is_given(line.values.get("segmentation"))
        return name, photo

    def _find(self, name: str | None) -> str:
        try:
            path = self.names.path_of(name)
        except ValueError as error:
            raise RowProblem("bad_row", f", column photo: {shown(name)} {error}") from None
        if path != name:
            self.path_of[name] = path
        return path


@dataclass
class _Reader:
    path: Path
    settings: SourceSettings
    seed: int
    columns: Sequence[str | None]
    names: PhotoNames
    sizes: PhotoSizes

    @property
    def paired(self) -> bool:
        """Whether lines name references."""
        return REFERENCE[0] in self.columns

    @property
    def grouped(self) -> bool:
        """Whether it is known which boxes show the same instance."""
        return self.paired or "group" in self.columns or self.settings.group_by == "folder"

    def read_boxes(self) -> Iterator[pa.RecordBatch]:
        boxes = self._with_references() if self.paired else self._boxes()
        yield from in_batches(self._of_wanted_splits(boxes), BOXES)

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        yield from in_batches(self._of_wanted_splits(self._photo_rows()), PHOTOS)

    def hash_photos(self) -> dict[str, str]:
        """Hashes of the photos' sizes and paths, as far as they depend on what lies in the photo folder: what comes or goes there
        changes them.
        """
        photos = self._all_photos()
        hashes = {"paths of photos": repr(sorted(photos))} if self.names.moved or self.path.is_dir() else {}
        sized = [(name, photo) for name, photo in sorted(photos.items()) if self._is_sized(photo)]
        if sized or self.settings.unit == "pixel":
            sizes: list[tuple[str, str]] = []
            for name, photo in sized:
                try:
                    sizes.append((name, str(self._size(name, photo))))
                except PhotoError as error:
                    sizes.append((name, error.code))
            hashes["sizes of photos"] = repr(sizes)
        found = {what: hashlib.sha256(text.encode()).hexdigest() for what, text in hashes.items()}
        if "mask" in self.columns:
            digest = hashlib.sha256()
            for row in self._boxes():
                digest.update(repr((row["row"], row.get("segmentation"))).encode())
            found["places of masks"] = digest.hexdigest()
        return found

    def _boxes(self) -> Iterator[dict[str, Any]]:
        photos = _Photos(self.names)
        above = 1 if self.path.is_file() and not (is_json(self.path) or is_parquet(self.path)) else 0
        for line in read_lines(self.path, self.columns):
            row = {**UNKNOWN_FLAGS, "file": self.path.name, "row": line.number - above}
            try:
                self._fill(row, line, photos)
            except RowProblem as problem:
                row.update(problem=problem.reason, detail=f"{self.path.name}, line {line.number}{problem}")
            yield row

    def _with_references(self) -> Iterator[dict[str, Any]]:
        """The boxes of a table of pairs, which may name several references of a box: one row each, where it is named first.

        Holds all of them: the last line may name a reference of the first one's box.
        """
        boxes: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self._boxes():
            if row.get("problem"):
                yield row
                continue
            first = boxes.setdefault(tuple(row[name] for name in ("photo_id", "split", "label", *COORDINATES)), row)
            if first is not row:
                more = [each for each in row["references"] or () if each not in (first["references"] or ())]
                first["references"] = [*(first["references"] or ()), *more] or None
                first["group"] = first["group"] or row["group"]
        yield from boxes.values()

    def _photo_rows(self) -> Iterator[dict[str, Any]]:
        for name, photo in self._all_photos().items():
            with contextlib.suppress(PhotoError):  # Its boxes are rows with this problem.
                width, height = self._size(name, photo) if self._is_sized(photo) else (photo.width, photo.height)
                known = {key: getattr(photo, key) for key in ("photo_id", "split", "url", "author", "licence")}
                yield {**known, "file_name": name, "width": width, "height": height}

    def _all_photos(self) -> dict[str, _Photo]:
        """By file name; a line that cannot be read is among the boxes, with its problem."""
        photos = _Photos(self.names)
        for line in read_lines(self.path, self.columns):
            with contextlib.suppress(RowProblem):
                photos.of(line, self.columns)
                if self.paired:
                    photos.of(reference_line(line), self.columns)
        return photos.by_name

    def _fill(self, row: dict[str, Any], line: Line, photos: _Photos) -> None:
        """Fill the row from the line, up to its first problem in the order of `REJECT_REASONS`, which is raised."""
        name, photo = photos.of(line, self.columns)
        row["photo_id"], row["split"] = photo.photo_id, photo.split
        row["label"] = label_of(line) if "label" in self.columns else ONLY_LABEL
        edges = [coordinate_of(line, column) for column in CORNERS]
        size, slack = (1.0, 1.0), (FRACTION_SLACK, FRACTION_SLACK)
        if self.settings.unit == "pixel":
            try:
                size, slack = self._size(name, photo), (1.0, 1.0)
            except PhotoError as error:
                raise RowProblem("unknown_photo", f", column photo: the size of {name!r} cannot be read ({error})") from None
        elif photo.width and photo.height:
            slack = 1 / photo.width, 1 / photo.height
        try:
            place_box(row, edges, size, slack, self.settings.unit or "pixel")
        except RowProblem as problem:
            raise RowProblem(problem.reason, f", column {problem}") from None
        row["segmentation"] = self._mask(line, name, photo)
        row["group"] = self._group_of(name, line)
        if self.paired:
            row["references"] = self._references_of(line, photo, photos)

    def _group_of(self, name: str, line: Line) -> str | None:
        group = label_of(line, "group") if "group" in self.columns else None
        if self.settings.group_by == "column":
            return group
        # Numbers of tracks start anew in each video.
        return "/".join(part for part in (folder_of(name), group) if part) or None

    def _references_of(self, line: Line, target: _Photo, photos: _Photos) -> list[dict[str, Any]] | None:
        """The reference that a line names, as `schemas.tables.REFERENCE` has it; null where its cells are empty.

        Raises:
            RowProblem: it cannot be read, or is the photo itself.
        """
        if all(line.values.get(name) in (None, "") for name in (*REFERENCE, *REFERENCE_MASKS)):
            return None
        named = reference_line(line)
        name, photo = photos.of(named, self.columns)
        if photo is target:
            raise RowProblem("bad_row", f", column {REFERENCE[0]}: is the photo itself; a reference is from another photo")
        box: dict[str, Any] = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}  # Without edges, the whole photo.
        if any(line.values.get(edge) not in (None, "") for edge in REFERENCE[1:]):
            try:
                edges = [coordinate_of(line, edge) for edge in REFERENCE[1:]]
                size = (1.0, 1.0) if self.settings.unit == "fraction" else self._size(name, photo)
                place_box(
                    box, edges, size, (1.0, 1.0) if self.settings.unit == "pixel" else (FRACTION_SLACK, FRACTION_SLACK), "pixel"
                )
            except PhotoError as error:
                raise RowProblem(
                    "unknown_photo", f", column {REFERENCE[0]}: the size of {name!r} cannot be read ({error})"
                ) from None
            except RowProblem as problem:
                raise RowProblem(problem.reason, f", reference: {str(problem).removeprefix(', ')}") from None
        try:
            mask = self._mask(named, name, photo)
        except RowProblem as problem:
            raise RowProblem(problem.reason, f", reference: {str(problem).removeprefix(', ')}") from None
        known = {key: getattr(photo, key) for key in ("photo_id", "width", "height", "url", "author", "licence")}
        if mask:
            known["width"], known["height"] = self._size(name, photo)  # Its outline is over so many px.
        return [{**known, **box, "segmentation": mask, "file_name": name, "rotation": None}]

    @functools.cached_property
    def _split_names(self) -> dict[str, str]:
        """Photo -> what decides its split, of photos that share an instance with others, or may."""
        return split_names(self._links()) if self.grouped else {}

    def _links(self) -> Iterator[tuple[str, str | None, str | None]]:
        """Of each line that can be read: its photo, its group and its reference's photo."""
        photos = _Photos(self.names)
        for line in read_lines(self.path, self.columns):
            with contextlib.suppress(RowProblem):
                name, photo = photos.of(line, self.columns)
                group, other = self._group_of(name, line), None
                if self.paired and line.values.get(REFERENCE[0]) not in (None, ""):
                    with contextlib.suppress(RowProblem):
                        other = photos.of(reference_line(line), self.columns)[1].photo_id
                yield photo.photo_id, group, other

    def _mask(self, line: Line, name: str, photo: _Photo) -> str | None:
        """The object's mask, as a table's `segmentation` holds it."""
        outline, file = (line.values.get(column) for column in MASK_COLUMNS)
        if is_given(outline) and is_given(file):
            raise RowProblem("bad_row", ", column mask: there is a `segmentation` too; give one of them")
        known = (photo.width, photo.height) if photo.width and photo.height else None
        if is_given(file):
            return mask_place(file, self._size(name, photo) if self._is_sized(photo) else known, self.settings)
        if not is_given(outline):
            return None
        try:
            return outline_of(outline, self._size(name, photo), self.settings.unit or "pixel")
        except PhotoError as error:
            raise RowProblem("unknown_photo", f", column photo: the size of {name!r} cannot be read ({error})") from None

    def _is_sized(self, photo: _Photo) -> bool:
        """Whether the size of a photo must be known, as something is said about it in px."""
        return self.settings.unit == "pixel" or photo.outlined

    def _size(self, name: str, photo: _Photo) -> tuple[int, int]:
        if photo.width and photo.height:
            return photo.width, photo.height
        return self.sizes.of(photo.photo_id, photo.split or "", name, None)

    def _of_wanted_splits(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of `settings.splits`; those without a split get theirs first, many at once."""
        while batch := list(itertools.islice(rows, 1000)):
            undecided = [row for row in batch if row.get("split") is None and "photo_id" in row]
            names = [self._split_names.get(row["photo_id"], row["photo_id"]) for row in undecided] if self.grouped else []
            names = names or [row["photo_id"] for row in undecided]
            splits = assign_splits(names, self.seed, self.settings.validation_share)
            for row, split in zip(undecided, splits, strict=True):
                row["split"] = split
            for row in batch:
                if row.setdefault("split", self.settings.splits[0]) in self.settings.splits:
                    yield row
