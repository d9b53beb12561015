"""Object masks in a table of your own boxes: an outline in the cell, or the name of a PNG (docs/own-data.md#object-masks).

    segmentation   {"size": [480, 640], "counts": "..."} or [[x, y, x, y, ...], ...]    COCO's run lengths, or polygons
    mask           masks/cat-1.png, below the photo folder or beside the table          black is background

What is wrong with one is a problem of its row.
"""

import json
from pathlib import Path
from typing import Any

from pbe_core.images.decode import PhotoError, photo_size
from pbe_core.images.kinds import HEAD_BYTES, PNG, kind_of
from pipelines.annotations.coco_file import compress_mask, is_given
from pipelines.annotations.mask_files import place_of
from pipelines.annotations.photo_names import same_shape
from pipelines.annotations.source import RowProblem, is_text, shown
from pipelines.config import SourceSettings

COLUMNS = ("segmentation", "mask")
WITHOUT_MASKS = "they would be in a column `segmentation` or `mask` (docs/own-data.md#object-masks)"


def outline_of(cell: Any, size: tuple[int, int], unit: str) -> str | None:
    """A cell of the column `segmentation` as compressed RLE over the photo; null where it is empty.

    Args:
        cell: run lengths or polygons as JSON has them, or as text in JSON.
        size: width and height of the photo, px.
        unit: of polygons, as of boxes: pixel or fraction.

    Raises:
        RowProblem: `bad_row`.
    """
    outline = _parsed(cell)
    try:
        return compress_mask(_in_px(outline, size) if unit == "fraction" else outline, *size)
    except ValueError as error:
        raise RowProblem("bad_row", f", column segmentation: {error}") from None


def mask_place(cell: Any, size: tuple[int, int] | None, settings: SourceSettings) -> str | None:
    """A cell of the column `mask` as the place of a PNG; null where it is empty. The PNG's header is looked at.

    Args:
        cell: the PNG's path, below the photo folder or beside the table.
        size: width and height of the photo, px, where they are known: a mask of another shape is none of it.
        settings: of the source.

    Raises:
        RowProblem: `bad_row`: there is no such PNG, or it has another shape.
    """
    if not is_given(cell):
        return None
    if not is_text(cell):
        raise RowProblem("bad_row", f", column mask: {shown(cell)} is no text")
    place, path = _found(cell.strip().replace("\\", "/"), settings)
    try:
        with path.open("rb") as file:
            kind = kind_of(file.read(HEAD_BYTES))
        if kind != PNG:
            raise RowProblem("bad_row", f", column mask: {shown(cell)} is no PNG but {kind.name}")
        own = photo_size(path, frame="stored", max_pixels=settings.max_photo_pixels)
    except (OSError, PhotoError) as error:
        raise RowProblem("bad_row", f", column mask: {shown(cell)} cannot be read ({error})") from None
    if size and not same_shape(own, size):
        sizes = f"{own[0]}x{own[1]} px, the photo {size[0]}x{size[1]}"
        raise RowProblem("bad_row", f", column mask: {shown(cell)} has {sizes}; a mask covers its photo, at any scale")
    return place


def _found(name: str, settings: SourceSettings) -> tuple[str, Path]:
    """The place of a mask and its file: below the photo folder, or else beside the table."""
    folders = {"photos": settings.photos, "annotations": settings.annotations.parent}
    for root, folder in folders.items():
        for start in {folder.absolute().as_posix(), folder.resolve().as_posix()} if name.startswith("/") else {""}:
            below = name.removeprefix(f"{start.rstrip('/')}/") if start else name
            parts = below.split("/")
            if below.startswith("/") or ".." in parts or "\0" in below:
                continue
            if (folder / below).is_file():
                return place_of(root, below), folder / below
    where = " and ".join(dict.fromkeys(map(str, folders.values())))
    leads = " (and no mask may lie outside of these)" if name.startswith("/") or ".." in name.split("/") else ""
    raise RowProblem("bad_row", f", column mask: no file {shown(name)} below {where}{leads}")


def _parsed(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.strip():
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        how = "; it has Python's quotes: write it with json.dumps" if "'" in cell else ""
        raise RowProblem(
            "bad_row", f", column segmentation: {shown(cell)} is no JSON of polygons or of run lengths{how}"
        ) from None


def _in_px(outline: Any, size: tuple[int, int]) -> Any:
    """Polygons as fractions -> px; anything else as it is."""
    if not isinstance(outline, list):
        return outline
    if any(isinstance(part, list) for part in outline):
        return [_in_px(part, size) for part in outline]
    if not all(type(value) in (int, float) for value in outline):
        return outline
    return [float(value * size[place % 2]) for place, value in enumerate(outline)]
