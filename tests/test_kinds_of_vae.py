"""Photos to edit with VAEs of other kinds than Stable Diffusion's: each through the real programs, on a few photos."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.dataset_reader import read_dataset, read_sample
from pbe_core.errors import InputError
from pbe_core.images.decode import decode_photo
from pbe_core.recorded_vae import decode_means, load_recorded_vae
from pbe_core.settings import load_settings
from pbe_core.vae import load_vae
from pbe_train import PaintByExample, cost, evaluate, export
from pbe_train.checkpoints.diffusers_format import load_diffusers_pipeline
from pbe_train.checkpoints.export import export as export_run
from pbe_train.checkpoints.from_pretrained import load_model, load_run
from pbe_train.checkpoints.networks import load_dataset_vae
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint, read_state
from pbe_train.config import TrainSettings
from pbe_train.data.latents import draw_posterior
from pbe_train.data.remote_shards import open_reader
from pbe_train.evaluation.held_out import paint_held_out, read_held_out, reconstruct, spread_places
from pbe_train.model.paint_model import new_unet
from pbe_train.model.pipeline import SamplingSettings
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pipelines.dataset.estimate import latent_layout
from pipelines.dataset.verify import verify_dataset
from tests.conftest import build_options, call_program, run_build
from tests.kinds_of_vae import make_kind
from tests.pbe_train.small_world import make_world as make_small_world
from tiny_world.make_photos import make_world

SIZE = 64
ONE = Distributed(0, 1, torch.device("cpu"))
CHANNELS = {"8 shifted": 8, "32 shifted, bare": 32, "tiny": 8, "taef2": 32}
DETERMINISTIC = ("tiny", "taef2")
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_world(folder, 4, 2, 7, 1)
    return folder


@pytest.fixture(scope="module", params=CHANNELS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae(kind, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    make_kind(kind, folder)
    return folder


@pytest.fixture(scope="module")
def dataset(vae: Path, photos: Path, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("dataset") / "dataset"
    options = [*build_options(photos, out), "--latents.vae", str(vae), "--views.size", str(SIZE)]
    run_build(*options)
    return out


@pytest.fixture(scope="module")
def settings(vae: Path, dataset: Path, tmp_path_factory) -> Callable[..., TrainSettings]:
    folder = tmp_path_factory.mktemp("settings")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "encoder")
    unet = {"block_out_channels": [16, 32], "attention": [False, True], "layers_per_block": 1, "attention_heads": 2}
    model = {"vae": str(vae), "encoder": str(folder / "encoder"), "conditioner_blocks": 1}
    given = {
        "dataset": str(dataset),
        "steps": 2,
        "global_batch": 4,
        "model": {**model, "unet": {**unet, "norm_groups": 8, "cross_attention_dim": 32}},
        "loader": {"workers": 0, "window": 2},
        "threads": 1,
        "log_every": 1,
        "pictures": {"every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": given}))
    return lambda out, *options: load_settings(
        TrainSettings, "train", ["--config", str(folder / "config.yaml"), f"--out={out}", *options]
    )


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    """Two steps, with the loss of held-out samples."""
    out = tmp_path_factory.mktemp("run")
    train(settings(out, "--validation.every=2"), ONE)
    return out


def first_sample(dataset: Path, split: str = "validation") -> Any:
    rows = pq.read_table(dataset / "index.parquet").to_pylist()
    row = next(row for row in rows if row["split"] == split)
    return read_sample(dataset, row, means_only=read_dataset(dataset).vae.deterministic)


def test_a_dataset_holds_the_latents_and_says_how(kind, vae, dataset):
    """C channels of a deterministic VAE and 2C of another; whole to `verify`, planned as made, decoded as the network does."""
    info, network, sample = read_dataset(dataset).vae, load_vae(str(vae)), first_sample(dataset)
    channels, cells = CHANNELS[kind], SIZE // 8
    stored = channels if kind in DETERMINISTIC else 2 * channels
    assert (info.latent_channels, info.downsampling, info.deterministic) == (channels, 8, kind in DETERMINISTIC)
    assert latent_layout(str(vae)) == (channels, stored, 8, str(vae))
    assert sample.latent.shape == (stored, cells, cells)
    assert sample.masked.shape == (2, stored, cells, cells)
    found = verify_dataset(dataset)
    assert not found.findings
    assert found.samples == sum(split.samples for split in read_dataset(dataset).splits.values()) > 0
    means = torch.from_numpy(sample.latent[None, :channels].astype(np.float32))
    with torch.no_grad():
        expected = network.decode(means)[0].clamp(-1, 1).permute(1, 2, 0).numpy() * 127.5 + 127.5
        # The view's own latent, but for the JPEG that keeps it, which random networks make much of; a shift would be more.
        pixels = torch.from_numpy(decode_photo(sample.view, frame="stored") / 127.5 - 1).permute(2, 0, 1)[None].float()
        again = network.encode(pixels).mean[0]
    assert np.abs(decode_means(load_recorded_vae(read_dataset(dataset)), sample.latent[None])[0] - expected).max() <= 1
    assert float((again - means[0]).abs().mean()) < 0.2 * float(means.std())


def test_the_card_loads_the_dataset(kind, dataset, capsys, monkeypatch):
    """Its first snippet, as a reader runs it; of a deterministic VAE it draws nothing."""
    card = (dataset / "README.md").read_text()
    monkeypatch.chdir(dataset)
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert f"({CHANNELS[kind]}, 8, 8)" in capsys.readouterr().out
    assert ("deterministic" in card) == (kind in DETERMINISTIC)
    assert ("2C" in card) != (kind in DETERMINISTIC)
    assert ("shifted and divided" in card) == (kind not in DETERMINISTIC)


def test_a_training_takes_its_channels_from_the_vae_and_goes_on(kind, run, settings):
    state, channels = read_state(locate_checkpoint(run)), CHANNELS[kind]
    assert (state.identity.unet["in_channels"], state.identity.unet["out_channels"]) == (2 * channels + 1, channels)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if "loss" in name]
    assert len(losses) >= 3
    assert np.isfinite(losses).all()
    train(settings(run, "--validation.every=2", "--steps=3"), ONE)
    assert read_state(locate_checkpoint(run)).step == 3


def test_an_edit_paints_in_the_vaes_latents(kind, run, vae):
    """Outside the region nothing changes; with networks that take turns the same comes; latents and scale are the VAE's."""
    random = np.random.default_rng(0)
    photo, reference = (random.integers(0, 256, (*size, 3), np.uint8) for size in ((80, 70), (20, 30)))
    mask = np.zeros((80, 70), bool)
    mask[20:50, 10:40] = True
    paint = PaintByExample.from_pretrained(run)
    edited = np.asarray(paint(photo, mask, reference, steps=2))
    assert np.array_equal(edited[~mask], photo[~mask])
    assert (edited[mask] != photo[mask]).mean() > 0.5
    offloaded = PaintByExample.from_pretrained(run, offload=True)
    assert np.array_equal(np.asarray(offloaded(photo, mask, reference, steps=2)), edited)
    half = PaintByExample.from_pretrained(run, precision="bf16")
    assert np.asarray(half(photo, mask, reference, steps=1)).shape == photo.shape
    pixels = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        network = load_vae(str(vae))
        posterior = network.encode(pixels)
        expected = posterior.mean * network.sizes.scaling_factor
        torch.testing.assert_close(paint.run.encode_pixels(pixels), expected)
        decoded = network.decode(posterior.mean)[0].clamp(-1, 1).permute(1, 2, 0).numpy() * 127.5 + 127.5
    assert np.abs(paint.run.decode(expected)[0] - decoded).max() <= 1


