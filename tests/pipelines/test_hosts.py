"""Limits of web hosts: their shares, the circuit breaker, and what several processes with their shares do to a host together.

Tests run in a loop whose time leaps to the next timer: minutes of a crawl take milliseconds, and every number is exact.
"""

import asyncio
import collections
import functools
import itertools
import math
import random
import selectors
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import HostSettings
from pipelines.crawling import hosts
from pipelines.crawling.answers import FetchError
from pipelines.crawling.hosts import HOST_FAULTS, HostLimits, most_processes, share_of
from schemas.outcomes import OUTCOMES

HOST = "photos.example:443"
FIRST = hosts.COOL_DOWN_SECONDS


class Leaping(selectors.DefaultSelector):
    """Where nothing is ready, time leaps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen again"
            self.now += timeout
        self.now += 1e-9  # As a real clock goes on; a timer may come early by rounding.
        return ready


class LeapingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.leaping = Leaping()
        super().__init__(self.leaping)

    def time(self) -> float:
        return self.leaping.now


def leaping(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop that never waits."""

    @functools.wraps(test)
    def run(*given: Any, **named: Any) -> None:
        with asyncio.Runner(loop_factory=LeapingLoop) as runner:
            runner.run(test(*given, **named))

    return run


class Crawl:
    """Processes with their shares of the limits, and what hosts see of them."""

    def __init__(self, processes: int = 1, connections: int = 1000, **limits: Any) -> None:
        self.loop = asyncio.get_running_loop()
        settings = HostSettings(**{"requests_per_second": 1e6, "concurrency": 1000, **limits})
        self.processes = [HostLimits(share_of(settings, number, processes), connections) for number in range(processes)]
        self.random = random.Random(processes)
        self.starts: dict[str, list[float]] = collections.defaultdict(list)
        self.open: collections.Counter[str] = collections.Counter()
        self.peak: collections.Counter[str] = collections.Counter()

    async def ask(
        self, host: str = HOST, process: int = 0, seconds: float = 0.1, failure: Callable[[], Exception | None] = lambda: None
    ) -> None:
        """A request of so many seconds; `failure` makes what is raised at its end."""
        async with self.processes[process].request(host):
            self.starts[host].append(self.loop.time())
            self.open[host] += 1
            self.peak[host] = max(self.peak[host], self.open[host])
            try:
                await asyncio.sleep(seconds)
            finally:
                self.open[host] -= 1
            if error := failure():
                raise error

    async def keep_asking(
        self, seconds: float, photos: int, failure: Callable[[], Exception | None], process: int = 0
    ) -> list[Any]:
        """So many photos at once, each asked for again and again for so many s; how each ended: null, or given up."""
        end = self.loop.time() + seconds

        async def photo() -> FetchError | None:
            while self.loop.time() < end:
                try:
                    await self.ask(process=process, failure=failure)
                except FetchError as error:
                    if error.given_up:
                        return error
            return None

        return await asyncio.gather(*(photo() for _ in range(photos)))


def most_beyond(times: Iterable[float], rate: float) -> float:
    """Over all stretches of time: how many more of `times` lie in one, both ends included, than `rate` allows."""
    most = least = 0.0
    for number, at in enumerate(sorted(times)):
        least = min(least, number - rate * at)
        most = max(most, number + 1 - rate * at - least)
    return most


def batches(times: Iterable[float], gap: float) -> list[list[float]]:
    """Times, cut where nothing happens for more than `gap` s."""
    found: list[list[float]] = []
    for at in sorted(times):
        if not found or at - found[-1][-1] > gap:
            found.append([])
        found[-1].append(at)
    return found


def down(retry_after: float | None = None) -> FetchError:
    return FetchError("http_5xx", "HTTP 503", retry_after=retry_after)


async def fails(crawl: Crawl, host: str = HOST, retry_after: float | None = None) -> None:
    """A request that fails."""
    with pytest.raises(FetchError):
        await crawl.ask(host, failure=lambda: down(retry_after))


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# Shares of the limits.


@given(concurrency=st.integers(1, 40), rate=st.floats(0.01, 1000), wished=st.integers(1, 64))
def test_shares_add_up_to_the_limits_and_none_is_nothing(concurrency, rate, wished):
    settings = HostSettings(concurrency=concurrency, requests_per_second=rate)
    count = min(wished, most_processes(settings))
    shares = [share_of(settings, number, count) for number in range(count)]
    assert sum(share.concurrency for share in shares) == concurrency
    assert sum(share.requests_per_second for share in shares) == pytest.approx(rate)
    assert min(share.concurrency for share in shares) >= 1
    # All may start one at the same moment: that is no more than a second's worth, or one.
    assert count <= max(1, rate)


