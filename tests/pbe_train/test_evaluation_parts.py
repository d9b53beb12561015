"""Who is shown what, and what scores are called: parts of an evaluation whose mistakes would look like scores.

Judges here are shown pictures and keep them: a judge's `prepare` returns the picture's size, mean and spread.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.images.crop import Window
from pbe_core.judges.judge import Judge, JudgeIdentity
from pbe_core.judges.loading import LoadedNetwork
from pbe_train.data.references import fit_reference
from pbe_train.editing.paint_by_example import PaintByExample
from pbe_train.evaluation import program
from pbe_train.evaluation import rows as rows_module
from pbe_train.evaluation.conditioner_judge import conditioner_judge
from pbe_train.evaluation.features import Row, extract, look_at_real, look_at_references, look_at_row, through_codec
from pbe_train.evaluation.painting import picture_path, real_view, view_window
from pbe_train.evaluation.pair_scores import copying, cut_region, psnr_outside, published_clip_pictures, seam
from pbe_train.evaluation.pair_sets import open_pairs
from pbe_train.evaluation.real_photos import central_square, open_real_photos
from pbe_train.evaluation.results import RowScores
from pbe_train.evaluation.summary import (
    Question,
    by_group,
    frechet_name,
    means,
    score_row,
    scores_of_pairs,
    scores_of_sets,
    sizes_of,
)
from tests.pbe_train.pair_worlds import make_rows, picture, save, write_jsonl

JPEG = "jpeg:60"


def shown(picture: AnyPhoto) -> np.ndarray:
    """What a judge of this test keeps of a picture."""
    numbers = np.array([*picture.shape[:2], picture.astype(float).mean(), picture.astype(float).std()], np.float32)
    return np.broadcast_to(numbers.reshape(2, 2), (3, 2, 2))


def judge(kind: str, name: str = "", size: int = 224) -> Judge:
    identity = JudgeIdentity(name=name or kind, kind=kind, source="", sha256="", input_size=size, preparation="", width=4)  # type: ignore[arg-type]
    return Judge(identity, LoadedNetwork(nn.Identity(), shown, "", size, 4, ""), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory):
    """Three pairs with truths, of which two are of one label."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{**row, "label": label} for row, label in zip(make_rows(folder, range(1, 4)), "aab", strict=True)]
    return open_pairs(write_jsonl(folder / "pairs.jsonl", rows))


def test_judges_see_rows_after_the_codec_and_pixel_scores_before_it(pairs):
    judges = [judge("clip"), judge("clip", "large", 336), judge("dinov2"), judge("inception-clean")]
    given, painted = pairs.read(0), picture(77)
    row = Row("painted", "", lambda _, __: painted)
    looks = look_at_row(row, pairs, [1, 0, None], judges, JPEG)(0)
    coded = through_codec(painted, JPEG)
    assert not np.array_equal(coded, painted)
    for name in ("clip", "large", "dinov2", "inception-clean"):
        assert looks[f"whole/{name}"] == pytest.approx(shown(coded))
    for name in ("clip", "large", "dinov2"):
        assert looks[f"region/{name}"] == pytest.approx(shown(cut_region(coded, given.mask)))
    assert "region/inception-clean" not in looks, "its cosines say nothing of objects"
    assert np.array_equal(looks["published/clip"], published_clip_pictures(painted, given.mask, given.reference)[0])
    assert not {"published/large", "published/dinov2"} & looks.keys(), "the published score is of 224 px"
    assert looks["pixels/PSNR outside"] == psnr_outside(given.photo, painted, given.mask), "beside the photo, not the truth"
    assert looks["pixels/seam"] == seam(given.photo, painted, given.mask)
    assert looks["pixels/copying"] == copying(painted, given.mask, given.reference, pairs.read(1).reference)
    assert np.isnan(look_at_row(row, pairs, [1, 0, None], judges, "png")(2)["pixels/copying"])


def test_judges_see_references_and_real_photos_after_the_codec(pairs, tmp_path):
    given = pairs.read(1)
    looks = look_at_references(pairs, [judge("clip"), judge("inception-legacy")], JPEG)(1)
    assert looks["region/clip"] == pytest.approx(shown(through_codec(given.reference, JPEG)))
    assert np.array_equal(looks["published/clip"], published_clip_pictures(given.photo, given.mask, given.reference)[1])
    assert "region/inception-legacy" not in looks
    for number in range(2):
        save(tmp_path / f"{number}.png", picture(number))
    looks = look_at_real(open_real_photos(tmp_path, None), [judge("dinov2")], JPEG)(1)
    assert looks["whole/dinov2"] == pytest.approx(shown(through_codec(picture(1), JPEG)))


def test_jpegs_are_as_cameras_write_them():
    """4:2:0: colour at half the resolution, so stripes of one pixel of one brightness lose their colours."""
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (150, 60, 60), (60, 106, 60)
    assert np.ptp(through_codec(stripes, "jpeg:95")[4:-4, 4:-4, 0].astype(int)) < 30


