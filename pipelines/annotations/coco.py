"""COCO: instances_*.json, with outlines (polygons or RLE) and a class hierarchy of two levels.

    instances_train2017.json ──▶ images      ──▶ PHOTOS
                                 annotations ──▶ BOXES, outlines as compressed RLE
                                 categories  ──▶ class names, supercategories

Format: https://cocodataset.org/#format-data. A box is [x, y, width, height] in px. COCO's own annotators saw the pixels as
stored, whatever EXIF may say; for boxes that were drawn on photos as viewers show them there is `source.frame: exif`.

Python's parser cannot stream JSON, so a file is in memory as a whole while it is read, and takes 6.4 times its size (measured
on 100 MB with outlines; COCO's train2017, 450 MB: about 2.9 GB). It is parsed anew for each use, in 2.3 s per 100 MB: by opening
(categories may stand at its end), for the boxes, for the photos. Nothing is kept between them, and of two files one at a time.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pyarrow as pa

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pipelines.annotations.coco_file import (
    BESIDE_PHOTOS,
    Category,
    CocoFile,
    Instances,
    Photo,
    coco_files,
    compress_mask,
    identifier,
    is_given,
    plain_id,
    read_instances,
)
from pipelines.annotations.photo_names import PhotoNames, PhotoSizes
from pipelines.annotations.source import (
    ONLY_LABEL,
    UNKNOWN_FLAGS,
    RowProblem,
    Source,
    as_number,
    assign_splits,
    given,
    in_batches,
    photo_places,
    place_box,
    shown,
    splits_are_their_own,
)
from pipelines.config import BuildSettings, SourceSettings
from schemas.tables import BOXES, PHOTOS

# Of coordinates in px: what is farther out is no place in a photo.
_LARGEST = 1e300


def open_source(settings: BuildSettings) -> Source:
    """COCO's annotations of a build: see `open_coco`."""
    places = photo_places(settings)
    return open_coco(settings.source, settings.seed, places.roots, places.elsewhere, places.here)


def open_coco(
    settings: SourceSettings, seed: int, roots: Sequence[Path] = (), elsewhere: bool = False, here: bool = True
) -> Source:
    """Open COCO's annotations: a folder with a file for each split, or one file whose photos are divided by a hash of their ids.

    A photo's id is its image's, where that is 1 to 64 letters, digits, `_` and `-`; else readable text of it and a hash. Where
    files number their images anew, as those of Roboflow do, ids come from the photos' paths. Images of one file are one photo,
    with the first of their ids, unless `settings.same_photo` is `report`. Boxes of photos that are not listed count under the
    first of `settings.splits`. File names lie below the photo folder, as `PhotoNames` reads them: those of
    instances_train2017.json in its folder train2017, if there is one. Class ids are category ids, and `object` where there is
    none. A supercategory is a class above its categories, with the id `supercategory:vehicle` and the name `vehicle`; where a
    category bears that name, as `person` does, it stands for both.

    Args:
        settings: of the source.
        seed: of the hash that divides photos.
        roots: folders of photos; `settings.photos` by default.
        elsewhere: photos are in none of these, but where COCO publishes them, by train2017 and val2017.
        here: whether photos lie in these folders; else they are in a photo store, or still to be fetched.

    Raises:
        InputError: no file for a split, or more than one; a file that is not JSON, is cut off, or is not in COCO's format; an id
            that stands for two things; a setting that these files leave without effect.
    """
    roots = roots or [settings.photos]
    files = coco_files(settings, roots, elsewhere)
    if files[0].split and "validation_share" in given(settings):
        raise splits_are_their_own(str(settings.annotations))
    reader = CocoReader(files, settings, seed, PhotoNames(roots, here), PhotoSizes(settings, roots, here))
    return source_of(reader)


def source_of(reader: "CocoReader") -> Source:
    """What a reader reads, once it has looked through its files. Raises InputError, as `open_coco`."""
    settings = reader.settings
    reader.look_through()
    class_names, subclasses = _class_hierarchy(reader.categories, settings.annotations)
    if reader.nameless_class:
        class_names.setdefault(ONLY_LABEL, ONLY_LABEL)
    return Source(
        name=str(settings.annotations),
        files=tuple(file.path for file in reader.files),
        frame=settings.photo_frame,
        read_boxes=reader.read_boxes,
        read_photos=reader.read_photos,
        listed_splits=frozenset(settings.splits),
        class_names=class_names,
        subclasses=subclasses,
        other_names={class_id: category.other_names for class_id, category in reader.categories.items() if category.other_names},
        read_elsewhere=reader.hash_photos,
        rows=reader.rows,
        read_notes=reader.read_notes,
        joined=reader.joined_photos,
    )


