"""One process that crawls: an asyncio loop with many photos in flight, and a part for each unit of them."""

import asyncio
import contextlib
import gc
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.config import BuildSettings
from pipelines.crawling.fetching import Fetcher
from pipelines.crawling.hosts import HostGate
from pipelines.crawling.inspection import Demands
from pipelines.crawling.ledger import HostReport, Lease
from pipelines.crawling.parts import PartWriter, SupersededError
from pipelines.crawling.progress import Progress
from pipelines.crawling.rounds import Round
from pipelines.crawling.wanted import PhotoSource

_GARBAGE = (20_000, 20, 20)
_TELL_SECONDS = 0.5
_STALL_SECONDS = 1.0


@dataclass(frozen=True)
class Trouble:
    """Why a unit has no part; never because of a photo."""

    text: str
    of_all: bool = False
    """Whether all other units would have it, too: a full disk, a folder that is gone."""
    lost: bool = False
    """Whether its worker is, with all that it had at hand."""


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
            missing_end_mark=settings.source.missing_end_mark,
        )
        self.gate = HostGate(settings.crawl.per_host, self._renew, capacity=settings.crawl.connections)
        self.fetcher = Fetcher(sources, settings.crawl, demands, self.gate, hold=self.gate.hold)
        self.last_news: dict[int, float] = {}
        """When a photo of each unit at hand was last done with."""
        self.opened: asyncio.Task[Any] | None = None
        self.running: list[asyncio.Task[None]] = []

    async def ready(self) -> None:
        """That this returns means that the worker has found its place."""
        if self.opened is None:
            self.opened = asyncio.ensure_future(self._open())
        await self.opened

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

    async def crawl(self, unit: int) -> Trouble | None:
        """Crawl one unit and make its part."""
        await self.ready()
        writer = PartWriter(self.round.store, self.round.number, unit)
        tasks: list[asyncio.Task[None]] = []
        try:
            await asyncio.to_thread(writer.check_round)
            photos = await asyncio.to_thread(self.round.read_unit, unit)
            if self.stopping.is_set():
                return None
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
        except (SupersededError, OSError) as error:  # The message has it all.
            return Trouble(f"{type(error).__name__}: {error}", of_all=True)
        except Exception:
            return Trouble(traceback.format_exc())
        finally:
            for task in tasks:
                task.cancel()
            self.tasks.difference_update(tasks)
            self.last_news.pop(unit, None)
            writer.abandon()
        return None

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
