"""Which of a mask's values mean that a px is to be repainted. What is in doubt is an error that names the values.

0 and 1, or 0 and 255, of any type ──▶ the other one
8 or 16 bits                       ──▶ brighter than mid grey
floats from 0 to 1                 ──▶ above 0.5
colours                            ──▶ brighter than mid grey, unless what is darker is a colour, too
"""

import numpy as np
from jaxtyping import Int32, Num, Shaped, UInt8, UInt16

from pbe_core.errors import InputError
from pbe_train.editing.region import Mask

_WAY_OUT = "paint what is to be repainted white (255) and all else black (0)"
# Of an 8-bit level: below it, what is there is black to the eye, or what JPEG makes of black.
_NEARLY_BLACK = 32
# What differs by so much between channels is a colour.
_COLOURFUL = 64
# Darker colours at the edge of what counts are its antialiasing.
_EDGE_SHARE = 0.1
# Colours in a file of a palette; more are a photo's.
_PALETTE = 256
_SHOWN = 4


def bright_levels(values: Shaped[np.ndarray, "height width"], name: str) -> Mask:
    """Where a grey mask is to be repainted.

    Args:
        values: of any type.
        name: what errors call the mask.

    Raises:
        InputError: values of which one cannot tell, or none of which counts.
    """
    if values.dtype == bool:
        return values
    if not np.isfinite(values).all():
        raise InputError(f"{name}: the mask holds NaN or infinity; {_WAY_OUT}")
    levels, highest = values.ravel(), values.max()
    if highest in (0, 1, 255) and ((values == 0) | (values == highest)).all():
        marked: Mask = (values == highest) & (highest > 0)
        return marked
    if values.dtype.kind == "f":
        if values.min() < 0 or highest > 1:
            raise InputError(
                f"{name}: the mask's values are floats, {told(levels)}; give floats from 0 to 1, or uint8 from 0 to 255"
            )
        bright = values > 0.5
    elif values.dtype in (np.uint8, np.uint16):
        _check_for_classes(levels, name)
        bright = values > np.iinfo(values.dtype).max // 2
    else:
        raise InputError(
            f"{name}: the mask's values are of {values.dtype}, {told(levels)}, which says nothing of white; give uint8 from 0 "
            "to 255, booleans, or 0 and 1"
        )
    if not bright.any():
        raise InputError(f"{name}: the mask's values are {told(levels)}, and none is brighter than mid grey; {_WAY_OUT}")
    return bright


def _check_for_classes(levels: UInt8[np.ndarray, " n"] | UInt16[np.ndarray, " n"], name: str) -> None:
    """Raise InputError for what looks like numbers of classes, with 255 for unknown: white would be the wrong one of them."""
    found = np.flatnonzero(np.bincount(levels))
    if len(found) == 3 and found[0] == 0 and found[1] < _NEARLY_BLACK and found[2] == 255:
        raise InputError(
            f"{name}: the mask's values are {told(levels)}, which may be numbers of classes; {_WAY_OUT}, or use 0 and 1 alone"
        )


def bright_colours(values: UInt8[np.ndarray, "height width 3"], name: str) -> Mask:
    """Where a mask in colours is to be repainted.

    Args:
        values: RGB, 0-255.
        name: what errors call the mask.

    Raises:
        InputError: a darker colour is there that may be meant, or nothing counts.
    """
    bright: Mask = values.mean(axis=2) > 127
    colours = values.reshape(-1, 3)
    spread = values.max(axis=2) - values.min(axis=2)
    dark_colours = ~bright & (spread >= _COLOURFUL)
    if bright.any() and dark_colours.sum() <= _EDGE_SHARE * bright.sum():
        return bright
    found = len(np.unique(_packed(colours)))
    if found > _PALETTE:
        raise InputError(f"{name}: the mask has {found:,} colours, as a photo has; {_WAY_OUT}")
    counted = f"of these only {told(values[bright], shares=False)} counts" if bright.any() else "none is brighter than mid grey"
    raise InputError(f"{name}: the mask's colours are {told(colours)}, and {counted}; {_WAY_OUT}")


def told(values: Num[np.ndarray, " n"] | UInt8[np.ndarray, "n 3"], shares: bool = True) -> str:
    """Levels or colours for a message: the most common ones, with or without their shares, or the range of many levels."""
    colours = values.ndim == 2
    if colours:
        values = _packed(values)
    found, counts = np.unique(values, return_counts=True)
    if len(found) > _SHOWN and not colours:
        return f"{_number(found[0])} to {_number(found[-1])}"
    names = []
    for place in np.argsort(-counts, kind="stable")[:_SHOWN]:
        value = f"#{found[place]:06x}" if colours else _number(found[place])
        names.append(f"{value} ({counts[place] / counts.sum():.1%})" if shares else value)
    return ", ".join(names) + (", ..." if len(found) > _SHOWN else "")


def _packed(colours: UInt8[np.ndarray, "n 3"]) -> Int32[np.ndarray, " n"]:
    """Each colour as one number, 0xRRGGBB."""
    packed: np.ndarray = colours.astype(np.int32) @ np.array((1 << 16, 1 << 8, 1), np.int32)
    return packed


def _number(value: np.generic) -> str:
    return f"{value.item():g}" if value.dtype.kind == "f" else str(value.item())
