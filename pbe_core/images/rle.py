"""Masks as COCO writes them: lengths of runs down the columns, the first of pixels outside, compressed into ASCII text."""

import numpy as np
from jaxtyping import Bool, Int64


def decode_counts(text: str) -> Int64[np.ndarray, " runs"]:
    """COCO's compressed RLE -> lengths of runs, the first of pixels outside.

    A number is written in digits of 5 bits, the lowest first, each as a character from code 48 on; bit 32 says that more follow,
    bit 16 of the last one is the sign. From the fourth number on it is the difference to the number before the last.

    Raises:
        ValueError: says in words what is wrong.
    Source: rleFrString of pycocotools' maskApi.c, which runs on beyond the end of such text as is refused here.
    """
    if not text:
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text.encode("ascii", errors="replace"), np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or not text.isascii():
        raise ValueError("has `counts` with characters that RLE does not use")
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("has `counts` that are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > 7:
        raise ValueError("has `counts` with a number beyond 32 bits")
    places = np.arange(len(codes)) - np.repeat(starts, digits)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs = np.where(codes[ends] & 16, runs - (1 << (5 * digits)), runs)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def decode_pixels(text: str, height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
    """COCO's compressed RLE -> the pixels that it marks.

    Raises:
        ValueError: says in words what is wrong: the text, or that its runs do not fill so many pixels.
    """
    runs = decode_counts(text)
    if runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise ValueError(f"is of {runs.sum()} px, or has runs below 0; the picture has {width}x{height} px")
    # Bounds were checked, so that a hostile run cannot ask for more memory than the picture has pixels.
    pixels: np.ndarray = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    return pixels
