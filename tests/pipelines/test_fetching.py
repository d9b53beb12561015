"""One wanted photo through all that may happen: sources in order, repeated attempts, what is asked of the bytes, refreshing."""

import asyncio
import base64
import dataclasses
import gc
import hashlib
import io
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pbe_core.errors import InputError
from pipelines.config import CrawlSettings
from pipelines.crawling import fetching, web
from pipelines.crawling.answers import Demands
from pipelines.crawling.fetching import Fetcher, PhotoResult
from pipelines.crawling.wanted import read_sources
from schemas.tables import STORED_PHOTOS, WANTED
from tests.hostile_server import LATE, MAX_PIXELS, HostileServer, good_photo

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
    whole = [{**outcome.row} for outcome in outcomes]
    pa.Table.from_pylist(whole, STORED_PHOTOS)
    return outcomes


@pytest.fixture(scope="module")
def server():
    with HostileServer() as running:
        yield running


def test_a_photo_that_comes_is_told_with_everything(server):
    settings = settings_of(server, "{url}")
    [outcome] = fetch(settings, photo_of(url=server.url("/redirect?to=/etag")))
    data = good_photo()
    assert outcome.data == data
    assert outcome.extension == "jpeg"
    row = outcome.row
    assert (row["code"], row["transient"], row["detail"], row["attempts"], row["http_status"]) == ("ok", False, None, 1, 200)
    assert (row["url"], row["source"], row["etag"]) == (server.url("/etag"), "{url}", '"v1"')
    assert (row["width"], row["height"], row["exif_orientation"], row["verified"]) == (96, 72, None, False)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert row["fetched_at"] == row["asked_at"]


def test_sources_are_tried_in_order_until_one_gives_it(server, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "abc.jpg").write_bytes(good_photo("here"))
    sources = ("{url}", "{thumbnail_url}", server.url("/good/{split}/{image_id}.jpg"), str(tmp_path))
    first, second = server.url("/status/404/first"), server.url("/html")
    [outcome] = fetch(settings_of(server, *sources), photo_of(url=first, thumbnail_url=second))
    assert outcome.row["source"] == sources[2]
    assert outcome.row["url"] == server.url("/good/train/abc.jpg")
    assert outcome.row["attempts"] == 3
    [outcome] = fetch(settings_of(server, *sources[:2], str(tmp_path)), photo_of(url=first, thumbnail_url=second))
    assert outcome.row["source"] == str(tmp_path)
    assert outcome.row["file"] == str(tmp_path / "train" / "abc.jpg")
    assert outcome.data is None  # Not copied.
    [outcome] = fetch(settings_of(server, *sources[:3]), photo_of(url=server.url("/good/direct"), thumbnail_url=second))
    assert outcome.row["url"] == server.url("/good/direct")


def test_only_what_may_pass_is_asked_again(server):
    paths = {
        "/fails/2/a": ("ok", 3),
        "/fails/3/b": ("http_5xx", 3),
        "/status/404/c": ("http_404", 1),
        "/status/503/d": ("http_5xx", 3),
        "/truncated": ("decode_error", 1),
        "/reset/e": ("connect", 3),
        "/reset-body/f": ("incomplete", 3),
        "/chain/2/r": ("ok", 1),
        "/loop/a/g": ("redirect_loop", 1),
    }
    photos = [photo_of(url=server.url(path), photo_id=f"p{number}") for number, path in enumerate(paths)]
    found = {outcome.row["photo_id"]: outcome for outcome in fetch(settings_of(server, "{url}"), *photos)}
    for number, (path, (code, attempts)) in enumerate(paths.items()):
        row = found[f"p{number}"].row
        assert (row["code"], row["attempts"]) == (code, attempts), path
        assert server.hits[path] == attempts
        assert (row["detail"] is None) == (code == "ok")


@pytest.mark.parametrize(("code", "total", "slow"), [("timeout", 0.3, 600), ("too_slow", 600, 0.2)])
def test_what_takes_too_long_is_asked_again(server, monkeypatch, code, total, slow):
    monkeypatch.setattr(web, "SLOW_SECONDS", slow)
    settings = settings_of(server, "{url}", attempts=2, total_seconds=total)
    photos = [photo_of(url=server.url(f"{path}/again")) for path, late in LATE.items() if late == code]
    for outcome in fetch(settings, *photos):
        assert (outcome.row["code"], outcome.row["transient"], outcome.row["attempts"]) == (code, True, 2)


