"""One server: pages, the edit API, the dataset API, and what runs beside them.

request ──▶ errors in words ──▶ Host, Origin ──▶ session, password ──▶ page, static file, or API
"""

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pbe_train.app.dataset_routes import Viewer, ViewerOptions, dataset_routes
from pbe_train.app.edit_routes import EditRoutes
from pbe_train.app.login import Login
from pbe_train.app.models import Choice
from pbe_train.app.painter import Painter
from pbe_train.app.security import Hosts, RefusedError, add_headers, answer_in_words
from pbe_train.app.sessions import Room, Sessions

STATIC = Path(__file__).parent / "static"
EXAMPLE = REPOSITORY / "tiny_world" / "example"
STYLE = Path(str(files("pbe_core.pages"))) / "style.css"
PAGES = {"/": "edit.html", "/dataset": "dataset.html", "/login": "login.html"}
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
BODY_BYTES = 256 << 10
"""Of requests that carry no file."""
EXPIRY_SECONDS = 60.0
_ROOM = Room()


@dataclass(frozen=True)
class Options:
    """What a server is started with."""

    choices: Sequence[Choice]
    folder: Path
    """For files, private."""
    viewer: ViewerOptions = field(default_factory=ViewerOptions)
    host: str = "127.0.0.1"
    port: int = 7860
    allowed_hosts: Sequence[str] = ()
    password: str | None = None
    painting: dict[str, Any] = field(default_factory=lambda: {"device": None, "offload": False, "threads": None})
    room: Room = _ROOM


def make_app(options: Options, painter: Painter) -> web.Application:
    """The application; its painting process is started, and ends with it."""
    sessions = Sessions(options.folder, options.room)
    viewer = Viewer(options.viewer)
    # Cookies do not know of ports: two servers on one machine must not take each other's, nor two of one port on two machines
    # that tunnels bring to this one.
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    login = Login(options.password, sessions, f"pbe_{options.port}_{machine}")
    hosts = Hosts(options.host, options.allowed_hosts)
    names = [each.rstrip("/").rsplit("/", 1)[-1] for each in options.viewer.datasets]
    edits = EditRoutes(list(options.choices), painter, sessions, names, remote=bool(options.password or options.allowed_hosts))
    app = web.Application(middlewares=[answer_in_words, hosts.check, login.let_in], client_max_size=BODY_BYTES)
    app.on_response_prepare.append(add_headers)
    served = static_files()
    app.add_routes([web.get(path, page(served[name])) for path, name in PAGES.items()])
    app.add_routes([web.get("/static/{name:.+}", static(served)), web.post("/api/login", login.post)])
    app.add_routes([*edits.routes(), *dataset_routes(viewer)])

    async def beside(_: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(edits.queue.run()), asyncio.create_task(expire(sessions))]
        yield
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await painter.stop()

    async def end_events(_: web.Application) -> None:
        edits.ending.set()

    app.cleanup_ctx.append(beside)
    app.on_shutdown.append(end_events)
    app.on_cleanup.append(viewer.close)
    return app


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether something of aiohttp's log is to be seen: anybody can send what is no HTTP, which is no fault of ours."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


async def make_runner(options: Options, painter: Painter, listening: socket.socket) -> web.AppRunner:
    """The application at work on a socket; `cleanup` of what is returned ends it.

    A handler whose browser has gone ends at once, so that nothing is painted as a preview for nobody.
    """
    server_logger.addFilter(is_worth_a_line)
    runner = web.AppRunner(make_app(options, painter), access_log=None, shutdown_timeout=2.0, handler_cancellation=True)
    await runner.setup()
    await web.SockSite(runner, listening).start()
    return runner


async def start_or_end(painter: Painter, over: asyncio.Event) -> bool:
    """Start the painting process, unless the server is told to end before that; returns whether it did.

    Raises:
        InputError: it does not start.
    """
    starting, ending = asyncio.create_task(painter.start()), asyncio.create_task(over.wait())
    await asyncio.wait((starting, ending), return_when="FIRST_COMPLETED")
    ending.cancel()
    if not starting.done():
        await painter.stop()
        with contextlib.suppress(InputError, RefusedError):
            await starting
        return False
    try:
        starting.result()
    except RefusedError as error:
        raise InputError(str(error)) from None
    return True


def static_files() -> dict[str, Path]:
    """Name -> file of all that may be had from /static: nothing else is ever looked for."""
    own = {path.name: path for path in STATIC.iterdir() if path.suffix in KINDS}
    example = {f"example/{path.name}": path for path in EXAMPLE.glob("*.png")}
    return own | example | {"style.css": STYLE}


def page(path: Path) -> Any:
    """A handler that gives a page."""

    async def get(_: web.Request) -> web.StreamResponse:
        return web.FileResponse(path, headers={"Content-Type": "text/html; charset=utf-8"})

    return get


def static(served: dict[str, Path]) -> Any:
    """A handler that gives a file of those that are served, asked anew by the browser each time whether it has changed."""

    async def get(request: web.Request) -> web.StreamResponse:
        path = served.get(request.match_info["name"])
        if not path:
            raise RefusedError(404, f"no file {request.match_info['name'][:80]!r} here")
        kind = KINDS[path.suffix]
        charset = "; charset=utf-8" if kind.startswith("text/") else ""
        return web.FileResponse(path, headers={"Content-Type": kind + charset, "Cache-Control": "no-cache"})

    return get


async def expire(sessions: Sessions) -> None:
    """Forget old sessions, for ever."""
    while True:
        await asyncio.sleep(EXPIRY_SECONDS)
        sessions.expire()