def test_rows_are_what_they_are_called(pairs, tmp_path):
    given = pairs.read(0)
    made = {row.name: row.make(pairs.pairs[0], given) for row in rows_module.rows_of(pairs, [], None)}
    assert list(made) == ["copy-paste", "nothing painted", "real view"]
    assert np.array_equal(made["nothing painted"], given.photo)
    assert np.array_equal(made["real view"], given.truth)
    assert np.array_equal(real_view(given), given.truth)
    assert not np.array_equal(given.photo, given.truth)
    assert made["copy-paste"][~given.mask].tolist() == given.photo[~given.mask].tolist()
    assert program._common_size(pairs) is None, "they are no squares"
    save(tmp_path / "12.png", picture(0))
    assert picture_path(tmp_path, "000000000012") == tmp_path / "12.png"
    with pytest.raises(InputError, match="there is no picture 012"):
        picture_path(tmp_path, "012")


def test_sizes_in_common(tmp_path):
    rows = make_rows(tmp_path, range(2), truth=False)
    for row in rows:
        save(tmp_path / row["photo"], picture(0, 40, 40))
    assert program._common_size(open_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))) == 40
    save(tmp_path / rows[1]["photo"], picture(0, 48, 48))
    assert program._common_size(open_pairs(tmp_path / "pairs.jsonl")) is None


def test_the_whole_of_a_square_photo_is_the_view():
    mask = np.zeros((64, 64), bool)
    mask[20:30, 40:50] = True
    shape = (64, 64)
    assert view_window(mask, "whole", shape) == Window(0, 0, 64)
    assert view_window(mask, "region", shape) != Window(0, 0, 64)
    assert view_window(mask[:60], "whole", shape) == view_window(mask[:60], "region", shape)
    # Of views that are not square, a photo of their aspect.
    assert view_window(mask[:32], "whole", (128, 64)) == Window(0, 0, 64, 32)


def question(pairs, judges, features, real, **more) -> Question:
    given = {"candidates": None, "paired": True, "seed": 0, "replicates": 40, **more}
    return Question(pairs=pairs, judges=judges, references=features, real=real, **given)


def test_scores_have_the_names_and_scales_of_the_field(pairs):
    """Cosines by hand; a judge of a name of its own is never called as the field calls its kind."""
    assert [frechet_name(kind, kind) for kind in ("inception-clean", "inception-legacy", "dinov2", "clip")] == [
        "FID (clean)",
        "FID (legacy)",
        "FD-DINOv2",
        "FD (clip)",
    ]
    assert frechet_name("inception-clean", "mine") == "FD (mine)"
    judges = [judge("clip"), judge("clip", "large"), judge("mobilenet")]
    region, reference = np.array([[3, 4], [0, 2], [0, 0]], np.float32), np.array([[1, 0], [0, -5], [1, 1]], np.float32)
    pixels = {f"pixels/{name}": np.array([0.1, 0.2, np.nan]) for name in ("copying", "seam", "PSNR outside")}
    seen = {f"{what}/{one.identity.name}": region for what in ("region", "published") for one in judges} | pixels
    references = dict.fromkeys(seen, reference)
    candidates = [(0, 1), (1, 0), ()]
    scores = scores_of_pairs(question(pairs, judges, references, seen, candidates=candidates), seen)
    expected = np.array([0.6, -1, np.nan])
    for name in ("CLIP-I", "CLIP-I (large)", "mobilenet-I"):
        assert scores[name] == pytest.approx(expected, nan_ok=True)
    assert scores["CLIP score"] == pytest.approx(100 * expected, nan_ok=True)
    assert scores["recognised (clip)"] == pytest.approx(np.array([1, 0, np.nan]), nan_ok=True), "without a label nobody asks"
    assert means(scores, 0)["CLIP-I"].count == 2


def test_psnrs_are_averaged_as_errors():
    """Infinite where all are; one picture that is touched ends that. The interval's ends are in their order."""
    values = np.array([math.inf, 20.0, 40.0, 30.0] * 8)
    found = means({"PSNR outside": values}, 0)["PSNR outside"]
    assert found.value == pytest.approx(-10 * math.log10(np.mean(10 ** (-values / 10))))
    assert found.low < found.value < found.high
    assert means({"PSNR outside": np.full(5, math.inf)}, 0)["PSNR outside"].infinite


def test_pairs_that_belong_together_are_drawn_together(pairs):
    """Of pictures that are nearly the real ones a distance is far surer than of strangers; and the real ones have none."""
    random = np.random.default_rng(0)
    real = {"whole/clip": random.standard_normal((60, 4)) * 3, "pixels/area": np.full(60, 0.1)}
    near = {
        "whole/clip": real["whole/clip"] + random.standard_normal((60, 4)) * 0.1 + 0.3,
        "pixels/area": real["pixels/area"] + 0,
    }
    together, apart = (
        scores_of_sets(question(pairs, [judge("clip")], {}, real, paired=paired), near) for paired in (True, False)
    )
    for name in ("KID (clip)", "FD (clip)"):
        assert together[name].high - together[name].low < 0.5 * (apart[name].high - apart[name].low)
    pixels = {f"pixels/{name}": np.ones(60) for name in ("copying", "seam", "PSNR outside")}
    asked = question(pairs, [judge("clip")], {}, real | pixels)
    assert score_row(asked, "real view", asked.real, {}).set_scores == {}
    assert {"KID (clip)", "CMMD (clip)", "FD (clip)"} == score_row(asked, "near", near | pixels, {}).set_scores.keys()


