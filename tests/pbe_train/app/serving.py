"""A real `pbe app` on a free port, and people with browsers of their own that ask it for things, each with a session."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLE = REPOSITORY / "tiny_world" / "example"
QUICK = {"guidance": 2, "steps": 2, "scheduler": "DPMSolverMultistepScheduler", "seeds": [0]}
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPOSITORY)}


@dataclass(frozen=True)
class Answer:
    """What a server says."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one sentence of a refusal."""
        told = self.json()
        assert self.status >= 400, told
        assert list(told) == ["error"]
        assert "\n" not in told["error"]
        return str(told["error"])


class Person:
    """A browser with a cookie jar. It sends what this server's own pages send, unless a header is given otherwise or as None."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port, self.own = port, f"{host}:{port}"
        self.cookies: SimpleCookie = SimpleCookie()

    def ask(self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str | None) -> Answer:
        with self.stream(method, path, body, **headers) as response:
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())

    @contextmanager
    def stream(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str | None
    ) -> Iterator[HTTPResponse]:
        given = {"Host": self.own, "Origin": f"http://{self.own}", "X-PBE": "1"}
        if self.cookies:
            given["Cookie"] = "; ".join(f"{name}={morsel.value}" for name, morsel in self.cookies.items())
        given |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[dict-item]
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                method,
                path,
                json.dumps(body) if isinstance(body, dict) else body,
                {name: value for name, value in given.items() if value is not None},
            )
            response = connection.getresponse()
            for name, value in response.getheaders():
                if name.lower() == "set-cookie":
                    self.cookies.load(value)
            yield response
        finally:
            connection.close()

    def get(self, path: str, **headers: str | None) -> Answer:
        return self.ask("GET", path, **headers)

    def give(self, kind: str, data: bytes | Path, name: str = "", query: str = "") -> Answer:
        """Upload a photo (`photos`) or a mask (`masks`)."""
        if isinstance(data, Path):
            name, data = name or data.name, data.read_bytes()
        return self.ask("POST", f"/api/{kind}{query}", data, X_Name=quote(name))

    def give_example(self) -> dict[str, Any]:
        """The example's photo, mask and reference: what an edit names them by."""
        photo, reference, mask = (
            self.give(kind, EXAMPLE / f"{name}.png").json()["id"]
            for kind, name in (("photos", "photo"), ("photos", "reference"), ("masks", "mask"))
        )
        return {"model": "tiny-world", "photo": photo, "mask": mask, "references": [reference]}

    def edit(self, given: dict[str, Any], **how: Any) -> str:
        """Ask for an edit; its id."""
        answer = self.ask("POST", "/api/edits", given | QUICK | how)
        assert answer.status == 200, answer.body
        return str(answer.json()["id"])

    def follow(self, edit: str) -> Iterator[dict[str, Any]]:
        """The states of an edit as they come."""
        with self.stream("GET", f"/api/edits/{edit}/events") as response:
            assert response.getheader("Content-Type") == "text/event-stream"
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def wait(self, edit: str) -> dict[str, Any]:
        """The last state of an edit."""
        return list(self.follow(edit))[-1]

    def result(self, edit: str, number: int = 0) -> np.ndarray:
        """A picture that was painted."""
        answer = self.get(f"/api/edits/{edit}/results/{number}")
        assert answer.status == 200, answer.body
        return np.asarray(Image.open(io.BytesIO(answer.body)))


@dataclass
class Served:
    """A server at work."""

    process: subprocess.Popen[str]
    port: int
    folder: Path
    """For its temporary files."""
    said: list[str]

    def person(self) -> Person:
        """Somebody who has just opened the first page."""
        new = Person(self.port)
        assert new.get("/").status == 200
        return new

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it; its exit status."""
        self.process.send_signal(number)
        return self.process.wait()


@contextmanager
def serve(folder: Path, *options: str, **environment: str) -> Iterator[Served]:
    """`pbe app` with these options, in a process of its own, ended with the block."""
    command = [sys.executable, "-m", "pbe_train.app", "--port", "0", *options]
    given = {**os.environ, **_ENVIRONMENT, "TMPDIR": str(folder), **environment}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=given, cwd=folder, **pipes) as process:
        try:
            said: list[str] = []
            for line in process.stdout or ():
                said.append(line)
                if line.startswith("http://"):
                    break
            else:
                raise AssertionError(f"the server ended: {''.join(said)}")
            # What it says later must not fill the pipe.
            threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True).start()
            yield Served(process, int(line.split("/")[2].rpartition(":")[2]), folder, said)
        finally:
            if process.poll() is None:
                process.terminate()
