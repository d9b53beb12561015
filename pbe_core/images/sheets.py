"""Contact sheets: rows of pictures under a caption, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from pbe_core.files import atomic_file

Picture = UInt8[np.ndarray, "_ _ 3"]
Colour = tuple[int, int, int]
PINK = (255, 0, 96)
WHITE = (255, 255, 255)
_EDGE = (0, 0, 0)


def fit(picture: Picture, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A picture scaled to fit a square, aspect kept, on white."""
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(picture, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def tint(picture: Picture, mask: Bool[np.ndarray, "height width"], colour: Colour = PINK) -> Picture:
    """A picture with the masked region tinted and outlined."""
    tinted = picture.copy()
    tinted[mask] = (0.5 * tinted[mask] + 0.5 * np.array(colour)).astype(np.uint8)
    return outline(tinted, mask, colour)


def outline(picture: Picture, mask: Bool[np.ndarray, "height width"], colour: Colour = PINK) -> Picture:
    """A picture with the outline of the masked region, black on both sides of the colour."""
    line, edge = _widths(picture)
    drawn: Picture = picture.copy()
    drawn[_rim(mask, line // 2 + edge, (line + 1) // 2 + edge)] = _EDGE
    drawn[_rim(mask, line // 2, (line + 1) // 2)] = colour
    return drawn


def frame(picture: Picture, corners: tuple[int, int, int, int], colour: Colour = PINK) -> Picture:
    """A picture with a rectangle, black on both sides of the colour.

    Args:
        picture: is not changed.
        corners: whole px: x_min, y_min, x_max, y_max. They may lie beyond the picture.
        colour: of the line.
    """
    x_min, y_min, x_max, y_max = corners
    line, edge = _widths(picture)
    drawn: Picture = picture.copy()
    for tone, width in ((_EDGE, line + 2 * edge), (colour, line)):
        cv2.rectangle(drawn, (x_min, y_min), (x_max - 1, y_max - 1), tone, width)
    return drawn


def _widths(picture: Picture) -> tuple[int, int]:
    """Widths in px of a line's colour and of the black on each side: together more than 2 px in a sheet's cell of 160 px.

    A line of one colour is lost on things of its colour: pink on a strawberry, white on snow. Beside black it is not.
    """
    line = max(1, max(picture.shape) // 100)
    return line, (line + 1) // 2


def _rim(mask: Bool[np.ndarray, "height width"], outside: int, inside: int) -> Bool[np.ndarray, "height width"]:
    """Where the edge of the masked region is so many px away or nearer; the picture's own edge ends the region too."""
    region = mask.astype(np.uint8)
    grown, shrunk = (np.ones((2 * reach + 1,) * 2, np.uint8) for reach in (outside, inside))
    inner = cv2.erode(region, shrunk, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    rim: Bool[np.ndarray, "height width"] = cv2.dilate(region, grown) > inner
    return rim


def sheet(
    rows: Sequence[Sequence[Picture]],
    columns: Sequence[str] = (),
    captions: Sequence[str] = (),
    cell: int = 160,
    gap: int = 6,
    titles: Sequence[Sequence[str]] = (),
) -> Picture:
    """Lay rows of pictures out on white, with a heading per column and a caption above each row.

    Args:
        rows: pictures, any sizes; each is fitted into `cell` px.
        columns: headings; none if empty.
        captions: one line per row; none if empty.
        cell: side of a picture's cell in px.
        gap: white px between cells.
        titles: one line above each picture, cut to its cell; none if empty.
    """
    width = max(len(row) for row in rows) * (cell + gap) + gap
    line = 18
    head = line if columns else 0
    step = cell + gap + line * (bool(captions) + bool(titles))
    canvas = Image.new("RGB", (width, head + len(rows) * step + gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, heading in enumerate(columns):
        draw.text((gap + number * (cell + gap), 3), heading, "black", font)
    for number, row in enumerate(rows):
        top = head + gap + number * step
        if captions:
            draw.text((gap, top), captions[number], "dimgray", font)
            top += line
        for place, picture in enumerate(row):
            left = gap + place * (cell + gap)
            if titles:
                title = titles[number][place]
                while draw.textlength(title, font) > cell:
                    title = title[:-1]
                draw.text((left, top), title, "black", font)
            canvas.paste(Image.fromarray(fit(picture, cell)), (left, top + (line if titles else 0)))
    return np.array(canvas)


def save_picture(picture: Picture, path: Path) -> None:
    """Write a PNG, wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
