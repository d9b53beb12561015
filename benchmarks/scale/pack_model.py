"""Packing in SimPy: actors take shards from one driver; GPUs, cores and the object store say how long each takes.

    photos in a bucket ──GET, one each──▶ actor: cores prepare, GPU encodes ──PUT, three a shard──▶ bucket ──▶ finalize

A shard of the model stands for many real ones. Left out: bandwidth, the disk, reading the plan, photos that fail.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from benchmarks.scale.constants import Constants, World
from benchmarks.scale.nodes import LosingNodes

SHARDS_EACH = 30
"""Of the model, for each actor."""
_PUTS, _HEADS = 3, 3
"""Of a shard: tar, part of the index, record; and a look at each whether it has arrived (`ShardFolder.publish`)."""
ASKED_BY_DRIVER = 4
"""Requests for each shard that is done: the sizes of three files and the record (`ShardFolder.state_after`)."""


@dataclass(frozen=True)
class Pack:
    """What is packed, on what."""

    samples: int
    nodes: int
    actors: int
    """Of all nodes together."""
    gpus: bool = True
    """Whether each has a GPU; else nothing encodes (the benchmark's encoder that gives zeros)."""
    bucket: bool = True
    """Whether photos come from, and shards go to, one bucket; else a disk that is fast enough."""
    failures: bool = True
    """Whether nodes are lost and differ in speed."""
    at_once: int = 1
    """Requests to the bucket that the driver has in flight; today it makes them one after the other."""
    shard_samples: int | None = None


@dataclass(frozen=True)
class Packed:
    """What became of it."""

    seconds: float
    """All of it."""
    packing_seconds: float
    """Until the last shard."""
    samples: int
    lost_nodes: int
    bound: str
    """encoder, cores, requests to the bucket, or the driver."""


def simulate_pack(pack: Pack, constants: Constants, world: World, seed: int) -> Packed:
    """Pack once; the same seed gives the same."""
    run = _Run(pack, constants, world, np.random.default_rng([seed, 2]))
    packing = run.seconds()
    shards = -(-pack.samples // (pack.shard_samples or constants.shard_samples))
    # `finalize` reads each shard's part of the index.
    finalizing = shards * world.store_latency_s / pack.at_once if pack.bucket else 0.0
    return Packed(packing + finalizing, packing, run.samples, run.lost, run.bound)


class _Run(LosingNodes):
    """One simulation; the clock is in seconds."""

    def __init__(self, pack: Pack, constants: Constants, world: World, random: np.random.Generator) -> None:
        super().__init__(pack.nodes, world, random)
        self.pack = pack
        samples = pack.shard_samples or constants.shard_samples
        real = max(1, -(-pack.samples // samples))
        self.count = count = min(real, SHARDS_EACH * pack.actors)
        self.batch = real / count
        sizes = np.full(count, pack.samples // count, np.int64)
        sizes[: pack.samples % count] += 1
        self.waiting = sizes.tolist()
        self.samples = 0
        spread = constants.speed_spread if pack.failures else 0.0
        self.speeds = np.exp(spread * random.standard_normal(pack.nodes))
        if pack.failures:
            self.speeds *= np.where(random.uniform(size=pack.nodes) < world.slow_nodes, world.slow_factor, 1.0)
        # An actor keeps a little more than one core busy, so two of them are not twice as fast on two cores.
        self.cpu_s = max(constants.pack_s, constants.pack_cpu_s * pack.actors / (world.cores * pack.nodes))
        self.gpu_s = constants.pictures / constants.pictures_per_second if pack.gpus else 0.0
        of_driver = constants.hand_out_s + pack.actors * constants.hand_out_per_actor_s
        if pack.bucket:
            of_driver += ASKED_BY_DRIVER * world.store_latency_s / pack.at_once
        self.hand_out_s = self.batch * of_driver
        gets = 1 / constants.samples_per_photo + _HEADS / samples
        self.store_s = max(gets / world.gets_per_second, _PUTS / samples / world.puts_per_second) if pack.bucket else 0.0
        self.store_free = self.driver_free = 0.0

    @property
    def bound(self) -> str:
        """What decided."""
        seconds = {
            "encoder": self.gpu_s * self.samples / self.pack.actors,
            "cores": self.cpu_s * self.samples / self.pack.actors,
            "requests": self.store_s * self.samples,
            "driver": self.hand_out_s * self.count,
        }
        return max(seconds, key=lambda name: seconds[name])

    def seconds(self) -> float:
        """Until the last shard is packed."""
        workers = [self.env.process(self.work(actor)) for actor in range(self.pack.actors)]
        for actor, worker in enumerate(workers):
            self.works[actor % self.pack.nodes].append(worker)
        if self.pack.failures:
            for node in range(self.pack.nodes):
                self.env.process(self.fail(node))
        self.env.run(self.env.all_of(workers))
        return float(self.env.now)

    def work(self, actor: int) -> Generator[Any, Any, None]:
        """One packing actor, from shard to shard."""
        while self.waiting:
            samples = self.waiting.pop()
            left = samples * max(self.cpu_s, self.gpu_s) / self.speeds[actor % self.pack.nodes]
            # The bucket answers so many requests a second, whoever asks, and the driver so many workers: queues that all share.
            self.store_free = max(self.store_free, self.env.now) + samples * self.store_s
            self.driver_free = max(self.driver_free, self.env.now) + self.hand_out_s
            left = max(left, self.store_free - self.env.now, self.driver_free - self.env.now)
            while left > 0:
                began = self.env.now
                try:
                    yield self.env.timeout(left)
                    left = 0.0
                except simpy.Interrupt:
                    done = self.env.now - began
                    again = min(done, left / self.batch)  # The shard at hand; those before it have their records.
                    left += again - done
                    yield from self.wait(self.world.repair_s)
            self.samples += samples


def on_gpus(photos: int, nodes: int, constants: Constants, world: World, at_once: int = 1) -> Pack:
    """All samples of so many photos, an actor on each GPU, photos and shards in a bucket."""
    return Pack(round(photos * constants.samples_per_photo), nodes, nodes * world.gpus, at_once=at_once)
