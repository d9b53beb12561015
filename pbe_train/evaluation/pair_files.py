"""Which files make a pair: the layouts of pair sets, told by names alone; no picture is opened here.

    GT_N/<id>_GT.png  Mask_bbox_N/<id>_mask.png  Ref_N/<id>_ref.png  id_list.npy     COCOEE as published; N may be any number
    photos/  masks/  references/  [truths/], files of equal stems                    a folder of one's own
    .csv  .jsonl  .parquet, columns photo, mask, reference[, truth, id, label]       rows; paths from the file's own folder

A `pairs.csv` in a folder gives its pairs' labels. All that is wrong with a layout is told at once, in one line.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.id_list import ID_DIGITS, read_id_list
from pbe_core.progress import print_line
from pbe_core.randomness import name_hash
from pbe_core.words import few, number_of

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""To which COCOEE pads its ids with zeros."""
_HELP = "docs/evaluation.md shows what is read"
_COCOEE = {"photo": ("GT_", "_GT"), "mask": ("Mask_bbox_", "_mask"), "reference": ("Ref_", "_ref")}
_OWN = {"photo": "photos", "mask": "masks", "reference": "references", "truth": "truths"}
# What a column may be called.
_MEANING = {
    "photo": "photo image source",
    "mask": "mask",
    "reference": "reference ref exemplar",
    "truth": "truth target gt ground_truth",
    "id": "id",
    "label": "label class category",
}
_COLUMN_OF = {word: column for column, words in _MEANING.items() for word in words.split()}
_REQUIRED = ("photo", "mask", "reference")
_SEVERAL = re.compile(r"\[.*\]|.*[;|].*")
# Some file systems allow names of 255 bytes; a temporary file's has 38 more, and the suffix.
_LONGEST_ID = 120


@dataclass(frozen=True)
class PairFiles:
    """Where the pictures of one pair lie."""

    id: str
    label: str
    photo: Path
    mask: Path
    reference: Path
    truth: Path | None = None


def find_pairs(source: Path) -> list[PairFiles]:
    """The pairs of a folder, or of a file of rows, in their order; every file is there.

    Raises:
        InputError: no pair set, files missing, columns missing, cells that are no paths, or ids that are there twice.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; give the folder or the table of a pair set ({_HELP})")
    try:
        found = _of_folder(source) if source.is_dir() else _of_rows(source)
    except OSError as error:
        raise InputError(
            f"{error.filename or source}: cannot be read ({' '.join(str(error.strerror or error).split())})"
        ) from None
    if not found:
        raise InputError(f"{source}: there is no pair in it ({_HELP})")
    if twice := [name for name, count in Counter(one.id for one in found).items() if count > 1]:
        raise InputError(f"{source}: {number_of(len(twice), 'id')} there more than once: {few(twice)}; give each pair its own")
    return found


def safe_id(name: str) -> str:
    """A name as an id, a part of files' names: as it is, or with other characters replaced and a hash that keeps it apart."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) and len(name) <= _LONGEST_ID:
        return name
    return f"{re.sub('[^A-Za-z0-9_-]', '_', name)[:_LONGEST_ID]}-{name_hash('pair', name):016x}"


# Folders.


def _of_folder(folder: Path) -> list[PairFiles]:
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    if any(path.name.startswith("GT_") for path in inside):
        ids = [f"{number:0{ID_DIGITS}d}" for number in read_id_list(folder / "id_list.npy")]
        places = _cocoee_folders(folder, inside)
        files = {role: _pictures(place, _COCOEE[role][1], ID_DIGITS) for role, place in places.items()}
        listed = "id_list.npy"
    elif (folder / "photos").is_dir():
        places = {role: folder / name for role, name in _OWN.items() if role != "truth" or (folder / name).is_dir()}
        if missing := [place.name for place in places.values() if not place.is_dir()]:
            raise InputError(f"{folder}: there is no folder {few(missing)} beside photos ({_HELP})")
        files = {role: _pictures(place) for role, place in places.items()}
        ids, listed = sorted(files["photo"]), "photos"
    else:
        raise InputError(
            f"{folder}: no pair set: it holds neither GT_*, Mask_bbox_* and Ref_* with id_list.npy (COCOEE), nor photos, masks "
            f"and references ({_HELP})"
        )
    _check_files(folder, ids, listed, places, files)
    labels = _labels(folder / "pairs.csv", len(ids[0]) if listed == "id_list.npy" and ids else 0)
    return [
        PairFiles(safe_id(one), labels.get(one, ""), **{role: found[one] for role, found in files.items()})  # type: ignore[arg-type]
        for one in ids
    ]


