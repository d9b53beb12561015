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
    """Two nodes with a CPU each; this process is a driver on the first."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    small = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=small)
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
    # Each several times, so that both nodes are still at it when one leaves, also where one was much slower to start.
    groups = list(range(shards)) * 6
    over = threading.Event()
    left = threading.Event()

    def leave() -> None:
        (node,) = cluster.worker_nodes
        while not over.wait(0.1):
            if is_packing(node):
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
    assert left.is_set(), "the second node was never at work"
    assert sorted(outcomes) == sorted((group, "") for group in groups)
    for path in (dataset / "shards").glob("*.tar"):
        assert (out / "shards" / path.name).read_bytes() == path.read_bytes()
