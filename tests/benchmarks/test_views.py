"""The benchmark of views: the published rule by itself, ours beside it, and a small run over made-up photos."""

import json
import sys
from random import Random

import numpy as np
import pytest
from scipy.stats import ks_2samp

from benchmarks import published_recipe
from benchmarks.packing_world import draw_photo
from benchmarks.views import main
from pbe_core.images.crop import Rectangle, is_padded, whole_photo
from pbe_core.randomness import generator
from pipelines.geometry import extend_box, square_window

needs_bezier = pytest.mark.skipif(not published_recipe.is_installed(), reason="the package bezier is not installed")


def crops(extended: Rectangle, width: int, height: int, number: int) -> list[tuple[int, int, int]]:
    return [published_recipe.square_crop(extended, width, height, Random(seed)) for seed in range(number)]


def test_the_published_squares_are_concentric_and_of_every_size():
    """A photo as high as wide is its own view; where one square holds the box, or none, the photo is squashed."""
    found = crops(Rectangle(40, 20, 60, 80), 100, 100, 20)
    assert set(found) == {(0, 0, 100)}
    found = crops(Rectangle(140, 30, 160, 80), 300, 100, 3000)
    assert {side for _, _, side in found} == {100 - 2 * trim for trim in range(13)}
    assert all(side == 100 - 2 * top for _, top, side in found)
    assert published_recipe.square_crop(Rectangle(0, 30, 50, 60), 300, 100, Random(0)) is None
    assert published_recipe.square_crop(Rectangle(100, 30, 200, 60), 300, 100, Random(0)) is None
    assert published_recipe.square_crop(Rectangle(100, 30, 250, 60), 300, 100, Random(0)) is None


def test_our_published_zoom_is_of_the_published_distribution_and_the_free_one_is_not():
    """Sides of views over drawn boxes, where neither squashes and neither photo is square."""
    draw = np.random.default_rng(0)
    sides = {"published": [], "free": [], "code": []}
    for number in range(1200):
        width, height = draw.integers(300, 1024, 2).tolist()
        (left, right), (top, bottom) = (np.sort(draw.uniform(0, side, 2)) for side in (width, height))
        box = Rectangle(left, top, max(right, left + 8), max(bottom, top + 8)).intersection(whole_photo(width, height))
        extended = published_recipe.extend_box(box, width, height, Random(number))
        crop = published_recipe.square_crop(extended, width, height, Random(number))
        if crop:
            sides["code"].append(crop[2] / min(width, height))
        for zoom in ("published", "free"):
            extended = extend_box(box, whole_photo(width, height), 0.4, generator(number, zoom))
            window = square_window(extended, width, height, zoom, 0.6, generator(number, zoom, "window"))
            if published_recipe.square_crop(extended, width, height, Random(0)):
                assert not is_padded(window, width, height)
                sides[zoom].append(window.side / min(width, height))
    assert min(map(len, sides.values())) > 450
    assert ks_2samp(sides["published"], sides["code"]).statistic < 0.05
    assert ks_2samp(sides["free"], sides["code"]).statistic > 0.3


@needs_bezier
def test_a_small_run(tmp_path, capsys, monkeypatch):
    """Two photos, one of them square; the books of draws balance."""
    photos = tmp_path / "data" / "coco_mini" / "images"
    photos.mkdir(parents=True)
    for number in range(2):
        (photos / f"{number}.jpg").write_bytes(draw_photo(number))
    labels = tmp_path / "data" / "open_images_mini"
    (labels / "train").mkdir(parents=True)
    (labels / "train" / "0000000000000001.jpg").write_bytes(draw_photo(1))
    (labels / "class-descriptions-boxable.csv").write_text("/m/1,Disc\n")
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
    row = "0000000000000001,xclick,/m/1,1,0.4,0.6,0.3,0.6,0,0,0,0,0\n"
    for split, rows in (("train", row), ("validation", row.replace("1,xclick", "2,xclick"))):
        (labels / f"{split}-annotations-bbox.csv").write_text(header + rows)
    (labels / "validation").mkdir()
    (labels / "validation" / "0000000000000002.jpg").write_bytes(draw_photo(0))
    sizes = [{"id": number, "file_name": f"{number}.jpg", "width": 1024, "height": 768} for number in range(2)]
    box = {"image_id": 0, "category_id": 1, "iscrowd": 0, "area": 9, "segmentation": []}
    boxes = [{"id": 1, **box, "bbox": [400, 200, 240, 300]}, {"id": 2, **box, "bbox": [0, 100, 300, 300]}]
    content = {"images": sizes, "annotations": boxes, "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "data" / "coco_mini" / "instances.json").write_text(json.dumps(content))

    results = tmp_path / "views.json"
    options = ["--real-data", str(tmp_path / "data"), "--draws", "3", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["views", *options])
    main()
    said = capsys.readouterr().out
    result = json.loads(results.read_text())
    assert result["objects"] == 4
    assert [row["way"] for row in result["zoom"]] == ["published code", "zoom: published", "zoom: free"]
    for row in result["zoom"]:
        assert row["draws"] == 12 == row["square"] + row["squashed"] + row["compared"]
        assert row["squashed"] == row["squashed_with_a_square"] == 3, "the box at the edge"
        assert 0 < row["side"]["p5"] <= row["side"]["median"] <= 1
        assert (row["distance"] is None) == (row["way"] == "published code")
    energy = {(row["what"], row["way"]): row["energy"] for row in result["sharpness"]}
    for what in ("view", "reference"):
        assert energy[what, "resize: published"] == pytest.approx(energy[what, "published code"], rel=0.05)
    assert all(row["way"] in said for row in result["zoom"])
