"""Packing actors on Ray: the only place that knows where the work runs.

One shard is one task of one actor; what comes back is whether it worked, never pixels. Actors restart where a node or process
dies, and a task may then run twice, which the commit records make harmless.
"""

import logging
import traceback
from collections import deque
from collections.abc import Iterator

import ray

from pipelines.config import BuildSettings, RaySettings
from pipelines.pack import ShardPacker


class PackingActor:
    """A Ray actor around `ShardPacker`. An unexpected exception fails its shard and is returned as text, not lost."""

    def __init__(self, settings: BuildSettings, fingerprint: str) -> None:
        self.packer = ShardPacker(settings, fingerprint)

    def pack(self, group: int) -> str:
        """Pack row group `group` of the plan; returns the traceback of what went wrong, or nothing."""
        try:
            self.packer.pack(group)
        except Exception:
            return traceback.format_exc()
        return ""


def pack_on_ray(settings: BuildSettings, fingerprint: str, groups: list[int]) -> Iterator[tuple[int, str]]:
    """Pack row groups of the plan on all nodes; yields (group, error or "") as they finish."""
    if not ray.is_initialized():
        # On a cluster's node this joins the cluster; elsewhere it starts a local Ray for the time of this process.
        ray.init(address=settings.ray.address, log_to_driver=False, logging_level=logging.ERROR)
    make_actor = ray.remote(PackingActor).options(
        num_cpus=settings.ray.cpus_per_actor, num_gpus=settings.ray.gpus_per_actor, max_restarts=-1, max_task_retries=1
    )
    waiting = deque(groups)
    idle = [make_actor.remote(settings, fingerprint) for _ in range(min(len(groups), count_actors(settings.ray)))]
    running: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, int]] = {}
    while waiting or running:
        while waiting and idle:
            actor, group = idle.pop(), waiting.popleft()
            running[actor.pack.remote(group)] = actor, group
        finished, _ = ray.wait(list(running), num_returns=1)
        actor, group = running.pop(finished[0])
        try:
            error: str = ray.get(finished[0])
        except ray.exceptions.RayError as lost:  # The process died more often than Ray restarts it for one task.
            error = str(lost)
        idle.append(actor)
        yield group, error


def count_actors(settings: RaySettings) -> int:
    """As many actors as are asked for, or as the cluster holds; at least one."""
    if settings.actors:
        return settings.actors
    resources = ray.cluster_resources()
    fitting = resources.get("CPU", 1) / settings.cpus_per_actor
    if settings.gpus_per_actor:
        fitting = min(fitting, resources.get("GPU", 0) / settings.gpus_per_actor)
    return max(1, int(fitting))