def test_groups_are_of_pairs_that_have_one():
    rows = {"row": {"seam": np.array([1.0, 3.0, 10.0, 20.0])}}
    found = by_group(rows, ["a", "b", "a", ""], 0)
    assert {name: one.pair_scores["seam"].value for name, (one,) in found.items()} == {"a": 5.5, "b": 3.0}
    assert all(isinstance(one, RowScores) for (one,) in found.values())
    assert sizes_of(np.array([0.01, 0.05, 0.19, 0.2, 1.0])) == ["small", "medium", "medium", "large", "large"]


@pytest.mark.parametrize("size", [(50, 71), (71, 50), (50, 74), (74, 50), (33, 33), (99, 64)])
def test_real_photos_are_cut_as_torchvision_cuts_them(size, tmp_path):
    """Resize(size) and CenterCrop(size) on a PIL picture, as the published script has them, in their own arithmetic."""
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    height, width = size
    long = int(32 * max(size) / min(size))
    wide, tall = (long, 32) if width >= height else (32, long)
    resized = np.asarray(Image.fromarray(photo).resize((wide, tall), Image.Resampling.BILINEAR))
    top, left = round((tall - 32) / 2.0), round((wide - 32) / 2.0)
    expected = resized[top : top + 32, left : left + 32]
    assert np.array_equal(central_square(photo, 32), expected)
    for number in range(2):
        save(tmp_path / f"{number}.png", photo)
    assert np.array_equal(open_real_photos(tmp_path, 32).read(0), expected)
    assert np.array_equal(open_real_photos(tmp_path, None).read(0), photo)


def test_real_photos_are_turned_and_known_by_their_contents(tmp_path):
    """A name in a folder below counts; so does a byte."""
    photo = Image.fromarray(picture(1, 24, 48))
    turned = photo.getexif()
    turned[0x112] = 6
    photo.save(tmp_path / "a.jpg", exif=turned)
    save(tmp_path / "below" / "b.png", picture(2))
    (tmp_path / "notes.txt").write_text("no photo")
    first = open_real_photos(tmp_path, None)
    assert first.names == ("a.jpg", str(Path("below") / "b.png"))
    assert first.read(0).shape == (48, 24, 3)
    assert "2 photos" in first.recipe
    save(tmp_path / "below" / "b.png", picture(3))
    assert open_real_photos(tmp_path, None).fingerprint != first.fingerprint
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match="1 photos there"):
        open_real_photos(tmp_path, None)


@pytest.mark.parametrize("geometry", ["pad", "squash"])
def test_the_conditioner_sees_what_it_is_given_in_training(geometry, run_folder):
    """The class token after the encoder's last norm, of references as the model takes them; and it is never independent."""
    run = PaintByExample.from_pretrained(run_folder).run
    model = run.settings.model.model_copy(update={"reference_geometry": geometry})
    run = replace(run, settings=run.settings.model_copy(update={"model": model}))
    found, shape = conditioner_judge(run), picture(5, 30, 61)
    side = run.reference_size
    square = torch.from_numpy(fit_reference(shape, side, geometry).copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (
        torch.tensor(one)[:, None, None] for one in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    prepared = (square - mean) / std
    assert found.prepare(shape) == pytest.approx(prepared[0].numpy(), abs=1e-6)
    with torch.inference_mode():
        encoder = run.model.conditioner.model
        token = encoder(pixel_values=prepared).pooler_output
    assert found.features([shape]) == pytest.approx(token.numpy(), abs=1e-5)
    painted = rows_module.Painted("one", run_folder, encoder_sha256=run.identity.encoder_sha256)
    assert rows_module.is_independent(found, [painted]) is False
    assert rows_module.is_independent(judge("clip"), [painted]) is True
    assert rows_module.is_independent(judge("clip"), [painted, rows_module.Painted("theirs", run_folder)]) is None


def test_a_name_before_the_place():
    assert rows_module._named("mine=runs/a=b") == ("mine", "runs/a=b")
    assert rows_module._named("runs/a") == ("a", "runs/a")
    assert rows_module._named("owner/name")[0] == "name"


def test_features_that_are_no_numbers_are_no_features(pairs, tmp_path):
    """Else a score of NaN would be written down as one that is not defined."""
    one = judge("dinov2")
    one.loaded.network.register_forward_hook(lambda _, __, out: out.flatten(1) * torch.nan)
    with pytest.raises(InputError, match="judge dinov2: its features of some pictures are not finite"):
        extract(look_at_references(pairs, [one], "png"), 3, [one], tmp_path, threads=1)
    assert not list(tmp_path.iterdir())
