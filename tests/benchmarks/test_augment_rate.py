"""The benchmark of the augmentation: a tiny run's figures fit each other, and each way does what it is called."""

import json
import statistics
import subprocess
import sys

import numpy as np

from benchmarks.augment import PRESETS, PUBLISHED, SIZES, draw_references, ways
from pbe_core.settings import REPOSITORY
from pbe_train.data.references import Augmentation, prepare_reference


def test_a_tiny_run(tmp_path):
    results = tmp_path / "results" / "augment.json"
    command = [sys.executable, "-m", "benchmarks.augment", "--samples", "5"]
    done = subprocess.run([*command, "--results", str(results)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(results.read_text())
    assert [way["way"] for way in result["ways"]] == [*PRESETS, PUBLISHED]
    for way in result["ways"]:
        assert way["samples"] == 5
        assert way["cpu_ms_per_sample"] == statistics.median(way["turns"]) > 0
        assert way["way"] in done.stdout


def test_the_ways_are_what_the_trainer_does():
    made, references = ways(), draw_references()
    assert [picture.shape[:2] for picture, _ in references] == list(SIZES)
    for number in range(len(SIZES)):
        picture, outline = references[number]
        for preset in PRESETS:
            settings = Augmentation(preset=preset)
            expected = prepare_reference(settings, "squash", picture, outline, 224, "benchmark", number)
            assert np.array_equal(made[preset](number), expected)
        assert made[PUBLISHED](number).shape == (224, 224, 3)


def test_no_sample_is_an_error_of_one_line():
    command = [sys.executable, "-m", "benchmarks.augment", "--samples", "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --samples 0: at least 1"
