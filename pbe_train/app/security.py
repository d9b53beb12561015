"""Who may ask for what: names of hosts, origins of requests, headers of every answer.

    request ──▶ its Host is ours? ──▶ changes something? then its Origin is that Host, and X-PBE is there ──▶ handler ──▶ headers

A page of another site can send requests to a server on this machine, and with a DNS name that it points here even read answers
(DNS rebinding). Both fail here: the first lacks the Origin, the second has another Host.
"""

import ipaddress
import logging
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from pbe_core.errors import InputError, machine_error

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer, whatever it is."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """What a request asks for is not done. The message is one sentence for the person who asked.

    Args:
        status: of HTTP.
        message: what, where, and the way out.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Hosts:
    """The names under which a server may be asked. The port does not matter: it differs behind a tunnel or a container's.

    Args:
        host: the address that it listens at.
        allowed: further names, of a reverse proxy.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        self.proxied = {name.lower().strip("[]") for name in allowed}
        self.names = {*_LOOPBACK, host.lower(), *self.proxied}
        # A name that somebody points here by DNS is never a bare address, nor the name that this machine has for itself.
        self.addresses = not is_loopback(host)
        if self.addresses:
            self.names.add(socket.gethostname().lower())

    def know(self, host: str) -> bool:
        """Whether a request with this `Host` is meant for us."""
        name = _split(f"//{host}")[0]
        return name in self.names or (self.addresses and _is_address(name))

    def sent_by_own_page(self, origin: str, host: str) -> bool:
        """Whether a request comes from a page of this very server, by its `Origin` and `Host`."""
        scheme = urlsplit(origin).scheme if "://" in origin else ""
        name, port = _split(origin)
        own_name, own_port = _split(f"//{host}")
        # A proxy may speak https to the browser and http to us.
        if scheme != "http" and not (scheme == "https" and own_name in self.proxied):
            return False
        default = _DEFAULT_PORTS[scheme]
        return name == own_name and (port or default) == (own_port or default)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware that lets pass what this server's own pages ask for."""
        host = request.headers.get("Host", "")
        if not self.know(host):
            raise RefusedError(421, f"this server is not called {host[:100]!r}; start it with --allowed-host NAME if it is")
        if request.method not in ("GET", "HEAD"):
            if not self.sent_by_own_page(request.headers.get("Origin", ""), host):
                raise RefusedError(403, "a page of another site sent this request (Origin); open this server's own page")
            if request.headers.get("X-PBE") != "1":
                raise RefusedError(403, "the header X-PBE: 1 is missing; requests that change something need it")
        return await handler(request)


def _split(url: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """A signal of aiohttp: before an answer is sent."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["Server"] = "pbe"


@web.middleware
async def answer_in_words(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is one sentence as JSON; what is nobody's fault but ours goes to the log with its traceback."""
    try:
        return await handler(request)
    except RefusedError as error:
        return sentence(error.status, str(error))
    except InputError as error:
        return sentence(400, str(error))
    except web.HTTPRequestEntityTooLarge:
        return sentence(413, "the request is longer than any of its kind; send less")
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return sentence(
            error.status, f"{request.method} {request.path[:200]}: {error.reason.lower()}; docs/app.md lists what there is"
        )
    except ConnectionError:
        raise
    except MemoryError:
        return sentence(503, "this machine has no memory left for that; try a smaller photo, or again in a minute")
    except Exception as error:
        if isinstance(error, OSError) and (said := machine_error(error)):
            return sentence(507, f"{said}; tell who runs this server")
        _log.exception("%s %s", request.method, request.path)
        return sentence(500, "something is wrong in this server; its log says what: please report that")


def sentence(status: int, message: str) -> web.Response:
    """An answer that says why not."""
    return web.json_response({"error": message}, status=status)
