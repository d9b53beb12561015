"""Limits of web hosts over a whole cluster: the books, the gates, and both together over a network that loses messages.

Most tests run in a loop whose time leaps to the next timer: minutes of a crawl take milliseconds, and every number is exact.
"""

import asyncio
import collections
import itertools
import math
import random
import selectors
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import HostSettings
from pipelines.crawling.fetched import FetchError
from pipelines.crawling.hosts import BATCH_SECONDS, CATCH_UP_SECONDS, HOST_FAULTS, HostGate, HostLedger, HostReport, Lease
from pipelines.crawling.ledger import VALID_SECONDS, fair_shares
from schemas.outcomes import OUTCOMES

HOST = "photos.example:443"
ROUNDING = 1e-6


class Leaping(selectors.DefaultSelector):
    """Where nothing is ready, time leaps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen again"
            self.now += timeout
        return ready


class LeapingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.leaping = Leaping()
        super().__init__(self.leaping)

    def time(self) -> float:
        return self.leaping.now


def run(story: Coroutine[Any, Any, Any]) -> Any:
    """Run a test's story in a loop that never waits."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(story)


class Cluster:
    """A ledger, and workers with gates, that note what hosts see; both limits are checked at every moment that matters."""

    def __init__(self, seed: int = 0, delay: float = 0.002, ledger: HostLedger | None = None, **limits: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = HostSettings(**limits)
        self.ledger = ledger or HostLedger(self.settings, self.loop.time, jitter=random.Random(seed))
        self.random = random.Random(seed)
        self.delay = delay
        self.gates: dict[str, HostGate] = {}
        self.tasks: dict[str, list[asyncio.Task[Any]]] = collections.defaultdict(list)
        self.cut_off: set[str] = set()
        self.loss = 0.7
        self.calls: collections.Counter[str] = collections.Counter()
        self.rates: dict[tuple[str, str], tuple[float, float]] = {}
        """By worker and host: the rate that it may use, and until when."""
        self.starts: list[tuple[float, str, str]] = []
        """(s, worker, host)"""
        self.open: collections.Counter[str] = collections.Counter()
        self.peak: collections.Counter[str] = collections.Counter()

    def join(self, name: str, capacity: int | None = None) -> HostGate:
        self.gates[name] = HostGate(self.settings, lambda reports: self.renew(name, reports), capacity=capacity)
        self.tasks[name].append(asyncio.create_task(self.gates[name].run()))
        return self.gates[name]

    async def renew(self, worker: str, reports: dict[str, HostReport]) -> dict[str, Lease]:
        asked = self.loop.time()
        self.calls[worker] += 1
        for host, report in reports.items():
            _, until = self.rates.get((worker, host), (0, 0))
            self.rates[worker, host] = report.requests_per_second, until
        await self.travel(worker)
        leases = self.ledger.renew(worker, reports)
        await self.travel(worker)
        for host, lease in leases.items():
            self.rates[worker, host] = lease.requests_per_second, asked + lease.valid_for
            valid = [rate for (_, other), (rate, until) in self.rates.items() if other == host and self.loop.time() < until]
            assert sum(valid) <= self.settings.requests_per_second * (1 + ROUNDING)
        return leases

    async def travel(self, worker: str) -> None:
        """A message on its way; those of workers that are cut off get lost, before the ledger or after it."""
        await asyncio.sleep(self.random.uniform(0, 2 * self.delay))
        if worker in self.cut_off and self.random.random() < self.loss:
            raise ConnectionError("the ledger's node does not answer")

    async def ask(
        self, worker: str, host: str = HOST, seconds: float = 0.1, failure: Callable[[], BaseException | None] = lambda: None
    ) -> None:
        """A request of so many seconds; `failure` makes what is raised at its end."""
        async with self.gates[worker].request(host):
            self.starts.append((self.loop.time(), worker, host))
            self.open[host] += 1
            self.peak[host] = max(self.peak[host], self.open[host])
            assert self.open[host] <= self.settings.concurrency
            try:
                await asyncio.sleep(seconds)
            finally:
                self.open[host] -= 1
            if error := failure():
                raise error

    def keep_asking(self, worker: str, connections: int, host: str = HOST, seconds: float = 0.1) -> None:
        """Photos without end, `connections` of them at once, each `seconds` long or up to a half more or less."""

        async def forever() -> None:
            while True:
                await self.ask(worker, host, seconds * self.random.uniform(0.5, 1.5))

        self.tasks[worker] += [asyncio.create_task(forever()) for _ in range(connections)]

    async def die(self, worker: str) -> None:
        """Its process ends, and its connections with it; nobody tells the ledger."""
        del self.gates[worker]
        for task in self.tasks[worker]:
            task.cancel()
        await asyncio.gather(*self.tasks.pop(worker), return_exceptions=True)
        self.rates = {key: rate for key, rate in self.rates.items() if key[0] != worker}

    async def close(self) -> None:
        """Ends all; an assertion that failed in a task is the test's."""
        tasks = [task for tasks in self.tasks.values() for task in tasks]
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            if not task.cancelled():
                task.result()

    def times(self, host: str = HOST, worker: str | None = None, since: float = 0) -> list[float]:
        return [at for at, who, where in self.starts if where == host and worker in (None, who) and at >= since]


def most_beyond(times: Iterable[float], rate: float) -> float:
    """Over all stretches of time: how many more of `times` lie in one, both ends included, than `rate` allows."""
    most = least = 0.0
    for number, at in enumerate(times):
        least = min(least, number - rate * at)
        most = max(most, number + 1 - rate * at - least)
    return most


# The books alone.


@given(slots=st.integers(0, 40), demands=st.lists(st.integers(0, 20), max_size=12))
def test_shares_are_fair(slots, demands):
    """Max-min fairness by its definition: all is used that is wanted, and no one could get more but from one that has less."""
    shares = fair_shares(slots, demands)
    assert sum(shares) == min(slots, sum(demands))
    for (mine, wanted, place), (other, _, other_place) in itertools.permutations(zip(shares, demands, itertools.count()), 2):
        assert mine <= wanted
        assert mine == wanted or other <= mine or (other == mine + 1 and other_place < place) or other <= wanted <= mine


class Worker:
    """What a gate promises, and no more: it starts requests only under the last lease that reached it, while that is valid."""

    def __init__(self) -> None:
        self.lease, self.expires = Lease(), -math.inf
        self.begun: list[float] = []
        self.waiting = 0
        self.asked: float | None = None
        """When the renewal began that is under way."""
        self.report: HostReport | None = None
        """On its way."""
        self.answer: Lease | None = None
        """On its way."""
        self.silent_until = -math.inf

    def obeyed(self, now: float) -> Lease:
        return self.lease if now < self.expires else Lease()


CONCURRENCY, RATE, REQUEST_SECONDS = 5, 7.3, 20.0


class Books:
    """A ledger, and workers that join, leave or are cut off; reports and answers come late or never, and much happens between."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        limits = HostSettings(concurrency=CONCURRENCY, requests_per_second=RATE, failures=3, rests=1000)
        self.ledger = HostLedger(limits, lambda: self.now, request_seconds=REQUEST_SECONDS, jitter=self.random)
        self.workers: dict[str, Worker] = {}
        self.names = itertools.count()
        self.granted = self.full = 0

    def step(self) -> None:
        act = self.random.choices([self.wait, self.join, self.leave, self.cut_off, self.work], [15, 1, 0.5, 0.3, 83])[0]
        act()
        may_have = sum(max(len(worker.begun), worker.obeyed(self.now).concurrency) for worker in self.workers.values())
        rates = sum(worker.obeyed(self.now).requests_per_second for worker in self.workers.values())
        assert may_have <= CONCURRENCY
        assert rates <= RATE * (1 + ROUNDING)
        self.full += may_have == CONCURRENCY

    def wait(self) -> None:
        self.now += self.random.choices([0.1, 1, VALID_SECONDS, REQUEST_SECONDS, 700], [90, 10, 1, 0.5, 0.05])[0]
        for worker in self.workers.values():
            worker.begun = [at for at in worker.begun if self.now - at < REQUEST_SECONDS]

    def join(self) -> None:
        if len(self.workers) < 5:
            self.workers[str(next(self.names))] = Worker()

    def leave(self) -> None:
        if self.workers:
            name = self.random.choice(list(self.workers))
            del self.workers[name]
            self.ledger.leave(name)

    def cut_off(self) -> None:
        """It goes on with what it has, and nobody hears of it until its requests are over."""
        if self.workers:
            self.workers[self.random.choice(list(self.workers))].silent_until = self.now + 2 * REQUEST_SECONDS

    def work(self) -> None:
        if not self.workers:
            return
        name, worker = self.random.choice(list(self.workers.items()))
        acts = [self.start, self.finish, self.want, self.send, self.arrive, self.obey, self.exchange, self.lose]
        self.random.choices(acts, [30, 20, 20, 15, 15, 15, 15, 3])[0](name, worker)

    def start(self, name: str, worker: Worker) -> None:
        while len(worker.begun) < worker.obeyed(self.now).concurrency and self.random.random() < 0.8:
            worker.begun.append(self.now)

    def finish(self, name: str, worker: Worker) -> None:
        worker.begun = [at for at in worker.begun if self.random.random() < 0.5]

    def want(self, name: str, worker: Worker) -> None:
        worker.waiting = self.random.choice([0, 1, 2, 10, 10])

    def send(self, name: str, worker: Worker) -> None:
        if worker.asked is not None or self.now < worker.silent_until:
            return
        obeyed = worker.obeyed(self.now)
        worker.asked = self.now
        worker.report = HostReport(
            worker.waiting,
            len(worker.begun),
            in_a_row=int(self.random.random() < 0.02),
            recovered=self.random.random() < 0.5,
            retry_after=1.0 if self.random.random() < 0.01 else None,
            era=worker.lease.era,
            concurrency=obeyed.concurrency,
            requests_per_second=obeyed.requests_per_second,
        )

    def arrive(self, name: str, worker: Worker) -> None:
        if worker.report:
            worker.answer = self.ledger.renew(name, {HOST: worker.report})[HOST]
            worker.report = None
            self.granted += worker.answer.concurrency > 0

    def obey(self, name: str, worker: Worker) -> None:
        if worker.answer:
            worker.lease, worker.expires = worker.answer, worker.asked + worker.answer.valid_for
            worker.answer = worker.asked = None

    def exchange(self, name: str, worker: Worker) -> None:
        """A renewal as it mostly goes."""
        self.send(name, worker)
        self.arrive(name, worker)
        self.obey(name, worker)

    def lose(self, name: str, worker: Worker) -> None:
        """The report, or the answer, that is on its way."""
        worker.report = worker.answer = worker.asked = None


@pytest.mark.parametrize("seed", range(12))
def test_limits_hold_whatever_the_order_of_events(seed):
    """At every moment: what workers have in flight or may still start, and the sum of the rates of leases that are valid."""
    books = Books(seed)
    for _ in range(4000):
        books.step()
    # It was no easy time for the ledger: there was much to share, and often all of it was shared out.
    assert books.granted > 20
    assert books.full > 20


class Book:
    """A ledger whose time stands still until it is moved."""

    def __init__(self, *, successor: bool = False, **limits: Any) -> None:
        self.now = 50.0
        self.ledger = HostLedger(HostSettings(**limits), lambda: self.now, successor=successor, jitter=random.Random(0))

    def renew(self, worker: str, waiting: int = 0, in_flight: int = 0, host: str = HOST, **more: Any) -> Lease:
        return self.ledger.renew(worker, {host: HostReport(waiting, in_flight, **more)})[host]

    def state(self) -> str:
        return self.ledger.snapshot()[HOST].state


def held(concurrency: int, rate: float) -> dict[str, Any]:
    """Of a report: the lease that the worker obeys."""
    return {"concurrency": concurrency, "requests_per_second": float(rate)}


def test_a_share_follows_demand():
    """Nothing beyond what is in flight for one who waits for nothing; what is given back is there for the next."""
    book = Book(concurrency=10, requests_per_second=20)
    assert book.renew("a", waiting=3) == Lease(3, 6)
    assert book.renew("a", in_flight=3, **held(3, 6)) == Lease(3, 20)
    assert book.renew("a", in_flight=2, **held(3, 20)) == Lease(2, 20)
    assert not book.renew("b", waiting=30).concurrency  # There are slots, but a has the whole rate.
    assert book.renew("a", in_flight=2, **held(2, 20)) == Lease(2, 4)
    assert book.renew("a", in_flight=2, **held(2, 4)) == Lease(2, 4)
    assert book.renew("b", waiting=30) == Lease(8, 16, owes=1)
    assert book.renew("a") == Lease()
    assert book.renew("b", waiting=30, **held(8, 16)) == Lease(10, 20)


def test_a_newcomer_leaves_something_to_those_that_come_next():
    book = Book(concurrency=10, requests_per_second=20)
    leases = [book.renew(worker, waiting=30) for worker in "abcdef"]
    assert [(lease.concurrency, lease.requests_per_second) for lease in leases] == [
        (5, 10),
        (2, 4),
        (1, 2),
        (1, 2),
        (1, 2),
        (0, 0),
    ]
    # But all of it goes to those that are there.
    assert [lease.owes for lease in leases[:-1]] == [0, 1, 1, 1, 1]


def test_in_flight_requests_of_a_silent_worker_count_as_long_as_they_may_last():
    """Its rate is free when its lease is void, its slots when no request of it can be left, or it is known to be gone."""
    for leaves in (False, True):
        book = Book(concurrency=4, requests_per_second=8)
        book.renew("a", waiting=4)
        assert book.renew("a", waiting=4, **held(2, 4)) == Lease(4, 8)
        book.now += VALID_SECONDS - 0.01
        assert not book.renew("b", waiting=4).concurrency
        book.now += 0.01
        assert not book.renew("b", waiting=4).concurrency
        if leaves:
            book.ledger.leave("a")
        else:
            book.now += 119.9
            assert not book.renew("b", waiting=4).concurrency
            book.now += 0.1
        assert book.renew("b", waiting=4, **held(0, 0)).concurrency == 4


def test_what_a_silent_worker_may_have_is_missing_for_all_others_alike():
    book = Book(concurrency=4, requests_per_second=8)
    book.renew("silent", in_flight=2, **held(2, 4))
    book.now += VALID_SECONDS
    book.renew("a", waiting=9)
    assert book.renew("a", waiting=9, **held(1, 2)) == Lease(2, 8)
    assert not book.renew("b", waiting=9).concurrency
    assert book.renew("a", waiting=9, **held(2, 8)) == Lease(1, 4)


def test_the_first_request_of_a_new_share_waits_for_its_spacing():
    """But for one that nobody has been given: else shares that come and go would add a request each to what the rate allows."""
    book = Book(concurrency=1, requests_per_second=2)
    assert book.renew("a", waiting=1).owes == 0
    assert book.renew("a", waiting=1, **held(1, 2)).owes == 0
    book.now += 1
    assert book.renew("a") == Lease()
    assert book.renew("b", waiting=1) == Lease(1, 2, owes=1)
    assert book.renew("b") == Lease()
    book.now += 0.125
    assert book.renew("c", waiting=1) == Lease(1, 2, owes=0.75)


def test_a_ledger_that_follows_another_gives_nothing_new_while_old_leases_hold():
    """Workers may hold all of a host from the one before, and only some have told so yet."""
    book = Book(successor=True, concurrency=4, requests_per_second=8)
    assert not book.renew("a", waiting=9).concurrency
    assert book.renew("b", waiting=9, **held(3, 6)) == Lease(2, 4)
    book.now += VALID_SECONDS / 2
    assert not book.renew("a", waiting=9).concurrency
    assert book.renew("b", waiting=9, **held(2, 4)) == Lease(2, 4)
    book.now += VALID_SECONDS / 2
    lease = book.renew("a", waiting=9)
    assert (lease.concurrency, lease.requests_per_second) == (2, 4)
    # More than there is, which two workers have had from two ledgers: nothing is left for a third one.
    book.renew("a", waiting=9, in_flight=4, **held(4, 8))
    book.renew("b", waiting=9, in_flight=4, **held(4, 8))
    assert book.renew("c", waiting=9) == Lease()


def test_hosts_are_forgotten_when_nobody_asks_for_them():
    """All but those with failures that may go on, and those given up; with 100,000 hosts the book would else grow with them."""
    book = Book(failures=2, rests=0, longest_rest_seconds=300)
    for number in range(1000):
        book.renew("a", waiting=1, host=f"{number}.example:443")
        book.renew("a", host=f"{number}.example:443", successes=1)
    book.renew("a", host="shaky.example:443", in_a_row=1)
    book.renew("a", host="lost.example:443", in_a_row=2, last_failure="dns")
    assert len(book.ledger.snapshot()) == 1002
    book.now += 200
    book.renew("a", host="new.example:443")
    assert set(book.ledger.snapshot()) == {"shaky.example:443", "lost.example:443", "new.example:443"}
    book.now += 200
    book.renew("a", host="new.example:443")
    assert set(book.ledger.snapshot()) == {"lost.example:443", "new.example:443"}


def test_snapshot_tells_what_a_person_wants_to_know():
    book = Book(failures=3, rest_seconds=30, rests=1)
    book.renew("a", waiting=5, in_flight=2, successes=7)
    book.renew("b", waiting=1, in_flight=1, successes=1, failures=2, in_a_row=2, last_failure="timeout")
    (state,) = book.ledger.snapshot().values()
    assert (state.in_flight, state.waiting, state.successes, state.failures, state.state) == (3, 6, 8, 2, "open")
    book.now += VALID_SECONDS
    (state,) = book.ledger.snapshot().values()
    assert (state.in_flight, state.waiting) == (3, 0)  # Who is silent may still have some in flight.
    lease = book.renew("b", waiting=1, failures=1, in_a_row=1, last_failure="http_5xx")
    assert book.state() == f"resting for {lease.rests_for:.0f} s"
    book.now += lease.rests_for
    assert book.state() == "one try"
    book.renew("b", waiting=1, failures=1, in_a_row=1, last_failure="http_5xx", era=lease.era)
    assert book.state() == "given up: http_5xx"


# Rests.


def failing(book: Book, worker: str, count: int, lease: Lease, **more: Any) -> Lease:
    return book.renew(worker, waiting=3, failures=count, in_a_row=count, last_failure="http_5xx", era=lease.era, **more)


def test_failures_in_a_row_are_counted_over_all_workers():
    book = Book(failures=10)
    leases = {name: book.renew(name, waiting=3) for name in "abc"}
    assert not failing(book, "a", 4, leases["a"]).rests_for
    assert not failing(book, "b", 5, leases["b"]).rests_for
    assert not failing(book, "c", 1, leases["c"], recovered=True, successes=1).rests_for  # A success in between: one in a row.
    assert not failing(book, "a", 8, leases["a"]).rests_for
    assert failing(book, "b", 1, leases["b"]).rests_for
    assert book.renew("c", waiting=3).rests_for


def test_rests_double_up_to_the_longest_with_jitter_and_then_the_host_is_given_up():
    book = Book(failures=2, rest_seconds=100, longest_rest_seconds=600, rests=5)
    lease = failing(book, "a", 2, book.renew("a", waiting=1))
    rests = []
    while not lease.given_up:
        rests.append(lease.rests_for)
        book.now += lease.rests_for
        lease = failing(book, "a", 1, book.renew("a", waiting=1), detail="HTTP 502 Bad Gateway")
    assert [round(rest / 100) for rest in rests] == [1, 2, 4, 6, 6]
    assert all(abs(rest / wanted - 1) <= 0.1 for rest, wanted in zip(rests, [100, 200, 400, 600, 600], strict=True))
    assert rests[0] % 1
    assert max(rests) <= 600
    assert lease.given_up == "http_5xx"
    assert lease.detail == f"{HOST} is left for another run after 5 rests; last: HTTP 502 Bad Gateway"
    assert book.renew("b", waiting=1) == lease


def test_without_rests_a_host_is_given_up_at_once():
    book = Book(failures=2, rests=0)
    lease = failing(book, "a", 2, book.renew("a", waiting=1))
    assert lease.given_up
    assert "after 0 rests; last: http_5xx" in lease.detail


def test_a_success_after_a_rest_forgets_all_rests():
    book = Book(failures=2, rest_seconds=100, rests=1)
    for _ in range(3):
        lease = failing(book, "a", 2, book.renew("a", waiting=1))
        assert 90 <= lease.rests_for <= 110
        book.now += lease.rests_for
        lease = book.renew("a", waiting=1)
        assert lease.trying
        lease = book.renew("a", waiting=1, successes=1, recovered=True, era=lease.era, **held(1, 20))
        assert not lease.trying
        assert lease.concurrency


def test_what_began_before_a_rest_says_nothing_about_the_time_after():
    """A slow success does not open the host, and a slow failure is no failed try; both are counted."""
    book = Book(failures=2, rest_seconds=100)
    old = book.renew("a", waiting=1, in_flight=3)
    lease = failing(book, "b", 2, book.renew("b", waiting=1))
    assert book.renew("a", 1, 2, era=old.era, successes=1, recovered=True).rests_for == lease.rests_for
    book.now += lease.rests_for
    assert book.renew("b", waiting=1).trying
    assert not book.renew("a", 1, 1, era=old.era, failures=1, in_a_row=1, last_failure="timeout").rests_for
    assert book.state() == "one try"
    (state,) = book.ledger.snapshot().values()
    assert (state.successes, state.failures) == (1, 3)


def test_one_worker_tries_and_only_once_all_have_heard_of_the_rest():
    book = Book(failures=2, concurrency=4, rest_seconds=1)
    for name in "abc":
        assert book.renew(name, waiting=3).concurrency
    lease = failing(book, "a", 2, Lease())
    book.renew("b", waiting=3)
    book.now += lease.rests_for
    assert not book.renew("b", waiting=3).concurrency  # c may go on for a while, with what it was given.
    book.renew("c")
    tries = book.renew("b", waiting=3)
    assert (tries.concurrency, tries.trying) == (1, True)
    assert [book.renew(name, waiting=3).concurrency for name in "ac"] == [0, 0]
    book.renew("b")  # It wants nothing any more: another one may.
    assert book.renew("c", waiting=3).trying
    book.now += VALID_SECONDS  # It is silent: again another one.
    assert book.renew("a", waiting=3).trying


def test_the_one_who_tries_waits_for_something_and_adds_none_to_full_slots():
    book = Book(failures=2, concurrency=4, rest_seconds=1)
    book.renew("a", in_flight=3, **held(3, 4))
    book.renew("b", in_flight=1, **held(1, 4))
    lease = failing(book, "c", 2, Lease())
    for name, in_flight in (("a", 3), ("b", 1)):
        book.renew(name, in_flight=in_flight)
    book.now += lease.rests_for
    assert not book.renew("a", in_flight=3).concurrency
    assert not book.renew("c", waiting=3).concurrency
    book.renew("a", in_flight=2)
    tries = book.renew("c", waiting=3)
    assert (tries.concurrency, tries.trying) == (1, True)


def test_a_rest_that_the_host_asks_for_is_for_all_and_no_failure_to_rest():
    """However often: but when the one request after it fails, rests are counted."""
    book = Book(failures=1, rests=1, rest_seconds=50)
    for _ in range(4):
        lease = failing(book, "a", 1, book.renew("a", waiting=1), retry_after=20.0)
        assert lease.rests_for == 20
        book.now += 8
        assert book.renew("b", waiting=1).rests_for == 12
        book.now += 12
        lease = book.renew("a", waiting=1)
        assert lease.trying
        assert not book.renew("a", waiting=1, successes=1, recovered=True, era=lease.era, **held(1, 20)).trying
        book.renew("b")
    lease = failing(book, "a", 1, book.renew("a", waiting=1), retry_after=20.0)
    book.now += lease.rests_for
    lease = failing(book, "a", 1, book.renew("a", waiting=1), retry_after=20.0)
    assert 45 <= lease.rests_for <= 55
    book.now += lease.rests_for
    assert "after 1 rest;" in failing(book, "a", 1, book.renew("a", waiting=1), retry_after=20.0).detail


def test_a_longer_rest_that_a_late_answer_asks_for_counts():
    book = Book()
    lease = book.renew("a", waiting=1, in_flight=2)
    failing(book, "a", 1, lease, retry_after=20.0)
    assert failing(book, "a", 1, lease, retry_after=90.0).rests_for == 90
    assert failing(book, "a", 1, lease, retry_after=5.0).rests_for == 90
    book.now += 90
    lease = book.renew("a", waiting=1)
    assert failing(book, "a", 1, lease, retry_after=300.0).rests_for == 300  # Longer than what a failed try costs.


def test_a_host_that_wants_to_be_left_alone_for_too_long_is_given_up_at_once():
    book = Book(longest_rest_seconds=600)
    assert failing(book, "a", 1, Lease(), retry_after=600.0).rests_for == 600
    lease = failing(book, "a", 1, Lease(), retry_after=3600.0)
    assert lease.given_up == "http_5xx"
    setting = "crawl.per_host.longest_rest_seconds, 600"
    assert lease.detail == f"{HOST} is left for another run: it wants to be left alone for 3600 s, more than {setting}"


# Gates and the ledger together.


@pytest.mark.parametrize(
    ("workers", "concurrency", "rate", "seconds", "connections", "least_used"),
    [
        (1, 10, 20, 0.3, 8, 0.95),
        (8, 10, 20, 0.3, 8, 0.9),  # The rate is what binds.
        (8, 10, 20, 2, 8, 0.9),  # The slots are.
        (8, 2, 20, 0.3, 4, 0.75),  # Fewer slots than workers: in turns.
        (2, 1, 20, 0.3, 4, 0.84),  # A slot is told to be free as soon as it is.
        (3, 100, 500, 0.05, 40, 0.9),
        (8, 10, 1, 0.3, 4, 0.75),  # Less than a request a second for each: in turns, too.
        (4, 1, 0.1, 0.3, 2, 0.75),  # Turns must be longer than the spacing.
        (8, 10, 20, 0.3, 1, 0.9),
    ],
)
def test_limits_hold_and_are_used(workers, concurrency, rate, seconds, connections, least_used):
    """In any stretch of time no more than the rate allows, one for each worker that may ask, and one."""

    async def story() -> None:
        cluster = Cluster(concurrency=concurrency, requests_per_second=rate)
        names = [str(number) for number in range(workers)]
        for name in names:
            cluster.join(name)
            cluster.keep_asking(name, connections, seconds=seconds)
        length = {500: 10, 0.1: 600}.get(rate, 60)
        await asyncio.sleep(length)
        await cluster.close()
        times = cluster.times()
        most = min(rate, min(concurrency, workers * connections) / seconds)
        assert len(times) >= least_used * most * length
        assert most_beyond(times, rate) <= min(workers, max(1, rate)) + 1 + ROUNDING
        # Everyone gets its part, and pays for it with little more than a call a second.
        assert min(len(cluster.times(worker=name)) for name in names) >= 0.5 * len(times) / workers
        assert sum(cluster.calls.values()) <= 1.5 * workers * length

    run(story())


def test_what_one_worker_does_not_want_is_the_others():
    async def story() -> None:
        cluster = Cluster(concurrency=6, requests_per_second=100)
        for name in "abc":
            cluster.join(name)
            cluster.keep_asking(name, 6, seconds=0.5)
        await asyncio.sleep(20)
        for name in "ab":
            for task in cluster.tasks[name][1:]:
                task.cancel()
        await asyncio.sleep(4)
        alone = len(cluster.times(worker="c", since=cluster.loop.time()))
        await asyncio.sleep(20)
        alone = len(cluster.times(worker="c", since=cluster.loop.time() - 20))
        await cluster.close()
        assert alone >= 0.9 * 20 * 6 / 0.5

    run(story())


def test_a_worker_that_comes_late_or_dies():
    """It gets its part though others want all; when it dies, its part comes back: at once if somebody tells."""

    async def story() -> None:
        cluster = Cluster(concurrency=4, requests_per_second=1000)
        for name in "ab":
            cluster.join(name)
            cluster.keep_asking(name, 6, seconds=0.2)
        await asyncio.sleep(20)
        cluster.join("c")
        cluster.keep_asking("c", 6, seconds=0.2)
        await asyncio.sleep(4)
        assert cluster.times(worker="c")
        await cluster.die("a")
        told = cluster.loop.time()
        await asyncio.sleep(10)
        # Two or one of its slots stay empty: it might be alive.
        assert len(cluster.times(since=told)) <= 0.9 * 10 * 4 / 0.2
        cluster.ledger.leave("a")
        told = cluster.loop.time()
        await asyncio.sleep(10)
        assert len(cluster.times(since=told)) >= 0.9 * 10 * 4 / 0.2
        await cluster.close()

    run(story())


@pytest.mark.parametrize("seed", range(4))
def test_limits_hold_while_workers_come_and_go_and_messages_get_lost(seed):
    """The slots at every start, the rates at every lease (`Cluster`), and what hosts saw of them."""

    async def story() -> None:
        cluster = Cluster(seed, delay=0.2, concurrency=5, requests_per_second=11, failures=5, rest_seconds=1, rests=10**6)
        hosts, names = [HOST, "b.example:80"], itertools.count()

        async def photo(name: str) -> None:
            bad = FetchError("timeout", "", retry_after=cluster.random.choice([None, None, 2.0]))
            failure = bad if cluster.random.random() < 0.05 else None
            task = cluster.ask(name, cluster.random.choice(hosts), cluster.random.expovariate(2), lambda: failure)
            with suppress(FetchError, TimeoutError):
                await asyncio.wait_for(task, cluster.random.choice([0.5, 20]))

        end = cluster.loop.time() + 120
        while cluster.loop.time() < end:
            event = cluster.random.random()
            if len(cluster.gates) < 2 or (event < 0.01 and len(cluster.gates) < 6):
                cluster.join(str(next(names)))
            name = cluster.random.choice(list(cluster.gates))
            if event > 0.99:
                await cluster.die(name)
                if event > 0.995:
                    cluster.ledger.leave(name)
            elif event > 0.98:
                cluster.cut_off ^= {name}
            else:
                cluster.tasks[name].append(asyncio.create_task(photo(name)))
            await asyncio.sleep(cluster.random.expovariate(20))
        await cluster.close()
        for host in hosts:
            assert len(cluster.times(host)) > 60
            # Each worker that has had a lease may add one request, and 0.1 s of its rate where its loop was late.
            assert most_beyond(cluster.times(host), 11) <= 6 + 2 + 11 * CATCH_UP_SECONDS

    run(story())


# One gate.


def down() -> FetchError:
    return FetchError("http_5xx", "HTTP 503")


def test_first_come_first_served():
    async def story() -> None:
        cluster = Cluster(concurrency=2, requests_per_second=1000)
        cluster.join("a")
        served = []

        async def photo(number: int) -> None:
            async with cluster.gates["a"].request(HOST):
                served.append(number)
                await asyncio.sleep(0.05)

        await asyncio.gather(*(photo(number) for number in range(40)))
        await cluster.close()
        assert served == list(range(40))

    run(story())


def test_no_burst_after_idleness_and_little_after_a_late_loop():
    async def story() -> None:
        cluster = Cluster(concurrency=1000, requests_per_second=100)
        gate = cluster.join("a")
        cluster.keep_asking("a", 50, seconds=0.1)
        await asyncio.sleep(5.2)
        for task in cluster.tasks["a"][1:]:
            task.cancel()
        await asyncio.sleep(0.5)
        begun = cluster.loop.time()
        tasks = [asyncio.create_task(cluster.ask("a", seconds=0)) for _ in range(300)]
        await asyncio.sleep(0.2)
        # One that is due, and one each 10 ms; not those of the half second in which nobody asked, though the lease still holds.
        assert 19 <= len(cluster.times(since=begun)) <= 22
        await asyncio.sleep(1.1)
        cluster.loop.leaping.now += 0.5
        begun = cluster.loop.time()
        await asyncio.sleep(0.001)
        # What was due within 0.1 s, not the 50 of half a second.
        assert 10 <= len(cluster.times(since=begun)) <= 12
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.in_flight() == {}
        await cluster.close()

    run(story())


def test_who_goes_away_while_waiting_takes_no_slot_along():
    """At every point: while waiting, when its turn has come and it has not run yet, and while it asks."""

    async def story() -> None:
        cluster = Cluster(concurrency=1, requests_per_second=1e6)
        gate = cluster.join("a")
        leave = asyncio.Event()
        waiting: list[asyncio.Task[None]] = []

        async def first() -> None:
            async with gate.request(HOST):
                await leave.wait()
            # The slot is the next one's since a moment ago.
            assert gate.in_flight() == {HOST: 1}
            waiting[1].cancel()

        holder = asyncio.create_task(first())
        await asyncio.sleep(2)
        waiting += [asyncio.create_task(cluster.ask("a")) for _ in range(3)]
        await asyncio.sleep(2)
        waiting[0].cancel()
        await asyncio.wait([waiting[0]])
        assert gate.in_flight() == {HOST: 1}
        leave.set()
        await asyncio.wait([holder, *waiting])
        holder.result()
        assert [task.cancelled() for task in waiting] == [True, True, False]
        asking = asyncio.create_task(cluster.ask("a", seconds=100))
        await asyncio.sleep(2)
        assert gate.in_flight() == {HOST: 1}
        asking.cancel()
        await asyncio.wait([asking])
        assert gate.in_flight() == {}
        assert cluster.ledger.snapshot()[HOST].failures == 0
        await cluster.close()

    run(story())


def test_a_host_that_rests_keeps_no_other_one_waiting():
    async def story() -> None:
        cluster = Cluster(failures=1, rest_seconds=50)
        gate = cluster.join("a")
        with pytest.raises(FetchError):
            await cluster.ask("a", "left.example:443", failure=down)
        left = [asyncio.create_task(cluster.ask("a", "left.example:443")) for _ in range(20)]
        await asyncio.sleep(2)
        assert cluster.ledger.snapshot()["left.example:443"].waiting == 20
        for task in left[:15]:
            task.cancel()
        await asyncio.sleep(2)
        assert cluster.ledger.snapshot()["left.example:443"].waiting == 5
        for task in left:
            task.cancel()
        await asyncio.sleep(3)
        assert not gate._doors
        with pytest.raises(FetchError):
            await cluster.ask("a", "slow.example:443", failure=lambda: FetchError("timeout", ""))
        resting = [asyncio.create_task(cluster.ask("a", "slow.example:443")) for _ in range(20)]
        await asyncio.sleep(2)
        assert gate.in_flight() == {}
        begun = cluster.loop.time()
        await asyncio.gather(*(cluster.ask("a") for _ in range(20)))
        assert cluster.loop.time() - begun < 3
        assert not any(task.done() for task in resting)
        await asyncio.gather(*resting)
        assert 40 < cluster.times("slow.example:443", since=begun)[0] - begun < 55
        await cluster.close()

    run(story())


def test_many_hosts_cost_little():
    """1,500 hosts, a request each: no table grows with them, calls are batched, and a new host waits a moment only."""

    async def story() -> None:
        cluster = Cluster()
        gate = cluster.join("a")
        hosts = (f"{number}.example:443" for number in range(1500))
        most = 0

        async def some() -> None:
            nonlocal most
            for host in hosts:
                await cluster.ask("a", host, seconds=cluster.random.uniform(0.02, 0.08))
                most = max(most, len(gate._doors))

        await asyncio.gather(*(some() for _ in range(20)))
        took = cluster.loop.time()
        assert took < 1500 / 20 * (0.05 + BATCH_SECONDS + 0.02)
        assert cluster.calls["a"] <= 1.1 * took / BATCH_SECONDS
        assert most < 1.5 * 1500 / took  # Those of the last second or so.
        await asyncio.sleep(3)
        assert not gate._doors
        await asyncio.sleep(61)
        await cluster.ask("a")
        assert len(cluster.ledger.snapshot()) == 1
        await cluster.close()

    run(story())


def test_a_busy_host_costs_a_call_a_second():
    async def story() -> None:
        cluster = Cluster(concurrency=200, requests_per_second=1000)
        cluster.join("a")
        cluster.keep_asking("a", 150, seconds=0.1)
        await asyncio.sleep(6)
        await cluster.close()
        assert len(cluster.starts) > 5000
        assert cluster.calls["a"] < 30

    run(story())


def test_a_busy_host_does_not_take_all_places_of_a_worker():
    """One host could fill all places for ever; others get theirs in turn, and there are never more than there are places."""

    async def story() -> None:
        cluster = Cluster(concurrency=100, requests_per_second=10_000)
        gate = cluster.join("a", capacity=4)
        hosts = [HOST, "b.example:443", "c.example:443"]
        cluster.keep_asking("a", 50, HOST)
        await asyncio.sleep(2)
        for host in hosts[1:]:
            cluster.keep_asking("a", 1, host)
        for _ in range(100):
            await asyncio.sleep(0.2)
            assert sum(gate.in_flight().values()) <= 4
        await cluster.close()
        # 4 places, 0.1 s each, for 20 s: all are used, and one that asks for one at a time waits for a place for a moment only.
        assert len(cluster.starts) >= 0.9 * 22 * 4 / 0.1
        assert min(len(cluster.times(host)) for host in hosts) >= 0.5 * 20 / (0.1 + 0.05)

    run(story())


def test_a_gate_that_is_held_lets_nothing_begin_until_it_goes_on():
    async def story() -> None:
        cluster = Cluster()
        gate = cluster.join("a")
        gate.hold(True)
        photos = [asyncio.create_task(cluster.ask("a", host)) for host in ("b", "b", "c")]
        await asyncio.sleep(10)
        assert gate.in_flight() == {}
        gate.hold(False)
        await asyncio.gather(*photos)
        assert cluster.loop.time() < 12
        await cluster.close()

    run(story())


def test_outcomes_are_told_apart():
    """Which codes are a host's fault; what is neither counts as nothing."""

    async def story() -> None:
        cluster = Cluster(failures=1000, requests_per_second=1000)
        cluster.join("a")
        for code in OUTCOMES:
            if code != "ok":
                with pytest.raises(FetchError):
                    await cluster.ask("a", code, failure=partial(FetchError, code, ""))
        await cluster.ask("a", "ok")
        with pytest.raises(KeyError):
            await cluster.ask("a", "bug", failure=KeyError)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cluster.ask("a", "cancelled", seconds=9), 2)
        await asyncio.sleep(2)
        states = cluster.ledger.snapshot()
        await cluster.close()
        assert {code for code in OUTCOMES if states[code].failures} == HOST_FAULTS
        assert {code for code in OUTCOMES if states[code].successes} == OUTCOMES.keys() - HOST_FAULTS
        assert all(states[host].failures == states[host].successes == 0 for host in ("bug", "cancelled"))

    run(story())
    assert {"dns", "connect", "tls", "timeout", "too_slow", "incomplete", "bad_response", "http_5xx", "http_429"} == HOST_FAULTS


