"""Packing on a cluster of two nodes, one of which leaves."""

import contextlib
import logging
import shutil

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


def packing_process(node: ray._private.node.Node) -> psutil.Process | None:
    """The process of this node's packing actor, once it stands."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in raylet.children(recursive=True):
        try:
            title = process.cmdline()[:1]
        except psutil.Error:
            continue
        if title in (["ray::PackingActor"], ["ray::PackingActor.pack"]):
            return process
    return None


def test_the_shards_of_a_node_that_leaves_go_to_another_one(cluster, photos, dataset, tmp_path):
    """While the other node is at work, the lost actor finds no place: its shard must not wait for it, nor the packing's end."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    shutil.copy(dataset / "plan.parquet", out)
    settings = settings_of(photos, out, "--ray.cpus_per_actor", "1")
    shards = len(list((dataset / "shards").glob("*.tar")))
    groups = list(range(shards)) * 2
    packing = pack_on_ray(settings, "x", groups)
    outcomes = [next(packing)]
    node, process = next((node, process) for node in cluster.worker_nodes if (process := packing_process(node)))
    process.suspend()
    try:
        # Whatever it was doing: after two more shards of the other node it holds one that it cannot finish.
        outcomes += [next(packing), next(packing)]
        cluster.remove_node(node)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # It ended with its node.
            process.kill()
    outcomes += packing
    assert sorted(outcomes) == sorted((group, "") for group in groups)
    for path in (dataset / "shards").glob("*.tar"):
        assert (out / "shards" / path.name).read_bytes() == path.read_bytes()
