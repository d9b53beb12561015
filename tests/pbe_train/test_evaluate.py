"""The program `evaluate`: rows, scores and files, end to end on a small world; what it takes and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pbe_core.errors import InputError
from pbe_core.judges.judge import load_judge
from pbe_train import evaluate
from pbe_train.evaluation import features, program
from pbe_train.evaluation.features import PART, extract, read_features, through_codec
from pbe_train.evaluation.results import Evaluation, read_evaluation
from pbe_train.evaluation.summary import wilson
from tests.conftest import call_program
from tests.pbe_train.pair_worlds import make_cocoee
from tests.pbe_train.small_world import World

QUICK = ("--steps", "2", "--replicates", "20", "--threads", "2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights that takes 224 px, as the published one."""
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_dataset(world: World, run_folder: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the run on the world's validation split, judged by a CLIP."""
    out = tmp_path_factory.mktemp("evaluation")
    done = call_program(evaluate.main, *options(world, run_folder, out), "--judge", f"clip={clip}")
    assert done.returncode == 0, done.stderr
    return out


def options(world: World, run: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(run), "--dataset", str(world.dataset), "--out", str(out), *QUICK, *more]


def row(result: Evaluation, name: str) -> dict[str, float | None]:
    found = next(each for each in result.rows if each.name == name)
    return {score: value.value for score, value in found.scores.items()}


def test_rows_bound_the_models_and_every_score_has_its_interval_and_count(of_dataset, run_folder):
    result = read_evaluation(of_dataset)
    assert [each.name for each in result.rows] == [run_folder.name, "copy-paste", "real view", "VAE reconstruction"]
    assert result.count == len(result.pairs) > 8
    of_sets, of_pairs = {"KID (clip)", "CMMD (clip)", "FD (clip)"}, {"CLIP score", "CLIP-I", "recognised (clip)"}
    for each in result.rows:
        assert set(each.set_scores) == (set() if each.name == "real view" else of_sets)
        assert set(each.pair_scores) == {*of_pairs, "copying", "seam", "PSNR outside"}
        for name, value in each.scores.items():
            assert value.count == (4 if name == "copying" else result.count), "four have another of their label"
            assert value.infinite or value.low <= value.value <= value.high, name
    copied = row(result, "copy-paste")
    assert copied["copying"] == pytest.approx(1)
    assert copied["copying"] > row(result, "real view")["copying"]
    assert next(each for each in result.rows if each.name == run_folder.name).pair_scores["PSNR outside"].infinite
    assert row(result, "real view")["seam"] == 0
    assert {len(rows) for rows in result.per_class.values()} == {4}
    assert result.independent == {"clip": True}
    page = (of_dataset / "index.html").read_text()
    assert "VAE reconstruction" in page
    assert "data:image" in page


def test_started_again_nothing_is_painted_or_looked_at_again(world, run_folder, clip, of_dataset, tmp_path, monkeypatch):
    out = shutil.copytree(of_dataset, tmp_path / "again", copy_function=shutil.copy2)
    (out / "evaluation.json").unlink()
    monkeypatch.setattr(features, "_see", lambda *_: pytest.fail("looked again"))
    done = call_program(evaluate.main, *options(world, run_folder, out), "--judge", f"clip={clip}")
    assert done.returncode == 0, done.stderr
    assert (out / "evaluation.json").read_bytes() == (of_dataset / "evaluation.json").read_bytes()
    assert not list(out.rglob("*.tmp"))


def test_pictures_of_another_program_are_scored_by_the_same_ruler(world, run_folder, clip, of_dataset, tmp_path):
    """The run's own pictures, as if somebody else had painted them, and an earlier result beside them."""
    given = ["--pictures", f"theirs={of_dataset / 'pictures' / run_folder.name}", "--dataset", str(world.dataset), *QUICK]
    done = call_program(evaluate.main, *given, "--judge", f"clip={clip}", "--out", str(tmp_path), "--beside", str(of_dataset))
    assert done.returncode == 0, done.stderr
    assert row(read_evaluation(tmp_path), "theirs") == row(read_evaluation(of_dataset), run_folder.name)
    assert "theirs" in done.stdout
    assert run_folder.name in (tmp_path / "index.html").read_text()
    done = call_program(evaluate.main, *given, "--codec", "jpeg:90", "--out", str(tmp_path), "--beside", str(of_dataset))
    assert done.returncode == 2
    assert "codec: jpeg:90 / png" in done.stderr


def test_results_alone_are_shown_together(of_dataset, tmp_path):
    done = call_program(
        evaluate.main, "--beside", str(of_dataset), str(of_dataset / "evaluation.json"), "--out", str(tmp_path / "o")
    )
    assert done.returncode == 0, done.stderr
    assert "(result 2)" in done.stdout
    assert "(result 2)" in (tmp_path / "o" / "index.html").read_text()
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["index.html"]


def test_without_a_judge_the_conditioner_judges_and_is_called_so(world, run_folder, tmp_path):
    """Also with another label's references, and all checkpoints of a run."""
    given = ["--checkpoints", str(run_folder), "--dataset", str(world.dataset), "--out", str(tmp_path), *QUICK]
    done = call_program(evaluate.main, *given, "--count", "12", "--references", "another")
    assert done.returncode == 0, done.stderr
    result = read_evaluation(tmp_path)
    assert result.independent == {"conditioner": False}
    assert next((each.name, each.step) for each in result.rows) == ("step 2", 2)
    assert any("fewer than 8" in note for note in result.notes), "twelve references show fewer labels"
    assert any("--judge clip=" in note for note in result.notes)


def test_the_conditioners_weights_are_recognised_under_another_name(world, run_folder, tmp_path, of_dataset):
    """A CLIP that holds the run's own encoder is no independent judge, whatever it is called."""
    from transformers import CLIPVisionModel

    encoder = CLIPVisionModel.from_pretrained(world.encoder)
    wrapped = CLIPVisionModelWithProjection(encoder.config)
    wrapped.vision_model.load_state_dict(
        encoder.vision_model.state_dict() if hasattr(encoder, "vision_model") else encoder.state_dict()
    )
    wrapped.save_pretrained(tmp_path / "clip")
    judge = load_judge(f"other:clip={tmp_path / 'clip'}")
    sha256 = json.loads((of_dataset / "pictures" / run_folder.name / "recipe.json").read_text())["encoder_sha256"]
    assert not program.is_independent(judge, [program.Painted("one", tmp_path, encoder_sha256=sha256)])
    assert program.is_independent(judge, [program.Painted("one", tmp_path, encoder_sha256="0" * 64)])


def test_parts_are_made_once_and_the_same_by_any_number_of_processes(tmp_path):
    """A part that is cut short is made anew."""
    count = 2 * PART + 3

    def look(number: int) -> dict[str, np.ndarray]:
        return {"pixels/number": np.array(float(number))}

    extract(look, count, [], tmp_path / "one", threads=2)
    for rank in range(3):
        extract(look, count, [], tmp_path / "three", threads=1, rank=rank, world=3)
    assert [features.share_of(count, rank, 3) for rank in range(3)] == [PART, PART, 3]
    assert read_features(tmp_path / "one", count)["pixels/number"].tolist() == list(range(count))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    second = tmp_path / "one" / "00001.npz"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"00001.npz.* run the same command again"):
        read_features(tmp_path / "one", count)
    asked: list[int] = []
    extract(lambda number: asked.append(number) or look(number), count, [], tmp_path / "one", threads=1)
    assert sorted(asked) == list(range(PART, 2 * PART))
    assert second.read_bytes() == whole


