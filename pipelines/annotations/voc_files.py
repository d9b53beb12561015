"""Which XML files a VOC dataset has, of which split each is, and where its photo and its PNG of objects lie."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.annotations.photo_names import files_below
from pipelines.annotations.source import PhotoPlaces
from pipelines.annotations.xml_file import read_xml, text_of
from pipelines.annotations.yolo_files import PHOTO_SUFFIXES, SPLIT_WORDS

_LIST_OF = {"train": "train", "validation": "val", "test": "test"}
# Lists whose photos a hash divides, where none of a split is there.
_OTHER_LISTS = ("trainval", "default")
_PHOTO_FOLDERS = ("JPEGImages", "images", "Images")


@dataclass(frozen=True, slots=True)
class Item:
    """A photo and its annotations."""

    photo: str
    """Its name, for `PhotoNames`."""
    xml: Path | None
    """Null for a photo of a split's list that has none: it has no boxes."""
    split: str | None = None
    masks: Path | None = None
    """Its PNG of SegmentationObject."""

    @property
    def files(self) -> list[Path]:
        """All that is read of it."""
        return [path for path in (self.xml, self.masks) if path is not None]


@dataclass(frozen=True)
class Annotations:
    """All annotations of the wanted splits."""

    root: Path
    items: Sequence[Item]
    files: Sequence[Path] = ()
    """Lists of photos."""
    notes: Sequence[str] = ()


def list_annotations(place: Path, splits: Sequence[str], places: PhotoPlaces) -> Annotations:
    """Find the XML files of a folder (or take the one that is named), with their photos and splits.

    Args:
        place: folder of a VOC dataset, folder with such folders, or an XML file.
        splits: that are wanted.
        places: where the photos are.

    Raises:
        InputError: there is no XML, or more than one dataset, or no list for a wanted split where another one has its list.
    """
    root = _dataset(place)
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    files = [place] if place.is_file() else [folder / file for file in sorted(files_below(folder)) if file.endswith(".xml")]
    if not files:
        raise InputError(
            f"{place}: no .xml here; set build.source.annotations to the folder that holds Annotations, or the XML files"
        )
    finder = _Finder(root, folder, places)
    by_id = {file.relative_to(folder).as_posix().removesuffix(".xml"): file for file in files}
    lists = _lists(root, splits) if not place.is_file() else {}
    if lists:
        items = [finder.item(by_id.get(name), name, split) for split, path in lists.items() for name in _read_list(path, by_id)]
        listed = {item.xml for item in items}
        unlisted = sum(file not in listed for file in files)
        told = f"{root}: {number_of(unlisted, 'annotation file')} in no list of the wanted splits: not read"
        return Annotations(root, items, list(lists.values()), (told,) if unlisted else ())
    own = {name: SPLIT_WORDS.get(name.split("/")[0].casefold()) if "/" in name else None for name in by_id}
    items = [finder.item(file, name, own[name]) for name, file in by_id.items() if own[name] in (None, *splits)]
    return Annotations(root, items)


def _dataset(place: Path) -> Path:
    """The folder of one dataset: a VOCdevkit may hold those of several years."""
    if place.is_file():
        if place.suffix != ".xml":
            raise InputError(f"{place}: expected VOC's folder, or an XML file")
        return place.parent
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder; set build.source.annotations to the folder of VOC's annotations")
    if (place / "Annotations").is_dir() or any(place.glob("*.xml")):
        return place
    below = sorted(
        path.parent for pattern in ("*/Annotations", "*/*/Annotations") for path in place.glob(pattern) if path.is_dir()
    )
    if len(below) > 1:
        names = ", ".join(path.relative_to(place).as_posix() for path in below)
        raise InputError(f"{place}: {names} are datasets of their own; set build.source.annotations to one of them")
    return below[0] if below else place


