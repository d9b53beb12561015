"""A web server that misbehaves, on real sockets of the loopback interface, and that keeps count of what it was asked.

    with HostileServer({"a.jpg": b"..."}) as server:
        server.url("/photos/a.jpg")           # served well, with keep-alive
        server.url("/reset-body/17.jpg")      # the first word says what happens; the rest is free: each photo can have its own
        server.hits["/photos/a.jpg"]          # how often this path was asked for
        server.most_at_once("/photos/")       # requests in flight at once, at most
        server.times("/photos/")              # when each began, in s of time.monotonic
        server.answers = 60                   # further requests wait until this is more, or their client hangs up

What each route does stands in the docstring of the method of its name, `-` being `_`, or in `fixed_answers`; all wait for
`?pause=<seconds>` first. Everything is made here, the same each time.

Nothing here harms a program without limits: each answer has an end, in bytes and in time, and is little more than tests allow.
They lower the limits of the crawl to `MAX_BYTES`, `MAX_PIXELS` and the like, and expect that what is beyond them is refused.
"""

import asyncio
import contextlib
import functools
import gzip
import io
import socket
import ssl
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

HTML = b"<!DOCTYPE html><html><body>This photo is no longer available.</body></html>"
MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"
ETAG = '"v1"'
MAX_BYTES = 100_000
"""What tests allow a photo (crawl.max_bytes), so that memory has a bound. Routes whose names begin with `large` send more."""
MAX_PIXELS = 1_000_000
"""What tests allow a photo (source.max_photo_pixels), so that decoding has one, too."""
PATIENCE_SECONDS = 60
"""After this an answer ends that waits for the client to hang up: long against the limits of tests, which must come first."""
MOST_REDIRECTS = 50
"""So often one path leads in a circle; then a photo comes."""
End = Literal["kept", "closed", "reset"]


@functools.cache
def good_photo(name: str = "photo", width: int = 96, height: int = 72) -> bytes:
    """A JPEG, another one for each name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit grey with a header that may lie, `pixels` as they are packed, and further chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    made = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@dataclass
class Request:
    """One request as the server saw it. Times in s of time.monotonic."""

    target: str
    """Path and query, as they came."""
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    times: int
    """How often this path was asked for, this time included."""
    began: float = field(default_factory=time.monotonic)
    ended: float = float("inf")
    sent: int = 0
    """Bytes of the answer that the client's side took, headers included."""

    @property
    def words(self) -> list[str]:
        return [unquote(word) for word in self.path.split("/")[1:]]

    def option(self, name: str, default: str) -> str:
        return self.query.get(name, [default])[0]


class Closed(Exception):
    """The answer ends by closing the connection."""


class Answer:
    """Writes an answer, and counts what the other side took of it."""

    def __init__(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request, self.reader, self.writer = request, reader, writer
        # So that drain() returns when the socket has taken everything, and `sent` is true but for the kernel's buffers.
        writer.transport.set_write_buffer_limits(0)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        self.request.sent += len(data)

    async def whole(self, body: bytes, *headers: str, **others: Any) -> None:
        """An answer as of `http`; the connection lives on."""
        await self.write(http(body, *headers, **others))

    async def redirect(self, location: str) -> None:
        await self.whole(b"", f"Location: {location}", "Set-Cookie: id=1; Path=/", status="302 Found", kind="text/html")

    async def end(self, how: End) -> None:
        """The connection is kept, closed, or closed with a TCP reset."""
        if how == "reset":
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        if how != "kept":
            raise Closed

    async def wait_for_the_end(self) -> None:
        """Until the client hangs up, or for `PATIENCE_SECONDS`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.reader.read(), PATIENCE_SECONDS)
        raise Closed

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until a condition holds; raises `Closed` where the client hangs up before."""
        end = asyncio.ensure_future(self.reader.read(1))
        try:
            while not condition():
                if (await asyncio.wait([end], timeout=0.01))[0]:
                    raise Closed
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)


