import gc
import io
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbe_core.errors import InputError
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
    assert again.record == sample.record
    assert again.reference == sample.reference
    for name in ("latent", "masked", "masks"):
        assert np.array_equal(getattr(again, name), getattr(sample, name))
        assert getattr(again, name).dtype == getattr(sample, name).dtype


def test_members_are_sorted_as_the_tar_needs_them():
    members = list(encode_sample(make_sample()))
    assert members == sorted(members)


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_masks_survive_encoding_at_any_size(count, size, seed):
    """Sizes that are no multiple of 8 matter: a 1-bit PNG pads its rows to bytes."""
    masks = np.random.default_rng(seed).random((count, size, size)) < 0.5
    assert np.array_equal(decode_masks(encode_masks(masks)), masks)


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        decode_array(buffer.getvalue())


def with_latent(sample: Sample, **changes: np.ndarray) -> dict[str, bytes]:
    return {**encode_sample(sample), **{name.replace("_npy", ".npy"): encode_array(array) for name, array in changes.items()}}


BAD_STD = np.concatenate([np.zeros((4, 2, 2)), -np.ones((4, 2, 2))]).astype(np.float16)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({k: v for k, v in encode_sample(make_sample()).items() if k != "ref.jpg"}, "ref.jpg is missing"),
        ({**encode_sample(make_sample()), "evil.pyd": b""}, "unknown member evil.pyd"),
        ({**encode_sample(make_sample()), "latent.npy": b"\x93NUMPY"}, "latent.npy is damaged"),
        ({**encode_sample(make_sample()), "mask.png": b"no"}, "mask.png is damaged"),
        ({**encode_sample(make_sample()), "json": b"{}"}, "json is damaged"),
        (with_latent(make_sample(), latent_npy=np.zeros((8, 2, 2), np.float32)), "latent.npy is float32"),
        (with_latent(make_sample(), latent_npy=np.full((8, 2, 2), np.nan, np.float16)), "not finite"),
        (with_latent(make_sample(), latent_npy=BAD_STD), "negative"),
        (with_latent(make_sample(), masked_npy=np.zeros((1, 8, 2, 2), np.float16)), "masked.npy is float16 [1, 8, 2, 2]"),
        ({**encode_sample(make_sample()), "mask.png": encode_masks(np.zeros((2, 16, 16), bool))}, "a mask is empty"),
        ({**encode_sample(make_sample()), "mask.png": encode_masks(np.ones((1, 16, 16), bool))}, "holds 1 mask"),
    ],
)
def test_a_damaged_sample_is_refused_and_named(members, message):
    with pytest.raises(InputError) as caught:
        decode_sample(members, "train-000000.tar, key x")
    assert "train-000000.tar, key x" in str(caught.value)
    assert message in str(caught.value)


def test_keys_with_dots_are_refused():
    """A dot would end the key where WebDataset splits key from extension."""
    with pytest.raises(ValueError, match="key"):
        SampleRecord.model_validate({**make_sample().record.model_dump(), "key": "a.b"})


def test_names_fit_a_ustar_header():
    longest = "a" * 64 + "-" + "0" * 12 + "_9999" + ".masked.npy"
    tarfile.TarInfo(longest).tobuf(tarfile.USTAR_FORMAT)


def test_threads_may_decode_at_once():
    """Python 3.11.7 and before parse source, and so the headers of arrays, in one thread at a time only."""
    data, wrong = encode_array(np.zeros((8, 4, 4), np.float16)), []

    class Loop:
        """Garbage whose end lets another thread go on, wherever it is collected."""

        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            time.sleep(0)

    def decode(_: int) -> None:
        for _ in range(1_500):
            Loop()
            try:
                decode_array(data)
            except SystemError as error:
                wrong.append(error)

    before, often = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(decode, range(4)))
    finally:
        sys.setswitchinterval(before)
        gc.set_threshold(*often)
    assert not wrong
