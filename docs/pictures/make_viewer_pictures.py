"""Draw docs/pictures/app_dataset_*.jpg: the dataset viewer of `pbe app`, its grid and one sample, wide and narrow (docs/app.md).

Usage:  python -m docs.pictures.make_viewer_pictures --dataset data/tiny/dataset [--out FOLDER]
"""

import argparse
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from PIL import Image

from pbe_core.errors import run_program
from pbe_core.files import write_atomically
from tests.browser import open_browser, open_tab
from tests.pbe_train.app.edit_people import serve

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = {
    "app_dataset_light": {"width": 1280, "dark": False},
    "app_dataset_dark": {"width": 1280, "dark": True},
    "app_dataset_narrow": {"width": 390, "dark": False, "has_touch": True},
}
"""Names, and how the page is opened for them (`tests.browser.open_tab`)."""
OF_SAMPLES = ("app_dataset_dark", "app_dataset_narrow")
"""Those that show one sample; the others show the grid."""
SAMPLE = 2
QUALITY = 82


def photograph(page: "Page", sample: bool) -> bytes:
    """The window as a JPEG: the grid, or one sample with a mask, its decoded latent and draws of the strong augmentation."""
    page.locator("#classes button").first.wait_for(state="attached")
    page.locator(".tile img").nth(5).wait_for()
    if sample:
        page.locator(f'.tile[data-index="{SAMPLE}"]').press("Enter")
        page.get_by_role("button", name="Decode the latent").click()
        page.keyboard.press("m")
        page.locator('img[alt="decoded latent"]').wait_for(timeout=120_000)
        page.get_by_label("preset").select_option("strong")
        page.get_by_role("button", name="Show 8 draws").click()
        page.locator(".draws img").nth(7).wait_for(timeout=120_000)
        page.locator("#sample .body").evaluate("one => (one.scrollTop = 0)")
    while not page.evaluate("[...document.images].every((one) => one.complete)"):
        page.wait_for_timeout(50)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    buffer = io.BytesIO()
    shot.save(buffer, "JPEG", quality=QUALITY, optimize=True, subsampling=0)
    return buffer.getvalue()


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="of the tiny world, whose photos are where its build had them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: %(default)s)")
    given = parser.parse_args()
    with (
        TemporaryDirectory() as work,
        serve("--dataset", given.dataset, "--cache", work, "--leave-out", f"{work}/left_out.csv") as address,
        open_browser() as browser,
    ):
        for name, how in PICTURES.items():
            with open_tab(browser, f"{address}/dataset", **how) as tab:
                data = photograph(tab.page, name in OF_SAMPLES)
            write_atomically(given.out / f"{name}.jpg", data)
            print(f"{name}.jpg: {len(data):,} bytes, {Image.open(io.BytesIO(data)).size} px")


if __name__ == "__main__":
    run_program(main)
