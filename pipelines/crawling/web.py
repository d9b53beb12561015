"""One GET of a URL that nobody vouches for.

    URL ─▶ scheme, host ─▶ limits of this host ─▶ connection ─▶ status, headers ─▶ body ─▶ Fetched
             ▲                                              addresses.py        │
             └──────────────────────── redirect ────────────────────────────────┘

Whatever the other side does ends in a `Fetched` or a `FetchError`, within `crawl.total_seconds`, with no more than a few times
`crawl.max_bytes` of memory. What a redirect points at passes every check again.
"""

import asyncio
import email.utils
import importlib.metadata
import ipaddress
import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType

import aiohttp
from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from yarl import URL

from pbe_core.images.kinds import ACCEPTED
from pbe_core.words import number_of
from pipelines.config import CrawlSettings
from pipelines.crawling.addresses import AddressRefused, AddressRules, CheckedResolver, GetAddrInfo
from pipelines.crawling.answers import Fetched, FetchError, code_of_status
from pipelines.crawling.hosts import HostLimits

ROBOT = "paint-by-example"
"""What we call ourselves in User-Agent, and what an X-Robots-Tag may call us."""

_REDIRECTS = (301, 302, 303, 307, 308)
# Of pages and these the body would come for nothing. Of all else the bytes say what it is: servers are often wrong about photos.
_PAGES = ("text/html", "application/xhtml+xml")
_NO_PHOTO = re.compile("video/.*|application/pdf")
# By this a server chooses that has a photo in several formats.
_ACCEPT = ",".join([*(kind.media_type for kind in ACCEPTED), "image/*;q=0.5"])
# Directives of X-Robots-Tag that have a value; before any other colon stands a robot's name.
# https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_HOST_NAME = re.compile(r"(?=.{1,254}$)([a-zA-Z0-9_-]{1,63}\.)*[a-zA-Z0-9_-]{1,63}\.?")
# Below the 5 s of Apache and Node, so that a connection is not used just when the server closes it; and few enough are open.
_IDLE_SECONDS = 4
_DNS_CACHE_SECONDS = 60
CONNECT_SECONDS = 10.0
"""Until a connection stands, encryption included."""
SLOW_SECONDS = 10.0
"""For so long an answer may be slower than crawl.slow_bytes_per_second."""
MOST_REDIRECTS = 5


