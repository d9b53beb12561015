"""Contact sheets: rows of pictures under a caption, for people to look at."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "_ _ 3"]


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


def tint(picture: Picture, mask: Bool[np.ndarray, "height width"], colour: tuple[int, int, int] = (255, 0, 96)) -> Picture:
    """A picture with the masked region tinted and outlined."""
    tinted = picture.copy()
    tinted[mask] = (0.5 * tinted[mask] + 0.5 * np.array(colour)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn: Picture = cv2.drawContours(np.ascontiguousarray(tinted), outlines, -1, colour, max(1, picture.shape[0] // 256))
    return drawn


def sheet(
    rows: Sequence[Sequence[Picture]], columns: Sequence[str] = (), captions: Sequence[str] = (), cell: int = 160, gap: int = 6
) -> Picture:
    """Lay rows of pictures out on white, with a heading per column and a caption above each row.

    Args:
        rows: pictures, any sizes; each is fitted into `cell` px.
        columns: headings; none if empty.
        captions: one line per row; none if empty.
        cell: side of a picture's cell in px.
        gap: white px between cells.
    """
    width = max(len(row) for row in rows) * (cell + gap) + gap
    line = 18
    head = line if columns else 0
    step = cell + gap + (line if captions else 0)
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
            canvas.paste(Image.fromarray(fit(picture, cell)), (gap + place * (cell + gap), top))
    return np.array(canvas)
