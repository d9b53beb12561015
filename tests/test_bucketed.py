"""One set of views in several shapes, end to end: survey, plan, shards, two ranks, a kill, an edit, pictures of all."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from pbe_core.buckets import nearest_bucket
from pbe_core.dataset_reader import read_dataset, read_sample
from pbe_core.errors import InputError
from pbe_core.images.crop import Window, cut_view
from pbe_core.images.decode import decode_photo
from pbe_core.settings import REPOSITORY, load_settings, preset
from pbe_train import PaintByExample, sample
from pbe_train.app.dataset_folder import DatasetFolder
from pbe_train.app.dataset_samples import Samples, Sources
from pbe_train.app.dataset_torch import TorchProcess
from pbe_train.config import TrainSettings
from pbe_train.data.shards import ShardReader
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pipelines import survey, verify
from pipelines.dataset.plan_shards import Plan
from pipelines.inspection.trace import trace
from schemas.dataset import shard_shape, shard_split
from schemas.tables import INDEX
from tests.conftest import build_options, call_program, run_build
from tests.pbe_train.programs import read_records, start_ranks

SHAPES = ((160, 112), (128, 128), (112, 160))
BUCKETS = ("--views.buckets", json.dumps(SHAPES))
PATIENCE_SECONDS = 900


@pytest.fixture(scope="module")
def surveyed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A survey of the photos: Open Images' tables do not say how large photos are."""
    folder = tmp_path_factory.mktemp("buckets")
    options = build_options(photos, folder / "none")
    done = call_program(survey.main, "--config", str(preset("tiny")), *options, "--source.survey", str(folder / "survey"))
    assert done.returncode == 0, done.stderr
    return folder / "survey"


@pytest.fixture(scope="module")
def bucketed(photos: Path, surveyed: Path) -> Path:
    out = surveyed.parent / "dataset"
    run_build(*build_options(photos, out), *BUCKETS, "--source.survey", str(surveyed), pictures=True)
    return out


@pytest.fixture(scope="module")
def settings(bucketed: Path) -> list[str]:
    """Options of a short training."""
    config = yaml.safe_load(preset("tiny").read_text())["train"]
    config |= {
        "dataset": str(bucketed),
        "steps": 6,
        "global_batch": 4,
        "precision": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
    }
    config |= {"pictures": {"every": 6}, "validation": {"every": 6}, "keep_last": 9, "loader": {"workers": 0}}
    for name in ("pretrained", "encoder", "vae"):
        config["model"][name] = str(REPOSITORY / config["model"][name])
    path = bucketed.parent / "train.yaml"
    path.write_text(yaml.safe_dump({"train": config}))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def trained(settings: list[str], bucketed: Path) -> Path:
    """Six steps in this process."""
    out = bucketed.parent / "run"
    run_here(settings, out)
    return out


def run_here(settings: list[str], out: Path, *options: str) -> None:
    with torch.random.fork_rng():
        train(
            load_settings(TrainSettings, "train", [*settings, "--out", str(out), *options]),
            Distributed(0, 1, torch.device("cpu")),
        )


def test_without_a_survey_nobody_knows_the_shapes_of_these_photos(photos: Path, tmp_path: Path):
    done = run_build(*build_options(photos, tmp_path), *BUCKETS, check=False)
    assert done.returncode == 2
    assert "views.buckets: neither" in done.stderr
    assert "--source.survey" in done.stderr


