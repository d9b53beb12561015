"""Evaluation and demo: is the painted reference recognised, and is the test of it fair?"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe_core.errors import InputError
from pbe_train import demo, evaluate, sample
from pbe_train.checkpoints import from_pretrained
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.data.latents import normalise_reference
from pbe_train.data.order import SampleLocation
from pbe_train.data.references import fit_reference
from pbe_train.data.shards import ShardReader
from pbe_train.editing import paint_by_example
from pbe_train.editing.paint_by_example import PaintByExample
from pbe_train.evaluation import recognition
from pbe_train.evaluation.held_out import check_fits
from pbe_train.model import pipeline
from pbe_train.model.pipeline import Run, SamplingSettings, check_guidance
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


@pytest.mark.parametrize("program", [sample, demo, evaluate])
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


def test_wilson_intervals():
    """Against published values: 8 of 10 and 0 of 20 (Newcombe 1998, formula 3). Two paintings of a view count once."""
    assert recognition.wilson(8.0, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert recognition.wilson(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    one, both = (recognition.make_score([(True, 1.0), (False, 0.0)] * count, 10) for count in (5, 10))
    assert (both.count, both.recognised, both.accuracy) == (20, 10, 0.5)
    assert (both.low, both.high) == (one.low, one.high)


@pytest.mark.parametrize("feature", [0.0, 1.0, float("nan")])
def test_a_tie_is_no_recognition(reader, trained: Run, monkeypatch: pytest.MonkeyPatch, feature: float):
    """The right answer stands first, and argmax would return it."""
    samples = recognition.read_held_out(reader, [SampleLocation(0, 0), SampleLocation(0, 1)], 0)
    monkeypatch.setattr(Run, "embed", lambda run, pictures: torch.full((len(pictures), 4), feature))
    found = recognition.ask(trained, samples, [one.sample.view for one in samples], torch.ones(2, 8, 4), [0, 5])
    assert [right for right, _ in found] == [False, False]


def test_no_pixel_of_the_true_object_is_judged(reader, trained: Run, monkeypatch: pytest.MonkeyPatch):
    """A painter of plain 200: whatever else the judge saw of the painted views would come from the photo."""
    judged, whole = [], recognition.ask
    monkeypatch.setattr(Run, "paint", lambda run, masked, *_: np.full((len(masked), 32, 32, 3), 200, np.uint8))
    monkeypatch.setattr(
        recognition, "ask", lambda run, samples, views, *rest: judged.append(views) or whole(run, samples, views, *rest)
    )
    recognition.evaluate(trained, reader, recognition.draw_questions(reader, 3, 0), HOW, 0)
    own, another, real, _ = judged
    assert all((view == 200).all() for view in [*own, *another])
    assert not any((view == 200).all() for view in real)


def test_candidates_are_eight_labels_and_functions_of_names(reader):
    labels = {place: label for place, _, label in reader.labels()}
    questions = recognition.draw_questions(reader, 12, 0)
    assert {question.place for question in questions} == set(labels)
    for question in questions:
        assert question.candidates[0] == question.place
        assert len({labels[place] for place in question.candidates}) == 8
        assert 1 <= question.other < 8
    assert recognition.draw_questions(reader, 5, 0) == questions[:5]
    assert recognition.draw_questions(reader, 12, 1) != questions


def test_a_painter_that_copies_the_reference_is_recognised_and_one_that_paints_grey_is_not(reader, trained, monkeypatch):
    """The test itself, with painters whose answer is known: it must tell following the reference from ignoring it."""
    questions = recognition.draw_questions(reader, 12, 0)

    def copying(run, samples, references, seeds, how, **_):
        views = []
        for one, reference in zip(samples, references, strict=True):
            rows, columns = np.flatnonzero(one.mask.any(1)), np.flatnonzero(one.mask.any(0))
            view = one.sample.view.copy()
            place = np.ix_(np.arange(len(rows)) * 64 // len(rows), np.arange(len(columns)) * 64 // len(columns))
            view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = fit_reference(reference, 64, "squash")[place]
            views.append(view)
        return views

    monkeypatch.setattr(recognition, "paint_held_out", copying)
    scores = recognition.evaluate(trained, reader, questions, HOW, 0)
    assert scores["own"].accuracy > 0.7
    assert scores["another"].accuracy > 0.7
    assert scores["both"].count == 24
    monkeypatch.setattr(
        recognition, "paint_held_out", lambda run, samples, *_, **__: [np.full_like(one.sample.view, 127) for one in samples]
    )
    assert recognition.evaluate(trained, reader, questions, HOW, 0)["another"].accuracy < 0.4


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


def test_evaluation_and_demo_run(world: World, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    common = ["--model", str(run_folder), "--dataset", str(world.dataset), "--steps", "2", "--count", "4"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *common, "--batch", "3", "--out", str(tmp_path / "scores.json")])
    evaluate.main()
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["trained_on"] is False
    counts = {row: score["count"] for row, score in written["scores"].items()}
    assert counts == {"own": 4, "another": 4, "both": 8, "real view": 4, "VAE reconstruction": 4}
    shown = capsys.readouterr()
    assert "95 % interval" in shown.out
    assert "judge: the encoder" in shown.out
    assert "warning" not in shown.err
    monkeypatch.setattr(sys, "argv", ["demo", *common, "--out", str(tmp_path / "demo.png")])
    demo.main()
    assert Image.open(tmp_path / "demo.png").width == 4 * 166 + 6
    # The fixture keeps no views there, so the evaluation itself ends; the warning comes first.
    monkeypatch.setattr(sys, "argv", ["evaluate", *common, "--split", "train"])
    with pytest.raises(InputError, match="keeps no views"):
        evaluate.main()
    assert "warning: the run was trained on split `train`" in capsys.readouterr().err
