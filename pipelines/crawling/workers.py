"""Crawling on Ray: workers on all nodes, each an asyncio loop with many photos in flight, and one ledger for the whole cluster.

    driver ──units──▶ workers ──photos──▶ parts (on disk)
       ▲                 │ once a second: what each host does, what has come
       └──snapshot── ledger ──▶ shares of each host's limits

A unit is one part: nothing but whether it worked comes back, never pixels. What dies takes its units with it; these are tried
again.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import sys
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from pipelines.config import BuildSettings, CrawlSettings
from pipelines.crawling.fetching import Fetcher
from pipelines.crawling.hosts import HostGate
from pipelines.crawling.inspection import Demands
from pipelines.crawling.ledger import HostLedger, HostReport, HostState, Lease
from pipelines.crawling.live import Display
from pipelines.crawling.parts import PartWriter, SupersededError
from pipelines.crawling.rounds import Round
from pipelines.crawling.wanted import PhotoSource
from schemas.errors import InputError

MOST_WORKERS = 8
# Each worker has several units at hand, so that one photo that takes minutes does not leave it idle.
UNITS_AT_ONCE = 4
# It gets two others for each whose photos wait for hosts that rest, up to so many.
MOST_UNITS = 64
STOP_SECONDS = 8
_CPUS_PER_WORKER = 0.1
_GARBAGE = (20_000, 20, 20)
_TELL_SECONDS = 0.5
_STALL_SECONDS = 1.0
# What a unit says that failed for a reason that all the others would have too.
_HOPELESS = "all units: "
_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 60
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether a person, or the machine, wants the crawl to end: Ctrl-C, SIGTERM, a closed terminal. A context manager.

    While photos are in flight (`gently`) it is noted, and the crawl ends in good order. Else, and the second time, it raises
    `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.gently = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = {number: old for number, old in handlers.items() if old != signal.SIG_IGN}  # nohup ignores SIGHUP.
        # What a handler raises gets lost where Python runs it within a callback, as when it forks; here it leaves a byte.
        self._arrived, self._arrives = os.pipe()
        for end in (self._arrived, self._arrives):
            os.set_blocking(end, False)
        self._woken_before = signal.set_wakeup_fd(self._arrives, warn_on_full_buffer=False)
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._arrived)
        os.close(self._arrives)

    def listen(self) -> None:
        """Hear signals, also where somebody else has put a handler meanwhile, and what that one may have lost."""
        for number in self._before:
            signal.signal(number, self._hear)
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._arrived, 100):
                if number in self._before:
                    self._hear(number, None)

    def _hear(self, number: int, _: Any) -> None:
        again, self.signal = self.signal, self.signal or number
        if again or not self.gently:
            raise KeyboardInterrupt
        print("\nstopping: keeping what has come (once more to stop at once)", file=sys.stderr, flush=True)


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


class CrawlWorker:
    """Crawls units, several at once. An async Ray actor."""

    def __init__(
        self,
        chosen: Round,
        sources: Sequence[PhotoSource],
        settings: BuildSettings,
        ledger: str,
        name: str,
    ) -> None:
        """Nothing is opened yet; `ledger` is the name of the actor, `name` that of this worker, also when it is started again."""
        # Photos at hand are many objects and no garbage; to look for some as often as Python does takes a tenth of the time.
        gc.freeze()
        gc.set_threshold(*_GARBAGE)
        self.round = chosen
        self.settings = settings.crawl
        self.ledger = ray.get_actor(ledger)
        self.name = name
        self.progress = Progress()
        self.stopping = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        demands = Demands(
            frame=settings.source.photo_frame,
            max_pixels=settings.source.max_photo_pixels,
            min_side=settings.crawl.min_side,
            placeholders=frozenset(chosen.placeholders),
        )
        self.gate = HostGate(settings.crawl.per_host, self._renew, capacity=settings.crawl.connections)
        self.fetcher = Fetcher(sources, settings.crawl, demands, self.gate, hold=self.gate.hold)
        self.last_news: dict[int, float] = {}
        """When a photo of each unit at hand was last done with."""
        self.opened: asyncio.Task[Any] | None = None
        self.running: list[asyncio.Task[None]] = []

    async def ready(self) -> str:
        """Nothing to say; that this returns means that the worker has found its place."""
        if self.opened is None:
            self.opened = asyncio.ensure_future(self._open())
        await self.opened
        return ""

    async def _open(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # A ledger that begins again has heard of nobody.
            await self.ledger.arrive.remote(self.name)
        await self.fetcher.__aenter__()
        self.running = [asyncio.ensure_future(self.gate.run()), asyncio.ensure_future(self._tell())]

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            with contextlib.suppress(ray.exceptions.RayError):
                await self.ledger.tell.remote(self.name, self._now())

    async def _renew(self, reports: dict[str, HostReport]) -> dict[str, Lease]:
        leases: dict[str, Lease] = await self.ledger.renew.remote(self.name, reports)
        return leases

    def _now(self) -> Progress:
        now = asyncio.get_running_loop().time()
        self.progress.in_flight = self.fetcher.throttle.busy
        self.progress.stalled = sum(now - last > _STALL_SECONDS for last in self.last_news.values())
        return self.progress

    async def crawl(self, unit: int) -> str:
        """Crawl one unit and make its part; returns what went wrong, or nothing."""
        await self.ready()
        writer = PartWriter(self.round.store, self.round.number, unit)
        tasks: list[asyncio.Task[None]] = []
        try:
            await asyncio.to_thread(writer.check_round)
            photos = await asyncio.to_thread(self.round.read_unit, unit)
            if self.stopping.is_set():
                return ""
            self.last_news[unit] = asyncio.get_running_loop().time()
            tasks = [asyncio.create_task(self._photo(photo, writer)) for photo in photos]
            self.tasks.update(tasks)
            try:
                await asyncio.gather(*tasks)
            except asyncio.CancelledError:
                if not self.stopping.is_set():
                    raise
                # Stopped: what has come is kept, the rest is for the next run.
                await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(writer.commit)
        except (SupersededError, OSError) as error:  # A full disk, a folder that is gone: the message has it all.
            return f"{_HOPELESS}{type(error).__name__}: {error}"
        except Exception:
            return traceback.format_exc()
        finally:
            for task in tasks:
                task.cancel()
            self.tasks.difference_update(tasks)
            self.last_news.pop(unit, None)
            writer.abandon()
        return ""

    async def _photo(self, photo: dict[str, Any], writer: PartWriter) -> None:
        outcome = await self.fetcher.fetch(photo)
        writer.add(outcome.row, outcome.data, outcome.extension)
        self.last_news[writer.unit] = asyncio.get_running_loop().time()
        self.progress.codes[outcome.row["code"]] += 1
        self.progress.received += outcome.received

    async def stop(self) -> None:
        """Let go of everything that is in flight; parts that are begun are committed with what they have."""
        self.stopping.set()
        for task in self.tasks:
            task.cancel()

    async def close(self) -> None:
        """The last report, and the end of all connections."""
        for task in self.running:
            task.cancel()
        await self.ledger.leave.remote(self.name, self._now())
        if self.opened:
            await self.fetcher.__aexit__(None, None, None)


def crawl_on_ray(
    chosen: Round, sources: Sequence[PhotoSource], settings: BuildSettings, display: Display, stop: Stop
) -> dict[int, str]:
    """Crawl all units of a round on all nodes, until they are done or `stop` is set.

    Returns:
        The last error of each unit that failed `ray.attempts` times: of the machine, or of ours, never of a photo.

    Raises:
        InputError: the cluster has no CPU.
    """
    if not ray.is_initialized():
        try:
            ray.init(address=settings.ray.address, log_to_driver=False, logging_level=logging.ERROR)
        except SystemExit:  # What Ray makes of a SIGTERM while it starts.
            stop.signal = stop.signal or signal.SIGTERM
            raise KeyboardInterrupt from None
        stop.listen()  # Ray has put a handler of its own.
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not cpus:
        raise InputError("the Ray cluster has no CPU to crawl on; add a node, or set build.ray.address to another one")
    count = min(settings.crawl.workers or min(cpus, MOST_WORKERS), len(chosen.sizes))
    # By name: a worker that is started again on another node must find it, too.
    name = f"crawl-{uuid.uuid4().hex}"
    ledger = ray.remote(CrawlLedger).options(name=name, num_cpus=0, max_restarts=-1).remote(settings.crawl)
    # A share of a CPU, so that a cluster that is busy otherwise still has room for them: mostly they wait.
    make = ray.remote(CrawlWorker).options(
        num_cpus=_CPUS_PER_WORKER, max_restarts=-1, max_concurrency=MOST_UNITS + 8, scheduling_strategy="SPREAD"
    )
    workers = {
        worker: make.remote(chosen, sources, settings, name, worker) for worker in (f"worker {number}" for number in range(count))
    }
    stop.gently = True
    try:
        return _hand_out(len(chosen.sizes), workers, ledger, settings.ray.attempts, display, stop)
    finally:
        farewells = [worker.close.remote() for worker in workers.values()]
        ray.wait(farewells, num_returns=len(farewells), timeout=STOP_SECONDS / 2)
        for actor in (*workers.values(), ledger):
            ray.kill(actor)
        stop.gently = False


def _hand_out(units: int, workers: Mapping[str, Any], ledger: Any, attempts: int, display: Display, stop: Stop) -> dict[int, str]:
    """Give units to workers that stand; those that failed come last, each alone, since one photo may be what kills its worker."""
    waiting = deque(range(units))
    tries: Counter[int] = Counter()
    errors: dict[int, str] = {}
    at_hand: dict[str, set[int]] = {name: set() for name in workers}
    # A worker that finds no place on its cluster, for whatever reason, holds no unit: it must answer first.
    standing: set[str] = set()
    calls: Counter[str] = Counter()  # In vain.
    reason, hopeless = "", 0
    running: dict[ray.ObjectRef, tuple[str, int | None]] = {
        worker.ready.remote(): (name, None) for name, worker in workers.items()
    }
    stalled: dict[str, int] = {}
    shown: ray.ObjectRef | None = None
    deadline, patience = math.inf, time.monotonic() + _PATIENCE_SECONDS
    while (running or standing) and (waiting or any(at_hand.values())):
        if stop.signal and deadline == math.inf:
            waiting.clear()
            deadline = time.monotonic() + STOP_SECONDS
            for worker in workers.values():
                worker.stop.remote()
        if time.monotonic() > deadline:
            break  # What hangs is killed; its parts are not recorded, so nothing is half there.
        for name in sorted(standing, key=lambda one: len(at_hand[one])):
            hand, room = at_hand[name], min(MOST_UNITS, UNITS_AT_ONCE + 2 * stalled.get(name, 0))
            while waiting and len(hand) < room and _may_take(waiting[0], hand, tries):
                unit = waiting.popleft()
                hand.add(unit)
                running[workers[name].crawl.remote(unit)] = name, unit
        if not standing and time.monotonic() > patience:
            print("still waiting for Ray to start the crawling processes: is the cluster busy?", file=sys.stderr)
            patience += _PATIENCE_SECONDS
        shown = shown or ledger.snapshot.remote()
        ready, _ = ray.wait([shown, *running], num_returns=1, timeout=_LOOK_SECONDS)
        if shown in ready:
            stalled = _show(shown, display) or stalled
            shown = None
            # The ledger answers at once; looking twice a second is enough.
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS) if running else ([], [])
        for reference in ready:
            name, done = running.pop(reference)
            error, lost = _error_of(reference)
            if done is None and not lost:
                standing.add(name)
                calls[name] = 0
            elif done is not None:
                at_hand[name].discard(done)
            if lost and done is None:
                reason = error
            if lost:  # Ray starts it again; until it stands, it gets nothing.
                standing.discard(name)
                if not at_hand[name] and calls[name] < attempts:
                    calls[name] += 1
                    running[workers[name].ready.remote()] = name, None
            if done is None or stop.signal:
                continue
            hopeless = hopeless + 1 if error.startswith(_HOPELESS) else 0
            if not error:
                continue
            tries[done] += 1
            if hopeless >= attempts:  # So would all others: they are for another run.
                waiting.clear()
            elif tries[done] < attempts:
                waiting.append(done)
                continue
            errors[done] = error.removeprefix(_HOPELESS)
    if waiting and not stop.signal:
        errors[waiting[0]] = f"no crawling process could be started: {reason}"
    return errors


def _may_take(unit: int, hand: set[int], tries: Mapping[int, int]) -> bool:
    """Whether a worker with these units may have this one too: one that failed before is alone with its worker."""
    return not hand or not (tries.get(unit) or any(tries.get(other) for other in hand))


def _show(reference: Any, display: Display) -> dict[str, int] | None:
    """Show a snapshot of the ledger; returns the stalled units of each worker, nothing if there is no ledger just now."""
    try:
        snapshot: Snapshot = ray.get(reference)
    except ray.exceptions.RayError:  # It is being started again; the next look will tell.
        return None
    display.show(snapshot.total.codes, snapshot.total.received, snapshot.total.in_flight, snapshot.hosts)
    return snapshot.stalled


def _error_of(reference: Any) -> tuple[str, bool]:
    """What went wrong with a call, or nothing; and whether its worker is lost."""
    try:
        error: str = ray.get(reference)
    except ray.exceptions.RayError as lost:
        return str(lost), True
    return error, False
