"""Pair sets: photos, each with a region, the reference to paint into it and, where there is one, the true result.

    folder, .csv, .jsonl, .parquet ──open_pairs──────▶ PairSet ──read(number)──▶ photo, mask, reference[, truth]
    split of a dataset of ours ─────pairs_of_dataset─▶    "

Nothing is kept of what was read, so memory does not grow with a set; threads may read at once. A set's fingerprint is that of its
contents: wherever it lies, the same pairs have the same one.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.decode import PhotoError, photo_size
from pbe_core.progress import Progress
from pbe_core.randomness import generator
from pbe_train.config import TRAIN_SPLIT
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import CorruptSample, ShardReader, StoredSample
from pbe_train.editing.reading import check_mask, read_mask, read_photo
from pbe_train.evaluation.held_out import draw_mask
from pbe_train.evaluation.pair_files import PairFiles, find_pairs, safe_id

CANDIDATES = 8
_THREADS = 4


@dataclass(frozen=True)
class Pair:
    """What a pair is called."""

    id: str
    """Letters, digits, _ and -; unique in its set. The picture painted for it is <id>.png."""
    label: str = ""
    """Class of what the reference shows; empty where it is not known."""


@dataclass(frozen=True)
class PairPictures:
    """The pictures of one pair. RGB, 0-255; mask and truth are of the photo's size, the reference of any."""

    photo: AnyPhoto
    mask: AnyMask
    """True = repaint; not empty."""
    reference: AnyPhoto
    truth: AnyPhoto | None
    """What a perfect painter would make; None where nobody knows."""


class PairSet(ABC):
    """Many pairs, read one by one. Threads may share it."""

    name: str
    """For people: the folder or the file."""
    fingerprint: str
    """A hash of ids and contents, not of labels. Of files all are read for it, when it is first asked for."""
    pairs: Sequence[Pair]
    """All of them, in their order."""
    has_truth: bool
    """Whether `read` gives a truth; of all pairs, or of none."""

    @abstractmethod
    def size(self, number: int) -> tuple[int, int]:
        """Height and width of the photo of pair `number`, px, by its header. Raises InputError as `read` does."""

    @abstractmethod
    def read(self, number: int) -> PairPictures:
        """The pictures of pair `number`, from 0.

        Raises:
            InputError: a picture cannot be read, or a mask or truth is not of its photo's size; names the files.
        """


def open_pairs(source: str | Path) -> PairSet:
    """A pair set of files.

    Args:
        source: a folder in COCOEE's layout (`pbe benchmark` writes it) or of photos, masks and references; or a table, .csv,
            .jsonl or .parquet. `pbe_train.evaluation.pair_files` tells the layouts.

    Raises:
        InputError: none of these, or files or columns are missing, each with the first few; nothing has been decoded then.
    """
    return FilePairs(str(source), find_pairs(Path(source)))


