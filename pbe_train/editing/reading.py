"""Photos and masks as people have them (files, Pillow's pictures, arrays) -> arrays, or a clear error."""

import operator
from pathlib import Path

import numpy as np
from PIL import Image

from pbe_train.editing.region import AnyMask, AnyPhoto, Mask, Photo
from schemas.errors import InputError
from schemas.photos import PhotoError, decode_photo, photo_of_image

Picture = str | Path | Image.Image | np.ndarray
"""A file; a picture of Pillow; or an array, RGB [H, W, 3] or grey [H, W], 0-255, for a mask also of booleans."""


def read_photo(picture: Picture, name: str = "the photo") -> Photo:
    """RGB, 0-255, turned as its EXIF says. Greyscale, 16-bit, CMYK and palettes become RGB; transparency lies over white.

    Args:
        picture: of any of the kinds.
        name: what errors call it, where it is no file.

    Raises:
        InputError: no such file, no readable photo, or an array of another shape or type.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture, name)
    if isinstance(picture, Image.Image):
        try:
            return photo_of_image(picture)
        except PhotoError as error:
            raise InputError(f"{name}: Pillow cannot read it ({error}); give another picture") from None
    if not isinstance(picture, str | Path):
        raise InputError(f"{name}: {type(picture).__name__} is no picture; give a file, a picture of Pillow, or an array")
    if not Path(picture).is_file():
        raise InputError(f"{picture}: no such file; give the path of a photo")
    try:
        return decode_photo(Path(picture).read_bytes(), frame="exif")
    except PhotoError as error:
        raise InputError(f"{picture}: not a readable photo ({error}); give a JPEG, PNG or WebP file") from None


def read_mask(picture: Picture, name: str = "the mask") -> Mask:
    """True where it is brighter than mid grey: white is repainted.

    Raises:
        InputError: as `read_photo`; or a transparent px, of which one cannot tell whether it is to be repainted.
    """
    if isinstance(picture, np.ndarray) and picture.dtype == bool and picture.ndim == 2:
        return picture
    mask: Mask = read_photo(picture, name).mean(axis=2) > 127
    if isinstance(picture, np.ndarray):
        return mask
    if isinstance(picture, Image.Image):
        opaque = _is_opaque(picture)
    else:
        name = str(picture)
        with Image.open(picture) as image:  # Its size was checked when it was decoded.
            opaque = _is_opaque(image)
    if not opaque:
        raise InputError(f"{name}: the mask is transparent in places; save it without transparency, white on black")
    return mask


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
    made = Image.fromarray(photo)
    if isinstance(source, str | Path):
        with Image.open(source) as image:
            mode, profile = image.mode, image.info.get("icc_profile")
    else:
        mode, profile = (source.mode, source.info.get("icc_profile")) if isinstance(source, Image.Image) else ("", None)
    if profile and mode in ("RGB", "RGBA"):  # Those of CMYK and grey say nothing of RGB.
        made.info["icc_profile"] = profile
    return made


def whole_number(value: object, name: str) -> int:
    """A whole number of any kind. Raises InputError for anything else: 1.7 is not 1."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} {value!r}: must be a whole number") from None


def _checked(array: np.ndarray, name: str) -> Photo:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise InputError(
            f"{name}: an array of {array.dtype} {list(array.shape)}; give uint8, 0-255, RGB [height, width, 3] or grey "
            "[height, width]"
        )
    # Views of other arrays may be mirrored, strided or read-only, which PyTorch does not take.
    return np.repeat(array[..., None], 3, axis=2) if grey else np.require(array, requirements=["C", "W"])


def _is_opaque(image: Image.Image) -> bool:
    return not image.has_transparency_data or bool(np.all(np.asarray(image.convert("RGBA"))[..., 3] == 255))