def test_a_failure_that_may_pass_tells_more_than_one_that_may_not(server):
    """Else nobody would ask again for a photo whose first source was down for a day."""
    url = server.url("/status/500/x")
    [outcome] = fetch(settings_of(server, "{url}", "{thumbnail_url}"), photo_of(url=url, thumbnail_url=server.url("/html")))
    assert (outcome.row["code"], outcome.row["transient"], outcome.row["source"]) == ("http_5xx", True, "{url}")
    assert outcome.row["url"] == url
    assert outcome.row["http_status"] == 500
    for part in ("{url}: http_5xx", "{thumbnail_url}: not_an_image"):
        assert part in outcome.row["detail"]


def test_who_says_no_is_not_got_round_by_a_copy(server):
    sources = ("{url}", server.url("/good/copy/{image_id}"))
    [outcome] = fetch(settings_of(server, *sources), photo_of(url=server.url("/robots")))
    assert (outcome.row["code"], outcome.row["source"]) == ("opted_out", "{url}")
    assert not server.hits["/good/copy/abc"]
    [outcome] = fetch(settings_of(server, *sources, opt_out=["NoAI"]), photo_of(url=server.url("/robots")))
    assert outcome.row["code"] == "opted_out"
    first = server.url("/status/503/x")
    [outcome] = fetch(settings_of(server, "{thumbnail_url}", "{url}"), photo_of(thumbnail_url=first, url=server.url("/robots")))
    assert outcome.row["code"] == "opted_out"


def test_photos_without_the_url_that_is_asked_for(server):
    [outcome] = fetch(settings_of(server, "{url}"), photo_of())
    assert (outcome.row["code"], outcome.row["detail"]) == ("bad_url", "the tables give this photo no url")


def md5_of(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def test_an_original_must_be_what_the_metadata_say(server):
    data, url = good_photo("/good/x"), server.url("/good/x")

    def outcome_of(**known: Any) -> dict[str, Any]:
        return fetch(settings_of(server, "{url}"), photo_of(url=url, **known))[0].row

    row = outcome_of(original_md5=md5_of(data), original_bytes=len(data))
    assert (row["code"], row["verified"]) == ("ok", True)
    assert outcome_of(original_bytes=len(data))["verified"] is False
    assert outcome_of(original_md5=md5_of(b"other"))["code"] == "hash_mismatch"
    assert "MD5" in outcome_of(original_md5=md5_of(b"other"))["detail"]
    assert outcome_of(original_md5="not base64!")["code"] == "hash_mismatch"
    assert outcome_of(original_bytes=len(data) + 1)["code"] == "size_mismatch"
    # A copy elsewhere is another file.
    copy = settings_of(server, server.url("/good/{image_id}"))
    assert fetch(copy, photo_of(original_md5=md5_of(b"other"), original_bytes=1))[0].row["code"] == "ok"
    # And a person may know better.
    unchecked = settings_of(server, "{url}", check_originals=False)
    assert fetch(unchecked, photo_of(url=url, original_md5=md5_of(b"other"), original_bytes=1))[0].row["code"] == "ok"


def test_an_error_page_is_no_image_rather_than_one_with_another_hash(server):
    url = server.url("/html-as-jpeg")
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=url, original_md5=md5_of(b"x"), original_bytes=None))
    assert outcome.row["code"] == "not_an_image"
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=server.url("/heic"), original_md5=md5_of(b"x")))
    assert outcome.row["code"] == "unsupported_format"
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=server.url("/truncated"), original_md5=md5_of(b"x")))
    assert outcome.row["code"] == "hash_mismatch"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/large-png", "too_many_pixels"),
        ("/png-text", "ok"),
        ("/png-profile", "ok"),
        ("/no-end-mark", "ok"),
        ("/truncated", "decode_error"),
        ("/heic", "unsupported_format"),
        ("/html-as-jpeg", "not_an_image"),
        ("/good/small?width=96&height=63", "ok"),
        ("/good/smaller?width=80&height=56", "too_small"),
    ],
)
def test_what_the_bytes_are(server, path, code):
    demands = Demands(frame="stored", max_pixels=MAX_PIXELS, min_side=57, placeholders=frozenset())
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=server.url(path)), demands=demands)
    assert outcome.row["code"] == code
    assert (outcome.data is None) == (code != "ok")