class HostileServer:
    """See the module. `hits`, `requests` and `connections` may be read from any thread; one thread writes them."""

    def __init__(
        self, photos: Path | Mapping[str, bytes] | None = None, *, behaves: Mapping[str, str] | None = None, tls: bool = False
    ) -> None:
        """What to serve.

        Args:
            photos: A folder or bytes by name, served at /photos/<name>.
            behaves: Paths that do what others do: {"/photos/a.jpg": "/reset"}.
            tls: Speak TLS, with a certificate that nobody trusts.
        """
        self._photos = photos if photos is not None else {}
        self._behaves = dict(behaves or {})
        self._tls = tls
        self.hits: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.answers = float("inf")
        self.connections = 0
        self.port = 0

    def __enter__(self) -> "HostileServer":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="hostile-server", daemon=True)
        self._thread.start()
        assert ready.wait(600)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    def asked(self, prefix: str) -> list[Request]:
        """Requests for paths that begin so."""
        return [request for request in self.requests if request.path.startswith(prefix)]

    def times(self, prefix: str) -> list[float]:
        return sorted(request.began for request in self.asked(prefix))

    def most_at_once(self, prefix: str) -> int:
        """Requests in flight at once, at most: each from its arrival until its answer was written."""
        asked = self.asked(prefix)
        # An end and a beginning at the same moment do not overlap: -1 sorts before +1.
        changes = sorted([(request.began, 1) for request in asked] + [(request.ended, -1) for request in asked])
        return int(np.cumsum([0, *(change for _, change in changes)]).max())

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        context = untrusted_context() if self._tls else None
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                target = lines[0].split(" ")[1]
                path, query = urlsplit(target).path, parse_qs(urlsplit(target).query, errors="surrogateescape")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
                self.hits[path] += 1
                request = Request(target, path, query, headers, self.hits[path])
                self.requests.append(request)
                number, answer = len(self.requests), Answer(request, reader, writer)
                try:
                    if number > self.answers:
                        await answer.wait_until(lambda number=number: number <= self.answers)
                    await self._answer(request, answer)
                finally:
                    request.ended = time.monotonic()
        except (Closed, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        except asyncio.CancelledError:  # The server stops. Whoever cancels does not look.
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, request: Request, answer: Answer) -> None:
        behaviour = urlsplit(self._behaves.get(request.path, request.path))
        acted = replace(request, path=behaviour.path, query={**request.query, **parse_qs(behaviour.query)})
        await asyncio.sleep(float(acted.option("pause", "0")))
        if acted.words[0] in fixed_answers():
            _, data, end = fixed_answers()[acted.words[0]]
            await answer.write(data)
            await answer.end(end)
        elif asyncio.iscoroutinefunction(route := getattr(self, acted.words[0].replace("-", "_"), None)):
            await route(acted, answer)
        else:
            await answer.whole(b"no such route", status="404 Not Found", kind="text/plain")

    async def photos(self, request: Request, answer: Answer) -> None:
        """/photos/<name>: a photo of the folder or mapping, or 404."""
        name = "/".join(request.words[1:])
        if isinstance(self._photos, Path):
            path = self._photos / name
            data = path.read_bytes() if path.is_file() else None
        else:
            data = self._photos.get(name)
        if data is None:
            await answer.whole(b"no such photo", status="404 Not Found", kind="text/plain")
        else:
            await answer.whole(data)

    async def good(self, request: Request, answer: Answer) -> None:
        """/good/<any name>?width=96&height=72: a photo of its own for each path."""
        await answer.whole(good_photo(request.path, int(request.option("width", "96")), int(request.option("height", "72"))))

    # Time.

    async def slow_body(self, request: Request, answer: Answer) -> None:
        """?interval=0.05&step=1: a byte of the photo at a time, or some."""
        data, step = good_photo(), int(request.option("step", "1"))
        await answer.write(http(b"", length=len(data)))
        for at in range(0, len(data), step):
            await answer.write(data[at : at + step])
            await asyncio.sleep(float(request.option("interval", "0.05")))

    async def stalls(self, request: Request, answer: Answer) -> None:
        """?length=<as long as it is>: the first 1,000 bytes of a photo, and nothing more."""
        await answer.whole(good_photo()[:1000], length=int(request.option("length", str(len(good_photo())))))
        await answer.wait_for_the_end()

    async def slow_headers(self, request: Request, answer: Answer) -> None:
        """A hundred headers, one after the other, and then nothing."""
        await answer.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(100):
            await answer.write(b"X-Patience: more\r\n")
            await asyncio.sleep(0.05)
        await answer.wait_for_the_end()

    async def never(self, request: Request, answer: Answer) -> None:
        """No answer."""
        await answer.wait_for_the_end()

    # What the server says.

    async def status(self, request: Request, answer: Answer) -> None:
        """/status/<code>/<any name>?retry-after=7: that status, and a body where it may have one."""
        asks = [f"Retry-After: {value}" for value in request.query.get("retry-after", [])]
        code = request.words[1]
        empty = code in ("204", "304")
        await answer.whole(b"" if empty else b"no", *asks, status=f"{code} Whatever", length=None if empty else -1)

    async def busy(self, request: Request, answer: Answer) -> None:
        """/busy/<n>/<any name>?retry-after=1: 429 the first n times that this path is asked for, then the photo."""
        if request.times <= int(request.words[1]):
            await answer.whole(b"", f"Retry-After: {request.option('retry-after', '1')}", status="429 Too Many Requests")
        else:
            await answer.whole(good_photo(request.path))

    async def fails(self, request: Request, answer: Answer) -> None:
        """/fails/<n>/<any name>: 500 the first n times that this path is asked for, then the photo."""
        if request.times <= int(request.words[1]):
            await answer.whole(b"", status="500 Internal Server Error")
        else:
            await answer.whole(good_photo(request.path))

    async def headers(self, request: Request, answer: Answer) -> None:
        """?X-Robots-Tag=noai&X-Robots-Tag=...&ETag=...: a photo with these headers, which may be no UTF-8."""
        await answer.whole(good_photo(), *(f"{name}: {value}" for name, values in request.query.items() for value in values))

    async def etag(self, request: Request, answer: Answer) -> None:
        """A photo with an ETag, or 304 to whom has it."""
        known = request.headers.get("if-none-match") == ETAG
        await answer.whole(b"" if known else good_photo(), f"ETag: {ETAG}", status="304 Not Modified" if known else "200 OK")

    async def last_modified(self, request: Request, answer: Answer) -> None:
        """A photo with a date, or 304 to whom has it."""
        known = request.headers.get("if-modified-since") == MODIFIED
        dated = [] if known else [f"Last-Modified: {MODIFIED}"]
        await answer.whole(b"" if known else good_photo(), *dated, status="304 Not Modified" if known else "200 OK")

    # Redirects.

    async def redirect(self, request: Request, answer: Answer) -> None:
        """?to=<anything>: a Location as it is given, even file:///etc/passwd, or bytes that are no UTF-8; and a cookie."""
        await answer.redirect(request.option("to", "/good/redirected"))

    async def loop(self, request: Request, answer: Answer) -> None:
        """/loop/a/<any name> and /loop/b/<any name> lead to each other, `MOST_REDIRECTS` times, and /loop/c/... to itself."""
        there = {"a": "b", "b": "a", "c": "c"}[request.words[1]]
        if request.times <= MOST_REDIRECTS:
            await answer.redirect("/".join(["/loop", there, *request.words[2:]]))
        else:
            await answer.whole(good_photo())

    async def chain(self, request: Request, answer: Answer) -> None:
        """/chain/<n>/<any name>: a photo after n redirects, relative ones."""
        left = int(request.words[1])
        if left:
            await answer.redirect("../" * len(request.words[2:]) + "/".join([str(left - 1), *request.words[2:]]))
        else:
            await answer.whole(good_photo(request.path))


