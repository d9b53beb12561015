"""The whole crawl, by its command, on a real Ray and against real servers: what it leaves, asks again, refuses and survives."""

import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import run_program
from pbe_core.settings import REPOSITORY, preset
from pipelines import build, crawl
from pipelines.crawling.workers import Stop
from pipelines.photos import PhotoStore
from schemas.outcomes import OK, OUTCOMES, TRANSIENT
from tests.conftest import build_options
from tests.crawl_world import crawl_command, crawl_options, run_crawl, write_tables
from tests.hostile_server import LARGE, LATE, MAX_BYTES, MAX_PIXELS, ROUTES, TROUBLES, HostileServer, good_photo
from tests.s3_server import s3_server

ATTEMPTS = 2
PATIENCE_SECONDS = 900
"""For what hangs. Nothing is measured by it."""
GONE = good_photo("this photo is no longer available", 64, 64)


@dataclass
class Done:
    """What a program that ran in this process left: as `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def call(program: ModuleType, options: list[str]) -> Done:
    """A program's main in this process, with the Ray that runs here."""
    arguments = [f"{program.__name__}.py", "--config", str(preset("tiny")), *options]
    with (
        patch.object(sys, "argv", arguments),
        redirect_stdout(io.StringIO()) as said,
        redirect_stderr(io.StringIO()) as warned,
        pytest.raises(SystemExit) as ended,
    ):
        run_program(program.main)
    return Done(int(ended.value.code or 0), said.getvalue(), warned.getvalue())


