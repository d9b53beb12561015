"""Many edits in a row by several people: does the app's memory grow, is an edit lost, does anybody get another one's picture?

Usage:  python -m benchmarks.app_edits --results benchmarks/results/app_edits.json
        prints the table; writes it only where --results says so.

A real `pbe app` with the tiny model, and clients that each have a session. A client uploads photo, mask and reference anew for
each edit, listens to its events (so previews are made), takes result and archive, and forgets every other edit. Its reference has
a colour of its own, and its seeds go round: what it gets must be, pixel by pixel, what the library paints for that colour and
seed in this process.

After each edit the memory of the server and its painting process is noted (PSS, so that what they share counts once), and the
bytes of its temporary folder. The mean of the last quarter of the edits is compared with that of the first quarter.
"""

import argparse
import asyncio
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.memory import MemorySampler
from pbe_core.errors import InputError, run_program
from pbe_core.settings import REPOSITORY
from pbe_train.app.models import FINISHED

CLIENTS, EDITS, SEEDS, GOAL = 4, 200, 5, 0.05
WIDTH, HEIGHT = 1200, 900
HOW = {"guidance": 2, "steps": 3, "scheduler": "DPMSolverMultistepScheduler"}
COLOURS = (
    (220, 40, 40),
    (40, 60, 220),
    (40, 180, 60),
    (240, 200, 40),
    (150, 60, 190),
    (30, 30, 30),
    (240, 240, 240),
    (240, 130, 30),
)


@dataclass
class Course:
    """What was seen, in the order of the edits that were done."""

    memory_mb: list[float] = field(default_factory=list)
    folder_mb: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    previews: int = 0
    pictures: dict[tuple[int, int], set[bytes]] = field(default_factory=dict)
    """Client and seed -> the different results, as bytes of their pixels."""


def picture_of(client: int) -> Image.Image:
    """The reference of a client: a disc of its colour."""
    y, x = np.mgrid[:80, :80] - 39.5
    pixels = np.full((80, 80, 3), 200, np.uint8)
    pixels[x**2 + y**2 < 30**2] = COLOURS[client]
    return Image.fromarray(pixels)


def photo() -> Image.Image:
    """A smooth photo of about a megapixel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], axis=2).astype(np.uint8))


def region() -> Image.Image:
    """A mask of a box."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[300:500, 400:640] = 255
    return Image.fromarray(mask)


def png(picture: Image.Image) -> bytes:
    """Its file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


class Client:
    """One person with a session."""

    def __init__(self, number: int, url: str, session: aiohttp.ClientSession) -> None:
        self.number, self.url, self.session = number, url, session
        self.headers = {"Origin": url, "X-PBE": "1"}

    async def ask(self, method: str, path: str, **given: Any) -> bytes:
        """An answer's bytes."""
        async with self.session.request(method, self.url + path, headers=self.headers, **given) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise InputError(f"{method} {path}: {answer.status}, {body[:300].decode(errors='replace')}")
            return body

    async def give(self, kind: str, data: bytes) -> str:
        """Upload a file; its id."""
        return str(json.loads(await self.ask("POST", f"/api/{kind}", data=data))["id"])

    async def edit(self, seed: int) -> tuple[str, dict[str, Any]]:
        """An edit from upload to its last state."""
        kept = {"photo": await self.give("photos", png(photo())), "mask": await self.give("masks", png(region()))}
        reference = await self.give("photos", png(picture_of(self.number)))
        wanted = {"model": "tiny-world", **kept, "references": [reference], "seeds": [seed], **HOW}
        id = str(json.loads(await self.ask("POST", "/api/edits", json=wanted))["id"])
        state: dict[str, Any] = {}
        async with self.session.get(f"{self.url}/api/edits/{id}/events") as events:
            async for line in events.content:
                if line.startswith(b"data: "):
                    state = json.loads(line[6:])
        return id, state