def keep_failing(cluster: Cluster, worker: str, connections: int, is_up: Callable[[], bool]) -> list[FetchError]:
    """Photos that are asked for until they come, or their host is given up; the latter's errors."""
    given_up: list[FetchError] = []

    async def photo() -> None:
        while True:
            try:
                await cluster.ask(worker, seconds=0.02, failure=lambda: None if is_up() else down())
            except FetchError as error:
                if error.given_up:
                    given_up.append(error)
                    return
            else:
                return

    cluster.tasks[worker] += [asyncio.create_task(photo()) for _ in range(connections)]
    return given_up


def rounds(times: list[float], gap: float) -> list[list[float]]:
    """Times with pauses of more than `gap` s between."""
    found: list[list[float]] = []
    for at in times:
        if not found or at - found[-1][-1] > gap:
            found.append([])
        found[-1].append(at)
    return found


def test_a_host_that_is_down_is_tried_by_one_request_after_each_rest_and_then_given_up():
    async def story() -> None:
        limits = {"failures": 10, "rest_seconds": 30, "longest_rest_seconds": 100, "rests": 3}
        cluster = Cluster(concurrency=8, requests_per_second=40, **limits)
        lost = []
        for name in "abcd":
            cluster.join(name)
            lost.append(keep_failing(cluster, name, 5, lambda: False))
        await asyncio.sleep(400)
        seen = rounds(cluster.times(), 5)
        # At first as many as begin until everyone knows: a second at most.
        assert 10 <= len(seen[0]) <= 10 + 40
        assert [len(one) for one in seen[1:]] == [1, 1, 1]
        pauses = [later[0] - earlier[-1] for earlier, later in itertools.pairwise(seen)]
        assert all(0.9 * wanted <= pause <= 1.1 * wanted + 1.1 for pause, wanted in zip(pauses, [30, 60, 100], strict=True))
        errors = [error for errors in lost for error in errors]
        assert len(errors) == 20
        detail = f"{HOST} is left for another run after 3 rests; last: HTTP 503"
        assert {(error.code, error.detail) for error in errors} == {("http_5xx", detail)}
        # Who asks now hears it at once, and costs no call.
        calls = sum(cluster.calls.values())
        begun = cluster.loop.time()
        with pytest.raises(FetchError, match="left for another run"):
            await cluster.ask("a")
        assert cluster.loop.time() == begun
        await asyncio.sleep(5)
        assert sum(cluster.calls.values()) == calls
        await cluster.close()

    run(story())