def test_both_sides_pass_one_codec():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    assert through_codec(picture, "png") is picture
    errors = [np.abs(through_codec(picture, f"jpeg:{quality}").astype(int) - picture).mean() for quality in (30, 95)]
    assert 0 < errors[1] < errors[0]
    for codec in ("jpeg", "jpeg:0", "jpeg:101", "webp:90", "png:1"):
        with pytest.raises(InputError, match="codec"):
            through_codec(picture, codec)


def test_wilson_intervals():
    """Against published values: 8 of 10 and 0 of 20 (Newcombe 1998, formula 3)."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "m"], "--pairs"),
        (["--model", "m", "--pairs", "p", "--dataset", "d"], "one of --pairs"),
        (["--pairs", "p"], "--model"),
        (["--pairs", "p", "--model", "m", "--steps", "0"], "--steps 0"),
        (["--pairs", "p", "--model", "m", "--out", "x.json"], "folder"),
        (["--pairs", "nowhere", "--model", "m"], "nowhere"),
        (["--pairs", "p", "--model", "m", "--codec", "gif"], "codec"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, given, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    done = call_program(evaluate.main, "--out", str(tmp_path / "out"), *given)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_shows_defaults_where_there_are_any():
    told = " ".join(call_program(evaluate.main, "--help").stdout.split())
    assert "denoising steps (default: 25)" in told
    assert "resamples (default: 0)" in told
    assert not re.search(r"default: (None|True|False|\[|\{)", told)


def test_rows_that_were_painted_alike_share_a_note():
    rows = [program.Painted(name, Path("x"), note=note) for name, note in (("a", "2 steps"), ("b", "3 steps"), ("c", "2 steps"))]
    assert program.notes_of(rows) == ["a, c: 2 steps", "b: 3 steps"]


def test_pairs_that_cannot_be_read_are_told_before_anything_is_painted(run_folder, tmp_path):
    pairs = make_cocoee(tmp_path / "pairs", range(1, 5))
    (pairs / "GT_4" / "000000000002_GT.png").write_bytes(b"no picture")
    done = call_program(evaluate.main, "--model", str(run_folder), "--pairs", str(pairs), "--out", str(tmp_path / "out"), *QUICK)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pair 000000000002: ")
    assert "000000000002_GT.png" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_pair_has_no_distance_and_says_so(world, run_folder, tmp_path):
    done = call_program(evaluate.main, *options(world, run_folder, tmp_path, "--count", "1"))
    assert done.returncode == 2
    assert "two" in done.stderr


def test_a_judge_whose_features_are_no_numbers_is_named(world, run_folder, tmp_path, clip):
    tensors = CLIPVisionModelWithProjection.from_pretrained(clip).state_dict()
    broken = shutil.copytree(clip, tmp_path / "clip")
    save_file(
        {name: value.fill_(3e38) if "visual_projection" in name else value for name, value in tensors.items()},
        broken / "model.safetensors",
        {"format": "pt"},
    )
    done = call_program(evaluate.main, *options(world, run_folder, tmp_path / "out"), "--judge", f"clip={broken}")
    assert done.returncode == 2
    assert "judge clip" in done.stderr


def test_real_photos_are_squares_of_the_pairs_size(world, run_folder, tmp_path, clip):
    """As the published test makes them of COCO's."""
    random, real = np.random.default_rng(1), tmp_path / "real"
    real.mkdir()
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (50 + number, 70, 3), np.uint8)).save(real / f"{number}.jpg")
    (real / "2.jpg").rename(real / "2.JPEG")
    (real / "inside").mkdir()
    (real / "3.jpg").rename(real / "inside" / "3.jpg")
    (real / "._4.jpg").write_bytes(b"no photo, but what a program left beside one")
    out = tmp_path / "out"
    given = ["--judge", f"clip={clip}", "--real", str(real), "--extrapolate"]
    done = call_program(evaluate.main, *options(world, run_folder, out), *given)
    assert done.returncode == 0, done.stderr
    result = read_evaluation(out)
    assert "5 photos" in result.recipe["real set"]
    assert "short side to 32 px" in result.recipe["real set"]
    assert {"KID (clip)", "FD∞ (clip)"} <= row(result, "real view").keys()
