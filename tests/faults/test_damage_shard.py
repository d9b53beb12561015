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
    # Where structure is hurt, the sample is always named; in a latent's numbers, only the hash can tell.
    for kind in ("tar cut where a member begins", "tar cut anywhere", "bit of the tar: header", "bit of the tar: padding"):
        assert report.named[kind] == report.of_samples[kind] > 0, kind
