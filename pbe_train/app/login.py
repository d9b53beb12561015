"""The password, where a server has one: asked for on a page of its own, compared in constant time, wrong few times a minute."""

import hashlib
import hmac
import ipaddress
import os
import time
from collections import OrderedDict, deque
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from pbe_core.errors import InputError
from pbe_train.app.security import RefusedError, is_loopback
from pbe_train.app.sessions import Session, Sessions
from pbe_train.app.uploads import read_json

VARIABLE = "PBE_APP_PASSWORD"
SHORTEST = 8
ATTEMPTS = 10
"""Wrong passwords of one address in a minute; of all addresses ten times as many."""
MINUTE = 60.0
_ADDRESSES = 1000
OPEN_PATHS = ("/login", "/api/login")
"""What one may ask for without the password, beside the files of /static."""


def read_password(file: Path | None, host: str) -> str | None:
    """The password of a server; null for one that only this machine reaches and that was given none.

    Raises:
        InputError: it cannot be read, is too short, or is lacking where other machines reach the server.
    """
    if file:
        try:
            password = file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--password-file {file}: cannot be read ({error}); give a file with the password in it") from None
    else:
        password = os.environ.get(VARIABLE, "")
    where = f"--password-file {file}" if file else VARIABLE
    if not password and not file:
        if is_loopback(host):
            return None
        raise InputError(
            f"--host {host}: other machines reach this address, so a password is needed; give --password-file FILE, or "
            f"set {VARIABLE}"
        )
    if len(password) < SHORTEST:
        raise InputError(f"{where}: the password has {len(password)} characters; give {SHORTEST} or more")
    return password


class Login:
    """Lets in who knows the password.

    Args:
        password: null where there is none.
        sessions: of all browsers.
        cookie: the name of the one that says which session a request is of.
    """

    def __init__(self, password: str | None, sessions: Sessions, cookie: str) -> None:
        self.password, self.sessions, self.cookie = password, sessions, cookie
        self.wrong: OrderedDict[str, deque[float]] = OrderedDict()
        self.all_wrong: deque[float] = deque(maxlen=10 * ATTEMPTS)

    def needed(self, request: web.Request, session: Session | None) -> bool:
        """Whether a request must wait until somebody has given the password."""
        return self.password is not None and not _is_open(request) and not (session and session.logged_in)

    async def post(self, request: web.Request) -> web.Response:
        """`POST /api/login {"password"}`: a new session, so that one that somebody else has set is worth nothing."""
        if self.password is None:
            raise RefusedError(404, "this server has no password; open its first page")
        address = network_of(request.remote or "")
        told = await read_json(request)
        self._check_pace(address)  # Not before: many that are on their way at once would all pass.
        given = told.get("password") if isinstance(told, dict) else None
        if not isinstance(given, str) or not hmac.compare_digest(_hash(given), _hash(self.password)):
            self._note_wrong(address)
            raise RefusedError(403, "that is not the password; ask who runs this server")
        session = self.sessions.new()
        session.logged_in = True
        request["new_session"] = session
        return web.json_response({})

    @web.middleware
    async def let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware that finds a request's session, makes one where there is none, and keeps out who must log in first."""
        session = self.sessions.find(request.cookies.get(self.cookie))
        if self.needed(request, session):
            if request.method == "GET" and not request.path.startswith("/api/"):
                raise web.HTTPSeeOther("/login")
            raise RefusedError(401, "the password is needed; open /login")
        # No page of another site, nor of another port of this machine, has a business with the API.
        elsewhere = request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        if elsewhere and request.path.startswith("/api/"):
            raise RefusedError(403, "a page of another site sent this request; open this server's own page")
        # After a click on another site the browser keeps our cookie back: a new one would take the place of the old one.
        if session is None and not _is_open(request) and not elsewhere:
            session = request["new_session"] = self.sessions.new()
        request["session"] = session
        response = await handler(request)
        if new := request.get("new_session"):
            secure = request.headers.get("X-Forwarded-Proto") == "https"
            response.set_cookie(self.cookie, new.id, httponly=True, samesite="Strict", secure=secure, path="/")
        return response

    def _check_pace(self, address: str) -> None:
        limit = time.monotonic() - MINUTE
        mine = self.wrong.get(address, deque())
        if any(len(each) == each.maxlen and each[0] > limit for each in (mine, self.all_wrong)):
            raise RefusedError(429, "too many wrong passwords; wait a minute")

    def _note_wrong(self, address: str) -> None:
        now = time.monotonic()
        self.wrong.setdefault(address, deque(maxlen=ATTEMPTS)).append(now)
        self.wrong.move_to_end(address)
        self.all_wrong.append(now)
        while len(self.wrong) > _ADDRESSES:
            self.wrong.popitem(last=False)


def network_of(address: str) -> str:
    """Who wrong passwords are counted for: an address, or of IPv6 the /64 that one machine may choose its addresses in."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv4Address):
        return address
    return str(known.ipv4_mapped or ipaddress.ip_network((int(known), 64), strict=False))


def _is_open(request: web.Request) -> bool:
    return request.path in OPEN_PATHS or request.path.startswith("/static/")


def _hash(password: str) -> bytes:
    """Of one length, whatever the password's is."""
    return hashlib.sha256(password.encode(errors="replace")).digest()
