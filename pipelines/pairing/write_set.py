"""A pair set on disk: the layout of COCOEE, a table, a contact sheet, and the record that names and checks it all.

    GT_<n>/<id>_GT.png  Mask_bbox_<n>/<id>_mask.png  Ref_<n>/<id>_ref.png  id_list.npy   as published; n is the number of pairs
    pairs.csv  contact_sheet.png                                                        whose photos these are, and a look at them
    benchmark.json                                                      rules, counts, judge, and a fingerprint of all other files

All of it is written into a folder of its own beside the set's, which takes the set's name at the end: a set is there as a whole.
"""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, sync
from pbe_core.id_list import ID_DIGITS
from pbe_core.images.decode import decode_photo
from pbe_core.images.sheets import Picture, fit, frame, save_picture, sheet
from pipelines.dataset.write_plan import difference
from pipelines.pairing.make_pairs import MadePair

RECORD = "benchmark.json"
FORMAT_VERSION = 1
_FOLDERS = {"GT": "photo", "Mask_bbox": "mask", "Ref": "reference"}
_ENDINGS = {"GT": "GT", "Mask_bbox": "mask", "Ref": "ref"}
_FILES = ("id_list.npy", "pairs.csv", "contact_sheet.png")
_OF_BOTH = ("object_id", "photo_id", "url", "author", "licence")
_SHOWN, _BESIDE, _CELL = 36, 3, 200


class SetWriter:
    """Writes a set pair by pair; holds a line for each pair, and small pictures of the first few."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: list[int] = []
        self.rows: list[dict[str, Any]] = []
        self.cells: list[tuple[str, Picture, Picture]] = []
        for name in _FOLDERS:
            (folder / name).mkdir()

    def add(self, number: int, pair: MadePair) -> None:
        """Write the three pictures of a pair, named by this id."""
        name, target = f"{number:0{ID_DIGITS}d}", pair.target
        pictures = {"GT": pair.photo_png, "Mask_bbox": pair.mask_png, "Ref": pair.reference_png}
        for folder, data in pictures.items():
            (self.folder / folder / f"{name}_{_ENDINGS[folder]}.png").write_bytes(data)
        self.ids.append(number)
        similarity = "" if pair.similarity is None else f"{pair.similarity:.6f}"
        row = {"id": name, "label": target["label_name"], "label_id": target["label"]}
        row |= dict(zip(("x_min", "y_min", "x_max", "y_max"), pair.box, strict=True)) | {"whole_box": int(pair.whole)}
        row |= {key: target[key] for key in _OF_BOTH} | {f"reference_{key}": pair.reference[key] for key in _OF_BOTH}
        self.rows.append(row | {"similarity": similarity})
        if len(self.cells) < _SHOWN:
            photo, reference = (decode_photo(data, frame="stored") for data in (pair.photo_png, pair.reference_png))
            title = f"{name.lstrip('0') or '0'} {target['label_name']} {similarity[:5]}"
            self.cells.append((title, fit(frame(photo, pair.box), _CELL), fit(reference, _CELL)))

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write what is left, the record last; returns it with what is added to it. All is on disk then."""
        count = len(self.ids)
        for name in _FOLDERS:
            (self.folder / name).rename(self.folder / f"{name}_{count}")
        np.save(self.folder / "id_list.npy", np.array(self.ids, np.int64), allow_pickle=False)
        (self.folder / "pairs.csv").write_bytes(self._table().encode())
        save_picture(self._sheet(), self.folder / "contact_sheet.png")
        files, sha256 = fingerprint(self.folder)
        record = {"format": FORMAT_VERSION, "pairs": count, **record, "files": files, "fingerprint": sha256}
        (self.folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        for path in (*self.folder.glob("**/*"), self.folder):
            sync(path)
        return record

    def _table(self) -> str:
        """pairs.csv; `photo`, `mask` and `reference` are the files of a row, below the folder."""
        text, count = io.StringIO(), len(self.ids)
        files = [
            {column: f"{name}_{count}/{row['id']}_{_ENDINGS[name]}.png" for name, column in _FOLDERS.items()} for row in self.rows
        ]
        writer = csv.DictWriter(text, ["id", *_FOLDERS.values(), *list(self.rows[0])[1:]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **own} for row, own in zip(self.rows, files, strict=True))
        return text.getvalue()

    def _sheet(self) -> Picture:
        """Photos with their boxes, each beside its reference; the rest of the last row stays white."""
        blank = np.full((_CELL, _CELL, 3), 255, np.uint8)
        cells = self.cells + [("", blank, blank)] * (-len(self.cells) % _BESIDE)
        rows = [cells[start : start + _BESIDE] for start in range(0, len(cells), _BESIDE)]
        pictures = [[picture for _, *both in row for picture in both] for row in rows]
        titles = [[title for name, *_ in row for title in (name, "")] for row in rows]
        return sheet(pictures, ["photo: box", "reference"] * _BESIDE, titles=titles, cell=_CELL)


def fingerprint(folder: Path) -> tuple[int, str]:
    """How many files a set has beside its record, and a SHA-256 over their names and contents; what else is there is not read."""
    paths = [*(path for name in _FOLDERS for path in folder.glob(f"{name}_*/*.png")), *(folder / name for name in _FILES)]
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return len(names), digest.hexdigest()


def read_finished(out: Path, rules: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the set that is in a folder, made by the same rules; nothing where there is none yet.

    Raises:
        InputError: the folder holds something else, a set by other rules, or one that is not what was written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; set build.benchmark.out (--benchmark.out) to a folder")
    if not out.exists() or next(out.iterdir(), None) is None:
        return None
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_bytes())
        before, files = record["rules"], (record["files"], record["fingerprint"])
    except FileNotFoundError:
        raise InputError(
            f"{out}: holds files, but no {RECORD}, so it is no set of this program; give another --benchmark.out"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{out / RECORD}: damaged; remove the folder and run again, or give another --benchmark.out") from None
    if before != rules:
        raise InputError(
            f"{out / RECORD}: this set was made by other rules or of other boxes ({'; '.join(difference(before, rules))}); "
            f"give another --benchmark.out, or remove the folder"
        )
    if fingerprint(out) != files:
        raise InputError(f"{out}: its files are not those that were written (fingerprint); remove the folder and run again")
    return record
