"""Which photos a YOLO dataset has, and where the label file of each is.

    train: train/images           all photos in this folder and below
    train: ../train/images        the same, as Roboflow writes it: `..` is the folder of data.yaml
    train: /content/x/train/images    another machine's path: as much of its end as leads somewhere below the folder
    train: train.txt              a photo on each line; or several of all these

A label file is where Ultralytics and Darknet look for it: the last `images` of the photo's path is `labels`, or beside the photo.
A label file whose photo is not there is an entry, too: its boxes are not lost, but rejected.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pbe_core.errors import InputError
from pipelines.annotations.photo_names import files_below
from pipelines.annotations.source import PhotoPlaces, RowProblem

PHOTO_SUFFIXES = frozenset(
    f".{suffix}"
    for suffixes in ("jpg jpeg jpe jfif mpo png webp avif bmp tif tiff gif", "jp2 j2k ppm pgm pnm pbm heic dng ico")
    for suffix in suffixes.split()
)
# Text files of a dataset that are of no photo.
_NO_LABELS = re.compile(
    r"(readme.*|classes|predefined_classes|obj\.names|notes?|labels|licen[cs]e.*|requirements|(auto)?split_\w+|train\w*|val\w*|test\w*)\.txt",
    re.IGNORECASE,
)
SPLIT_WORDS = {
    word: split
    for split, words in {"train": "train training", "validation": "val valid validation", "test": "test testing"}.items()
    for word in words.split()
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A photo and its label file."""

    photo: str
    """Its name, for `PhotoNames`."""
    label: Path | None
    label_name: str
    """The label file below the dataset's folder."""
    split: str | None = None
    problem: RowProblem | None = None
    """Why none of its boxes can be used."""


@dataclass(frozen=True)
class Listing:
    """All photos of the wanted splits, by their names."""

    entries: Sequence[Entry]
    files: Sequence[Path] = ()
    """Lists of photos."""
    notes: Sequence[str] = ()


def list_photos(root: Path, splits: Mapping[str, Sequence[str]], places: PhotoPlaces, wanted: Sequence[str]) -> Listing:
    """Find the photos of a dataset and their label files.

    Args:
        root: folder from which paths count.
        splits: split -> its folders and lists; empty where there are none.
        places: where the photos are.
        wanted: splits to list.

    Raises:
        InputError: a folder or list of a wanted split is nowhere.
    """
    finder = _Finder(root, places)
    notes: list[str] = []
    if not splits:
        splits = _folders_of_splits(root)
        if splits:
            named = ", ".join(text for texts in splits.values() for text in texts)
            notes.append(f"{root}: no file says which splits there are; they are taken by folders: {named}")
    if not splits:
        return Listing(finder.whole_folder(), notes=notes)
    found = {
        split: [entry for text in texts for entry in finder.of_place(text, split)]
        for split, texts in splits.items()
        if split in wanted
    }
    names = {split: frozenset(entry.photo for entry in entries) for split, entries in found.items()}
    same = next(
        ((one, other) for one in names for other in names if one < other and names[one] and names[one] == names[other]), None
    )
    if same:
        notes.append(f"{root}: {same[0]} and {same[1]} are the same photos: a hash divides them (source.validation_share)")
    entries: dict[tuple[str, str | None], Entry] = {}
    for split, own in found.items():
        for entry in own:
            undivided = same is not None and split in same
            kept = Entry(entry.photo, entry.label, entry.label_name, None if undivided else split, entry.problem)
            entries.setdefault((entry.photo, kept.split), kept)
    return Listing(sorted(entries.values(), key=lambda entry: (entry.photo, entry.split or "")), finder.lists, notes)


def _folders_of_splits(root: Path) -> dict[str, list[str]]:
    """Folders called train, val, ... in `images`, or in the folder itself."""
    for base in ("images", "."):
        folders = sorted(path for path in (root / base).glob("*") if path.is_dir() and path.name.casefold() in SPLIT_WORDS)
        if folders:
            return {SPLIT_WORDS[path.name.casefold()]: [path.relative_to(root).as_posix()] for path in folders}
    return {}


