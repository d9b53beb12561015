"""The program that measures training steps: what it runs, what it keeps, and how it ends. Rates themselves are never asserted."""

import gc
import json
import sys
from itertools import pairwise

import pytest
import torch

from benchmarks.train_step import (
    ENCODED_AT_ONCE,
    ENCODING,
    FROM_LATENTS,
    WAYS,
    Bench,
    encode,
    main,
    merge_rows,
    results_file,
    run,
    table_of,
    time_steps,
)
from pbe_train.checkpoints.networks import unloaded_vae
from pbe_train.config import ModelSettings
from tests.conftest import VAE


@pytest.fixture(autouse=True)
def small_heap():
    """What other tests hold is not gone through each time that the benchmark collects garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_each_way_is_the_one_before_it_and_one_thing_more():
    changes = []
    for before, after in pairwise(WAYS):
        kinds = [{"bf16": way.bf16, "recorded": way.recorded, **way.options} for way in (before, after)]
        changes.append([name for name in kinds[0] if kinds[0][name] != kinds[1][name]])
        assert all(kinds[1][name] is True for name in changes[-1])
    assert changes == [["bf16"], ["channels_last"], ["compile"], ["one_token_shortcut"], ["recorded"]]


def test_the_tiny_preset_is_measured_on_a_cpu_without_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # Other tests share this process.
    options = ["--preset", "tiny", "--device", "cpu", "--batch-sizes", "1", "--seconds", "0", "--threads", "1"]
    ways = ["--ways", "plain", "+ channels-last", "+ CUDA graph", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_step", *options, *ways])
    main()
    (path,) = tmp_path.iterdir()
    rows = {row["way"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["plain", "+ channels-last", FROM_LATENTS, ENCODING]
    assert all(row["samples_per_second"] > 0 and row["torch"] and row["date"] for row in rows.values())
    assert [row["arithmetic"] for row in rows.values()] == ["fp32", "bf16", "bf16", "bf16"]
    assert rows[ENCODING]["gflop_of_encoding_per_sample"] > 0
    assert rows["plain"]["mfu"] is rows["plain"]["peak_memory_gb"] is None


class Small(Bench):
    """A device on which four samples are too many, and encoding, too; it tells what it was asked for."""

    def measure(self, way, batch, encodes=False):
        if batch > 3:
            raise torch.OutOfMemoryError
        told = {"samples_per_second": 10.0 * (batch % 3 + 1), "mfu": None, "peak_memory_gb": None, "first_step_seconds": 0.0}
        yield {**self.about(FROM_LATENTS if encodes else way.name, batch), **told}
        if encodes:
            raise torch.OutOfMemoryError


def test_the_end_of_the_memory_ends_the_list_and_is_kept():
    rows = []
    bench = Small("tiny", ModelSettings(encoder="", vae=""), 128, torch.device("cpu"), 0)
    run(bench, WAYS[:2], [2, 3, 4, 5], True, rows.append)
    found = [(row["way"], row["batch"], row["samples_per_second"]) for row in rows]
    plain, other = ([(way.name, 2, 30.0), (way.name, 3, 10.0), (way.name, 4, None)] for way in WAYS[:2])
    # The comparison is made at the batch size that was the fastest, not the largest.
    assert found == [*plain, *other, (FROM_LATENTS, 2, 30.0), (ENCODING, 2, None)]
    shown = table_of("device", rows)
    assert list(shown.columns[3].cells)[2] == "out of memory"
    assert list(shown.columns[4].cells)[3] == "1.00"


def test_a_newer_row_takes_the_place_of_the_old_one_in_a_file_named_after_the_device(tmp_path):
    old = [{"preset": "a", "way": "b", "batch": batch, "samples_per_second": 1.0} for batch in (1, 2)]
    newer, other = {**old[0], "samples_per_second": 2.0}, {**old[0], "way": "c"}
    assert merge_rows(old, [newer, other]) == [newer, old[1], other]
    assert results_file(tmp_path, "NVIDIA A100-SXM4-80GB").name == "train_step.nvidia_a100_sxm4_80gb.json"


def test_pictures_are_encoded_in_parts_and_scaled():
    torch.manual_seed(0)
    vae = unloaded_vae(VAE)
    pictures = torch.rand(ENCODED_AT_ONCE + 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pictures)
    apart = (encode(vae, pictures) / vae.sizes.scaling_factor - posterior.mean) / posterior.deviation
    assert float(apart.abs().max()) < 6
    assert float(apart.std()) == pytest.approx(1, abs=0.2)


def test_the_time_of_a_step_is_that_of_steps_after_the_warm_up():
    calls = []
    first, steps, taken = time_steps(lambda: calls.append("step"), 0, lambda: calls.append("wait"))
    assert steps == 3
    assert calls.count("step") == 3 + steps
    assert calls[-1] == "wait"
    assert first >= 0
    assert taken >= 0
