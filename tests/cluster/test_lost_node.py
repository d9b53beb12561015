"""Packing on a cluster of two nodes, one of which leaves."""

import logging
import shutil
import threading

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines.packing.workers import pack_on_ray
from tests.conftest import settings_of


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU each; this process is a driver on a third, which has none."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    small = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=small)
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def is_packing(node: ray._private.node.Node) -> bool:
    """Whether a packing actor of this node is at work."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    titles = []
    for process in raylet.children(recursive=True):
        try:
            titles += process.cmdline()[:1]
        except psutil.Error:
            continue
    return "ray::PackingActor.pack" in titles


def test_the_shards_of_a_node_that_leaves_go_to_another_one(cluster, photos, dataset, tmp_path):
    """While the other node is at work, the lost actor finds no place: its shard must not wait for it, nor the packing's end."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    shutil.copy(dataset / "plan.parquet", out)
    settings = settings_of(photos, out, "--ray.cpus_per_actor", "1")
    shards = len(list((dataset / "shards").glob("*.tar")))
    groups = list(range(shards)) * 2
    over = threading.Event()
    left = threading.Event()

    def leave() -> None:
        while not over.wait(0.05):
            for node in tuple(cluster.worker_nodes):
                if is_packing(node):  # Whichever is at work first.
                    cluster.remove_node(node)
                    left.set()
                    return

    leaving = threading.Thread(target=leave)
    leaving.start()
    try:
        outcomes = list(pack_on_ray(settings, "x", groups))
    finally:
        over.set()
        leaving.join()
    assert left.is_set(), "no node was seen at work"
    assert sorted(outcomes) == sorted((group, "") for group in groups)
    for path in (dataset / "shards").glob("*.tar"):
        assert (out / "shards" / path.name).read_bytes() == path.read_bytes()
