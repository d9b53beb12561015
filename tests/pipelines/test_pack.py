"""Packing actors: how many fit a cluster, what they answer, and the encoder against the VAE called as diffusers documents it."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch._dynamo
import torch._dynamo.config
from diffusers import AutoencoderKL
from torch._dynamo.utils import counters

from pbe_core.errors import InputError
from pbe_core.settings import load_settings, preset
from pbe_core.vae import load_vae
from pipelines.config import BuildSettings, LatentSettings, RaySettings
from pipelines.dataset.pack import PackingActor, load_encoder, share_out
from pipelines.dataset.plan_shards import writing_plan
from schemas.tables import PLAN
from tests.conftest import settings_of

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
                posterior = vae.network.encode(pixels).latent_dist
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


@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_compiled_a_batch_is_encoded_the_same_whatever_came_before_it(tiny, pictures, monkeypatch, tmp_path):
    """torch.compile gives up after eight sizes of batches, here after one and loudly, and runs the next ones uncompiled.

    What makes machine code of a program, for a minute, is left out: which programs there are is decided before.
    """
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend="eager", **options))
    torch._dynamo.reset()
    counters.clear()  # They count what this process compiled, in other tests as well.
    # As small as a VAE can be: what takes long is compiling it.
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, layers_per_block=1).save_pretrained(tmp_path / "vae")
    plain = tiny.model_copy(update={"vae": str(tmp_path / "vae"), "batch_size": 3 * (1 + MASKS)})
    expected = load_encoder(plain, "cpu").encode_samples(*pictures)
    alone, after_others = (load_encoder(plain.model_copy(update={"compile": True}), "cpu") for _ in range(2))
    last = alone.encode_samples(*(part[:1] for part in pictures))  # The last batch of a shard is smaller.
    for count in (3, 2, 1):
        packed = after_others.encode_samples(*(part[:count] for part in pictures))
        assert packed.shape == expected[:count].shape
        np.testing.assert_allclose(packed, expected[:count], atol=0.002 * np.abs(expected).max())
    assert packed.tobytes() == last.tobytes()
    assert counters["stats"]["unique_graphs"] == 1, "both run the one program that was compiled"


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, (2, 0.0)),
        ({}, 16, 4, (4, 1.0)),
        ({}, 2, 4, (2, 1.0)),
        ({"gpus_per_actor": 0.5}, 16, 4, (8, 0.5)),
        ({"gpus_per_actor": 0}, 16, 4, (16, 0)),
        ({"cpus_per_actor": 4}, 16, 0, (4, 0.0)),
        ({"actors": 3}, 16, 0, (3, 0.0)),
    ],
)
def test_actors_fill_the_cluster(settings, cpus, gpus, expected):
    assert share_out(RaySettings(**settings), {"CPU": cpus, "GPU": gpus}) == expected


@pytest.mark.parametrize(("settings", "cpus"), [({"gpus_per_actor": 1}, 8), ({"cpus_per_actor": 16}, 8), ({"actors": 9}, 8)])
def test_actors_that_would_wait_for_ever_are_refused(settings, cpus):
    """Ray itself would queue them without a word."""
    with pytest.raises(InputError, match="do not fit"):
        share_out(RaySettings(**settings), {"CPU": cpus})


def test_what_a_person_can_mend_is_told_in_one_line(photos, tmp_path):
    """A photo store without tables: a traceback would bury it."""
    settings = settings_of(photos, tmp_path / "out", "--source.photos", str(tmp_path / "store"))
    for folder in (settings.out, settings.source.photos):
        folder.mkdir()
    (settings.source.photos / "store.json").write_text("{}")
    row = {field.name: "" if pa.types.is_string(field.type) else None if field.nullable else 0 for field in PLAN}
    words = {field.name: "train" for field in PLAN if pa.types.is_dictionary(field.type)}
    plan = pa.Table.from_pylist([{**row, **words, "shard": "train-000000", "photo_id": "p"}], PLAN)
    with writing_plan(settings.out / "plan.parquet") as add:
        add(plan)
    said = PackingActor(settings, "x", "cpu").work(0)
    assert said.startswith(f"{settings.source.photos}: this photo store has no tables")
    assert "\n" not in said
