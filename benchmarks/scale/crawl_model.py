"""A crawl in SimPy: processes take units from one driver; hosts, connections and cores say how long each unit takes.

    photos ──over hosts, a power law──▶ units ──one driver──▶ process ──▶ done: ok + gone + left for another run
                                                 node loss ──interrupts──┘

A unit of the model stands for many real ones: a billion photos are two million parts, of which each holds the same mixture of
hosts, since parts are cut by a hash of the photos' ids. Within a unit all is a flow: it takes as long as its slowest host, its
connections or its core need, whichever is longest.

Left out: bandwidth, DNS, hosts that fail for minutes and come back, Retry-After, jitter of single requests, photos of one unit
that wait while those of the next come (the real window of 4 to 32 units smooths what the flow has smoothed already).
"""

import heapq
import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import simpy
from jaxtyping import Float, Int64
from scipy.optimize import brentq

from benchmarks.scale.constants import Constants, World
from benchmarks.scale.nodes import LosingNodes

_AT_HAND = 4
"""Real units of a process that are lost with it (`pipelines.ray_pool`, at first)."""
UNITS = 400
"""Of the model: at least so many, and as many for each process."""
_UNITS_EACH = 8
_MOST = 0.9


@dataclass(frozen=True)
class Crawl:
    """What is crawled, on what."""

    photos: int
    hosts: int
    nodes: int
    processes: int
    """Of all nodes together."""
    own_hosts: bool = False
    """Whether each host is one process's alone, with all of its limit; today every process has an equal share of every host."""
    host_rate: float | None = None
    """Requests a second to one host; those of the settings by default."""
    host_slots: float | None = None
    """Requests at once, likewise."""
    bucket: bool = False
    """Whether photos come from an object store, where none is gone, and not from the web."""
    failures: bool = True
    """Whether hosts, photos and nodes fail, and hosts and nodes differ in speed."""
    decodes: bool = True
    """Whether photos are of 1,024 px; else as small as the benchmark's."""
    footers: bool = False
    """Whether each unit reads the whole footer of its round, as today."""


@dataclass(frozen=True)
class Crawled:
    """What became of it. photos = ok + gone + left."""

    seconds: float
    most_seconds: float
    """Until nine of ten photos have an outcome, but for those of hosts that do not answer."""
    ok: int
    gone: int
    left: int
    """For another run: of hosts that did not answer, or after the last attempt."""
    lost_nodes: int
    largest_host: float
    """Share of the photos."""
    bound: str
    """What decided most of the units' time: host, connections or core."""


def simulate_crawl(crawl: Crawl, constants: Constants, world: World, seed: int) -> Crawled:
    """Crawl once; the same seed gives the same."""
    random = np.random.default_rng([seed, 1])
    of_host = host_sizes(crawl.photos, crawl.hosts, world, random)
    latency, dead = host_speeds(crawl, world, random)
    gone, left, ok = outcomes(of_host, dead, crawl, constants, world, random)
    speeds = node_speeds(crawl, constants, world, random)
    owner = owners(of_host, crawl.processes) if crawl.own_hosts else None
    run = _Run(
        crawl, constants, world, random, of_host, np.where(dead, 0, ok), latency, np.where(dead, 0, of_host), owner, speeds
    )
    seconds = run.seconds()
    return Crawled(
        seconds,
        run.most_seconds(seconds),
        int(ok.sum()),
        int(gone.sum()),
        int(left.sum()),
        run.lost,
        float(of_host.max() / max(1, crawl.photos)),
        run.bound(),
    )


def host_sizes(photos: int, hosts: int, world: World, random: np.random.Generator) -> Int64[np.ndarray, " hosts"]:
    """Photos of each host, the largest first: a power law of the rank, k^-s.

    Sites' sizes follow a power law (Huberman and Adamic, Growth dynamics of the World-Wide Web, Nature 401, 1999); s is what 12 M
    photos showed (`World.top_100_hosts`). Sizes drawn one by one from such a law would make the largest host anything between a
    twentieth and all of the photos.
    """
    weights = np.arange(1, hosts + 1) ** -rank_exponent(hosts, world.top_100_hosts)
    return random.multinomial(photos, weights / weights.sum())


