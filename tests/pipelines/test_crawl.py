"""The whole crawl against real servers: what it leaves, asks for again and refuses. On Ray: test_crawl_workers.py."""

import base64
import csv
import hashlib
import json
import re
import shutil
import socket
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pbe_core.errors import InputError
from pbe_core.photo_files import PhotoStore
from pbe_core.settings import load_settings, preset
from pipelines import crawl
from pipelines.annotations import open_source
from pipelines.config import BuildSettings
from schemas.outcomes import OK, OUTCOMES, TRANSIENT
from tests.conftest import build_options, run_build
from tests.crawl_world import Done, call_crawl, codes_of, crawl_here, crawl_options, rows_of, summary_of, write_tables
from tests.hostile_server import LATE, MAX_BYTES, MAX_PIXELS, HostileServer, good_photo

ATTEMPTS = 2
GONE = good_photo("this photo is no longer available", 64, 64)


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    """What becomes of photos does not depend on the process that gets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crawl, "crawl_on_ray", crawl_here)
        yield


def assert_counts_balance(done: Done, store: Path, wanted: int) -> None:
    """Wanted = ok + each code + those not asked for yet: as printed, and as the tables say."""
    said = summary_of(done)
    assert said.pop("wanted") == wanted == sum(said.values())
    codes = codes_of(store)
    assert said == Counter(codes.values())
    assert set(rows_of(store, "index")) == {photo for photo, code in codes.items() if code == OK}
    failures = {photo: row["code"] for photo, row in rows_of(store, "failures").items()}
    assert failures == {photo: code for photo, code in codes.items() if code != OK}


# A web full of everything.


@dataclass(frozen=True)
class Case:
    """A photo, and what must become of it."""

    url: str
    code: str
    data: bytes | None = None
    """Its bytes, where they come."""
    known: dict[str, object] = field(default_factory=dict)
    """What the metadata say of it."""


# Path -> code; test_web.py has more of them. Each is asked for with a word of its own at the end of the path.
FAILURES = {
    "/status/204": "http_other",
    "/status/403": "http_403",
    "/status/404": "http_404",
    "/status/410": "http_410",
    "/status/418": "http_4xx",
    "/status/429": "http_429",
    "/fails/2": "http_5xx",
    "/reset": "connect",
    "/reset-body": "incomplete",
    "/garbage": "bad_response",
    "/html-as-jpeg": "not_an_image",
    "/redirect?to=/html": "not_an_image",
    "/heic": "unsupported_format",
    "/no-end-mark": "no_end_mark",
    "/large-png": "too_many_pixels",
    "/large-stream": "too_large",
    "/truncated": "decode_error",
    "/good?width=96&height=56": "too_small",
    "/headers?X-Robots-Tag=noai": "opted_out",
    "/loop/a": "redirect_loop",
    "/redirect?to=http://169.254.169.254/latest/meta-data/": "blocked_address",
    "/redirect?to=http://0x7f.1:{decoy}/good": "blocked_address",
    "/redirect?to=file:///etc/passwd": "blocked_scheme",
}
OUTSIDE = {
    "": "bad_url",
    "photo.jpg": "bad_url",
    "file:///etc/passwd": "blocked_scheme",
    "http://127.0.0.1:{decoy}/good/a": "blocked_address",
    "http://localhost:{decoy}/good/a": "blocked_address",
    "http://[::1]:{port}/good/a": "blocked_address",
    "http://169.254.169.254/latest/meta-data/": "blocked_address",
    "http://no-such-host.invalid/photo.jpg": "dns",
    "http://127.0.0.1:{closed}/photo.jpg": "connect",
    "https://127.0.0.1:{tls}/good/a": "tls",
}
# Another photo for each path; and the same photo for all, which the metadata's MD5 vouches for.
GOOD = ("/good", "/good/b", "/fails/1", "/busy/1?retry-after=0", "/good?pause=0.3")
VOUCHED = (
    *("/chunked", "/until-closed", "/gzip-photo", "/etag", "/last-modified", "/interim", "/headers?ETag=%22%E9%22"),
    *("/headers?X-Robots-Tag=all", "/redirect?to=/chunked", "/deflate-photo", "/gzip-in-members"),
)


def md5_of(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def with_word(path: str, word: object) -> str:
    path, mark, query = path.partition("?")
    return f"{path}/{word}{mark}{query}"


def all_cases(server: HostileServer, ports: Mapping[str, int]) -> dict[str, Case]:
    """Photo id -> case, in an order that mixes them."""
    cases: list[Case] = []
    for path, code in FAILURES.items():
        cases.append(Case(server.url(with_word(path, "no").replace("{decoy}", str(ports["decoy"]))), code))
    for number, path in enumerate(GOOD):
        target = with_word(path, number)
        cases.append(Case(server.url(target), OK, good_photo(target.partition("?")[0])))
    for path in VOUCHED:
        known: dict[str, object] = {"OriginalMD5": md5_of(good_photo()), "OriginalSize": len(good_photo())}
        cases.append(Case(server.url(with_word(path, "known")), OK, good_photo(), known))
    thumbnail = {"Thumbnail300KURL": server.url("/good/thumbnail")}
    cases.append(Case(server.url("/status/404/thumbnail"), OK, good_photo("/good/thumbnail"), thumbnail))
    cases.append(Case(server.url("/good/size"), "size_mismatch", known={"OriginalSize": 999}))
    cases.append(Case(server.url("/good/md5"), "hash_mismatch", known={"OriginalMD5": md5_of(b"another photo")}))
    for url, code in OUTSIDE.items():
        cases.append(Case(url.format_map(ports), code))
    for number in range(12):
        cases.append(Case(server.url(f"/photos/gone.jpg?id={number}"), "placeholder"))
    cases.sort(key=lambda case: hashlib.sha256(case.url.encode()).digest())
    return {f"{number:016x}": case for number, case in enumerate(cases)}


@dataclass
class Mixed:
    """A crawl of all of it."""

    server: HostileServer
    decoy: HostileServer
    cases: dict[str, Case]
    options: list[str]
    store: Path
    done: Done
    asked: Counter[str]
    """Path and query -> requests of this first crawl."""


@pytest.fixture(scope="module")
def mixed(without_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    with (
        HostileServer({"gone.jpg": GONE}) as server,
        HostileServer() as decoy,
        HostileServer(tls=True) as tls,
        socket.socket() as nobody,
    ):
        nobody.bind(("127.0.0.1", 0))  # Bound, and not listening: connections are refused, and nobody else gets the port.
        closed = nobody.getsockname()[1]
        cases = all_cases(server, {"port": server.port, "decoy": decoy.port, "tls": tls.port, "closed": closed})
        metadata = {photo: case.known for photo, case in cases.items()}
        tables = write_tables(folder / "tables", {photo: case.url for photo, case in cases.items()}, metadata)
        allowed = [f"127.0.0.1:{port}" for port in (server.port, tls.port, closed)]
        more = {"crawl.allowed_addresses": json.dumps(allowed), "crawl.attempts": ATTEMPTS, "crawl.photos_per_part": 25}
        more |= {"crawl.max_bytes": MAX_BYTES, "source.max_photo_pixels": MAX_PIXELS}
        more |= {"source.same_photo": "report", "source.missing_end_mark": "refuse"}
        # Few photos have a thumbnail; that of the others, which is not there, must not hide why the photo itself did not come.
        options = crawl_options(tables, folder / "store", folder / "out", None, ["{url}", "{thumbnail_url}"], more)
        done = call_crawl(options)
        asked = Counter(request.target for request in server.requests)
        yield Mixed(server, decoy, cases, options, folder / "store", done, asked)


def test_every_photo_ends_as_it_must_and_the_counts_balance(mixed):
    status = rows_of(mixed.store, "status")
    expected = {photo: case.code for photo, case in mixed.cases.items()}
    wrong = {mixed.cases[photo].url: (code, status[photo]) for photo, code in expected.items() if status[photo]["code"] != code}
    assert not wrong
    # Nothing is left out of the test: each outcome but those of local files, buckets and our own mistakes. Those that take too
    # long need short limits, which a busy machine exceeds with the others, too: test_fetching.py has them.
    assert set(expected.values()) == set(OUTCOMES) - {"missing", "credentials", "unexpected", *LATE.values()}
    assert_counts_balance(mixed.done, mixed.store, len(mixed.cases))
    later = sum(case.code in TRANSIENT for case in mixed.cases.values())
    assert f"{later:,} photos may come another time: pipelines/crawl.py with the same settings and --retry" in mixed.done.stdout
    for row in rows_of(mixed.store, "failures").values():
        assert row["transient"] == (row["code"] in TRANSIENT)
        assert row["detail"]


def test_photos_are_the_bytes_that_the_server_sent(mixed):
    photos, index = PhotoStore(mixed.store), rows_of(mixed.store, "index")
    for photo, case in mixed.cases.items():
        if case.data is not None:
            assert photos.read("train", photo) == case.data, case.url
            assert index[photo]["sha256"] == hashlib.sha256(case.data).hexdigest()
            assert index[photo]["verified"] == ("OriginalMD5" in case.known)
            assert index[photo]["source"] == ("{thumbnail_url}" if "/thumbnail" in case.url else "{url}")


def test_nothing_is_asked_that_must_not_be(mixed):
    """And no more often than need be."""
    assert mixed.decoy.connections == 0
    assert not [request.target for request in mixed.server.requests if "passwd" in request.path or "meta-data" in request.path]
    attempts = {photo: row["attempts"] for photo, row in rows_of(mixed.store, "status").items()}
    for photo, case in mixed.cases.items():
        again = case.code in TRANSIENT or "/fails/1/" in case.url or "/busy/1/" in case.url or "/thumbnail" in case.url
        # A placeholder was last looked for at the second source, for which the tables give no URL.
        asked = case.url and case.code != "placeholder"
        assert attempts[photo] == (ATTEMPTS if again else 1 if asked else 0), case.url
        target = case.url.removeprefix(mixed.server.url(""))
        if case.code == "placeholder":  # Seen only when all had come; then another source might have had the photo.
            assert mixed.asked[target] == 1
        elif target.startswith("/") and "/thumbnail" not in target:
            assert mixed.asked[target] == attempts[photo], case.url


def test_a_second_run_asks_for_nothing_and_the_store_is_whole(mixed):
    before = len(mixed.server.requests)
    assert summary_of(call_crawl(mixed.options)) == summary_of(mixed.done)
    assert len(mixed.server.requests) == before
    done = call_crawl([*mixed.options, "--verify"])
    photos = sum(case.code == OK for case in mixed.cases.values())
    assert f"{mixed.store}: {photos} photos, all of them whole and where the index says" in done.stdout
    assert not list(mixed.store.rglob("*.tmp"))


def test_asking_again_is_for_those_that_are_named(mixed, tmp_path, monkeypatch):
    """Those whose failure may have passed, and then those of one code. A known placeholder is not stored again."""
    store = tmp_path / "store"
    shutil.copytree(mixed.store, store)
    for folder in (store, store / "parts", store / "rounds"):  # As a run leaves them that was killed.
        (folder / f".000001-000001.parquet.{'0' * 32}.tmp").write_bytes(b"begun")
    options = [*mixed.options, "--source.photos", str(store)]
    later = {photo: case for photo, case in mixed.cases.items() if case.code in TRANSIENT}
    here = {photo: case.url.partition("?")[0].removeprefix(mixed.server.url("")) for photo, case in later.items()}
    here = {photo: path for photo, path in here.items() if path.startswith("/")}
    for path in here.values():
        monkeypatch.setitem(mixed.server._behaves, path, f"/good{path}")
    unlucky = next(iter(here))
    monkeypatch.setitem(mixed.server._behaves, here[unlucky], "/photos/gone.jpg")
    before = Counter(mixed.server.hits)
    done = call_crawl([*options, "--retry", "transient"])
    assert mixed.server.hits - before == Counter(here.values())
    assert_counts_balance(done, store, len(mixed.cases))
    codes = codes_of(store)
    for photo, case in mixed.cases.items():
        expected = "placeholder" if photo == unlucky else OK if photo in here else case.code
        assert codes[photo] == expected, case.url
    photos = PhotoStore(store)
    assert all(photos.read("train", photo) == good_photo(f"/good{path}") for photo, path in here.items() if photo != unlucky)
    before = Counter(mixed.server.hits)
    call_crawl([*options, "--retry", "http_404,http_410"])
    named = [case.url for case in mixed.cases.values() if case.code in ("http_404", "http_410")]
    assert mixed.server.hits - before == Counter(url.removeprefix(mixed.server.url("")) for url in named)
    assert codes_of(store) == codes
    call_crawl([*options, "--verify"])
    assert not list(store.rglob(".*.tmp"))


# What a person says wrongly.


@pytest.mark.parametrize(
    ("others", "acts", "message"),
    [
        ({}, ["--retry", "nonsense"], "--retry nonsense: no such outcome; give transient, all, or some of dns, connect"),
        ({}, ["--retry", "http_404,http_44"], r"--retry http_44: no such outcome \(did you mean http_404\?\)"),
        ({}, ["--retry", "ok"], "--retry ok: no such outcome"),
        ({}, ["--verify"], r"store: no photo store here; set --source\.photos to the one to verify"),
        ({"crawl.sources": "[]"}, [], r"build\.crawl\.sources is empty: say where the photos are, as --crawl\.sources"),
        ({"crawl.contact": "null"}, [], r"build\.crawl\.contact is not set.*--crawl\.contact"),
        ({"crawl.source": "x"}, [], "did you mean"),
        ({"crawl.allowed_addresses": '["nowhere"]'}, [], "nowhere"),
        ({"source.photos": "{tables}"}, [], "holds something else than a photo store"),
        ({"source.annotations": "{tables}/none"}, [], "none"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(others, acts, message, tmp_path):
    tables = write_tables(tmp_path / "tables", {"a": "http://127.0.0.1:1/a"})
    others = {name: value.replace("{tables}", str(tables)) for name, value in others.items()}
    done = call_crawl([*crawl_options(tables, tmp_path / "store", tmp_path / "out", None, others=others), *acts], status=2)
    assert re.search(message, done.stderr), done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert re.fullmatch(r"(settings: [^\n]+\n)?", done.stdout)
    assert not (tmp_path / "store" / "index.parquet").exists()


# Photos that are there, or somewhere else.


def test_refreshing_asks_conditionally_and_takes_what_is_new(tmp_path):
    stays = {"etag": "/etag/1", "dated": "/last-modified/1", "plain": "/good/plain", "down": "/good/down"}
    paths = {**stays, "changes": "/good/changes", "goes": "/good/goes", "never": "/status/404/1"}
    with HostileServer() as server:
        tables = write_tables(tmp_path / "tables", {photo: server.url(path) for photo, path in paths.items()})
        store = tmp_path / "store"
        options = crawl_options(tables, store, tmp_path / "out", server.port)
        call_crawl(options)
        first, before = rows_of(store, "index"), len(server.requests)
        assert set(first) == set(paths) - {"never"}
        server._behaves.update({"/good/changes": "/good/new", "/good/goes": "/status/410/x", "/good/down": "/status/503/x"})
        done = call_crawl([*options, "--refresh"])
        again = server.requests[before:]
    assert_counts_balance(done, store, len(paths))
    asked = Counter(request.path for request in again)
    assert asked == {path: ATTEMPTS if photo == "down" else 1 for photo, path in paths.items() if photo != "never"}
    conditional = [request for request in again if {"if-none-match", "if-modified-since"} & set(request.headers)]
    assert {request.path for request in conditional} == {"/etag/1", "/last-modified/1"}
    assert all(request.sent < 200 for request in conditional), "a body came again"
    index = rows_of(store, "index")
    assert set(index) == {*stays, "changes"}
    for photo in stays:
        assert all(index[photo][name] == first[photo][name] for name in ("file", "offset", "sha256", "url"))
    assert codes_of(store)["goes"] == "http_410"
    photos = PhotoStore(store)
    assert photos.read("train", "changes") == good_photo("/good/new")
    assert photos.read("train", "down") == good_photo("/good/down")
    call_crawl([*options, "--verify"])


def test_placeholders_are_asked_for_at_the_next_source_in_the_same_run(tmp_path):
    """They show when many have come; those whose MD5 is known need not wait so long."""
    with HostileServer({"gone.jpg": GONE}, behaves={f"/first/{number}": "/photos/gone.jpg" for number in range(12)}) as server:
        urls = {f"{number:04d}": server.url(f"/first/{number}" if number < 12 else f"/good/{number}") for number in range(30)}
        tables = write_tables(tmp_path / "tables", urls)
        second = server.url("/good/second/{image_id}")
        options = crawl_options(tables, tmp_path / "store", tmp_path / "out", server.port, ["{url}", second])
        call_crawl(options)
        index = rows_of(tmp_path / "store", "index")
        assert {photo: row["source"] for photo, row in index.items()} == {
            photo: second if int(photo) < 12 else "{url}" for photo in urls
        }
        asked = len(server.requests)
        call_crawl(options)
        assert len(server.requests) == asked


def test_strange_files_are_photos_or_have_a_code(tmp_path, real_data):
    folder = real_data / "hostile_images"
    table = list(csv.DictReader((folder / "expected.csv").open()))
    ids = {f"{number:016x}": row for number, row in enumerate(table)}
    with HostileServer(folder) as server:
        tables = write_tables(tmp_path / "tables", {photo: server.url(f"/photos/{row['file']}") for photo, row in ids.items()})
        store = tmp_path / "store"
        more = {"crawl.min_side": 1, "crawl.max_bytes": 20_000_000}
        done = call_crawl(crawl_options(tables, store, tmp_path / "out", server.port, others=more))
    assert_counts_balance(done, store, len(table))
    broken = {
        "truncated__broken_data_stream.png": "decode_error",
        "non_oserror__apng_chunk_no_fctl.png": "decode_error",
        "unidentifiable__broken.png": "decode_error",
        "bomb__decompression_bomb.gif": "too_many_pixels",
    }
    # What Pillow loads we take, and nothing else: our limits and list of formats refuse none of these.
    expected = {row["file"]: OK if row["pillow_load"] == "ok" else broken[row["file"]] for row in table}
    assert {ids[photo]["file"]: code for photo, code in codes_of(store).items()} == expected
    photos = PhotoStore(store)
    for photo, row in ids.items():
        if expected[row["file"]] == OK:
            assert photos.read("train", photo) == (folder / row["file"]).read_bytes()


def test_a_build_that_crawls_is_a_build_from_a_folder(photos, dataset, tmp_path):
    """Byte by byte, with photos from a folder, a tar and the web; those that lie here are asked of nobody, and not copied."""
    here, tar_file, store, out = tmp_path / "here", tmp_path / "more.tar", tmp_path / "store", tmp_path / "out"
    validation = sorted((photos / "validation").glob("*.jpg"))
    (here / "validation").mkdir(parents=True)
    for path in validation[::2]:
        shutil.copy(path, here / "validation")
    with tarfile.open(tar_file, "w") as tar:
        for path in validation[1::2]:
            tar.add(path, f"validation/{path.name}")
    with HostileServer(photos) as server:
        sources = [str(here), str(tar_file), server.url("/photos/{split}/{image_id}.jpg")]
        both = {"source.splits": '["train", "validation"]', "crawl.workers": 1}
        run_build(*build_options(photos, out), *crawl_options(photos, store, out, server.port, sources, others=both))
        assert {path.split("/")[2] for path in server.hits} == {"train"}
        assert set(server.hits.values()) == {1}
    files = {photo: row["file"] for photo, row in rows_of(store, "index").items()}
    assert {files[path.stem] for path in validation[1::2] if path.stem in files} == {str(tar_file)}
    assert all(files[path.stem] == str(here / "validation" / path.name) for path in validation[::2] if path.stem in files)
    stored = sum(path.stat().st_size for path in (store / "parts").glob("*.tar"))
    assert stored < sum(path.stat().st_size + 1024 for path in (photos / "train").glob("*.jpg")) + 10_240
    for path in sorted((dataset / "shards").iterdir()):
        assert (out / "shards" / path.name).read_bytes() == path.read_bytes()


def settings_of(tmp_path: Path, **options: Any) -> BuildSettings:
    given = {"source.photos": tmp_path / "store", "out": tmp_path / "out", **options}
    return load_settings(BuildSettings, "build", [text for name, value in given.items() for text in (f"--{name}", str(value))],
                         preset("tiny"))  # fmt: skip


@pytest.mark.parametrize("places", ["folder", "web", "both", "flat"])
def test_coco_photos_are_looked_for_where_coco_puts_them(tmp_path, places):
    """With a store for `source.photos`, the folder train2017 is that of the sources."""
    (tmp_path / "annotations").mkdir()
    image = {"id": 7, "file_name": "7.jpg", "width": 100, "height": 100}
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0, "segmentation": []}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}]}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    web, folder = "https://images.example.org/{file_name}", str(tmp_path / "coco")
    sources = {"folder": [folder], "web": [web], "both": [folder, web], "flat": [str(tmp_path / "flat")]}[places]
    source = {"source.kind": "coco", "source.splits": '["train"]', "source.annotations": tmp_path / "annotations"}
    settings = settings_of(tmp_path, **source, **{"crawl.sources": json.dumps(sources)})
    rows = [row for batch in open_source(settings).read_photos() for row in batch.to_pylist()]
    assert [row["file_name"] for row in rows] == ["7.jpg" if places == "flat" else "train2017/7.jpg"]


def test_boxes_in_px_need_sizes_before_there_are_photos(tmp_path):
    (tmp_path / "boxes.csv").write_text("photo,x_min,y_min,x_max,y_max,url\na.jpg,1,2,30,40,https://x.example.org/a.jpg\n")
    options = {"source.kind": "boxes", "source.annotations": tmp_path / "boxes.csv", "crawl.sources": '["{url}"]'}
    with pytest.raises(InputError, match=r"boxes\.csv: boxes in px need the sizes of photos.*add columns width and height"):
        open_source(settings_of(tmp_path, **options, **{"source.unit": "pixel"}))
    (tmp_path / "boxes.csv").write_text("photo,x_min,y_min,x_max,y_max\na.jpg,0.1,0.2,0.3,0.4\n")
    open_source(settings_of(tmp_path, **options, **{"source.unit": "fraction"}))