def test_a_try_that_is_cancelled_is_followed_by_another_one():
    async def story() -> None:
        cluster = Cluster(failures=1, rest_seconds=10)
        cluster.join("a")
        with pytest.raises(FetchError):
            await cluster.ask("a", failure=down)
        tries = [asyncio.create_task(cluster.ask("a", seconds=30)) for _ in range(2)]
        await asyncio.sleep(15)
        assert cluster.open[HOST] == 1
        tries[0].cancel()
        await asyncio.sleep(0.1)
        assert cluster.open[HOST] == 1
        await tries[1]
        await cluster.close()

    run(story())


def test_a_host_that_comes_back_is_used_again():
    async def story() -> None:
        cluster = Cluster(failures=5, rest_seconds=10, rests=3, concurrency=4, requests_per_second=100)
        up_at = 15.0
        lost = []
        for name in "ab":
            cluster.join(name)
            lost.append(keep_failing(cluster, name, 50, lambda: cluster.loop.time() > up_at))
        await asyncio.sleep(45)
        await cluster.close()
        assert lost == [[], []]
        seen = rounds(cluster.times(), 5)
        assert len(seen[1]) == 1
        assert sum(at > up_at for at in cluster.times()) == 100
        # The one try opens the host for all within two renewals.
        assert seen[2][-1] - seen[2][0] < 5
        assert cluster.ledger.snapshot()[HOST].state == "open"

    run(story())


