import io
import json
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError, decode_jpeg, decode_photo
from pbe_core.sample_codec import (
    Sample,
    decode_array,
    decode_masks,
    decode_sample,
    encode_array,
    encode_masks,
    encode_sample,
    jpeg_bytes,
)
from schemas.sample import SampleRecord


def make_sample(masks: int = 2, size: int = 16) -> Sample:
    random = np.random.default_rng(0)
    record = SampleRecord(
        key="0123-ab_0", object_id="0123-ab", split="train", photo_id="0123", photo_size=(40, 30), photo_sha256="00",
        label="/m/1", label_name="disc", box=(1, 2, 9, 8), window=(0, 0, 30), box_in_view=(0.5, 1, 4.5, 4), padded=False,
        mask_kinds=("box", "bessel")[:masks], mask_polygons=(((0.0, 0.0), (5.0, 0.0), (5.0, 5.0)),) * masks,
        reference_window=(0, 0, 10, 9), file_name=None, rotation=0, reference_mask=None,
        url=None, author="Ä", licence=None, seed=0,
    )  # fmt: skip
    posterior = random.random((8, 2, 2)).astype(np.float16)
    drawn = random.random((masks, size, size)) < 0.5
    reference = jpeg_bytes(random.integers(0, 255, (9, 10, 3)).astype(np.uint8), 95)
    return Sample(record, posterior, np.stack([posterior] * masks), drawn, reference, None)


def test_a_sample_survives_encoding():
    sample = make_sample()
    again = decode_sample(encode_sample(sample), "here")
    assert list(encode_sample(sample)) == sorted(encode_sample(sample)), "as the tar needs them"
    assert again.record == sample.record
    assert again.reference == sample.reference
    for name in ("latent", "masked", "masks"):
        assert np.array_equal(getattr(again, name), getattr(sample, name))
        assert getattr(again, name).dtype == getattr(sample, name).dtype


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_masks_survive_encoding_at_any_size(count, size, seed):
    """By our decoder as by COCO's own."""
    masks = np.random.default_rng(seed).random((count, size, size)) < 0.5
    encoded = encode_masks(masks)
    assert np.array_equal(decode_masks(encoded), masks)
    assert np.array_equal(coco_mask.decode(json.loads(encoded)).transpose(2, 0, 1), masks)


def test_large_masks_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="100,000,000"):
        decode_masks(b'[{"size": [1000000, 1000000], "counts": "0"}]')


NO_MASKS = [
    {},
    [],
    [1],
    *([{"size": [4, 4], **more}] for more in ({}, {"size": [4, 5], "counts": ""}, {"counts": 5}, {"counts": "01"})),
]


@pytest.mark.parametrize("masks", NO_MASKS)
def test_what_is_no_mask_is_refused(masks):
    with pytest.raises(ValueError, match=r"RLE|px"):
        decode_masks(json.dumps(masks).encode())


def noise(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("photo", [noise(317, 240), noise(33, 17), noise(31, 24)[..., 0]], ids=["photo", "odd sides", "grey"])
@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111)])
def test_a_jpeg_is_the_same_by_both_decoders(photo, options):
    data = cv2.imencode(".jpg", photo, options)[1].tobytes()
    assert np.array_equal(decode_jpeg(data), decode_photo(data, frame="stored"))


# A small JPEG whose header announces 60,000 x 60,000 px.
LIES = re.sub(rb"(\xff\xc0\x00\x11\x08)....", b"\\1\xea\x60\xea\x60", jpeg_bytes(noise(16, 16), 95), flags=re.DOTALL)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", cv2.imencode(".png", noise(16, 16))[1].tobytes(), jpeg_bytes(noise(16, 16), 95)[:60], LIES]
)
def test_what_is_no_jpeg_is_refused(data):
    with pytest.raises(PhotoError):
        decode_jpeg(data)


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="OBJECT"):
        decode_array(buffer.getvalue())


def arrays(**changes: np.ndarray) -> dict[str, bytes]:
    return {f"{name}.npy": encode_array(array) for name, array in changes.items()}


BAD_STD = np.concatenate([np.zeros((4, 2, 2)), -np.ones((4, 2, 2))]).astype(np.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref.jpg": None}, "ref.jpg is missing"),
        ({"evil.pyd": b""}, "unknown member evil.pyd"),
        ({"latent.npy": b"\x93NUMPY"}, "latent.npy is damaged"),
        ({"mask.json": b"no"}, "mask.json is damaged"),
        ({"json": b"{}"}, "json is damaged"),
        (arrays(latent=np.zeros((8, 2, 2), np.float32)), "latent.npy is float32"),
        (arrays(latent=np.full((8, 2, 2), np.nan, np.float16)), "not finite"),
        (arrays(latent=BAD_STD), "negative"),
        (arrays(masked=np.zeros((1, 8, 2, 2), np.float16)), r"masked.npy is float16 \[1, 8, 2, 2\]"),
        ({"mask.json": encode_masks(np.zeros((2, 16, 16), bool))}, "a mask is empty"),
        ({"mask.json": encode_masks(np.ones((1, 16, 16), bool))}, "holds 1 mask"),
    ],
)
def test_a_damaged_sample_is_refused_and_named(changes, message):
    members = {name: data for name, data in {**encode_sample(make_sample()), **changes}.items() if data is not None}
    with pytest.raises(InputError, match=f"train-000000.tar, key x.*{message}"):
        decode_sample(members, "train-000000.tar, key x")


def test_keys_with_dots_are_refused():
    """A dot would end the key where WebDataset splits key from extension."""
    with pytest.raises(ValueError, match="key"):
        SampleRecord.model_validate({**make_sample().record.model_dump(), "key": "a.b"})


def test_names_fit_a_ustar_header():
    longest = "a" * 64 + "-" + "0" * 12 + "_9999" + ".masked.npy"
    tarfile.TarInfo(longest).tobuf(tarfile.USTAR_FORMAT)


def test_threads_parse_one_header_at_a_time(monkeypatch):
    """Python 3.11.7 and before raise a SystemError now and then where two threads parse source, and so headers, at once."""
    parse, inside, most = np.lib.format.read_array_header_1_0, [], []
    second = threading.Event()

    def watched(stream):
        inside.append(stream)
        if len(inside) > 1:
            second.set()
        second.wait(0.2)  # For the other thread, which is not to come.
        most.append(len(inside))
        found = parse(stream)
        inside.pop()
        return found

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", watched)
    with ThreadPoolExecutor(2) as pool:
        # Shapes that no other test has: headers are parsed once.
        arrays = list(pool.map(decode_array, [encode_array(np.zeros((41, length), np.float16)) for length in (3, 5)]))
    assert [array.shape for array in arrays] == [(41, 3), (41, 5)]
    assert most == [1, 1]
