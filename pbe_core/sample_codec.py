"""A sample as bytes: encoding, decoding, validation.

Decoding goes by an allow-list of members. Nothing that is loaded can run code: arrays are `.npy` without pickle.
"""

import functools
import io
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float16, UInt8
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.decode import MAX_PIXELS
from pbe_core.images.rle import decode_pixels
from pbe_core.words import number_of
from schemas.sample import MEMBER_NAMES, MEMBERS, SampleRecord, is_member, other_reference

# What `np.save` writes before the numbers of an array of a few axes.
_HEADER_BYTES = 128
# In float16 the exponent of infinities and NaN is all ones; the sign bit alone is -0.
_EXPONENT, _SIGN = np.uint16(0x7C00), np.uint16(0x8000)
# NumPy parses headers as Python source. Before 3.11.8, Python's parser counts its depth for all threads together, and a sound
# array raises a SystemError now and then where two threads parse at once (CPython gh-106905).
_parsing = threading.Lock()


def encode_array(array: np.ndarray) -> bytes:
    """An array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes) -> np.ndarray:
    """The array in the bytes of a `.npy` file, read-only over them; object arrays (pickles) are refused.

    Raises:
        ValueError: the bytes are no `.npy` file, fewer than its header says, or hold Python objects.
    """
    shape, by_columns, dtype = _array_header(data[:_HEADER_BYTES])
    values = np.frombuffer(data, dtype, math.prod(shape), _HEADER_BYTES)
    return values.reshape(shape, order="F" if by_columns else "C")


@functools.lru_cache(maxsize=64)
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis runs fastest, and type. Kept: a dataset has few, and parsing is slow."""
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of another version of .npy than 1.0")
    with _parsing:
        found = np.lib.format.read_array_header_1_0(stream)
    if stream.tell() != _HEADER_BYTES:
        raise ValueError(f"a header of {stream.tell()} bytes, not {_HEADER_BYTES}")
    return found


def encode_masks(masks: Bool[np.ndarray, "masks height width"]) -> bytes:
    """K masks as a JSON list of COCO's compressed RLEs: what `json.loads` and `pycocotools.mask.decode` read."""
    encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
    return json.dumps(
        [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded], separators=(",", ":")
    ).encode()


def decode_masks(data: bytes) -> Bool[np.ndarray, "masks height width"]:
    """The K masks in the bytes of `mask.json`; True = repaint.

    Raises:
        ValueError: no such JSON, no masks of one size, or runs that do not fill them.
    """
    counts, height, width = mask_counts(data)
    return np.stack([decode_pixels(each, height, width) for each in counts])


def mask_counts(data: bytes) -> tuple[list[str], int, int]:
    """The RLE text of each mask in the bytes of `mask.json`, and height and width of the masks in px.

    Raises:
        ValueError: no such JSON, or no masks of one size.
    """
    try:
        masks = json.loads(data)
        size = masks[0]["size"]
        height, width = size
        counts = [mask["counts"] for mask in masks if mask["size"] == size]
    except (LookupError, TypeError, ValueError):
        raise ValueError("no list of COCO's RLEs") from None
    whole = all(type(side) is int and side > 0 for side in (height, width))
    if len(counts) != len(masks) or not whole or not all(isinstance(each, str) for each in counts):
        raise ValueError("no RLEs of masks of one size")
    if height * width > MAX_PIXELS:
        raise ValueError(f"masks of {width}x{height} px, more than {MAX_PIXELS:,}")
    return counts, height, width


@dataclass(frozen=True)
class Sample:
    """A decoded sample; `reference` and `view` are JPEG bytes.

    `latent` and `masked` hold mean and standard deviation, or the mean alone where the dataset's VAE is deterministic.
    """

    record: SampleRecord
    latent: Float16[np.ndarray, "stored height width"]
    masked: Float16[np.ndarray, "masks stored height width"]
    masks: Bool[np.ndarray, "masks view_height view_width"]
    reference: bytes
    view: bytes | None
    others: tuple[bytes, ...] = ()
    """JPEGs of references from other photos, in the order of the record's `references`."""


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """Members of a sample, name -> bytes, in the order in which they stand in the tar."""
    members = {
        "json": json.dumps(sample.record.model_dump(mode="json"), ensure_ascii=True, separators=(",", ":")).encode(),
        "latent.npy": encode_array(sample.latent),
        "mask.json": encode_masks(sample.masks),
        "masked.npy": encode_array(sample.masked),
        "ref.jpg": sample.reference,
        **{other_reference(number): data for number, data in enumerate(sample.others, start=1)},
    }
    return members if sample.view is None else {**members, "view.jpg": sample.view}