def test_a_gate_that_fails_stops_before_the_ledger_says_so():
    """All 5 failures are its own: no sixth request begins, though the ledger hears of it only later."""

    async def story() -> None:
        cluster = Cluster(delay=0.3, failures=5, concurrency=1, requests_per_second=1000)
        cluster.join("a")
        keep_failing(cluster, "a", 20, lambda: False)
        await asyncio.sleep(20)
        await cluster.close()
        assert len(cluster.times()) == 5

    run(story())


def test_failures_with_a_success_between_are_not_in_a_row():
    """Also where one report tells of all of them."""

    async def story() -> None:
        cluster = Cluster(failures=5, concurrency=1, requests_per_second=1000)
        cluster.join("a")
        photos = [cluster.ask("a", seconds=0.01, failure=down if number % 5 else lambda: None) for number in range(50)]
        ended = await asyncio.gather(*photos, return_exceptions=True)
        assert sum(isinstance(error, FetchError) for error in ended) == 40
        assert cluster.loop.time() < 2
        await asyncio.sleep(2)
        assert cluster.ledger.snapshot()[HOST].state == "open"
        await cluster.close()

    run(story())


def test_a_gate_that_stops_reports_failures_in_a_row_and_begins_to_count_anew():
    """What ends after that is no part of them; if others have success there, the ledger may let it go on, for as many again."""

    async def story() -> None:
        reports: list[HostReport] = []

        async def renew(sent: dict[str, HostReport]) -> dict[str, Lease]:
            reports.extend(sent.values())
            await asyncio.sleep(0.2)
            return {host: Lease(4, 1000.0) for host in sent}

        gate = HostGate(HostSettings(failures=3), renew)
        running = asyncio.create_task(gate.run())

        async def ask(seconds: float, fails: bool = True) -> None:
            with suppress(FetchError):
                async with gate.request(HOST):
                    await asyncio.sleep(seconds)
                    if fails:
                        raise down()

        # They begin at 0.2 s and end while the second report is on its way, from 1 s to 1.2 s.
        photos = [asyncio.create_task(ask(seconds)) for seconds in (0.82, 0.83, 0.84)]
        photos.append(asyncio.create_task(ask(0.9, fails=False)))
        await asyncio.wait(photos)
        assert reports[-1].in_a_row == 0
        await asyncio.sleep(0.3)
        assert (reports[-1].in_a_row, reports[-1].recovered, reports[-1].failures, reports[-1].successes) == (3, False, 3, 1)
        await asyncio.wait([asyncio.create_task(ask(0)) for _ in range(9)])
        await asyncio.sleep(2)
        assert [report.in_a_row for report in reports if report.in_a_row] == [3, 3, 3, 3]
        running.cancel()

    run(story())


