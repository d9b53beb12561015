"""Who is who, and what each has here: photos, masks and edits, as files in a temporary folder, bounded in bytes.

    cookie ──▶ session ──▶ items, oldest first ──make room──▶ the oldest go
                 └── not seen for hours: goes as a whole

An item is one folder. Nothing of it but a few numbers is in memory.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pbe_core.errors import InputError
from pbe_core.files import sweep, temporary_folder
from pbe_train.app.security import RefusedError

NAME = "pbe-app"
SESSION_SECONDS = 12 * 3600
"""A session that nobody has asked for anything for so long is forgotten."""
MOST_SESSIONS = 1000
_FORGOTTEN = 1000
_SHARE_OF_DISK = 0.25


@dataclass(frozen=True)
class Room:
    """How much may be kept, in bytes and in items."""

    session_bytes: int = 1 << 30
    all_bytes: int = 8 << 30
    session_items: int = 500


@dataclass
class Item:
    """Something that a session has here."""

    id: str
    folder: Path
    name: str = ""
    """As shown, never a path."""
    bytes: int = 0
    users: int = 0
    """Who reads or makes it: it stays whatever is needed."""
    made: float = field(default_factory=time.monotonic)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this block it stays."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1


Kind = TypeVar("Kind", bound=Item)


@dataclass
class Session:
    """One browser."""

    id: str
    folder: Path
    seen: float
    logged_in: bool = False
    items: dict[str, Item] = field(default_factory=dict)
    gone: deque[str] = field(default_factory=lambda: deque(maxlen=_FORGOTTEN))
    """Ids of what was here."""
    bytes: int = 0
    """Of all its items."""
    uploads: int = 0
    """On their way."""
    listeners: int = 0
    """Open streams of events."""

    @property
    def busy(self) -> bool:
        """Whether something of it is in use."""
        return any(item.users for item in self.items.values())

    def find(self, kind: type[Kind], id: str, what: str) -> Kind:
        """An item of this session.

        Raises:
            RefusedError: there is none of this kind and id; says whether there was one.
        """
        item = self.items.get(id)
        if isinstance(item, kind):
            return item
        if id in self.gone:
            raise RefusedError(410, f"this {what} is not kept any more (the oldest make room for new ones); give it again")
        raise RefusedError(404, f"no such {what} in this session; give it again")


class Sessions:
    """All sessions of a server.

    Args:
        folder: where their files are, private to this user.
        room: how much may be kept.
    """

    def __init__(self, folder: Path, room: Room = Room()) -> None:
        free = shutil.disk_usage(folder).free
        self.folder = folder
        self.room = Room(room.session_bytes, min(room.all_bytes, int(free * _SHARE_OF_DISK)), room.session_items)
        self.all: dict[str, Session] = {}
        self.bytes = 0

    def new(self) -> Session:
        """A session with nothing in it; where there are too many, the one goes that was not seen for longest."""
        while len(self.all) >= MOST_SESSIONS:
            idle = [each for each in self.all.values() if not each.busy]
            if not idle:
                raise RefusedError(429, "too many people are here; come back later")
            self.forget(min(idle, key=lambda each: (bool(each.items), each.seen)))
        session = Session(secrets.token_urlsafe(32), self.folder / secrets.token_hex(16), time.monotonic())
        self.all[session.id] = session
        return session

    def find(self, id: str | None) -> Session | None:
        """The session of a cookie; null where there is none, or none any more."""
        session = self.all.get(id) if id else None
        if session:
            session.seen = time.monotonic()
        return session

    def add(self, session: Session, kind: type[Kind]) -> Kind:
        """A new item with an empty folder, in use until its maker says otherwise."""
        self.make_room(session, 0, items=1)
        id = secrets.token_hex(12)
        item = kind(id, session.folder / id, users=1)
        item.folder.mkdir(parents=True, mode=0o700)
        session.items[id] = item
        return item

    def resize(self, session: Session, item: Item, size: int) -> None:
        """Note how many bytes an item has; where it grows, `make_room` comes first."""
        if session.items.get(item.id) is item:
            session.bytes += size - item.bytes
            self.bytes += size - item.bytes
            item.bytes = size

    def make_room(self, session: Session, more: int, items: int = 0) -> None:
        """Let the oldest go until so many bytes and items more fit: of this session, and then of all.

        Raises:
            RefusedError: what is left is in use.
        """
        while session.bytes + more > self.room.session_bytes or len(session.items) + items > self.room.session_items:
            self._drop_oldest([session])
        while self.bytes + more > self.room.all_bytes:
            self._drop_oldest(list(self.all.values()))

    def _drop_oldest(self, sessions: list[Session]) -> None:
        idle = [(item.made, item.id, each) for each in sessions for item in each.items.values() if not item.users]
        if not idle:
            raise RefusedError(
                429, "no room is left beside what is being painted or uploaded; wait for that, or delete something"
            )
        _, id, session = min(idle, key=lambda each: each[:2])
        self.drop(session, session.items[id])

    def drop(self, session: Session, item: Item) -> None:
        """Forget an item and remove its files."""
        self.resize(session, item, 0)
        if session.items.pop(item.id, None):
            session.gone.append(item.id)
        shutil.rmtree(item.folder, ignore_errors=True)

    def forget(self, session: Session) -> None:
        """Forget a session with all it has."""
        self.all.pop(session.id, None)
        self.bytes -= session.bytes
        session.bytes = 0
        session.items.clear()
        shutil.rmtree(session.folder, ignore_errors=True)

    def expire(self) -> None:
        """Forget the sessions that nobody has asked for anything for hours, unless something of theirs is in use."""
        limit = time.monotonic() - SESSION_SECONDS
        for session in list(self.all.values()):
            if session.seen < limit and not session.busy and not session.listeners:
                self.forget(session)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can read, for as long as the block runs; those that dead servers left are removed first.

    Raises:
        InputError: the folder for temporary files is not to be had, or somebody else's.
    """
    parent = Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            parent.mkdir(mode=0o700)
        facts = parent.lstat()
        if parent.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise InputError(f"{parent}: others can read or write there; remove it, or set TMPDIR to a folder of your own")
    except OSError as error:
        raise InputError(f"{parent}: cannot be made ({error.strerror}); set TMPDIR to a folder of your own") from None
    sweep(parent, NAME)
    with temporary_folder(parent, NAME) as folder:
        yield folder
