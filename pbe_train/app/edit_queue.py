"""Edits that wait for the one painting process: next is the session whose turn is longest ago.

sessions  a: 1 2 3     b: 4     c: 5 6     ──▶ painted in the order 1 4 5 2 6 3
"""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pbe_train.app.models import Choice
from pbe_train.app.painter import Message, Painter
from pbe_train.app.security import RefusedError
from pbe_train.app.sessions import MOST_SESSIONS, Item, Session

_NO_CHOICE = Choice("", "", "")
_log = logging.getLogger(__name__)
State = Literal["waiting", "painting", "done", "cancelled", "failed"]
MOST_OF_SESSION = 8
"""Edits that one session may have waiting, beside the one that is painted."""
MOST_WAITING = 64
"""Edits of all sessions that may wait."""
KEPT_COSTS = 0.25
"""Of a whole pass, one that keeps the deep features (docs/editing.md)."""


@dataclass
class Edit(Item):
    """What is asked for, and how far it is."""

    owner: str = ""
    choice: Choice = _NO_CHOICE
    of: dict[str, Any] = field(default_factory=dict)
    """The photo as the page was told of it: `id`, `name`, `width`, `height`."""
    photo: str = ""
    """File in the edit's folder, like all names below."""
    mask: str = ""
    references: list[str] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)
    """`seeds`, `guidance`, `guidance_interval`, `steps`, `reuse`, `scheduler`."""
    state: State = "waiting"
    place: int = 0
    """Edits that are painted before this one."""
    seed_number: int = 0
    step: int = 0
    steps: int = 0
    began: float | None = None
    """When its first step was done."""
    heard: float = 0.0
    """When its newest step was done."""
    steps_since: int = 0
    error: str | None = None
    previews: int = 0
    results: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    listeners: int = 0
    unwanted: bool = False
    """It is to end at the next step."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Is set at the next change, and then another one takes its place."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will change."""
        return self.state in ("done", "cancelled", "failed")

    @property
    def passes(self) -> float:
        """Of the U-Net in a step, in the mean: guidance takes a second one where it works; kept features spare most of one."""
        start, end = self.how["guidance_interval"]
        whole: float = (1 + KEPT_COSTS * (self.how["reuse"] - 1)) / self.how["reuse"]
        return whole * (1.0 if self.how["guidance"] == 1 else 1.0 + end - start)

    def tell(self) -> None:
        """Wake who waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def seconds_left(self) -> float | None:
        """By the pace of its steps so far; null before the second one."""
        if self.state != "painting" or self.began is None or self.steps_since < 1:
            return None
        left = (len(self.how["seeds"]) - self.seed_number) * self.steps - self.step
        return round(left * (self.heard - self.began) / self.steps_since, 1)

    def hear(self, message: Message) -> None:
        """Take in what the painting process says."""
        match message["is"]:
            case "begun":
                self.facts = message["facts"]
            case "step":
                self.heard = time.monotonic()
                if self.began is None:
                    self.began = self.heard
                else:
                    self.steps_since += 1
                self.seed_number, self.step, self.steps = message["seed_number"], message["step"], message["steps"]
            case "preview":
                self.previews += 1
            case "result":
                self.results = message["number"] + 1
            case "done" | "cancelled" | "failed" as state:
                self.state, self.error = state, message.get("error")
        self.tell()


class EditQueue:
    """Who is next.

    Args:
        painter: paints.
        finished: is called with each edit that is over.
    """

    def __init__(self, painter: Painter, finished: Callable[[Edit], None]) -> None:
        self.painter, self.finished = painter, finished
        self.painting: Edit | None = None
        self._waiting: dict[str, deque[Edit]] = {}
        """Session -> its waiting edits."""
        self._turns: OrderedDict[str, int] = OrderedDict()
        """Session -> when it was its turn, counted; those of long ago are forgotten."""
        self._turn = 0
        self._pace: dict[str, float] = {}
        """Model -> seconds for a pass of it."""
        self._more = asyncio.Event()

    def order(self) -> list[Edit]:
        """The waiting edits as they will be painted if nothing more comes."""
        waiting, turns, order = {owner: list(edits) for owner, edits in self._waiting.items()}, dict(self._turns), []
        while waiting:
            owner = min(waiting, key=lambda owner: turns.get(owner, 0))
            order.append(waiting[owner].pop(0))
            turns[owner] = self._turn + len(order)
            if not waiting[owner]:
                del waiting[owner]
        return order

    def seconds_left(self, edit: Edit) -> float | None:
        """Until an edit is done, by its own pace or that of its model; null where nothing is known yet."""
        if edit is self.painting:
            own = edit.seconds_left()
            return self._guess(edit) if own is None else own
        if edit.state != "waiting":
            return None
        order = self.order()
        before = [self._guess(each) for each in order[: order.index(edit) + 1]]
        parts = [*before, *([self.seconds_left(self.painting)] if self.painting else [])]
        known = [part for part in parts if part is not None]
        return round(sum(known), 1) if len(known) == len(parts) else None

    def _guess(self, edit: Edit) -> float | None:
        pace = self._pace.get(edit.choice.source)
        return pace and round(pace * edit.passes * edit.how["steps"] * len(edit.how["seeds"]), 1)

    def check_room(self, session: Session) -> None:
        """Refuse one more edit where too many wait.

        Raises:
            RefusedError: says whose are too many.
        """
        if len(self._waiting.get(session.id, ())) >= MOST_OF_SESSION:
            raise RefusedError(429, f"{MOST_OF_SESSION} edits of yours are waiting already; wait for one, or cancel one")
        if len(self.order()) >= MOST_WAITING:
            raise RefusedError(429, f"{MOST_WAITING} edits are waiting already; try again in a few minutes")

    def add(self, edit: Edit) -> None:
        """Let an edit wait for its turn."""
        self._waiting.setdefault(edit.owner, deque()).append(edit)
        self._more.set()
        self._tell_places()

    def cancel(self, edit: Edit) -> None:
        """End an edit that waits, at once, or that is painted, at its next step."""
        if edit is self.painting:
            edit.unwanted = True
            self.painter.tell({"do": "cancel", "edit": edit.id})
        elif edit.state == "waiting":
            self._remove(edit)
            edit.hear({"is": "cancelled"})
            self._end(edit)
            self._tell_places()

    def watch(self, edit: Edit, more: int) -> None:
        """Somebody begins (1) or ends (-1) to look on: previews are made only for those who do."""
        edit.listeners += more
        if edit is self.painting and (edit.listeners, more) in ((1, 1), (0, -1)):
            self.painter.tell({"do": "watch", "edit": edit.id, "on": more > 0})

    async def run(self) -> None:
        """Paint one edit after the other, for ever."""
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            edit = self._next()
            try:
                await self._paint(edit)
            except Exception as error:  # The next edit must not wait for ever.
                _log.exception("painting")
                await self.painter.stop()
                edit.hear(
                    {"is": "failed", "error": f"a defect of this program ({type(error).__name__}); the server's log says more"}
                )
            self.painting = None
            self._end(edit)

    async def _paint(self, edit: Edit) -> None:
        self.painting, edit.state = edit, "painting"
        self._tell_places()
        edit.tell()
        job = {"edit": edit.id, "folder": str(edit.folder), "source": edit.choice.source, "photo": edit.photo, "mask": edit.mask}
        await self.painter.paint(job | edit.how | {"references": edit.references}, self._hear(edit))

    def _hear(self, edit: Edit) -> Callable[[Message], None]:
        def hear(message: Message) -> None:
            if message["is"] == "loading":  # Of what was wanted before, a process that has just been started knows nothing.
                if edit.listeners:
                    self.painter.tell({"do": "watch", "edit": edit.id, "on": True})
                if edit.unwanted:
                    self.painter.tell({"do": "cancel", "edit": edit.id})
            edit.hear(message)

        return hear

    def _next(self) -> Edit:
        edit = self.order()[0]
        self._remove(edit)
        self._turn += 1
        self._turns[edit.owner] = self._turn
        self._turns.move_to_end(edit.owner)
        while len(self._turns) > MOST_SESSIONS:
            self._turns.popitem(last=False)
        return edit

    def _remove(self, edit: Edit) -> None:
        self._waiting[edit.owner].remove(edit)
        if not self._waiting[edit.owner]:
            del self._waiting[edit.owner]

    def _end(self, edit: Edit) -> None:
        edit.release()
        if edit.began is not None and edit.steps_since:
            pace = (edit.heard - edit.began) / edit.steps_since / edit.passes
            self._pace[edit.choice.source] = pace
        try:
            self.finished(edit)
        except OSError:  # Nobody's edit must wait for ever for what becomes of the files of this one.
            _log.exception("after an edit")

    def _tell_places(self) -> None:
        if self.painting:
            self.painting.place = 0
        for place, edit in enumerate(self.order(), start=1 if self.painting else 0):
            if edit.place != place:
                edit.place = place
                edit.tell()
