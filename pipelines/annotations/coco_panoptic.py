"""COCO's panoptic format: a JSON with the segments of each photo, and a PNG for each photo whose colours are their numbers.

    panoptic_train2017.json ──▶ images, categories, segments (box, class, crowd or not) ──┐
    panoptic_train2017/*.png, or panoptic_train2017.zip: R + 256 G + 65536 B ─────────────┴─▶ BOXES, object masks as RLE

Format: https://cocodataset.org/#format-data, section 4; as panopticapi, Detectron2 and MMDetection read and write it. Segments of
things are objects with exact masks; those of stuff (`isthing` 0: sky, grass) have no instances and are left out. A segment
without a `bbox`, as some converters leave it, has that of its pixels.

A photo's PNG is decoded once, in about 10 ms, so train2017 takes some 20 minutes on one core; several are decoded ahead.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from jaxtyping import Int32

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pipelines.annotations.coco import CocoReader, fill_row, source_of
from pipelines.annotations.coco_file import (
    MAX_MASKED_PHOTO,
    CocoFile,
    Instances,
    Photo,
    identifier,
    instances_of,
    is_given,
    parse_json,
    photo_folder,
    split_word,
)
from pipelines.annotations.mask_files import MaskError, MaskFiles, read_file, read_place, segment_ids
from pipelines.annotations.photo_names import PhotoNames, PhotoSizes
from pipelines.annotations.source import RowProblem, Source, as_number, given, is_text, photo_places, shown, splits_are_their_own
from pipelines.config import BuildSettings, SourceSettings
from pipelines.threads import in_order

_AHEAD = 8
_THREADS = 4
_SUFFIXES = (".json", ".json.gz")
_Ids = Int32[np.ndarray, "height width"]


def open_source(settings: BuildSettings) -> Source:
    """COCO's panoptic annotations of a build: a folder with a file for each split, or one file.

    All is read as in `pipelines.annotations.coco.open_coco`, but for where boxes and masks stand.

    Raises:
        InputError: as there; and where a file's PNGs are not beside it.
    """
    source, places = settings.source, photo_places(settings)
    files = _files(source, places.roots, places.elsewhere)
    if files[0].split and "validation_share" in given(source):
        raise splits_are_their_own(str(source.annotations))
    names, sizes = PhotoNames(places.roots, places.here), PhotoSizes(source, places.roots, places.here)
    pngs = {file.path: find_pngs(file.path) for file in files}
    reader = PanopticReader(files, source, settings.seed, names, sizes, entry="segment", pngs=pngs)
    return source_of(reader)


def _files(settings: SourceSettings, roots: Sequence[Path], elsewhere: bool) -> list[CocoFile]:
    place = settings.annotations
    if place.is_file():
        return [CocoFile(place, None, _photos_of(place, roots, elsewhere))]
    if not place.is_dir():
        raise InputError(
            f"{place}: no such file or folder; set build.source.annotations to COCO's panoptic JSON, or to the folder with it"
        )
    return [CocoFile(path, split, _photos_of(path, roots, elsewhere)) for split, path in _of_splits(settings).items()]


def _of_splits(settings: SourceSettings) -> dict[str, Path]:
    place = settings.annotations
    found: dict[str, Path] = {}
    names = sorted(path for path in place.iterdir() if "panoptic" in path.name and path.name.endswith(_SUFFIXES))
    for split in settings.splits:
        paths = [path for path in names if split_word(path, split)]
        if len(paths) > 1:
            raise InputError(f"{place}: {paths[0].name} and {paths[1].name} are both of the split {split}; move one of them away")
        if not paths:
            raise InputError(
                f"{place}: no file panoptic_{'val' if split == 'validation' else split}*.json for the split {split}; "
                f"put it there, take `{split}` out of build.source.splits, or set build.source.annotations to one JSON file"
            )
        found[split] = paths[0]
    return found


def _photos_of(path: Path, roots: Sequence[Path], elsewhere: bool) -> str:
    """Where photos are named from: those of panoptic_train2017.json as those of instances_train2017.json."""
    return photo_folder(path.with_name(path.name.replace("panoptic_", "instances_", 1)), roots, elsewhere)


# PNGs.


@dataclass(frozen=True)
class Pngs:
    """The PNGs of one file."""

    place: Path
    """The folder or zip."""
    members: MaskFiles | None
    """What is in the zip."""

    def read(self, name: str) -> bytes:
        """A PNG's bytes by the name that the JSON gives. Raises MaskError."""
        if self.members is None:
            if name.startswith("/") or ".." in name.split("/"):
                raise MaskError(f"{shown(name)} leads out of {self.place}")
            return read_file(self.place / name)
        (found,) = self.members.find([name.rpartition("/")[2]])
        if found is None:
            raise MaskError(f"{shown(name)} is not in {self.place}")
        return read_place(found, self.place.parent, self.place.parent)

    def digest(self) -> str:
        """A hash of the PNGs' names and sizes, or of a zip's list of them."""
        if self.members is not None:
            return f"{self.members.digest()} {self.place.stat().st_size}"
        found = sorted((path.name, path.stat().st_size) for path in self.place.iterdir() if path.suffix == ".png")
        return hashlib.sha256(repr(found).encode()).hexdigest()


