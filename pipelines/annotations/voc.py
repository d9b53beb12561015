"""Pascal VOC: an XML file for each photo, and PNGs whose px are numbers of objects.

    VOCdevkit/VOC2012/   Annotations/a.xml, JPEGImages/a.jpg, ImageSets/Main/train.txt, SegmentationObject/a.png
    Roboflow             train/a.jpg, train/a.xml, valid/..., test/...
    LabelImg and others  a.xml beside a.jpg, or in a folder of their own (Label Studio: Annotations/ and images/)

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. VOC's own files count px from 1, and xmax and
ymax are within the box: it lies from xmin - 1 to xmax. So it is for files whose `database` is VOC's. Other tools write edges from
0, from xmin to xmax (LabelImg makes a 0 a 1): docs/formats.md. `difficult` is no flag here; a note counts such objects.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from pipelines.annotations.coco_file import MAX_MASKED_PHOTO
from pipelines.annotations.per_photo import Box, Edges, PhotoBoxes, bounds, open_photos, turned
from pipelines.annotations.pixel_masks import compress_pixels
from pipelines.annotations.source import RowProblem, Source, as_number, photo_places, shown
from pipelines.annotations.voc_files import Item, list_annotations
from pipelines.annotations.xml_file import read_xml, text_of
from pipelines.config import BuildSettings

_FLAGS = {"truncated": "is_truncated", "occluded": "is_occluded"}
_YES = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0}
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_TURNED = ("cx", "cy", "w", "h", "angle")
# Share of an object's px that must lie in its box, or the PNG numbers its objects otherwise than the XML.
_WITHIN = 0.9
# How far an outline may be beyond the box on each side: VOC's boxes and masks were drawn by different people.
_BEYOND = 5


def open_source(settings: BuildSettings) -> Source:
    """Open VOC's annotations: the folder of a year, or any folder of XML files with photos beside them or in JPEGImages.

    Labels are names. Splits are the lists in ImageSets/Main, or folders called train and valid; where there are none, a hash
    divides. Objects' outlines are those of SegmentationObject, as far as each lies in the box of its number.

    Raises:
        InputError: no XML; no list for a split where another has one; a setting that these files leave without effect.
    """
    found = list_annotations(settings.source.annotations, settings.source.splits, photo_places(settings))
    reader = _Reader(found.items, found.root)
    return open_photos(
        settings,
        reader.read,
        found.files,
        many_files=lambda: ((path.relative_to(found.root).as_posix(), path) for item in found.items for path in item.files),
        notes=found.notes,
        read_notes=reader.notes,
    )


@dataclass
class _Reader:
    items: Sequence[Item]
    root: Path
    difficult: int = 0
    """Objects that are marked so, of those that were last read."""
    from_one: int = 0
    """Photos whose px are counted from 1."""
    _seen: set[str] = field(default_factory=set)

    def read(self) -> Iterator[PhotoBoxes]:
        """All photos of the wanted splits, in the order of their files."""
        self.difficult, self.from_one = 0, 0
        for item in self.items:
            if item.xml is None:
                yield PhotoBoxes(item.photo, [], "", split=item.split)
                continue
            name = item.xml.relative_to(self.root).as_posix()
            try:
                tree = read_xml(item.xml)
                if tree.tag != "annotation":
                    raise ValueError(f"begins with <{tree.tag[:40]}>, expected <annotation>")
            except ValueError as error:
                broken = Box(None, None, problem=RowProblem("bad_row", f"the file {error}"))
                yield PhotoBoxes(item.photo, [broken], name, split=item.split)
                continue
            first = _first_pixel(tree)
            self.from_one += first
            masks = _Masks(item.masks) if item.masks else None
            boxes = [self._box(one, number, first, masks) for number, one in enumerate(tree.findall("object"), start=1)]
            yield PhotoBoxes(item.photo, boxes, name, size=_size(tree), split=item.split)

    def notes(self) -> list[str]:
        """What a user should know about the objects that were last read."""
        notes = []
        if self.difficult:
            notes.append(f"objects that are marked as difficult: {self.difficult:,}; they are read as all others")
        if self.from_one:
            notes.append(
                f"annotations of VOC's own, whose px are counted from 1: {self.from_one:,}; the others' are edges from 0"
            )
        return notes

    def _box(self, tree: Element, number: int, first: int, masks: "_Masks | None") -> Box:
        self.difficult += _YES.get(text_of(tree, "difficult").casefold()) == 1
        label = text_of(tree, "name") or None
        try:
            if label is None:
                raise RowProblem("bad_row", f"object {number} has no <name>")
            polygon = _polygon(tree)
            edges = _edges(tree, first, polygon)
            said = {ours: text_of(tree, tag).casefold() for tag, ours in _FLAGS.items()}
            flags = {ours: _YES[word] for ours, word in said.items() if word in _YES}
            outline: Any = [polygon] if polygon else functools.partial(masks.of, number, edges) if masks else None
            return Box(label, edges, number, segmentation=outline, flags=flags)
        except RowProblem as problem:
            return Box(label, None, number, problem=problem)


def _first_pixel(tree: Element) -> int:
    """The number of the first px: 1 in VOC's own files, else 0."""
    return int(bool(re.search(r"\bVOC ?\d{4}\b|\bPASCAL\b", tree.findtext("source/database") or "", re.IGNORECASE)))


