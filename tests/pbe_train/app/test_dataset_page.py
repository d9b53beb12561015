"""The dataset viewer's page in a real Chromium, with the real server and a dataset that is really built."""

import csv
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import open_tab
from tests.pbe_train.app.edit_people import serve
from tests.pbe_train.app.looked_into import MALLORY, NO_ADDRESS, built, read  # noqa: F401

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:  # noqa: F811
    """A folder of the server's: the list of what is left out, its cache, an unfinished build, a copy without its first shard."""
    folder = tmp_path_factory.mktemp("viewer")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "plan.parquet").touch()
    shutil.copytree(built, folder / "damaged")
    (folder / "damaged" / "shards" / f"{read(built, 'index')['shard'][0]}.tar").unlink()
    return folder


@pytest.fixture(scope="module")
def address(browser, built: Path, work: Path) -> Iterator[str]:  # noqa: F811
    datasets = ["--dataset", str(built), "--dataset", str(work / "unfinished"), "--dataset", str(work / "damaged")]
    with serve(*datasets, "--cache", str(work / "cache"), "--leave-out", str(work / "left_out.csv")) as one:
        yield one


@pytest.fixture(scope="module")
def index(built: Path) -> list[dict]:  # noqa: F811
    return read(built, "index").to_pylist()


@contextmanager
def look(browser: "Browser", address: str, *, refused: int | None = 0, **options: Any) -> Iterator[Any]:
    """Somebody new at the page. At the end: no complaint on the console but of refused requests, and none to another host."""
    with open_tab(browser, f"{address}/dataset", **options) as tab:
        tab.page.locator("#told", has_text="samples").wait_for()
        yield tab.page
        assert [url for url in tab.requests if not url.startswith(f"{address}/")] == []
        told = [line for line in tab.complaints if "Failed to load resource: the server responded with a status of 4" not in line]
        assert told == []
        assert refused is None or len(tab.complaints) == refused, tab.complaints


def tile(page: Any, number: int) -> "Locator":
    return page.locator(f'.tile[data-index="{number}"]')


def seen(page: Any) -> list[int]:
    """The tiles that there are."""
    return page.eval_on_selector_all(".tile", "all => all.map((one) => Number(one.dataset.index)).sort((a, b) => a - b)")


def test_filters_and_the_histogram_show_what_the_index_has(browser, address, index):
    counts = Counter(row["label_name"] for row in index)
    name, count = counts.most_common(1)[0]
    both = [row for row in index if row["label_name"] == name and row["split"] == "train"]
    with look(browser, address) as page:
        told = page.locator("#told")
        assert told.inner_text() == f"{len(index)} samples"
        bars = page.locator("#classes button")
        bars.nth(len(counts) - 1).wait_for()
        shown = dict(text.split("\n") for text in bars.all_inner_texts())
        assert {one: int(number) for one, number in shown.items()} == counts
        page.locator("#classes button", has_text=name).click()
        told.and_(page.get_by_text(f"{count} of {len(index)} samples")).wait_for()
        tile(page, count - 1).locator("img").wait_for()
        assert set(page.locator(".tile .name").all_inner_texts()) == {name}
        page.select_option("#split", "train")
        told.and_(page.get_by_text(f"{len(both)} of {len(index)} samples")).wait_for()
        page.locator('#classes button[aria-pressed="true"]').get_by_text(str(len(both)), exact=True).wait_for()
        assert page.locator('#classes button[aria-pressed="true"] span').all_inner_texts() == [name, str(len(both))]
        page.fill("#smallest", "99")
        page.get_by_text("No sample passes these filters.").wait_for()
        page.fill("#largest", "20")
        page.locator("#error", has_text="the smaller one first").wait_for()
        page.click("#tab-rejects")
        assert page.is_disabled("#smallest")  # Lists are not filtered by it.
        assert page.is_enabled("#split")
        page.click("#tab-samples")
        page.click("#clear")
        told.and_(page.get_by_text(re.compile(f"^{len(index)} samples"))).wait_for()
        # With the keys alone: to the search, and from there to the sample that it finds.
        page.locator("body").press("/")
        page.keyboard.type(index[9]["key"][:18].upper())
        same = [row for row in index if row["key"].startswith(index[9]["key"][:18])]
        told.and_(page.get_by_text(f"{len(same)} of {len(index)} samples")).wait_for()
        assert tile(page, 0).get_attribute("tabindex") == "0"
        tile(page, 0).press("Enter")
        page.locator("#sample h2", has_text=same[0]["key"]).wait_for()


