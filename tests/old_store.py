"""An S3 store as they were before 2025, over https: it does not know the checksums that newer clients send behind a body.

A newer client (botocore 1.36 and later) sends a body over https as `aws-chunked`: in pieces with their lengths between them, and
a checksum at the end. Such a store either refuses the request or keeps all that, lengths and checksum too, as the object.

    with old_store(refuses=True, folder=tmp_path) as storage:
        fsspec.filesystem("s3", **storage)
"""

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hostile_server import untrusted_context

_ERROR = b"<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>a header you sent is not known</Message></Error>"
_MISSING = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
_LISTING = b"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated></ListBucketResult>"


class _OldStore(http.server.BaseHTTPRequestHandler):
    """Puts, gives and removes objects of a few bytes in `bucket`; every listing is empty."""

    protocol_version = "HTTP/1.1"
    refuses: bool
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        body = self._body()
        if self.refuses and self.headers.get("content-encoding") == "aws-chunked":
            return self._answer(501, _ERROR)
        self.objects[self.path] = body
        return self._answer(200)

    def do_GET(self) -> None:
        if "?" in self.path:
            return self._answer(200, _LISTING)
        return self._answer(200, self.objects[self.path]) if self.path in self.objects else self._answer(404, _MISSING)

    def do_HEAD(self) -> None:
        if self.path == "/bucket":
            return self._answer(200)
        return self._answer(200, self.objects[self.path]) if self.path in self.objects else self._answer(404)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204)

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read what the program says."""

    def _body(self) -> bytes:
        """The request's body, out of HTTP's own pieces: what `aws-chunked` means is not known here."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = b""
        while size := int(self.rfile.readline(), 16):
            pieces += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return pieces

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def old_store(*, refuses: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Start such a store in this process, and end it. Gives the options of fsspec's s3 for it.

    Args:
        refuses: what it does with an `aws-chunked` body: an error, or (false) an object that is not what was sent.
        folder: where its certificate is put, for the client.
    """
    handler = type("OldStore", (_OldStore,), {"refuses": refuses, "objects": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = untrusted_context().wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            certificate = folder / "certificate.pem"
            certificate.write_text(ssl.get_server_certificate(("127.0.0.1", server.server_port)))
            endpoint = f"https://localhost:{server.server_port}"
            yield {"key": "key", "secret": "secret", "endpoint_url": endpoint, "client_kwargs": {"verify": str(certificate)}}
        finally:
            server.shutdown()
