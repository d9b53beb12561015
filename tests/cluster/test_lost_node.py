"""Packing on a cluster of two nodes, one of which leaves."""

import os
import subprocess
import sys

from pbe_core.settings import REPOSITORY


def test_the_shards_of_a_node_that_leaves_go_to_another_one(photos, dataset, tmp_path):
    """While the other node is at work, the lost actor finds no place: its shard must not wait for it, nor the packing's end."""
    command = [sys.executable, "-m", "tests.cluster.lose_node", str(photos), str(dataset), str(tmp_path / "out")]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = list((dataset / "shards").glob("*.tar"))
    assert shards
    for path in shards:
        assert (tmp_path / "out" / "shards" / path.name).read_bytes() == path.read_bytes()