def test_retry_after_makes_all_workers_rest_and_counts_once():
    """Ten requests in flight that are all told to wait 20 s: one rest of 20 s, and no failure to rest."""

    def busy() -> FetchError:
        return FetchError("http_429", "HTTP 429", retry_after=20)

    async def story() -> None:
        cluster = Cluster(failures=3, rests=0, concurrency=10, requests_per_second=1000)
        for name in "ab":
            cluster.join(name)
            cluster.keep_asking(name, 5, seconds=0.3)
        await asyncio.sleep(10)
        for name in "ab":
            for task in cluster.tasks[name][1:]:
                task.cancel()
        await asyncio.sleep(2)
        told = [cluster.ask(name, seconds=3, failure=busy) for name in "ab" for _ in range(5)]
        await asyncio.gather(*told, return_exceptions=True)
        begun = cluster.loop.time()
        await asyncio.sleep(0.1)
        assert cluster.ledger.snapshot()[HOST].state.startswith("resting")  # It is told at once.
        await asyncio.gather(*(cluster.ask(name) for name in "ab" for _ in range(5)))
        again = cluster.times(since=begun)
        assert 19.5 <= again[0] - begun <= 22
        assert again[1] - again[0] >= 0.1  # One try first.
        assert again[-1] - again[0] < 5
        await cluster.close()

    run(story())


