"""What every annotation reader makes of its files: one `Source`, which streams boxes and what is known about photos."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pbe_core.images.decode import Frame


@dataclass(frozen=True)
class Source:
    """Annotations, opened: headers are checked, nothing large has been read.

    The readers below may be called more than once; each call starts anew.
    """

    name: str
    """What to call it in messages: its folder or file."""
    files: tuple[Path, ...]
    """All files that determine what is read: they are hashed into the fingerprint."""
    frame: Frame
    """Frame of the boxes: the pixels as stored, or turned as EXIF says."""
    read_boxes: Callable[[], Iterator[pa.RecordBatch]]
    """Batches of `schemas.tables.BOXES`. A row that cannot be read is there too, with `problem` and `detail`.

    Raises `InputError` for what is wrong with a file."""
    read_photos: Callable[[], Iterator[pa.RecordBatch]]
    """Batches of `schemas.tables.PHOTOS`; none where the source knows nothing about its photos. A photo may come twice."""
    listed_splits: frozenset[str] = frozenset()
    """Splits all of whose photos `read_photos` yields: a box of another photo is then an error of its row."""
    class_names: Mapping[str, str] = field(default_factory=dict)
    """Class id -> name. Where it is not empty, a label that is not in it is an error of its row."""
    subclasses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class id -> ids directly below it in the class hierarchy."""
    joined: Callable[[], Sequence[tuple[str, str, str]]] = list
    """Photos that are read under another id, since both are one file: split, id, and the id that is kept."""
    read_elsewhere: Callable[[], Mapping[str, str]] = dict
    """What the boxes depend on beside the files, as names and hashes: sizes of photos, where px must become fractions."""
    rows: int = 0
    """About how many boxes there are: for the progress bar, and to size what memory holds at once."""
    read_notes: Callable[[], Sequence[str]] = list
    """What a user should know and may not expect about the boxes that were last read, a sentence each."""
    notes: tuple[str, ...] = ()
    """What a user should know about what is read, and how: a file that is passed over, a column under another name."""

    def print_notes(self) -> None:
        """Print the notes, a line each, to where errors go."""
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)
