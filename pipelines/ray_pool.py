"""One pool of Ray actors for packing, scanning and crawling: units of work handed to actors until each unit is done, or failed.

    units ──▶ an actor that stands ──▶ the next one       each second, every actor is asked how much of its units is done
                  └── lost with its units: another actor gets each again, alone

A unit may be worked on twice, which commit records make harmless. Nothing but an error comes back, never pixels.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from pbe_core.progress import Progress
from pipelines.on_ray import cause_of

MOST_RESTARTS = 10
"""Of one actor: enough for nodes that come and go, few enough that one which cannot live anywhere is given up."""
STOP_SECONDS = 8.0
"""For so long actors that are asked to stop may take to finish the units at hand."""
_FEW = 4
"""Units that an actor has at hand at first, where it may have several: one that takes long does not leave it idle."""
_LOOK_SECONDS = 1.0
_LONG_SECONDS = 60


class Worker(Protocol):
    """What a pool's actors do. `done` is asked while `work` runs, in another thread or, of an async actor, in the same loop."""

    def ready(self) -> None:
        """That this returns means that the actor has found its place and what it works with."""

    def work(self, unit: int) -> str:
        """Do a unit; returns what went wrong, or nothing. In a process that Ray has started again it may come before `ready`."""

    def done(self) -> float:
        """How much of the units at hand is done, in what the progress counts."""


def work_on_ray(
    make: Callable[[], Any],
    count: int,
    units: Collection[int],
    progress: Progress,
    fewer: str,
    at_once: int = 1,
    stops: Callable[[], object] = lambda: False,
) -> Iterator[tuple[int, str]]:
    """Do units on `count` actors; yields (unit, error or "") as they finish.

    Ray is started, and a unit that is yielded does not count as progress any more: that is the caller's to add.

    Args:
        make: starts an actor, with `options` of `actor_options` and a class of the kind of `Worker`; returns its handle.
        count: of actors.
        units: to do; one that is lost with its actor is given out again: once, or twice where actors have several at hand.
        progress: shows what the actors have at hand; its clock starts when the first of them stands.
        fewer: the settings by which fewer actors run at once, for the message where memory runs out.
        at_once: units that one actor has at hand at most; more than one is for async actors. It has few, and gets others when
            none of them makes progress, as while the crawl waits for a host.
        stops: whether to stop: then nothing more is handed out, `stop()` of each actor is called, and what is not done
            `STOP_SECONDS` later is neither waited for nor yielded.
    """
    pool = _Pool(deque(units), progress, fewer, at_once, stops)
    for _ in range(min(count, len(units))):
        pool.actors.append(_Actor(make(), most=min(_FEW, at_once)))
        pool.await_standing(pool.actors[-1])
    yield from pool.run()
    progress.say("")
    progress.partly(0)


def actor_options(cpus: float, gpus: float = 0, at_once: int = 1) -> dict[str, Any]:
    """Options of a pool's actors: what each reserves, restarts, and calls at once: `done` and others beside those that work."""
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": MOST_RESTARTS, "max_concurrency": at_once + 1 + (at_once > 1)}


@dataclass(eq=False)
class _Actor:
    handle: Any
    stands: bool = False
    awaited: bool = False
    """Whether it is waited for until it stands."""
    units: set[int] = field(default_factory=set)
    most: int = 1
    """Units that it may have at hand."""
    done: float = 0
    """How much of them is done, as last told."""


