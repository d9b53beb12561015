"""The table of encoder rates: what is counted, and which row stays. Rates themselves are never asserted."""

import pytest

from benchmarks.encoder_rate import KEY, computed_rows, gflop_per_picture, merge_rows, vae_name
from pbe_core.settings import REPOSITORY
from pbe_core.vae_kinds import AUTOENCODER_KL, vae_sizes
from pbe_train.checkpoints.networks import VAE_SIZES


def test_an_encode_takes_the_published_arithmetic():
    assert gflop_per_picture(vae_sizes(AUTOENCODER_KL, VAE_SIZES), 512) == pytest.approx(1117, rel=0.001)


def test_computed_rows_name_their_assumption_and_have_one_key_each():
    rows = computed_rows(256)
    assert len({tuple(row[name] for name in KEY) for row in rows}) == len(rows)
    assert all(row["utilisation"] and row["assumption"] and row["arithmetic"] for row in rows)
    v100 = {row["precision"] for row in rows if row["known_as"].startswith("V100")}
    assert v100 == {"fp32", "fp16"}, "a V100 has no bf16"


def test_a_measured_row_outlives_computed_ones_and_yields_to_a_newer_one():
    computed = computed_rows(256)
    first = {**{name: computed[0][name] for name in KEY}, "kind": "measured", "pictures_per_second": 1.0}
    second = {**first, "pictures_per_second": 2.0}
    merged = merge_rows(merge_rows(computed, [first]), computed)
    assert len(merged) == len(computed)
    assert [row for row in merged if row["kind"] == "measured"] == [first]
    assert [row for row in merge_rows(merged, [second]) if row["kind"] == "measured"] == [second]


def test_results_do_not_tell_where_a_folder_lies(tmp_path):
    assert vae_name("CompVis/stable-diffusion-v1-4") == "CompVis/stable-diffusion-v1-4"
    assert vae_name(str(REPOSITORY / "tiny_world" / "weights" / "vae")) == "tiny_world/weights/vae"
    (tmp_path / "mine").mkdir()
    assert vae_name(str(tmp_path / "mine")) == "mine"
