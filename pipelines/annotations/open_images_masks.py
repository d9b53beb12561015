"""Open Images' object masks, V5 and later: a table that says which box each belongs to, and PNGs in zips or folders.

    train-annotations-object-segmentation.csv ──▶ MASKS: photo, label, box ──joined by box when boxes are selected──▶ objects
    train-masks-0.zip ... train-masks-f.zip   ──▶ where the PNG of each lies

Format: https://storage.googleapis.com/openimages/web/download_v7.html, "Data Formats, Segmentation masks". A PNG has the mask
tool's size, not the photo's: it covers the same photo at another scale. BoxID is not in the tables of boxes, so a mask belongs to
the box of its photo and label with its edges, which are rounded to 6 digits here.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.annotations.csv_files import check_header, stream_csv
from pipelines.annotations.mask_files import MaskFiles
from pipelines.config import SPLITS
from schemas.tables import MASKS, WORD, one_word

WITHOUT_MASKS = (
    "Open Images' are <split>-annotations-object-segmentation.csv and its PNGs, beside the tables of boxes "
    "(docs/selection.md#object-masks-of-open-images)"
)
DOCS = "docs/selection.md#object-masks-of-open-images"
TABLE_NAMES = (
    "{}-annotations-object-segmentation",
    "oidv6-{}-annotations-object-segmentation",
    "challenge-2019-{}-segmentation-masks",
)
ZIP_NAMES = ("{}-masks-*.zip", "challenge-2019-{}-masks-*.zip", "{}-masks.zip")
# Folders that hold PNGs, or folders of PNGs, one for each first digit of an id as FiftyOne has them.
FOLDER_NAMES = ("{}-masks*", "challenge-2019-{}-masks*", "masks/{}-masks*", "masks/{}", "masks", "{}/masks", "{}/labels/masks")
_COLUMNS = {
    "MaskPath": ("mask", pa.string()),
    "ImageID": ("photo_id", pa.string()),
    "LabelName": ("label", WORD),
    "BoxXMin": ("x_min", pa.float64()),
    "BoxXMax": ("x_max", pa.float64()),
    "BoxYMin": ("y_min", pa.float64()),
    "BoxYMax": ("y_max", pa.float64()),
}


@dataclass
class MaskTables:
    """The masks of some splits."""

    folder: Path
    """Of the annotations."""
    tables: dict[str, Path]
    """By split; those whose PNGs are not there are not among them."""
    missing: int = 0
    """How many masks of those that were last read have no PNG."""
    first_missing: str = ""
    unread: int = 0
    """How many rows of those that were last read cannot be read."""
    first_unread: str = ""
    _files: dict[str, MaskFiles] = field(default_factory=dict)

    def read(self) -> Iterator[pa.RecordBatch]:
        """Batches of `schemas.tables.MASKS`: those whose PNG is there."""
        self.missing, self.unread = 0, 0
        self.first_missing = self.first_unread = ""
        for split, path in self.tables.items():
            for rows in stream_csv(path, {name: kind for name, (_, kind) in _COLUMNS.items()}):
                wrong = {**{number: text for number, (_, text) in rows.problems.items()}, **rows.broken}
                if wrong:
                    self.unread += len(wrong)
                    number, text = min(wrong.items())
                    self.first_unread = self.first_unread or f"{path.name}, line {number + 1}: {text}"
                if len(rows.batch):
                    yield self._of_batch(split, rows.batch, ~np.isin(rows.numbers, list(rows.problems)))

    def _of_batch(self, split: str, batch: pa.RecordBatch, sound: np.ndarray) -> pa.RecordBatch:
        names = batch.column("MaskPath").to_pylist()
        places = self.files_of(split).find([name and name.rpartition("/")[2] for name in names])
        gone = [name for name, place, good in zip(names, places, sound, strict=True) if good and place is None]
        self.missing += len(gone)
        self.first_missing = self.first_missing or (str(gone[0]) if gone else "")
        columns = {ours: batch.column(name) for name, (ours, _) in _COLUMNS.items() if name != "MaskPath"}
        columns |= {"split": one_word(split, len(batch)), "segmentation": pa.array(places, pa.string())}
        found = pa.RecordBatch.from_arrays([columns[name] for name in MASKS.names], schema=MASKS)
        return found.filter(pa.array(sound & np.array([place is not None for place in places])))

    def files_of(self, split: str) -> MaskFiles:
        """The PNGs of a split; looked through once."""
        if split not in self._files:
            self._files[split] = MaskFiles.of(self.folder, mask_containers(self.folder, split))
        return self._files[split]

    def hashes(self) -> dict[str, str]:
        """By split: which PNGs there are, and where."""
        return {f"masks of {split}": self.files_of(split).digest() for split in self.tables}

    def notes(self) -> list[str]:
        """What a user should know about the tables that were read."""
        notes = []
        if self.missing:
            notes.append(
                f"object masks whose PNG is not there: {self.missing:,}, for example {self.first_missing}; their boxes have none "
                f"({DOCS})"
            )
        if self.unread:
            notes.append(f"rows of object masks that cannot be read: {self.unread:,}, for example {self.first_unread}")
        return notes


def find_masks(
    folder: Path, splits: Collection[str], first: Callable[[str, Sequence[str]], Path | None]
) -> tuple[MaskTables, list[str]]:
    """The tables of masks, their headers checked, and notes on what is not read.

    Args:
        folder: of the annotations.
        splits: that are built.
        first: a split and names of files -> the first of them that is there.

    Raises:
        InputError: a table lacks a column.
    """
    tables, notes = {}, []
    for split in splits:
        path = first(split, TABLE_NAMES)
        if path and mask_containers(folder, split):
            check_header(path, tuple(_COLUMNS), "Open Images' table of object masks")
            tables[split] = path
        elif path:
            notes.append(
                f"{path.name}: not read, as there is no PNG of its object masks: put {split}-masks-0.zip to {split}-masks-f.zip, "
                f"or what is in them as {split}-masks/*.png, beside it ({DOCS})"
            )
        elif zips := _zips(folder, split):
            name = TABLE_NAMES[0].format(split)
            notes.append(f"{zips[0].relative_to(folder)}: object masks are not read without their table, {name}.csv")
    return MaskTables(folder, tables), notes


def mask_containers(folder: Path, split: str) -> tuple[Path, ...]:
    """Zips and folders that hold a split's PNGs, zips first; the same order on every machine."""
    found = [path for name in FOLDER_NAMES for path in sorted(folder.glob(name.format(split))) if path.is_dir()]
    if folder.name == "annotations":  # Datumaro's: masks lie beside the folder of the tables.
        found += [path for path in (folder.parent / "masks" / split, folder.parent / "masks") if path.is_dir()]
    folders = dict.fromkeys(path for place in found for path in (place, *_folders_in(place, split)))
    return (*_zips(folder, split), *(path for path in folders if next(path.glob("*.png"), None)))


def _folders_in(place: Path, split: str) -> list[Path]:
    """Those of no other split. The place may hold two million files."""
    others = [other for other in SPLITS if other != split]
    with os.scandir(place) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    return [place / name for name in names if not any(other in name for other in others)]


def _zips(folder: Path, split: str) -> list[Path]:
    places = (folder, folder / split, folder / "masks", folder / "masks" / split)
    names = [name.format(split) for name in ZIP_NAMES]
    return sorted({path for place in places for name in names for path in place.glob(name) if path.is_file()})
