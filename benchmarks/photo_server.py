"""A web server for benchmarks of crawling: small photos as fast as one process of Python can give them, and its own books.

    GET /anything      a JPEG of about 5 KB, one of a few hundred by the hash of the path, with the path as its comment:
                       so no two paths have the same bytes, and none looks like a placeholder
    GET /-/books       {"photos": ..., "bytes": ..., "connections": ..., "cpu_seconds": ...} since it was started

Honest HTTP/1.1 for GET and HEAD: connections stay open unless the client wants otherwise. It listens on 127.0.0.1 alone, prints
its port, and ends when its standard input does, so that it never outlives who started it.

Usage:  python -m benchmarks.photo_server --photos 300
"""

import argparse
import asyncio
import contextlib
import email.utils
import http.client
import io
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pbe_core.settings import REPOSITORY

BOOKS = b"/-/books"
PHOTOS = 300
SIDE = 96
_LONGEST_HEAD = 16_384
# Start of image and JFIF's segment, which must be the first (ITU-T T.871, section 10.1); any others may come in any order.
_FIRST_SEGMENTS = 20
_COMMENT = b"\xff\xfe"


@dataclass(frozen=True)
class Books:
    """What a server has done since it was started."""

    photos: int
    bytes: int
    """Of photos, without headers."""
    connections: int
    cpu_seconds: float


def make_photos(count: int, seed: int = 0) -> list[bytes]:
    """JPEGs of 96 x 96 px and about 5 KB, each another one: coarse colours under noise, as photos have both."""
    random = np.random.default_rng(seed)
    photos = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + random.normal(0, 16, (SIDE, SIDE, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


def photo_at(path: bytes, photos: list[bytes]) -> bytes:
    """The bytes that a path has: a photo, and the path in a comment (ITU-T T.81, section B.2.4.5)."""
    photo = photos[zlib.crc32(path) % len(photos)]
    length = (len(path) + 2).to_bytes(2, "big")
    return b"".join((photo[:_FIRST_SEGMENTS], _COMMENT, length, path, photo[_FIRST_SEGMENTS:]))


class PhotoProtocol(asyncio.Protocol):
    """One connection. Its counters are those of the class: a process is one server."""

    photos: list[bytes] = []  # noqa: RUF012
    answered = 0
    sent = 0
    connections = 0
    date = b""
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.begun = b""
        PhotoProtocol.connections += 1

    def data_received(self, data: bytes) -> None:
        """Answer all requests that are complete."""
        data = self.begun + data if self.begun else data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head, data = data[:end], data[end + 4 :]
            self.answer(head)
        self.begun = data
        if len(data) > _LONGEST_HEAD:
            self.say(b"431 Request Header Fields Too Large", closes=True)

    def answer(self, head: bytes) -> None:
        """Answer one request."""
        line, _, rest = head.partition(b"\r\n")
        fields = rest.lower()
        words = line.split(b" ")
        if len(words) != 3 or b"\ncontent-length:" in b"\n" + fields or b"\ntransfer-encoding:" in b"\n" + fields:
            self.say(b"400 Bad Request", closes=True)
            return
        method, path, version = words
        # Whether a name stands alone in its line or in a list matters to nobody who asks here.
        closes = b"connection: close" in fields or (version == b"HTTP/1.0" and b"connection: keep-alive" not in fields)
        if method not in (b"GET", b"HEAD"):
            self.say(b"501 Not Implemented", closes=closes)
        elif path == BOOKS:
            books = Books(PhotoProtocol.answered, PhotoProtocol.sent, PhotoProtocol.connections, time.process_time())
            self.say(b"200 OK", json.dumps(vars(books)).encode(), b"application/json", method == b"GET", closes)
        else:
            photo = photo_at(path, self.photos)
            self.say(b"200 OK", photo, b"image/jpeg", method == b"GET", closes)
            PhotoProtocol.answered += 1
            PhotoProtocol.sent += len(photo) if method == b"GET" else 0

    def say(
        self, status: bytes, body: bytes = b"", kind: bytes = b"text/plain", with_body: bool = True, closes: bool = False
    ) -> None:
        """Write one answer."""
        head = b"HTTP/1.1 %b\r\nDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n" % (
            status,
            self.date,
            kind,
            len(body),
            b"Connection: close\r\n" if closes else b"",
        )
        self.transport.write(head + body if with_body else head)
        if closes:
            self.transport.close()


async def serve(photos: int) -> None:
    """Serve until standard input ends."""
    PhotoProtocol.photos = make_photos(photos)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(PhotoProtocol, "127.0.0.1", 0, backlog=4096)

    def tell_time() -> None:
        PhotoProtocol.date = email.utils.formatdate(usegmt=True).encode()
        loop.call_later(1, tell_time)

    tell_time()
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)
    server.close()


@dataclass(frozen=True)
class PhotoServer:
    """A running server, seen from outside."""

    process: int
    port: int

    def url(self, path: str) -> str:
        """Where a photo is."""
        return f"http://127.0.0.1:{self.port}/{path}"

    def books(self) -> Books:
        """What it has done."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", BOOKS.decode())
            return Books(**json.loads(connection.getresponse().read()))


@contextlib.contextmanager
def running_server(photos: int = PHOTOS) -> Iterator[PhotoServer]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.photo_server", "--photos", str(photos)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield PhotoServer(process.pid, int(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=PHOTOS, help="different pictures (default: %(default)s)")
    asyncio.run(serve(parser.parse_args().photos))


if __name__ == "__main__":
    main()
