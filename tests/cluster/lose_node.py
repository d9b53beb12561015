"""Pack on a cluster of two nodes, one of which leaves with a shard that it has not finished.

    python -m tests.cluster.lose_node PHOTOS DATASET OUT

A program of its own, as a build is one: what other tests did with Ray in their process must not matter here.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray
import ray._private.state
from ray.cluster_utils import Cluster

from pipelines.dataset.pack import pack_on_ray
from tests.conftest import settings_of


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Two nodes with a CPU each; this process is a driver on a third, which has none."""
    small = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=small)
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def one_that_packs(cluster: Cluster) -> tuple[ray._private.node.Node, psutil.Process]:
    """A node with a packing actor that stands, and the actor's process."""
    nodes = {node.node_id: node for node in cluster.worker_nodes}
    actors = ray._private.state.actors().values()
    standing = [actor for actor in actors if actor["ActorClassName"] == "PackingActor" and actor["State"] == "ALIVE"]
    assert standing, actors
    return nodes[standing[0]["Address"]["NodeID"]], psutil.Process(standing[0]["Pid"])


def main(photos: Path, dataset: Path, out: Path) -> None:
    """Pack all shards of a dataset's plan anew, each twice. Raises AssertionError where one of them was not."""
    (out / "shards").mkdir(parents=True)
    shutil.copy(dataset / "plan.parquet", out)
    settings = settings_of(photos, out, "--ray.cpus_per_actor", "1", "--ray.actors", "2")
    groups = list(range(len(list((dataset / "shards").glob("*.tar"))))) * 2
    with two_nodes() as cluster:
        packing = pack_on_ray(settings, "x", groups)
        outcomes = [next(packing)]
        node, process = one_that_packs(cluster)
        process.suspend()
        try:
            # Whatever it was doing: after two more shards of the other node it holds one that it cannot finish.
            outcomes += [next(packing), next(packing)]
            cluster.remove_node(node)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # It ended with its node.
                process.kill()
        outcomes += packing
    assert sorted(outcomes) == sorted((group, "") for group in groups), outcomes


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