def _cocoee_folders(folder: Path, inside: Sequence[Path]) -> dict[str, Path]:
    """The folder of each role. Raises InputError where there is none, or more than one."""
    places, problems = {}, []
    for role, (start, _) in _COCOEE.items():
        found = [path for path in inside if path.name.startswith(start)]
        if len(found) == 1:
            places[role] = found[0]
        else:
            problems.append(f"{few([path.name for path in found])} both may be {start}*" if found else f"{start}* is missing")
    if problems:
        raise InputError(
            f"{folder}: {' and '.join(problems)}; COCOEE has one folder each of GT_*, Mask_bbox_* and Ref_* ({_HELP})"
        )
    return places


def _pictures(folder: Path, ending: str = "", digits: int = 0) -> dict[str, Path]:
    """Pictures by what their stems are without `ending`, padded with zeros. Raises InputError for two of one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in PICTURE_SUFFIXES or not path.stem.endswith(ending):
            continue
        name = path.stem.removesuffix(ending).zfill(digits)
        if name in found:
            raise InputError(f"{folder}: {found[name].name} and {path.name} are of one id; keep one of them")
        found[name] = path
    return found


def _check_files(
    folder: Path, ids: Sequence[str], listed: str, places: Mapping[str, Path], files: Mapping[str, Mapping[str, Path]]
) -> None:
    """Refuse ids without files; files of no id are told on stderr, one line a folder set."""
    lacking = {places[role].name: [one for one in ids if one not in found] for role, found in files.items()}
    if any(lacking.values()):
        told = "; ".join(f"{len(names):,} in {place} ({few(names)})" for place, names in lacking.items() if names)
        raise InputError(f"{folder}: of {number_of(len(ids), 'id')} in {listed}, files are missing: {told}; get the set again")
    known = set(ids)
    if beyond := sorted({one for found in files.values() for one in found} - known):
        print_line(f"{folder}: files of {number_of(len(beyond), 'id')} that {listed} does not name are left out: {few(beyond)}")


def _labels(path: Path, digits: int) -> dict[str, str]:
    """Labels by id from a table beside the folders; none where there is no table, or no column for them."""
    if not path.is_file():
        return {}
    names, rows = _read_rows(path)
    # What else a benchmark's table says of its pairs may be called as columns of rows are.
    read = [name for name in names if _COLUMN_OF.get(name.strip().casefold()) in ("id", "label")]
    columns = _columns(path, read, required=("id",))
    if "label" not in columns:
        return {}
    return {_text(row.get(columns["id"])).zfill(digits): _printable(_text(row.get(columns["label"]))) for row in rows}


# Rows.


def _of_rows(path: Path) -> list[PairFiles]:
    names, rows = _read_rows(path)
    columns = _columns(path, names)
    roles = [role for role in _OWN if role in columns]
    if "truth" in columns and not any(_text(row.get(columns["truth"])) for row in rows):
        roles.remove("truth")
    found, problems = [], []
    for number, row in enumerate(rows, start=1):
        cells = {role: row.get(name) for role, name in columns.items()}
        try:
            files = {role: _path(path.parent, columns[role], cells[role]) for role in roles}
        except ValueError as error:
            problems.append(f"row {number}: {error}")
        else:
            pair_id, label = (_printable(_text(cells.get(name))) for name in ("id", "label"))
            found.append(PairFiles(safe_id(pair_id or str(number)), label, **files))
    if problems:
        rest = f" (and so on in {number_of(len(problems) - 2, 'other row')})" if len(problems) > 2 else ""
        raise InputError(f"{path}: {'; '.join(problems[:2])}{rest}")
    return found


def _columns(path: Path, names: Sequence[str], required: Sequence[str] = _REQUIRED) -> dict[str, str]:
    """What a table's columns mean: ours -> as it stands there. Raises InputError for all that is wrong with them."""
    columns: dict[str, str] = {}
    problems = []
    for name in names:
        if column := _COLUMN_OF.get(name.strip().casefold()):
            if column in columns:
                problems.append(f"columns `{columns[column].strip()}` and `{name.strip()}` both mean the {column}; keep one")
            columns.setdefault(column, name)
    if missing := [f"`{column}`" for column in required if column not in columns]:
        there = f"it has {few([_printable(name.strip()[:40]) for name in names], 8)}" if names else "it is empty"
        problems.append(f"no column {' and '.join(missing)}: {there}; columns are {', '.join(_MEANING)} ({_HELP})")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    return columns


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, object]]]:
    """Names of columns as they stand, and rows. Raises InputError for what cannot be read as what its name says."""
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: its name must end in {', '.join(readers)}; or give a folder ({_HELP})")
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is no UTF-8 text (UTF-16?); save the file as UTF-8") from None


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, object]]]:
    lines = csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline=""), skipinitialspace=True)
    try:
        names = next(lines, [])
        rows: list[dict[str, object]] = []
        for cells in lines:
            if len(cells) > len(names):
                raise InputError(
                    f"{path}, line {lines.line_num}: {number_of(len(cells), 'cell')}, the header has {len(names)}; put cells "
                    "that hold commas in quotes"
                )
            if any(cell.strip() for cell in cells):
                rows.append(dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.line_num}: not CSV ({error})") from None
    return names, rows


