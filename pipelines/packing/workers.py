"""Packing actors on Ray: the only place that knows where the work runs.

One shard is one task of one actor; what comes back is whether it worked, never pixels. Actors restart where a node or process
dies; their shards are given to others meanwhile. A task may then run twice, which the commit records make harmless.
"""

import math
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Mapping

import ray

from pipelines.config import BuildSettings, RaySettings
from pipelines.on_ray import start_ray
from pipelines.packing.pack import ShardPacker
from schemas.errors import InputError, machine_error

PATIENCE_SECONDS = 60
MOST_RESTARTS = 10
"""Of one actor: enough for nodes that come and go, few enough that one which cannot live anywhere is given up."""


class PackingActor:
    """A Ray actor around `ShardPacker`. An unexpected exception fails its shard and is returned as text, not lost."""

    def __init__(self, settings: BuildSettings, fingerprint: str, device: str) -> None:
        self.packer = ShardPacker(settings, fingerprint, device)

    def ready(self) -> str:
        """Nothing to say; that this returns means that the actor has found its place and its VAE."""
        return ""

    def pack(self, group: int) -> str:
        """Pack row group `group` of the plan; returns what went wrong, with its traceback where that may help, or nothing."""
        try:
            self.packer.pack(group)
        except InputError as error:
            return str(error)
        except OSError as error:  # A full disk, say: the message has it all.
            return machine_error(error) or traceback.format_exc()
        except Exception:
            return traceback.format_exc()
        return ""


def pack_on_ray(settings: BuildSettings, fingerprint: str, groups: list[int]) -> Iterator[tuple[int, str]]:
    """Pack row groups of the plan on all nodes; yields (group, error or "") as they finish.

    Raises:
        InputError: the cluster has not what one actor is to have.
    """
    start_ray(settings.ray.address)
    actors, gpus = share_out(settings.ray, ray.cluster_resources())
    make_actor = ray.remote(PackingActor).options(num_cpus=settings.ray.cpus_per_actor, num_gpus=gpus, max_restarts=MOST_RESTARTS)
    waiting = deque(groups)
    device = "cuda" if gpus else "cpu"
    started = [make_actor.remote(settings, fingerprint, device) for _ in range(min(len(groups), actors))]
    # An actor gets work once it stands: one that finds no place on its cluster, for whatever reason, holds no shard.
    running: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, int | None]] = {_stands(actor): (actor, None) for actor in started}
    idle: list[ray.actor.ActorHandle] = []
    lost_before: set[int] = set()
    error = ""
    # Until all is done, or no actor is left; those that never found a place need not be waited for.
    while True:
        while waiting and idle:
            actor, given = idle.pop(), waiting.popleft()
            running[actor.pack.remote(given)] = actor, given
        if not running or not (waiting or any(group is not None for _, group in running.values())):
            break
        finished, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE_SECONDS)
        if not finished:
            if all(group is None for _, group in running.values()):
                print("still waiting for Ray to start the packing actors: is the cluster busy?", file=sys.stderr)
            continue
        actor, group = running.pop(finished[0])
        lost = False
        try:
            error = ray.get(finished[0])
        except ray.exceptions.RayError as failure:
            error, lost = str(failure), isinstance(failure, ray.exceptions.RayActorError)
        if not lost:
            idle.append(actor)
        elif group is not None:
            # Its node or process died. It may stand again, now or when there is a place for it; its shard does not wait for that.
            running[_stands(actor)] = actor, None
            if group not in lost_before:
                lost_before.add(group)
                waiting.append(group)
                continue
        # Otherwise it was lost before it stood, for good: its constructor failed, or it died too often.
        if group is not None:
            yield group, error
    for group in waiting:
        yield group, error


def _stands(actor: ray.actor.ActorHandle) -> ray.ObjectRef:
    """An answer of the actor once it stands, wherever it is started again before that; an error if it is not."""
    return actor.ready.options(max_task_retries=-1).remote()


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
