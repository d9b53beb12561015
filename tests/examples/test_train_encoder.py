"""The encoder program, over a small tiny world: what it leaves, what it goes on from, and what its looks change."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from examples import train_encoder
from examples.train_encoder import main, random_window, recoloured
from pbe_core.randomness import generator
from pbe_core.vae import load_network
from tests.conftest import call_program, run_build

SMALL = ("--steps", "4", "--batch", "8", "--width", "32", "--threads", "1")


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import build_options

    out = tmp_path_factory.mktemp("encoder") / "dataset"
    run_build(*build_options(photos, out))
    return out


@pytest.fixture(scope="module")
def encoder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "whole"
    done = call_program(main, "--dataset", str(built), "--out", str(out), *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def test_it_leaves_an_encoder_in_half_precision_that_the_trainer_reads_and_says_how_good_it_is(encoder):
    tokens = load_network(CLIPVisionModel, str(encoder), "image_encoder")(torch.zeros(2, 3, 64, 64)).pooler_output
    assert tokens.shape == (2, 32)
    assert (encoder / "model.safetensors").stat().st_size < 2.2 * sum(
        parameter.numel() for parameter in CLIPVisionModel.from_pretrained(encoder).parameters()
    )
    assert '"class by neighbours, %"' in (encoder / "quality.json").read_text()


def test_interrupted_it_goes_on_to_the_same_weights(built, encoder, tmp_path, monkeypatch):
    """After two of four steps, of which the second was saved: moments, order and looks of the rest must be those of one go."""
    looked = train_encoder.looked_at
    shown = []

    def looked_and_stopped(squares, random):
        if len(shown) == 4:
            raise KeyboardInterrupt
        shown.append(len(squares))
        return looked(squares, random)

    command = ("--dataset", str(built), "--out", str(tmp_path / "e"), *SMALL)
    monkeypatch.setattr(train_encoder, "SAVE_EVERY_STEPS", 2)
    monkeypatch.setattr(train_encoder, "looked_at", looked_and_stopped)
    assert call_program(main, *command).returncode == 130
    assert not (tmp_path / "e" / "model.safetensors").exists()
    monkeypatch.setattr(train_encoder, "looked_at", lambda squares, random: shown.append(0) or looked(squares, random))
    assert call_program(main, *command).returncode == 0
    assert shown == [8] * 4 + [0] * 4
    assert (tmp_path / "e" / "model.safetensors").read_bytes() == (encoder / "model.safetensors").read_bytes()


def test_other_settings_over_a_training_are_refused_in_one_line(built, encoder):
    done = call_program(main, "--dataset", str(built), "--out", str(encoder), *SMALL, "--seed", "1")
    assert done.returncode == 2
    assert "seed 0, now 1; give another --out" in done.stderr.splitlines()[-1]


def test_a_look_colours_nothing_that_is_grey_and_keeps_the_light_of_what_is_not():
    grey = torch.linspace(0, 1, 64).expand(16, 3, 64, 64)
    drawn = recoloured(grey, generator("test"))
    assert (drawn.amax(1) - drawn.amin(1)).max() < 0.01
    # Hue and saturation are drawn after light: with it undone, the luma of a colour is what it was.
    colour = torch.tensor([0.6, 0.4, 0.5])[:, None, None].expand(16, 3, 64, 64)
    light = torch.from_numpy(generator("test").uniform(0.6, 1.4, (3, 16))).float()
    luma = (recoloured(colour, generator("test")) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))
    assert luma / light[0] == pytest.approx(torch.full((16,), 0.471).numpy(), abs=0.02)


def test_windows_show_the_reference_large_and_small_mirrored_or_not():
    """Their shares of its area are as said, and none lies far beyond its edges."""
    windows = np.stack([random_window(generator("window", number)) for number in range(400)])
    areas = np.linalg.det(windows[:, :, :2])
    assert np.abs(areas).min() > 0.19
    assert np.abs(areas).max() < 1.16
    assert 0.4 < (areas < 0).mean() < 0.6
    corners = windows[:, :, :2] @ np.array([[1, 1, -1, -1], [1, -1, 1, -1]]) + windows[:, :, 2:]
    assert np.abs(corners).max() < 1.6
    assert (np.abs(corners) > 1.05).mean() < 0.25