async def run_client(client: Client, edits: int, course: Course, sampler: MemorySampler, folder: Path) -> None:
    """Edit so many times, one after the other."""
    await client.ask("GET", "/")
    for number in range(edits):
        began, seed = time.monotonic(), number % SEEDS
        id, state = await client.edit(seed)
        if state.get("state") != "done":
            raise InputError(f"edit {number} of client {client.number} is lost: {state}")
        result = await client.ask("GET", f"/api/edits/{id}/results/0")
        with zipfile.ZipFile(io.BytesIO(await client.ask("GET", f"/api/edits/{id}/archive"))) as archive:
            if archive.read("result-0.png") != result:
                raise InputError(f"edit {number} of client {client.number}: the archive holds another picture")
        course.pictures.setdefault((client.number, seed), set()).add(Image.open(io.BytesIO(result)).tobytes())
        course.previews += state["previews"]
        if number % 2:
            await client.ask("DELETE", f"/api/edits/{id}")
        course.seconds.append(time.monotonic() - began)
        course.memory_mb.append(await asyncio.to_thread(sampler.memory_mb))
        course.folder_mb.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


async def run_clients(url: str, process: int, clients: int, edits: int, folder: Path) -> Course:
    """All clients at once."""
    course, sampler = Course(), MemorySampler(process)
    sessions = [aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) for _ in range(clients)]  # Of an address, too.
    try:
        people = [Client(number, url, session) for number, session in enumerate(sessions)]
        await asyncio.gather(*(run_client(each, edits // clients, course, sampler, folder) for each in people))
    finally:
        for session in sessions:
            await session.close()
    return course


def serve_and_run(clients: int, edits: int) -> Course:
    """Start the server, let the clients at it, and end it."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "TMPDIR": scratch, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "pbe_train.app", "--port", "0", "--model", f"tiny world={FINISHED}"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                url = server.stdout.readline().split("/ ")[0]
                if not url.startswith("http://"):
                    raise InputError("the server did not start; it says why above")
                return asyncio.run(run_clients(url, server.pid, clients, edits, Path(scratch)))
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait()


def mixed_up(course: Course) -> int:
    """How many pairs of client and seed got anything but what the library paints for them."""
    from pbe_train import PaintByExample

    torch.set_num_threads(1)
    paint = PaintByExample.from_pretrained(FINISHED, device="cpu")
    wrong = 0
    for (client, seed), pictures in course.pictures.items():
        expected = paint(photo(), region(), picture_of(client), seed=seed, **HOW)
        wrong += pictures != {expected.tobytes()}
    return wrong + len(course.pictures) - len(set.union(*course.pictures.values()))


def summary_of(course: Course, wrong: int) -> dict[str, float | int]:
    """The figures."""
    quarter = len(course.memory_mb) // 4
    first, last = (statistics.mean(part) for part in (course.memory_mb[:quarter], course.memory_mb[-quarter:]))
    return {
        "edits": len(course.seconds),
        "wrong_or_mixed_up": wrong,
        "memory_first_quarter_mb": round(first, 1),
        "memory_last_quarter_mb": round(last, 1),
        "growth": round(last / first - 1, 4),
        "largest_memory_mb": round(max(course.memory_mb), 1),
        "folder_mb_at_the_end": round(course.folder_mb[-1], 1),
        "previews": course.previews,
        "median_seconds_of_an_edit": round(statistics.median(course.seconds), 2),
    }


def main() -> int:
    """Read the command line; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=CLIENTS, help="people at once (default: %(default)s)")
    parser.add_argument("--edits", type=int, default=EDITS, help="of all together (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"file to write, as {RESULTS.name}/app_edits.json (default: none)")
    options = parser.parse_args()
    if not 1 <= options.clients <= len(COLOURS) or options.edits < 4 * options.clients or options.edits % options.clients:
        raise InputError(
            f"--clients {options.clients} --edits {options.edits}: give 1 to 8 clients, and 4 edits or more for each"
        )
    machine, began = describe_machine(), time.monotonic()
    course = serve_and_run(options.clients, options.edits)
    seconds = time.monotonic() - began
    summary = summary_of(course, mixed_up(course))
    table = Table("what", "measured")
    for what, value in summary.items():
        table.add_row(what.replace("_", " "), f"{value:,}")
    Console().print(table)
    if options.results:
        result = {
            "date": today(),
            "machine": machine,
            "versions": describe_versions(["aiohttp", "pillow", "torch"]),
            "clients": options.clients,
            "seconds": round(seconds, 1),
            **summary,
            "memory_mb": [round(each, 1) for each in course.memory_mb],
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(summary["wrong_or_mixed_up"]) or abs(summary["growth"]) > GOAL)


if __name__ == "__main__":
    run_program(main)
