"""Limits of one process: requests to each web host, circuit breakers of hosts that fail, and photos in memory.

    request(host) ─▶ a slot of the host ─▶ no cool-down ─▶ its rate ─▶ a connection of the process ─▶ the request
                                               ▲                                                          │ outcome
                                               └───────────────────── circuit breaker ◀───────────────────┘

Processes exchange nothing: each has an equal share of the limits (`share_of`), so their sum never exceeds the limits. The shares
are used fully, since parts are cut by a hash of the photos' ids: each part holds about as many photos of a host as any other.

    closed ──`failures` in a row──▶ cool-down ──▶ half-open: one request ──success──▶ closed
                                       ▲              │
                                       └───failure────┘  twice as long; after `COOL_DOWNS` the host is given up for this run

Source: circuit breakers, Nygard, Release It! (2007), chapter 5.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from aiolimiter import AsyncLimiter

from pipelines.config import HostSettings
from pipelines.crawling.answers import FetchError

HOST_FAULTS = frozenset({"dns", "connect", "tls", "timeout", "too_slow", "incomplete", "bad_response", "http_5xx", "http_429"})
"""Codes that speak against the host, and not against one photo."""
COOL_DOWN_SECONDS = 30.0
"""Length of a host's first cool-down; each further one without a success between is twice as long."""
LONGEST_COOL_DOWN_SECONDS = 600.0
"""No cool-down is longer; a host that asks for a longer one (Retry-After) is given up for this run."""
COOL_DOWNS = 4
"""After so many cool-downs in a row a host is given up for this run, with the code of its last failure."""
BURST_SECONDS = 0.1
"""Requests that the rate allows within this time may start at once."""
_JITTER = 0.1
_DETAIL_LENGTH = 200


@dataclass(slots=True, eq=False)
class _Host:
    """A host and its circuit breaker. Times in s of the event loop."""

    slots: asyncio.Semaphore
    rate: AsyncLimiter
    generation: int = 0
    """Number of cool-downs so far. A request that started before a cool-down says nothing about the time after it."""
    in_a_row: int = 0
    """Failures of this generation since its last success."""
    cool_downs: int = 0
    """In a row."""
    cools_until: float = 0.0
    half_open: bool = False
    """It cools down, or did and no request has succeeded since."""
    tried: bool = False
    """The one request of a half-open host is in flight."""
    given_up: FetchError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class HostLimits:
    """All limits of one process, in one event loop."""

    def __init__(self, settings: HostSettings, connections: int) -> None:
        """No limit is in use yet.

        Args:
            settings: of each host, for this process.
            connections: requests in flight at all hosts together, and photos that are not yet inspected.
        """
        self.settings = settings
        self.connections = connections
        self.asking = 0
        self.uninspected = 0
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._in_flight = asyncio.Semaphore(connections)
        self._hosts: dict[str, _Host] = {}

    @contextlib.asynccontextmanager
    async def request(self, host: str) -> AsyncIterator[None]:
        """Wait until `host` may be asked; what is raised inside is the request's outcome.

        A `FetchError` with a code of `HOST_FAULTS` is the host's failure. Another one, or none, is its success. Any other
        exception says nothing about it. A host that cools down keeps no connection from other hosts.

        Raises:
            FetchError: the host is given up for this run (`given_up`), with the code of its last failure.
        """
        if host not in self._hosts:
            self._hosts[host] = _Host(asyncio.Semaphore(self.settings.concurrency), _rate(self.settings))
        state = self._hosts[host]
        async with state.slots:
            while True:
                await _may_start(state)
                await state.rate.acquire()
                async with self.slot():
                    if _must_wait(state):  # It failed while this request waited for the rate or for a connection.
                        continue
                    generation, state.tried = state.generation, state.half_open
                    try:
                        yield
                    except FetchError as error:
                        self._note(host, state, generation, error)
                        raise
                    else:
                        self._note(host, state, generation, None)
                    finally:
                        if state.tried and generation == state.generation:
                            state.tried = False
                            _notify(state)
                return

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the process's connections, once there is room in memory for what it brings."""
        async with self._in_flight:
            await self.has_room.wait()
            self.asking += 1
            try:
                yield
            finally:
                self.asking -= 1

    @contextlib.contextmanager
    def inspecting(self) -> Iterator[None]:
        """Around the time between a photo's arrival and its end in memory."""
        self.uninspected += 1
        if self.uninspected == self.connections:
            self.has_room.clear()
        try:
            yield
        finally:
            self.uninspected -= 1
            if self.uninspected == self.connections - 1:
                self.has_room.set()

    def _note(self, name: str, host: _Host, generation: int, error: FetchError | None) -> None:
        """Take in the outcome of a request that started in `generation`."""
        if host.given_up:
            return
        # Written so that NaN is no wait.
        wait = error.retry_after if error and error.retry_after and error.retry_after > 0 else 0.0
        failing = False
        if generation == host.generation:
            if error and error.code in HOST_FAULTS:
                host.in_a_row += 1
                failing = host.half_open or host.in_a_row >= self.settings.failures
            else:
                host.in_a_row, host.cool_downs, host.half_open = 0, 0, False
                _notify(host)
        if error and wait > LONGEST_COOL_DOWN_SECONDS:
            _give_up(host, error, f"{name} is left for another run: it asks for a pause of {wait:.0f} s (Retry-After)")
        elif error and failing:
            if host.cool_downs == COOL_DOWNS:
                last = error.detail[:_DETAIL_LENGTH]
                _give_up(host, error, f"{name} is left for another run after {COOL_DOWNS} cool-downs; last: {last}")
            else:
                wait = max(wait, _cool_down_seconds(host.cool_downs))
                host.cool_downs += 1
        if wait and not host.given_up:
            host.cools_until = max(host.cools_until, asyncio.get_running_loop().time() + wait)
            host.generation += 1
            host.half_open, host.tried, host.in_a_row = True, False, 0
            _notify(host)


