"""Packing actors on Ray: the only place that knows where the work runs.

One shard is one task of one actor; what comes back is whether it worked, never pixels. Actors restart where a node or process
dies, and a task may then run twice, which the commit records make harmless.
"""

import logging
import math
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Mapping

import ray

from pipelines.config import BuildSettings, RaySettings
from pipelines.packing.pack import ShardPacker
from schemas.errors import InputError

PATIENCE_SECONDS = 60


class PackingActor:
    """A Ray actor around `ShardPacker`. An unexpected exception fails its shard and is returned as text, not lost."""

    def __init__(self, settings: BuildSettings, fingerprint: str, device: str) -> None:
        self.packer = ShardPacker(settings, fingerprint, device)

    def ready(self) -> str:
        """Nothing to say; that this returns means that the actor has found its place and its VAE."""
        return ""

    def pack(self, group: int) -> str:
        """Pack row group `group` of the plan; returns the traceback of what went wrong, or nothing."""
        try:
            self.packer.pack(group)
        except Exception:
            return traceback.format_exc()
        return ""


def pack_on_ray(settings: BuildSettings, fingerprint: str, groups: list[int]) -> Iterator[tuple[int, str]]:
    """Pack row groups of the plan on all nodes; yields (group, error or "") as they finish.

    Raises:
        InputError: the cluster has not what one actor is to have.
    """
    if not ray.is_initialized():
        # On a cluster's node this joins the cluster; elsewhere it starts a local Ray for the time of this process.
        ray.init(address=settings.ray.address, log_to_driver=False, logging_level=logging.ERROR)
    actors, gpus = share_out(settings.ray, ray.cluster_resources())
    make_actor = ray.remote(PackingActor).options(
        num_cpus=settings.ray.cpus_per_actor, num_gpus=gpus, max_restarts=-1, max_task_retries=1
    )
    waiting = deque(groups)
    device = "cuda" if gpus else "cpu"
    started = [make_actor.remote(settings, fingerprint, device) for _ in range(min(len(groups), actors))]
    # An actor gets work once it stands: one that finds no place on its cluster, for whatever reason, holds no shard.
    running: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, int | None]] = {
        actor.ready.remote(): (actor, None) for actor in started
    }
    error = ""
    # Until all is done, or no actor is left; those that never found a place need not be waited for.
    while (waiting and running) or any(group is not None for _, group in running.values()):
        finished, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE_SECONDS)
        if not finished:
            if all(group is None for _, group in running.values()):
                print("still waiting for Ray to start the packing actors: is the cluster busy?", file=sys.stderr)
            continue
        actor, group = running.pop(finished[0])
        try:
            error = ray.get(finished[0])
        except (
            ray.exceptions.RayActorError
        ) as lost:  # For good: its constructor failed, or it died too often. No more work for it.
            error, actor = str(lost), None
        except ray.exceptions.RayError as lost:
            error = str(lost)
        if group is not None:
            yield group, error
        if actor and waiting:
            group = waiting.popleft()
            running[actor.pack.remote(group)] = actor, group
    for group in waiting:
        yield group, error


def share_out(settings: RaySettings, resources: Mapping[str, float]) -> tuple[int, float]:
    """Number of actors, and GPUs of each, for a cluster's resources (`CPU`, `GPU`).

    Raises:
        InputError: the cluster cannot hold one actor.
    """
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    gpus_each = settings.gpus_per_actor
    if gpus_each is None:
        gpus_each = 1.0 if gpus >= 1 else 0.0
    fitting = int(min(cpus / settings.cpus_per_actor, gpus / gpus_each if gpus_each else math.inf))
    wanted = settings.actors or max(1, fitting)
    if wanted > fitting:
        raise InputError(
            f"{wanted} packing actors of {settings.cpus_per_actor:g} CPUs and {gpus_each:g} GPUs do not fit into a Ray cluster "
            f"of {cpus:g} CPUs and {gpus:g} GPUs; lower build.ray.actors, cpus_per_actor or gpus_per_actor"
        )
    return wanted, gpus_each
