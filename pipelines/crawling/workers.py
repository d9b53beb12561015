"""A round on Ray: processes that crawl its units, and a stop in good order.

    units ──ray_pool──▶ CrawlWorker on each node ──▶ photos, many at once ──▶ a part for each unit (on disk)

Each process has an equal share of each web host's limits (hosts.py). Nothing but whether it worked comes back, never pixels.
"""

import asyncio
import gc
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray

from pbe_core.errors import InputError
from pbe_core.progress import Progress
from pipelines.config import BuildSettings
from pipelines.crawling.answers import Demands
from pipelines.crawling.fetching import Fetcher
from pipelines.crawling.hosts import most_processes, share_of
from pipelines.crawling.rounds import PartWriter, Round, SupersededError, part_name, read_part
from pipelines.crawling.wanted import PhotoSource
from pipelines.on_ray import start_ray
from pipelines.ray_pool import actor_options, work_on_ray
from schemas.outcomes import OK

MOST_WORKERS = 8
MOST_UNITS = 32
"""Of one process at once: while photos of some wait for hosts that cool down, those of others come."""
MOST_ERRORS = 3
"""After so many units in a row that could not be made (a full disk, say) no further one is tried in this run."""
_FEWER = "fewer crawling processes need less: lower build.crawl.workers or build.crawl.connections"
# A share of a CPU, so that a cluster that is busy otherwise still has a place for them: mostly they wait.
_CPUS_PER_WORKER = 0.1
_GARBAGE = (20_000, 20, 20)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether a person, or the machine, stops the crawl: Ctrl-C, SIGTERM, a closed terminal. A context manager.

    While photos are in flight (`gently`) the signal is noted, and the crawl ends in good order. Else, and the second time, it
    raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.gently = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = {number: old for number, old in handlers.items() if old != signal.SIG_IGN}  # nohup ignores SIGHUP.
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        again, self.signal = self.signal, self.signal or number
        if again or not self.gently:
            raise KeyboardInterrupt
        print("\nstopping: keeping what has come (once more to stop at once)", file=sys.stderr, flush=True)


def crawl_on_ray(
    chosen: Round, sources: Sequence[PhotoSource], settings: BuildSettings, progress: Progress, stop: Stop
) -> dict[int, str]:
    """Crawl all units of a round on all nodes, until they are done or `stop` is set.

    Returns:
        The error of each unit that could not be made: of the machine, or of ours, never of a photo.

    Raises:
        InputError: the cluster has no CPU.
    """
    errors: dict[int, str] = {}
    codes: Counter[str] = Counter()
    actors: list[Any] = []
    in_a_row = stored = 0

    def start() -> Any:
        share = share_of(settings.crawl.per_host, len(actors), count)
        own = settings.model_copy(update={"crawl": settings.crawl.model_copy(update={"per_host": share})})
        options = actor_options(_CPUS_PER_WORKER, at_once=MOST_UNITS)
        actors.append(ray.remote(CrawlWorker).options(scheduling_strategy="SPREAD", **options).remote(chosen, sources, own))
        return actors[-1]

    def stops() -> bool:
        return bool(stop.signal) or in_a_row >= MOST_ERRORS

    stop.gently = True  # Also while Ray starts: what a handler raises gets lost where Python runs it in a callback.
    try:
        count = _start(chosen, sources, settings, progress, stop)
        if stop.signal:
            return {}
        for unit, error in work_on_ray(start, count, range(len(chosen.sizes)), progress, _FEWER, MOST_UNITS, stops):
            if error:
                in_a_row += 1
                if not stop.signal:
                    errors[unit] = error
                continue
            in_a_row = 0
            progress.update(chosen.sizes[unit])
            if part := read_part(chosen.store / "parts" / f"{part_name(chosen.number, unit)}.json"):
                codes.update(part.codes)
                stored += part.stored_bytes
                counts = [f"{code} {number:,}" for code, number in sorted(codes.items(), key=_ok_first)]
                progress.say(" · ".join([*counts, f"{stored / 1e6:,.0f} MB stored"]))
    finally:
        for actor in actors:
            ray.kill(actor)  # What hangs, too: its parts are not recorded, so nothing is half there.
        stop.gently = False
    return errors


