"""The demo, and what it has in common with edits: guidance, and how a run sees references."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe_core.errors import InputError
from pbe_train import demo, sample
from pbe_train.checkpoints import from_pretrained
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.data.latents import normalise_reference
from pbe_train.data.references import fit_reference
from pbe_train.data.shards import ShardReader
from pbe_train.editing import paint_by_example
from pbe_train.editing.paint_by_example import PaintByExample
from pbe_train.evaluation import held_out
from pbe_train.evaluation.held_out import check_fits
from pbe_train.model import pipeline
from pbe_train.model.pipeline import Run, SamplingSettings, check_guidance
from tests.conftest import call_program
from tests.pbe_train.small_world import World

HOW = SamplingSettings(guidance=3.0, steps=1)


@pytest.fixture(scope="module")
def trained(run_folder: Path) -> Run:
    return load_run(run_folder)


@pytest.fixture
def reader(world: World) -> ShardReader:
    return ShardReader(world.dataset, "validation")


def with_settings(run: Run, **changed: object) -> Run:
    return dataclasses.replace(run, settings=run.settings.model_copy(update=changed))


@pytest.mark.parametrize("program", [sample, demo])
def test_guidance_without_a_trained_null_vector_is_refused(world, trained, tmp_path, monkeypatch, program):
    undropped = with_settings(trained, condition_dropout=0.0)
    monkeypatch.setattr(
        *((paint_by_example, "load_model") if program is sample else (from_pretrained, "load_run")), lambda *_: undropped
    )
    Image.new("RGB", (40, 40), "white").save(tmp_path / "photo.png")
    names = ("image", "mask", "reference") if program is sample else ()
    given = {**dict.fromkeys(names, tmp_path / "photo.png"), "out": tmp_path / "out.png", "model": "run", "guidance": 2}
    given |= {} if program is sample else {"dataset": world.dataset}
    monkeypatch.setattr(sys, "argv", ["program", *(word for name, value in given.items() for word in (f"--{name}", str(value)))])
    with pytest.raises(InputError, match=r"^guidance 2: .* condition_dropout 0.* give guidance 1$"):
        program.main()
    check_guidance(undropped, 1.0)


def test_a_run_sees_references_as_it_was_trained_to(reader, trained: Run, monkeypatch: pytest.MonkeyPatch):
    """Trained on padded references, it pads for edits and for evaluation as well, and refuses squares."""
    run = with_settings(trained, model=trained.settings.model.model_copy(update={"reference_geometry": "pad"}))
    seen = []
    monkeypatch.setattr(
        pipeline, "normalise_reference", lambda squares: seen.append(squares.numpy()) or normalise_reference(squares)
    )
    wide = np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8)
    PaintByExample(run)(wide, np.tri(20, 60, dtype=bool), wide, steps=1)
    run.embed([wide])
    assert all(np.array_equal(squares[0], fit_reference(wide, 32, "pad")) for squares in seen)
    assert len(seen) == 2
    check_fits(run, reader)
    reader.info = reader.info.model_copy(update={"settings": {**reader.info.settings, "references": {"resize": "published"}}})
    with pytest.raises(InputError, match="references are stored squashed to squares"):
        check_fits(run, reader)


def test_the_demo_runs(world: World, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hows, paint = [], held_out.paint_held_out
    monkeypatch.setattr(held_out, "paint_held_out", lambda *given, **more: hows.append(given[4]) or paint(*given, **more))
    given = ["--model", str(run_folder), "--dataset", str(world.dataset), "--steps", "2"]
    for count, across, down in ((1, 1, 1), (3, 2, 2)):
        done = call_program(demo.main, *given, "--count", str(count), "--out", str(tmp_path / "demo.png"))
        assert done.returncode == 0, done.stderr
        picture = Image.open(tmp_path / "demo.png")
        assert picture.width == across * 4 * 166 + 6
        assert picture.height == 18 + down * (166 + 18) + 6
    done = call_program(
        demo.main, *given, "--count", "1", "--out", str(tmp_path / "demo.png"), "--reuse", "2", "--guidance-interval", "0", "0.5"
    )
    assert done.returncode == 0, done.stderr
    assert [(how.steps, how.reuse, how.guidance_interval) for how in hows] == [(2, 1, (0, 1))] * 2 + [(2, 2, (0, 0.5))]
    done = call_program(demo.main, *given, "--reuse", "0", "--out", str(tmp_path / "demo.png"))
    assert (done.returncode, "--reuse 0" in done.stderr) == (2, True)
