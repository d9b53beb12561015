r"""Names of photos as labelling tools write them -> paths below the photo folder, with / between folders; and photos' sizes.

    images\p1.jpg                                    images/p1.jpg        a tool on Windows
    images/p1.jpg, in a photo folder .../images      p1.jpg               the name counts from the folder above
    /data/set/a/p1.jpg, in the photo folder /data/set    a/p1.jpg         absolute
    D:\set\a\p1.jpg, written on another machine      a/p1.jpg             the one file of this base name below the photo folder
    http://host/train2017/p1.jpg                     train2017/p1.jpg     a URL: as much of its end as the folders below say

Annotations come from strangers: no name may lead out of the photo folder, so `..` is refused wherever it stands.

Sizes are those that the annotations give, or, where they do not, those of the photos' headers, in the frame of the boxes. In
frame `exif` a file may give the size of a photo as shown or as stored, which differ where EXIF turns the photo by a quarter: the
header decides. A header takes 0.1 ms, a PNG 20 ms (`photo_size`).
"""

import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pbe_core.images.decode import PhotoError, photo_size
from pbe_core.photo_files import photo_path
from pipelines.annotations.source import is_text
from pipelines.config import SourceSettings

Size = tuple[int, int]


class NoSuchFile(ValueError):
    """No file, or more than one, lies where a name says; `found` says how many there are, and below what."""

    def __init__(self, text: str, found: str) -> None:
        super().__init__(text)
        self.found = found


@dataclass
class PhotoNames:
    """Names of one source's photos. It looks at folders, each once, and at files only for names that no folder explains."""

    roots: Sequence[Path]
    """Folders that photos are in; a photo's path counts from any of them."""
    here: bool = True
    """Whether photos must lie in these folders; else they are in a photo store, or still to be fetched."""
    found: dict[str, set[str]] = field(default_factory=dict)
    """Files below the photo folders that were found by their base names -> the names that were looked for, one each."""
    moved: bool = False
    """Whether a path depends on what lies in the photo folders."""
    _places: dict[tuple[str, str], str | None] = field(default_factory=dict)
    _files: dict[str, list[str]] | None = None

    def path_of(self, name: Any, folder: str = "") -> str:
        """The path of a photo below the photo folder.

        Args:
            name: as the annotations have it.
            folder: what stands before a relative name: empty, or with a / at its end.

        Raises:
            ValueError: with what is wrong with the name, in words.
        """
        if not is_text(name) or not name.strip():
            raise ValueError("is empty or no text")
        text = name.replace("\\", "/")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
            return self._of_url(text)
        if text.startswith("/") or re.match(r"[A-Za-z]:", text):
            return self._of_absolute(text)
        head, base = posixpath.split(_checked(text))
        if (folder, head) not in self._places:
            self._places[folder, head] = self._place(folder, head, base)
        return f"{self._places[folder, head]}{base}"

    def notes(self) -> list[str]:
        """What a user should know about the names that were read."""
        if not self.found:
            return []
        file, names = next(iter(self.found.items()))
        return [f"photos that were found by their base names: {len(self.found):,}; for example {min(names)} as {file}"]

    def _place(self, folder: str, head: str, base: str) -> str:
        """What stands before the base names of photos in folder `head`, by one of them: where it lies, or where a folder is."""
        plain = posixpath.join(folder, head)
        parts = head.split("/")
        # Names of folder train2017 may begin with train2017/ themselves; and a tool may count from above the photo folder.
        above = ["/".join(parts[count:]) for count in range(len(parts), 0, -1) if self._ends_with(parts[:count])]
        places = [plain, head, *above]
        with_photo = [place for place in places if any((root / place / base).is_file() for root in self.roots)]
        place = next(iter([*with_photo, *(place for place in places if self._is_folder(place))]), plain)
        self.moved |= place != plain
        return posixpath.join(place, "")

    def _of_absolute(self, text: str) -> str:
        path = _checked(re.sub(r"^[A-Za-z]:", "", text).lstrip("/"))
        for root in {folder for given in self.roots for folder in (given.absolute(), given.resolve())}:
            inside = posixpath.join(root.as_posix(), "")
            if f"/{path}".startswith(inside):
                return f"/{path}".removeprefix(inside)
        files = self._by_end(path)
        if len(files) == 1:
            return self._claim(files[0], text)
        if not self.here:
            return path  # A photo store goes by ids.
        base, where = posixpath.basename(path), " and ".join(map(str, self.roots))
        there = f"{len(files)} files {base} are" if files else f"no file {base} is"
        raise NoSuchFile(f"is absolute, and {there} below {where}; write it relative to that folder", f"{there} below {where}")

    def _of_url(self, text: str) -> str:
        parts = urlsplit(text)
        if parts.scheme == "file":
            return self._of_absolute(unquote(parts.path))
        path = _checked(unquote(parts.path).lstrip("/"))
        head, base = posixpath.split(path)
        # As LVIS' own code takes http://images.cocodataset.org/train2017/000000000001.jpg.
        plain = posixpath.basename(head)
        if ("://", head) not in self._places:
            self._places["://", head] = self._end_of(head)
        place = self._places["://", head]
        if place is None and self.here and len(files := self._by_end(path)) == 1:
            return self._claim(files[0], text)
        place = plain if place is None else place
        self.moved |= place != plain
        return posixpath.join(place, base)

    def _end_of(self, head: str) -> str | None:
        """The longest end of a URL's folders that is a folder below a photo folder, or is the photo folder itself."""
        parts = head.split("/") if head else []
        ends = [parts[start:] for start in range(len(parts))]
        inside = next(("/".join(end) for end in ends if self._is_folder("/".join(end))), None)
        return "" if inside is None and any(self._ends_with(end) for end in ends) else inside

    def _claim(self, file: str, text: str) -> str:
        """A file that was found by its base name, unless two names lead to it: one of them is of another photo."""
        names = self.found.setdefault(file, set())
        names.add(text)
        self.moved = True
        if len(names) > 1:
            raise ValueError(
                f"is absolute, and for it and for {min(names - {text})} there is one file, {file}; write both relative to the "
                f"photo folder"
            )
        return file

    def _by_end(self, path: str) -> list[str]:
        """The files below the photo folders of a path's base name; of several, those that share most folders with its end."""
        if self._files is None:
            self._files = {}
            for file in {file for root in self.roots for file in files_below(root)}:
                self._files.setdefault(posixpath.basename(file), []).append(file)
        files = self._files.get(posixpath.basename(path), [])
        most = max((_common_end(file, path) for file in files), default=0)
        return files if most < 2 else [file for file in files if _common_end(file, path) == most]

    def _is_folder(self, place: str) -> bool:
        return any((root / place).is_dir() for root in self.roots)

    def _ends_with(self, parts: Sequence[str]) -> bool:
        return any(list(root.absolute().parts[-len(parts) :]) == list(parts) for root in self.roots)


