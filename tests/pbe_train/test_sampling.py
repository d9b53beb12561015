"""Using a trained model: edits, the command line, evaluation and demo."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.crop import Window, cut, cut_mask, paste
from pbe_train import demo, evaluate, sample
from pbe_train.checkpoints import from_pretrained
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.data.latents import normalise_reference
from pbe_train.data.order import SampleLocation
from pbe_train.data.references import fit_reference
from pbe_train.data.shards import ShardReader
from pbe_train.editing import paint_by_example
from pbe_train.editing.edit_photos import choose_window, edit
from pbe_train.editing.reading import read_mask
from pbe_train.evaluation import recognition
from pbe_train.evaluation.held_out import check_fits
from pbe_train.model import pipeline as sampling
from pbe_train.model.pipeline import Run, SamplingSettings
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.pbe_train.small_world import World

HOW = SamplingSettings(guidance=3.0, steps=2)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(world.settings(out, "--steps=2"), Distributed(0, 1, torch.device("cpu")))
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Run:
    return load_run(folder)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rectangle(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


@settings(deadline=None)
@given(
    height=integers(1, 90),
    width=integers(1, 90),
    top=integers(0, 89),
    left=integers(0, 89),
    tall=integers(1, 90),
    wide=integers(1, 90),
)
def test_the_window_holds_the_region_and_the_photo_holds_the_window(height, width, top, left, tall, wide):
    top, left = top % height, left % width
    mask = rectangle(height, width, top, left, top + tall, left + wide)
    window = choose_window(mask)
    # Marked wherever it is to be repainted, also in what is mirrored: the model sees none of it.
    marked = np.repeat(mask[..., None], 3, axis=2) * np.uint8(255)
    shown = cut_mask(mask, window, window.side)
    assert np.array_equal(cut(marked, window)[..., 0] > 0, shown)
    if window.side <= min(height, width):
        assert shown.sum() == mask.sum()
        assert window.left >= 0 <= window.top
        assert window.left + window.side <= width
        assert window.top + window.side <= height
    else:  # Only because the region itself is longer than the photo's short side.
        assert window.side == max(mask.any(1).sum(), mask.any(0).sum())


def test_a_thin_region_survives_shrinking():
    assert cut_mask(rectangle(100, 100, 50, 0, 51, 100), Window(0, 0, 100), 16).any(1).sum() == 1


@settings(deadline=None, max_examples=40)
@given(height=integers(2, 40), width=integers(2, 40), seed=integers(0, 99))
def test_pasting_changes_the_region_and_nothing_else(height, width, seed):
    random = np.random.default_rng(seed)
    mask = random.random((height, width)) < 0.5
    mask[0, 0] = True
    window, picture = choose_window(mask), photo(height, width, seed)
    edited = paste(picture, np.full((window.side, window.side, 3), 255, np.uint8), mask, window)
    assert np.array_equal(edited[~mask], picture[~mask])
    # The weakest share of the view, at the region's border, is 1 / 1.5.
    assert (edited[mask].astype(int) >= picture[mask].astype(int) + (255 - picture[mask].astype(int)) * 0.6 - 1).all()


SHAPES = [(50, 90), (90, 50), (32, 32), (20, 120)]


@pytest.mark.parametrize("shape", SHAPES)
def test_outside_the_mask_every_byte_is_the_photos_own(trained: Run, shape: tuple[int, int]):
    """Also where no square fits (20 x 120 with a long region), at any photo size."""
    picture, mask = photo(*shape), rectangle(*shape, 5, 10, 18, shape[1] - 5)
    edited = edit(trained, [picture], [mask], [photo(20, 30, 1)], [0], HOW)[0]
    assert edited.shape == picture.shape
    assert np.array_equal(edited[~mask], picture[~mask])
    assert (edited[mask] != picture[mask]).mean() > 0.5


def test_blending_can_be_switched_off(trained: Run):
    picture, mask = photo(40, 60), rectangle(40, 60, 10, 10, 20, 20)
    edited = edit(trained, [picture], [mask], [photo(20, 30, 1)], [0], HOW, blend=False)[0]
    window = choose_window(mask)
    inside = rectangle(40, 60, window.top, window.left, window.top + window.side, window.left + window.side)
    assert np.array_equal(edited[~inside], picture[~inside])
    assert (edited[inside & ~mask] != picture[inside & ~mask]).mean() > 0.5


def test_an_edit_does_not_depend_on_its_neighbours(trained: Run):
    pictures = [photo(40, 60, 1), photo(70, 50, 2)]
    masks = [rectangle(40, 60, 10, 10, 20, 20), rectangle(70, 50, 30, 10, 50, 40)]
    references = [photo(20, 30, 3), photo(40, 30, 4)]
    together = edit(trained, pictures, masks, references, [7, 8], HOW)[1].astype(int)
    alone = edit(trained, pictures[1:], masks[1:], references[1:], [8], HOW)[0].astype(int)
    other = edit(trained, pictures[1:], masks[1:], references[1:], [9], HOW)[0].astype(int)
    assert np.abs(together - alone).max() <= 1
    assert np.abs(other - alone).max() > 1


def test_the_view_the_model_sees_is_grey_where_it_is_repainted(trained: Run, monkeypatch: pytest.MonkeyPatch):
    """As the masked images of the training: 0 in [-1, 1] where the mask is True, the photo elsewhere."""
    seen = []
    monkeypatch.setattr(Run, "encode_pixels", lambda _, pixels: seen.append(pixels) or torch.zeros(len(pixels), 4, 4, 4))
    picture, mask = photo(32, 32), rectangle(32, 32, 8, 8, 24, 24)
    edit(trained, [picture], [mask], [picture], [0], HOW)
    repainted = torch.from_numpy(mask)
    assert (seen[0][0][:, repainted] == 0).all()
    assert torch.equal(seen[0][0][:, ~repainted], torch.from_numpy(picture).permute(2, 0, 1)[:, ~repainted].float() / 127.5 - 1)


def test_averaged_weights_are_the_default(folder: Path, trained: Run):
    plain = load_run(folder, "model")
    assert not torch.equal(plain.model.unet.conv_in.weight, trained.model.unet.conv_in.weight)


def write(path: Path, picture: np.ndarray) -> Path:
    Image.fromarray(picture).save(path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "image": write(tmp_path / "photo.png", photo(40, 60)),
        "mask": write(tmp_path / "mask.png", rectangle(40, 60, 10, 10, 30, 30).astype(np.uint8) * 255),
        "reference": write(tmp_path / "reference.png", photo(20, 30, 1)),
        "out": tmp_path / "out.png",
    }


def arguments(folder: Path, files: dict[str, Path], **changed: object) -> list[str]:
    values = {"model": folder, "steps": 2, **files, **changed}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_bad_input_is_one_line_and_status_2(folder: Path, files: dict[str, Path]):
    """As a user sees it: a real process."""
    write(files["reference"], np.full((20, 30), 255, np.uint8))
    done = subprocess.run(
        [sys.executable, "-m", "pbe_train.sample", *arguments(folder, files, mask=files["reference"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {files['reference']}: the mask is 30x20 px, the photo {files['image']} is 60x40 px; "
        "draw the mask at the photo's size"
    ]


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("mask", "black", r"mask\.png: the mask is empty"),
        ("image", "text", r"photo\.png: not a readable photo \(not_an_image"),
        ("reference", "gone", r"reference\.png: no such file"),
        ("model", "gone", r"gone: no such file or folder, and no hub id"),
        ("size", "20", r"^size 20: must be a multiple of 16 px"),
        ("scheduler", "Fast", r"Fast: diffusers has no such scheduler"),
        ("out", "result.gif", r"result\.gif: write a \.png"),
        ("steps", "0", r"^steps 0: must be 1 or more"),
    ],
)
def test_bad_input_is_named(folder: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, key, content, message):
    changed: dict[str, object] = {}
    if content == "black":
        write(files[key], np.zeros((40, 60), np.uint8))
    elif content == "text":
        files[key].write_text("hello")
    elif content == "gone" and key in files:
        files[key].unlink()
    else:
        changed[key] = content
    monkeypatch.setattr(sys, "argv", ["sample", *arguments(folder, files, **changed)])
    with pytest.raises(InputError, match=message) as caught:
        sample.main()
    assert "\n" not in str(caught.value)


def test_a_transparent_mask_is_refused_and_an_opaque_one_with_alpha_is_not(tmp_path: Path):
    """White on a transparent layer: laid over white, as photos are, it would repaint everything."""
    drawn = np.zeros((20, 20, 4), np.uint8)
    drawn[5:10, 5:10] = 255
    with pytest.raises(
        InputError, match=r"layer\.png: the mask is transparent in places \(alpha 0 .*, 255 .*\), .* save it without"
    ):
        read_mask(write(tmp_path / "layer.png", drawn))
    drawn[..., 3] = 255
    assert read_mask(write(tmp_path / "flat.png", drawn)).sum() == 25


@pytest.mark.parametrize("program", [sample, demo, evaluate])
def test_guidance_without_a_trained_null_vector_is_refused(
    world: World, trained: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, program
):
    undropped = dataclasses.replace(trained, settings=trained.settings.model_copy(update={"condition_dropout": 0.0}))
    loads = (paint_by_example, "load_model") if program is sample else (from_pretrained, "load_run")
    monkeypatch.setattr(*loads, lambda *_: undropped)
    given = files if program is sample else {"dataset": world.dataset, "out": files["out"]}
    monkeypatch.setattr(sys, "argv", ["program", *arguments(Path("run"), given, guidance=2)])
    with pytest.raises(InputError, match=r"^guidance 2: .* condition_dropout 0.* give guidance 1$"):
        program.main()
    sampling.check_guidance(undropped, 1.0)


def test_views_are_decoded_a_few_at_a_time(trained: Run, monkeypatch: pytest.MonkeyPatch):
    whole, sizes = sampling.decode_latents, []
    monkeypatch.setattr(sampling, "decode_latents", lambda vae, part, scale: sizes.append(len(part)) or whole(vae, part, scale))
    assert trained.decode(torch.randn(9, 4, 4, 4)).shape == (9, 32, 32, 3)
    assert sizes == [4, 4, 1]


def test_the_run_is_checked_against_its_frozen_networks(world: World, folder: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    state = next(copy.glob("checkpoints/*/state.json"))
    content = json.loads(state.read_text())
    content["identity"]["encoder_sha256"] = "f" * 64
    state.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model\.encoder .* now has other weights"):
        load_run(copy)


def test_wilson_intervals():
    """Against published values: 8 of 10 and 0 of 20 (Newcombe 1998, formula 3)."""
    assert recognition.wilson(8.0, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert recognition.wilson(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_two_paintings_of_a_view_count_once_in_the_interval():
    one, both = (
        recognition.make_score([(True, 1.0), (False, 0.0)] * 5, 10),
        recognition.make_score([(True, 1.0), (False, 0.0)] * 10, 10),
    )
    assert (both.count, both.recognised, both.accuracy) == (20, 10, 0.5)
    assert (both.low, both.high) == (one.low, one.high)


@pytest.mark.parametrize("feature", [0.0, 1.0, float("nan")])
def test_a_tie_is_no_recognition(world: World, trained: Run, monkeypatch: pytest.MonkeyPatch, feature: float):
    """The right answer stands first, and argmax would return it."""
    samples = recognition.read_held_out(ShardReader(world.dataset, "validation"), [SampleLocation(0, 0), SampleLocation(0, 1)], 0)
    monkeypatch.setattr(sampling.Run, "embed", lambda run, pictures: torch.full((len(pictures), 4), feature))
    views = [one.sample.view for one in samples]
    found = recognition.ask(trained, samples, views, torch.ones(2, 8, 4), [0, 5])
    assert [right for right, _ in found] == [False, False]


def test_no_pixel_of_the_true_object_is_judged(world: World, trained: Run, monkeypatch: pytest.MonkeyPatch):
    """A painter of plain 200: whatever else the judge saw of the painted views would come from the photo."""
    reader, judged = ShardReader(world.dataset, "validation"), []
    whole = recognition.ask
    monkeypatch.setattr(sampling.Run, "paint", lambda run, masked, *_: np.full((len(masked), 32, 32, 3), 200, np.uint8))
    monkeypatch.setattr(
        recognition, "ask", lambda run, samples, views, *rest: judged.append(views) or whole(run, samples, views, *rest)
    )
    recognition.evaluate(trained, reader, recognition.draw_questions(reader, 3, 0), HOW, 0)
    own, another, real, _ = judged
    assert all((view == 200).all() for view in [*own, *another])
    assert not any((view == 200).all() for view in real)


def test_scores_on_the_training_split_are_marked(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The fixture keeps no views there, so the evaluation itself ends; the warning comes first."""
    given = ["--model", str(folder), "--dataset", str(world.dataset), "--split", "train"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given])
    with pytest.raises(InputError, match="keeps no views"):
        evaluate.main()
    assert "warning: the run was trained on split `train`" in capsys.readouterr().err


