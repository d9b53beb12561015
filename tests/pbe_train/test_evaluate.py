"""The program `evaluate`: rows, scores and files, end to end on a small world; what it takes and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.mixture import GaussianMixture
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pbe_core.errors import InputError
from pbe_core.judges.judge import load_judge
from pbe_train import evaluate
from pbe_train.evaluation import features, painting, program
from pbe_train.evaluation import rows as rows_module
from pbe_train.evaluation.features import PART, extract, read_features, through_codec
from pbe_train.evaluation.pair_sets import draw_alike, draw_candidates, open_pairs
from pbe_train.evaluation.quality import Mixture, fit_mixture
from pbe_train.evaluation.results import Evaluation, differing_recipes, read_evaluation
from pbe_train.evaluation.summary import Question, wilson
from pbe_train.model.sampling import STEPS
from tests.conftest import call_program
from tests.pbe_train.pair_worlds import box, make_cocoee, picture, write_csv
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
    assert not rows_module.is_independent(judge, [rows_module.Painted("one", tmp_path, encoder_sha256=sha256)])
    assert rows_module.is_independent(judge, [rows_module.Painted("one", tmp_path, encoder_sha256="0" * 64)])


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
    for codec in ("jpeg", "jpeg:0", "jpeg:101", "jpeg:٩٠", "webp:90", "png:1"):
        with pytest.raises(InputError, match="codec"):
            through_codec(picture, codec)


def test_wilson_intervals():
    """Against published values: 8 of 10 and 0 of 20 (Newcombe 1998, formula 3)."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("given", ["[1]", "{", "3", "null"])
def test_storage_is_an_object(given):
    done = call_program(evaluate.main, "--dataset", "d", "--model", "m", "--out", "o", "--storage", given)
    assert done.returncode == 2
    assert "not a JSON object of options" in done.stderr


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
    assert f"denoising steps (default: {STEPS})" in told
    assert "resamples (default: 0)" in told
    assert not re.search(r"default: (None|True|False|\[|\{)", told)


def test_rows_that_were_painted_alike_share_a_note():
    rows = [
        rows_module.Painted(name, Path("x"), note=note) for name, note in (("a", "2 steps"), ("b", "3 steps"), ("c", "2 steps"))
    ]
    assert rows_module.notes_of(rows) == ["a, c: 2 steps", "b: 3 steps"]


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


def of_files(pairs: Path, pictures: Path, out: Path, *more: str) -> Evaluation:
    """The result for pictures of another program."""
    given = ["--pairs", str(pairs), "--pictures", f"theirs={pictures}", "--out", str(out), *QUICK, *more]
    done = call_program(evaluate.main, *given)
    assert done.returncode == 0, done.stderr
    return read_evaluation(out)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Ten pairs of two labels, and pictures that another program has painted for them; stored PNGs, all of one length."""
    pairs = make_cocoee(tmp_path / "pairs", range(1, 11))
    label(pairs, {number: "even" if number % 2 == 0 else "odd" for number in range(1, 11)})
    for number in range(1, 11):
        store(tmp_path / "theirs" / f"{number:012d}.png", picture(number + 50))
    return pairs, tmp_path / "theirs"


def label(pairs: Path, labels: dict[int, str]) -> None:
    write_csv(pairs / "pairs.csv", "id, label", [(str(number), name) for number, name in labels.items()])


def store(path: Path, array: np.ndarray) -> None:
    """Write a picture whose file has the same length and time whatever it shows."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, compress_level=0)
    os.utime(path, (10**9, 10**9))


def reorder(pairs: Path, theirs: Path, real: Path) -> None:
    np.save(pairs / "id_list.npy", np.load(pairs / "id_list.npy")[::-1])


def relabel(pairs: Path, theirs: Path, real: Path) -> None:
    label(pairs, dict.fromkeys(range(1, 11), "one"))


def repaint(pairs: Path, theirs: Path, real: Path) -> None:
    store(theirs / "000000000003.png", picture(99))


def exchange_real(pairs: Path, theirs: Path, real: Path) -> None:
    store(real / "0.png", picture(98))


@pytest.mark.parametrize("change", [reorder, relabel, repaint, exchange_real])
def test_what_was_looked_at_before_is_never_stale(change, files, clip, tmp_path):
    """Each leaves names, lengths and times of files, and the first two the set's fingerprint, as they were."""
    for number in range(4):
        store(tmp_path / "real" / f"{number}.png", picture(number + 80))
    more = ["--judge", f"clip={clip}", "--real", str(tmp_path / "real")]
    before = of_files(*files, tmp_path / "out", *more)
    change(*files, tmp_path / "real")
    again, fresh = (of_files(*files, tmp_path / out, *more) for out in ("out", "fresh"))
    assert again == fresh
    assert again.rows != before.rows or change is reorder
    if change is reorder:
        assert [one.scores for one in again.pairs[::-1]] == [one.scores for one in before.pairs]


def test_a_seed_of_painting_leaves_the_ruler_as_it_is(files, clip, tmp_path):
    """Who is compared with whom is the same for all seeds, so that models painted with several stand side by side."""
    first, second = (of_files(*files, tmp_path / seed, "--judge", f"clip={clip}", "--seed", seed) for seed in ("0", "7"))
    assert first.pairs == second.pairs


def test_results_of_other_labels_or_mixtures_stand_in_no_table(files, clip, tmp_path):
    pairs, theirs = files
    first = of_files(*files, tmp_path / "first", "--judge", f"clip={clip}")
    assert first.recipe["labels"].startswith("2 classes, ")
    assert first.independent == {}, "nobody knows what conditions another program"
    label(pairs, {})
    second = of_files(*files, tmp_path / "second", "--judge", f"clip={clip}")
    assert differing_recipes([first, second]) == [], "without labels there are no scores that depend on them"
    relabel(*files, tmp_path)
    given = ["--pairs", str(pairs), "--pictures", str(theirs), "--out", str(tmp_path / "out"), *QUICK]
    done = call_program(evaluate.main, *given, "--beside", str(tmp_path / "first"))
    assert done.returncode == 2
    assert "labels: 1 class, " in done.stderr
    one, other = (first.model_copy(update={"recipe": {**first.recipe, "mixture": mark}}) for mark in ("a", "b"))
    assert differing_recipes([one, first]) == []
    assert differing_recipes([one, other]) == ["mixture: a / b"]


def test_the_quality_score_is_of_the_first_clip_and_its_mixture_is_in_the_recipe(clip, tmp_path):
    """Fitted where there is no file, and read where there is: the same numbers, as scikit-learn's class has them."""
    pairs = make_cocoee(tmp_path / "pairs", range(1, 42))
    shown = [picture(number if number % 2 else number + 50) for number in range(1, 42)]  # Half of them are the photos.
    for number, one in enumerate(shown, 1):
        store(tmp_path / "theirs" / f"{number:012d}.png", one)
    more = ["--judge", f"a:clip={clip}", f"b:clip={clip}", "--mixture", str(tmp_path / "mixture.npz")]
    fitted = of_files(pairs, tmp_path / "theirs", tmp_path / "out", *more)
    assert of_files(pairs, tmp_path / "theirs", tmp_path / "out", *more) == fitted
    mixture = Mixture.load(tmp_path / "mixture.npz")
    assert fitted.recipe["mixture"] == mixture.mark
    theirs = GaussianMixture(20, covariance_type="full")
    theirs.weights_, theirs.means_, theirs.precisions_cholesky_ = mixture.weights, mixture.means, mixture.precisions
    seen = load_judge(f"clip={clip}").features(shown)
    published = [min(max(value / 300, 0), 1) for value in theirs.score_samples(seen.astype(np.float64))]
    assert row(fitted, "theirs")["QS"] == pytest.approx(100 * np.mean(published), abs=1e-5)
    assert 1 < row(fitted, "theirs")["QS"] < row(fitted, "real view")["QS"], "the photos bound it"
    assert fitted.rows[0].scores["QS"].count == 41


def test_the_clip_score_is_the_published_scripts(files, clip, tmp_path):
    """Through the whole program, on shared random weights: transformers' model, the script's steps in plain torch."""
    from tests.pbe_train.test_pair_scores import published_pictures

    pairs, theirs = files
    network = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    scores = []
    for number in range(1, 11):
        shown = published_pictures(picture(number + 50), box(number) == 255, picture(number + 1000, 30, 24))
        with torch.no_grad():
            result, reference = (network(pixel_values=torch.from_numpy(one)[None]).image_embeds for one in shown)
        result, reference = (one / one.norm(dim=-1, keepdim=True) for one in (result, reference))
        scores.append(float((100 * result * reference).sum()))
    found = of_files(pairs, theirs, tmp_path / "out", "--judge", f"clip={clip}", "--codec", "jpeg:80")
    assert [one.scores["theirs"]["CLIP score"] for one in found.pairs] == pytest.approx(scores, abs=1e-3)
    assert row(found, "theirs")["CLIP score"] == pytest.approx(np.mean(scores), abs=1e-4)


def test_few_pairs_have_no_extrapolated_distance(clip, tmp_path):
    pairs = make_cocoee(tmp_path / "pairs", range(1, 4))
    for number in range(1, 4):
        store(tmp_path / "theirs" / f"{number}.png", picture(number + 50))
    result = of_files(pairs, tmp_path / "theirs", tmp_path / "out", "--judge", f"clip={clip}", "--extrapolate")
    assert {"KID (clip)", "FD (clip)"} <= row(result, "theirs").keys()
    assert "FD∞ (clip)" not in row(result, "theirs")


def test_a_part_with_flipped_bits_is_made_anew(tmp_path):
    """Whatever byte it is: the part is the same, or is not taken."""
    path = features._part_file(tmp_path, 0)
    extract(lambda number: {"pixels/a": np.array(number), "pixels/b": np.array(0.5)}, 3, [], tmp_path, threads=1)
    whole, same = path.read_bytes(), read_features(tmp_path, 3)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        found = features._read_part(tmp_path, 0, 3)
        assert found is None or {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in same.items()
        }


@pytest.mark.parametrize(
    ("out", "names", "told"),
    [
        ("file", ["a"], "no folder can be made there"),
        ("file/below", ["a"], "no folder can be made there"),
        ("x" * 300, ["a"], "no folder can be made there"),
        ("taken", ["a"], "is a folder, and a file is to be written there"),
        ("new", ["x" * 200], "no name for a folder"),
        ("new", ["."], "no name for a folder"),
        ("new", ["a b", "A-b"], "would share the folder"),
    ],
)
def test_results_that_cannot_be_written_are_told_first(files, tmp_path, out, names, told):
    pairs, theirs = files
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "evaluation.json").mkdir(parents=True)
    given = ["--pairs", str(pairs), "--pictures", *(f"{name}={theirs}" for name in names)]
    done = call_program(evaluate.main, *given, "--out", str(tmp_path / out), *QUICK)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_wrong_with_a_question_is_told_before_painting(run_folder, files, clip, tmp_path):
    """Real photos, a mixture, an earlier result: hours later would be too late."""
    earlier = of_files(*files, tmp_path / "earlier", "--codec", "jpeg:90")
    assert earlier.recipe["codec"] == "jpeg:90"
    given = ["--model", str(run_folder), "--pairs", str(files[0]), "--out", str(tmp_path / "out"), *QUICK]
    for more, told in (
        (["--real", str(tmp_path / "nowhere")], "no such folder of real photos"),
        (["--mixture", str(tmp_path / "mixture.npz")], "QS needs CLIP's features"),
        (["--beside", str(tmp_path / "earlier")], "codec: png / jpeg:90"),
    ):
        done = call_program(evaluate.main, *given, *more)
        assert done.returncode == 2
        assert told in done.stderr
        assert not (tmp_path / "out").exists()


