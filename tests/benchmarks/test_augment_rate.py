"""The benchmark of the augmentation: a tiny run's figures fit each other, and each way does what it is called."""

import json
import statistics
import sys

import numpy as np
import pytest

from benchmarks.augment import PRESETS, PUBLISHED, SIZES, draw_references, main, ways
from pbe_core.errors import InputError
from pbe_train.data.references import Augmentation, prepare_reference


def test_a_tiny_run(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results" / "augment.json"
    monkeypatch.setattr(sys, "argv", ["augment", "--samples", "5", "--results", str(results)])
    main()
    result, printed = json.loads(results.read_text()), capsys.readouterr().out
    assert [way["way"] for way in result["ways"]] == [*PRESETS, PUBLISHED]
    for way in result["ways"]:
        assert way["samples"] == 5
        assert way["cpu_ms_per_sample"] == statistics.median(way["turns"]) > 0
        assert way["way"] in printed


def test_the_ways_are_what_the_trainer_does():
    made, references = ways(), draw_references()
    assert [picture.shape[:2] for picture, _ in references] == list(SIZES)
    for number in range(len(SIZES)):
        picture, outline = references[number]
        for preset in PRESETS:
            expected = prepare_reference(Augmentation(preset), "squash", picture, outline, 224, "benchmark", number)
            assert np.array_equal(made[preset](number), expected)
        assert made[PUBLISHED](number).shape == (224, 224, 3)


def test_no_sample_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["augment", "--samples", "0"])
    with pytest.raises(InputError, match="--samples 0: at least 1"):
        main()
