"""The edit page in a real Chromium, with the real server and the tiny model: what one draws is what is painted."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pbe_train.app import mask_rules
from tests.pbe_train.app.edit_people import EXAMPLE, file_of, person, picture, repeat, serve


@pytest.fixture(scope="module")
def address(browser) -> Iterator[str]:
    with serve() as one:
        yield one


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_shapes_cover_the_pixels_that_their_rules_name(browser, address):
    """Random capsules, boxes and lassos, also outside the photo, tiny and thousands of px wide; in eighths, as the page has."""
    rng, width, height = np.random.default_rng(3), 61, 47
    spread = [20, 200, 3000]
    points = [[(rng.integers(-8 * most, 8 * most, 2) / 8 + (30, 20)).tolist() for _ in range(9)] for most in spread * 12]
    sizes = [float(size) for size in rng.integers(1, 80, len(points))]
    cover = """async ([points, sizes, width, height]) => {
        const {box, capsule, polygon} = await import("/static/geometry.js");
        const read = (shape) => {
            const rows = [];
            shape.spans((row, start, end) => rows.push([row, start, end]));
            return rows;
        };
        return points.map((each, number) => {
            const [a, b, ...rest] = each.map(([x, y]) => ({x, y}));
            return [capsule(a, b, sizes[number] / 2, width, height), capsule(a, a, sizes[number] / 2, width, height),
                    box(a, b, width, height), polygon([a, b, ...rest], width, height)].map(read);
        });
    }"""
    with person(browser, address) as one:
        found = one.page.evaluate(cover, [points, sizes, width, height])
    covered = 0
    for spans, (a, b, *rest), size in zip(found, points, sizes, strict=True):
        expected = [
            mask_rules.stroke([a, b], size, width, height),
            mask_rules.stroke([a], size, width, height),
            mask_rules.box(a, b, width, height),
            mask_rules.lasso([a, b, *rest], width, height),
        ]
        for rows, right in zip(spans, expected, strict=True):
            mask = np.zeros((height, width), bool)
            for row, start, end in rows:
                mask[row, start:end] = True
            assert np.array_equal(mask, right)
            covered += right.any()
    assert covered > len(points)


def test_undo_restores_each_mask_and_keeps_no_more_than_its_bytes(browser, address):
    """Steps of all kinds taken back and done again are byte for byte what was there; the oldest go when there are too many."""
    steps = """async (kept) => {
        const {Mask} = await import("/static/mask.js"), {capsule, box} = await import("/static/geometry.js");
        const mask = new Mask(700, 300, kept), states = [mask.data.slice()];
        const same = (data) => mask.data.every((value, at) => value === data[at]);
        for (let step = 0; step < 40; step++) {
            const at = (part) => Math.floor(1000 * Math.abs(Math.sin(12.9 * step + part)));
            if (step % 10 === 9) mask.invert();
            else {
                mask.begin();
                for (let part = 0; part < 3; part++) {
                    const a = {x: at(part) % 700, y: at(part + 5) % 300}, b = {x: at(part + 7) % 700, y: at(part + 9) % 300};
                    mask.add(step % 3 ? capsule(a, b, 20, 700, 300) : box(a, b, 700, 300), step % 4 ? 1 : 0);
                }
                mask.end();
            }
            states.push(mask.data.slice());
        }
        const bytes = mask.keptBytes;
        let back = 0, right = true;
        while (mask.canUndo) { mask.undo(); back++; right &&= same(states[40 - back]); }
        for (let forth = back; forth > 0; forth--) { mask.redo(); right &&= same(states[41 - forth]); }
        mask.begin();
        mask.add(box({x: 0, y: 0}, {x: 9, y: 9}, 700, 300), 1);
        mask.cancel();
        return [back, right && same(states[40]), bytes, mask.canRedo];
    }"""
    with person(browser, address) as one:
        assert one.page.evaluate(f"({steps})(1e9)")[:2] == [40, True]
        back, right, kept, more = one.page.evaluate(f"({steps})(200000)")
    assert right
    assert not more
    assert 1 <= back < 40
    assert kept <= 200_000


def test_strokes_are_the_mask_that_is_painted(browser, address):
    """Brush, eraser, box, lasso, undo, redo and invert by mouse on an odd size, predicted pixel by pixel, as the file has it."""
    width, height = 203, 151
    with person(browser, address) as one:
        one.open(file_of(noise(width, height), "odd.png"))
        size = one.size_brush(60)
        drawn = one.draw([(300, 200), (340, 330), (520, 345), (525, 120)])
        expected = mask_rules.stroke(drawn, size, width, height)
        one.page.keyboard.press("e")
        expected &= ~mask_rules.stroke(one.draw([(330, 300), (560, 333)]), size, width, height)
        one.page.keyboard.press("x")
        one.draw([(100, 100), (700, 400)])
        one.page.keyboard.press("Control+z")
        start, end = one.draw([(333, 150), (291, 401)])
        expected |= mask_rules.box(start, end, width, height)
        one.page.keyboard.press("l")
        one.page.click("#zoom-in")  # From here on, another scale.
        expected |= mask_rules.lasso(one.draw([(100, 90), (420, 130), (410, 300), (140, 210), (440, 170)]), width, height)
        one.page.click("#undo")
        one.page.click("#redo")
        one.page.keyboard.press("x")
        one.page.keyboard.down("Alt")  # Takes away.
        expected &= ~mask_rules.box(*one.draw([(200, 120), (260, 260)]), width, height)
        one.page.keyboard.up("Alt")
        one.page.keyboard.press("i")
        one.page.set_input_files("#reference-file", EXAMPLE / "reference.png")
        one.page.locator("#thumbs img").wait_for()
        one.fill(steps=1)
        edit = one.paint()
        one.wait(edit)
        assert 0.05 < expected.mean() < 0.95
        assert np.array_equal(one.mask_of(edit), ~expected)
        assert one.page.inner_text("#photo-told").endswith(f"{round(100 * (1 - expected.mean()))} % to be repainted")
        with one.page.expect_download() as told:
            one.page.click(".edit .mask")
        assert np.array_equal(picture(Path(told.value.path()).read_bytes()) > 0, ~expected)


def test_the_first_minute_and_what_can_be_downloaded(browser, address, tmp_path):
    """Example, two results, previews, downloads; outside the mask the photo's bytes; `pbe edit --settings` gives the pixels."""
    with person(browser, address) as one:
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        one.fill(count=2, seed=7, steps=24)
        one.page.fill("#guided-from", "0.25")
        one.page.fill("#guided-to", "0.75")
        one.page.select_option("#reuse", "2")
        edit = one.paint()
        one.page.locator(f'[data-edit="{edit}"][data-seen]').wait_for(state="attached")
        assert one.page.locator(".edit .pace").inner_text().startswith("Result ")
        one.wait(edit)
        one.page.locator(".told", has_text="guidance 2 from 0.25 to 0.75 · 24 steps, one in 2 whole · DPM++ 2M Karras").wait_for()
        one.page.locator(".seeds button").nth(1).click()
        one.page.locator(".seeds button[aria-pressed=true]", has_text="seed 8").wait_for()
        saved = {}
        for kind in ("save", "record", "archive"):
            with one.page.expect_download() as told:
                one.page.click(f".edit .{kind}")
            saved[kind] = Path(told.value.path()).read_bytes()
        assert told.value.suggested_filename.endswith(".zip")
        one.page.focus(".slide input")
        one.page.keyboard.press("End")
        assert one.page.locator(".after").evaluate("one => one.style.clipPath").endswith("100%)")
    photo, mask = (picture((EXAMPLE / f"{name}.png").read_bytes()) for name in ("photo", "mask"))
    result = picture(saved["save"])
    assert np.array_equal(result[mask == 0], photo[mask == 0])
    assert not np.array_equal(result[mask > 0], photo[mask > 0])
    told = json.loads(saved["record"])
    assert (told["seeds"], told["guidance_interval"], told["reuse"]) == ([7, 8], [0.25, 0.75], 2)
    with zipfile.ZipFile(io.BytesIO(saved["archive"])) as archive:
        archive.extractall(tmp_path)
    (record,) = tmp_path.rglob("settings.json")
    assert np.array_equal(repeat(record, "--seed", "8"), result)