def test_a_known_placeholder_sends_on_to_the_next_source_unless_its_md5_is_right(server):
    data = good_photo("/good/x")
    demands = Demands("stored", 1_000_000, 1, frozenset([hashlib.sha256(data).hexdigest()]))
    settings = settings_of(server, "{url}", server.url("/good/other/{image_id}"))
    photo = photo_of(url=server.url("/good/x"))
    assert fetch(settings, photo, demands=demands)[0].row["source"] == settings.sources[1]
    vouched = photo | {"original_md5": md5_of(data)}
    assert fetch(settings, vouched, demands=demands)[0].row["source"] == "{url}"
    alone = settings_of(server, "{url}")
    assert fetch(alone, photo, demands=demands)[0].row["code"] == "placeholder"


def before_of(outcome: PhotoResult) -> dict[str, Any]:
    names = [field.name for field in WANTED.field("before").type]
    return {name: outcome.row[name] for name in names} | {
        "file": "parts/x.tar",
        "offset": 512,
        "length": len(outcome.data or b""),
    }


@pytest.mark.parametrize("route", ["/etag", "/last-modified"])
def test_a_photo_that_is_there_is_asked_for_conditionally_and_kept(server, route):
    settings = settings_of(server, "{url}")
    photo = photo_of(url=server.url(route))
    [first] = fetch(settings, photo)
    [second] = fetch(settings, photo | {"before": before_of(first)})
    assert server.asked(route)[-1].headers.keys() & {"if-none-match", "if-modified-since"}
    assert second.data is None
    row = second.row
    assert (row["code"], row["http_status"], row["file"], row["offset"]) == ("ok", 304, "parts/x.tar", 512)
    for name in ("sha256", "length", "width", "fetched_at", "etag", "last_modified"):
        assert row[name] == before_of(first)[name]


def test_refreshing_keeps_what_is_the_same_replaces_what_changed_and_lets_go_of_what_is_gone(server):
    settings = settings_of(server, "{url}")
    url = server.url("/good/same")
    [first] = fetch(settings, photo_of(url=url))
    before = before_of(first)
    [same] = fetch(settings, photo_of(url=url, before=before))
    assert (same.data, same.row["file"], same.row["code"]) == (None, "parts/x.tar", "ok")
    [changed] = fetch(settings, photo_of(url=server.url("/good/changed"), before=before))
    assert changed.data == good_photo("/good/changed")
    assert changed.row["file"] is None
    [gone] = fetch(settings, photo_of(url=server.url("/status/410/x"), before=before))
    assert (gone.row["code"], gone.row["file"]) == ("http_410", None)
    [opted_out] = fetch(settings, photo_of(url=server.url("/robots"), before=before))
    assert opted_out.row["code"] == "opted_out"
    [down] = fetch(settings, photo_of(url=server.url("/status/503/x"), before=before))
    assert (down.row["code"], down.row["transient"], down.row["file"], down.row["url"]) == ("ok", False, "parts/x.tar", url)
    assert "503" in down.row["detail"]
    [login] = fetch(settings, photo_of(url=server.url("/html"), before=before))
    assert (login.row["code"], login.row["file"], login.row["url"]) == ("ok", "parts/x.tar", url)
    assert "a page: text/html" in login.row["detail"]


