"""The gate through which all of a worker's requests to web hosts go.

    request(host) ──▶ queue of the host ──a slot is free, and the host's spacing has passed──▶ the request ──outcome──▶ news
                                            ▲ Lease                                                                   │
                                        HostLedger (ledger.py), one for the cluster ◀──HostReport, about once a second┘

A request costs no call to another process: the lease says how many requests may be in flight here, and how far apart they start.
Everything happens in one asyncio loop.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace

from pipelines.config import HostSettings
from pipelines.crawling.doors import NO_LEASE, Door, News, together
from pipelines.crawling.fetched import FetchError
from pipelines.crawling.ledger import HostLedger, HostReport, HostState, Lease

__all__ = ["HOST_FAULTS", "HostGate", "HostLedger", "HostReport", "HostState", "Lease"]

HOST_FAULTS = frozenset({"dns", "connect", "tls", "timeout", "too_slow", "incomplete", "bad_response", "http_5xx", "http_429"})
"""Codes that speak against the host, and not against one photo."""
RENEW_SECONDS = 1.0
BATCH_SECONDS = 0.02
"""Between two calls to the ledger; what comes up meanwhile goes together."""
CATCH_UP_SECONDS = 0.1
"""If the loop was late, starts that were due within this time are made up for at once."""
_DETAIL_LENGTH = 200
# What is left of a spacing by rounding is none.
_ROUNDING = 1e-6

_log = logging.getLogger(__name__)


class HostGate:
    """Lets requests to each host begin when the worker's lease allows it, first come first served. One for each process."""

    def __init__(
        self,
        settings: HostSettings,
        renew: Callable[[dict[str, HostReport]], Awaitable[dict[str, Lease]]],
        capacity: int | None = None,
    ) -> None:
        """Nothing passes before `run` runs.

        Args:
            settings: The limits of each host.
            renew: `HostLedger.renew` for this worker. It may raise; then leases run out while it is tried again.
            capacity: Requests in flight at once, at all hosts together; who has passed must have no other queue to stand in,
                or the spacing of requests would get lost there.
        """
        self._capacity = math.inf if capacity is None else capacity
        self._in_flight = 0
        self._held = False
        self._crowded_out: dict[str, None] = {}
        self._settings = settings
        self._renew = renew
        self._doors: dict[str, Door] = {}
        self._given_up: dict[str, Lease] = {}
        self._urgent: set[str] = set()
        self._wake = asyncio.Event()

    @contextlib.asynccontextmanager
    async def request(self, host: str) -> AsyncIterator[None]:
        """Wait until `host` may be asked; what is raised inside is the request's outcome.

        A `FetchError` with a code of `HOST_FAULTS` is the host's failure; another one, or none, its success; any other exception
        says nothing about it.

        Raises:
            FetchError: the host is given up for this run (`given_up`), with the code of its last failure.
        """
        door, generation = await self._enter(host)
        try:
            yield
        except FetchError as error:
            self._note(host, door, generation, error)
            raise
        else:
            self._note(host, door, generation, None)
        finally:
            self._release(host, door, generation)

    async def run(self) -> None:
        """Renew leases until cancelled: all once a second, and what cannot wait at once."""
        loop = asyncio.get_running_loop()
        next_round = loop.time()
        reachable = True
        while True:
            pause = 0.0
            if loop.time() >= next_round:
                next_round = loop.time() + RENEW_SECONDS
                self._urgent.update(self._doors)
            hosts, self._urgent = self._urgent, set()
            self._wake.clear()
            if hosts:
                pause = BATCH_SECONDS
                try:
                    await self._ask(hosts)
                    reachable = True
                except Exception:
                    if reachable:
                        _log.warning("the ledger of hosts cannot be reached; trying again", exc_info=True)
                    reachable = False
                    # Among all others; until then leases hold, or run out.
                    pause = RENEW_SECONDS
            await asyncio.sleep(pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_round):
                    await self._wake.wait()

    def in_flight(self) -> dict[str, int]:
        """Requests that have begun and not ended, by host."""
        return {host: door.in_flight for host, door in self._doors.items() if door.in_flight}

    async def _enter(self, host: str) -> tuple[Door, int]:
        """The host's door, with a slot taken, and the generation of the request."""
        if lost := self._given_up.get(host):
            raise _given_up(lost)
        loop = asyncio.get_running_loop()
        door = self._doors.get(host)
        if door is None:
            door = self._doors[host] = Door(since=loop.time())
        turn: asyncio.Future[int] = loop.create_future()
        door.waiters.append(turn)
        self._serve(host, door)
        if turn.done():
            return door, turn.result()
        try:
            return door, await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                # Its turn had come, and it did not live to know.
                self._release(host, door, turn.result())
            else:
                with contextlib.suppress(ValueError):
                    door.waiters.remove(turn)
                self._serve(host, door)
            raise

    def _serve(self, host: str, door: Door) -> None:
        """Let requests begin that may; see to it that the others are thought of in time."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        overdue = 0.0
        if door.timer:
            # Only who waited for the spacing alone was held up by a late loop.
            overdue = CATCH_UP_SECONDS
            door.timer.cancel()
            door.timer = None
        door.settle(now, overdue)
        while door.waiters:
            if door.waiters[0].done():  # Cancelled, and not yet gone.
                door.waiters.popleft()
            elif not door.has_slot(now):
                break
            elif self._held or self._in_flight >= self._capacity:
                self._crowded_out[host] = None
                break
            elif door.owes > _ROUNDING:
                door.timer = loop.call_at(now + door.owes / door.lease.requests_per_second, self._serve, host, door)
                break
            else:
                door.in_flight += 1
                self._in_flight += 1
                door.of_generation += 1
                door.owes += 1
                door.waiters.popleft().set_result(door.generation)
        all_given = door.lease.concurrency >= door.told
        if door.waiters and not door.has_slot(now) and all_given and door.in_flight + len(door.waiters) > door.told:
            self._hurry(host)

    def _release(self, host: str, door: Door, generation: int) -> None:
        door.in_flight -= 1
        self._in_flight -= 1
        if generation == door.generation:
            door.of_generation -= 1
        self._give_back(host, door)
        # Others first, or a busy host would take every place that it leaves.
        self._serve_crowded_out()
        self._serve(host, door)

    def hold(self, held: bool) -> None:
        """Let no request begin, as long as what has come takes up the room that there is; and go on."""
        self._held = held
        if not held:
            self._serve_crowded_out()

    def _serve_crowded_out(self) -> None:
        """Hosts that had a turn and found no place among all requests, the one that has waited longest first."""
        while self._crowded_out and not self._held and self._in_flight < self._capacity:
            host = next(iter(self._crowded_out))
            del self._crowded_out[host]
            if door := self._doors.get(host):
                self._serve(host, door)

    def _note(self, host: str, door: Door, generation: int, error: FetchError | None) -> None:
        """Remember an outcome; one that shows that the host must not be asked now stops it here at once."""
        news = door.news
        fault = error is not None and error.code in HOST_FAULTS
        news.successes += not fault
        news.failures += fault
        rest = error.retry_after if error is not None and error.retry_after is not None and error.retry_after > 0 else None
        if error is not None and (fault or rest):
            news.last = error
        stop = False
        if rest:
            news.rest_until = max(news.rest_until, asyncio.get_running_loop().time() + rest)
            stop = True
        if generation == door.generation:
            if news.era != door.lease.era:
                news.era, news.recovered, news.in_a_row = door.lease.era, False, 0
            if fault:
                news.in_a_row += 1
                door.in_a_row += 1
                stop = stop or door.lease.trying or door.in_a_row >= self._settings.failures
            else:
                news.recovered, news.in_a_row = True, 0
                door.in_a_row = 0
                if door.lease.trying:
                    self._hurry(host)
        if stop:
            door.stopped = True
            self._void(door)
            door.begin_generation()
            self._hurry(host)

    async def _ask(self, hosts: Iterable[str]) -> None:
        """Renew the leases of some hosts."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        reports: dict[str, HostReport] = {}
        sent: dict[str, News] = {}
        for host in hosts:
            if door := self._doors.get(host):
                reports[host] = self._report(door, asked)
                sent[host], door.news = door.news, News()
        if not reports:
            return
        try:
            leases = await self._renew(reports)
        except BaseException:
            for host, news in sent.items():
                self._doors[host].news = together(news, self._doors[host].news)
            raise
        for host, report in reports.items():
            if lease := leases.get(host):
                self._take(host, report, lease, asked)

    def _report(self, door: Door, now: float) -> HostReport:
        """What the ledger must know; a door at which nothing happens gives its lease back by it."""
        if door.idle:
            self._void(door)
        door.settle(now, CATCH_UP_SECONDS if door.timer else 0.0)
        door.stopped = door.gives_back = False
        door.told = door.in_flight + len(door.waiters)
        obeyed = door.lease if now < door.expires else NO_LEASE
        news = door.news
        return HostReport(
            waiting=len(door.waiters),
            in_flight=door.in_flight,
            successes=news.successes,
            failures=news.failures,
            last_failure=news.last.code if news.last else None,
            in_a_row=news.in_a_row,
            retry_after=news.rest_until - now if news.rest_until > now else None,
            recovered=news.recovered,
            era=news.era,
            detail=news.last.detail[:_DETAIL_LENGTH] if news.last else "",
            concurrency=obeyed.concurrency,
            requests_per_second=obeyed.requests_per_second,
        )

    def _take(self, host: str, report: HostReport, lease: Lease, asked: float) -> None:
        """Obey a lease that was asked for at `asked`."""
        door = self._doors[host]
        now = asyncio.get_running_loop().time()
        if lease.given_up:
            self._given_up[host] = lease
            self._void(door)
            while door.waiters:
                turn = door.waiters.popleft()
                if not turn.done():
                    turn.set_exception(_given_up(lease))
        elif not door.stopped:  # Else the ledger did not know why, and is about to be told.
            door.settle(now, CATCH_UP_SECONDS if door.timer else 0.0)
            if not report.concurrency:
                door.owes = lease.owes
            if lease.era != door.lease.era:
                door.begin_generation()
            door.lease, door.expires = lease, asked + lease.valid_for
            assumed = max(report.concurrency, report.in_flight)
            door.gives_back = lease.concurrency < min(assumed, report.in_flight + report.waiting) and not lease.rests_for
            self._give_back(host, door)
        if door.idle and not door.told and door.news == News():
            del self._doors[host]
        else:
            self._serve(host, door)

    def _void(self, door: Door) -> None:
        """Obey no lease."""
        door.settle(asyncio.get_running_loop().time(), 0.0)
        door.lease, door.expires = replace(NO_LEASE, era=door.lease.era), -math.inf
        if door.timer:
            door.timer.cancel()
            door.timer = None

    def _give_back(self, host: str, door: Door) -> None:
        """Tell the ledger as soon as others may have what they wait for."""
        if door.gives_back and door.in_flight <= door.lease.concurrency:
            door.gives_back = False
            self._hurry(host)

    def _hurry(self, host: str) -> None:
        self._urgent.add(host)
        self._wake.set()


def _given_up(lease: Lease) -> FetchError:
    assert lease.given_up is not None
    return FetchError(lease.given_up, lease.detail, given_up=True)