def test_keys_alone_do_from_the_photo_to_the_result(browser, address):
    """No mouse: reach the photo with Tab, draw a stroke and a box with arrows, paint, cancel another one."""
    with person(browser, address) as one:
        press = one.page.keyboard.press
        one.reach("#example")
        press("Enter")
        one.page.locator("#thumbs img").wait_for()
        one.reach("#clear")
        press("Enter")
        one.page.get_by_text("nothing to be repainted").wait_for()
        one.reach("#canvas")
        size = float(one.page.inner_text("#brush-size-told").split()[0])
        one.page.keyboard.down("Space")
        for key in ("ArrowRight", "Shift+ArrowDown", "ArrowRight"):
            press(key)
        one.page.keyboard.up("Space")
        scale = float(one.page.locator("#stage").get_attribute("data-scale"))
        step = round(12 / scale)
        points = [(64, 64), (64 + step, 64), (64 + step, 65), (64 + 2 * step, 65)]
        expected = mask_rules.stroke(points, size, 128, 128)
        press("x")
        for key in ("ArrowDown", "ArrowDown", "Enter", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter"):
            press(key)
        expected |= mask_rules.box((64 + 2 * step, 65 + 2 * step), (64 - step, 65 + 3 * step), 128, 128)
        one.reach("#steps")
        one.page.keyboard.type("2")  # Tab selects what is there.
        first = one.paint(lambda: press("Control+Enter"))
        one.wait(first)
        assert np.array_equal(one.mask_of(first), expected)
        one.reach("#steps")
        one.page.keyboard.type("1000")
        second = one.paint(lambda: press("Control+Enter"))
        one.wait(second, "painting")
        press("Escape")
        one.wait(second, "cancelled")
        one.page.get_by_text("Edit 2 is cancelled.").wait_for(state="attached")
        press("Shift+Tab")
        one.reach(".edit .save")
        with one.page.expect_download():
            press("Enter")


def test_a_finger_draws_and_two_zoom_on_a_narrow_screen(browser, address):
    """390 px: nothing wider than the window, targets for fingers, a stroke by touch; a pinch leaves no stroke behind."""
    with person(browser, address, width=390, has_touch=True, is_mobile=True) as one:
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        one.page.click("#clear")
        size = one.size_brush(55)
        touch = one.page.context.new_cdp_session(one.page)
        left, top = one.corner()

        def put(kind: str, *points: tuple[int, int]) -> None:
            placed = [{"x": left + x, "y": top + y, "id": number} for number, (x, y) in enumerate(points)]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": placed})

        stroke = [(100, 150), (180, 200), (220, 150)]
        put("touchStart", stroke[0])
        for point in stroke[1:]:
            put("touchMove", point)
        put("touchEnd")
        expected = mask_rules.stroke(one.in_photo(stroke), size, 128, 128)
        left, top = one.corner()
        before = float(one.page.locator("#stage").get_attribute("data-scale"))
        put("touchStart", (120, 150))
        put("touchMove", (130, 150))
        put("touchStart", (130, 150), (200, 150))
        put("touchMove", (90, 150), (240, 150))
        put("touchEnd")
        assert float(one.page.locator("#stage").get_attribute("data-scale")) > 1.5 * before
        one.fill(steps=1)
        edit = one.paint()
        one.wait(edit)
        assert np.array_equal(one.mask_of(edit), expected)
        assert one.page.evaluate("document.documentElement.scrollWidth") == 390
        heights = one.page.evaluate(
            "[...document.querySelectorAll('main button, main select, main input[type=number], .tools label')]"
            ".filter(one => one.offsetParent && !one.closest('.thumbs')).map(one => one.offsetHeight)"
        )
        assert min(heights) >= 44


def test_two_people_at_once_get_their_own(browser, address):
    """Edits of both are in the queue together; each sees the own result, and the other's is not to be had."""
    with person(browser, address) as one, person(browser, address) as other:
        edits, photos = [], [noise(90, 80, 1), noise(100, 70, 2)]
        for who, photo in zip((one, other), photos, strict=True):
            who.open(file_of(photo, "mine.png"))
            who.draw([(300, 250), (420, 260)])
            who.page.set_input_files("#reference-file", EXAMPLE / "reference.png")
            who.page.locator("#thumbs img").wait_for()
            who.fill(steps=3)
        for who in (one, other):
            edits.append(who.paint())
        for who, edit, photo in zip((one, other), edits, photos, strict=True):
            who.wait(edit)
            result, mask = picture(who.get(f"/api/edits/{edit}/results/0")), who.mask_of(edit)
            assert np.array_equal(result[~mask], photo[~mask])
            assert mask.any()
        assert other.page.request.get(f"{address}/api/edits/{edits[0]}").status == 404


def test_edits_wait_for_one_another_and_the_page_stays_free(browser, address):
    """More edits wait than a browser has connections to one server; one too many is refused with words; each has its turn."""
    with person(browser, address, refused=1) as one:
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        one.fill(steps=1000)
        first = one.paint()
        one.wait(first, "painting")
        one.fill(steps=1)
        others = [one.paint() for _ in range(8)]
        one.page.get_by_text("Waiting: 8 edits before this one").wait_for()
        one.page.click("#paint")
        one.page.locator("#settings-error", has_text="waiting already").wait_for()
        one.page.locator(f'[data-edit="{first}"] .forget').click()
        one.wait(first, "cancelled")
        for edit in others:
            one.wait(edit)


def test_a_cancelled_edit_stays_though_it_ends_before_the_server_answers(browser, address):
    with person(browser, address) as one:
        held = []

        def hold(route: Any) -> None:
            if route.request.method == "DELETE":
                held.append((route, route.fetch()))
            else:
                route.continue_()

        one.page.route("**/api/edits/*", hold)
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        one.fill(steps=1000)
        edit = one.paint()
        one.wait(edit, "painting")
        one.page.locator(".edit .forget").click()
        one.wait(edit, "cancelled")
        with one.page.expect_response(lambda answer: answer.request.method == "DELETE"):
            held[0][0].fulfill(response=held[0][1])
        one.page.evaluate("new Promise(requestAnimationFrame)")
        assert one.page.locator(f'[data-edit="{edit}"]').count() == 1


def test_after_a_reload_edits_are_there_and_can_be_cancelled(browser, address):
    """Or else an edit that nobody sees would keep all others waiting; strokes that no edit has are asked about first."""
    with person(browser, address) as one:
        asked = []
        one.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        assert "drawn world" in one.page.inner_text("#model-note")
        one.fill(steps=1)
        first = one.paint()
        one.wait(first)
        one.fill(steps=1000)
        second = one.paint()
        one.wait(second, "painting")
        one.page.reload()
        one.wait(first)
        one.wait(second, "painting")
        assert asked == []
        assert one.page.locator(f'[data-edit="{second}"] .told').inner_text() == (
            "tiny world · guidance 2 · 1000 steps · DPM++ 2M Karras · seed 0"
        )
        one.page.locator(f'[data-edit="{second}"] .forget').click()
        one.wait(second, "cancelled")
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        one.page.reload()
        one.wait(first)
        assert asked == ["beforeunload"]


def test_what_is_refused_is_a_sentence_where_it_belongs(browser, address):
    """A broken picture, one of 400 million px, a mask of another size, a reference of 1 x 1; the page and the server go on."""
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    with person(browser, address, refused=4) as one:
        error = one.page.locator("#photo-error")
        one.page.set_input_files("#photo-file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
        one.page.locator("#photo-error", has_text="a.jpg").wait_for()
        one.page.set_input_files("#photo-file", {"name": "huge.png", "mimeType": "image/png", "buffer": huge.getvalue()})
        one.page.locator("#photo-error", has_text="huge.png").wait_for()
        assert error.get_attribute("role") == "alert"
        one.page.click("#paint")
        assert one.page.inner_text("#settings-error") == "Open a photo first."
        one.open(file_of(noise(64, 64), "fine.png"))
        assert error.inner_text() == ""
        assert one.page.inner_text("#settings-error") == ""
        assert one.page.inner_text("#paint-hint") == "Brush over what is to be repainted."
        one.page.set_input_files("#mask-file", EXAMPLE / "mask.png")
        one.page.locator("#photo-error", has_text="128x128").wait_for()
        one.page.evaluate("document.dispatchEvent(new DragEvent('drop', {bubbles: true, dataTransfer: new DataTransfer()}))")
        one.page.locator("#photo-error", has_text="no file").wait_for()
        one.page.set_input_files("#reference-file", [file_of(noise(1, 1), "dot.png"), file_of(noise(50, 50), "fine.png")])
        one.page.locator("#reference-error", has_text="dot.png").wait_for()
        assert one.page.locator("#thumbs li").count() == 1
        one.draw([(300, 250), (420, 260)])
        one.fill(steps=1)
        one.page.fill("#guided-to", "0")
        one.page.click("#paint")
        one.page.locator("#settings-error", has_text="guidance interval 0.0 0.0: give two shares").wait_for()
        one.page.fill("#guided-to", "1")
        one.wait(one.paint())


def test_references_are_cut_dropped_pasted_and_removed(browser, address):
    """A rectangle dragged on another photo is uploaded pixel for pixel; what is dropped or pasted goes where it belongs."""
    other = noise(80, 60, 5)
    bring = """async ([kind, selector, name]) => {
        const data = new DataTransfer(), blob = await (await fetch(`/static/example/${name}`)).blob();
        data.items.add(new File([blob], name, {type: "image/png"}));
        const options = {bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data};
        const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
        document.querySelector(selector).dispatchEvent(event);
    }"""
    with person(browser, address) as one:
        one.page.evaluate(bring, ["drop", "#welcome", "photo.png"])
        one.page.get_by_text("photo.png · 128").wait_for()
        one.page.click("#cut-open")
        one.page.locator("#cut-stage[data-scale]").wait_for()
        one.page.set_input_files("#cut-file", file_of(other, "other.png"))
        one.page.locator("#cut-from option", has_text="other.png").wait_for(state="attached")
        one.page.wait_for_function("document.querySelector('#cut-from').selectedOptions[0].text === 'other.png'")
        (x, y), (to_x, to_y) = one.draw([(300, 60), (420, 200)], "#cut-canvas")
        with one.page.expect_response(lambda answer: answer.url.endswith("/api/photos")) as told:
            one.page.click("#cut-use")
        part = picture(one.get(f"/api/photos/{told.value.json()['id']}"))
        rows, columns = mask_rules.box((x, y), (to_x, to_y), 80, 60).nonzero()
        assert np.array_equal(part, other[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
        one.page.evaluate(bring, ["paste", "body", "reference.png"])
        one.page.locator("#thumbs li").nth(1).wait_for()
        one.page.evaluate(bring, ["drop", "#references h2", "photo.png"])
        one.page.locator("#thumbs li").nth(2).wait_for()
        one.page.get_by_role("button", name="Remove other-part.png").click()
        assert one.page.locator("#thumbs img").evaluate_all("all => all.map(one => one.alt)") == ["reference.png", "photo.png"]


def test_a_result_becomes_the_photo_and_a_mask_comes_from_a_file(browser, address):
    """Edit further: the photo is then the result, byte for byte; a loaded mask is the file's, and can be taken back."""
    with person(browser, address) as one:
        one.page.click("#example")
        one.page.locator("#thumbs img").wait_for()
        one.fill(steps=1)
        first = one.paint()
        one.wait(first)
        with one.page.expect_response(lambda answer: answer.url.endswith("/api/photos")) as told:
            one.page.click(".edit .further")
        shown = picture(one.get(f"/api/photos/{told.value.json()['id']}"))
        assert np.array_equal(shown, picture(one.get(f"/api/edits/{first}/results/0")))
        one.page.get_by_text("photo-edited-0.png · 128").wait_for()
        one.page.set_input_files("#mask-file", EXAMPLE / "mask.png")
        one.page.get_by_text("30 % to be repainted").wait_for()
        one.page.keyboard.press("Control+z")
        one.page.get_by_text("nothing to be repainted").wait_for()
        one.page.keyboard.press("Control+Shift+z")
        second = one.paint()
        one.wait(second)
        assert np.array_equal(one.mask_of(second), picture((EXAMPLE / "mask.png").read_bytes()) > 0)
