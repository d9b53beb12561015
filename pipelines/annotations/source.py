"""What every annotation reader makes of its files, one `Source`, and what the readers share.

Settings that nothing would read are refused here: a person who gives one expects that it does something.
"""

import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from pbe_core.errors import InputError
from pbe_core.images.decode import Frame
from pbe_core.photo_files import is_store
from pbe_core.randomness import hash_column, name_hash
from pipelines.config import BuildSettings
from pipelines.readers import READERS, reader_of
from schemas.tables import FLAGS

BATCH_ROWS = 20_000
# Of every box, where the annotations have no labels.
ONLY_LABEL = "object"
# Sources other than Open Images lack most flags, and an unknown is not a zero.
UNKNOWN_FLAGS = dict.fromkeys(FLAGS, -1)


@dataclass(frozen=True)
class PhotoPlaces:
    """Where the photos of a source are."""

    roots: tuple[Path, ...]
    """Folders that they are in; a photo's path counts from any of them."""
    here: bool
    """Whether they must lie in these folders; else they are in a photo store, or still to be fetched."""
    elsewhere: bool
    """Whether they are to be fetched, and from no folder."""


def photo_places(settings: BuildSettings) -> PhotoPlaces:
    """Where the photos of a build are, by its settings."""
    source, crawled = settings.source, settings.crawl.sources
    folders = [Path(text) for text in crawled if Path(text).is_dir()]
    here = not (crawled or source.photos_url or is_store(source.photos))
    return PhotoPlaces((source.photos, *folders), here, bool(crawled) and not folders)


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
    """Batches of `schemas.tables.PHOTOS`; none where the source has no table of photos. A photo may come twice."""
    listed_splits: frozenset[str] = frozenset()
    """Splits all of whose photos `read_photos` yields: a box of another photo is then an error of its row."""
    class_names: Mapping[str, str] = field(default_factory=dict)
    """Class id -> name. Where it is not empty, a label that is not in it is an error of its row."""
    subclasses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class id -> ids directly below it in the class hierarchy."""
    other_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class id -> further words by which settings may name it; another class may bear them too."""
    joined: Callable[[], Sequence[tuple[str, str, str]]] = list
    """Photos that are read under another id, since both are one file: split, id, and the id that is kept."""
    read_elsewhere: Callable[[], Mapping[str, str]] = dict
    """What the boxes depend on beside the files, as names and hashes: sizes of photos, where px must become fractions."""
    rows: int = 0
    """About how many boxes there are: for the progress bar."""
    read_notes: Callable[[], Sequence[str]] = list
    """What a user should know and may not expect about the boxes that were last read, a sentence each."""
    groups: bool = False
    """Whether boxes may have a `group` or `references`."""
    notes: tuple[str, ...] = ()
    """What a user should know about what is read, and how: a file that is passed over, a column under another name."""
    read_masks: Callable[[], Iterator[pa.RecordBatch]] | None = None
    """Batches of `schemas.tables.MASKS`, where object masks stand in tables of their own; each goes with the box of its photo,
    label and edges. Other sources have them in `segmentation` of their boxes."""
    no_masks: str = ""
    """Where nothing in these files can be an object mask: what would be one, in words."""

    def print_notes(self) -> None:
        """Print the notes, a line each, to where errors go."""
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)