def test_photos_in_folders_and_tars_are_used_where_they_lie(tmp_path):
    """And no connection is as much as prepared."""
    (tmp_path / "photos" / "train_a").mkdir(parents=True)
    (tmp_path / "photos" / "train_a" / "abc.jpg").write_bytes(good_photo("a"))
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        info = tarfile.TarInfo("train/def.jpg")
        info.size = len(good_photo("d"))
        tar.addfile(info, io.BytesIO(good_photo("d")))
    settings = settings_of(None, str(tmp_path / "photos"), str(tmp_path / "*.tar"), contact=None)
    in_tar = {"tar": str(tmp_path / "some.tar"), "tar_offset": 512, "tar_length": len(good_photo("d"))}

    async def run() -> list[PhotoResult]:
        async with Fetcher(read_sources(settings), settings, DEMANDS) as fetcher:
            assert fetcher.web is None
            assert fetcher.buckets is None
            photos = [photo_of(), photo_of(photo_id="def", **in_tar), photo_of(photo_id="nowhere")]
            return [await fetcher.fetch(photo) for photo in photos]

    found, tarred, missing = asyncio.run(run())
    assert (found.row["file"], found.row["offset"]) == (str(tmp_path / "photos" / "train_a" / "abc.jpg"), 0)
    assert found.row["length"] == len(good_photo("a"))
    assert (tarred.row["file"], tarred.row["offset"], tarred.row["length"]) == tuple(in_tar.values())
    assert found.data is tarred.data is None
    assert (missing.row["code"], missing.row["attempts"]) == ("missing", 2)
    assert "nowhere.jpg" in missing.row["detail"]


def test_a_local_file_has_a_limit_too(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "abc.jpg").write_bytes(bytes(2000))
    settings = settings_of(None, str(tmp_path), max_bytes=1999)
    assert fetch(settings, photo_of())[0].row["code"] == "too_large"


def test_no_name_leads_out_of_the_folder(tmp_path):
    """The readers refuse such names; what slips through is an id of a file that is not there."""
    (tmp_path / "secret.jpg").write_bytes(good_photo())
    (tmp_path / "photos").mkdir()
    settings = settings_of(None, str(tmp_path / "photos"))
    assert fetch(settings, photo_of(photo_id="../secret", split="."))[0].row["code"] == "missing"
    assert fetch(settings, photo_of(file_name="../secret.jpg"))[0].row["code"] == "missing"


def test_an_error_that_nobody_foresaw_costs_one_photo(server, monkeypatch):
    from pipelines.crawling import fetching

    def broken(data: bytes, *_: Any) -> None:
        raise ZeroDivisionError("who would have thought")

    monkeypatch.setattr(fetching, "inspect", broken)
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=server.url("/good/x")))
    assert (outcome.row["code"], outcome.row["transient"], outcome.row["attempts"]) == ("unexpected", True, 1)
    assert outcome.row["detail"] == "ZeroDivisionError: who would have thought"


def test_no_more_photos_are_in_flight_than_connections():
    """The server answers nobody until five ask."""
    with HostileServer() as server:
        server.answers = 0
        settings = settings_of(server, "{url}", connections=5)
        photos = [photo_of(url=server.url(f"/good/pause/{number}?pause=0.05"), photo_id=f"p{number}") for number in range(40)]

        async def run() -> list[PhotoResult]:
            async with Fetcher(read_sources(settings), settings, DEMANDS) as fetcher:
                tasks = [asyncio.create_task(fetcher.fetch(photo)) for photo in photos]
                while len(server.requests) < 5:
                    await asyncio.sleep(0.01)
                server.answers = len(photos)
                return [await task for task in tasks]

        assert {outcome.row["code"] for outcome in asyncio.run(run())} == {"ok"}
        assert server.most_at_once("/good/pause/") == 5


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


