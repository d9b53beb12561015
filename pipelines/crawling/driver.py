"""Crawling on Ray: workers on all nodes, and one ledger for the whole cluster.

    driver ──units──▶ workers ──photos──▶ parts (on disk)
       ▲                 │ once a second: what each host does, what has come
       └──snapshot── ledger ──▶ shares of each host's limits

A unit is one part: nothing but whether it worked comes back, never pixels. What dies takes its units with it; these are tried
again.
"""

import math
import signal
import time
import uuid
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from pbe_core.errors import InputError
from pipelines.config import BuildSettings
from pipelines.crawling.live import Display
from pipelines.crawling.progress import CrawlLedger, Snapshot
from pipelines.crawling.rounds import Round
from pipelines.crawling.stopping import Stop
from pipelines.crawling.wanted import PhotoSource
from pipelines.crawling.workers import CrawlWorker, Trouble
from pipelines.on_ray import is_lost, start_ray, waiting_since, what_was_lost

MOST_WORKERS = 8
# Each worker has several units at hand, so that one photo that takes minutes does not leave it idle.
UNITS_AT_ONCE = 4
# It gets two others for each whose photos wait for hosts that rest, up to so many.
MOST_UNITS = 64
STOP_SECONDS = 8
_FEWER = "fewer crawling processes need less: lower build.crawl.workers or build.crawl.connections"
_CPUS_PER_WORKER = 0.1
_LOOK_SECONDS = 0.5


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
        display.say("starting Ray")
        try:
            start_ray(settings.ray.address)
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
        _stands(worker, attempts): (name, None) for name, worker in workers.items()
    }
    stalled: dict[str, int] = {}
    shown: ray.ObjectRef | None = None
    deadline, began = math.inf, time.monotonic()
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
            while waiting and len(hand) < room and _may_take(waiting[0], hand, tries, stalled.get(name, 0)):
                unit = waiting.popleft()
                hand.add(unit)
                running[workers[name].crawl.remote(unit)] = name, unit
        display.say("" if standing else waiting_since(began))
        shown = shown or ledger.snapshot.remote()
        ready, _ = ray.wait([shown, *running], num_returns=1, timeout=_LOOK_SECONDS)
        if shown in ready:
            stalled = _show(shown, display) or stalled
            shown = None
            # The ledger answers at once; looking twice a second is enough.
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS) if running else ([], [])
        for reference in ready:
            name, done = running.pop(reference)
            trouble = _trouble_of(reference)
            lost = trouble is not None and trouble.lost
            if done is None and not trouble:
                standing.add(name)
                calls[name] = 0
            elif done is not None:
                at_hand[name].discard(done)
            elif trouble:
                reason = trouble.text
            if lost or (done is None and trouble):  # Ray starts it again; until it stands, it gets nothing.
                standing.discard(name)
                if not at_hand[name] and calls[name] < attempts:
                    calls[name] += 1
                    running[_stands(workers[name], attempts)] = name, None
            if done is None or stop.signal:
                continue
            hopeless = hopeless + 1 if trouble and trouble.of_all else 0
            if not trouble:
                continue
            tries[done] += 1
            if hopeless >= attempts:  # So would all others: they are for another run.
                waiting.clear()
            elif tries[done] < attempts:
                waiting.append(done)
                continue
            errors[done] = trouble.text
    if waiting and not stop.signal:
        errors[waiting[0]] = f"no crawling process could be started: {reason}"
    return errors


def _stands(worker: Any, attempts: int) -> ray.ObjectRef:
    """An answer of the worker once it stands. With retries Ray keeps the question until then; without, it is refused at once."""
    return worker.ready.options(max_task_retries=attempts).remote()


def _may_take(unit: int, hand: set[int], tries: Mapping[int, int], stalled: int) -> bool:
    """Whether a worker with these units at hand, of which some stall, may have this one too.

    One that failed before is alone with its worker, but for those that only wait for hosts: nothing of theirs can kill it.
    """
    tried = tries.get(unit) or any(tries.get(other) for other in hand)
    return not tried or len(hand) <= stalled


def _show(reference: Any, display: Display) -> dict[str, int] | None:
    """Show a snapshot of the ledger; returns the stalled units of each worker, nothing if there is no ledger just now."""
    try:
        snapshot: Snapshot = ray.get(reference)
    except ray.exceptions.RayError:  # It is being started again; the next look will tell.
        return None
    display.show(snapshot.total.codes, snapshot.total.received, snapshot.total.in_flight, snapshot.hosts)
    return snapshot.stalled


def _trouble_of(reference: Any) -> Trouble | None:
    """What went wrong with a call."""
    try:
        trouble: Trouble | None = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Trouble(what_was_lost(error, _FEWER), lost=is_lost(error))
    return trouble
