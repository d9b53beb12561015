"""The benchmark of packing: a tiny run's figures fit each other, and the ways that are compared make the same things."""

import json
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy.stats import ks_2samp

from benchmarks import packing, published_recipe
from benchmarks.packing_world import draw_photo, find_photos, make_world
from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle, Window, whole_photo
from pbe_core.randomness import generator
from pipelines.config import BuildSettings, SourceSettings
from pipelines.dataset import pack
from pipelines.dataset.samples import draw_mask
from pipelines.geometry import extend_box
from tests.conftest import call_program

needs_bezier = pytest.mark.skipif(not published_recipe.is_installed(), reason="the package bezier is not installed")


def test_a_tiny_run(tmp_path):
    results = tmp_path / "results" / "packing.json"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a photo.jpg").write_bytes(draw_photo(0))
    options = ["--samples", "40", "--photos", str(tmp_path / "photos"), "--results", str(results)]
    done = call_program(packing.main, *options, "--parts", "preparation", "masks", "pack")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(results.read_text())
    assert result["photos"] == {"drawn": False, "files": 1, "mean_bytes": len(draw_photo(0))}
    ways = {(way["part"], way["way"]): way for way in result["ways"]}
    for way in ways.values():
        assert sorted(way["turns"])[len(way["turns"]) // 2] == pytest.approx(way["seconds"], abs=1e-3)
        assert way["samples_per_second"] == pytest.approx(way["samples"] / way["seconds"])
        assert way["samples_per_cpu_second"] == pytest.approx(way["samples"] / way["cpu_seconds"])
    assert ways["pack", "whole pack"]["samples"] == ways["preparation", "ours, 1 object a photo"]["samples"] == 4
    ratios = {ratio["what"]: ratio["ratio"] for ratio in result["ratios"]}
    alone, whole = (ways["pack", name]["cpu_seconds"] for name in ("preparation alone", "whole pack"))
    assert ratios["whole pack, to preparation alone: CPU time"] == pytest.approx(whole / alone, abs=1e-3)
    mine, decoder = (ways["preparation", f"{name}, 1 object a photo"]["cpu_seconds"] for name in ("ours", "decoder alone"))
    assert ratios["decoder's share of ours, 1 object a photo"] == pytest.approx(decoder / mine, abs=1e-3)
    published = [part for part, way in ways if way == "published way"]
    if published_recipe.is_installed():
        assert published == ["preparation", "masks"]
        mine, theirs = (ways["masks", name]["cpu_seconds"] for name in ("ours", "published way"))
        assert ratios["ours, to the published way"] == pytest.approx(theirs / mine, abs=1e-3)
    else:
        assert not published
        assert "pip install bezier" in done.stdout


def test_the_process_whose_memory_is_watched_packs_all(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "load_encoder", pack.load_encoder)  # What the benchmark puts in its place ends with this test.
    (tmp_path / "photo.jpg").write_bytes(draw_photo(0))
    make_world(tmp_path / packing.WORLD, [tmp_path / "photo.jpg"], 2 * packing.SHARDS)
    packing.run_packer(tmp_path, 2 * packing.SHARDS, 3)
    weight = json.loads((tmp_path / "report.json").read_text())
    assert weight["samples"] == sum(len(tarred(path)) for path in tmp_path.glob("many_shards/shards/*.tar")) == 3 * 2
    assert 0 < weight["start_mb"] <= weight["high_water_mb"]


def tarred(path: Path) -> set[str]:
    """Keys of the samples in a tar."""
    with tarfile.open(path) as tar:
        return {name.partition(".")[0] for name in tar.getnames()}


def test_a_folder_without_photos_is_told(tmp_path):
    with pytest.raises(InputError, match=r"no \.jpg below this folder; give another --photos"):
        find_photos(tmp_path)


@needs_bezier
def test_both_ways_draw_masks_of_the_same_distribution(tmp_path):
    """Areas, box masks and shapes together, over a square photo that is the view: two samples of one distribution, or nearly."""
    size, draws = 400, 250
    frame, box = whole_photo(size, size), Rectangle(110.0, 90.0, 240.0, 270.0)
    source = SourceSettings(annotations=tmp_path, photos=tmp_path)
    settings = BuildSettings(out=tmp_path, source=source, views={"size": size})
    random = Random(0)
    ours, published = [], []
    for number in range(draws):
        extended = extend_box(box, frame, 0.4, generator(number, "extension"))
        ours.append(draw_mask(box, extended, Window(0, 0, size), frame, settings, generator(number, "shape"))[2].mean())
        extended = published_recipe.extend_box(box, size, size, random)
        published.append(1 - float(published_recipe.draw_mask(box, extended, size, size, random).mean()))
    assert np.mean(ours) == pytest.approx(np.mean(published), rel=0.04)
    # At 250 draws each, two samples of one distribution are farther apart than this once in a thousand times.
    assert ks_2samp(ours, published).statistic < 0.174


@needs_bezier
def test_the_published_way_makes_a_whole_sample(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(draw_photo(1))
    for box in (Rectangle(300.0, 200.0, 500.0, 420.0), Rectangle(10.0, 100.0, 1000.0, 300.0)):
        sample = published_recipe.prepare_sample(path, box, Random(0))
        shapes = {name: tuple(tensor.shape) for name, tensor in sample.items()}
        square = (3, 512, 512)
        assert shapes == {"view": square, "mask": (1, 512, 512), "masked": square, "reference": (3, 224, 224)}
        keep = sample["mask"][0] == 1
        assert (sample["masked"][:, sample["mask"][0] == 0] == 0).all()
        assert (sample["masked"][:, keep] == sample["view"][:, keep]).all()
        assert 0.02 < 1 - float(sample["mask"].mean()) < 0.98
        assert float(sample["view"].abs().max()) <= 1
