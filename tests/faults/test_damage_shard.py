"""A short set of `python -m tests.faults.damage_shard`."""

import shutil

from tests.faults.damage_shard import damage_one_by_one, damages


def test_all_damage_to_a_shard_is_found(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = "train-000001"
    todo = list(damages(copy / "shards", shard, 6, 12, 6, 15, 1))
    report = damage_one_by_one(copy, shard, todo, 1)
    assert report.missed == []
    assert len({damage.kind for damage in todo}) >= 7
    assert report.named == report.of_samples
    assert report.of_samples["tar cut where a member begins"] > 0
    assert report.of_samples.total() > 10