@lru_cache
def rank_exponent(hosts: int, top_share: float) -> float:
    """The exponent s with which 100 of 10,000 hosts, or the hundredth part of another number, have this share of the photos."""
    top = max(1, round(hosts / 100))
    if hosts < 2:
        return 1.0

    def excess(exponent: float) -> float:
        weights = np.arange(1, hosts + 1) ** -exponent
        return float(weights[:top].sum() / weights.sum()) - top_share

    return float(brentq(excess, 0.0, 10.0))


def host_speeds(crawl: Crawl, world: World, random: np.random.Generator) -> tuple[Float[np.ndarray, " hosts"], np.ndarray]:
    """Seconds of a request to each host, and which hosts do not answer."""
    if not crawl.failures:
        return np.full(crawl.hosts, 1e-3), np.zeros(crawl.hosts, bool)
    if crawl.bucket:
        return np.full(crawl.hosts, world.store_latency_s), np.zeros(crawl.hosts, bool)
    latency = world.latency_s * np.exp(world.latency_spread * random.standard_normal(crawl.hosts))
    return latency, random.uniform(size=crawl.hosts) < world.dead_hosts


def outcomes(
    of_host: Int64[np.ndarray, " hosts"],
    dead: np.ndarray,
    crawl: Crawl,
    constants: Constants,
    world: World,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos of each host that are gone, left for another run, and ok; they add up to those that it has."""
    nothing = np.zeros_like(of_host)
    if crawl.bucket or not crawl.failures:
        return nothing, nothing, of_host
    gone = random.binomial(of_host, world.gone)
    left = random.binomial(of_host - gone, world.passing**constants.attempts)
    gone, left = np.where(dead, 0, gone), np.where(dead, of_host, left)
    return gone, left, of_host - gone - left


def node_speeds(crawl: Crawl, constants: Constants, world: World, random: np.random.Generator) -> Float[np.ndarray, " nodes"]:
    """Pace of each node; 1 is the machine of the benchmarks."""
    if not crawl.failures:
        return np.ones(crawl.nodes)
    speeds: np.ndarray = np.exp(constants.speed_spread * random.standard_normal(crawl.nodes))
    return np.where(random.uniform(size=crawl.nodes) < world.slow_nodes, world.slow_factor, 1.0) * speeds


def owners(of_host: Int64[np.ndarray, " hosts"], processes: int) -> Int64[np.ndarray, " hosts"]:
    """Which process has each host: the largest host goes to the process that has fewest photos, then the next."""
    heap = [(0, process) for process in range(processes)]
    owner = np.zeros(len(of_host), np.int64)
    for host in np.argsort(-of_host, kind="stable").tolist():
        photos, process = heapq.heappop(heap)
        owner[host] = process
        heapq.heappush(heap, (photos + int(of_host[host]), process))
    return owner


class _Run(LosingNodes):
    """One simulation; the clock is in seconds."""

    def __init__(
        self,
        crawl: Crawl,
        constants: Constants,
        world: World,
        random: np.random.Generator,
        of_host: np.ndarray,
        ok: np.ndarray,
        latency: np.ndarray,
        asked: np.ndarray,
        owner: np.ndarray | None,
        speeds: np.ndarray,
    ) -> None:
        super().__init__(crawl.nodes, world, random)
        self.crawl, self.constants = crawl, constants
        self.latency, self.speeds, self.owner = latency, speeds, owner
        attempts = (1 - world.passing**constants.attempts) / (1 - world.passing) if crawl.failures and not crawl.bucket else 1.0
        self.requests, self.decoded = asked * attempts, ok
        rate, slots = crawl.host_rate or constants.host_rate, crawl.host_slots or constants.host_slots
        self.limit = np.minimum(rate, slots / latency)
        """Requests a second that each host gets."""
        self.real_units = max(1, -(-crawl.photos // constants.part_photos))
        # As many for each process, so that the last round is no artefact of the model's few units.
        self.count = min(self.real_units, crawl.processes * max(_UNITS_EACH, -(-UNITS // crawl.processes)))
        self.time_of = {"host": 0.0, "connections": 0.0, "core": 0.0}
        self.driver_free = 0.0
        # Where hosts are a process's own, so are their photos: each process then has a list of its own.
        each = -(-self.count // crawl.processes)
        self.waiting = [each] * crawl.processes if owner is not None else [self.count]
        self.share = 1 / (each if owner is not None else self.count)

    def seconds(self) -> float:
        """Until the last unit is done."""
        workers = [self.env.process(self.work(process)) for process in range(self.crawl.processes)]
        for process, worker in enumerate(workers):
            self.works[process % self.crawl.nodes].append(worker)
        if self.crawl.failures:
            for node in range(self.crawl.nodes):
                self.env.process(self.fail(node))
        self.env.run(self.env.all_of(workers))
        return float(self.env.now)

    def most_seconds(self, seconds: float) -> float:
        """Where all processes share all hosts, each unit holds a like part of each host, and photos come at one pace to the end.

        Where hosts are divided, each is done when its own photos are; but all processes together are not faster than they are.
        """
        if self.owner is None:
            return _MOST * seconds
        own = self.requests / self.limit
        order = np.argsort(own)
        reached = np.searchsorted(np.cumsum(self.requests[order]), _MOST * self.requests.sum())
        capacity = self.requests @ self.latency / self.constants.connections / self.crawl.processes
        cpu = self.requests.sum() * self.constants.crawl_cpu_s + self.decoded.sum() * self.constants.decode_cpu_s
        return float(
            min(seconds, max(own[order[min(reached, len(order) - 1)]], _MOST * capacity, _MOST * cpu / self.crawl.processes))
        )

    def bound(self) -> str:
        """What decided most of the time."""
        return max(self.time_of, key=lambda name: self.time_of[name])

    def unit_seconds(self, process: int) -> float:
        """How long a process of undisturbed pace takes for one unit of the model."""
        mine = slice(None) if self.owner is None else np.flatnonzero(self.owner == process)
        requests, decoded, latency = self.requests[mine] * self.share, self.decoded[mine] * self.share, self.latency[mine]
        if not len(requests):
            return 0.0
        limit = self.limit[mine] / (1 if self.owner is not None else self.crawl.processes)
        cpu = requests.sum() * self.constants.crawl_cpu_s
        if self.crawl.decodes:
            cpu += decoded.sum() * self.constants.decode_cpu_s
        if self.crawl.footers:
            cpu += self.real_units**2 / self.count * self.constants.parse_s["wanted"]
        cores = self.world.cores * self.crawl.nodes
        cpu *= max(1.0, self.crawl.processes / cores) / self.speeds[process % self.crawl.nodes]
        took = {
            "host": float((requests / limit).max()),
            "connections": float((requests * latency).sum() / self.constants.connections),
            "core": float(cpu),
        }
        longest = max(took, key=lambda name: took[name])
        self.time_of[longest] += took[longest]
        return took[longest]

    def work(self, process: int) -> Generator[Any, Any, None]:
        """One crawling process, from unit to unit."""
        own = process if self.owner is not None else 0
        batch = self.real_units / self.count
        actors = self.crawl.processes
        hand_out = batch * (self.constants.hand_out_s + actors * self.constants.hand_out_per_actor_s)
        seconds = 0.0 if self.owner is None else self.unit_seconds(process)
        while self.waiting[own]:
            self.waiting[own] -= 1
            # One driver hands out all units, one after the other, and while others are worked on.
            self.driver_free = max(self.driver_free, self.env.now) + hand_out
            left = max(seconds or self.unit_seconds(process), self.driver_free - self.env.now)
            while left > 0:
                began = self.env.now
                try:
                    yield self.env.timeout(left)
                    left = 0.0
                except simpy.Interrupt:
                    done = self.env.now - began
                    # Recorded parts stay; those at hand are made again.
                    again = min(done, left * min(1.0, _AT_HAND / batch))
                    left += again - done
                    yield from self.wait(self.world.repair_s)


def today(photos: int, hosts: int, nodes: int, constants: Constants, world: World) -> Crawl:
    """What `pbe crawl` does with its defaults."""
    processes = min(nodes * world.cores, constants.most_processes)
    return Crawl(photos, hosts, nodes, max(1, processes), footers=True)


def by_host(photos: int, hosts: int, nodes: int, world: World) -> Crawl:
    """A process on each core, each host one process's own."""
    return Crawl(photos, hosts, nodes, nodes * world.cores, own_hosts=True)


def from_bucket(photos: int, nodes: int, world: World) -> Crawl:
    """All photos in one prefix of an object store, a process on each core (`crawl.workers`)."""
    return Crawl(photos, 1, nodes, nodes * world.cores, host_rate=world.gets_per_second, host_slots=math.inf, bucket=True)
