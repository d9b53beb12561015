"""One host, as one worker's gate sees it: who waits, what the lease allows, and what the ledger has yet to hear."""

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field, replace

from pipelines.crawling.fetched import FetchError
from pipelines.crawling.ledger import Lease

NO_LEASE = Lease()


@dataclass(slots=True)
class News:
    """Outcomes that the ledger has not heard of yet."""

    successes: int = 0
    failures: int = 0
    last: FetchError | None = None
    rest_until: float = -math.inf
    era: int = 0
    """Of the requests that the two below tell about."""
    recovered: bool = False
    in_a_row: int = 0


@dataclass(slots=True, eq=False)
class Door:
    """One host, as this worker sees it."""

    since: float
    """When `owes` was worked out."""
    waiters: deque[asyncio.Future[int]] = field(default_factory=deque)
    """Their results are the passes: the generation in which they start."""
    in_flight: int = 0
    lease: Lease = NO_LEASE
    expires: float = -math.inf
    owes: float = 0.0
    """Part of a request whose spacing must pass before the next one; negative where one is overdue."""
    timer: asyncio.TimerHandle | None = None
    """While the first waiter waits for nothing but the spacing."""
    generation: int = 0
    """Changes with each era of the ledger and whenever this gate stops by itself."""
    of_generation: int = 0
    """Requests of it that are in flight."""
    in_a_row: int = 0
    """Failures of it since its last success."""
    stopped: bool = False
    """By this gate itself, which has not yet told the ledger why."""
    news: News = field(default_factory=News)
    told: int = 0
    """Requests in flight and waiting, by the last report."""
    gives_back: bool = False
    """Others wait for what this lease takes away."""

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nobody waits."""
        return not self.in_flight and not self.waiters

    def has_slot(self, now: float) -> bool:
        """Whether the lease, if it is valid at `now`, has room for one more request; spacing aside."""
        lease = self.lease
        free = self.in_flight < lease.concurrency and not (lease.trying and self.of_generation)
        return free and now < self.expires

    def settle(self, now: float, overdue: float) -> None:
        """Bring `owes` up to date; starts may be made up for that were due within the last `overdue` s."""
        rate = self.lease.requests_per_second
        earned = rate * (now - self.since)
        self.owes = max(self.owes - earned, -overdue * rate)
        self.since = now

    def begin_generation(self) -> None:
        """What is in flight says nothing more about what starts from here."""
        self.generation += 1
        self.of_generation = self.in_a_row = 0


def together(older: News, newer: News) -> News:
    """News that did not arrive, and what has happened since."""
    goes_on = newer.era == older.era
    started_anew = newer.recovered or (not goes_on and newer.in_a_row)
    return replace(
        newer,
        successes=older.successes + newer.successes,
        failures=older.failures + newer.failures,
        last=newer.last or older.last,
        rest_until=max(older.rest_until, newer.rest_until),
        era=newer.era if started_anew else older.era,
        recovered=newer.recovered or (goes_on and older.recovered),
        in_a_row=newer.in_a_row if started_anew else older.in_a_row + newer.in_a_row,
    )