def find_pngs(path: Path) -> Pngs:
    """Where the PNGs of a JSON are: in the folder or zip of its name, or beside it.

    Raises:
        InputError: in none of these, or the zip cannot be read.
    """
    stem = path.parent / path.name.removesuffix(".gz").removesuffix(".json")
    archive = stem.with_name(f"{stem.name}.zip")
    if stem.is_dir():
        return Pngs(stem, None)
    if archive.is_file():
        return Pngs(archive, MaskFiles.of(path.parent, [archive]))
    if next(path.parent.glob("*.png"), None):
        return Pngs(path.parent, None)
    raise InputError(f"{path}: neither its PNGs' folder {stem} nor {archive.name} is there; put it beside the JSON")


class _Decoded:
    """The numbers of each photo's segments, decoded some photos ahead."""

    def __init__(self, pngs: Pngs, names: Sequence[Any], max_pixels: int) -> None:
        self._pngs, self._names, self._max_pixels = pngs, names, max_pixels
        self._ahead = self._decode_all()
        self._last: tuple[int, _Ids | MaskError] | None = None

    def of(self, place: int) -> _Ids:
        """Of the photo at a place in the file's `annotations`; places go up. Raises MaskError: its PNG cannot be used."""
        while self._last is None or self._last[0] < place:
            self._last = next(self._ahead)
        if isinstance(self._last[1], MaskError):
            raise self._last[1]
        return self._last[1]

    def _decode_all(self) -> Iterator[tuple[int, _Ids | MaskError]]:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as pool:
            yield from enumerate(in_order(pool, self._decode, self._names, _AHEAD))

    def _decode(self, name: Any) -> _Ids | MaskError:
        try:
            if not is_text(name) or not name:
                raise MaskError(f"`file_name` is {shown(name)}, expected the name of a PNG")
            return segment_ids(self._pngs.read(name), self._max_pixels)
        except MaskError as error:
            return error


# Segments.