def test_mixtures_that_no_score_can_come_of_are_told_before_painting(clip, tmp_path):
    judges, path = [load_judge(f"clip={clip}")], tmp_path / "mixture.npz"
    program.check_mixture(path, judges, 40)
    for place in (tmp_path, tmp_path / "nowhere" / "mixture.npz"):
        with pytest.raises(InputError, match="no file can be written there"):
            program.check_mixture(place, judges, 40)
    with pytest.raises(InputError, match="39 real pictures are too few"):
        program.check_mixture(path, judges, 39)
    fit_mixture(np.random.default_rng(0).standard_normal((40, 5)), 0).save(path)
    with pytest.raises(InputError, match=r"mixture.npz: of features of 5 numbers, and clip has 8"):
        program.check_mixture(path, judges, 40)
    path.write_bytes(b"pickle")
    with pytest.raises(InputError, match="no Gaussian mixture"):
        program.check_mixture(path, judges, 40)
    with pytest.raises(InputError, match="QS needs CLIP"):
        program.check_mixture(path, [], 40)


def test_what_is_asked_reaches_who_paints_and_who_scores(run_folder, files, clip, tmp_path, monkeypatch):
    """Options are in recipes, of the VAE's row, too; pairs are compared with those that were drawn, and drawn together."""
    asked, others, hows = [], [], []
    edit = painting.edit
    monkeypatch.setattr(painting, "edit", lambda *given, **more: hows.append(given[5]) or edit(*given, **more))
    monkeypatch.setattr(program, "Question", lambda **given: asked.append(given) or Question(**given))
    look = program.look_at_row
    monkeypatch.setattr(program, "look_at_row", lambda *given: others.append(given[2]) or look(*given))
    given = [
        "--checkpoints",
        str(run_folder),
        "--pairs",
        str(files[0]),
        "--out",
        str(tmp_path / "out"),
        "--judge",
        f"clip={clip}",
    ]
    how = ["--no-blend", "--window", "region", "--size", "64", "--guidance", "2", "--seed", "5", "--scheduler", "DDIMScheduler"]
    how += ["--reuse", "2", "--guidance-interval", "0", "0.8"]
    done = call_program(evaluate.main, *given, *how, *QUICK)
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "out" / "pictures" / "step-2" / "recipe.json").read_text())
    wanted = {"blend": False, "window": "region", "size": 64, "guidance": 2, "seed": 5, "scheduler": "DDIMScheduler", "steps": 2}
    assert {(one.steps, one.scheduler, one.guidance, one.guidance_interval, one.reuse) for one in hows} == {
        (2, "DDIMScheduler", 2.0, (0.0, 0.8), 2)
    }
    wanted |= {"reuse": 2, "guidance_interval": [0, 0.8]}
    assert {name: recipe[name] for name in wanted} == wanted
    (reconstructed,) = (tmp_path / "out" / "pictures").glob("vae-*/recipe.json")
    assert {"size": 64, "window": "region"}.items() <= json.loads(reconstructed.read_text()).items()
    pairs = open_pairs(files[0]).pairs
    assert others == [draw_alike(pairs, 0)] * 4
    assert [one["paired"] for one in asked] == [True]
    assert next(each for each in read_evaluation(tmp_path / "out").rows if each.name == "step 2").model == str(run_folder)
    label(files[0], {number: str(number) for number in range(1, 11)})
    of_files(*files, tmp_path / "of eight labels", "--real", str(files[1]))
    assert asked[-1]["candidates"] == draw_candidates(open_pairs(files[0]).pairs, 0)
    assert not asked[-1]["paired"]


def test_scores_on_what_a_model_was_trained_on_are_warned_of(world, run_folder, tmp_path, monkeypatch):
    """The split that is asked is taken for the training's, as few builds keep views of that."""
    monkeypatch.setattr("pbe_train.evaluation.pair_sets.TRAIN_SPLIT", "validation")
    done = call_program(evaluate.main, *options(world, run_folder, tmp_path, "--count", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was trained on these samples") == 1


def test_names_of_any_script_have_folders_of_their_own():
    assert len({rows_module.file_name(name) for name in ("甲", "乙", "..", "step 1,000")}) == 4
    assert rows_module.file_name("step 1,000") == "step-1-000"
    rows_module.check_folders(["甲", "乙"])