@pytest.mark.parametrize(
    ("processes", "concurrency", "rate", "seconds"),
    [(1, 3, 1000, 0.5), (3, 5, 50, 0.25), (8, 10, 20, 0.3), (4, 4, 4, 1.0), (1, 1, 0.5, 0.1)],
)
@leaping
async def test_a_host_sees_the_limits_and_they_are_used(processes, concurrency, rate, seconds):
    """Many photos of one host, as of one CDN: several connections of each process."""
    crawl = Crawl(processes, concurrency=concurrency, requests_per_second=rate)
    tasks = [asyncio.create_task(crawl.ask(HOST, number % processes, seconds)) for number in range(800 * processes)]
    await asyncio.sleep(40)
    await end(tasks)
    times = crawl.starts[HOST]
    assert crawl.peak[HOST] <= concurrency
    # Each process may start a tenth of a second's worth at once, or one.
    assert most_beyond(times, rate) <= processes * max(1, hosts.BURST_SECONDS * rate / processes) + 1
    shares = (share_of(HostSettings(concurrency=concurrency, requests_per_second=rate), n, processes) for n in range(processes))
    assert len(times) >= 0.95 * sum(min(40 * min(one.requests_per_second, one.concurrency / seconds), 800) for one in shares)


@leaping
async def test_first_come_first_served_and_no_burst_after_idleness():
    crawl = Crawl(concurrency=2, requests_per_second=5)
    served = []

    async def photo(number: int) -> None:
        async with crawl.processes[0].request(HOST):
            served.append(number)

    await asyncio.gather(*(photo(number) for number in range(20)))
    assert served == list(range(20))
    await asyncio.sleep(60)
    await asyncio.gather(*(crawl.ask(seconds=0) for _ in range(20)))
    assert most_beyond(crawl.starts[HOST], 5) <= 2


@leaping
async def test_a_host_does_not_hold_up_others():
    """Neither one that is slow, nor one that cools down, nor one with more photos than there are connections."""
    crawl = Crawl(connections=8, concurrency=4, requests_per_second=1000, failures=1)
    await fails(crawl, "down")
    waiting = [asyncio.create_task(crawl.ask("down")) for _ in range(100)]
    waiting += [asyncio.create_task(crawl.ask("slow", seconds=1000)) for _ in range(100)]
    began = crawl.loop.time()
    await asyncio.gather(*(crawl.ask(f"quick {number}") for number in range(40)))
    assert crawl.loop.time() - began < 40 / 4 * 0.1 + 0.5
    assert crawl.peak["slow"] == 4
    await end(waiting)


@leaping
async def test_no_more_requests_than_connections_and_none_while_too_much_is_not_inspected():
    crawl = Crawl(connections=5)
    limits = crawl.processes[0]
    tasks = [asyncio.create_task(crawl.ask(f"host {number % 7}")) for number in range(100)]
    await asyncio.sleep(0.05)
    assert limits.asking == sum(crawl.open.values()) == 5
    with limits.inspecting(), limits.inspecting(), limits.inspecting(), limits.inspecting(), limits.inspecting():
        await asyncio.sleep(10)
        assert sum(map(len, crawl.starts.values())) == 5
    await asyncio.gather(*tasks)
    assert limits.asking == limits.uninspected == 0


@leaping
async def test_a_request_that_is_cancelled_takes_no_slot_along():
    """At every point: while it waits, when its turn has come and it has not run yet, and while it asks."""
    for steps in range(12):
        crawl = Crawl(connections=1, concurrency=1, requests_per_second=100)
        first, second = (asyncio.create_task(crawl.ask(seconds=0.001)) for _ in range(2))
        for _ in range(steps):
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.wait_for(crawl.ask(), 600)
        assert crawl.processes[0].asking == 0


# The circuit breaker.


@leaping
async def test_a_host_that_is_down_is_tried_once_after_each_cool_down_and_then_given_up():
    crawl = Crawl(concurrency=5, failures=10)
    ends = await crawl.keep_asking(math.inf, 50, down)
    with pytest.raises(FetchError) as refused:
        await crawl.ask()
    assert refused.value.given_up
    assert {(end.code, end.given_up) for end in ends} == {("http_5xx", True)}
    assert "left for another run" in ends[0].detail
    assert "HTTP 503" in ends[0].detail
    first, *tries = batches(crawl.starts[HOST], 10)
    # Ten in a row, and those that were in flight then.
    assert 10 <= len(first) < 10 + 5
    assert [len(each) for each in tries] == [1] * hosts.COOL_DOWNS
    pauses = [later[0] - earlier[-1] for earlier, later in zip([first, *tries], tries, strict=False)]
    assert pauses == pytest.approx([FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST], rel=0.11)
    assert hosts._cool_down_seconds(100) == hosts.LONGEST_COOL_DOWN_SECONDS