@dataclass
class PanopticReader(CocoReader):
    """Segments of things as boxes: an annotation of the file is one photo with all its segments."""

    pngs: Mapping[Path, Pngs] = field(default_factory=dict)
    """By file."""
    thingless: bool = False
    """Whether all categories of a file are of stuff: then its writer has no word of things, and all are taken for them."""
    _stuff: dict[Path, int] = field(default_factory=dict)

    def hash_photos(self) -> dict[str, str]:
        """As of COCO's instances, and which PNGs there are."""
        return super().hash_photos() | {f"PNGs of {path.name}": pngs.digest() for path, pngs in self.pngs.items()}

    def read_notes(self) -> list[str]:
        """What a user should know about the segments that were read."""
        stuff = sum(self._stuff.values())
        left = [f"segments of stuff (`isthing` 0), which has no instances, are left out: {stuff:,}"] if stuff else []
        if self.thingless:
            left.append("no category is of things (`isthing` 1): all of them are taken for things")
        return [*super().read_notes(), *left]

    def _instances(self, path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]) -> Instances:
        document = parse_json(path)
        for key in ("images", "annotations", "categories"):
            if not isinstance(document.get(key), list):
                raise InputError(f"{path}: no list `{key}` in it (found: {shown(list(document))}); take a panoptic_*.json")
        entries = document["annotations"]
        if entries and not any(isinstance(entry, dict) and "segments_info" in entry for entry in entries):
            raise InputError(
                f"{path}: no annotation has `segments_info` (the first one is {shown(entries[0])}); take a panoptic_*.json, or "
                f"read instances_*.json with source.kind: coco"
            )
        names = [entry.get("file_name") if isinstance(entry, dict) else None for entry in entries]
        decoded = _Decoded(self.pngs[path], names, self.settings.max_photo_pixels)
        segments = [segment for place, entry in enumerate(entries) for segment in _segments(entry, place, decoded)]
        categories = [entry for entry in document["categories"] if isinstance(entry, dict)]
        stuff = {identifier(entry.get("id")) for entry in categories if _is_stuff(entry)}
        if self.thingless or (categories and len(stuff) == len({identifier(entry.get("id")) for entry in categories})):
            self.thingless, stuff = True, set()
        kept = [one for one in segments if not isinstance(one, dict) or identifier(one.get("category_id")) not in stuff]
        self._stuff[path] = len(segments) - len(kept)
        return instances_of({**document, "annotations": kept}, path, path_of, id_of)

    def _fill(
        self,
        row: dict[str, Any],
        annotation: dict[str, Any],
        photo: Photo | None,
        instances: Instances,
        size_of: Callable[[Photo], tuple[int, int]],
    ) -> str | None:
        changed = dict(annotation)
        place, decoded = changed.pop("_place"), changed.pop("_decoded")
        if photo and not photo.problem and decoded:
            with contextlib.suppress(PhotoError):  # `fill_row` says so.
                changed |= _with_mask(changed, decoded, place, size_of(photo))
        return fill_row(row, changed, photo, instances, size_of)


def _segments(entry: Any, place: int, decoded: _Decoded) -> Iterator[Any]:
    """The segments of an entry of `annotations`, with its image's id, its place in the file, and what decodes its PNG.

    What is no segment comes as it stands, to be rejected.
    """
    infos = entry.get("segments_info") if isinstance(entry, dict) else None
    if not isinstance(infos, list):
        yield entry if not isinstance(entry, dict) else {**entry, "_place": place, "_decoded": None}
        return
    for info in infos:
        image = {"image_id": entry.get("image_id"), "_place": place, "_decoded": decoded}
        yield {**info, **image} if isinstance(info, dict) else info


def _is_stuff(category: Mapping[str, Any]) -> bool:
    """`isthing` is 0; a category that does not say is one of things."""
    thing = category.get("isthing")
    return thing is not None and as_number(int(thing) if isinstance(thing, bool) else thing) == 0


def _with_mask(segment: Mapping[Any, Any], decoded: _Decoded, place: int, size: tuple[int, int]) -> dict[str, Any]:
    """The segment's pixels as run lengths, and their box where the file gives none.

    Raises:
        RowProblem: `bad_row`: the PNG cannot be used, or does not have the segment.
    """
    number = as_number(segment.get("id"))
    if number is None:
        raise RowProblem("bad_row", f"`id` is {shown(segment.get('id'))}, expected the number of a segment")
    try:
        ids = decoded.of(place)
    except MaskError as error:
        raise RowProblem("bad_row", f"its PNG: {error}") from None
    if ids.shape != size[::-1]:
        raise RowProblem("bad_row", f"its PNG has {ids.shape[1]}x{ids.shape[0]} px, the photo {size[0]}x{size[1]}")
    if ids.size > MAX_MASKED_PHOTO:
        raise RowProblem("bad_row", f"its photo has {ids.size:,} px, more than {MAX_MASKED_PHOTO:,}")
    pixels = ids == number
    encoded = pycocotools.mask.encode(np.asfortranarray(pixels, np.uint8))
    area = int(pycocotools.mask.area(encoded))
    if not area:
        raise RowProblem("bad_row", f"its PNG has no pixel of segment {shown(segment.get('id'))}")
    mask = {"segmentation": {"size": list(ids.shape), "counts": encoded["counts"].decode()}}
    return mask if is_given(segment.get("bbox")) else mask | {"bbox": pycocotools.mask.toBbox(encoded).tolist()}
