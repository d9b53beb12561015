"""Small pair sets for tests: COCOEE's layout, a folder of one's own, and tables, all of the same pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 64)


def picture(seed: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """Blocks of 8 px in random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def box(seed: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """A mask of one box, 255 inside."""
    top, left = np.random.default_rng(seed).integers(0, [height // 2, width // 2])
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + height // 3, left : left + width // 3] = 255
    return mask


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def make_cocoee(folder: Path, ids: Sequence[int], size: tuple[int, int] = SIZE) -> Path:
    """The published layout; picture `id` shows what `picture(id)` does."""
    for number in ids:
        save(folder / f"GT_{len(ids)}" / f"{number:012d}_GT.png", picture(number, *size))
        save(folder / f"Mask_bbox_{len(ids)}" / f"{number:012d}_mask.png", box(number, *size))
        save(folder / f"Ref_{len(ids)}" / f"{number:012d}_ref.png", picture(number + 1000, 30, 24))
    np.save(folder / "id_list.npy", np.array(ids))
    return folder


def make_rows(folder: Path, ids: Sequence[int], truth: bool = True) -> list[dict[str, str]]:
    """Pictures in folders, and the rows of a table that names them."""
    rows = []
    for number in ids:
        files = {
            "photo": save(folder / "p" / f"{number}.png", picture(number)),
            "mask": save(folder / "m" / f"{number}.png", box(number)),
            "reference": save(folder / "r" / f"{number}.png", picture(number + 1000, 30, 24)),
        }
        if truth:
            files["truth"] = save(folder / "t" / f"{number}.png", picture(number + 2000))
        rows.append({role: str(path.relative_to(folder)) for role, path in files.items()})
    return rows


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, header: str, rows: Sequence[Sequence[str]]) -> Path:
    path.write_text("\n".join([header, *(", ".join(row) for row in rows)]) + "\n")
    return path
