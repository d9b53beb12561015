"""The tiny prior: how it is trained, how it becomes the start of a run, and whether the one in the repository is any good."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from pbe_core.errors import InputError
from pbe_core.settings import load_settings, preset
from pbe_core.vae import load_vae, weights_sha256
from pbe_train.checkpoints.from_pretrained import init_from_pretrained
from pbe_train.config import TrainSettings
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.distributed import Distributed
from tests.pbe_train.small_world import World, make_world
from tiny_world import train_prior as program
from tiny_world.kinds import generator
from tiny_world.measure import WEIGHTS
from tiny_world.train_prior import BATCH, held_out_loss, tiny_unet, train_prior
from tiny_world.train_vae import stored_photo, to_tensor


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def test_latents_of_another_autoencoder_are_refused(small, tmp_path):
    """The first four of 32 channels are no latents; and no dataset is one line."""
    other = shutil.copytree(small.dataset, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    info["vae"]["latent_channels"] = 32
    (other / "dataset.json").write_text(json.dumps(info))
    alone = Distributed(0, 1, torch.device("cpu"))
    with pytest.raises(InputError, match="other: its latents have 32 channels"):
        train_prior(other, tmp_path / "out", tmp_path / "work", 1, 0, alone)
    with pytest.raises(InputError, match="nowhere"):
        train_prior(tmp_path / "nowhere", tmp_path / "out", tmp_path / "work", 1, 0, alone)


def test_a_prior_that_was_stopped_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "SAVE_EVERY_STEPS", 2)
    monkeypatch.setattr(program, "BATCH", 4)
    alone = Distributed(0, 1, torch.device("cpu"))
    train_prior(small.dataset, tmp_path / "once", tmp_path / "work_once", 4, 0, alone)

    steps = iter(range(2))

    def until_it_is_killed(*names: str | int) -> np.random.Generator:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return generator(*names)

    # Killed in the third step: what the second one saved is there.
    with monkeypatch.context() as killed:
        killed.setattr(program, "generator", until_it_is_killed)
        killed.setattr(program, "held_out_loss", lambda *_: 0.0)
        with pytest.raises(KeyboardInterrupt):
            train_prior(small.dataset, tmp_path / "twice", tmp_path / "work_twice", 4, 0, alone)
    assert torch.load(tmp_path / "work_twice" / "state.pt", weights_only=True)["step"] == 2
    train_prior(small.dataset, tmp_path / "twice", tmp_path / "work_twice", 4, 0, alone)
    weights = program.WEIGHTS
    assert (tmp_path / "once" / weights).read_bytes() == (tmp_path / "twice" / weights).read_bytes()
    untrained = weights_sha256(tiny_unet().state_dict())
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "once" / "unet").state_dict()
    assert weights_sha256(trained) != untrained
    to_condition = [value for name, value in trained.items() if name.endswith("attn2.to_out.0.weight")]
    assert to_condition
    assert not any(value.any() for value in to_condition), "what a new conditioner says must change nothing at first"


def test_the_tiny_preset_starts_from_the_prior_and_paints_as_it_did():
    """All tensors find their place, and no condition, masked view or mask changes what the prior predicts before training."""
    settings = load_settings(TrainSettings, "train", [], default_config=preset("tiny"))
    assert settings.model.pretrained == "tiny_world/weights/prior"
    model, report = init_from_pretrained(settings, load_vae(settings.model.vae))
    prior = UNet2DConditionModel.from_pretrained(WEIGHTS / "prior" / "unet", torch_dtype=torch.float32)
    assert report
    assert report.loaded == {"U-Net": len(prior.state_dict())}
    assert report.new == ["5 more input channels of unet.conv_in, all 0", "the conditioner, at random"]
    assert (report.licence, report.licence_guessed, report.aside) == ("apache-2.0", False, {})
    torch.manual_seed(0)
    noisy, masked, mask, reference = (torch.randn(2, channels, 16, 16) for channels in (4, 4, 1, 3))
    reference = torch.nn.functional.interpolate(reference, (64, 64))
    time, keep = torch.tensor([100, 900]), torch.tensor([False, True])
    with torch.no_grad():
        started = model.eval()(noisy, masked, mask, time, reference, keep)
        alone = prior(noisy, time, torch.zeros(2, 1, prior.config.cross_attention_dim)).sample
    torch.testing.assert_close(started, alone, rtol=1e-4, atol=1e-4)


def test_the_prior_in_the_repository_predicts_held_out_views():
    """Fresh photos, whose individuals nothing was trained on; an untrained network of these sizes has a loss of about 1."""
    vae = load_vae("tiny_world/weights/vae")
    photos = [stored_photo(index, 12, "validation") for index in range(24)]
    squares = [photo[:128, :128] for photo in photos if min(photo.shape[:2]) >= 128]
    with torch.no_grad():
        latents = vae.encode(to_tensor(squares)).mean * vae.sizes.scaling_factor
    prior = UNet2DConditionModel.from_pretrained(WEIGHTS / "prior" / "unet", torch_dtype=torch.float32)
    assert held_out_loss(prior, training_schedule("v_prediction"), latents) < 0.52
    assert len(squares) > BATCH / 4


def test_the_prior_has_four_channels_and_no_place_of_its_own() -> None:
    config = (WEIGHTS / "prior" / "unet" / "config.json").read_text()
    assert '"_name_or_path": "/' not in config
    prior = UNet2DConditionModel.from_pretrained(WEIGHTS / "prior" / "unet")
    assert (prior.config.in_channels, prior.config.out_channels) == (4, 4)
    assert Path(WEIGHTS / "prior" / program.WEIGHTS).stat().st_size < 5.5e6
