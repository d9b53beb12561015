"""People at the edit page: a running server, and what one does there with mouse, finger and keys."""

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pbe_core.settings import REPOSITORY
from tests.browser import Tab, open_tab
from tests.pbe_train.app.mask_rules import Point, snap

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EXAMPLE = REPOSITORY / "tiny_world" / "example"
MODEL = REPOSITORY / "tiny_world" / "weights" / "model"

PATIENCE_MS = 300_000
"""For what hangs; a slow or busy machine must not fail a test."""


@contextmanager
def serve(*options: str) -> Iterator[str]:
    """A server of its own with the tiny model; its address, such as http://127.0.0.1:40001."""
    command = [sys.executable, "-m", "pbe_train.app", "--model", f"tiny world={MODEL}", "--port", "0", *options]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = re.match(r"(http://\S+)/ ", process.stdout.readline())
            assert address, "the server has ended"
            yield address[1]
        finally:
            process.terminate()


@dataclass
class Person:
    """Somebody before an open edit page."""

    tab: Tab
    address: str

    @property
    def page(self) -> Any:
        return self.tab.page

    def get(self, path: str) -> bytes:
        """What the server gives this person."""
        answer = self.page.request.get(self.address + path)
        assert answer.ok, f"{path}: {answer.status} {answer.text()[:300]}"
        return bytes(answer.body())

    def open(self, photo: Path | dict[str, Any], until: str = "px") -> None:
        """Choose a photo's file."""
        self.page.set_input_files("#photo-file", photo)
        self.page.get_by_text(until).and_(self.page.locator("#photo-told")).wait_for()

    def size_brush(self, place: int) -> float:
        """Set the slider; the brush's diameter, px of the photo."""
        self.page.fill("#brush-size", str(place))
        return float(self.page.inner_text("#brush-size-told").split()[0])

    def draw(self, points: Sequence[tuple[int, int]], canvas: str = "#canvas") -> list[Point]:
        """Drag the mouse along points of the screen, from the canvas's corner; the same points in px of the photo."""
        left, top = self.corner(canvas)
        mouse = self.page.mouse
        mouse.move(left + points[0][0], top + points[0][1])
        mouse.down()
        for x, y in points[1:]:
            mouse.move(left + x, top + y)
        mouse.up()
        return self.in_photo(points, canvas)

    def corner(self, canvas: str = "#canvas") -> tuple[float, float]:
        """Of a canvas in the window, px; the canvas is brought into view."""
        found = self.page.locator(canvas)
        found.scroll_into_view_if_needed()
        left, top = found.evaluate("one => [one.getBoundingClientRect().left, one.getBoundingClientRect().top]")
        return left, top

    def in_photo(self, points: Sequence[tuple[float, float]], canvas: str = "#canvas") -> list[Point]:
        """Points of the canvas, px of the screen, in px of the photo, as the stage tells where the photo lies."""
        view = self.page.locator(canvas).evaluate("one => ({...one.parentElement.dataset})")
        scale, left, top = (float(view[name]) for name in ("scale", "left", "top"))
        corner_x, corner_y = self.corner(canvas)
        placed = [(((corner_x + x) - corner_x), ((corner_y + y) - corner_y)) for x, y in points]
        return [(snap((x - left) / scale), snap((y - top) / scale)) for x, y in placed]

    def reach(self, wanted: str) -> None:
        """Press Tab until an element has the focus, and see that one sees it."""
        for _ in range(80):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
                assert self.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    def paint(self, start: Callable[[], None] | None = None) -> str:
        """Ask for an edit; its id."""
        with self.page.expect_response(lambda one: one.url.endswith("/api/edits")) as told:
            (start or (lambda: self.page.click("#paint")))()
        return str(told.value.json()["id"])

    def wait(self, edit: str, state: str = "done") -> None:
        """Until an edit has come to a state, on the page."""
        self.page.locator(f'[data-edit="{edit}"][data-state="{state}"]').wait_for(state="attached")

    def mask_of(self, edit: str) -> np.ndarray:
        """The mask that the server has of an edit."""
        mask: np.ndarray = picture(self.get(f"/api/edits/{edit}/mask")) > 0
        return mask

    def fill(self, **settings: object) -> None:
        """Settings by the names of their fields."""
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))


@contextmanager
def person(browser: "Browser", address: str, *, refused: int = 0, **options: Any) -> Iterator[Person]:
    """Somebody new at the page. At the end: no complaint on the console but `refused` requests, and none to another host."""
    with open_tab(browser, **options) as tab:
        tab.page.set_default_timeout(PATIENCE_MS)
        tab.page.goto(f"{address}/")
        tab.page.locator("html[data-ready]").wait_for(state="attached")
        yield Person(tab, address)
        assert [url for url in tab.requests if not url.startswith(f"{address}/")] == []
        # Chromium itself writes one line for each answer that refuses.
        told = [line for line in tab.complaints if "Failed to load resource: the server responded with a status of 4" not in line]
        assert told == []
        assert len(tab.complaints) == refused, tab.complaints


def picture(data: bytes) -> np.ndarray:
    """Of a file's bytes."""
    return np.asarray(Image.open(io.BytesIO(data)))


def file_of(pixels: np.ndarray, name: str) -> dict[str, Any]:
    """A PNG as Playwright puts it into a field for files."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def repeat(record: Path, *options: str) -> np.ndarray:
    """What the command line paints with a settings file, beside which its pictures lie."""
    # Not above: what draws pictures of the page needs no set-up of tests, and no PyTorch.
    import torch

    from pbe_train import sample
    from tests.conftest import call_program

    out = record.parent / "again.png"
    threads = torch.get_num_threads()
    try:
        done = call_program(sample.main, "--settings", str(record), "--model", str(MODEL), "--out", str(out), *options)
    finally:
        torch.set_num_threads(threads)
    assert done.returncode == 0, done.stderr
    return picture(out.read_bytes())