def _packed(data: bytes, encoding: str = "gzip", more: bytes = b"") -> bytes:
    """An answer whose body is packed, though nobody asked for that."""
    body = (zlib.compress(data) if encoding == "deflate" else gzip.compress(data, mtime=0)) + more
    return http(body, f"Content-Encoding: {encoding}")


def _chunked(*parts: bytes) -> bytes:
    return http(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts), "Transfer-Encoding: chunked", length=None)


def http(body: bytes, *headers: str, status: str = "200 OK", kind: str = "image/jpeg", length: int | None = -1) -> bytes:
    """A whole answer; a length of -1 is that of the body, null is none."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
    lines += [] if length is None else [f"Content-Length: {len(body) if length < 0 else length}"]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("utf-8", "surrogateescape") + body


@functools.cache
def fixed_answers() -> dict[str, tuple[str, bytes, End]]:
    """Routes that say the same each time: first word -> outcome of a photo there, bytes, and what becomes of the connection."""
    photo = good_photo()
    large = photo.ljust(MAX_BYTES + 1000, b"\0")
    zeros = zlib.compress(bytes(2**21), 9)  # Twice what Pillow unpacks, in 2 kB.
    grey = bytes(97 * 72)
    return {
        "chunked": ("ok", _chunked(photo[:100], photo[100:], b""), "kept"),
        "until-closed": ("ok", http(photo, "Connection: close", length=None), "closed"),
        "gzip-photo": ("ok", _packed(photo), "kept"),
        "gzip-in-members": ("ok", _packed(photo[:1000], more=gzip.compress(photo[1000:], mtime=0)), "kept"),
        "deflate-photo": ("ok", _packed(photo, "deflate"), "kept"),
        "interim": ("ok", b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + http(photo), "kept"),
        "png-text": ("ok", http(png(96, 72, grey, (b"zTXt", b"Comment\0\0" + zeros))), "kept"),
        "png-profile": ("ok", http(png(96, 72, grey, (b"iCCP", b"profile\0\0" + zeros))), "kept"),
        # Size.
        "large-chunked": ("too_large", _chunked(large, b""), "kept"),
        "large-length": ("too_large", http(large), "kept"),
        "large-stream": ("too_large", http(large, "Connection: close", length=None), "closed"),
        "large-gzip": ("too_large", _packed(large), "kept"),
        "length-too-long": ("incomplete", http(photo, length=len(photo) + 100), "closed"),
        "length-too-short": ("bad_response", http(photo, length=len(photo) - 100), "closed"),
        "chunked-without-end": ("incomplete", _chunked(photo[:256]), "closed"),
        "empty": ("not_an_image", http(b""), "kept"),
        # What comes.
        "html": ("not_an_image", http(HTML, kind="text/html; charset=utf-8"), "kept"),
        "gzip-garbage": ("incomplete", http(photo, "Content-Encoding: gzip"), "kept"),
        "video": ("unsupported_format", http(b"\0\0\0\x14ftypisom\0\0\0\0isom" + bytes(1000), kind="video/mp4"), "kept"),
        # No HTTP. aiohttp takes 8 kB for a header, and 128 headers, so that memory has a bound.
        "no-location": ("bad_response", http(b"", status="302 Found"), "kept"),
        "reset": ("connect", b"", "reset"),
        "hangs-up": ("connect", b"", "closed"),
        "reset-body": ("incomplete", http(photo[:1000], length=len(photo)), "reset"),
        "garbage": ("bad_response", np.random.default_rng(0).bytes(4096), "closed"),
        "long-header": ("bad_response", http(photo, f"X-Long: {'x' * 10_000}"), "kept"),
        "many-headers": ("bad_response", http(photo, *["X-More: more"] * 140), "kept"),
        # What the client takes, and the bytes tell.
        "html-as-jpeg": ("not_an_image", http(HTML), "kept"),
        "large-png": ("too_many_pixels", http(png(1001, 1000, bytes(1002 * 1000))), "kept"),
        "heic": ("unsupported_format", http(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(1000)), "kept"),
        "no-end-mark": ("ok", http(photo[:-2]), "kept"),
        "truncated": ("decode_error", http(photo[: len(photo) // 2]), "kept"),
    }


BY_THE_BYTES = ["/html-as-jpeg", "/large-png", "/heic", "/no-end-mark", "/truncated", "/png-text", "/png-profile"]
_STATUSES = {
    **dict.fromkeys((204, 206, 300, 304, 305, 999), "http_other"),
    400: "http_4xx",
    401: "http_403",
    403: "http_403",
    404: "http_404",
    410: "http_410",
    418: "http_4xx",
    429: "http_429",
    451: "http_410",
    500: "http_5xx",
    503: "http_5xx",
}
TROUBLES = {
    **{f"/status/{status}": code for status, code in _STATUSES.items()},
    **{f"/{route}": code for route, (code, _, _) in fixed_answers().items() if code != "ok" and f"/{route}" not in BY_THE_BYTES},
    "/photos/missing.jpg": "http_404",
    "/headers?tdm-reservation=1": "opted_out",
    "/headers?X-Robots-Tag=noai": "opted_out",
    "/loop/a": "redirect_loop",
    "/loop/c": "redirect_loop",
    "/chain/6": "redirect_loop",
    "/redirect?to=http://[": "bad_response",
    "/redirect?to=http://a%2520b/": "bad_response",
    "/redirect?to=file:///etc/passwd": "blocked_scheme",
    "/redirect?to=ftp://127.0.0.1/a.jpg": "blocked_scheme",
    "/redirect?to=http://169.254.169.254:1/latest/meta-data/": "blocked_address",
}
"""Path -> outcome of a photo there, before its bytes are looked at, where `MAX_BYTES` is the limit."""
LATE = {"/never": "timeout", "/slow-headers": "timeout", "/slow-body": "too_slow", "/stalls": "too_slow"}
"""The same where crawl.total_seconds (timeout) or web.SLOW_SECONDS (too_slow) is short; else each lasts a minute or two."""


@functools.cache
def untrusted_context() -> ssl.SSLContext:
    """For a server named localhost and 127.0.0.1, with a certificate that it signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(private + certificate.public_bytes(pem))
        file.flush()
        context.load_cert_chain(file.name)
    return context
