"""Draw docs/pictures/app_edit_*.png: the edit page of `pbe app` with its example, wide (light, dark) and narrow (docs/app.md).

Starts the app with the finished tiny model and looks at it in Chromium.

Usage:  python -m docs.pictures.make_app_pictures [--out FOLDER]
"""

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pbe_core.errors import run_program
from pbe_core.files import write_atomically
from tests.browser import open_browser, open_tab
from tests.pbe_train.app.edit_people import serve

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = {
    "app_edit_light": {"width": 1280, "dark": False},
    "app_edit_dark": {"width": 1280, "dark": True},
    "app_edit_narrow": {"width": 390, "dark": False, "has_touch": True},
}
"""Names, and how the page is opened for them (`tests.browser.open_tab`)."""
COLOURS = 256
"""Of a picture's palette: a page has few beside those of its photos."""


def photograph(page: "Page", seeds: int) -> bytes:
    """The whole page as a PNG, after the example was painted with so many seeds; the line stands in the middle of the region."""
    page.click("#example")
    page.locator("#thumbs img").wait_for()
    page.fill("#count", str(seeds))
    page.fill("#steps", "50")
    page.click("#paint")
    page.locator(".downloads:not([hidden])").wait_for(timeout=300_000)
    page.wait_for_function("[...document.images].every(one => one.complete)")
    page.locator(".slide input").fill("52")
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    buffer = io.BytesIO()
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: %(default)s)")
    given = parser.parse_args()
    with serve() as address, open_browser() as browser:
        for name, how in PICTURES.items():
            with open_tab(browser, f"{address}/", **how) as tab:
                data = photograph(tab.page, 1 if how["width"] < 800 else 4)
            write_atomically(given.out / f"{name}.png", data)
            print(f"{name}.png: {len(data):,} bytes, {Image.open(io.BytesIO(data)).size} px")


if __name__ == "__main__":
    run_program(main)
