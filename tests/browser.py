"""Pages in a real Chromium without a window, driven by Playwright: what they ask for, what they complain of, how wide they get.

The Chromium is the system's: nothing is downloaded, and where there is none, the tests that want one are skipped.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Tab:
    """One open page of one person: its cookies are its own."""

    page: "Page"
    requests: list[str] = field(default_factory=list)
    """URLs that the page asked for since it was opened, itself first, also where its own policy refused them; pictures within it
    (data:, blob:) are none."""
    complaints: list[str] = field(default_factory=list)
    """All that its console has: errors, warnings, what was refused, what no script caught."""


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """A Chromium of its own, ended with the block; skips where there is none.

    Within the block, `asyncio.run` fails in this thread, where Playwright has a loop of its own: servers run in another one.
    """
    if not CHROMIUM:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here (pip install playwright)")
    # Chromium's sandbox refuses to be root's.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_tab(browser: "Browser", url: str = "", *, width: int = 1280, dark: bool = False, **options: Any) -> Iterator[Tab]:
    """A page as a new person sees it, watched from its first request on and closed with the block.

    Args:
        browser: of the fixture `browser`.
        url: what to open, waiting until all of it is there; nothing yet, if empty.
        width: of the window, in px.
        dark: what the person prefers.
        options: others of Playwright's `new_context`: `has_touch`, `accept_downloads`, ...
    """
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    try:
        tab = Tab(context.new_page())
        tab.page.on("request", lambda one: one.url.startswith(("data:", "blob:")) or tab.requests.append(one.url))
        tab.page.on("console", lambda one: tab.complaints.append(f"{one.type}: {one.text}"))
        tab.page.on("pageerror", lambda one: tab.complaints.append(str(one)))
        if url:
            tab.page.goto(url)
        yield tab
    finally:
        context.close()