def decode_sample(members: Mapping[str, bytes], where: str, *, means_only: bool = False) -> Sample:
    """A sample from its members, validated.

    Args:
        members: name -> bytes; names that are not in `MEMBERS` are refused.
        where: how to call this sample in errors, e.g. `shards/train-000000.tar, key 0123-ab_0`.
        means_only: whether the VAE of its dataset is deterministic, so that there are no standard deviations.

    Raises:
        InputError: a member is missing, unknown, damaged, or does not fit the others.
    """
    for member in MEMBERS:
        if member.name not in members and not member.optional:
            raise InputError(f"{where}: member {member.name} is missing; the shard is damaged, build it again")
    for name in members:
        if not is_member(name):
            raise InputError(f"{where}: unknown member {name}; known are {', '.join(MEMBER_NAMES)}")
    name = "json"
    try:
        record = SampleRecord.model_validate_json(members[name])
        latent, masked = (decode_array(members[name := array]).copy() for array in ("latent.npy", "masked.npy"))
        masks = decode_masks(members[name := "mask.json"])
    except ValueError as error:
        raise InputError(f"{where}: member {name} is damaged ({' '.join(str(error).split())}); build the shard again") from error
    if problem := find_problem(record, latent, masked, masks, means_only=means_only):
        raise InputError(f"{where}: {problem}; build the shard again")
    names = [other_reference(number) for number in range(1, len(record.references) + 1)]
    if missing := [name for name in names if name not in members]:
        raise InputError(f"{where}: member {missing[0]} is missing; the shard is damaged, build it again")
    others = tuple(members[name] for name in names)
    return Sample(record, latent, masked, masks, members["ref.jpg"], members.get("view.jpg"), others)


def find_problem(
    record: SampleRecord, latent: np.ndarray, masked: np.ndarray, masks: np.ndarray, *, means_only: bool = False
) -> str | None:
    """What contradicts the layout in a sample's parts, as a sentence; None if it is valid. `means_only` as in `decode_sample`."""
    kinds = len(record.mask_kinds)
    if latent.dtype != np.float16 or latent.ndim != 3 or (latent.shape[0] % 2 and not means_only):
        expected = "[C, h, w]" if means_only else "[2C, h, w]"
        return f"latent.npy is {latent.dtype} {list(latent.shape)}, expected float16 {expected}"
    if masked.dtype != np.float16 or masked.shape != (kinds, *latent.shape):
        return f"masked.npy is {masked.dtype} {list(masked.shape)}, expected float16 {[kinds, *latent.shape]}"
    if len(masks) != kinds or len(record.mask_polygons) != kinds:
        outlines = number_of(len(record.mask_polygons), "outline")
        return f"mask.json holds {number_of(len(masks), 'mask')} and json {outlines}, expected {kinds} of each"
    if not masks.any(axis=(1, 2)).all():
        return "a mask is empty"
    return latents_problem(latent, means_only=means_only) or latents_problem(masked, means_only=means_only)


def latents_problem(posteriors: Float16[np.ndarray, "*batch stored height width"], *, means_only: bool = False) -> str | None:
    """What no VAE posterior (means, then standard deviations; or means alone) can hold, as a sentence; None if it is valid.

    Works on the bits: numpy compares float16 one number at a time.
    """
    bits = posteriors.view(np.uint16)
    if ((bits & _EXPONENT) == _EXPONENT).any():
        return "a latent is not finite"
    if not means_only and (bits[..., bits.shape[-3] // 2 :, :, :] > _SIGN).any():
        return "a standard deviation is negative"
    return None


def jpeg_bytes(photo: UInt8[np.ndarray, "height width 3"], quality: int) -> bytes:
    """RGB pixels as a JPEG without chroma subsampling (it would blur the colours that the reference is about)."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])
    if not done:
        raise RuntimeError(f"OpenCV could not write a JPEG of {photo.shape[1]}x{photo.shape[0]} px")
    return data.tobytes()