def test_held_out_samples_are_reconstructed_and_painted(run, settings, dataset, vae):
    """What the pictures of a training show: stored latents decode to what the VAE makes of them."""
    reader = open_reader(settings(run), "validation")
    held_out = read_held_out(reader, spread_places(reader.counts, 2), 0)
    means = torch.from_numpy(np.stack([one.sample.latent for one in held_out])[:, : reader.info.vae.latent_channels])
    loaded, network = load_run(run), load_vae(str(vae))
    with torch.no_grad():
        expected = network.decode(means.float()).clamp(-1, 1).permute(0, 2, 3, 1).numpy() * 127.5 + 127.5
    assert np.abs(np.stack(reconstruct(loaded, held_out)) - expected).max() <= 1
    how, references = SamplingSettings(1.0, 1), [one.sample.reference for one in held_out]
    for one, painted in zip(held_out, paint_held_out(loaded, held_out, references, [0, 1], how), strict=True):
        assert np.array_equal(painted[~one.mask], one.sample.view[~one.mask])
        assert (painted[one.mask] != one.sample.view[one.mask]).any()


@pytest.mark.parametrize("kind", ["taef2"], indirect=True)
def test_an_evaluation_paints_held_out_views(run, dataset, tmp_path):
    options = ["--dataset", str(dataset), "--model", str(run), "--steps", "1", "--count", "2", "--replicates", "20"]
    done = call_program(evaluate.main, *options, "--threads", "1", "--out", str(tmp_path / "result"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result" / "index.html").is_file()


def test_an_export_says_why_it_cannot_be(kind, run, tmp_path):
    for form in ("diffusers", "ldm"):
        done = call_program(export.main, "--model", str(run), "--out", str(tmp_path / form), "--format", form)
        assert done.returncode == 2
        assert {"tiny": "VAE is AutoencoderTiny", "taef2": "VAE is TAEF2"}.get(kind, "latents are shifted") in done.stderr
        assert "pbe edit" in done.stderr
        assert not (tmp_path / form).exists()


def test_a_pretrained_u_net_of_other_channels_is_refused(kind, settings, vae, tmp_path):
    """By the training, and by what counts its cost before there is a dataset."""
    unet = new_unet(settings(tmp_path / "run").model.unet, 4)
    UNet2DConditionModel.from_config({**unet.config, "in_channels": 4}).save_pretrained(tmp_path / "start" / "unet")
    given = settings(tmp_path / "run", f"--model.pretrained={tmp_path / 'start'}")
    said = f"U-Net paints latents of 4 channels, the dataset's have {CHANNELS[kind]}; give a model of that VAE"
    with pytest.raises(InputError, match=said):
        train(given, ONE)
    options = [f"--model.{name}={value}" for name, value in (("pretrained", tmp_path / "start"), ("vae", vae))]
    done = call_program(cost.main, *options, f"--model.encoder={given.model.encoder}", f"--dataset={given.dataset}")
    assert done.returncode == 2
    assert f"those of model.vae ({vae}) have {CHANNELS[kind]}" in done.stderr


def test_what_a_dataset_recorded_counts_and_not_a_config_that_changed(photos, tmp_path):
    """The weights are the same, so their hash says nothing. Datasets of before recorded nothing: none of theirs was shifted."""
    make_kind("8 shifted", tmp_path / "vae")
    run_build(*build_options(photos, tmp_path / "out"), "--latents.vae", str(tmp_path / "vae"), "--views.size", str(SIZE))
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latents_std": [3.0] * 8, "shift_factor": None}))
    info = read_dataset(tmp_path / "out")
    loaded = load_dataset_vae(str(tmp_path / "vae"), tmp_path / "out", info)
    assert loaded.normalisation == info.vae.normalisation
    assert loaded.normalisation.shift == (0.5,) * 8
    again = run_build(*build_options(photos, tmp_path / "out"), "--latents.vae", str(tmp_path / "vae"), check=False)
    assert again.returncode == 2, "a folder of shards keeps to one normalisation"
    before = info.vae.model_copy(update={"normalisation": None})
    old = info.model_copy(update={"vae": before})
    assert load_dataset_vae(str(tmp_path / "vae"), tmp_path / "out", old).normalisation is None


def test_a_deterministic_latent_takes_no_noise():
    stored, noise = np.full((4, 2, 2), 0.5, np.float16), np.full((4, 2, 2), 9, np.float32)
    draw_posterior(stored, noise, 3.0)
    assert (noise == 1.5).all()


@pytest.mark.parametrize("bare", [False, True])
def test_eight_channels_without_a_shift_are_exported(bare, tmp_path):
    """In diffusers' layout, also without quant_conv; there it is the pipeline's own class that reads it."""
    changes = {"use_quant_conv": False, "use_post_quant_conv": False} if bare else {}
    world = make_small_world(tmp_path / "world", latent_channels=8, **changes)
    train(world.settings(tmp_path / "run", "--steps=1", "--validation.every=0", "--model.conditioner_blocks=0"), ONE)
    run = load_run(tmp_path / "run")
    export_run(run, tmp_path / "run", tmp_path / "out", "", "diffusers", "ema")
    photo, mask = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), np.eye(40, dtype=bool)
    edits = [PaintByExample(each)(photo, mask, photo[:20], steps=1) for each in (run, load_model(tmp_path / "out"))]
    assert np.abs(np.asarray(edits[0]).astype(int) - np.asarray(edits[1])).max() <= 1
    pipeline = load_diffusers_pipeline(str(tmp_path / "out"))
    assert (pipeline.vae.config.latent_channels, pipeline.vae.config.use_quant_conv) == (8, not bare)
    assert pipeline.unet.config.in_channels == 17