@dataclass
class PhotoSizes:
    """Sizes of one source's photos. Each header is read once."""

    settings: SourceSettings
    roots: Sequence[Path]
    """Folders that photos are in."""
    here: bool = True
    """Whether photos lie in these folders; else they are in a photo store, or still to be fetched, and no header is read."""
    _known: dict[str, Size | PhotoError] = field(default_factory=dict)

    def of(self, photo_id: str, split: str, file_name: str, given: Size | None) -> Size:
        """Width and height of a photo in px, in the frame of its boxes.

        Args:
            photo_id: of the photo.
            split: of the photo.
            file_name: its path below the photo folder.
            given: width and height by the annotations, if they do.

        Raises:
            PhotoError: the annotations do not, and the header cannot be read.
        """
        if given and (self.settings.photo_frame == "stored" or not self.here):
            return given
        if not self.here:
            # What a plan is must not change once the photos have come.
            raise PhotoError("missing", "photos of a store are planned without them; write their sizes into the annotations")
        if photo_id not in self._known:
            try:
                self._known[photo_id] = self._header(photo_id, split, file_name)
            except PhotoError as error:
                self._known[photo_id] = error
        header = self._known[photo_id]
        if isinstance(header, PhotoError):
            if given:
                return given  # A photo that is still to be fetched; packing compares shapes.
            raise PhotoError(header.code, header.detail)
        return size_in_frame(given, header) if given else header

    def _header(self, photo_id: str, split: str, file_name: str) -> Size:
        frame, limit = self.settings.photo_frame, self.settings.max_photo_pixels
        failures = []
        for root in self.roots:
            try:
                return photo_size(photo_path(root, split, photo_id, file_name), frame=frame, max_pixels=limit)
            except PhotoError as error:
                failures.append(error)
        raise failures[0]


def size_in_frame(given: Size, shown: Size) -> Size:
    """The size that annotations give, in the frame in which the photo is shown.

    Args:
        given: width and height by the annotations: as shown or as stored, perhaps of a smaller copy of the photo.
        shown: width and height of the photo as shown, px.

    Returns:
        `given`, with width and height exchanged where only that has the photo's shape.
    """
    width, height = given
    if given == shown or (same_shape(given, shown) and (height, width) != shown):
        return given
    return (height, width) if same_shape((height, width), shown) else given


def same_shape(given: Size, shown: Size) -> bool:
    """Whether two sizes (width, height) differ in scale alone, but for rounding to whole px."""
    expected = shown[0] * given[1] / given[0]
    return abs(shown[1] - expected) <= 1 + expected / given[0]


def _checked(text: str) -> str:
    """A relative path in its simplest form: ./a.jpg is a.jpg."""
    if not text:
        raise ValueError("is empty or no text")
    if "\0" in text or "\\" in text:
        raise ValueError("has a NUL character or a backslash")
    parts = text.split("/")
    if ".." in parts or all(part in ("", ".") for part in parts):
        raise ValueError("leads out of the photo folder; write it relative to that folder")
    return posixpath.normpath(text)


def files_below(root: Path) -> Iterator[str]:
    """Paths of all files below a folder, from there. Links to folders are followed, each folder once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        above = Path(folder).relative_to(root).as_posix()
        yield from (posixpath.normpath(posixpath.join(above, file)) for file in files)


def _common_end(left: str, right: str) -> int:
    """How many names of folders and files two paths share, counted from their ends."""
    pairs = zip(reversed(left.split("/")), reversed(right.split("/")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