def _class_hierarchy(categories: Mapping[str, Category], place: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Class id -> name and class id -> ids directly below it, supercategories and LVIS's frequencies included."""
    names = {class_id: category.name for class_id, category in categories.items()}
    first = {name.casefold(): class_id for class_id, name in reversed(names.items())}
    below: dict[str, list[str]] = {}
    for class_id, category in categories.items():
        above = category.supercategory
        if above is None or first.get(above.casefold()) == class_id:
            continue
        parent = first.get(above.casefold(), f"supercategory:{above}")
        names.setdefault(parent, above)
        below.setdefault(parent, []).append(class_id)
    for class_id, category in categories.items():
        if category.frequency:
            group = f"frequency:{category.frequency}"
            names.setdefault(group, group)
            below.setdefault(group, []).append(class_id)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        circle = " -> ".join(names[class_id] for class_id in error.args[1])
        raise InputError(f"{place}: supercategories go in a circle: {circle}; change one of these") from None
    return names, {class_id: tuple(members) for class_id, members in below.items()}


def _images_of_one_file(instances: Instances) -> dict[str, str]:
    """Id of an image -> id of the first image of the same file; without those that are the first."""
    by_file: dict[str, list[str]] = {}
    for image_id, photo in instances.photos.items():
        if photo.file_name is not None:
            by_file.setdefault(photo.file_name, []).append(image_id)
    joined: dict[str, str] = {}
    for image_ids in by_file.values():
        if len(image_ids) > 1:
            first, *others = sorted(image_ids, key=lambda image_id: (len(image_id), image_id))  # 2 comes before 10.
            joined |= dict.fromkeys(others, first)
    return joined


@dataclass
class CocoReader:
    """Reads the boxes and photos of some files. What one entry of `annotations` is, `_instances` and `_fill` say."""

    files: Sequence[CocoFile]
    settings: SourceSettings
    seed: int
    names: PhotoNames
    sizes: PhotoSizes
    rows: int = 0
    anew: bool = False
    """Whether files number their images anew, so that an image's id is no photo's."""
    joined: dict[Path, dict[str, str]] = field(default_factory=dict)
    """By file: id of an image -> the first id of its photo, where several images are of one photo's file."""
    unsized: bool = False
    """Whether a photo's size is not given."""
    categories: dict[str, Category] = field(default_factory=dict)
    """Of all files."""
    nameless_class: bool = False
    """Whether a box has no class but `object`."""
    useless: int = 0
    """How many outlines cannot be used, of the boxes that were last read."""
    first_useless: str = ""
    """What is wrong with the first of these."""
    entry: str = "annotation"
    """What messages call a box's entry in the file."""

    def look_through(self) -> None:
        """Read all files once: what they hold, and whether they belong together."""
        self.anew = any(file.path.name == BESIDE_PHOTOS for file in self.files)
        homes: dict[str, tuple[Path, str | None]] = {}
        for file in self.files:
            instances = self._read(file)
            self.rows += len(instances.annotations)
            if self.settings.same_photo == "drop":
                self.joined[file.path] = _images_of_one_file(instances)
            self.unsized |= any(photo.size is None for photo in instances.photos.values())
            self.nameless_class |= any(
                isinstance(annotation, dict) and _label_of(annotation, instances.categories) == ONLY_LABEL
                for annotation in instances.annotations
            )
            for image_id, photo in instances.photos.items():
                home, file_name = homes.setdefault(image_id, (file.path, photo.file_name))
                if home == file.path:
                    continue
                if file_name and photo.file_name == file_name:
                    raise InputError(
                        f"{file.path}: image id {image_id} is in {home.name} too, and of the same file, {file_name}: one photo "
                        f"would be in two splits; leave it in one of them"
                    )
                self.anew = True
            for class_id, category in instances.categories.items():
                if self.categories.setdefault(class_id, category).name != category.name:
                    raise InputError(
                        f"{file.path}: category {class_id} is `{category.name}`, in another file "
                        f"`{self.categories[class_id].name}`; give categories the same ids in all files"
                    )
            del instances  # Or two files would be in memory while the next one is parsed.

    def read_boxes(self) -> Iterator[pa.RecordBatch]:
        """Stream the boxes of all files: about 18,000 a second with outlines, on one core."""
        self.useless, self.first_useless = 0, ""
        for file in self.files:
            yield from in_batches(self._boxes(file), BOXES)

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        """Stream all photos, those with no box too. One without a usable file name is left out: its boxes are bad rows."""
        for file in self.files:
            yield from in_batches(self._photos(file), PHOTOS)

    def joined_photos(self) -> list[tuple[str, str, str]]:
        """Split and id of each image that is read as a photo with another id, and that id."""
        found = []
        for file in () if self.anew else self.files:
            pairs = [(plain_id(image_id), plain_id(first)) for image_id, first in self.joined.get(file.path, {}).items()]
            kept = [first for _, first in pairs]
            own = [file.split] * len(kept) if file.split else assign_splits(kept, self.seed, self.settings.validation_share)
            found += [(str(split), *pair) for split, pair in zip(own, pairs, strict=True) if split in self.settings.splits]
        return found

    def hash_photos(self) -> dict[str, str]:
        """A hash of the photos' paths and sizes, as far as they depend on what lies in the photo folder."""
        if not self.names.moved and not self.unsized and self.settings.photo_frame == "stored":
            return {}
        digest = hashlib.sha256()
        for file in self.files:
            for row in self._photos(file):
                digest.update(repr([row[name] for name in ("photo_id", "file_name", "width", "height")]).encode())
        return {"paths and sizes of photos": digest.hexdigest()}

    def read_notes(self) -> list[str]:
        """What a user should know about the boxes that were read."""
        notes = []
        if joined := self.joined_photos():
            _, photo_id, first = joined[0]
            notes.append(
                f"images of a file that another image is of: {len(joined):,}; the boxes of both are those of one photo, for "
                f"example of images {first} and {photo_id}"
            )
        if self.useless:
            notes.append(
                f"outlines that cannot be used: {self.useless:,}; their boxes are taken without one; for example "
                f"{self.first_useless}"
            )
        notes += self.names.notes()
        if self.nameless_class:
            which = "boxes without a category" if self.categories else "there are no `categories`: all boxes"
            notes.append(f"{which} are of the class `{ONLY_LABEL}`")
        return notes

    def _read(self, file: CocoFile) -> Instances:
        # Where the photos of all files lie in one folder, the split makes their ids differ.
        above = f"{file.split}/" if file.split and not file.folder else ""
        joined = self.joined.get(file.path, {})

        def id_of(image_id: str, file_name: str | None) -> str:
            return plain_id(f"{above}{file_name or image_id}" if self.anew else joined.get(image_id, image_id))

        return self._instances(file.path, lambda name: self.names.path_of(name, file.folder), id_of)

    def _instances(self, path: Path, path_of: Callable[[Any], str], id_of: Callable[[str, str | None], str]) -> Instances:
        return read_instances(path, path_of, id_of)

    def _fill(
        self,
        row: dict[str, Any],
        annotation: dict[str, Any],
        photo: Photo | None,
        instances: Instances,
        size_of: Callable[[Photo], tuple[int, int]],
    ) -> str | None:
        return fill_row(row, annotation, photo, instances, size_of)

    def _splits(self, file: CocoFile, instances: Instances) -> dict[str, str]:
        """The split of each photo, by its id."""
        photo_ids = [photo.photo_id for photo in instances.photos.values()]
        if file.split:
            return dict.fromkeys(photo_ids, file.split)
        return dict(zip(photo_ids, assign_splits(photo_ids, self.seed, self.settings.validation_share), strict=True))

    def _boxes(self, file: CocoFile) -> Iterator[dict[str, Any]]:
        instances = self._read(file)
        splits = self._splits(file, instances)

        def size_of(photo: Photo) -> tuple[int, int]:
            return self.sizes.of(photo.photo_id, splits[photo.photo_id], str(photo.file_name), photo.size)

        for number, annotation in enumerate(instances.annotations, start=1):
            row = {**UNKNOWN_FLAGS, "split": file.split or self.settings.splits[0], "file": file.path.name, "row": number}
            name = f"{self.entry} {number}"
            try:
                if not isinstance(annotation, dict):
                    raise RowProblem("bad_row", f"is {shown(annotation)}, expected an object")
                name += f" (id {shown(annotation['id'])})" if "id" in annotation else " (no id)"
                image_id = identifier(annotation.get("image_id"))
                photo = instances.photo_of(image_id) if image_id else None
                if photo:
                    row["split"] = splits[photo.photo_id]
                    if row["split"] not in self.settings.splits:
                        continue
                if useless := self._fill(row, annotation, photo, instances, size_of):
                    self.useless += 1
                    self.first_useless = self.first_useless or f"{file.path.name}, {name}: {useless}"
            except RowProblem as problem:
                row.update(problem=problem.reason, detail=f"{name}: {problem}")
            yield row

    def _photos(self, file: CocoFile) -> Iterator[dict[str, Any]]:
        instances = self._read(file)
        splits = self._splits(file, instances)
        for photo in instances.photos.values():
            split = splits[photo.photo_id]
            if photo.file_name is None or split not in self.settings.splits:
                continue
            size = None
            with contextlib.suppress(PhotoError):  # Its boxes are rows with this problem.
                size = self.sizes.of(photo.photo_id, split, photo.file_name, photo.size)
            yield {
                "split": split,
                "photo_id": photo.photo_id,
                "file_name": photo.file_name,
                "width": size and size[0],
                "height": size and size[1],
                "url": photo.url,
                "licence": photo.licence,
            }


def fill_row(
    row: dict[str, Any],
    annotation: dict[str, Any],
    photo: Photo | None,
    instances: Instances,
    size_of: Callable[[Photo], tuple[int, int]],
) -> str | None:
    """Fill a row from its annotation.

    Args:
        row: split, file and row are there. What is read before a problem is found stays in it.
        annotation: as it stands in the file.
        photo: of the annotation, if the file lists it.
        instances: the file.
        size_of: a photo's width and height in px; raises PhotoError.

    Returns:
        Why the annotation's object mask cannot be used, where it cannot: the box is good without it.

    Raises:
        RowProblem: the first one in the order of `REJECT_REASONS`.
    """
    image_id = identifier(annotation.get("image_id"))
    if image_id is not None:
        row["photo_id"] = photo.photo_id if photo else plain_id(image_id)
    label = row["label"] = _label_of(annotation, instances.categories)
    for key, value in (("image_id", image_id), ("category_id", label)):
        if value is None:
            raise RowProblem("bad_row", f"`{key}` is {shown(annotation.get(key))}, expected a number or text")
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise RowProblem("bad_row", f"`bbox` is {shown(box)}, expected [x, y, width, height]")
    if photo and photo.problem:
        raise RowProblem("bad_row", photo.problem)
    numbers = [value for value in map(as_number, box) if value is not None and abs(value) < _LARGEST]
    if len(numbers) != 4:
        raise RowProblem("bad_number", f"`bbox` is {shown(box)}, expected four finite numbers")
    x, y, width, height = numbers
    if photo is None:
        raise RowProblem("unknown_photo", f"`image_id` {image_id} is not in `images`")
    try:
        size = size_of(photo)
    except PhotoError as error:
        unknown = f"the size of its image, {shown(photo.name)}, is not given and cannot be read ({error})"
        raise RowProblem("unknown_photo", unknown) from None
    place_box(row, (x, y, x + width, y + height), size, (1, 1))
    crowd = annotation.get("iscrowd")
    if is_given(crowd):
        flag = as_number(int(crowd) if isinstance(crowd, bool) else crowd)
        if flag not in (0, 1, -1):
            raise RowProblem("bad_flag", f"`iscrowd` is {shown(crowd)}, expected 0 or 1")
        row["is_group_of"] = int(flag)
    try:
        row["segmentation"] = compress_mask(annotation.get("segmentation"), *size)
    except ValueError as error:
        return f"`segmentation` {error}"
    return None


def _label_of(annotation: dict[str, Any], categories: Mapping[str, Category]) -> str | None:
    """The class id of an annotation; `object` where it or its file names none; nothing where there is something else."""
    category_id = annotation.get("category_id")
    return identifier(category_id) if categories and is_given(category_id) else ONLY_LABEL