def share_of(settings: HostSettings, number: int, count: int) -> HostSettings:
    """The limits of process `number` of `count`, which must not be more than `most_processes` says."""
    slots = settings.concurrency // count + (number < settings.concurrency % count)
    rate = settings.requests_per_second / count
    return settings.model_copy(update={"concurrency": slots, "requests_per_second": rate})


def most_processes(settings: HostSettings) -> int:
    """How many processes may share a host: each needs one request at once, and may start one when the others do."""
    return max(1, min(settings.concurrency, int(settings.requests_per_second)))


def _rate(settings: HostSettings) -> AsyncLimiter:
    at_once = max(1.0, settings.requests_per_second * BURST_SECONDS)
    return AsyncLimiter(at_once, at_once / settings.requests_per_second)


async def _may_start(host: _Host) -> None:
    """Wait until a host does not cool down, and no other request tries whether it is back."""
    while _must_wait(host):
        if host.given_up:
            raise FetchError(host.given_up.code, host.given_up.detail, given_up=True)
        left = host.cools_until - asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left if left > 0 else None):
                await host.changed.wait()


def _must_wait(host: _Host) -> bool:
    cools = host.half_open and (host.tried or asyncio.get_running_loop().time() < host.cools_until)
    return cools or host.given_up is not None


def _notify(host: _Host) -> None:
    """Wake the requests that wait for a change."""
    host.changed.set()
    host.changed = asyncio.Event()


def _give_up(host: _Host, error: FetchError, detail: str) -> None:
    host.given_up = FetchError(error.code, detail)
    _notify(host)


def _cool_down_seconds(before: int) -> float:
    """Length of the next cool-down after so many; jitter, so that what failed together is not tried together."""
    return min(LONGEST_COOL_DOWN_SECONDS, COOL_DOWN_SECONDS * 2.0**before * random.uniform(1 - _JITTER, 1 + _JITTER))