def call_crawl(options: list[str], status: int = 0) -> Done:
    """Crawl in this process; it must end with this status."""
    done = call(crawl, options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray that is there already, so that not each crawl waits for one of its own; its address."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def rows_of(store: Path, name: str) -> dict[str, dict[str, Any]]:
    """A table of a store, by photo."""
    rows = pq.read_table(store / f"{name}.parquet").to_pylist()
    assert len({row["photo_id"] for row in rows}) == len(rows), f"{name}: a photo twice"
    return {row["photo_id"]: row for row in rows}


def codes_of(store: Path) -> dict[str, str]:
    """What became of each photo."""
    return {photo: row["code"] for photo, row in rows_of(store, "status").items()}


def summary_of(done: Any) -> dict[str, int]:
    """The printed table: outcome -> photos."""
    found = re.findall(r"^│ (\S+|not asked for yet) +│ +([\d,]+) │", done.stdout, re.MULTILINE)
    return {outcome: int(count.replace(",", "")) for outcome, count in found}


def assert_counts_balance(done: Any, store: Path, wanted: int) -> None:
    """Wanted = ok + each code + those not asked for yet: as printed, and as the tables say."""
    said = summary_of(done)
    assert said.pop("wanted") == wanted == sum(said.values())
    assert said.pop("not asked for yet", 0) == wanted - sum(said.values())
    codes = codes_of(store)
    assert said == Counter(codes.values())
    assert set(rows_of(store, "index")) == {photo for photo, code in codes.items() if code == OK}
    assert {photo: row["code"] for photo, row in rows_of(store, "failures").items()} == {
        photo: code for photo, code in codes.items() if code != OK
    }


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


# Path -> code. Each is asked for by several photos, with a word of its own at the end of the path.
FAILURES = {
    **TROUBLES,
    "/photos/missing": "http_404",
    "/fails/2": "http_5xx",
    "/html-as-jpeg": "not_an_image",
    "/redirect?to=/html": "not_an_image",
    "/heic": "unsupported_format",
    "/no-end-mark": "no_end_mark",
    "/large-png": "too_many_pixels",
    "/truncated": "decode_error",
    "/good?width=96&height=56": "too_small",
    "/robots": "opted_out",
    "/robots?tag=paint-by-example:+noimageai": "opted_out",
    "/redirect?to=/robots": "opted_out",
    "/redirect?to=http://169.254.169.254/latest/meta-data/": "blocked_address",
    "/redirect?to=http://0x7f.1:{decoy}/good": "blocked_address",
}
# One photo each, whose bytes take longer than others'.
BUSY = {**LARGE, "/png-text": OK, "/png-profile": OK}
OUTSIDE = {
    "": "bad_url",
    "http://": "bad_url",
    "photo.jpg": "bad_url",
    "file:///etc/passwd": "blocked_scheme",
    "ftp://127.0.0.1/a.jpg": "blocked_scheme",
    "http://127.0.0.1:{decoy}/good/a": "blocked_address",
    "http://localhost:{decoy}/good/a": "blocked_address",
    "http://[::1]:{port}/good/a": "blocked_address",
    "http://2130706433:{decoy}/good/a": "blocked_address",
    "http://169.254.169.254/latest/meta-data/": "blocked_address",
    "http://10.0.0.1/photo.jpg": "blocked_address",
    "http://no-such-host.invalid/photo.jpg": "dns",
    "http://127.0.0.1:{closed}/photo.jpg": "connect",
    "https://127.0.0.1:{tls}/good/a": "tls",
}
# Another photo for each path; and the same photo for all, which the metadata's MD5 vouches for.
GOOD = ("/good", "/fails/1", "/busy/1?retry-after=0", "/chain/3", "/good?pause=0.3")
VOUCHED = (
    "/chunked", "/until-closed", "/gzip-photo", "/gzip-photo?encoding=deflate", "/gzip-in-members", "/etag", "/last-modified",
    "/strange-etag", "/tdm?value=0", "/robots?tag=all", "/cookie", "/interim/9",
)  # fmt: skip


def md5_of(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def with_word(path: str, word: object) -> str:
    path, mark, query = path.partition("?")
    return f"{path}/{word}{mark}{query}"


def all_cases(server: HostileServer, ports: Mapping[str, int]) -> dict[str, Case]:
    """Photo id -> case, in an order that mixes them."""
    cases: list[Case] = []
    for number in range(4):
        for path, code in FAILURES.items():
            cases.append(Case(server.url(with_word(path, f"no{number}").replace("{decoy}", str(ports["decoy"]))), code))
        for path in GOOD:
            target = with_word(path, number)
            name = with_word("/chain/0", number) if path.startswith("/chain") else target.partition("?")[0]
            cases.append(Case(server.url(target), OK, good_photo(name)))
        for path in VOUCHED:
            data = good_photo("/good/cookie") if path == "/cookie" else good_photo()
            known: dict[str, object] = {"OriginalMD5": md5_of(data), "OriginalSize": len(data)}
            cases.append(Case(server.url(with_word(path, number)), OK, data, known))
        thumbnail = {"Thumbnail300KURL": server.url(f"/good/thumbnail/{number}")}
        cases.append(Case(server.url(f"/status/404/thumbnail{number}"), OK, good_photo(f"/good/thumbnail/{number}"), thumbnail))
        cases.append(Case(server.url(f"/good/size/{number}"), "size_mismatch", known={"OriginalSize": 999}))
        cases.append(Case(server.url(f"/good/md5/{number}"), "hash_mismatch", known={"OriginalMD5": md5_of(b"another photo")}))
    for path, code in BUSY.items():
        cases.append(Case(server.url(path), code))
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
    done: subprocess.CompletedProcess[str]
    asked: Counter[str]
    """Path and query -> requests of this first crawl."""


@pytest.fixture(scope="module")
def mixed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    with (
        HostileServer({"gone.jpg": GONE}) as server,
        HostileServer() as decoy,
        HostileServer(tls=True) as tls,
        socket.socket() as nobody,
    ):
        nobody.bind(("127.0.0.1", 0))  # Bound, and not listening: connections are refused, and nobody else gets the port.
        closed = nobody.getsockname()[1]
        ports = {"port": server.port, "decoy": decoy.port, "tls": tls.port, "closed": closed}
        cases = all_cases(server, ports)
        metadata = {photo: case.known for photo, case in cases.items()}
        tables = write_tables(folder / "tables", {photo: case.url for photo, case in cases.items()}, metadata)
        allowed = [f"127.0.0.1:{port}" for port in (server.port, tls.port, closed)]
        more = {"crawl.allowed_addresses": json.dumps(allowed), "crawl.attempts": ATTEMPTS}
        more |= {"crawl.max_bytes": MAX_BYTES, "source.max_photo_pixels": MAX_PIXELS}
        more |= {"source.same_photo": "report", "source.missing_end_mark": "refuse", "ray.address": cluster}
        # Few photos have a thumbnail; that of the others, which is not there, must not hide why the photo itself did not come.
        options = crawl_options(tables, folder / "store", folder / "out", None, ["{url}", "{thumbnail_url}"], more)
        done = run_crawl(options)
        asked = Counter(request.target for request in server.requests)
        yield Mixed(server, decoy, cases, options, folder / "store", done, asked)


def test_every_photo_ends_as_it_must(mixed):
    expected = {photo: case.code for photo, case in mixed.cases.items()}
    status = rows_of(mixed.store, "status")
    wrong = {
        mixed.cases[photo].url: (code, status[photo]["code"], status[photo]["detail"])
        for photo, code in expected.items()
        if status[photo]["code"] != code
    }
    assert not wrong
    assert set(status) == set(expected)
    # Nothing is left out of the test: each outcome but those of local files, buckets and our own mistakes, and each route. Those
    # that take too long need short limits, which a busy machine exceeds with the others, too: test_fetching.py has them.
    assert set(expected.values()) == set(OUTCOMES) - {"missing", "credentials", "unexpected", *LATE.values()}
    used = {path.split("/")[1].partition("?")[0] for path in (*FAILURES, *BUSY, *GOOD, *VOUCHED, *LATE)}
    assert ROUTES - used == {"bad-chunks"}, "what becomes of it depends on the moment"


def test_the_books_balance_and_say_what_may_come_another_time(mixed):
    assert_counts_balance(mixed.done, mixed.store, len(mixed.cases))
    later = sum(case.code in TRANSIENT for case in mixed.cases.values())
    assert f"{later:,} photos may come another time: pipelines/crawl.py with the same settings and --retry" in mixed.done.stdout
    for row in rows_of(mixed.store, "failures").values():
        assert row["transient"] == (row["code"] in TRANSIENT)
        assert row["detail"]


def test_photos_are_the_bytes_that_the_server_sent(mixed):
    photos = PhotoStore(mixed.store)
    index = rows_of(mixed.store, "index")
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
            assert mixed.asked[target] == attempts[photo] or "[" in target, case.url


def test_the_store_is_whole(mixed):
    done = call_crawl([*mixed.options, "--verify"])
    photos = sum(case.code == OK for case in mixed.cases.values())
    assert f"{mixed.store}: {photos} photos, all of them whole and where the index says" in done.stdout
    assert not list(mixed.store.rglob("*.tmp"))


def test_a_second_run_asks_for_nothing_and_says_the_same(mixed):
    before = len(mixed.server.requests)
    done = call_crawl(mixed.options)
    assert len(mixed.server.requests) == before
    assert summary_of(done) == summary_of(mixed.done)


def test_asking_again_is_for_those_that_are_named(mixed, tmp_path, monkeypatch):
    """Those whose failure may have passed, and then those of one code. A known placeholder is not stored again."""
    store = tmp_path / "store"
    shutil.copytree(mixed.store, store)
    for folder in (store, store / "parts", store / "rounds"):  # As a run leaves them that was killed.
        (folder / f".000001-000001.parquet.{'0' * 32}.tmp").write_bytes(b"begun")
    options = [*mixed.options, "--source.photos", str(store), "--crawl.workers", "1"]
    later = {photo: case for photo, case in mixed.cases.items() if case.code in TRANSIENT}
    here = {photo: case.url.partition("?")[0].removeprefix(mixed.server.url("")) for photo, case in later.items()}
    here = {photo: path for photo, path in here.items() if path.startswith("/")}
    for path in here.values():
        monkeypatch.setitem(mixed.server._behaves, path, f"/good{path}")
    unlucky = next(iter(here))
    monkeypatch.setitem(mixed.server._behaves, here[unlucky], "/photos/gone.jpg")
    before = Counter(mixed.server.hits)
    done = call_crawl([*options, "--retry", "transient"])
    asked = mixed.server.hits - before
    assert asked == Counter(here.values())
    assert_counts_balance(done, store, len(mixed.cases))
    codes = codes_of(store)
    for photo, case in mixed.cases.items():
        expected = "placeholder" if photo == unlucky else OK if photo in here else case.code
        assert codes[photo] == expected, case.url
    photos = PhotoStore(store)
    assert all(photos.read("train", photo) == good_photo(f"/good{path}") for photo, path in here.items() if photo != unlucky)
    before = Counter(mixed.server.hits)
    call_crawl([*options, "--retry", "http_404,http_410"])
    named = [
        case.url.removeprefix(mixed.server.url("")) for case in mixed.cases.values() if case.code in ("http_404", "http_410")
    ]
    assert mixed.server.hits - before == Counter(named)
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


# Photos that are there are asked for again.


def test_refreshing_asks_conditionally_and_takes_what_is_new(cluster, tmp_path):
    stays = {"etag": "/etag/1", "dated": "/last-modified/1", "plain": "/good/plain", "down": "/good/down"}
    paths = {**stays, "changes": "/good/changes", "goes": "/good/goes", "never": "/status/404/1"}
    with HostileServer() as server:
        tables = write_tables(tmp_path / "tables", {photo: server.url(path) for photo, path in paths.items()})
        store = tmp_path / "store"
        options = crawl_options(tables, store, tmp_path / "out", server.port, others={"crawl.workers": 1})
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
        assert {name: index[photo][name] for name in ("file", "offset", "sha256", "url")} == {
            name: first[photo][name] for name in ("file", "offset", "sha256", "url")
        }
    assert codes_of(store)["goes"] == "http_410"
    photos = PhotoStore(store)
    assert photos.read("train", "changes") == good_photo("/good/new")
    assert photos.read("train", "down") == good_photo("/good/down")
    call_crawl([*options, "--verify"])


# It is stopped, or dies.


@dataclass
class Slow:
    """A crawl that is stopped: its server answers as many requests as it shall, and holds the others."""

    server: HostileServer
    options: list[str]
    store: Path
    photos: int

    def recorded(self) -> dict[str, int]:
        """Path of each photo of which there is word -> how often it was asked for."""
        paths = {photo: f"/good/{photo}" for photo in rows_of(self.store, "status")}
        return {path: self.server.hits[path] for path in paths.values()}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    """180 photos of a host that is asked 40 times a second, three times at once, by two workers."""
    limits = {"crawl.per_host.requests_per_second": 40, "crawl.per_host.concurrency": 3, "crawl.workers": 2}
    with HostileServer() as server:
        urls = {f"{number:016x}": server.url(f"/good/{number:016x}?pause=0.05") for number in range(180)}
        tables = write_tables(tmp_path / "tables", urls)
        # Nobody waits for a request that is held.
        more = {**limits, "crawl.photos_per_part": 30, "crawl.connections": 4, "crawl.total_seconds": 3600}
        options = crawl_options(tables, tmp_path / "store", tmp_path / "out", server.port, others=more)
        yield Slow(server, options, tmp_path / "store", len(urls))


def hold_after(server: HostileServer, more: int) -> Callable[[], bool]:
    """Answer so many requests more; whether one is held now."""
    server.answers = len(server.requests) + more
    return lambda: len(server.requests) > server.answers


def start(options: list[str]) -> subprocess.Popen[str]:
    """A crawl as a terminal starts it: a process group of its own, and not deaf to Ctrl-C, as what runs in the background is."""
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            crawl_command(options), cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for does not happen"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def end_of(process: subprocess.Popen[str]) -> Done:
    """What it left."""
    said, warned = process.communicate(timeout=PATIENCE_SECONDS)
    return Done(process.returncode, said, warned)


def assert_stopped_well(done: Done, status: int) -> None:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "the same command goes on from there" in done.stderr


def test_stopped_in_the_middle_what_came_is_kept_and_not_asked_for_again(slow, cluster):
    """Ctrl-C, which a terminal sends to all processes, then SIGTERM to the program, each while requests are held; then the end.

    Meanwhile the host's limits hold, for all workers together.
    """
    held = hold_after(slow.server, 50)
    process = start(slow.options)
    wait_until(held, process)
    refused = call_crawl([*slow.options, "--out", str(slow.store.parent / "other")], status=2)
    assert f"error: {slow.store}: another crawl is using this photo store; wait for it, or stop it" in refused.stderr
    os.killpg(process.pid, signal.SIGINT)
    done = end_of(process)
    assert_stopped_well(done, 130)
    assert_counts_balance(done, slow.store, slow.photos)
    recorded = slow.recorded()
    # Lost are at most those that were in flight, or on their way through a worker's decoder: twice its 4 connections.
    assert len(slow.server.hits) - 16 <= len(recorded) <= 50

    held = hold_after(slow.server, 60)
    process = start([*slow.options, "--ray.address", cluster])
    wait_until(held, process)
    process.terminate()
    done = end_of(process)
    assert_stopped_well(done, 143)
    assert all(slow.server.hits[path] == hits for path, hits in recorded.items())
    recorded = slow.recorded()
    assert len(slow.server.hits) - 32 <= len(recorded) <= 110

    slow.server.answers = float("inf")
    done = call_crawl(slow.options)
    assert_counts_balance(done, slow.store, slow.photos)
    assert summary_of(done) == {"wanted": slow.photos, "ok": slow.photos}
    assert all(slow.server.hits[path] == hits for path, hits in recorded.items())
    assert not list(slow.store.rglob("*.tmp"))
    call_crawl([*slow.options, "--verify"])
    assert_limits_held(slow.server)


def assert_limits_held(server: HostileServer) -> None:
    """40 requests a second and 3 at once, as the server saw them."""
    times = server.times("/good/")
    assert server.most_at_once("/good/") <= 3
    for first, last in itertools.combinations(range(len(times)), 2):
        # Each of two processes may start two at once, 0.1 s of its share; and 3 may have been on their way.
        assert last - first <= 40 * (times[last] - times[first]) + 10


def test_stopped_before_anything_is_in_flight(tmp_path):
    """While Ray starts: both at the same moment, in two stores."""
    with HostileServer() as server:
        server.answers = 0  # Where Ray is quicker than the signal, nothing is in flight for long either.
        tables = write_tables(tmp_path / "tables", {"a": server.url("/good/a")})
        stores = {signal.SIGINT: tmp_path / "one", signal.SIGTERM: tmp_path / "two"}
        processes = {}
        for number, store in stores.items():
            processes[number] = start(crawl_options(tables, store, tmp_path / f"out{number:d}", server.port))
        for number, process in processes.items():
            wait_until(psutil.Process(process.pid).children, process)
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        for number, process in processes.items():
            assert_stopped_well(end_of(process), 128 + number)


def test_a_stop_that_gets_lost_in_a_callback_is_heard_and_no_traceback_printed():
    """Also where it was the handler that Ray has while it starts."""
    printed: list[Any] = []
    for handler in (signal.default_int_handler, lambda number, _: sys.exit(number)):
        with patch.object(sys, "unraisablehook", printed.append), Stop() as stop:
            signal.signal(signal.SIGTERM, handler)
            thing = threading.Event()
            lost = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            del thing
            assert lost() is None
            assert not stop.signal
            with pytest.raises(KeyboardInterrupt):
                stop.listen()
            assert stop.signal == signal.SIGTERM
    assert not printed


def test_a_process_that_dies_costs_nothing_but_time(cluster, tmp_path):
    """SIGKILL to the one worker in the middle of its parts, twice; each photo is in the index once."""
    with HostileServer() as server:
        urls = {f"{number:016x}": server.url(f"/good/{number}?pause=0.02") for number in range(240)}
        tables = write_tables(tmp_path / "tables", urls)
        more = {"crawl.workers": 1, "crawl.photos_per_part": 20, "crawl.per_host.concurrency": 3, "crawl.total_seconds": 3600}
        options = crawl_options(tables, tmp_path / "store", tmp_path / "out", server.port, others=more)
        killed: list[int] = []

        def kill() -> None:
            """Each while requests are held, so that the crawl cannot be over."""
            for more in (70, 90):
                wait_until(hold_after(server, more))
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # One that ends just now.
                        if "".join(process.cmdline()[:1]).startswith("ray::CrawlWorker"):
                            process.kill()
                            killed.append(process.pid)
            server.answers = float("inf")

        thread = threading.Thread(target=kill)
        thread.start()
        done = call_crawl(options)
        thread.join()
    assert len(set(killed)) == 2
    assert_counts_balance(done, tmp_path / "store", len(urls))
    assert summary_of(done) == {"wanted": len(urls), "ok": len(urls)}
    assert server.most_at_once("/good/") <= 3
    # Asked again are the photos of parts that were begun, which come one after the other.
    assert max(server.hits.values()) <= 3
    assert sum(server.hits.values()) <= len(urls) + 2 * 40
    call_crawl([*options, "--verify"])


# Other sources.


def test_photos_of_an_object_store_with_placeholders_among_them(cluster, tmp_path):
    with s3_server() as server, HostileServer() as web:
        names = [f"{number:016x}" for number in range(40)]
        lost = names[7]
        gone = names[20:32]
        pictures = {name: GONE if name in gone else good_photo(name) for name in names if name != lost}
        server.put("photos", {f"train/{name}.jpg": data for name, data in pictures.items()})
        tables = write_tables(tmp_path / "tables", {name: web.url(f"/good/{name}") for name in names})
        more = {"crawl.storage": json.dumps(server.storage), "crawl.workers": 1}
        store = tmp_path / "store"
        options = crawl_options(tables, store, tmp_path / "out", None, ["s3://photos/{split}/{image_id}.jpg"], others=more)
        done = call_crawl(options)
        assert not web.requests
        assert_counts_balance(done, store, 40)
        codes = {name: "placeholder" if name in gone else "http_404" if name == lost else OK for name in names}
        assert codes_of(store) == codes
        assert set(rows_of(store, "quarantine")) == set(gone)
        photos = PhotoStore(store)
        assert all(photos.read("train", name) == pictures[name] for name, code in codes.items() if code == OK)


def test_strange_files_are_photos_or_have_a_code(cluster, tmp_path, real_data):
    folder = real_data / "hostile_images"
    table = list(csv.DictReader((folder / "expected.csv").open()))
    ids = {f"{number:016x}": row for number, row in enumerate(table)}
    with HostileServer(folder) as server:
        tables = write_tables(tmp_path / "tables", {photo: server.url(f"/photos/{row['file']}") for photo, row in ids.items()})
        store = tmp_path / "store"
        more = {"crawl.workers": 1, "crawl.min_side": 1, "crawl.max_bytes": 20_000_000}
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


def test_a_build_from_a_store_is_a_build_from_a_folder(cluster, photos, dataset, tmp_path):
    """Byte by byte, with photos from a folder, a tar and the web; and one that comes later mends its shard."""
    here, tar_file, store, out = tmp_path / "here", tmp_path / "more.tar", tmp_path / "store", tmp_path / "out"
    validation = sorted((photos / "validation").glob("*.jpg"))
    (here / "validation").mkdir(parents=True)
    for path in validation[::2]:
        shutil.copy(path, here / "validation")
    with tarfile.open(tar_file, "w") as tar:
        for path in validation[1::2]:
            tar.add(path, f"validation/{path.name}")
    wanted = pq.read_table(dataset / "objects.parquet", columns=["split", "photo_id"]).to_pylist()
    victim = sorted(row["photo_id"] for row in wanted if row["split"] == "train")[3]
    with HostileServer(photos, behaves={f"/photos/train/{victim}.jpg": "/status/503/x"}) as server:
        sources = [str(here), str(tar_file), server.url("/photos/{split}/{image_id}.jpg")]
        both = {"source.splits": '["train", "validation"]', "crawl.workers": 1}
        options = [*build_options(photos, out), *crawl_options(photos, store, out, server.port, sources, others=both)]
        done = call(build, options)
        assert done.returncode == 0, done.stderr
        assert "http_5xx" in done.stdout
        failures = pq.read_table(out / "failures.parquet").to_pylist()
        assert {(row["photo_id"], row["code"]) for row in failures} == {(victim, "http_5xx")}
        assert find_imbalance(read_dataset(out).books) is None
        # Those that lie here are asked of nobody, and not copied.
        assert {path.split("/")[2] for path in server.hits} == {"train"}
        files = {photo: row["file"] for photo, row in rows_of(store, "index").items()}
        assert {files[path.stem] for path in validation[1::2] if path.stem in files} == {str(tar_file)}
        assert all(files[path.stem] == str(here / "validation" / path.name) for path in validation[::2] if path.stem in files)
        assert (
            sum(path.stat().st_size for path in (store / "parts").glob("*.tar"))
            < sum(path.stat().st_size + 1024 for path in (photos / "train").glob("*.jpg")) + 10_240
        )

        server._behaves.clear()
        call_crawl([*options, "--retry", "transient"])
        assert server.hits[f"/photos/train/{victim}.jpg"] == ATTEMPTS + 1
        before = {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("*.tar")}
        done = call(build, options)
        assert done.returncode == 0, done.stderr
        assert set(server.hits.values()) == {1, ATTEMPTS + 1}
    for path in sorted((dataset / "shards").iterdir()):
        assert hashlib.sha256((out / "shards" / path.name).read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()
    touched = {path.name for path in (out / "shards").glob("*.tar") if path.stat().st_mtime_ns != before[path.name]}
    assert touched == {f"{row['shard']}.tar" for row in failures}