@dataclass
class _Pool:
    waiting: deque[int]
    progress: Progress
    fewer: str
    at_once: int
    stops: Callable[[], object]
    actors: list[_Actor] = field(default_factory=list)
    running: dict[Any, tuple[_Actor, int | None]] = field(default_factory=dict)
    """Ray's promise -> its actor, and the unit that it works on; none while it is waited for until it stands."""
    losses: Counter[int] = field(default_factory=Counter)
    asked: dict[Any, _Actor] = field(default_factory=dict)
    """Ray's promise of how much is done -> the actor."""
    began: bool = False
    started: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    """Until when actors that were asked to stop are waited for."""

    def await_standing(self, actor: _Actor) -> None:
        """An actor gets work once it stands: one that finds no place on its cluster, for whatever reason, holds no unit.

        With retries Ray keeps the question until then, wherever the actor is started again before that.
        """
        actor.stands, actor.awaited = False, True
        self.running[actor.handle.ready.options(max_task_retries=-1).remote()] = actor, None

    def run(self) -> Iterator[tuple[int, str]]:
        """Until all is done, or no actor is left; those that never found a place need not be waited for."""
        error = ""
        self.progress.say(self.status())
        while not self.is_over():
            self.hand_out()
            if not self.running or not (self.waiting or any(actor.units for actor in self.actors)):
                break
            finished, _ = ray.wait(list(self.running), num_returns=1, timeout=_LOOK_SECONDS)
            if time.monotonic() - self.looked >= _LOOK_SECONDS:
                self.look()
            if not finished:
                continue
            actor, unit = self.running.pop(finished[0])
            lost = False
            try:
                error = ray.get(finished[0]) or ""
            except ray.exceptions.RayError as failure:
                # Where `ready` itself raised, the process is there, and is of no use.
                error, lost = what_was_lost(failure, self.fewer), unit is None or is_lost(failure)
            if unit is None:
                actor.awaited = False
                if not lost:  # Otherwise it was lost before it stood, for good: its constructor failed, or it died too often.
                    self.stand(actor)
                continue
            self.forget(actor, unit)
            if lost:
                # Its process or node died. It may stand again, now or when there is a place for it. Its unit does not wait.
                if not actor.awaited:
                    self.await_standing(actor)
                self.losses[unit] += 1
                # The first time, another unit of the same actor may have been what ended it.
                if self.losses[unit] <= (1 if self.at_once == 1 else 2) and self.deadline is None:
                    self.waiting.append(unit)
                    continue
            yield unit, error
        for unit in self.waiting:
            yield unit, error

    def is_over(self) -> bool:
        """Whether a stop has come and its time is over."""
        if self.deadline is None and self.stops():
            self.deadline = time.monotonic() + STOP_SECONDS
            self.waiting.clear()
            for actor in self.actors:
                actor.handle.stop.remote()
        return self.deadline is not None and time.monotonic() > self.deadline

    def hand_out(self) -> None:
        """Give units to the actors that have fewest."""
        while self.waiting:
            free = [actor for actor in self.actors if self.may_take(actor, self.waiting[0])]
            if not free:
                return
            actor, unit = min(free, key=lambda one: len(one.units)), self.waiting.popleft()
            actor.units.add(unit)
            self.running[actor.handle.work.remote(unit)] = actor, unit

    def may_take(self, actor: _Actor, unit: int) -> bool:
        """A unit that was lost before is alone with its actor: it may be what ended the other one."""
        alone = any(self.losses[one] for one in (unit, *actor.units))
        return actor.stands and len(actor.units) < (1 if alone else actor.most)

    def stand(self, actor: _Actor) -> None:
        """An actor can take work."""
        actor.stands = True
        if not self.began:
            self.began = True
            self.progress.begin()
            self.progress.say("")

    def look(self) -> None:
        """Ask the actors how far they are, and show what they answered: each when it can, to one question at most."""
        self.looked = time.monotonic()
        for promise in ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)[0] if self.asked else []:
            actor = self.asked.pop(promise)
            try:
                done = ray.get(promise)
                if done <= actor.done:
                    actor.most = min(self.at_once, max(actor.most, len(actor.units) + 2))
                actor.done = done
            except ray.exceptions.RayError:  # That it is lost shows elsewhere.
                actor.done = 0
        if not self.began:
            self.progress.say(self.status())
        due = set(self.asked.values())
        for actor in self.actors:
            if actor.units and actor not in due:
                self.asked[actor.handle.done.remote()] = actor
        self.progress.partly(sum(actor.done for actor in self.actors if actor.units))

    def forget(self, actor: _Actor, unit: int) -> None:
        """A unit is not at hand any more, nor what its actor said before of how much is done: the next look asks again."""
        actor.units.discard(unit)
        actor.done = 0
        self.asked = {promise: other for promise, other in self.asked.items() if other is not actor}
        self.progress.partly(sum(other.done for other in self.actors if other.units))

    def status(self) -> str:
        """What to show while no actor stands."""
        long = time.monotonic() - self.started > _LONG_SECONDS
        return "waiting for Ray to start its processes" + (": is the cluster busy?" if long else "")


def is_lost(failure: ray.exceptions.RayError) -> bool:
    """Whether the process that was to do something is gone, or never stood; false where its code ran and raised.

    Only the latter is an error of its own kind; all others, of which there are many, are of Ray, its processes and nodes.
    """
    return not isinstance(failure, ray.exceptions.RayTaskError)


def what_was_lost(failure: ray.exceptions.RayError, fewer: str) -> str:
    """A lost process in words; where memory ran out, or may have, with `fewer`: the settings by which fewer run at once."""
    if isinstance(failure, ray.exceptions.OutOfMemoryError):
        return f"the machine ran out of memory, and Ray ended a process for it ({cause_of(failure)}); {fewer}"
    if isinstance(failure, ray.exceptions.ActorUnavailableError):  # Ray keeps for itself why it starts a process again.
        return f"a process was ended again and again, for lack of memory perhaps ({cause_of(failure)}); {fewer}"
    return str(failure)
