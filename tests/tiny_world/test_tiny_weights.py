"""The weights in the repository: small, loadable, and as good as the README says, on photos that nothing was trained on."""

import json
from functools import partial

import pytest
import torch

from tiny_world.kinds import generator
from tiny_world.measure import (
    WEIGHTS,
    class_tokens,
    kinds_of,
    knn_kinds,
    latent_spread,
    load_encoder,
    load_vae,
    megabytes,
    psnr_db,
    reference_squares,
    sightings,
)
from tiny_world.train_vae import cut_views, level_latents, stored_photo, tiny_vae

FRESH_SEED = 11


def test_weights_are_small_and_name_no_machine() -> None:
    assert megabytes(WEIGHTS) < 16
    for folder in ("vae", "encoder"):
        config = json.loads((WEIGHTS / folder / "config.json").read_text())
        assert not config.get("_name_or_path")
        assert "/" not in json.dumps(config)


def test_vae_reconstructs_fresh_held_out_views_from_latents_of_unit_spread() -> None:
    photos = [stored_photo(index, FRESH_SEED, "validation") for index in range(40)]
    for hole_share in (0, 1):
        views = cut_views(photos[:12], generator(FRESH_SEED, "test views"), 12, hole_share)
        assert psnr_db(load_vae(), views).mean() >= 26
    spread = latent_spread(load_vae(), cut_views(photos, generator(FRESH_SEED, "test spread"), 40, hole_share=1 / 3))
    assert spread["scaled_latent_std"] == pytest.approx(1, abs=0.12)
    assert spread["least_channel_std"] > 0.8
    assert spread["greatest_channel_std"] < 1.25
    assert spread["posterior_std"] < 0.2


def test_encoder_knows_the_kind_of_fresh_held_out_objects() -> None:
    known, asked = (sightings(FRESH_SEED, split, range(n)) for split, n in (("train", 100), ("validation", 40)))
    encoder = load_encoder()
    known_tokens = class_tokens(encoder, reference_squares(known, partial(stored_photo, seed=FRESH_SEED, split="train")))
    tokens = class_tokens(encoder, reference_squares(asked, partial(stored_photo, seed=FRESH_SEED, split="validation")))
    assert len(asked) > 50
    assert (knn_kinds(tokens, known_tokens, kinds_of(known)) == kinds_of(asked)).float().mean() >= 0.85


def test_levelling_latents_changes_no_reconstruction() -> None:
    torch.manual_seed(0)
    vae, views = tiny_vae().eval(), torch.rand(4, 3, 32, 32) * 2 - 1
    vae.quant_conv.bias.data[:4] = torch.tensor([3.0, -1.0, 0.5, 0.0])
    vae.quant_conv.weight.data[1] *= 5
    with torch.no_grad():
        before = vae.encode(views).latent_dist
        picture = vae.decode(before.mean).sample
        level_latents(vae, views)
        after = vae.encode(views).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    scaled = after.mean * vae.config.scaling_factor
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    # The posterior keeps its proportion of noise to signal in every channel.
    ratio = [p.std.mean((0, 2, 3)) / p.mean.std((0, 2, 3)) for p in (before, after)]
    torch.testing.assert_close(*ratio, atol=1e-4, rtol=1e-3)