def _size(tree: Element) -> tuple[int, int] | None:
    sides = [as_number(tree.findtext(f"size/{side}", "").strip()) for side in ("width", "height")]
    whole = [round(side) for side in sides if side is not None and 0 < side < 2**31]
    return (whole[0], whole[1]) if len(whole) == 2 and min(whole) > 0 else None


def _edges(tree: Element, first: int, polygon: Sequence[float] | None) -> Edges:
    """The object's box in px, from the left and top edge of the photo."""
    if (box := tree.find("bndbox")) is not None:
        left, top, right, bottom = _numbers(box, _EDGES)
        return left - first, top - first, right, bottom
    if (box := tree.find("robndbox")) is not None:  # roLabelImg's: turned about its middle, by radians.
        x, y, width, height, angle = _numbers(box, _TURNED)
        around = [
            (x - width / 2, y - height / 2),
            (x + width / 2, y - height / 2),
            (x + width / 2, y + height / 2),
            (x - width / 2, y + height / 2),
        ]
        return bounds(turned(around, (x, y), float(np.degrees(angle))), np.inf, np.inf)
    if polygon:
        return bounds(list(zip(polygon[::2], polygon[1::2], strict=True)), np.inf, np.inf)
    raise RowProblem("bad_row", "an object without <bndbox>")


def _numbers(box: Element, tags: Sequence[str]) -> list[float]:
    texts = [text_of(box, tag) for tag in tags]
    for tag, text in zip(tags, texts, strict=True):
        if as_number(text) is None:
            raise RowProblem("bad_number", f"<{tag}> is {'empty or missing' if not text else shown(text) + ', no finite number'}")
    return [float(text) for text in texts]


def _polygon(tree: Element) -> list[float] | None:
    """x, y, x, y, ... of an outline as Roboflow writes it: x1, y1, x2, y2, ...; nothing where there is none."""
    outline = tree.find("polygon")
    if outline is None:
        return None
    texts: Mapping[str, str] = {child.tag: (child.text or "").strip() for child in outline}
    count = sum(tag.startswith("x") for tag in texts)
    values = [as_number(texts.get(f"{axis}{number}", "")) for number in range(1, count + 1) for axis in "xy"]
    points = [value for value in values if value is not None]
    return points if len(points) == len(values) >= 6 else None


# Object masks.


@dataclass
class _Masks:
    """The objects of a photo, from SegmentationObject: px of object n have the number n, or VOC's colour for it."""

    path: Path
    _numbers: UInt8[np.ndarray, "height width"] | None = None

    def of(self, number: int, edges: Edges, width: int, height: int) -> str | None:
        """An object's mask as compressed RLE; null where it has no px.

        Raises:
            ValueError: the PNG cannot be read or is of another size; or its object lies elsewhere than the box.
        """
        if self._numbers is None:
            self._numbers = _read_numbers(self.path, width, height)
        mask = self._numbers == number
        inside = [max(0, round(edge) + way * _BEYOND) for edge, way in zip(edges, (-1, -1, 1, 1), strict=True)]
        if not mask.any():
            return None
        if mask[inside[1] : inside[3], inside[0] : inside[2]].sum() < _WITHIN * mask.sum():
            raise ValueError(f"object {number} of {self.path.name} lies outside its box: the PNG numbers its objects otherwise")
        return compress_pixels(mask)


def _read_numbers(path: Path, width: int, height: int) -> UInt8[np.ndarray, "height width"]:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.size != (width, height) or width * height > MAX_MASKED_PHOTO:
                raise ValueError(f"{path.name} has {picture.size[0]}x{picture.size[1]} px, the photo {width}x{height}")
            if picture.mode in ("P", "L"):
                return np.array(picture, np.uint8)
            colours = np.array(picture.convert("RGB"), np.int64)
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    codes = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    numbers = np.zeros(codes.shape, np.uint8)
    for number, code in enumerate(_colours()[1:], start=1):
        numbers[codes == code] = number
    return numbers


@functools.cache
def _colours() -> list[int]:
    """VOC's colour of each number, as 0xRRGGBB: its bits, three at a time, from the highest bit of red, green and blue down."""
    found = []
    for number in range(256):
        colour = 0
        for place in range(8):
            bits = number >> (3 * place)
            for channel, shift in ((0, 16), (1, 8), (2, 0)):
                colour |= ((bits >> channel) & 1) << (7 - place + shift)
        found.append(colour)
    return found
