"""Photos and masks as people have them (files, Pillow's pictures, arrays) -> arrays, or a clear error.

A mask is True where the photo is to be repainted. Of its values these mean that:

    0 and 1, or 0 and 255, of any type ──▶ the other one
    8 or 16 bits                       ──▶ brighter than mid grey
    floats from 0 to 1                 ──▶ above 0.5
    colours                            ──▶ brighter than mid grey, unless what is darker is a colour, too
"""

import contextlib
import operator
from pathlib import Path

import numpy as np
from jaxtyping import Num, Shaped, UInt8
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.decode import PhotoError, decode_photo, load_photo

Picture = str | Path | Image.Image | np.ndarray
"""A file; a picture of Pillow; or an array, RGB [H, W, 3] or grey [H, W], 0-255, for a mask also of other types (`read_mask`)."""

_WAY_OUT = "paint what is to be repainted white (255) and all else black (0)"
# Of an 8-bit level: below it, what is there is black to the eye, or what JPEG makes of black.
_NEARLY_BLACK = 32
# What differs by so much between channels is a colour.
_COLOURFUL = 64
# Darker colours at the edge of what counts are its antialiasing.
_EDGE_SHARE = 0.1
# Values that a message names; of more, the range.
_SHOWN = 4


def read_photo(picture: Picture, name: str = "the photo") -> AnyPhoto:
    """RGB, 0-255, turned as its EXIF says. Greyscale, 16-bit, CMYK and palettes become RGB; transparency lies over white.

    Args:
        picture: of any of the kinds.
        name: what errors call it, where it is no file.

    Raises:
        InputError: no such file, no readable photo, or an array of another shape or type.
    """
    if isinstance(picture, np.ndarray):
        grey = picture.ndim == 2
        if picture.dtype != np.uint8 or not (grey or picture.shape[2:] == (3,)) or not picture.size:
            raise InputError(
                f"{name}: an array of {picture.dtype} {list(picture.shape)}; give uint8, 0-255, RGB [height, width, 3] or grey "
                "[height, width]"
            )
        # Views of other arrays may be mirrored, strided or read-only, which PyTorch does not take.
        return np.repeat(picture[..., None], 3, axis=2) if grey else np.require(picture, requirements=["C", "W"])
    try:
        return decode_photo(_file_or_picture(picture, name), frame="exif")
    except PhotoError as error:
        named = picture if isinstance(picture, str | Path) else name
        raise InputError(f"{named}: not a readable photo ({error}); give another one") from None


def read_mask(picture: Picture, name: str = "the mask") -> AnyMask:
    """True where a mask says that the photo is to be repainted: docs/editing.md has the rules.

    Args:
        picture: of any of the kinds; an array [height, width] or RGB, of uint8 or uint16, booleans, floats from 0 to 1, or of any
            other type with no values but 0 and 1, or 0 and 255.
        name: what errors call it, where it is no file.

    Raises:
        InputError: as `read_photo`; or a transparent px, or values that leave in doubt what is meant, or none that counts.
    """
    if isinstance(picture, str | Path):
        name = str(picture)
    values = picture if isinstance(picture, np.ndarray) else _mask_values(picture, name)
    shape = values.shape
    if values.ndim == 3 and shape[2] == 1:
        values = values[..., 0]
    if values.ndim == 3 and shape[2] == 3 and values.dtype == np.uint8 and values.size:
        # Most masks in RGB are grey.
        grey = (values == values[..., :1]).all()
        return _bright_levels(values[..., 0], name) if grey else _bright_colours(values, name)
    if values.ndim != 2 or values.dtype.kind not in "biuf" or not values.size:
        raise InputError(
            f"{name}: an array of {values.dtype} {list(shape)}; give uint8, 0-255 (white, 255, is repainted), booleans or floats "
            "from 0 to 1, [height, width]"
        )
    return _bright_levels(values, name)


def check_mask(mask: AnyMask, photo: AnyPhoto, mask_name: object = "the mask", photo_name: object = "the photo") -> None:
    """Refuse a mask that does not say which pixels to repaint.

    Raises:
        InputError: another size than the photo (a guess at how to fit it would repaint the wrong place), or no white pixel.
    """
    if mask.shape != photo.shape[:2]:
        raise InputError(
            f"{mask_name}: the mask is {mask.shape[1]}x{mask.shape[0]} px, the photo {photo_name} is "
            f"{photo.shape[1]}x{photo.shape[0]} px; draw the mask at the photo's size"
        )
    if not np.any(mask):
        raise InputError(f"{mask_name}: the mask is empty; paint the region to be edited white")


