"""Encoding views: against the VAE called as diffusers documents it, in all precisions, and compiled."""

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from pipelines.config import BuildSettings, LatentSettings
from pipelines.packing.latents import load_encoder
from schemas.settings import load_settings, preset
from schemas.weights import load_vae

SIZE, MASKS = 64, 2


@pytest.fixture(scope="module")
def tiny() -> LatentSettings:
    return load_settings(BuildSettings, "build", [], preset("tiny")).latents


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Views and masks of three samples."""
    draw = np.random.default_rng(0)
    views = draw.integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    masks = draw.random((3, MASKS, SIZE, SIZE)) < 0.3
    return views, masks


@pytest.fixture(scope="module")
def expected(tiny, pictures) -> np.ndarray:
    """Mean and standard deviation of each view and masked view, one after the other, in float32."""
    views, masks = pictures
    vae = load_vae(tiny.vae)
    found = []
    with torch.no_grad():
        for view, of_view in zip(views, masks, strict=True):
            for hole in (np.zeros((SIZE, SIZE), bool), *of_view):
                # Mid grey, 0 in [-1, 1], lies between two bytes.
                picture = np.where(hole[..., None], 127.5, view).astype(np.float32)
                pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
                posterior = vae.encode(pixels).latent_dist
                found.append(torch.cat([posterior.mean, posterior.std], dim=1)[0].numpy())
    return np.stack(found).reshape(3, 1 + MASKS, *found[0].shape)


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("fp32", torch.float32, 0.0006), ("fp16", torch.float16, 0.01), ("bf16", torch.bfloat16, 0.1)],
)
def test_posteriors_of_views_and_masked_views(tiny, pictures, expected, precision, dtype, tolerance):
    encoder = load_encoder(tiny.model_copy(update={"precision": precision}), "cpu")
    assert {each.dtype for each in encoder.vae.parameters()} == {dtype}
    packed = encoder.encode_samples(*pictures)
    assert packed.dtype == np.float16
    assert packed.shape == expected.shape
    assert np.abs(packed - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_it_encodes_the_same(tiny, pictures, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    encoder = load_encoder(tiny.model_copy(update={"compile": True}), "cpu")
    counters.clear()
    for count in (3, 2):  # The last batch of a shard is smaller.
        packed = encoder.encode_samples(*(part[:count] for part in pictures))
        np.testing.assert_allclose(packed, expected[:count], atol=0.002 * np.abs(expected).max())
    assert counters["stats"]["unique_graphs"] == 2, "one graph for each size of a batch"
