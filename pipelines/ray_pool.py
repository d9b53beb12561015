"""One pool of Ray actors for packing and surveying: units of work handed to actors until each unit is done, or failed.

    units ──▶ an actor that stands ──▶ the next one       each second, every actor tells how much of its unit is done
                  └── lost with its unit: another actor gets that, once

A unit may be worked on twice, which commit records make harmless. Nothing but an error comes back, never pixels. Crawling has a
scheduler of its own (crawling/driver.py): its workers have many units at once, since they wait for hosts most of the time.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from pbe_core.progress import Progress
from pipelines.on_ray import is_lost, waiting_since, what_was_lost

MOST_RESTARTS = 10
"""Of one actor: enough for nodes that come and go, few enough that one which cannot live anywhere is given up."""
_LOOK_SECONDS = 1.0


class Worker(Protocol):
    """What a pool's actors do. `done` is asked while `work` runs, in another thread."""

    def ready(self) -> None:
        """That this returns means that the actor has found its place and what it works with."""

    def work(self, unit: int) -> str:
        """Do a unit; returns what went wrong, or nothing."""

    def done(self) -> float:
        """How much of the unit at hand is done, in what the progress counts."""


def work_on_ray(
    make: Callable[[], Any], count: int, units: Collection[int], progress: Progress, fewer: str
) -> Iterator[tuple[int, str]]:
    """Do units on `count` actors; yields (unit, error or "") as they finish.

    Ray is started, and a unit that is yielded does not count as progress any more: that is the caller's to add.

    Args:
        make: starts an actor, with `options` of `actor_options` and a class of the kind of `Worker`; returns its handle.
        count: of actors.
        units: to do; as often as an actor is lost with a unit for the first time, another one gets it.
        progress: shows what the actors have at hand; its clock starts when the first of them stands.
        fewer: the settings by which fewer actors run at once, for the message where memory runs out.
    """
    pool = _Pool(deque(units), progress, fewer)
    for _ in range(min(count, len(units))):
        pool.await_standing(make())
    yield from pool.run()
    progress.say("")
    progress.partly(0)


def actor_options(cpus: float, gpus: float = 0) -> dict[str, Any]:
    """Options of a pool's actors: what each reserves, restarts, and a thread for `done` beside the one that works."""
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": MOST_RESTARTS, "max_concurrency": 2}


@dataclass
class _Pool:
    waiting: deque[int]
    progress: Progress
    fewer: str
    running: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)
    """Ray's promise -> its actor, and the unit that it works on; none while it is waited for until it stands."""
    idle: list[Any] = field(default_factory=list)
    lost_before: set[int] = field(default_factory=set)
    at_hand: dict[int, float] = field(default_factory=dict)
    """Unit -> how much of it is done."""
    asked: dict[Any, int] = field(default_factory=dict)
    """Ray's promise of how much of a unit is done -> the unit."""
    began: bool = False
    started: float = field(default_factory=time.monotonic)

    def await_standing(self, actor: Any) -> None:
        """An actor gets work once it stands: one that finds no place on its cluster, for whatever reason, holds no unit.

        With retries Ray keeps the question until then, wherever the actor is started again before that.
        """
        self.running[actor.ready.options(max_task_retries=-1).remote()] = actor, None

    def run(self) -> Iterator[tuple[int, str]]:
        """Until all is done, or no actor is left; those that never found a place need not be waited for."""
        error = ""
        self.progress.say(waiting_since(self.started))
        while True:
            while self.waiting and self.idle:
                actor, given = self.idle.pop(), self.waiting.popleft()
                self.running[actor.work.remote(given)] = actor, given
            if not self.running or not (self.waiting or any(unit is not None for _, unit in self.running.values())):
                break
            finished, _ = ray.wait(list(self.running), num_returns=1, timeout=_LOOK_SECONDS)
            if not finished:
                self.look()
                continue
            actor, unit = self.running.pop(finished[0])
            lost = False
            try:
                error = ray.get(finished[0]) or ""
            except ray.exceptions.RayError as failure:
                # Where `ready` itself raised, the process is there, and is of no use.
                error, lost = what_was_lost(failure, self.fewer), unit is None or is_lost(failure)
            self.forget(unit)
            if not lost:
                self.stands(actor)
            elif unit is not None:
                # Its process or node died. It may stand again, now or when there is a place for it. Its unit does not wait.
                self.await_standing(actor)
                if unit not in self.lost_before:
                    self.lost_before.add(unit)
                    self.waiting.append(unit)
                    continue
            # Otherwise it was lost before it stood, for good: its constructor failed, or it died too often.
            if unit is not None:
                yield unit, error
        for unit in self.waiting:
            yield unit, error

    def stands(self, actor: Any) -> None:
        """An actor can take work."""
        self.idle.append(actor)
        if not self.began:
            self.began = True
            self.progress.begin()
            self.progress.say("")

    def look(self) -> None:
        """Ask the actors how far they are, and show what they said: each answers when it can, and one at most is due of each."""
        working = {unit: actor for actor, unit in self.running.values() if unit is not None}
        for promise in ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)[0] if self.asked else []:
            unit = self.asked.pop(promise)
            if unit not in working:  # A late answer: the unit is counted as a whole by now.
                continue
            try:
                self.at_hand[unit] = ray.get(promise)
            except ray.exceptions.RayError:  # That it is lost shows elsewhere.
                self.at_hand.pop(unit, None)
        if not self.began:
            self.progress.say(waiting_since(self.started))
        due = set(self.asked.values())
        for unit in working.keys() - due:
            self.asked[working[unit].done.remote()] = unit
        self.progress.partly(sum(self.at_hand.values()))

    def forget(self, unit: int | None) -> None:
        """A unit is not at hand any more."""
        if unit in self.at_hand:
            del self.at_hand[unit]
            self.progress.partly(sum(self.at_hand.values()))
