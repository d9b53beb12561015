"""Sizes of photos whose boxes are in px: what the annotations say, or, where they do not, what the photo's header says.

A size is in the frame of the boxes. In frame `exif` a file may give the size of the photo as shown, or as stored, which differ
where EXIF turns the photo by a quarter: the header tells which one it is. A header takes 0.1 ms, a PNG 20 ms (`photo_size`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pbe_core.images.decode import PhotoError, photo_size
from pipelines.config import SourceSettings
from pipelines.photo_folder import photo_path

Size = tuple[int, int]


@dataclass
class PhotoSizes:
    """Sizes of one source's photos. Each header is read once."""

    settings: SourceSettings
    roots: Sequence[Path]
    """Folders that photos are in."""
    here: bool = True
    """Whether photos lie in these folders; else they are in a photo store, or still to be fetched, and no header is read."""
    _known: dict[str, Size | PhotoError] = field(default_factory=dict)

    def of(self, photo_id: str, split: str, file_name: str, said: Size | None) -> Size:
        """Width and height of a photo in px, in the frame of its boxes.

        Args:
            photo_id: of the photo.
            split: of the photo.
            file_name: its path below the photo folder.
            said: width and height by the annotations, if they say.

        Raises:
            PhotoError: the annotations do not say, and the header cannot be read.
        """
        if said and (self.settings.photo_frame == "stored" or not self.here):
            return said
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
            if said:
                return said  # A photo that is still to be fetched; packing compares shapes.
            raise PhotoError(header.code, header.detail)
        return size_in_frame(said, header) if said else header

    def _header(self, photo_id: str, split: str, file_name: str) -> Size:
        frame, limit = self.settings.photo_frame, self.settings.max_photo_pixels
        failures = []
        for root in self.roots:
            try:
                return photo_size(photo_path(root, split, photo_id, file_name), frame=frame, max_pixels=limit)
            except PhotoError as error:
                failures.append(error)
        raise failures[0]


def size_in_frame(said: Size, shown: Size) -> Size:
    """The size that annotations give, in the frame in which the photo is shown.

    Args:
        said: width and height by the annotations: as shown or as stored, perhaps of a smaller copy of the photo.
        shown: width and height of the photo as shown, px.

    Returns:
        `said`, with width and height exchanged where only that has the photo's shape.
    """
    width, height = said
    if said == shown or (same_shape(said, shown) and (height, width) != shown):
        return said
    return (height, width) if same_shape((height, width), shown) else said


def same_shape(said: Size, shown: Size) -> bool:
    """Whether two sizes (width, height) differ in scale alone, but for rounding to whole px."""
    expected = shown[0] * said[1] / said[0]
    return abs(shown[1] - expected) <= 1 + expected / said[0]