def _ok_first(item: tuple[str, int]) -> tuple[bool, int]:
    return item[0] != OK, -item[1]


def _start(chosen: Round, sources: Sequence[PhotoSource], settings: BuildSettings, progress: Progress, stop: Stop) -> int:
    """Start Ray; returns how many processes crawl."""
    if not ray.is_initialized():
        progress.say("starting Ray")
        start_ray(settings.ray.address)
    if stop.signal:
        return 0
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not cpus:
        raise InputError("the Ray cluster has no CPU to crawl on; add a node, or set build.ray.address to another one")
    count = min(settings.crawl.workers or min(cpus, MOST_WORKERS), len(chosen.sizes))
    if any(source.kind == "web" for source in sources):
        count = min(count, most_processes(settings.crawl.per_host))
    return count


class CrawlWorker:
    """Crawls units, several at once: an asyncio loop with many photos in flight. An async Ray actor."""

    def __init__(self, chosen: Round, sources: Sequence[PhotoSource], settings: BuildSettings) -> None:
        """Nothing is opened yet; `settings.crawl.per_host` are the limits of this process."""
        # Photos at hand are many objects and no garbage; to look for some as often as Python does takes a tenth of the time.
        gc.freeze()
        gc.set_threshold(*_GARBAGE)
        self.round = chosen
        self.stopping = False
        self.tasks: set[asyncio.Task[None]] = set()
        self.finished: dict[int, int] = {}
        """Unit at hand -> photos of it that have an outcome."""
        demands = Demands(
            frame=settings.source.photo_frame,
            max_pixels=settings.source.max_photo_pixels,
            min_side=settings.crawl.min_side,
            placeholders=frozenset(chosen.placeholders),
            missing_end_mark=settings.source.missing_end_mark,
        )
        self.fetcher = Fetcher(sources, settings.crawl, demands)
        self.opened: asyncio.Task[Any] | None = None

    async def ready(self) -> None:
        """That this returns means that the worker has found its place."""
        if self.opened is None:
            self.opened = asyncio.ensure_future(self.fetcher.__aenter__())
        await self.opened

    async def done(self) -> float:
        """Photos of the units at hand that have an outcome."""
        return sum(self.finished.values())

    async def work(self, unit: int) -> str:
        """Crawl one unit and make its part; returns why there is none, which is never because of a photo."""
        # Ray gives a worker that it has started again what was handed to the dead one, before anybody has asked `ready`.
        await self.ready()
        writer = PartWriter(self.round.store, self.round.number, unit)
        tasks: list[asyncio.Task[None]] = []
        self.finished[unit] = 0
        try:
            await asyncio.to_thread(writer.check_round)
            photos = await asyncio.to_thread(self.round.read_unit, unit)
            if self.stopping:
                return ""
            tasks = [asyncio.create_task(self._photo(photo, writer)) for photo in photos]
            self.tasks.update(tasks)
            try:
                await asyncio.gather(*tasks)
            except asyncio.CancelledError:
                if not self.stopping:
                    raise
                # Stopped: what has come is kept, the rest is for the next run.
                await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(writer.commit)
        except (SupersededError, OSError) as error:  # The message has it all.
            return f"{type(error).__name__}: {error}"
        except Exception:
            return traceback.format_exc()
        finally:
            for task in tasks:
                task.cancel()
            self.tasks.difference_update(tasks)
            del self.finished[unit]
            writer.abandon()
        return ""

    async def _photo(self, photo: dict[str, Any], writer: PartWriter) -> None:
        outcome = await self.fetcher.fetch(photo)
        writer.add(outcome.row, outcome.data, outcome.extension)
        self.finished[writer.unit] += 1

    async def stop(self) -> None:
        """Cancel everything that is in flight; parts that are begun are committed with what they have."""
        self.stopping = True
        for task in self.tasks:
            task.cancel()