def test_a_retry_after_that_is_too_long_gives_the_host_up_for_those_who_wait():
    async def story() -> None:
        cluster = Cluster(concurrency=1, longest_rest_seconds=60)
        cluster.join("a")
        cluster.join("b")
        waiting = [asyncio.create_task(cluster.ask(name, seconds=20)) for name in "bbb"]
        with pytest.raises(FetchError) as raised:
            await cluster.ask("a", failure=lambda: FetchError("http_429", "HTTP 429", retry_after=math.inf))
        assert not raised.value.given_up
        for ended in await asyncio.gather(*waiting, return_exceptions=True):
            assert ended is None or (ended.code, ended.given_up) == ("http_429", True)
        with pytest.raises(FetchError, match="wants to be left alone for inf s") as raised:
            await cluster.ask("a")
        assert raised.value.given_up
        await cluster.close()

    run(story())


def test_a_retry_after_counts_with_any_code():
    async def story() -> None:
        cluster = Cluster()
        cluster.join("a")
        with pytest.raises(FetchError):
            await cluster.ask("a", failure=lambda: FetchError("http_403", "HTTP 403", retry_after=9999))
        await asyncio.sleep(1)
        with pytest.raises(FetchError) as raised:
            await cluster.ask("a")
        assert (raised.value.code, raised.value.given_up) == ("http_403", True)
        await cluster.close()

    run(story())


