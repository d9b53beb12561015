"""Photos and masks as people have them: which are read, as what, and what is said of the others."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pbe_core.errors import InputError
from pbe_train.editing.reading import read_mask, read_photo, with_profile

REGION = np.zeros((20, 30), bool)
REGION[5:10, 5:15] = True
MARKED = REGION.astype(np.uint8)


def palette(indices: np.ndarray, **colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices)
    table = bytearray(768)
    for name, colour in colours.items():
        start = 3 * int(name[1:])
        table[start : start + 3] = bytes(colour)
    image.putpalette(bytes(table))
    return image


VOC = np.where(REGION, 15, 0).astype(np.uint8)
VOC[4, 4:16] = 255  # The border, which is no object.

READ = {
    "0 and 1": Image.fromarray(MARKED),
    "1 alone": Image.fromarray(np.ones((20, 30), np.uint8)),
    "0 and 1 in RGB": Image.fromarray(np.repeat(MARKED[..., None], 3, axis=2)),
    "0 and 1 in 16 bits": Image.fromarray(MARKED.astype(np.uint16)),
    "0 and 255 in 16 bits": Image.fromarray(MARKED.astype(np.uint16) * 255),
    "0 and 1 of a palette": palette(MARKED, _1=(1, 1, 1)),
    "floats": Image.fromarray(MARKED.astype(np.float32) * 0.75),
}


@pytest.mark.parametrize("name", READ)
def test_masks_that_leave_no_doubt_are_read(name, tmp_path):
    path = tmp_path / ("mask.tif" if name == "floats" else "mask.png")
    READ[name].save(path)
    expected = np.ones_like(REGION) if name == "1 alone" else REGION
    assert np.array_equal(read_mask(path), expected)
    assert np.array_equal(read_mask(READ[name]), expected)


@pytest.mark.parametrize(
    "array",
    [
        MARKED,
        MARKED[..., None],
        MARKED.astype(np.int64),
        MARKED.astype(np.int64) * 255,
        MARKED.astype(np.uint16) * 65535,
        MARKED.astype(np.float32),
        MARKED * 0.51,
        MARKED * 255.0,
        np.where(REGION, np.float16(0.9), np.float16(0.1)),
        REGION[..., None],
    ],
    ids=lambda array: f"{array.dtype} {array.max()} {array.ndim}",
)
def test_arrays_of_all_types_are_masks(array):
    assert np.array_equal(read_mask(array), REGION)


DARK = "none is brighter than mid grey"
REFUSED = {
    "a grey that is too dark": (MARKED * 100, f"values are 0, 100, and {DARK}; paint"),
    "many of them": (np.arange(600).reshape(20, 30).astype(np.uint8) % 99, f"values are 0 to 98, and {DARK}"),
    "three px wide": (MARKED[:, 4:7] * 100, f"values are 0, 100, and {DARK}"),
    "12 bits in 16": (MARKED.astype(np.uint16) * 4095, f"0, 4095, and {DARK}"),
    "numbers of classes": (VOC, "0, 15, 255, which may be numbers of classes; .* or use 0 and 1 alone"),
    "a class in its colours": (
        palette(VOC, _15=(128, 0, 0), _255=(224, 224, 192)),
        "colours are #000000, #800000, #e0e0c0, and of these only #e0e0c0 counts; paint",
    ),
    "a dark colour alone": (palette(MARKED, _1=(128, 0, 0)), f"colours are #000000, #800000, and {DARK}"),
    "a photo": (
        np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8),
        "colours are #.*, .*, and of these only .* counts",
    ),
    "alpha": (Image.fromarray(np.dstack([np.zeros((20, 30, 3), np.uint8), MARKED * 255])), "transparent in places"),
    "floats that are too dark": (MARKED * 0.25, f"values are 0, 0.25, and {DARK}"),
    "floats beyond 1": (MARKED * 7.5, "values are 0, 7.5; give floats from 0 to 1"),
    "NaN": (np.where(REGION, np.nan, 0), "holds NaN or infinity"),
    "integers of a range nobody knows": (MARKED.astype(np.int32) * 9, "values are 0, 9, of int32.*; give uint8"),
    "integers of Pillow": (Image.fromarray(MARKED.astype(np.int32) * 9), "values are 0, 9, of int32.*; give uint8"),
    "no numbers": (MARKED.astype(object), r"an array of object \[20, 30\]; give uint8, 0-255"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaves_a_doubt_is_one_line_with_the_values(name):
    mask, message = REFUSED[name]
    with pytest.raises(InputError, match=rf"^layer 3: .*{message}") as caught:
        read_mask(mask, "layer 3")
    assert "\n" not in str(caught.value)


def test_a_transparent_layer_without_transparent_px_is_a_mask():
    assert np.array_equal(read_mask(Image.fromarray(np.dstack([MARKED * 255] * 3 + [np.full_like(MARKED, 255)]))), REGION)


@pytest.mark.parametrize(
    ("packed", "profile"),
    [(zlib.compress(bytes(2**21)), bytes(2**21)), (b"damaged", None), (zlib.compress(bytes(2**25)), None)],
)
def test_a_long_colour_profile_goes_with_the_result(packed, profile, tmp_path):
    """Pillow by itself reads those of PNGs up to 1 MB; one that cannot be read does not keep the photo from being edited."""
    path, content = tmp_path / "photo.png", b"iCCPprofile\0\0" + packed
    Image.new("RGB", (8, 8)).save(path)
    data = path.read_bytes()
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    path.write_bytes(data[:33] + chunk + data[33:])  # Behind the header.
    assert with_profile(read_photo(path), path).info.get("icc_profile") == profile
