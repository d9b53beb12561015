"""The finished tiny model: what a newcomer's first edit paints with, from any folder, before anything is trained."""

import json

import numpy as np
import pytest
from PIL import Image

from pbe_core.settings import REPOSITORY
from pbe_train import PaintByExample
from pbe_train.checkpoints.networks import read_pretrained
from tiny_world.measure import WEIGHTS

MODEL = "tiny_world/weights/model"
EXAMPLE = REPOSITORY / "tiny_world" / "example"


def opened(name: str) -> np.ndarray:
    return np.asarray(Image.open(EXAMPLE / name).convert("L" if name == "mask.png" else "RGB"))


def test_the_example_of_the_readme_is_painted_from_any_folder(tmp_path, monkeypatch):
    """Bytes outside the mask stay; inside, the reference's colours come instead of what was there."""
    monkeypatch.chdir(tmp_path)
    photo, mask, reference = opened("photo.png"), opened("mask.png") > 127, opened("reference.png")
    paint = PaintByExample.from_pretrained(MODEL)
    edited = np.asarray(paint(photo, mask, reference, guidance=2, steps=8, scheduler="DPMSolverMultistepScheduler", seed=0))
    assert (edited[~mask] == photo[~mask]).all()
    core = mask & ~outer_ring(mask)
    wanted = np.median(reference[reference.shape[0] // 3 : -reference.shape[0] // 3].reshape(-1, 3), axis=0)
    assert closeness(edited[core], wanted) > closeness(photo[core], wanted) + 0.05


def outer_ring(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inner = np.zeros_like(mask)
    top, left = (rows[-1] - rows[0]) // 4, (columns[-1] - columns[0]) // 4
    inner[rows[0] + top : rows[-1] - top, columns[0] + left : columns[-1] - left] = True
    return ~inner


def closeness(pixels: np.ndarray, wanted: np.ndarray) -> float:
    """The share of pixels that have about this colour."""
    return float((np.abs(pixels.astype(float) - wanted).max(axis=1) < 60).mean())


def test_the_model_is_a_run_of_this_trainer_and_names_no_place_of_a_machine():
    source = read_pretrained(MODEL)
    assert (source.kind, source.prediction) == ("run of this trainer", "v_prediction")
    state = json.loads((WEIGHTS / "model" / "state.json").read_text())
    assert state["settings"]["model"]["pretrained"] == "runs/finished5"
    texts = [path.read_text() for path in (WEIGHTS / "model").iterdir() if path.suffix in (".json", ".md")]
    assert not any(part in text for text in texts for part in ("/home", "/tmp", "/root", str(REPOSITORY)))
    assert pytest.approx(5.5e6, rel=0.05) == (WEIGHTS / "model" / "model.safetensors").stat().st_size
