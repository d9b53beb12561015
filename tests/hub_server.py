"""A small Hugging Face hub on the loopback interface, that serves a folder as every repository of `someone`, or misbehaves.

    with HubServer(folder, {"/api/": "503"}) as hub:
        hub.url      # for HF_ENDPOINT; or `hub.use(monkeypatch, tmp_path)`, which this process then takes for the hub
        hub.asked    # "GET /api/models/someone/model", ... in order
        hub.faults   # may be changed

A fault is named for the beginning of a path; the longest that fits counts. What is sent is small; waits end with the server.
"""

import hashlib
import json
import ssl
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "a" * 40
HTML = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"
# Fault -> status and headers of the answer. A number alone is a status without either.
ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "hidden": (401, {"X-Error-Code": "RepoNotFound"}),
    "busy for an hour": (429, {"Retry-After": "3600"}),
    "no such name": (404, {"X-Error-Code": "RepoNotFound"}),
}


class HubServer:
    """Serves files below `folder`, over HTTPS where there is a context for it."""

    def __init__(self, folder: Path, faults: Mapping[str, str] = {}, tls: ssl.SSLContext | None = None) -> None:
        self.folder = folder
        self.faults = dict(faults)
        self.asked: list[str] = []
        self.end = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        if tls:
            # The handshake is the handler's: one that a client breaks off must not end the server.
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server.server_address[1]}"

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make it this process's hub, with an empty cache; the library has read the environment long ago."""
        huggingface_hub.close_session()
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(f"{constants}ENDPOINT", self.url)
        monkeypatch.setattr(f"{constants}HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(f"{constants}HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(f"{constants}HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.server.shutdown()
        self.server.server_close()
        huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        fitting = [start for start in self.hub.faults if path.startswith(start)]
        owner = path.removeprefix("/api/models").split("/")[1]
        if fitting and (fault := self.hub.faults[max(fitting, key=len)]) != "none":
            self.fail(fault)
        elif owner != "someone":
            self.send(*ANSWERS["no such name"])
        elif path.startswith("/api/models/"):
            files = sorted(str(file.relative_to(self.hub.folder)) for file in self.hub.folder.rglob("*") if file.is_file())
            content = {"id": path[len("/api/models/") :], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())
        else:
            self.file(self.hub.folder / path.split("/", 5)[5])

    do_HEAD = do_GET

    def file(self, file: Path) -> None:
        if not file.is_file():
            self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = file.read_bytes()
        self.send(200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data)

    def fail(self, fault: str) -> None:
        first = fault.removesuffix(", once")
        if first != fault:
            self.hub.faults = {start: "none" if kind == fault else kind for start, kind in self.hub.faults.items()}
        if first in ANSWERS or first.isdigit():
            self.send(*ANSWERS.get(first, (int(first) if first.isdigit() else 0, {})), body=b"{}")
        elif fault == "page":
            self.send(200, {"Content-Type": "text/html"}, HTML)
        elif fault == "stops half way":
            self.send(200, {"ETag": '"x"', "X-Repo-Commit": COMMIT}, b"half" * (self.command == "GET"), length=8)
            self.wait(self.command == "GET")
        else:
            if fault == "no HTTP":
                self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            self.wait(fault == "silent")
            assert fault in ("no HTTP", "closes", "silent"), fault

    def wait(self, silent: bool) -> None:
        if silent:
            self.hub.end.wait(60)
        self.close_connection = True

    def send(self, status: int, headers: Mapping[str, str], body: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
