"""Nodes that are lost while they work, as crawl and pack have them; a base of both simulations."""

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from benchmarks.scale.constants import World


class LosingNodes:
    """A simulation whose nodes are lost now and then, with the work that they have at hand; the clock is in seconds.

    Args:
        nodes: how many.
        world: how often they are lost, and how long it takes until a new one stands.
        random: when.
    """

    def __init__(self, nodes: int, world: World, random: np.random.Generator) -> None:
        self.world, self.random = world, random
        self.env = simpy.Environment()
        self.works: list[list[simpy.Process]] = [[] for _ in range(nodes)]
        """Processes of each node."""
        self.lost = 0

    def wait(self, seconds: float) -> Generator[Any, Any, None]:
        """Wait for a new node; another loss meanwhile begins it anew."""
        while seconds > 0:
            try:
                yield self.env.timeout(seconds)
                return
            except simpy.Interrupt:
                continue

    def fail(self, node: int) -> Generator[Any, Any, None]:
        """Lose a node, again and again. The first has the head: with it all stop, and the same command goes on."""
        while True:
            yield self.env.timeout(self.random.exponential(86_400 / self.world.node_failures_per_day))
            self.lost += 1
            for worker in self.works[node] if node else [one for works in self.works for one in works]:
                if worker.is_alive:
                    worker.interrupt()