class RowProblem(Exception):
    """What is wrong with a row by itself. `reason` is a key of `schemas.tables.REJECT_REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def in_batches(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows -> record batches of at most `BATCH_ROWS`; a column that a row does not name is null there."""
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH_ROWS)):
        columns = [pa.array([row.get(field.name) for row in batch], field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def refuse_no_groups(source: Source, settings: BuildSettings) -> None:
    """Make sure that what asks for groups has some. Raises InputError: it has none."""
    wanted = [name for name in ("others", "alone") if name in given(settings.references)]
    if wanted and not source.groups:
        raise InputError(
            f"build.references.{wanted[0]}: {source.name} does not say which boxes show the same instance; own boxes do, in a "
            f"column `group` or by source.group_by: folder (docs/own-data.md)"
        )


def assign_splits(photo_ids: Sequence[str], seed: int, share: float) -> list[str]:
    """`validation` for a share of the photos, else `train`, for sources that have no splits of their own.

    A photo's split depends on its id and the seed alone: photos that come later change no other's, and a smaller share of
    validation lies within a larger one.

    Args:
        photo_ids: ASCII; all others get one and the same split.
        seed: of the build.
        share: of photos that become `validation`, 0 to 1.
    """
    if not photo_ids:
        return []
    places = hash_column(pa.array(photo_ids, pa.string()), seed, "split") * 2.0**-64
    return ["validation" if held_out else "train" for held_out in places < share]


def photo_id_of(file_name: str) -> str:
    """The id of a photo, a pure function of its path below the photo folder.

    For `<stem>.jpg`, where the stem can be an id, it is the stem; for any other path the last 40 characters of it in ASCII and,
    so that ids differ where paths do, 8 hex digits of a hash of it all.
    """
    plain = re.fullmatch(r"([A-Za-z0-9_-]{1,64})\.jpg", file_name)
    if plain:
        return plain[1]
    text = unicodedata.normalize("NFKD", re.sub(r"\.[^./]*$", "", file_name)).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[-40:].strip("-")
    return f"{slug or 'photo'}-{name_hash('photo', file_name, bits=32):08x}"


def place_box(
    row: dict[str, Any], edges: Sequence[float], size: tuple[float, float], slack: tuple[float, float], unit: str = "pixel"
) -> None:
    """Fill in a row's box as fractions of its photo.

    Args:
        row: of `BOXES`.
        edges: left, top, right, bottom.
        size: width and height of the photo in the unit of the edges.
        slack: an edge may be beyond the photo by so much, across and down, by rounding: it is cut; one farther out stays.
        unit: of the edges. What is wrong with fractions, the selection says.

    Raises:
        RowProblem: `outside_photo` or `empty_box`, in px.
    """
    wrong = []
    for axis, way, low, high, end, more in zip("xy", ("wide", "high"), edges[:2], edges[2:], size, slack, strict=True):
        low, high = 0.0 if -more <= low < 0 else low, float(end) if end < high <= end + more else high
        row[f"{axis}_min"], row[f"{axis}_max"] = low / end, high / end
        outside = [f"{axis}_{side}: {edge:g}" for side, edge in (("min", low), ("max", high)) if not 0 <= edge <= end]
        wrong += [("outside_photo", f"{edge}, and the photo is {end:g} px {way}") for edge in outside]
        if low >= high:
            hint = f"; is {axis}_max a {'width' if axis == 'x' else 'height'}?" if low > high else ""
            wrong.append(("empty_box", f"{axis}_max: {high:g}, not more than {axis}_min, {low:g}{hint}"))
    if wrong and unit == "pixel":
        raise RowProblem(*wrong[0])


def as_number(value: Any) -> float | None:
    """A finite number, from text too; Python's own 1_000 is none."""
    if type(value) not in (str, int, float) or (type(value) is str and "_" in value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def is_text(value: Any) -> bool:
    """Whether this is text that a table can hold: JSON may name halves of surrogate pairs, which are no characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value for a message, however long or deep it is."""
    return reprlib.repr(value)


def refuse_unread(settings: BuildSettings) -> None:
    """Make sure that every setting that was given is read. What the annotations themselves decide, their readers refuse.

    Raises:
        InputError: names the first one that is not, and why.
    """
    source, crawl = settings.source, settings.crawl
    reader = reader_of(source.kind)
    if reader.own_splits and "validation_share" in given(source):
        raise splits_are_their_own(source.kind)
    if source.storage and not source.photos_url:
        raise InputError(
            f"build.source.storage: it is for a photo store behind a URL, and source.photos is {source.photos} (options for what "
            f"is crawled belong into build.crawl.storage)"
        )
    if settings.storage and not settings.upload:
        raise InputError("build.storage: it is for a dataset behind a URL; leave it out, or give the URL as --out")
    if settings.references.background == "grey" and not reader.masks:
        with_masks = ", ".join(kind for kind, other in READERS.items() if other.masks)
        raise InputError(
            f"build.references.background: grey takes object masks, and {source.kind} has none (these may: {with_masks})"
        )
    if not crawl.sources and (unread := given(crawl)):
        raise InputError(f"build.crawl.{unread[0]}: nothing is crawled, as build.crawl.sources names no place (docs/crawling.md)")


def flags_that_nobody_sets(settings: BuildSettings) -> list[str]:
    """Of `selection.reject_flags`, where they were given, those that boxes of this kind never have: nothing is rejected by them.

    They are no error: a preset for one kind of source is used with another one.
    """
    known = reader_of(settings.source.kind).flags
    if "reject_flags" not in given(settings.selection):
        return []
    return [flag for flag in settings.selection.reject_flags if flag not in known]


def splits_are_their_own(name: str) -> InputError:
    """The error for `source.validation_share` where annotations have splits of their own."""
    return InputError(f"build.source.validation_share: {name} has splits of its own; leave the setting out")


def given(group: BaseModel) -> list[str]:
    """The names of the settings of a group that differ from their defaults: those that somebody gave.

    `model_fields_set` does not help: pydantic-settings fills in the whole group where the command line names one of its keys.
    """
    fields = type(group).model_fields
    return [name for name, field in fields.items() if getattr(group, name) != field.get_default(call_default_factory=True)]