def with_profile(photo: AnyPhoto, source: Picture) -> Image.Image:
    """A picture of Pillow with the colour profile of the photo that it was made of: else the same bytes are other colours."""
    made, mode, profile = Image.fromarray(photo), "", None
    if isinstance(source, Image.Image):
        mode, profile = source.mode, source.info.get("icc_profile")
    elif isinstance(source, str | Path):
        # What Pillow refuses here, of what has been decoded, is a profile that is damaged, or longer than any.
        with contextlib.suppress(Exception), Image.open(source) as opened:
            mode, profile = opened.mode, opened.info.get("icc_profile")
    if profile and mode in ("RGB", "RGBA"):  # Those of CMYK and grey say nothing of RGB.
        made.info["icc_profile"] = profile
    return made


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write an edited photo with its colour profile, in the format of the path's ending."""
    # PNG at level 1: of a photo of 24 megapixels Pillow's own level, 6, takes four times as long to save a fifth of the bytes.
    picture.save(path, icc_profile=picture.info.get("icc_profile"), compress_level=1)


def whole_number(value: object, name: str) -> int:
    """A whole number of any kind. Raises InputError for anything else: 1.7 is not 1."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} {value!r}: must be a whole number") from None


def _mask_values(picture: object, name: str) -> np.ndarray:
    """What a mask of a file or of Pillow holds: grey levels in whatever range it has them, or RGB; turned as its EXIF says."""
    try:
        image = load_photo(_file_or_picture(picture, name), frame="exif")
    except PhotoError as error:
        raise InputError(f"{name}: not a readable picture ({error}); give another mask") from None
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise InputError(
            f"{name}: the mask is transparent in places, so it is unclear what is to be repainted; save it without transparency, "
            "white where it is to be repainted and black elsewhere"
        )
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        values = np.asarray(image)
        # Of some formats Pillow reads 16 bits as 32.
        of_file = image.mode.startswith("I") and not isinstance(picture, Image.Image)
        return np.clip(values, 0, 65535).astype(np.uint16) if of_file else values
    return np.asarray(image.convert("RGB"))


def _file_or_picture(picture: object, name: str) -> bytes | Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, str | Path):
        raise InputError(f"{name}: {type(picture).__name__} is no picture; give a file, a picture of Pillow, or an array")
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise InputError(f"{picture}: cannot be read ({error.strerror}); give the path of a photo") from None


def _bright_levels(values: Shaped[np.ndarray, "height width"], name: str) -> AnyMask:
    """Where a grey mask of any type is to be repainted; InputError for values that leave it in doubt, or of which none counts."""
    if values.dtype == bool:
        return values
    if not np.isfinite(values).all():
        raise InputError(f"{name}: the mask holds NaN or infinity; {_WAY_OUT}")
    highest = values.max()
    if highest in (0, 1, 255) and ((values == 0) | (values == highest)).all():
        marked: AnyMask = (values == highest) & (highest > 0)
        return marked
    told = f"{name}: the mask's values are {_told(values.ravel())}"
    if values.dtype.kind == "f":
        if values.min() < 0 or highest > 1:
            raise InputError(f"{told}; give floats from 0 to 1, or uint8 from 0 to 255")
        bright = values > 0.5
    elif values.dtype in (np.uint8, np.uint16):
        found = np.flatnonzero(np.bincount(values.ravel()))
        # Numbers of classes, with 255 for unknown: white would be the wrong one of them.
        if len(found) == 3 and found[0] == 0 and found[1] < _NEARLY_BLACK and found[2] == 255:
            raise InputError(f"{told}, which may be numbers of classes; {_WAY_OUT}, or use 0 and 1 alone")
        bright = values > np.iinfo(values.dtype).max // 2
    else:
        raise InputError(
            f"{told}, of {values.dtype}, which says nothing of white; give uint8 from 0 to 255, booleans, or 0 and 1"
        )
    if not bright.any():
        raise InputError(f"{told}, and none is brighter than mid grey; {_WAY_OUT}")
    return bright


def _bright_colours(values: UInt8[np.ndarray, "height width 3"], name: str) -> AnyMask:
    """Where a mask in colours is to be repainted; InputError for a darker colour that may be meant, or where nothing counts."""
    bright: AnyMask = values.mean(axis=2) > 127
    dark_colours = ~bright & (values.max(axis=2) - values.min(axis=2) >= _COLOURFUL)
    if bright.any() and dark_colours.sum() <= _EDGE_SHARE * bright.sum():
        return bright
    packed = values.astype(np.int32) @ np.array((1 << 16, 1 << 8, 1), np.int32)
    counted = f"of these only {_told(packed[bright], '#{:06x}')} counts" if bright.any() else "none is brighter than mid grey"
    raise InputError(f"{name}: the mask's colours are {_told(packed.ravel(), '#{:06x}')}, and {counted}; {_WAY_OUT}")


def _told(values: Num[np.ndarray, " n"], form: str = "{:g}") -> str:
    """Levels or colours for a message: the most common ones, or the range of many levels."""
    found, counts = np.unique(values, return_counts=True)
    if len(found) > _SHOWN and form == "{:g}":
        return f"{found[0]:g} to {found[-1]:g}"
    common = found[np.argsort(-counts, kind="stable")[:_SHOWN]]
    return ", ".join(form.format(value) for value in common) + (", ..." if len(found) > _SHOWN else "")