class WebClient:
    """One GET at a time per call, with every guard; holds the connection pool of a process. An async context manager."""

    def __init__(self, settings: CrawlSettings, limits: HostLimits, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        """Nothing is opened yet.

        Raises:
            InputError: if `crawl.allowed_addresses` cannot be read.
        """
        self._settings = settings
        self._limits = limits
        self._rules = AddressRules(settings.allowed_addresses)
        self._getaddrinfo = getaddrinfo

    async def __aenter__(self) -> "WebClient":
        settings = self._settings
        self._resolver = CheckedResolver(self._rules, settings.connections, self._getaddrinfo)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            socket_factory=self._rules.checked_socket,
            ttl_dns_cache=_DNS_CACHE_SECONDS,
            keepalive_timeout=_IDLE_SECONDS,
            limit=0,  # `HostLimits` bounds them.
        )
        contact = f" (+{settings.contact})" if settings.contact else ""
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_connect=None),
            headers={
                "User-Agent": f"{ROBOT}/{importlib.metadata.version('paint-by-example')}{contact}",
                "Accept": _ACCEPT,
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=(self._once,),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()
        await self._resolver.close()

    async def fetch(
        self, url: str, *, expected_bytes: int | None = None, etag: str | None = None, last_modified: str | None = None
    ) -> Fetched:
        """Ask once, and go where redirects lead.

        An answer without a single byte is `not_an_image`. An opt-out counts where the photo is (200 or 304), not on redirects.

        Args:
            url: Asked for as it stands, but for a user, password and fragment, which are not sent.
            expected_bytes: Any other size is `size_mismatch`, before the body is read where the server announces it.
            etag: Of what we have; the answer may then be `not_modified`.
            last_modified: The same by date.

        Raises:
            FetchError: whatever goes wrong.
        """
        conditions = {"If-None-Match": etag, "If-Modified-Since": last_modified}
        headers = {name: value for name, value in conditions.items() if value}
        hop, seen = _as_url(url), set[URL]()
        seconds = self._settings.total_seconds
        clock = asyncio.get_running_loop().time
        while hop not in seen:
            if len(seen) > MOST_REDIRECTS:
                raise FetchError("redirect_loop", f"more than {MOST_REDIRECTS} redirects")
            seen.add(hop)
            # Waiting for the limits is our own politeness, not the server's slowness: it is not counted.
            async with self._limits.request(f"{hop.host_subcomponent}:{hop.port}"):
                started = clock()
                answer = await self._ask(hop, headers, expected_bytes, seconds)
                seconds -= clock() - started
            if isinstance(answer, Fetched):
                return answer
            hop = answer
        raise FetchError("redirect_loop", f"redirects come back to {_shown(str(hop))}")

    async def _once(self, request: ClientRequest, ask: ClientHandlerType) -> ClientResponse:
        """A middleware that names failures before aiohttp sees them: it would ask again at once, and past the limits of hosts."""
        try:
            return await ask(request)
        except (aiohttp.ClientError, OSError) as error:
            raise _no_answer(error, request.url) from error

    async def _ask(self, url: URL, conditions: dict[str, str], expected_bytes: int | None, seconds: float) -> Fetched | URL:
        """One request: what came, or where else to ask."""
        try:
            async with asyncio.timeout(seconds), self._session.get(url, headers=conditions, allow_redirects=False) as response:
                return await self._take(response, url, conditions, expected_bytes)
        except TimeoutError as error:
            limit = f"{self._settings.total_seconds:g} s (crawl.total_seconds)"
            raise FetchError("timeout", f"no complete answer from {url.host} within {limit}") from error
        except FetchError:
            raise
        except Exception as error:
            raise FetchError("unexpected", f"{type(error).__name__}: {_shown(str(error))}") from error

    async def _take(
        self, response: ClientResponse, url: URL, conditions: dict[str, str], expected_bytes: int | None
    ) -> Fetched | URL:
        """What an answer that has begun amounts to. Its body is read only where it may be the photo."""
        status, sent = response.status, response.headers
        if status in _REDIRECTS:
            return _redirected(response, url)
        if status != 200 and not (status == 304 and conditions):
            retry_after = _seconds_until(sent.get("Retry-After")) if status in (429, 503) else None
            detail = f"HTTP {status} {_shown(response.reason or '')}"
            raise FetchError(code_of_status(status), detail, http_status=status, retry_after=retry_after)
        if words := _opt_outs(sent.getall("X-Robots-Tag", [])) & {word.casefold() for word in self._settings.opt_out}:
            raise FetchError("opted_out", f"X-Robots-Tag: {', '.join(sorted(words))}", http_status=status)
        if self._settings.opt_out and sent.get("tdm-reservation", "").strip() == "1":
            # https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240202/
            raise FetchError("opted_out", "tdm-reservation: 1", http_status=status)
        etag, last_modified = _plain(sent.get("ETag")), _plain(sent.get("Last-Modified"))
        if status == 304:
            etag, last_modified = etag or conditions.get("If-None-Match"), last_modified or conditions.get("If-Modified-Since")
            return Fetched(b"", str(url), status, etag, last_modified, not_modified=True)
        try:
            return Fetched(await self._photo(response, expected_bytes), str(url), status, etag, last_modified)
        except FetchError as error:
            error.http_status = status
            raise

    async def _photo(self, response: ClientResponse, expected_bytes: int | None) -> bytes:
        """The body, unpacked by aiohttp a piece at a time; given up as soon as it is known to be no use."""
        if response.content_type in _PAGES:
            raise FetchError("not_an_image", f"a page: {response.content_type}")
        if _NO_PHOTO.fullmatch(response.content_type):
            raise FetchError("unsupported_format", f"the server calls it {response.content_type}")
        if announced := response.content_length:
            self._check_size(announced)
            if expected_bytes not in (None, announced) and "Content-Encoding" not in response.headers:
                raise FetchError("size_mismatch", f"{number_of(announced, 'byte')} announced, {expected_bytes} expected")
        photo = await self._read(response)
        if not photo:
            raise FetchError("not_an_image", "an empty answer")
        if expected_bytes not in (None, len(photo)):
            raise FetchError("size_mismatch", f"{number_of(len(photo), 'byte')}, {expected_bytes} expected")
        return photo

    async def _read(self, response: ClientResponse) -> bytes:
        """All of the body, while it comes fast enough and is not too large."""
        photo = bytearray()
        window = self._settings.slow_bytes_per_second * SLOW_SECONDS
        try:
            while not response.content.at_eof():
                # Windows follow each other; one ends early when its bytes are here. What becomes too slow is given up after two.
                before = len(photo)
                async with asyncio.timeout(SLOW_SECONDS):
                    while len(photo) < before + window and (chunk := await response.content.readany()):
                        photo += chunk
                        self._check_size(len(photo))
        except TimeoutError as error:
            pace = f"{number_of(len(photo) - before, 'byte')} within {SLOW_SECONDS:g} s (crawl.slow_bytes_per_second)"
            raise FetchError("too_slow", f"only {pace} after {number_of(len(photo), 'byte')}") from error
        except aiohttp.ClientResponseError as error:
            raise FetchError("bad_response", _shown(error.message)) from error
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # RuntimeError is what aiohttp's stream says when its connection was closed for a chunk that is none.
            raise FetchError("incomplete", f"cut off after {number_of(len(photo), 'byte')}: {_shown(str(error))}") from error
        return bytes(photo)

    def _check_size(self, size: int) -> None:
        limit = self._settings.max_bytes
        if size > limit:
            raise FetchError("too_large", f"{number_of(size, 'byte')} or more, {limit:,} allowed (crawl.max_bytes)")


def _as_url(text: str, base: URL | None = None) -> URL:
    """The URL that `text` means, seen from `base`, without what is not sent: user, password, fragment.

    Raises:
        FetchError: bad_url or blocked_scheme.
    """
    try:
        # What is plain ASCII is left as it is: quoting anew breaks signed URLs.
        url = URL(text, encoded=re.fullmatch("[!-~]+", text) is not None)
        url = base.join(url) if base else url
        if not url.scheme:
            raise ValueError("no scheme")
        if url.scheme in ("http", "https"):
            return url.with_user(None).with_host(_as_host(url.raw_host or "")).with_fragment(None)
    except Exception as error:
        # Not ValueError alone: yarl stumbles over http://[]@ with an IndexError, and who knows over what else.
        raise FetchError("bad_url", f"{_shown(text)}: {_shown(str(error))}") from error
    raise FetchError("blocked_scheme", f"{_shown(text)} is neither http nor https")


def _as_host(host: str) -> str:
    """A host as it is looked up. Raises ValueError for what is neither an address nor a name."""
    try:
        # All ways to write an IPv4 address (2130706433, 0x7f.1, 0177.0.0.1) are that address: https://url.spec.whatwg.org/#concept-ipv4-parser
        return socket.inet_ntoa(socket.inet_aton(host.rstrip(".")))
    except OSError:
        pass
    if ":" in host:
        return str(ipaddress.ip_address(host))
    if not _HOST_NAME.fullmatch(host):
        raise ValueError("no host name")
    return host


def _redirected(response: ClientResponse, base: URL) -> URL:
    """Where a redirect leads. Raises FetchError: blocked_scheme, or bad_response where it leads nowhere."""
    location = response.headers.get("Location")
    if not location:
        raise FetchError("bad_response", f"HTTP {response.status} without a Location", http_status=response.status)
    try:
        # aiohttp keeps bytes that are no UTF-8 as surrogates; in a URL they are percent-encoded.
        return _as_url(re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", location), base)
    except FetchError as error:
        code = "bad_response" if error.code == "bad_url" else error.code
        raise FetchError(code, f"redirected to {error.detail}", http_status=response.status) from error


def _no_answer(error: Exception, url: URL) -> FetchError:
    """What to call it when no answer began."""
    message = f"{url.host}: {_shown(str(error))}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FetchError("timeout", f"no connection to {url.host} within {CONNECT_SECONDS:g} s")
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, AddressRefused):
        return FetchError("blocked_address", f"{url.host}: {error.os_error}")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return FetchError("dns", message)
    if isinstance(error, aiohttp.ClientSSLError):
        return FetchError("tls", message)
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", message)
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("bad_response", f"{url.host}: {_shown(error.message)}")
    return FetchError("connect", message)


def _opt_outs(tags: Sequence[str]) -> set[str]:
    """What X-Robots-Tags ask of all robots, or of ours.

    Each is a list of directives, where `name:` says for which robot the rest of it is.
    https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag#xrobotstag
    """
    words = set()
    for tag in tags:
        robot = "*"
        for directive in tag.lower().split(","):
            name, colon, rest = directive.strip().partition(":")
            if colon and re.fullmatch("[a-z*][a-z0-9_./*-]*", name) and name not in _WITH_VALUE:
                robot, directive = name, rest
            if robot in ("*", ROBOT):
                words.add(directive.strip())
    return words | {"noindex", "nofollow"} if "none" in words else words


def _seconds_until(retry_after: str | None) -> float | None:
    """Retry-After as a number of seconds from now, where it is readable: seconds, or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    if re.fullmatch("[0-9]+", retry_after):
        return min(float(retry_after), 1e9)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _plain(value: str | None) -> str | None:
    """A header that may be kept and sent back; aiohttp gives bytes that are no UTF-8 as surrogates, which nothing can store."""
    return value if value and value.isascii() else None


def _shown(text: str) -> str:
    """What somebody else wrote, for our messages: one line of printable ASCII, at most 200 characters."""
    return ascii(text.partition("\n")[0])[1:-1][:200]