def _lists(root: Path, splits: Sequence[str]) -> dict[str | None, Path]:
    """The list of each wanted split; under null the one of all photos, where no split has its own."""
    for folder in (root / "ImageSets" / "Main", root / "ImageSets" / "Segmentation", root / "ImageSets"):
        there = {split: folder / f"{_LIST_OF[split]}.txt" for split in _LIST_OF}
        found = {split: path for split, path in there.items() if path.is_file()}
        if found:
            if missing := [split for split in splits if split not in found]:
                raise InputError(
                    f"{there[missing[0]]}: no such list for the split {missing[0]}; put it there, or take `{missing[0]}` out of "
                    f"build.source.splits"
                )
            return {split: found[split] for split in splits}
        others = [folder / f"{name}.txt" for name in _OTHER_LISTS if (folder / f"{name}.txt").is_file()]
        if others:
            return {None: others[0]}
    return {}


def _read_list(path: Path, known: Mapping[str, Path]) -> list[str]:
    """The ids of a list; some write a number behind each, and quotes around those with spaces."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
    names = []
    for line in lines:
        plain = line[1:].partition('"')[0] if line.startswith('"') else line
        first = plain.rpartition(" ")[0].strip() if plain.rpartition(" ")[2] in ("-1", "0", "1") else plain
        names.append(plain if plain in known or not first else first)
    return list(dict.fromkeys(names))


@dataclass
class _Finder:
    root: Path
    folder: Path
    """Of the XML files."""
    places: PhotoPlaces
    _stems: dict[Path, dict[str, str]] = field(default_factory=dict)

    def item(self, xml: Path | None, name: str, split: str | None) -> Item:
        """The item of an id: its photo, its PNG."""
        masks = self.root / "SegmentationObject" / f"{name}.png"
        return Item(self._photo(xml, name), xml, split, masks if masks.is_file() else None)

    def _photo(self, xml: Path | None, name: str) -> str:
        """The photo's path below the photo folder, as far as it is there; else what the XML calls it."""
        tree = _tree(xml)
        said = (text_of(tree, "filename") if tree is not None else "").replace("\\", "/")
        head, stem = posixpath.split(name)
        relative = "" if said.startswith("/") or ":" in said or ".." in said.split("/") else said
        bases = [f"{head}/{posixpath.basename(said)}", f"{head}/{stem}.jpg"]
        for folder in self._folders(xml):
            for path in filter(None, (relative, *(base.lstrip("/") for base in bases))):
                if (folder / path).is_file():
                    return self._below(folder / path)
            if found := self._by_stem(folder / head).get(stem):
                return self._below(folder / head / found)
        whole = (text_of(tree, "path") if tree is not None else "").replace("\\", "/")
        if whole.startswith("/") or ":" in whole[:3]:
            return whole
        if self.places.here:
            return f"/{said or f'{name}.jpg'}"  # One photo of this name, wherever it lies below the photo folder.
        beside = head if self.folder == self.root else ""
        return posixpath.join(beside, said or f"{stem}.jpg")

    def _folders(self, xml: Path | None) -> list[Path]:
        """Where the photo of an XML file may be."""
        beside = [xml.parent] if xml is not None and self.folder == self.root else []
        named = [base / name for base in (self.root, *self.places.roots) for name in _PHOTO_FOLDERS]
        return [folder for folder in (*beside, *named, *self.places.roots, self.root) if folder.is_dir()]

    def _by_stem(self, folder: Path) -> dict[str, str]:
        if folder not in self._stems:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            photos = [name for name in names if posixpath.splitext(name)[1].casefold() in PHOTO_SUFFIXES]
            self._stems[folder] = {posixpath.splitext(name)[0]: name for name in reversed(photos)}
        return self._stems[folder]

    def _below(self, photo: Path) -> str:
        for base in self.places.roots:
            for real in (os.path.abspath, os.path.realpath):
                place, path = posixpath.join(str(real(base)), ""), str(real(photo))
                if path.startswith(place):
                    return path.removeprefix(place)
        return f"/{photo.relative_to(self.root).as_posix()}" if photo.is_relative_to(self.root) else str(photo)


def _tree(xml: Path | None) -> Element | None:
    """An XML file, if it can be read; the reader says what is wrong with it."""
    if xml is None:
        return None
    try:
        return read_xml(xml)
    except ValueError:
        return None
