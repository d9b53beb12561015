"""One wanted photo through all that may happen: sources in order, repeated attempts, what is asked of the bytes, refreshing."""

import asyncio
import base64
import gc
import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.config import CrawlSettings
from pipelines.crawling import fetching, web
from pipelines.crawling.answers import Demands
from pipelines.crawling.fetching import Fetcher, PhotoResult
from pipelines.crawling.wanted import read_sources
from schemas.tables import STORED_PHOTOS, WANTED
from tests.hostile_server import MAX_PIXELS, HostileServer, good_photo

NO_LIMITS = {"requests_per_second": 1e6, "concurrency": 1000, "failures": 1_000_000}
DEMANDS = Demands(frame="stored", max_pixels=MAX_PIXELS, min_side=64, placeholders=frozenset())


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No limit of time is near, and nobody waits long before the next attempt."""
    monkeypatch.setattr(web, "CONNECT_SECONDS", 600)
    monkeypatch.setattr(web, "SLOW_SECONDS", 600)
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.01)


def photo_of(**known: Any) -> dict[str, Any]:
    return dict.fromkeys(WANTED.names) | {"key": 7, "split": "train", "photo_id": "abc"} | known


def settings_of(server: HostileServer | None, *sources: str, **options: Any) -> CrawlSettings:
    allowed = (f"127.0.0.1:{server.port}",) if server else ()
    given = {"attempts": 3, "total_seconds": 600, "per_host": NO_LIMITS, "contact": "a@b.c", **options}
    return CrawlSettings(sources=sources, allowed_addresses=allowed, **given)


def fetch(settings: CrawlSettings, *photos: dict[str, Any], demands: Demands = DEMANDS) -> list[PhotoResult]:
    async def run() -> list[PhotoResult]:
        async with Fetcher(read_sources(settings), settings, demands) as fetcher:
            return await asyncio.gather(*(fetcher.fetch(photo) for photo in photos))

    outcomes = asyncio.run(run())
    # Whatever became of them, the rows fit into the table.
    pa.Table.from_pylist([{**outcome.row} for outcome in outcomes], STORED_PHOTOS)
    return outcomes


def row_of(settings: CrawlSettings, photo: dict[str, Any], demands: Demands = DEMANDS) -> dict[str, Any]:
    return fetch(settings, photo, demands=demands)[0].row


def in_folder(folder: Path, data: bytes) -> CrawlSettings:
    """Settings of a folder that has `photo_of()`."""
    (folder / "train").mkdir()
    (folder / "train" / "abc.jpg").write_bytes(data)
    return settings_of(None, str(folder), contact=None)


@pytest.fixture(scope="module")
def server():
    with HostileServer() as running:
        yield running


def test_a_photo_that_comes_is_told_with_everything(server):
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=server.url("/redirect?to=/etag")))
    data = good_photo()
    assert (outcome.data, outcome.extension) == (data, "jpeg")
    row = outcome.row
    assert (row["code"], row["transient"], row["detail"], row["attempts"], row["http_status"]) == ("ok", False, None, 1, 200)
    assert (row["url"], row["source"], row["etag"]) == (server.url("/etag"), "{url}", '"v1"')
    assert (row["width"], row["height"], row["exif_orientation"], row["verified"]) == (96, 72, None, False)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert row["fetched_at"] == row["asked_at"]


def test_sources_are_tried_in_order_until_one_gives_it(server, tmp_path):
    here = in_folder(tmp_path, good_photo("here")).sources[0]
    sources = ("{url}", "{thumbnail_url}", server.url("/good/{split}/{file_name}"), here)
    photo = photo_of(url=server.url("/status/404/first"), thumbnail_url=server.url("/html"), file_name="my cats/Ä #1?.jpg")
    row = row_of(settings_of(server, *sources), photo)
    assert (row["source"], row["attempts"]) == (sources[2], 3)
    assert row["url"] == server.url("/good/train/my%20cats/%C3%84%20%231%3F.jpg")  # File names become parts of URLs.
    [outcome] = fetch(settings_of(server, *sources[:2], here), photo | {"file_name": None})
    assert (outcome.row["source"], outcome.data) == (here, None)  # Not copied.
    assert outcome.row["file"] == str(tmp_path / "train" / "abc.jpg")
    assert row_of(settings_of(server, *sources), photo | {"url": server.url("/good/direct")})["attempts"] == 1


def test_only_what_may_pass_is_asked_again(server):
    paths = {
        "/fails/2/a": ("ok", 3),
        "/fails/3/b": ("http_5xx", 3),
        "/status/404/c": ("http_404", 1),
        "/truncated": ("decode_error", 1),
        "/reset/e": ("connect", 3),
        "/reset-body/f": ("incomplete", 3),
        "/loop/a/g": ("redirect_loop", 1),
    }
    before = {path: server.hits[path] for path in paths}
    photos = [photo_of(url=server.url(path), photo_id=path) for path in paths]
    found = {outcome.row["photo_id"]: outcome.row for outcome in fetch(settings_of(server, "{url}"), *photos)}
    assert {path: (row["code"], row["attempts"]) for path, row in found.items()} == paths
    assert {path: server.hits[path] - before[path] for path in paths} == {path: attempts for path, (_, attempts) in paths.items()}
    assert all((row["detail"] is None) == (row["code"] == "ok") for row in found.values())


def test_a_failure_that_may_pass_tells_more_than_one_that_may_not(server):
    """Else nobody would ask again for a photo whose first source was down for a day."""
    url = server.url("/status/500/x")
    row = row_of(settings_of(server, "{url}", "{thumbnail_url}"), photo_of(url=url, thumbnail_url=server.url("/html")))
    assert (row["code"], row["transient"], row["source"]) == ("http_5xx", True, "{url}")
    assert (row["url"], row["http_status"]) == (url, 500)
    assert row["detail"].startswith("{url}: http_5xx")
    assert "{thumbnail_url}: not_an_image" in row["detail"]
    row = row_of(settings_of(server, "{url}"), photo_of())
    assert (row["code"], row["detail"]) == ("bad_url", "the tables give this photo no url")


def test_who_says_no_is_not_got_round_by_a_copy(server):
    robots = server.url("/headers?X-Robots-Tag=noai")
    settings = settings_of(server, "{url}", server.url("/good/copy/{image_id}"))
    row = row_of(settings, photo_of(url=robots))
    assert (row["code"], row["source"], server.hits["/good/copy/abc"]) == ("opted_out", "{url}", 0)
    first = server.url("/status/503/x")
    assert (
        row_of(settings_of(server, "{thumbnail_url}", "{url}"), photo_of(thumbnail_url=first, url=robots))["code"] == "opted_out"
    )


def md5_of(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@pytest.mark.parametrize(
    ("path", "known", "code", "verified"),
    [
        ("/good/x", {"original_md5": md5_of(good_photo("/good/x")), "original_bytes": len(good_photo("/good/x"))}, "ok", True),
        ("/good/x", {"original_bytes": len(good_photo("/good/x"))}, "ok", False),
        ("/good/x", {"original_bytes": 1}, "size_mismatch", None),
        ("/good/x", {"original_md5": md5_of(b"other")}, "hash_mismatch", None),
        ("/good/x", {"original_md5": "not base64!"}, "hash_mismatch", None),
        # What is no photo has another hash, too: that it is none tells more.
        ("/html-as-jpeg", {"original_md5": md5_of(b"x")}, "not_an_image", None),
        ("/heic", {"original_md5": md5_of(b"x")}, "unsupported_format", None),
        ("/truncated", {"original_md5": md5_of(b"x")}, "hash_mismatch", None),
    ],
)
def test_an_original_must_be_what_the_metadata_say(server, path, known, code, verified):
    photo = photo_of(url=server.url(path), **known)
    row = row_of(settings_of(server, "{url}"), photo)
    assert (row["code"], row["verified"]) == (code, verified)
    if path == "/good/x":  # A copy elsewhere is another file, and a person may know better.
        assert row_of(settings_of(server, server.url("/good/{image_id}")), photo)["code"] == "ok"
        assert row_of(settings_of(server, "{url}", check_originals=False), photo)["code"] == "ok"


def test_what_the_bytes_are(server):
    expected = {
        "/large-png": "too_many_pixels",
        "/png-text": "ok",
        "/png-profile": "ok",
        "/no-end-mark": "ok",
        "/truncated": "decode_error",
        "/good/small?width=96&height=63": "ok",
        "/good/smaller?width=80&height=56": "too_small",
    }
    photos = [photo_of(url=server.url(path), photo_id=path) for path in expected]
    outcomes = fetch(settings_of(server, "{url}"), *photos, demands=replace(DEMANDS, min_side=57))
    assert {outcome.row["photo_id"]: outcome.row["code"] for outcome in outcomes} == expected
    assert all((outcome.data is None) == (outcome.row["code"] != "ok") for outcome in outcomes)
    refusing = replace(DEMANDS, missing_end_mark="refuse")
    assert row_of(settings_of(server, "{url}"), photo_of(url=server.url("/no-end-mark")), refusing)["code"] == "no_end_mark"


def test_a_known_placeholder_sends_on_to_the_next_source_unless_its_md5_is_right(server):
    data = good_photo("/good/x")
    demands = replace(DEMANDS, placeholders=frozenset([hashlib.sha256(data).hexdigest()]))
    settings = settings_of(server, "{url}", server.url("/good/other/{image_id}"))
    photo = photo_of(url=server.url("/good/x"))
    assert row_of(settings, photo, demands)["source"] == settings.sources[1]
    assert row_of(settings, photo | {"original_md5": md5_of(data)}, demands)["source"] == "{url}"
    assert row_of(settings_of(server, "{url}"), photo, demands)["code"] == "placeholder"


def before_of(outcome: PhotoResult) -> dict[str, Any]:
    names = [field.name for field in WANTED.field("before").type]
    place = {"file": "parts/x.tar", "offset": 512, "length": len(outcome.data or b"")}
    return {name: outcome.row[name] for name in names} | place


@pytest.mark.parametrize("route", ["/etag", "/last-modified"])
def test_a_photo_that_is_there_is_asked_for_conditionally_and_kept(server, route):
    settings, photo = settings_of(server, "{url}"), photo_of(url=server.url(route))
    [first] = fetch(settings, photo)
    [second] = fetch(settings, photo | {"before": before_of(first)})
    assert server.asked(route)[-1].headers.keys() & {"if-none-match", "if-modified-since"}
    assert second.data is None
    row = second.row
    assert (row["code"], row["http_status"], row["file"], row["offset"]) == ("ok", 304, "parts/x.tar", 512)
    for name in ("sha256", "length", "width", "fetched_at", "etag", "last_modified"):
        assert row[name] == before_of(first)[name]


def test_refreshing_keeps_what_is_the_same_replaces_what_changed_and_lets_go_of_what_is_gone(server):
    settings, url = settings_of(server, "{url}"), server.url("/good/same")
    [first] = fetch(settings, photo_of(url=url))

    def again(path: str) -> PhotoResult:
        return fetch(settings, photo_of(url=server.url(path), before=before_of(first)))[0]

    same = again("/good/same")
    assert (same.data, same.row["file"], same.row["code"]) == (None, "parts/x.tar", "ok")
    changed = again("/good/changed")
    assert (changed.data, changed.row["file"]) == (good_photo("/good/changed"), None)
    gone = again("/status/410/x")
    assert (gone.row["code"], gone.row["file"]) == ("http_410", None)
    assert again("/headers?X-Robots-Tag=noai").row["code"] == "opted_out"
    for path, why in (("/status/503/x", "503"), ("/html", "a page: text/html")):  # Down, or a login, today.
        row = again(path).row
        assert (row["code"], row["transient"], row["file"], row["url"]) == ("ok", False, "parts/x.tar", url)
        assert why in row["detail"]


# Photos that lie here.


def test_photos_in_folders_and_tars_are_used_where_they_lie(tmp_path):
    """And no connection is as much as prepared."""
    settings = in_folder(tmp_path, good_photo("a"))
    (tmp_path / "some.tar").write_bytes(bytes(512) + good_photo("d"))
    settings = settings_of(None, *settings.sources, str(tmp_path / "*.tar"), contact=None)
    in_tar = {"tar": str(tmp_path / "some.tar"), "tar_offset": 512, "tar_length": len(good_photo("d"))}

    async def run() -> list[PhotoResult]:
        async with Fetcher(read_sources(settings), settings, DEMANDS) as fetcher:
            assert fetcher.web is None
            assert fetcher.buckets is None
            cut = {**in_tar, "tar_length": 100_000}
            photos = [photo_of(), *(photo_of(photo_id="def", **place) for place in (in_tar, {}, cut))]
            return [await fetcher.fetch(photo) for photo in photos]

    found, tarred, missing, cut = asyncio.run(run())
    assert (found.row["file"], found.row["offset"]) == (str(tmp_path / "train" / "abc.jpg"), 0)
    assert found.row["length"] == len(good_photo("a"))
    assert (tarred.row["file"], tarred.row["offset"], tarred.row["length"]) == tuple(in_tar.values())
    assert found.data is tarred.data is None
    assert (missing.row["code"], missing.row["attempts"]) == ("missing", 2)
    assert "def.jpg" in missing.row["detail"]
    assert (cut.row["code"], "shorter than when it was scanned" in cut.row["detail"]) == ("missing", True)
    assert row_of(settings_of(None, str(tmp_path), max_bytes=99), photo_of())["code"] == "too_large"


def test_no_name_leads_out_of_the_folder(tmp_path):
    """The readers refuse such names; what slips through is an id of a file that is not there."""
    (tmp_path / "secret.jpg").write_bytes(good_photo())
    (tmp_path / "photos").mkdir()
    settings = settings_of(None, str(tmp_path / "photos"))
    assert row_of(settings, photo_of(photo_id="../secret", split="."))["code"] == "missing"
    assert row_of(settings, photo_of(file_name="../secret.jpg"))["code"] == "missing"


# What a process has at hand.


def test_an_error_that_nobody_foresaw_costs_one_photo(server, monkeypatch):
    def broken(data: bytes, *_: Any) -> None:
        raise ZeroDivisionError("who would have thought")

    monkeypatch.setattr(fetching, "inspect", broken)
    row = row_of(settings_of(server, "{url}"), photo_of(url=server.url("/good/x")))
    assert (row["code"], row["transient"], row["attempts"]) == ("unexpected", True, 1)
    assert row["detail"] == "ZeroDivisionError: who would have thought"


def test_photos_wait_outside_while_too_many_are_not_yet_inspected(server, monkeypatch):
    """Photos come faster than one core decodes them: what is in memory must not grow."""
    go_on = threading.Event()
    real = fetching.inspect

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(600)
        return real(*arguments)

    monkeypatch.setattr(fetching, "inspect", slow)
    settings = settings_of(server, "{url}", connections=4)
    photos = [photo_of(url=server.url(f"/good/queue/{number}"), photo_id=f"p{number}") for number in range(60)]

    async def run() -> int:
        async with Fetcher(read_sources(settings), settings, DEMANDS) as fetcher:
            tasks = [asyncio.create_task(fetcher.fetch(photo)) for photo in photos]
            while fetcher.limits.has_room.is_set() or fetcher.limits.asking:
                await asyncio.sleep(0.01)
            before = len(server.asked("/good/queue/"))
            for _ in range(10):  # Others have their turn, and ask for nothing.
                await asyncio.sleep(0.01)
            assert len(server.asked("/good/queue/")) == before
            go_on.set()
            assert {outcome.row["code"] for outcome in await asyncio.gather(*tasks)} == {"ok"}
            return before

    assert 4 <= asyncio.run(run()) <= 8


def test_what_a_failed_photo_held_is_let_go_at_once(tmp_path, monkeypatch):
    """Not when garbage is collected next: until then thousands of damaged photos would fill the memory."""
    gone: list[int] = []

    class Bytes(bytes):
        def __del__(self) -> None:
            gone.append(len(self))

    read = fetching._read_range
    monkeypatch.setattr(fetching, "_read_range", lambda *arguments: Bytes(read(*arguments)))
    data = good_photo()[:-300]
    settings = in_folder(tmp_path, data)
    gc.disable()
    try:
        outcomes = fetch(settings, photo_of(), photo_of(key=8))
        for _ in range(6000):  # The thread that has looked at it lets go a moment later.
            if len(gone) < 2:
                time.sleep(0.01)
        assert gone == [len(data)] * 2
    finally:
        gc.enable()
    assert [outcome.row["code"] for outcome in outcomes] == ["decode_error"] * 2
