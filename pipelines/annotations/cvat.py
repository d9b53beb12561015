"""CVAT: the XML of its export `CVAT for images 1.1`, and of datumaro, one file or one for each subset.

    <image name="a/b.jpg" width height subset>  ──▶ photo
      <box label xtl ytl xbr ybr rotation>      ──▶ box; of a turned one its upright bounds, as far as they lie in the photo
      <ellipse cx cy rx ry rotation>            ──▶ its bounds
      <polygon points="x,y;x,y">                ──▶ bounds and outline
      <mask rle left top width height>          ──▶ bounds and px: run lengths row by row, the first of px that are not the object

Format: https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/. Edges are px from 0. Polylines, points, skeletons,
cuboids and tags are no boxes: a note counts them. CVAT's other exports (COCO, YOLO, Ultralytics, VOC) are read as those formats.
A file is in memory as a whole while it is read, and takes some 4 times its size.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from pbe_core.errors import InputError
from pipelines.annotations.coco_file import MAX_MASKED_PHOTO
from pipelines.annotations.per_photo import Box, PhotoBoxes, bounds, corners, open_photos, turned
from pipelines.annotations.pixel_masks import box_of_pixels
from pipelines.annotations.source import RowProblem, Source, as_number, shown
from pipelines.annotations.xml_file import read_xml
from pipelines.annotations.yolo_files import SPLIT_WORDS
from pipelines.config import BuildSettings

_NO_BOXES = ("polyline", "points", "cuboid", "skeleton", "tag")
_SHAPES = ("box", "polygon", "mask", "ellipse")


def open_source(settings: BuildSettings) -> Source:
    """Open CVAT's XML: a file, or a folder with `annotations.xml` or with a file for each subset.

    Labels are names. An image's subset, or its file's name, is its split where it is called like one (Train, val, ...); a
    hash divides all others. `occluded` is a flag; shapes that are `outside`, as of a track's frame, are no boxes.

    Raises:
        InputError: no such file, or no XML of this export; a setting that it leaves without effect.
    """
    place = settings.source.annotations
    files = [place] if place.is_file() else sorted(place.glob("*.xml")) or sorted(place.glob("*/*.xml"))
    if not files:
        raise InputError(f"{place}: no XML here; set build.source.annotations to annotations.xml of the export `CVAT for images`")
    reader = _Reader(files)
    return open_photos(settings, reader.read, files, read_notes=reader.notes)


@dataclass
class _Reader:
    files: Sequence[Path]
    other: Counter[str] = field(default_factory=Counter)
    """Shapes that are no boxes, of those that were last read."""

    def read(self) -> Iterator[PhotoBoxes]:
        """All images, in the order of the files."""
        self.other = Counter()
        for path in self.files:
            tree = _read(path)
            of_file, rows = SPLIT_WORDS.get(path.stem.casefold()), itertools.count(1)
            for image in tree.iterfind("image"):
                split = SPLIT_WORDS.get((image.get("subset") or "").casefold(), of_file)
                sides = [as_number(image.get(side, "")) for side in ("width", "height")]
                whole = [round(side) for side in sides if side is not None and 0 < side < 2**31]
                size = (whole[0], whole[1]) if len(whole) == 2 and min(whole) > 0 else None
                yield PhotoBoxes(image.get("name"), list(self._boxes(image, size, rows)), path.name, size=size, split=split)

    def notes(self) -> list[str]:
        """What a user should know about the shapes that were last read."""
        if not self.other:
            return []
        return [
            f"shapes that are no boxes are not read: {', '.join(f'{count:,} {tag}' for tag, count in sorted(self.other.items()))}"
        ]

    def _boxes(self, image: Element, size: tuple[int, int] | None, rows: Iterator[int]) -> Iterator[Box]:
        for shape in image:
            number = next(rows)
            if shape.tag not in _SHAPES or shape.get("outside") == "1":
                kind = shape.tag if shape.tag not in _SHAPES else f"{shape.tag} outside of its frame"
                self.other[kind] += 1
                continue
            label = (shape.get("label") or "").strip() or None
            try:
                box = _SHAPE_OF[shape.tag](shape, size)
            except RowProblem as problem:
                box = Box(None, None, problem=problem)
            box.label, box.row = label, number
            flag = shape.get("occluded")
            box.flags = {"is_occluded": int(flag)} if flag in ("0", "1") else {}
            yield box


def _read(path: Path) -> Element:
    try:
        tree = read_xml(path)
    except ValueError as error:
        raise InputError(f"{path}: this file {error}; export it again") from None
    if tree.tag != "annotations":
        raise InputError(f"{path}: begins with <{tree.tag[:40]}>, expected CVAT's <annotations> (VOC's XML: source.kind: voc)")
    if tree.find("track") is not None:
        raise InputError(f"{path}: this is the export `CVAT for video`; export `CVAT for images` of the same task")
    return tree


def _numbers(shape: Element, names: Sequence[str]) -> list[float]:
    values = [as_number(shape.get(name, "")) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise RowProblem("bad_number", f"`{name}` of a {shape.tag} is {shown(shape.get(name))}, no finite number")
    return [value for value in values if value is not None]


def _box(shape: Element, size: tuple[int, int] | None) -> Box:
    left, top, right, bottom = _numbers(shape, ("xtl", "ytl", "xbr", "ybr"))
    degrees = as_number(shape.get("rotation") or "0") or 0.0
    if degrees % 360 == 0:
        return Box(None, (left, top, right, bottom))
    middle = ((left + right) / 2, (top + bottom) / 2)
    return Box(None, bounds(turned(corners(left, top, right, bottom), middle, degrees), *_limits(size)))


def _ellipse(shape: Element, size: tuple[int, int] | None) -> Box:
    x, y, across, down = _numbers(shape, ("cx", "cy", "rx", "ry"))
    angle = np.radians(as_number(shape.get("rotation") or "0") or 0.0)
    half = np.hypot(across * np.cos(angle), down * np.sin(angle)), np.hypot(across * np.sin(angle), down * np.cos(angle))
    return Box(None, bounds([(x - half[0], y - half[1]), (x + half[0], y + half[1])], *_limits(size)))


def _polygon(shape: Element, size: tuple[int, int] | None) -> Box:
    pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
    values = [as_number(value) for pair in pairs for value in pair]
    if any(len(pair) != 2 for pair in pairs) or len(pairs) < 3 or None in values:
        raise RowProblem(
            "bad_number", f"`points` of a polygon are {shown(shape.get('points'))}, expected x,y;x,y;x,y of three or more"
        )
    numbers = [float(value) for value in values if value is not None]
    return Box(None, _plain_bounds(numbers), segmentation=[numbers])


def _mask(shape: Element, size: tuple[int, int] | None) -> Box:
    left, top, width, height = (round(number) for number in _numbers(shape, ("left", "top", "width", "height")))
    counts = (shape.get("rle") or "").split(",")
    if not all(count.strip().isdecimal() and len(count.strip()) < 10 for count in counts):
        raise RowProblem("bad_number", f"`rle` of a mask is {shown(shape.get('rle'))}, expected whole numbers")
    runs = np.array([int(count) for count in counts], np.int64)
    if min(width, height) < 1 or width * height > MAX_MASKED_PHOTO or runs.sum() > width * height:
        raise RowProblem("bad_number", f"`rle` of a mask sums up to {runs.sum():,} px, its area is {width} x {height}")
    # CVAT leaves out the last run where it is of px that are not the object.
    pixels = np.zeros(width * height, bool)
    pixels[: runs.sum()] = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    edges, outline = box_of_pixels(pixels.reshape(height, width), left, top)
    return Box(None, edges, segmentation=outline)


def _plain_bounds(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


def _limits(size: tuple[int, int] | None) -> tuple[float, float]:
    return size or (np.inf, np.inf)


_SHAPE_OF = {"box": _box, "ellipse": _ellipse, "polygon": _polygon, "mask": _mask}
