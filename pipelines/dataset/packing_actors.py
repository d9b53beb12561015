"""Packing actors on Ray: the only place that knows where the work runs.

One shard is one unit of the pool; what comes back is whether it worked, never pixels. Actors restart where a node or process
dies; their shards are given to others meanwhile. A shard may then be packed twice, which the commit records make harmless.
"""

import math
import traceback
from collections.abc import Iterator, Mapping

import ray

from pbe_core.errors import InputError, machine_error
from pbe_core.progress import Progress
from pbe_core.words import noun, number_of
from pipelines.config import BuildSettings, RaySettings
from pipelines.dataset.pack import ShardPacker
from pipelines.on_ray import start_ray
from pipelines.ray_pool import actor_options, work_on_ray

_FEWER = "fewer packing actors need less: lower build.ray.actors, or raise build.ray.cpus_per_actor"


class PackingActor:
    """A Ray actor around `ShardPacker`. An unexpected exception fails its shard and is returned as text, not lost."""

    def __init__(self, settings: BuildSettings, fingerprint: str, device: str) -> None:
        self.packer = ShardPacker(settings, fingerprint, device)

    def ready(self) -> None:
        """Nothing to say; that this returns means that the actor has found its place and its VAE."""

    def work(self, group: int) -> str:
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

    def done(self) -> float:
        """Samples of the shard at hand that are packed, or have failed."""
        return self.packer.samples_done


def pack_on_ray(
    settings: BuildSettings, fingerprint: str, groups: list[int], progress: Progress | None = None
) -> Iterator[tuple[int, str]]:
    """Pack row groups of the plan on all nodes; yields (group, error or "") as they finish.

    Args:
        settings: of the build.
        fingerprint: of the plan.
        groups: to pack.
        progress: counts samples; shows those of shards that are not finished.

    Raises:
        InputError: the cluster has not what one actor is to have.
    """
    progress = progress or Progress("packing")
    progress.say("starting Ray")
    start_ray(settings.ray.address)
    actors, gpus = share_out(settings.ray, ray.cluster_resources())
    make = ray.remote(PackingActor).options(**actor_options(settings.ray.cpus_per_actor, gpus))
    device = "cuda" if gpus else "cpu"
    yield from work_on_ray(lambda: make.remote(settings, fingerprint, device), actors, groups, progress, _FEWER)


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
            f"{_units(settings.cpus_per_actor, gpus_each)} each for {number_of(wanted, 'packing actor')} do not fit into a Ray "
            f"cluster of {_units(cpus, gpus)}; lower build.ray.actors, cpus_per_actor or gpus_per_actor"
        )
    return wanted, gpus_each


def _units(cpus: float, gpus: float) -> str:
    return f"{cpus:g} {noun(cpus, 'CPUs')} and {gpus:g} {noun(gpus, 'GPUs')}"