@dataclass
class _Finder:
    root: Path
    places: PhotoPlaces
    lists: list[Path] = field(default_factory=list)
    _by_stem: dict[str, list[str]] | None = None

    def of_place(self, text: str, split: str) -> Iterator[Entry]:
        """The photos of a folder or list, by what data.yaml calls it."""
        path = self._find(text.replace("\\", "/"))
        if path is None:
            raise InputError(
                f"{self.root}: no folder or list {text!r} for the split {split} below it; mend the path in data.yaml, or take "
                f"`{split}` out of build.source.splits"
            )
        if path.is_file():
            self.lists.append(path)
            yield from self._of_list(path)
        else:
            yield from self._of_folder(path)

    def whole_folder(self) -> list[Entry]:
        """All photos and label files below the dataset's folder."""
        return sorted(self._of_folder(self.root), key=lambda entry: entry.photo)

    def _of_folder(self, folder: Path) -> Iterator[Entry]:
        files = sorted(files_below(folder))
        labels_too = folder == self.root or "labels" in folder.parts[len(self.root.parts) :]
        taken = set()
        for file in files:
            if _is_photo(file):
                label = self._label_of(folder / file)
                taken.add(label)
                yield self._entry(self._name(folder / file), label)
        swapped = _swapped(folder.as_posix())
        for place in filter(None, (folder, Path(swapped) if swapped else None)):
            if place == folder and not labels_too:
                yield from self._beside(folder, files, taken)
            elif place.is_dir():
                yield from self._without_photo(place, sorted(files_below(place)), taken)

    def _beside(self, folder: Path, files: Iterable[str], taken: set[Path | None]) -> Iterator[Entry]:
        """Label files in a folder of photos: of those whose photo is missing, where others have theirs."""
        if any(label is not None and label.parent.is_relative_to(folder) for label in taken):
            yield from self._without_photo(folder, files, taken)

    def _without_photo(self, folder: Path, files: Iterable[str], taken: set[Path | None]) -> Iterator[Entry]:
        for file in files:
            if not file.endswith(".txt") or _NO_LABELS.fullmatch(posixpath.basename(file)) or folder / file in taken:
                continue
            taken.add(folder / file)
            yield self._by_label(folder / file)

    def _by_label(self, label: Path) -> Entry:
        """The entry of a label file whose photo is not where it belongs."""
        if not self.places.here:
            name = posixpath.splitext(self._below(label))[0]
            return self._entry("/images/".join(f"/{name}".rsplit("/labels/", 1)).lstrip("/") + ".jpg", label)
        files = self._photos_by_stem().get(label.stem, [])
        if len(files) == 1:
            return self._entry(files[0], label)
        where = f"{len(files)} photos of this name lie" if files else "no photo of this name lies"
        below = " and ".join(map(str, self.places.roots))
        return self._entry(f"{label.stem}.jpg", label, RowProblem("unknown_photo", f"{where} below {below}"))

    def _photos_by_stem(self) -> dict[str, list[str]]:
        if self._by_stem is None:
            self._by_stem = {}
            for file in sorted({file for root in self.places.roots if root.is_dir() for file in files_below(root)}):
                if _is_photo(file):
                    self._by_stem.setdefault(posixpath.splitext(posixpath.basename(file))[0], []).append(file)
        return self._by_stem

    def _of_list(self, path: Path) -> Iterator[Entry]:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
        for line in lines:
            if text := line.strip().replace("\\", "/"):
                photo = self._find(text, path.parent)
                here = photo or self.root / _inside(text)
                yield self._entry(self._name(here), self._label_of(here))

    def _entry(self, name: str, label: Path | None, problem: RowProblem | None = None) -> Entry:
        return Entry(name, label, self._below(label) if label else "", problem=problem)

    def _find(self, text: str, beside: Path | None = None) -> Path | None:
        """The file or folder that a path means: from the list's folder, the dataset's, or the photos'; of a path that leads
        elsewhere the longest end that is there. Of a photo its label file may be there alone.
        """
        bases = [base for base in (beside, self.root, *self.places.roots) if base is not None]
        parts = _inside(text).split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        for end in filter(None, ends):
            for base in bases:
                if (base / end).exists() or (_is_photo(end) and self._label_of(base / end)):
                    return base / end
                swapped = _swapped(f"/{end}")  # Labels alone, their photos are elsewhere.
                if swapped and (base / swapped[1:]).is_dir():
                    return base / swapped[1:]
        return None

    def _label_of(self, photo: Path) -> Path | None:
        stem = posixpath.splitext(photo.absolute().as_posix())[0]
        swapped = _swapped(stem)
        below = [f"{self.root.absolute().as_posix()}/labels/{posixpath.basename(stem)}"]
        for place in filter(None, (swapped, stem, *below)):
            label = Path(f"{place}.txt")
            if label.is_file():
                return label
        return None

    def _name(self, photo: Path) -> str:
        """A photo's path below the folder of photos; of one that lies elsewhere an absolute one."""
        for base in self.places.roots:
            for real in (os.path.abspath, os.path.realpath):
                place, path = posixpath.join(str(real(base)), ""), str(real(photo))
                if path.startswith(place):
                    return path.removeprefix(place)
        return f"/{self._below(photo)}"

    def _below(self, file: Path) -> str:
        place, path = posixpath.join(os.path.abspath(self.root), ""), os.path.abspath(file)
        return path.removeprefix(place) if path.startswith(place) else file.name


def _swapped(path: str) -> str | None:
    """A path whose last folder `images` is `labels`; null where there is none."""
    for folder in ("images", "JPEGImages"):
        head, found, tail = f"{path}/".rpartition(f"/{folder}/")
        if found:
            return f"{head}/labels/{tail}".rstrip("/")
    return None


def _inside(text: str) -> str:
    """A path without what leads out of a folder: a drive, the root, `.` and `..` at its beginning."""
    parts = re.sub(r"^[A-Za-z]:", "", text).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _is_photo(file: str) -> bool:
    return posixpath.splitext(file)[1].casefold() in PHOTO_SUFFIXES