def test_a_sample_with_everything(browser, address, index, built):  # noqa: F811
    """Of validation, whose metadata a stranger wrote; pictures, masks, draws of the real augmentation, the decoded latent."""
    number = next(place for place, row in enumerate(index) if row["split"] == "validation")
    row = index[number]
    with look(browser, address) as page:
        page.select_option("#split", "validation")
        page.locator("#told", has_text=" of ").wait_for()
        tile(page, 0).click()
        facts = page.locator("#sample .facts")
        facts.first.wait_for()
        text = "\n".join(facts.all_inner_texts())
        for said in (row["key"], row["object_id"], row["shard"], MALLORY, NO_ADDRESS, f"{row['ref_jpg']['crc32']:08x}"):
            assert said in text
        links = page.locator("#sample a").evaluate_all("all => all.map((one) => [one.protocol, one.rel])")
        assert links == [["https:", "noopener noreferrer"]]
        assert page.locator("#sample b").count() == 0
        for part in ("photo ", "view", "reference"):
            page.locator(f'#sample .laid img[alt^="{part}"]').wait_for()
        page.get_by_text("view.jpg; 128 px").wait_for()
        boxes = page.locator("#sample .laid rect.of-window").evaluate_all(
            "all => all.map((one) => Number(one.getAttribute('width')))"
        )
        assert boxes == [page.request.get(f"{address}/api/datasets/0/samples/{number}").json()["record"]["window"][2]]
        page.get_by_role("button", name="Decode the latent").click()
        page.locator('#sample img[alt="decoded latent"]').wait_for(timeout=120_000)
        page.get_by_text("latent, decoded by the VAE").wait_for()
        page.keyboard.press("m")
        page.locator('#sample img[alt="mask 0"]').wait_for()
        page.get_by_text("latent of the view under mask 0, decoded").wait_for()
        page.get_by_label("preset").select_option("strong")
        page.get_by_role("button", name="Show 8 draws").click()
        page.locator(".draws img").nth(7).wait_for(timeout=120_000)
        pictures = {
            page.request.get(f"{address}/api/datasets/0/samples/{number}/draws/{slot}?preset=strong").body() for slot in range(3)
        }
        assert len(pictures) == 3
        page.keyboard.press("ArrowRight")
        page.locator("#sample h2", has_text=index[number + 1]["key"]).wait_for()
        page.locator(".draws img").nth(7).wait_for(timeout=60_000)  # What was asked for once is there for the next one.
        page.keyboard.press("ArrowLeft")
        page.locator("#sample h2", has_text=row["key"]).wait_for()
        page.keyboard.press("Escape")
        page.locator("#sample").wait_for(state="hidden")
        assert page.evaluate("document.activeElement.dataset.index") == "0"


def test_a_grid_of_millions_shows_any_of_them(browser, address):
    """The grid itself over 50 million rows: ends, middle, wheel and keys reach the very tiles that they should."""
    make = """async () => {
        const {Grid} = await import("/static/dataset_grid.js");
        const [old, layer, spacer] = ["div", "div", "div"].map((tag) => document.createElement(tag));
        old.className = "grid"; layer.className = "layer"; spacer.className = "spacer";
        old.id = "large"; old.tabIndex = -1;
        old.append(layer, spacer);
        document.getElementById("samples").replaceChildren(old);
        const row = (number) => ({key: `k${number}`, label_name: `row ${number}`});
        const source = {rows: async (first, count) => Array.from({length: count}, (_, at) => row(first + at)),
                        picture: () => "/static/example/mask.png", isMarked: () => false, open: () => {}};
        window.large = new Grid(old, layer, spacer, source);
        window.large.show(50_000_000, true);
    }"""
    last = 49_999_999
    with look(browser, address) as page:
        page.evaluate(f"({make})()")
        tile(page, 0).get_by_text("row 0").wait_for()
        columns, height = page.evaluate("[large.columns, large.height]")
        assert page.evaluate("large.spacer.offsetHeight") == 8_000_000
        page.evaluate("large.scroller.scrollTop = large.scroller.scrollHeight")
        tile(page, last).get_by_text(f"row {last}").wait_for()
        assert len(seen(page)) < 200
        page.evaluate("large.scroller.scrollTop = 4_000_000")
        page.locator('.tile[data-index^="249"], .tile[data-index^="25"]').first.locator("img").wait_for()
        page.wait_for_timeout(0)
        middle = seen(page)
        assert abs(middle[0] - 25_000_000) < 250_000
        # A wheel moves by what it says, as on a short page, and not by thousands of rows.
        page.locator("#large").hover()
        page.mouse.wheel(0, 2 * height)
        tile(page, middle[0] + 2 * columns).wait_for()
        page.locator(f'.tile[data-index="{middle[0]}"]').wait_for(state="detached")
        page.evaluate("large.go(large.current = Number(document.querySelector('.tile').dataset.index), true)")
        here = int(page.evaluate("document.activeElement.dataset.index"))
        for key, moved in (("ArrowDown", columns), ("ArrowRight", 1), ("ArrowUp", -columns), ("PageDown", None), ("Home", -here)):
            page.keyboard.press(key)
            now = int(page.evaluate("document.activeElement.dataset.index"))
            assert now in seen(page)
            assert moved is None or now == (0 if key == "Home" else here + moved)
            here = now
        page.keyboard.press("End")
        tile(page, last).get_by_text(f"row {last}").wait_for()
        assert page.evaluate("document.activeElement.dataset.index") == str(last)