def test_exif_is_told_and_heeded_where_the_boxes_frame_asks_for_it(tmp_path):
    (tmp_path / "train").mkdir()
    image = Image.fromarray(np.zeros((80, 120, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "train" / "abc.jpg", exif=exif)
    for frame in ("stored", "exif"):
        [outcome] = fetch(settings_of(None, str(tmp_path)), photo_of(), demands=Demands(frame, 10**6, 64, frozenset()))
        assert (outcome.row["exif_orientation"], outcome.row["width"], outcome.row["height"]) == (6, 120, 80)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://host/photos/", r"the same for every photo; put \{split\} and \{image_id\}"),
        ("https://host/{imag_id}.jpg", r"nothing is called \{imag_id\} \(did you mean \{image_id\}\?\)"),
        ("https://host/{}.jpg", r"nothing is called \{\}"),
        ("https://host/{split", "expected '}'"),
        ("https://{split}.host/{image_id}", "the host must be the same"),
        ("https://host/{url}", "is a whole URL; give it alone"),
        ("ftp://host/{image_id}.jpg", "ftp:// is not read"),
        ("/no/such/folder", "no such folder"),
        ("/no/such/*.tar", "no such file"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(InputError, match=message):
        read_sources(settings_of(None, source))


def test_web_servers_are_told_whom_to_write_to(server):
    for source in ("{url}", "https://host/{image_id}"):
        with pytest.raises(InputError, match=r"build\.crawl\.contact is not set.*--crawl\.contact"):
            read_sources(settings_of(None, source, contact=None))
    fetch(settings_of(server, "{url}"), photo_of(url=server.url("/good/agent")))
    assert server.asked("/good/agent")[0].headers["user-agent"].startswith("paint-by-example/")
    assert server.asked("/good/agent")[0].headers["user-agent"].endswith("(+a@b.c)")


def test_file_names_become_parts_of_urls(server):
    [outcome] = fetch(settings_of(server, server.url("/good/{file_name}")), photo_of(file_name="my cats/Ä #1?.jpg"))
    assert outcome.row["code"] == "ok"
    assert server.hits["/good/my%20cats/%C3%84%20%231%3F.jpg"] == 1


def test_the_bytes_tell_the_format_whatever_the_name_and_the_server_say():
    files = {}
    for kind in ("PNG", "AVIF", "JPEG2000", "ICO"):
        file = io.BytesIO()
        Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(file, kind, **({"sizes": [(120, 80)]} if kind == "ICO" else {}))
        files[f"{kind}.jpg"] = file.getvalue()
    with HostileServer(files) as other:
        photos = [photo_of(url=other.url(f"/photos/{name}"), key=number) for number, name in enumerate(files)]
        outcomes = fetch(settings_of(other, "{url}"), *photos)
        accepted = {request.headers["accept"] for request in other.requests}
    assert {outcome.extension: outcome.row["code"] for outcome in outcomes} == dict.fromkeys(("png", "avif", "jp2", "ico"), "ok")
    assert all("image/avif" in header and "image/jpeg" in header for header in accepted)


def test_a_jpeg_without_an_end_mark_is_refused_where_that_is_asked_for(server):
    demands = dataclasses.replace(DEMANDS, missing_end_mark="refuse")
    [outcome] = fetch(settings_of(server, "{url}"), photo_of(url=server.url("/no-end-mark")), demands=demands)
    assert outcome.row["code"] == "no_end_mark"
    assert "source.missing_end_mark: accept takes it" in outcome.row["detail"]


def test_a_tar_that_was_cut_since_it_was_scanned(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    settings = settings_of(None, str(tmp_path / "a.tar"))
    [outcome] = fetch(settings, photo_of(tar=str(tmp_path / "a.tar"), tar_offset=512, tar_length=10_000))
    assert (outcome.row["code"], "shorter than when it was scanned" in outcome.row["detail"]) == ("missing", True)


def test_paths_of_sources_do_not_depend_on_where_a_worker_starts(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    [source] = read_sources(settings_of(None, "photos"))
    assert source.paths == (Path(tmp_path / "photos"),)


def test_what_a_failed_photo_held_is_let_go_at_once(tmp_path, monkeypatch):
    """Not when garbage is collected next: until then thousands of damaged photos would fill the memory."""
    gone: list[int] = []

    class Bytes(bytes):
        def __del__(self) -> None:
            gone.append(len(self))

    read = fetching._read_range
    monkeypatch.setattr(fetching, "_read_range", lambda *arguments: Bytes(read(*arguments)))
    data = good_photo()[:-300]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "abc.jpg").write_bytes(data)
    gc.disable()
    try:
        outcomes = fetch(settings_of(None, str(tmp_path)), photo_of(), photo_of(key=8))
        for _ in range(6000):  # The thread that has looked at it lets go a moment later.
            if len(gone) < 2:
                time.sleep(0.01)
        assert gone == [len(data)] * 2
    finally:
        gc.enable()
    assert [outcome.row["code"] for outcome in outcomes] == ["decode_error"] * 2