def test_a_shard_has_one_shape_and_each_view_the_one_nearest_to_its_photo(bucketed: Path):
    info = read_dataset(bucketed)
    assert (info.buckets, info.view_size) == (SHAPES, 144)
    rows = pq.read_table(bucketed / "index.parquet").to_pylist()
    seen = Counter()
    for row in rows:
        one = read_sample(bucketed, row)
        width, height = shard_shape(row["shard"])
        assert nearest_bucket(*one.record.photo_size, SHAPES) == (width, height) == info.view_shape(row["shard"])
        assert one.latent.shape == (8, height // 8, width // 8)
        assert one.masked.shape[2:] == one.latent.shape[1:]
        assert one.masks.shape == (2, height, width)
        assert len(one.record.window) == (3 if width == height else 4)
        x_min, y_min, x_max, y_max = one.record.box_in_view
        assert -0.01 <= x_min < x_max <= width + 0.01
        assert -0.01 <= y_min < y_max <= height + 0.01
        if one.view:
            assert decode_photo(one.view, frame="stored").shape == (height, width, 3)
        seen[shard_split(row["shard"]), (width, height)] += 1
    assert {shape for split, shape in seen if split == "train"} == set(SHAPES)
    assert sum(seen.values()) == info.books.samples == info.books.planned


def test_keys_do_not_tell_of_shapes(bucketed: Path):
    keys = set(pq.read_table(bucketed / "index.parquet")["key"].to_pylist())
    assert keys == {f"{name}_0" for name in pq.read_table(bucketed / "objects.parquet")["object_id"].to_pylist()}


def test_the_same_settings_give_the_same_bytes_and_other_shapes_are_refused(
    bucketed: Path, photos: Path, surveyed: Path, tmp_path: Path
):
    again = tmp_path / "again"
    run_build(*build_options(photos, again), *BUCKETS, "--source.survey", str(surveyed))
    for path in sorted((bucketed / "shards").iterdir()):
        assert (again / "shards" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(again / "shards")
    for options in ((), ("--views.buckets", "[[128, 128], [160, 112]]")):
        done = run_build(*build_options(photos, bucketed), *options, "--source.survey", str(surveyed), check=False)
        assert done.returncode == 2
        assert "views.buckets" in done.stderr
    assert json.loads((bucketed / "plan.json").read_bytes())["fingerprint"]["settings"]["views"]["buckets"]


def test_an_extension_numbers_the_shards_of_each_shape(photos: Path, surveyed: Path, tmp_path: Path):
    options = [*build_options(photos, tmp_path), *BUCKETS, "--source.survey", str(surveyed)]
    run_build(*options, "--selection.subset", "0.5")
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.tar")}
    run_build(*options, "--extend")
    after = {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.tar")}
    assert before.items() < after.items()
    numbers: dict[str, list[int]] = {}
    for shard in Plan(tmp_path / "plan.parquet").shards:
        group, _, number = shard.rpartition("-")
        numbers.setdefault(group, []).append(int(number))
    assert all(own == list(range(len(own))) for own in numbers.values())
    assert call_program(verify.main, str(tmp_path)).returncode == 0


def test_small_photos_are_resized_up_no_further_than_asked(photos: Path, surveyed: Path, tmp_path: Path):
    """Views of about 300 px from photos of 130 to 250 px: those that would grow by more than 1.5 fail, and are counted."""
    large = ("--views.buckets", json.dumps([[2 * side for side in shape] for shape in SHAPES]), "--views.max_enlargement", "1.5")
    run_build(*build_options(photos, tmp_path), *large, "--source.survey", str(surveyed))
    info = read_dataset(tmp_path)
    assert 0 < info.books.failures["enlarged"] < info.books.planned
    assert info.books.samples + sum(info.books.failures.values()) == info.books.planned
    for row in pq.read_table(tmp_path / "index.parquet").to_pylist():
        window = Window(*read_sample(tmp_path, row).record.window)
        assert 1.5 * window.side >= max(shard_shape(row["shard"]))


def test_verify_finds_a_view_of_another_shape(bucketed: Path, tmp_path: Path):
    assert "all of them whole" in call_program(verify.main, str(bucketed)).stdout
    copy = Path(shutil.copytree(bucketed, tmp_path / "copy"))
    content = json.loads((copy / "dataset.json").read_bytes())
    content["buckets"].reverse()
    (copy / "dataset.json").write_text(json.dumps(content, indent=1))
    assert "dataset.json is not what the commit records say" in call_program(verify.main, str(copy)).stdout


def test_a_sample_is_traced_and_shown_in_its_shape(
    bucketed: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = pq.read_table(bucketed / "index.parquet").to_pylist()
    row = next(row for row in rows if row["shard"].startswith("validation-160x112"))
    trace(row["key"], bucketed, photos, tmp_path / "trace.png")
    told = capsys.readouterr().out
    assert "160 x 112 px" in told
    assert " width " in told
    one = read_sample(bucketed, row)
    photo = decode_photo((photos / "validation" / f"{one.record.photo_id}.jpg").read_bytes(), frame="stored")
    kept = decode_photo(one.view, frame="stored").astype(int)
    assert np.abs(kept - cut_view(photo, Window(*one.record.window), (160, 112))).mean() < 6
    assert Image.open(bucketed / "contact_sheet.png").height > 100


def test_two_ranks_see_what_one_sees_and_a_run_goes_on_as_it_was(
    settings: list[str], bucketed: Path, trained: Path, tmp_path: Path
):
    """Each step is of one shape on both ranks; stopped after two steps, it goes on with two ranks and the same samples."""
    ranks = start_ranks(2, settings, tmp_path / "two")
    for rank, process in enumerate(ranks):
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0, (tmp_path / "two" / f"log{rank}").read_text()
    seen = read_records(tmp_path / "two" / "records")
    items_shapes: dict[int, set[tuple[int, int]]] = {}
    keys = pq.read_table(bucketed / "index.parquet", columns=["key", "shard"]).to_pylist()
    shape_of = {row["key"]: shard_shape(row["shard"]) for row in keys}
    for (step, _), (key, *_) in seen.items():
        items_shapes.setdefault(step, set()).add(shape_of[key])
    assert [len(shapes) for _, shapes in sorted(items_shapes.items())] == [1] * 6
    assert len(set.union(*items_shapes.values())) > 1
    weights = [
        (run / "checkpoints" / "step-00000006" / "model.safetensors").read_bytes() for run in (trained, tmp_path / "two" / "run")
    ]
    from safetensors.torch import load

    one, two = map(load, weights)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)

    shutil.copytree(trained, tmp_path / "part")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{step:08d}")
    run_here(settings, tmp_path / "part")
    assert (tmp_path / "part" / "checkpoints" / "step-00000006" / "model.safetensors").read_bytes() == weights[0]


def test_shapes_that_the_unet_cannot_halve_are_refused_before_training(settings: list[str], bucketed: Path, tmp_path: Path):
    """112 px are 14 latent cells: they halve once, not twice."""
    deeper = {"block_out_channels": [32, 32, 32], "attention": [True, True, False], "norm_groups": 8, "layers_per_block": 1}
    with pytest.raises(InputError, match=r"160x112, 112x160 px do not halve .* multiples of 32 px; .* views\.buckets"):
        run_here(settings, tmp_path / "run", "--model.pretrained", "null", "--model.unet", json.dumps(deeper))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_edit_is_of_the_shape_nearest_to_its_photo_and_the_same_alone_or_with_others(trained: Path, tmp_path: Path):
    paint = PaintByExample.from_pretrained(trained, device="cpu")
    assert paint.run.identity.buckets == SHAPES
    random = np.random.default_rng(0)
    sizes = [(150, 100), (100, 150), (120, 120), (300, 200)]
    photos = [random.integers(0, 256, (height, width, 3)).astype(np.uint8) for width, height in sizes]
    masks = [np.zeros(photo.shape[:2], bool) for photo in photos]
    for mask in masks:
        mask[30:70, 20:60] = True
    reference = random.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    steps: list[tuple[int, int, int]] = []
    together = paint(
        photos,
        masks,
        [reference] * 4,
        steps=2,
        batch_size=4,
        callback=lambda preview: steps.append((preview.step, preview.steps, len(preview.photos()))),
    )
    assert steps == [(number, 6, 4) for number in range(1, 7)]
    for photo, mask, edited in zip(photos, masks, together, strict=True):
        alone = np.asarray(paint(photo, mask, reference, steps=2)).astype(int)
        assert np.abs(alone - np.asarray(edited)).max() <= 1
        assert np.array_equal(alone[~mask], photo[~mask])
        assert (alone != photo).any(-1)[mask].mean() > 0.9
    wide = np.asarray(paint(photos[0], masks[0], reference, steps=2, size=(160, 112)))
    assert np.array_equal(wide, np.asarray(paint(photos[0], masks[0], reference, steps=2)))
    assert not np.array_equal(wide, np.asarray(paint(photos[0], masks[0], reference, steps=2, size=128)))


def test_edit_takes_width_and_height_on_the_command_line(trained: Path, tmp_path: Path):
    example = REPOSITORY / "tiny_world" / "example"
    options = ["--model", trained, "--image", example / "photo.png", "--mask", example / "mask.png", "--steps", 1]
    options += ["--reference", example / "reference.png", "--device", "cpu", "--out", tmp_path / "edited.png"]
    assert call_program(sample.main, *map(str, options), "--size", "112x160").returncode == 0
    done = call_program(sample.main, *map(str, options), "--size", "112x150")
    assert done.returncode == 2
    assert "size 112x150: must be a multiple of 16 px; the model was trained at 160x112, 128x128, 112x160" in done.stderr


def test_the_viewer_shows_each_sample_in_its_shape(bucketed: Path, photos: Path):
    """View, masks and photo as its page lays them over each other: each of the shape that the sample's facts tell."""
    folder = DatasetFolder(str(bucketed), {}, bucketed)
    samples = Samples(folder, Sources(str(photos)), TorchProcess())
    seen = set()
    for row in folder.rows(range(0, folder.samples, 5), INDEX.names):
        facts = samples.describe(row)
        shape = tuple(facts["view_shape"])
        view, _ = samples.view(row)
        assert Image.open(io.BytesIO(view)).size == Image.open(io.BytesIO(samples.mask(row, 1))).size == shape
        seen.add((shape, row["split"]))
    assert len(seen) == 6


def test_pictures_of_all_shapes_are_painted(trained: Path):
    assert (trained / "pictures" / "step-00000006.png").is_file()
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert any(np.isfinite(value) for line in metrics for name, value in line.items() if "validation" in name)


def test_the_reader_gives_each_sample_in_its_shape(bucketed: Path):
    reader = ShardReader(bucketed, "train")
    assert set(reader.buckets) == set(SHAPES)
    for place, _, _ in reader.labels():
        one = reader.read(place)
        assert one.latent.shape[1:] == reader.cells(place.shard)
        assert one.masks.shape[:0:-1] == reader.buckets[place.shard]
