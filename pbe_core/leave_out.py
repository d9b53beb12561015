"""What people marked to be left out: a list of objects and photos, which the viewer writes and selection reads.

    what,id
    object,e11bbb91c5165a8c-39eb5fe5aa48
    photo,1d9c2975d9d4b98e

A CSV with this header and one line for each; ids as in `objects.parquet`, which are the same in every build of a source.
"""

import csv
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

from pbe_core.errors import InputError
from pbe_core.files import write_atomically

HEADER = ["what", "id"]
_PHOTO = r"[A-Za-z0-9_-]{1,64}"
_IDS = {"object": re.compile(rf"{_PHOTO}-[0-9a-f]{{12}}"), "photo": re.compile(_PHOTO)}


@dataclass
class LeftOut:
    """Ids of objects and of photos."""

    objects: set[str] = field(default_factory=set)
    photos: set[str] = field(default_factory=set)

    def of(self, what: str) -> set[str]:
        """The ids of one kind: `object` or `photo`."""
        return {"object": self.objects, "photo": self.photos}[what]


def is_id(what: str, name: str) -> bool:
    """Whether a name can be the id of an `object` or of a `photo`."""
    return what in _IDS and bool(_IDS[what].fullmatch(name))


def read_left_out(path: Path) -> LeftOut:
    """The ids of a list.

    Raises:
        InputError: it is not there, or a line of it is not as above.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise InputError(f"{path}: cannot be read ({cause}); give the list that the dataset viewer of `pbe app` wrote") from None
    found = LeftOut()
    rows = csv.reader(io.StringIO(text))
    if [cell.strip() for cell in next(rows, [])] != HEADER:
        raise InputError(f"{path}, line 1: expected the header `what,id`; give the list that the dataset viewer wrote")
    try:
        for cells in rows:
            if not cells:
                continue
            what, name = (cell.strip() for cell in cells) if len(cells) == len(HEADER) else ("", "")
            if not is_id(what, name):
                raise InputError(
                    f"{path}, line {rows.line_num}: {','.join(cells)[:80]!r} is neither `object,<object id>` nor "
                    "`photo,<photo id>`; mend or remove the line"
                )
            found.of(what).add(name)
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}; mend or remove the line") from None
    return found


def write_left_out(path: Path, left_out: LeftOut) -> None:
    """Write a list, sorted, wholly or not at all."""
    lines = [",".join(HEADER), *(f"{what},{name}" for what in _IDS for name in sorted(left_out.of(what)))]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
