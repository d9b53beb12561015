"""The cluster's one book: what every worker has done, and the shares of the hosts' limits."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import ray

from pipelines.config import CrawlSettings
from pipelines.crawling.ledger import HostLedger, HostReport, HostState, Lease


@dataclass
class Progress:
    """What one worker has done since it began."""

    codes: Counter[str] = field(default_factory=Counter)
    received: int = 0
    """Bytes, over a network."""
    in_flight: int = 0
    stalled: int = 0
    """Units that have waited long for their next photo: their hosts rest, and the worker has time for others."""


@dataclass(frozen=True)
class Snapshot:
    """What the ledger knows."""

    total: Progress
    """Of all workers together."""
    stalled: dict[str, int]
    """By worker."""
    hosts: Mapping[str, HostState]


class CrawlLedger:
    """The cluster's one book: shares of hosts' limits, and what all workers have done. A Ray actor."""

    def __init__(self, settings: CrawlSettings) -> None:
        began_again = ray.get_runtime_context().was_current_actor_reconstructed
        self.hosts = HostLedger(settings.per_host, request_seconds=settings.total_seconds, successor=began_again)
        self.progress: dict[str, Progress] = {}
        self.dead: list[Progress] = []
        """Of workers that were started again."""

    def arrive(self, worker: str) -> None:
        """A worker begins. If it was here before, that process is dead and its requests with it."""
        self.hosts.leave(worker)
        if worker in self.progress:
            self.dead.append(replace(self.progress[worker], in_flight=0))
        self.progress[worker] = Progress()

    def renew(self, worker: str, reports: dict[str, HostReport]) -> dict[str, Lease]:
        """A worker's report about hosts, and its shares until the next one."""
        return self.hosts.renew(worker, reports)

    def tell(self, worker: str, progress: Progress) -> None:
        """A worker says how far it is."""
        self.progress[worker] = progress

    def leave(self, worker: str, progress: Progress) -> None:
        """A worker's last report."""
        self.progress[worker] = progress
        self.hosts.leave(worker)

    def snapshot(self) -> Snapshot:
        """Everything that the driver looks at."""
        total = Progress()
        for progress in (*self.dead, *self.progress.values()):
            total.codes.update(progress.codes)
            total.received += progress.received
            total.in_flight += progress.in_flight
        stalled = {worker: progress.stalled for worker, progress in self.progress.items()}
        return Snapshot(total, stalled, self.hosts.snapshot())
