"""A short set of `python -m tests.faults.damage_shard`."""

import shutil

from tests.faults.damage_shard import damage_one_by_one, damages


def test_all_damage_to_a_shard_is_found(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    todo = list(damages(copy / "shards", "train-000001", 5, 12, 5, 20, 1))
    results = list(damage_one_by_one(copy, "train-000001", todo))
    assert [damage for damage, found, named in results if not found or (damage.key and not named)] == []
    assert len({damage.kind for damage in todo}) >= 7
    assert sum(damage.key is not None for damage in todo) > 10