def test_marks_are_written_shown_and_taken_back(browser, address, index, work):
    photo, single = index[0]["object_id"].rpartition("-")[0], index[-1]["object_id"]
    with look(browser, address) as page:
        tile(page, 0).locator("img").wait_for()
        tile(page, 0).press("Enter")
        page.locator("#sample .facts").first.wait_for()
        page.keyboard.press("p")
        page.get_by_role("button", name="Left out: photo").wait_for()
        page.keyboard.press("Escape")
        of_photo = sum(row["object_id"].startswith(f"{photo}-") for row in index)
        page.locator(".tile.marked").nth(of_photo - 1).wait_for()
        tile(page, 0).press("End")
        tile(page, len(index) - 1).press("Enter")
        page.get_by_role("button", name="Leave out object").click()
        page.get_by_role("button", name="Left out: object").wait_for()
        page.keyboard.press("Escape")
        with (work / "left_out.csv").open() as file:
            assert list(csv.reader(file)) == [["what", "id"], ["object", single], ["photo", photo]]
        page.get_by_role("tab", name="Left out 2").click()
        page.locator("#listed code", has_text=single).wait_for()
        page.get_by_role("button", name="Keep it").first.click()
        page.get_by_role("tab", name="Left out 1").wait_for()
        page.get_by_role("button", name="Show").click()
        page.locator("#told", has_text=f"{of_photo} of {len(index)} samples").wait_for()
        page.locator(".tile.marked").nth(of_photo - 1).wait_for()
        assert page.locator(".tile.marked").count() == of_photo
        assert (work / "left_out.csv").read_text() == f"what,id\nphoto,{photo}\n"
    # Nothing else can be written there: it takes an id.
    with look(browser, address) as page:
        send = """(id) => fetch("/api/left-out", {
            method: "POST", headers: {"X-PBE": "1"}, body: JSON.stringify({what: "photo", id, leave: true})
        }).then((one) => one.status)"""
        assert page.evaluate(send, photo) == 200
        assert page.request.post(f"{address}/api/left-out", data={"what": "photo", "id": photo, "leave": False}).status == 403


def test_rejects_and_failures_say_why(browser, address, built):  # noqa: F811
    rejects, failures = (read(built, name).to_pylist() for name in ("rejects", "failures"))
    reason, count = Counter(row["reason"] for row in rejects).most_common(1)[0]
    with look(browser, address) as page:
        page.get_by_role("tab", name=f"Rejects {len(rejects)}").click()
        page.locator("#told", has_text=f"{len(rejects)} rejected boxes").wait_for()
        page.locator("#listed select").select_option(reason)
        page.locator("#told", has_text=re.compile(rf"^{count} rejected box")).wait_for()
        assert page.locator("#listed tbody tr").count() == count
        assert set(page.locator("#listed tbody td:nth-child(3)").all_inner_texts()) == {reason.replace("_", " ")}
        page.locator("#listed tbody button").first.click()
        page.locator("#photo img").wait_for()
        page.locator("#photo rect.of-box").wait_for(state="attached")
        page.keyboard.press("Escape")
        page.get_by_role("tab", name=f"Failures {len(failures)}").click()
        page.locator("#listed code", has_text=failures[0]["key"]).wait_for()
        assert page.locator("#listed tbody tr").count() == len(failures)
        assert "missing" in page.locator("#listed tbody").inner_text()


def test_what_is_missing_is_said_where_it_is_missing(browser, address, index):
    """A shard that is gone costs its own tiles; a build that is not finished says so, and the other dataset is there again."""
    with look(browser, address, refused=None) as page:
        page.select_option("#dataset", "2")
        tile(page, 0).get_by_text(f"{index[0]['shard']}.tar: missing").wait_for()
        tile(page, 0).press("End")
        tile(page, len(index) - 1).locator("img").wait_for()
        page.select_option("#dataset", "1")
        page.locator("#error", has_text="is not finished").wait_for()
        page.select_option("#dataset", "0")
        page.locator("#told", has_text=f"{len(index)} samples").wait_for()
        assert page.inner_text("#error") == ""
        tile(page, 0).locator("img").wait_for()
        for path, status in (
            ("7", 404),
            ("0/samples/99999", 400),
            ("0/samples/x", 400),
            ("0/samples/0/mask", 404),
            ("0/rows?first=-1", 400),
        ):
            answer = page.request.get(f"{address}/api/datasets/{path}")
            assert (answer.status, list(answer.json())) == (status, ["error"])


@pytest.mark.parametrize("dark", [False, True])
def test_a_small_screen_holds_all_of_it(browser, address, dark):
    with look(browser, address, width=390, dark=dark, has_touch=True) as page:
        tile(page, 0).locator("img").wait_for()
        page.locator("summary").tap()
        page.locator("#classes button").first.tap()
        page.locator("#told", has_text=" of ").wait_for()
        page.locator("summary").tap()
        tile(page, 0).tap()
        page.locator("#sample .facts").first.wait_for()
        assert page.evaluate("document.querySelector('#sample .body').scrollWidth <= innerWidth")
        page.get_by_role("button", name="Close").tap()
        page.get_by_role("tab", name="Rejects").tap()
        page.locator("#listed table, #listed p").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