class FilePairs(PairSet):
    """Pairs whose pictures are files.

    Args:
        name: for people.
        files: of each pair; truths of all or of none.
    """

    def __init__(self, name: str, files: Sequence[PairFiles]) -> None:
        self.name, self.files = name, files
        self.pairs = [Pair(one.id, one.label) for one in files]
        self.has_truth = files[0].truth is not None

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]  # Nobody sets it.
        """SHA-256 over ids and the SHA-256 of each file, ordered by id."""
        paths = list(dict.fromkeys(path for one in self.files for path in _paths(one)))
        hashes = dict(zip(paths, file_hashes(paths, "hashing the pairs"), strict=True))
        lines = sorted(" ".join([one.id, *(hashes[path] for path in _paths(one))]) for one in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def size(self, number: int) -> tuple[int, int]:
        """See `PairSet`."""
        path = self.files[number].photo
        try:
            width, height = photo_size(path, frame="exif")
        except PhotoError as error:
            raise InputError(f"{path}: not a readable photo ({error}); give another one") from None
        return height, width

    def read(self, number: int) -> PairPictures:
        """See `PairSet`."""
        files = self.files[number]
        photo, mask, reference = read_photo(files.photo), read_mask(files.mask), read_photo(files.reference)
        check_mask(mask, photo, files.mask, files.photo)
        truth = read_photo(files.truth) if files.truth else None
        if truth is not None and truth.shape != photo.shape:
            raise InputError(
                f"{files.truth}: the truth is {truth.shape[1]}x{truth.shape[0]} px, the photo {files.photo} is "
                f"{photo.shape[1]}x{photo.shape[0]} px; a truth is the same photo, of the same size"
            )
        return PairPictures(photo, mask, reference, truth)


def pairs_of_dataset(reader: ShardReader, count: int, seed: int, references: Literal["own", "another"] = "own") -> "DatasetPairs":
    """Pairs of a held-out split of a dataset: its views, each with one of its masks and a reference.

    Args:
        reader: of the split, which must keep views.
        count: of pairs, drawn by the seed; all samples of the split if it has no more.
        seed: also draws the masks and the other references; each draw is a function of the sample's key.
        references: a sample's own, or that of another sample with another label. A pair's label is that of its reference.

    Raises:
        InputError: the split keeps no views; or another label is asked for, and there is only one.
    """
    return DatasetPairs(reader, count, seed, references)


class DatasetPairs(PairSet):
    """See `pairs_of_dataset`, which has the arguments and the errors."""

    def __init__(self, reader: ShardReader, count: int, seed: int, references: Literal["own", "another"]) -> None:
        self.reader, self.seed = reader, seed
        self.name = f"{reader.folder}, split {reader.split}"
        self.has_truth = False
        rows = reader.labels()
        by_label: dict[str, list[SampleLocation]] = {}
        for place, _, label in rows:
            by_label.setdefault(label, []).append(place)
        if references == "another" and len(by_label) < 2:
            raise InputError(f"{reader.folder}: split `{reader.split}` has one label alone, so there is no reference of another")
        names = reader.label_names()
        self.pairs: list[Pair] = []
        self._places: list[tuple[SampleLocation, SampleLocation]] = []  # Of the view and of the reference.
        for number in generator(seed, "evaluate", "samples").permutation(len(rows))[:count]:
            place, key, label = rows[number]
            shown = place
            if references == "another":
                random = generator(seed, "evaluate", key)
                others = sorted(by_label.keys() - {label})
                label = others[random.integers(len(others))]
                shown = by_label[label][random.integers(len(by_label[label]))]
            self.pairs.append(Pair(safe_id(key), names[label]))
            self._places.append((place, shown))
        given = (reader.info.fingerprint, reader.split, reader.samples_hash(), len(self.pairs), seed, references)
        self.fingerprint = hashlib.sha256(repr(given).encode()).hexdigest()
        self._lock = threading.Lock()
        with suppress(CorruptSample):  # One sample that is damaged stops nobody here: who reads it, learns it.
            self._view(reader.read(self._places[0][0]))

    def trained(self, fingerprint: str) -> bool:
        """Whether a run on the dataset of this fingerprint was trained on these samples."""
        return self.reader.info.fingerprint == fingerprint and self.reader.split == TRAIN_SPLIT

    def size(self, number: int) -> tuple[int, int]:
        """See `PairSet`."""
        width, height = self.reader.info.view_shape(self.reader.shards[self._places[number][0].shard])
        return height, width

    def read(self, number: int) -> PairPictures:
        """See `PairSet`."""
        place, shown = self._places[number]
        with self._lock:  # A reader closes files that others may be reading.
            sample = self.reader.read(place)
            reference = sample.reference if shown == place else self.reader.read(shown).reference
        return PairPictures(self._view(sample), draw_mask(sample, self.seed).mask, reference, None)

    def _view(self, sample: StoredSample) -> AnyPhoto:
        if sample.view is None:
            raise InputError(
                f"{self.reader.folder}: split `{self.reader.split}` keeps no views; name it in the build's `views.keep`"
            )
        return sample.view


def draw_candidates(pairs: Sequence[Pair], seed: int) -> list[tuple[int, ...]] | None:
    """The references among which a painted one is looked for: its own first, then seven of seven other labels.

    Args:
        pairs: of a set.
        seed: of the draws. Those of a pair are a function of its id and of which ids and labels there are, in whatever order.

    Returns:
        For each pair numbers of eight pairs, whose references are meant; none for one without a label. None where the set has
        fewer than eight labels.
    """
    by_label = _by_label(pairs)
    if len(by_label) < CANDIDATES:
        return None
    found: list[tuple[int, ...]] = []
    for number, pair in enumerate(pairs):
        if not pair.label:
            found.append(())
            continue
        random = generator(seed, "candidates", pair.id)
        others = sorted(by_label.keys() - {pair.label})
        chosen = [by_label[others[index]] for index in random.choice(len(others), CANDIDATES - 1, replace=False)]
        found.append((number, *(group[random.integers(len(group))] for group in chosen)))
    return found


def draw_alike(pairs: Sequence[Pair], seed: int) -> list[int | None]:
    """For each pair another one of its label, whose reference shows another object of the class; None where there is none.

    Args:
        pairs: of a set. Two of them may share a reference; who compares references must look.
        seed: of the draws, each a function of the pair's id and of which others there are, in whatever order.
    """
    found: list[int | None] = []
    by_label = _by_label(pairs)
    for number, pair in enumerate(pairs):
        others = [each for each in by_label.get(pair.label, []) if each != number]
        found.append(others[generator(seed, "alike", pair.id).integers(len(others))] if others else None)
    return found


def _by_label(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Numbers of pairs by label, ordered by id; those without a label are left out."""
    by_label: dict[str, list[int]] = {}
    for number in sorted(range(len(pairs)), key=lambda number: pairs[number].id):
        if pairs[number].label:
            by_label.setdefault(pairs[number].label, []).append(number)
    return by_label


def _paths(files: PairFiles) -> list[Path]:
    return [files.photo, files.mask, files.reference, *([files.truth] if files.truth else [])]


def file_hashes(paths: Sequence[Path], doing: str) -> list[str]:
    """SHA-256 of each file, while `doing` is shown.

    Raises:
        InputError: one cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool, Progress(doing, len(paths), "files") as progress:

        def hashed(path: Path) -> str:
            try:
                return file_sha256(path)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None
            finally:
                progress.update()

        return list(pool.map(hashed, paths))