def test_candidates_are_eight_labels_and_functions_of_names(world: World):
    reader = ShardReader(world.dataset, "validation")
    labels = {place: label for place, _, label in reader.labels()}
    questions = recognition.draw_questions(reader, 12, 0)
    assert {question.place for question in questions} == set(labels)
    for question in questions:
        assert question.candidates[0] == question.place
        assert len({labels[place] for place in question.candidates}) == 8
        assert 1 <= question.other < 8
    assert recognition.draw_questions(reader, 5, 0) == questions[:5]
    assert recognition.draw_questions(reader, 12, 1) != questions


def test_a_painter_that_copies_the_reference_is_recognised_and_one_that_paints_grey_is_not(
    world: World, trained: Run, monkeypatch: pytest.MonkeyPatch
):
    """The test itself, with painters whose answer is known: it must tell following the reference from ignoring it."""
    reader = ShardReader(world.dataset, "validation")
    questions = recognition.draw_questions(reader, 12, 0)

    def copying(run, samples, references, seeds, how, **_):
        views = []
        for one, reference in zip(samples, references, strict=True):
            rows, columns = np.flatnonzero(one.mask.any(1)), np.flatnonzero(one.mask.any(0))
            view = one.sample.view.copy()
            crop = fit_reference(reference, 64, "squash")
            place = np.ix_(np.arange(len(rows)) * 64 // len(rows), np.arange(len(columns)) * 64 // len(columns))
            view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = crop[place]
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
    scores = recognition.evaluate(trained, reader, questions, HOW, 0)
    assert scores["another"].accuracy < 0.4


def test_a_run_sees_references_as_it_was_trained_to(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained with our own augmentation on padded references: edits and evaluation pad as well, by the checkpoint's word."""
    options = ["--steps=2", "--augmentation.preset=strong", "--model.reference_geometry=pad"]
    train(world.settings(tmp_path, *options), Distributed(0, 1, torch.device("cpu")))
    run = load_run(tmp_path)
    assert run.settings.model.reference_geometry == "pad"
    seen = []
    monkeypatch.setattr(
        sampling, "normalise_reference", lambda squares: seen.append(squares.numpy()) or normalise_reference(squares)
    )
    wide = photo(20, 60)
    edit(run, [photo(40, 40)], [rectangle(40, 40, 5, 5, 30, 30)], [wide], [0], HOW)
    run.embed([wide, photo(30, 10)])
    assert np.array_equal(seen[0][0], fit_reference(wide, 32, "pad"))
    assert np.array_equal(seen[1][1], fit_reference(photo(30, 10), 32, "pad"))
    assert not np.array_equal(seen[0][0], fit_reference(wide, 32, "squash"))

    reader = ShardReader(world.settings(tmp_path).dataset, "validation")
    check_fits(run, reader)
    squares = {**reader.info.settings, "references": {"resize": "published"}}
    reader.info = reader.info.model_copy(update={"settings": squares})
    with pytest.raises(InputError, match="references are stored squashed to squares"):
        check_fits(run, reader)


def test_evaluation_and_demo_run(world: World, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    common = ["--model", str(folder), "--dataset", str(world.dataset), "--steps", "2", "--count", "4"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *common, "--batch", "3", "--out", str(tmp_path / "scores.json")])
    evaluate.main()
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["trained_on"] is False
    scores = written["scores"]
    assert {row: score["count"] for row, score in scores.items()} == {
        "own": 4,
        "another": 4,
        "both": 8,
        "real view": 4,
        "VAE reconstruction": 4,
    }
    shown = capsys.readouterr()
    assert "95 % interval" in shown.out
    assert "judge: the encoder" in shown.out
    assert "warning" not in shown.err
    monkeypatch.setattr(sys, "argv", ["demo", *common, "--out", str(tmp_path / "demo.png")])
    demo.main()
    assert Image.open(tmp_path / "demo.png").width == 4 * 166 + 6