@leaping
async def test_who_waits_for_a_connection_when_a_host_fails_does_not_ask_it():
    crawl = Crawl(connections=1, concurrency=5, failures=1)
    other = asyncio.create_task(crawl.ask("another host", seconds=5))
    await asyncio.sleep(1)
    asking = [asyncio.create_task(crawl.ask(failure=down)) for _ in range(3)]
    await other
    await asyncio.sleep(FIRST / 2)
    assert len(crawl.starts[HOST]) == 1
    await end(asking)


@leaping
async def test_a_host_that_comes_back_is_used_again_and_its_past_is_forgotten():
    crawl = Crawl(concurrency=5, failures=3)
    time = crawl.loop.time
    ends = await crawl.keep_asking(400, 20, lambda: down() if time() < 100 or 300 < time() < 305 else None)
    assert ends == [None] * 20
    groups = batches(crawl.starts[HOST], 10)
    # Two cool-downs in vain, one that helped; and the next time the pause is as short as the first.
    assert [len(group) == 1 for group in groups[:4]] == [False, True, True, False]
    assert groups[4][0] - groups[3][-1] == pytest.approx(FIRST, rel=0.12)


@leaping
async def test_what_began_before_a_cool_down_says_nothing_about_the_time_after():
    """Neither a failure that comes late, nor a success."""
    crawl = Crawl(concurrency=5, failures=1)
    late = asyncio.create_task(crawl.ask(seconds=5))
    later = asyncio.create_task(crawl.ask(seconds=6, failure=down))
    await fails(crawl)
    next_one = asyncio.create_task(crawl.ask())
    await asyncio.gather(late, later, return_exceptions=True)
    assert len(crawl.starts[HOST]) == 3
    await next_one
    assert crawl.starts[HOST][3] == pytest.approx(FIRST, rel=0.12)


@leaping
async def test_a_try_that_is_cancelled_is_followed_by_another_one():
    crawl = Crawl(concurrency=3, failures=1)
    await fails(crawl)
    tasks = [asyncio.create_task(crawl.ask(seconds=1000)) for _ in range(3)]
    await asyncio.sleep(2 * FIRST)
    assert crawl.open[HOST] == 1
    tasks[0].cancel()
    await asyncio.sleep(1)
    assert (crawl.open[HOST], len(crawl.starts[HOST])) == (1, 3)
    await asyncio.gather(*tasks[1:])


@leaping
async def test_only_faults_of_the_host_that_come_in_a_row_count_against_it():
    assert not HOST_FAULTS - OUTCOMES.keys()
    for code in OUTCOMES.keys() - {"ok"}:
        crawl = Crawl(concurrency=1, failures=1)
        await crawl.keep_asking(5, 1, lambda code=code: FetchError(code, ""))
        assert (len(crawl.starts[HOST]) <= 2) == (code in HOST_FAULTS), code
    crawl = Crawl(concurrency=1, failures=3)
    outcomes = iter([down(), down(), None] * 50)
    await crawl.keep_asking(14, 1, lambda: next(outcomes))
    assert len(batches(crawl.starts[HOST], 1)) == 1
    crawl = Crawl(concurrency=1, failures=1)
    for _ in range(5):  # What is no outcome at all says nothing.
        with pytest.raises(ZeroDivisionError):
            await crawl.ask(failure=ZeroDivisionError)


# Retry-After.


@pytest.mark.parametrize("code", ["http_429", "http_5xx", "http_403"])
@leaping
async def test_a_host_is_not_asked_before_it_wants_to_be(code):
    """Also by photos that wait already."""
    crawl = Crawl(concurrency=3, failures=100)
    answers = iter([FetchError(code, "busy", retry_after=100)] * 4)
    assert await crawl.keep_asking(310, 4, lambda: next(answers, None)) == [None] * 4
    groups = batches(crawl.starts[HOST], 50)
    assert len(groups) >= 3
    assert all(later[0] - earlier[0] >= 100 for earlier, later in itertools.pairwise(groups))


@leaping
async def test_the_longest_pause_that_is_asked_for_counts_and_one_that_is_too_long_gives_the_host_up():
    crawl = Crawl(concurrency=3)
    waits = iter([50, 200, 100])
    await asyncio.gather(*(crawl.ask(failure=lambda: down(next(waits))) for _ in range(3)), return_exceptions=True)
    await crawl.ask()
    assert crawl.starts[HOST][3] == pytest.approx(200.1)
    waiting = asyncio.create_task(crawl.ask())
    await fails(crawl, retry_after=hosts.LONGEST_COOL_DOWN_SECONDS + 1)
    await waiting
    with pytest.raises(FetchError, match="left for another run") as refused:
        await crawl.ask()
    assert (refused.value.code, refused.value.given_up) == ("http_5xx", True)
    for nothing in (math.nan, -5.0, 0.0):
        crawl = Crawl(failures=100)
        before = crawl.loop.time()
        await fails(crawl, retry_after=nothing)
        await crawl.ask()
        assert crawl.loop.time() - before < 1
