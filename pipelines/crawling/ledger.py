"""The cluster's one book of web hosts: how much of each host's limits every worker may use, and which hosts rest.

    gate in each worker ──HostReport: what I obey, use and want──▶ HostLedger ──Lease: what you may use now──▶ gate

At every moment and for each host, in whatever order workers renew, and whichever renewals get lost on the way or back:

1. sum over workers of the requests that each has in flight or may still start  <=  concurrency
2. sum of the rates of all leases that are still valid                          <=  requests_per_second

Why they hold: from a report on, the ledger assumes of a worker the largest of what it had in flight, of the lease that it obeyed
then, and of the lease that it is sent in answer, whether that arrives or not. Only its next report, which says what it obeys by
then, frees something, and nobody is given more than what is free. So what one is to get is first taken from others, which takes
them one renewal.

A worker that is silent for `VALID_SECONDS` may start nothing more: its rate is free. What it may have in flight counts on for as
long as a request may last, for it may be alive and cut off; `leave` ends that at once for one that is known to be gone. Only
durations cross processes, since clocks of nodes differ; a worker counts a lease's age from before it asked for it.

A host's breaker: open ──`failures` in a row──▶ resting ──▶ trying: one request in the whole cluster ──success──▶ open
                                                   ▲            │
                                                   └──failure───┘  twice as long; after `rests` of them given up for this run

Requests carry the era in which they began. Each rest begins a new one, so what was in flight before it says nothing about after.

Sources: leases, Gray & Cheriton (SOSP 1989); circuit breakers, Nygard, Release It! (2007), chapter 5.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipelines.config import HostSettings

VALID_SECONDS = 5.0
"""A lease that is older is void: a few missed renewals."""
TURN_SECONDS = 5.0
"""Where not all workers can have a part of a host, one keeps its part for so long, or for `_TURN_REQUESTS` spacings."""
_TURN_REQUESTS = 3
_SWEEP_SECONDS = 60.0
_JITTER = 0.1


@dataclass(frozen=True)
class HostReport:
    """What one worker does at one host, as it asks to renew its lease. Counts are since its last report."""

    waiting: int = 0
    in_flight: int = 0
    successes: int = 0
    failures: int = 0
    last_failure: str | None = None
    """Its code."""
    in_a_row: int = 0
    """Failures since the last success, among requests of `era`."""
    retry_after: float | None = None
    """s from now: the longest that the host has asked for (RFC 9110, section 10.2.3)."""
    recovered: bool = False
    """Whether a request of `era` succeeded, before those in a row failed."""
    era: int = 0
    detail: str = ""
    """Of the last failure, for people."""
    concurrency: int = 0
    """Of the lease that the worker obeys as it writes this, and until the answer comes; 0 if it has none."""
    requests_per_second: float = 0.0
    """Of the same lease."""


@dataclass(frozen=True)
class Lease:
    """What one worker may do at one host until the next answer, or until it is `valid_for` s old."""

    concurrency: int = 0
    """Requests in flight at which it starts no more."""
    requests_per_second: float = 0.0
    rests_for: float = 0.0
    """s, 0 if the host does not rest."""
    given_up: str | None = None
    """Code of the failure for which the host is left for another run."""
    valid_for: float = VALID_SECONDS
    detail: str = ""
    """Why it is given up, for people."""
    era: int = 0
    """Of requests that begin under this lease."""
    trying: bool = False
    """One request of this era at a time, and none after a failure."""
    owes: float = 0.0
    """For one who obeyed no lease when asking: the part of a request, 0 to 1, whose spacing must pass before its first one."""


@dataclass(frozen=True)
class HostState:
    """One host, for the live display."""

    in_flight: int
    waiting: int
    state: str
    """`open`, `resting for 28 s`, `one try` or `given up: http_5xx`."""
    successes: int
    failures: int


@dataclass(slots=True, eq=False)
class _Holding:
    """What is assumed of one worker at one host until it reports again."""

    turn: float
    """When it was last given a slot that another one wanted too; at first, when it came."""
    turn_until: float = -math.inf
    in_flight: int = 0
    waiting: int = 0
    concurrency: int = 0
    """The larger of the lease that it obeyed and the one it was sent; for the rate likewise."""
    requests_per_second: float = 0.0
    valid_until: float = 0.0

    @property
    def counted(self) -> int:
        """Requests that it has, or may still start."""
        return max(self.in_flight, self.concurrency)

    @property
    def demand(self) -> int:
        return self.in_flight + self.waiting


@dataclass(slots=True)
class _Host:
    touched: float
    """When a worker last reported it."""
    holdings: dict[str, _Holding] = field(default_factory=dict)
    credit: float = 1.0
    """Requests, at most one, that the rate allows and nobody has been given."""
    era: int = 0
    in_a_row: int = 0
    rests: int = 0
    """In a row."""
    rests_until: float = 0.0
    trying: bool = False
    """It rests, or nobody knows yet whether that has helped."""
    tried_by: str | None = None
    last_failure: str = "unexpected"
    last_detail: str = ""
    given_up: Lease | None = None
    successes: int = 0
    failures: int = 0


class HostLedger:
    """Shares each host's limits out among the workers that want it, and lets hosts rest. Bookkeeping only; a Ray actor elsewhere.

    Calls of one worker must come in the order in which it made them, as an actor's calls from one caller do.
    """

    def __init__(
        self,
        settings: HostSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        request_seconds: float = 120.0,
        successor: bool = False,
        jitter: random.Random | None = None,
    ) -> None:
        """An empty book.

        Args:
            settings: The limits of each host.
            clock: In s; its start does not matter.
            request_seconds: How long a request may last (crawl.total_seconds); so long count those of a worker that is silent.
            successor: Whether a ledger before this one may have given leases. Then workers get no more than what they say they
                have until those are void.
            jitter: Lengthens or shortens rests, so that what failed together is not tried together.
        """
        self._settings = settings
        self._clock = clock
        self._request_seconds = request_seconds
        self._jitter = jitter or random.Random()
        self._hosts: dict[str, _Host] = {}
        self._swept = clock()
        self._inherits_until = clock() + VALID_SECONDS if successor else -math.inf
        # Each spaces its own requests, not those of all: in any time, each may add one to what the rate allows. No more share a
        # host than makes this the requests of one second.
        self._sharers = max(1, int(settings.requests_per_second))
        spacing = min(self._sharers, settings.concurrency) / settings.requests_per_second
        self._turn_seconds = max(TURN_SECONDS, _TURN_REQUESTS * spacing)

    def renew(self, worker: str, reports: dict[str, HostReport]) -> dict[str, Lease]:
        """Take a worker's reports on some of its hosts; its new lease for each of them.

        A report without anything obeyed, in flight or waiting gives back what the worker had there. Hosts without a report stay
        as they are. Outcomes whose report got no answer come again, and count twice if the ledger had them.
        """
        now = self._clock()
        if now - self._swept > _SWEEP_SECONDS:
            self._sweep(now)
        leases = {}
        for name, report in reports.items():
            host = self._hosts.get(name)
            if host is None:
                host = self._hosts[name] = _Host(touched=now)
            self._settle(host, now)
            self._judge(name, host, report, now)
            leases[name] = self._lease(host, worker, report, now)
        return leases

    def leave(self, worker: str) -> None:
        """A worker is gone, and all its requests with it."""
        now = self._clock()
        for host in self._hosts.values():
            if worker in host.holdings:
                self._settle(host, now)
                host.holdings.pop(worker, None)

    def snapshot(self) -> dict[str, HostState]:
        """Hosts that were asked within the last minute or so, or that have failed lately."""
        now = self._clock()
        return {name: _state(host, now) for name, host in self._hosts.items()}

    def _settle(self, host: _Host, now: float) -> None:
        """Bring a host's books from when it was last touched to `now`."""
        unused = self._settings.requests_per_second - sum(one.requests_per_second for one in host.holdings.values())
        host.credit = min(1.0, host.credit + max(0.0, unused) * (now - host.touched))
        host.touched = now
        for worker, one in list(host.holdings.items()):
            if now >= one.valid_until:
                one.requests_per_second = 0.0
            if now >= one.valid_until + self._request_seconds:
                del host.holdings[worker]

    def _judge(self, name: str, host: _Host, report: HostReport, now: float) -> None:
        """What a worker's outcomes mean for the host."""
        settings = self._settings
        host.successes += report.successes
        host.failures += report.failures
        if report.last_failure:
            host.last_failure, host.last_detail = report.last_failure, report.detail
        if host.given_up:
            return
        failing = False
        if report.era == host.era:
            if report.recovered:
                host.in_a_row, host.rests, host.trying = 0, 0, False
            host.in_a_row += report.in_a_row
            failing = report.in_a_row > 0 and (host.trying or host.in_a_row >= settings.failures)
        rest = report.retry_after or 0.0
        if rest > settings.longest_rest_seconds:
            limit = f"crawl.per_host.longest_rest_seconds, {settings.longest_rest_seconds:g}"
            self._give_up(host, f"{name} is left for another run: it wants to be left alone for {rest:.0f} s, more than {limit}")
            return
        # A rest that the host asks for is no failure to rest; one more failure after it is.
        if failing and (host.trying or not rest):
            if host.rests == settings.rests:
                count = f"{host.rests} rest{'' if host.rests == 1 else 's'}"
                last = host.last_detail or host.last_failure
                self._give_up(host, f"{name} is left for another run after {count}; last: {last}")
                return
            rest = max(rest, self._rest_seconds(host.rests))
            host.rests += 1
        if rest > 0:
            host.rests_until = max(host.rests_until, now + rest)
            host.era += 1
            host.trying, host.tried_by = True, None

    def _rest_seconds(self, rests_before: int) -> float:
        doubled = self._settings.rest_seconds * 2.0 ** min(rests_before, 60)
        return min(self._settings.longest_rest_seconds, doubled * self._jitter.uniform(1 - _JITTER, 1 + _JITTER))

    def _give_up(self, host: _Host, detail: str) -> None:
        host.given_up = Lease(given_up=host.last_failure, detail=detail)

    def _lease(self, host: _Host, worker: str, report: HostReport, now: float) -> Lease:
        """A worker's share, and what is assumed of it from now on."""
        if not (report.concurrency or report.in_flight or report.waiting):
            host.holdings.pop(worker, None)
            return host.given_up or Lease(rests_for=max(0.0, host.rests_until - now), era=host.era)
        newcomer = worker not in host.holdings
        holding = host.holdings.setdefault(worker, _Holding(turn=now))
        holding.in_flight, holding.waiting = report.in_flight, report.waiting
        # What it obeys counts until it reports again, also where it is given less now: this answer may get lost.
        holding.concurrency, holding.requests_per_second = report.concurrency, report.requests_per_second
        holding.valid_until = now + VALID_SECONDS
        if host.given_up:
            return host.given_up
        if now < host.rests_until:
            return Lease(rests_for=host.rests_until - now, era=host.era)
        concurrency, rate = self._try(host, worker, now) if host.trying else self._share(host, worker, newcomer, now)
        if now < self._inherits_until:
            concurrency, rate = min(concurrency, report.concurrency), min(rate, report.requests_per_second)
        if not concurrency or not rate:
            return Lease(era=host.era)
        owes = 0.0
        if not report.concurrency:
            owes, host.credit = 1.0 - host.credit, 0.0
        holding.concurrency = max(holding.concurrency, concurrency)
        holding.requests_per_second = max(holding.requests_per_second, rate)
        return Lease(concurrency, rate, era=host.era, trying=host.trying, owes=owes)

    def _free(self, host: _Host, worker: str) -> tuple[int, float]:
        """What no other worker has."""
        others = [one for name, one in host.holdings.items() if name != worker]
        slots = self._settings.concurrency - sum(one.counted for one in others)
        rate = self._settings.requests_per_second - sum(one.requests_per_second for one in others)
        return max(0, slots), max(0.0, rate)

    def _try(self, host: _Host, worker: str, now: float) -> tuple[int, float]:
        """Room for one more request than a worker has, for one worker, and only once all others know of the rest."""
        by = host.holdings.get(host.tried_by) if host.tried_by else None
        if by is None or now >= by.valid_until:
            host.tried_by = None
        others = [one for name, one in host.holdings.items() if name != worker and now < one.valid_until]
        holding = host.holdings[worker]
        if host.tried_by is None and holding.waiting and not any(one.concurrency for one in others):
            host.tried_by = worker
        if host.tried_by != worker:
            return 0, 0.0
        slots, rate = self._free(host, worker)
        return min(slots, holding.in_flight + 1), rate

    def _share(self, host: _Host, worker: str, newcomer: bool, now: float) -> tuple[int, float]:
        """A worker's fair share of the slots by what all want, as far as it is free, and its part of the rate."""
        settings = self._settings
        holding = host.holdings[worker]
        # First who waits for something; of those, whose turn has not ended; of the others, whose last turn is longest ago.
        present = [one for one in host.holdings.values() if now < one.valid_until]
        present.sort(key=lambda one: (not one.waiting, now >= one.turn_until, one.turn))
        chosen = present[: self._sharers]
        if holding not in chosen:
            return 0, 0.0
        elsewhere = sum(one.counted for one in host.holdings.values() if one not in chosen)
        shares = fair_shares(max(0, settings.concurrency - elsewhere), [one.demand for one in chosen])
        fair = shares[chosen.index(holding)]
        slots, rate = self._free(host, worker)
        concurrency = min(fair, slots)
        if not concurrency:
            return 0, 0.0
        if newcomer:
            # Others may be about to come, too: what it leaves to them would else be missing until its first renewal.
            concurrency = min(concurrency, max(1, slots // 2))
            return concurrency, min(rate, settings.requests_per_second * concurrency / settings.concurrency)
        wanted = any(one.waiting for one in present[self._sharers :]) or any(
            share < min(one.demand, fair) for one, share in zip(chosen, shares, strict=True)
        )
        if wanted and now >= holding.turn_until:
            holding.turn, holding.turn_until = now, now + self._turn_seconds
        return concurrency, min(rate, settings.requests_per_second * fair / sum(shares))

    def _sweep(self, now: float) -> None:
        """Forget hosts that nobody has asked for lately, so that the book does not grow with every host of the web."""
        self._swept = now
        for name, host in list(self._hosts.items()):
            troubled = host.in_a_row or host.trying
            patience = max(_SWEEP_SECONDS, self._settings.longest_rest_seconds if troubled else 0.0)
            idle = now - max(host.touched, host.rests_until)
            gone = all(now >= one.valid_until + self._request_seconds for one in host.holdings.values())
            # Its one request of credit is then full again, too.
            if gone and not host.given_up and idle > max(patience, 1 / self._settings.requests_per_second):
                del self._hosts[name]


def fair_shares(slots: int, demands: Sequence[int]) -> list[int]:
    """Split slots so that nobody gets more than demanded and the smallest shares are as large as can be (max-min fairness).

    Those at equal rights differ by one at most: what cannot be divided goes to the first of them.
    """
    shares = [0] * len(demands)
    wanting = [place for place, demand in enumerate(demands) if demand > 0]
    while slots and wanting:
        each = max(1, slots // len(wanting))
        for place in wanting[:slots]:
            given = min(each, demands[place] - shares[place])
            shares[place] += given
            slots -= given
        wanting = [place for place in wanting if shares[place] < demands[place]]
    return shares


def _state(host: _Host, now: float) -> HostState:
    state = "open"
    if host.given_up:
        state = f"given up: {host.given_up.given_up}"
    elif now < host.rests_until:
        state = f"resting for {host.rests_until - now:.0f} s"
    elif host.trying:
        state = "one try"
    in_flight = sum(one.in_flight for one in host.holdings.values())
    waiting = sum(one.waiting for one in host.holdings.values() if now < one.valid_until)
    return HostState(in_flight, waiting, state, host.successes, host.failures)
