"""The benchmark of the loader: a tiny run's figures fit each other, and the ways that are compared see the same samples."""

import json
import sys

import numpy as np
import pytest
import webdataset

from benchmarks import published_recipe
from benchmarks.loader import OURS, PUBLISHED, STREAMED, FromMembers, build, main
from benchmarks.packing_world import draw_photo
from pbe_train.config import TRAIN_SPLIT
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import ShardReader


def test_a_tiny_run(tmp_path, monkeypatch):
    results = tmp_path / "results" / "loader.json"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a photo.jpg").write_bytes(draw_photo(0))
    options = ["--samples", "8", "--photos", str(tmp_path / "photos"), "--results", str(results)]
    options += ["--keep", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["loader", *options])
    main()
    assert sum(ShardReader(tmp_path / "kept", TRAIN_SPLIT).counts) == 8
    result = json.loads(results.read_text())
    assert result["photos"] == {"drawn": False, "files": 1, "mean_bytes": len(draw_photo(0))}
    ways = {way["way"]: way for way in result["ways"]}
    for way in ways.values():
        assert sorted(way["turns"])[len(way["turns"]) // 2] == pytest.approx(way["cpu_seconds"], abs=1e-3)
        assert way["samples_per_second"] == pytest.approx(way["samples"] / way["seconds"])
        assert way["cpu_ms_per_sample"] == pytest.approx(1000 * way["cpu_seconds"] / way["samples"])
    assert (PUBLISHED in ways) == published_recipe.is_installed()
    for ratio in result["ratios"]:
        other = ways[ratio["what"].removeprefix(f"{OURS}, to ")]
        assert ratio["ratio"] == pytest.approx(other["cpu_ms_per_sample"] / ways[OURS]["cpu_ms_per_sample"], abs=1e-3)
    assert STREAMED in ways


def test_a_stream_gives_what_random_access_gives(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(draw_photo(0))
    settings = build(tmp_path, [tmp_path / "photo.jpg"], 8, 4)
    reader = ShardReader(settings.out, "train")
    source = FromMembers(reader)
    urls = [str(settings.out / "shards" / f"{name}.tar") for name in reader.shards]
    seen = set()
    for number, source.members in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        streamed = source.read_for_training(SampleLocation(0, 0), lambda key, masks: masks - 1)
        read = reader.read_for_training(SampleLocation(number // 4, number % 4), lambda key, masks: masks - 1)
        for field, value in vars(read).items():
            assert np.array_equal(getattr(streamed, field), value), field
        seen.add(read.key)
    assert len(seen) == 8
