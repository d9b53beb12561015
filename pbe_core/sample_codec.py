"""A sample as bytes: encoding, decoding, validation.

Decoding goes by an allow-list of fields, and nothing that is loaded can run code: arrays are `.npy` without pickle.
"""

import io
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float16, UInt8

from pbe_core.errors import InputError
from pbe_core.words import number_of
from schemas.sample import MEMBER_NAMES, MEMBERS, SampleRecord

# NumPy parses headers as Python source. Before 3.11.8, Python's parser counts its depth for all threads together, and a sound
# array raises a SystemError now and then where two threads parse at once (CPython gh-106905).
_parsing = threading.Lock()


def _renew_lock() -> None:
    """Another thread may have held it when this process was forked, and is not here to give it back."""
    global _parsing
    _parsing = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def encode_array(array: np.ndarray) -> bytes:
    """An array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes) -> np.ndarray:
    """The array in the bytes of a `.npy` file; object arrays (pickles) are refused.

    Raises:
        ValueError: the bytes are no `.npy` file, or hold Python objects.
    """
    with _parsing:
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def encode_masks(masks: Bool[np.ndarray, "masks size size"]) -> bytes:
    """K masks as one 1-bit PNG, stacked top to bottom."""
    count, height, width = masks.shape
    stacked = masks.reshape(count * height, width).astype(np.uint8) * 255
    done, data = cv2.imencode(".png", stacked, [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise RuntimeError(f"OpenCV could not write a PNG of {width}x{count * height} px")
    return data.tobytes()


def decode_masks(data: bytes) -> Bool[np.ndarray, "masks size size"]:
    """The K masks in the bytes of `mask.png`; True = editable region.

    Raises:
        ValueError: not a PNG, or its height is no multiple of its width.
    """
    stacked = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if stacked is None:
        raise ValueError("not a PNG")
    height, width = stacked.shape
    if height % width:
        raise ValueError(f"a stack of square masks has a height that is a multiple of its width, this one is {width}x{height}")
    masks: np.ndarray = stacked.reshape(height // width, width, width) > 127
    return masks


@dataclass(frozen=True)
class Sample:
    """A decoded sample. `latent` and `masked` hold mean and standard deviation; `reference` and `view` are JPEG bytes."""

    record: SampleRecord
    latent: Float16[np.ndarray, "two_channels height width"]
    masked: Float16[np.ndarray, "masks two_channels height width"]
    masks: Bool[np.ndarray, "masks size size"]
    reference: bytes
    view: bytes | None


def encode_sample(sample: Sample, mask_png: bytes | None = None) -> dict[str, bytes]:
    """Members of a sample, name -> bytes, in the order in which they stand in the tar; `mask_png` where it is made already."""
    members = {
        "json": json.dumps(sample.record.model_dump(mode="json"), ensure_ascii=True, separators=(",", ":")).encode(),
        "latent.npy": encode_array(sample.latent),
        "mask.png": encode_masks(sample.masks) if mask_png is None else mask_png,
        "masked.npy": encode_array(sample.masked),
        "ref.jpg": sample.reference,
    }
    return members if sample.view is None else {**members, "view.jpg": sample.view}


def decode_sample(members: Mapping[str, bytes], where: str) -> Sample:
    """A sample from its members, validated.

    Args:
        members: name -> bytes; names that are not in `MEMBERS` are refused.
        where: how to call this sample in errors, e.g. `shards/train-000000.tar, key 0123-ab_0`.

    Raises:
        InputError: a member is missing, unknown, damaged, or does not fit the others.
    """
    for member in MEMBERS:
        if member.name not in members and not member.optional:
            raise InputError(f"{where}: member {member.name} is missing; the shard is damaged, build it again")
    for name in members:
        if name not in MEMBER_NAMES:
            raise InputError(f"{where}: unknown member {name}; known are {', '.join(MEMBER_NAMES)}")
    decoded: dict[str, Any] = {}
    decoders: dict[str, Callable[[bytes], Any]] = {
        "json": SampleRecord.model_validate_json,
        "latent.npy": decode_array,
        "masked.npy": decode_array,
        "mask.png": decode_masks,
    }
    for name, decode in decoders.items():
        try:
            decoded[name] = decode(members[name])
        except (ValueError, EOFError) as error:
            raise InputError(
                f"{where}: member {name} is damaged ({' '.join(str(error).split())}); build the shard again"
            ) from error
    record, latent, masked, masks = (decoded[name] for name in ("json", "latent.npy", "masked.npy", "mask.png"))
    problem = find_problem(record, latent, masked, masks)
    if problem:
        raise InputError(f"{where}: {problem}; build the shard again")
    return Sample(record, latent, masked, masks, members["ref.jpg"], members.get("view.jpg"))


def find_problem(record: SampleRecord, latent: np.ndarray, masked: np.ndarray, masks: np.ndarray) -> str | None:
    """What contradicts the layout in a sample's parts, as a sentence; None if it is valid."""
    kinds = len(record.mask_kinds)
    if latent.dtype != np.float16 or latent.ndim != 3 or latent.shape[0] % 2:
        return f"latent.npy is {latent.dtype} {list(latent.shape)}, expected float16 [2C, h, w]"
    if masked.dtype != np.float16 or masked.shape != (kinds, *latent.shape):
        return f"masked.npy is {masked.dtype} {list(masked.shape)}, expected float16 {[kinds, *latent.shape]}"
    if len(masks) != kinds or len(record.mask_polygons) != kinds:
        outlines = number_of(len(record.mask_polygons), "outline")
        return f"mask.png holds {number_of(len(masks), 'mask')} and json {outlines}, expected {kinds} of each"
    if not masks.any(axis=(1, 2)).all():
        return "a mask is empty"
    if not (np.isfinite(latent).all() and np.isfinite(masked).all()):
        return "a latent is not finite"
    channels = latent.shape[0] // 2
    if (latent[channels:] < 0).any() or (masked[:, channels:] < 0).any():
        return "a standard deviation is negative"
    return None


def jpeg_bytes(photo: UInt8[np.ndarray, "height width 3"], quality: int) -> bytes:
    """RGB pixels as a JPEG without chroma subsampling (it would blur the colours that the reference is about)."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])
    if not done:
        raise RuntimeError(f"OpenCV could not write a JPEG of {photo.shape[1]}x{photo.shape[0]} px")
    return data.tobytes()