@pytest.mark.parametrize("retry_after", [math.nan, -5.0, 0.0])
def test_a_retry_after_that_means_nothing_is_none(retry_after):
    async def story() -> None:
        cluster = Cluster(failures=5)
        cluster.join("a")
        with pytest.raises(FetchError):
            await cluster.ask("a", failure=lambda: FetchError("http_429", "", retry_after=retry_after))
        await cluster.ask("a")
        assert cluster.loop.time() < 3
        await cluster.close()

    run(story())


def test_without_the_ledger_leases_run_out_and_with_it_work_goes_on(caplog):
    async def story() -> None:
        cluster = Cluster(concurrency=3, requests_per_second=100)
        gate = cluster.join("a")
        cluster.keep_asking("a", 5)
        cluster.keep_asking("a", 5, "slow.example:443", 10)  # Its slots become free when the lease is void.
        await asyncio.sleep(10)
        cluster.cut_off.add("a")
        cluster.loss = 1
        cut = cluster.loop.time()
        await asyncio.sleep(60)
        assert not cluster.times(since=cut + VALID_SECONDS)
        assert not cluster.times("slow.example:443", since=cut + VALID_SECONDS)
        assert cluster.times(since=cut + VALID_SECONDS - 2)
        assert gate.in_flight() == {}
        calls = cluster.calls["a"]
        new = []
        for number in range(200):
            new.append(asyncio.create_task(cluster.ask("a", f"{number}.example:443")))
            await asyncio.sleep(0.05)
        assert cluster.calls["a"] - calls <= 11  # A call a second, whoever is new meanwhile.
        cluster.cut_off.clear()
        back = cluster.loop.time()
        await asyncio.sleep(20)
        assert len(cluster.times(since=back)) > 0.9 * 18 * 3 / 0.1
        # Nothing of what was done meanwhile is lost.
        assert cluster.ledger.snapshot()[HOST].successes >= len(cluster.times()) - 3 - 45
        await cluster.close()

    run(story())
    assert [record.message for record in caplog.records] == ["the ledger of hosts cannot be reached; trying again"]