def _read_jsonl(path: Path) -> tuple[list[str], list[dict[str, object]]]:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON that can be read ({error}); give one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: no JSON object; give one a line")
        rows.append(row)
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _read_parquet(path: Path) -> tuple[list[str], list[dict[str, object]]]:
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted = [name for name in names if name.strip().casefold() in _COLUMN_OF]
            # Pictures in columns of structs, as some data sets hold them, would fill the memory before they are refused.
            if inside := [name for name in wanted if pa.types.is_struct(file.schema_arrow.field(name).type)]:
                raise InputError(f"{path}: column {few(inside)} holds pictures themselves; give paths of files")
            return names, file.read(wanted).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: not Parquet that can be read ({' '.join(str(error).split())[:150]})") from None


def _path(folder: Path, column: str, value: object) -> Path:
    """The file that a cell names. Raises ValueError in words."""
    name = column.strip()
    if isinstance(value, list | tuple):
        raise ValueError(f"`{name}` holds a list: several references of one pair are not read; give one")
    if not isinstance(value, str | None):
        raise ValueError(f"`{name}` is {type(value).__name__}, not the path of a file")
    text = _text(value)
    if not text:
        raise ValueError(f"`{name}` is empty")
    path = folder / text
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # A null byte, or a name beyond what systems know.
        pass
    if _SEVERAL.fullmatch(text):
        raise ValueError(
            f"`{name}` seems to name several files ({_printable(text[:60])}): several references of one pair are not read"
        )
    raise ValueError(f"`{name}`: there is no file {_printable(str(path)[:300])}")


def _text(value: object) -> str:
    """A cell as text, without spaces around it; pandas writes NaN for nothing, and floats for whole numbers beside nothing."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _printable(text: str) -> str:
    """For a message of one line: breaks, null bytes and half characters, as JSON can hold them, by their escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
