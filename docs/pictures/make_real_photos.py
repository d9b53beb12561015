"""Draw docs/pictures/real_photos.jpg: the first pairs of a pair set, with what models painted for them (docs/real-photos.md).

Usage:  python -m docs.pictures.make_real_photos --pairs SET --pictures "all on=FOLDER" "copying invited=FOLDER" [--out FILE]
"""

import argparse
from itertools import chain
from pathlib import Path

import cv2
from PIL import Image

from pbe_core.errors import InputError, run_program
from pbe_core.files import write_atomically
from pbe_core.images.sheets import outline, sheet
from pbe_train.editing.reading import read_photo
from pbe_train.evaluation.pair_sets import open_pairs

CELL = 128
"""Of a picture in the sheet, px: what the models paint at."""
QUALITY = 88
"""Of the JPEG."""


def draw(pairs: Path, pictures: dict[str, Path], count: int, per_row: int) -> bytes:
    """The sheet as a JPEG: photo with the mask outlined, reference, and each folder's picture, for the first `count` pairs.

    Raises:
        InputError: no such set, or a folder lacks a picture of these pairs.
    """
    asked = open_pairs(pairs)
    groups = []
    for number, pair in enumerate(asked.pairs[:count]):
        shown = asked.read(number)
        files = [folder / f"{pair.id}.png" for folder in pictures.values()]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise InputError(f"{missing[0]}: no such picture; evaluate the model on {pairs} first")
        groups.append([outline(shown.photo, shown.mask), shown.reference, *map(read_photo, files)])
    rows = [list(chain(*groups[start : start + per_row])) for start in range(0, len(groups), per_row)]
    columns = ["photo, region", "reference", *pictures] * per_row
    whole = sheet(rows, columns, cell=CELL, gap=4)
    _, data = cv2.imencode(".jpg", whole[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return data.tobytes()


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="a pair set, as `pbe evaluate` reads it")
    parser.add_argument("--pictures", nargs="+", required=True, metavar="HEADING=FOLDER", help="folders of pictures ID.png")
    parser.add_argument("--count", type=int, default=8, help="pairs, the first of the set (default: %(default)s)")
    parser.add_argument("--per-row", type=int, default=2, help="pairs beside one another (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "real_photos.jpg", help="(default: %(default)s)")
    given = parser.parse_args()
    pictures = {name: Path(folder) for name, _, folder in (text.partition("=") for text in given.pictures)}
    write_atomically(given.out, draw(given.pairs, pictures, given.count, given.per_row))
    print(f"{given.out}: {given.out.stat().st_size:,} bytes, {Image.open(given.out).size} px")


if __name__ == "__main__":
    run_program(main)