def test_outcomes_that_did_not_arrive_are_told_again():
    """Four failures in two reports that get lost, and one more: five in a row, though no report that arrives has them alone."""

    async def story() -> None:
        ledger = HostLedger(HostSettings(failures=5), asyncio.get_running_loop().time)
        reports: list[HostReport] = []
        lost = False

        async def renew(sent: dict[str, HostReport]) -> dict[str, Lease]:
            if lost:
                raise ConnectionError
            reports.extend(sent.values())
            return ledger.renew("a", sent)

        gate = HostGate(HostSettings(failures=100), renew)
        running = asyncio.create_task(gate.run())

        async def ask(failure: FetchError | None) -> None:
            with suppress(FetchError):
                async with gate.request(HOST):
                    if failure:
                        raise failure

        await ask(None)
        await asyncio.sleep(0.1)
        lost = True
        await asyncio.gather(*(ask(down()) for _ in range(4)))  # At 2 a second.
        assert asyncio.get_running_loop().time() >= 2
        lost = False
        await asyncio.sleep(2)
        assert sum(report.failures for report in reports) == sum(report.in_a_row for report in reports) == 4
        assert ledger.snapshot()[HOST].state == "open"
        await ask(down())
        await asyncio.sleep(2)
        assert ledger.snapshot()[HOST].state.startswith("resting")
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()

    run(story())


# Real processes, a real network, real time.


class Server:
    """Counts what it is asked on a port of its own, and takes its time to answer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.arrivals: list[float] = []
        self.open = self.peak = 0
        self.host = ""

    async def start(self) -> None:
        listening = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.host = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.arrivals.append(time.monotonic())
        self.open += 1
        self.peak = max(self.peak, self.open)
        await asyncio.sleep(self.seconds)
        self.open -= 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()


class Asker:
    """A worker's process: some photos from each host. An async Ray actor."""

    def __init__(self, name: str, settings: HostSettings, ledger: Any) -> None:
        async def renew(reports: dict[str, HostReport]) -> dict[str, Lease]:
            return await ledger.renew.remote(name, reports)

        self.gate = HostGate(settings, renew)

    async def ready(self) -> None:
        pass

    async def crawl(self, photos: dict[str, int], connections: int) -> dict[str, int]:
        """Ask each host for so many photos over so many connections; what is in flight after that. It goes on renewing leases."""
        self.renewing = asyncio.create_task(self.gate.run())
        tasks = [asyncio.create_task(self.ask(host, count)) for host, count in photos.items() for _ in range(connections)]
        await asyncio.gather(*tasks)
        return self.gate.in_flight()

    async def ask(self, host: str, count: int) -> None:
        address, port = host.split(":")
        for _ in range(count):
            async with self.gate.request(host):
                reader, writer = await asyncio.open_connection(address, int(port))
                writer.write(b"GET / HTTP/1.1\r\nHost: photos\r\n\r\n")
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
                writer.close()


@pytest.fixture
def local_ray() -> Iterator[None]:
    # Ray's processes cannot import a test by its name.
    this = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this)
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(this)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """One that is bound by its slots at the limits of the test, and one that is bound by its rate."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = [Server(0.25), Server(0.01)]
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    yield servers
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_servers_see_the_limits_of_a_real_cluster(local_ray, servers):
    """Three processes, a ledger in a fourth; what the servers counted."""
    workers, connections = 3, 8
    settings = HostSettings(concurrency=5, requests_per_second=50)
    ledger = ray.remote(HostLedger).options(num_cpus=0).remote(settings)
    askers = [ray.remote(Asker).options(num_cpus=0).remote(str(number), settings, ledger) for number in range(workers)]
    ray.get([asker.ready.remote() for asker in askers])
    # Of one connection. At these limits both servers are busy for some seconds.
    photos = dict(zip([server.host for server in servers], (3, 8), strict=True))
    left = ray.get([asker.crawl.remote(photos, connections) for asker in askers])
    assert left == [{}] * workers
    for server in servers:
        assert len(server.arrivals) == photos[server.host] * connections * workers
        assert server.peak <= settings.concurrency
        # In one second there begin as many as the rate allows, with what is made up for after a late loop, one for each worker,
        # and one. What arrives in it and began before was in flight all the time: `concurrency` at most.
        allowed = settings.requests_per_second * (1 + CATCH_UP_SECONDS) + workers + 1 + settings.concurrency
        for at in server.arrivals:
            assert sum(at <= other < at + 1 for other in server.arrivals) <= allowed
    # In the end the ledger knows of each.
    for _ in range(6000):
        states = ray.get(ledger.snapshot.remote())
        if all(states[server.host].successes == len(server.arrivals) for server in servers):
            break
        time.sleep(0.1)
    for server in servers:
        assert (states[server.host].successes, states[server.host].failures) == (len(server.arrivals), 0)
