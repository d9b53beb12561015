"""Photos from object stores: a real S3 server, and raw servers for what that one never says."""

import asyncio
import contextlib
import gzip
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import fsspec
import pytest

from pbe_core.errors import InputError
from pbe_core.photo_files import PhotoStore
from pipelines import crawl
from pipelines.config import CrawlSettings
from pipelines.crawling.answers import Fetched, FetchError
from pipelines.crawling.buckets import ObjectStores, check_object_stores, fetch_error
from tests.crawl_world import call_crawl, codes_of, crawl_here, crawl_options, write_tables
from tests.hostile_server import good_photo
from tests.s3_server import KEY, SECRET, S3Server, s3_server

PHOTO = bytes(range(256)) * 20
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        odd_keys = {"a b/ü%20?x#y.jpg": b"odd", "/leading.jpg": b"slash"}
        server.put("photos", {"train/one.jpg": PHOTO, "empty.jpg": b"", **odd_keys})
        server.put("public", {"train/one.jpg": PHOTO}, public=True)
        yield server


@contextlib.asynccontextmanager
async def stores(storage: dict[str, dict[str, Any]], **settings: Any) -> AsyncIterator[ObjectStores]:
    opened = ObjectStores(CrawlSettings(storage=storage, **settings))
    try:
        yield opened
    finally:
        await opened.close()


def fetch(storage: dict[str, dict[str, Any]], url: str, *, expected_bytes: int | None = None, **settings: Any) -> Fetched:
    async def run() -> Fetched:
        async with stores(storage, **settings) as opened:
            return await opened.fetch(url, expected_bytes=expected_bytes)

    return asyncio.run(run())


def failure(storage: dict[str, dict[str, Any]], url: str = "s3://photos/train/one.jpg", **settings: Any) -> FetchError:
    with pytest.raises(FetchError) as raised:
        fetch(storage, url, **settings)
    assert SECRET not in raised.value.detail
    assert KEY not in raised.value.detail
    return raised.value


@contextlib.asynccontextmanager
async def raw_server(answer: Answer) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers each request as told; gives its endpoint and the heads of the requests that came."""
    heads: list[bytes] = []
    connections: set[asyncio.Task[None]] = set()
    nothing_there = saying(http("404 Not Found", b""))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                await (nothing_there if heads[-1].startswith(b"HEAD") else answer)(writer)
                await writer.drain()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", heads
    finally:
        listening.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


def saying(text: bytes, *, close: bool = False) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        if close:
            writer.close()

    return answer


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


def s3_says(status: str, code: str, *headers: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Said of {KEY} here</Message></Error>"
    return http(status, body.encode(), "Content-Type: application/xml", *headers)


def storage_of(protocol: str, endpoint: str) -> dict[str, dict[str, Any]]:
    return S3Server(endpoint).storage if protocol == "s3" else {"gs": {"token": "anon", "endpoint_url": endpoint}}


def ask_raw(*answers: Answer, protocol: str = "s3", **settings: Any) -> list[tuple[Fetched | FetchError, list[bytes]]]:
    """What comes of a fetch for each answer of a raw server, and the heads of the requests that it made."""
    now = answers[0]

    async def answer(writer: asyncio.StreamWriter) -> None:
        await now(writer)

    async def run() -> list[tuple[Fetched | FetchError, list[bytes]]]:
        nonlocal now
        outcomes: list[tuple[Fetched | FetchError, list[bytes]]] = []
        async with raw_server(answer) as (endpoint, heads), stores(storage_of(protocol, endpoint), **settings) as opened:
            for answer_now in answers:
                now = answer_now
                heads.clear()
                try:
                    outcome: Fetched | FetchError = await opened.fetch(f"{protocol}://photos/train/one.jpg")
                except FetchError as error:
                    outcome = error
                outcomes.append((outcome, list(heads)))
        return outcomes

    return asyncio.run(run())


def test_an_object_comes_as_it_is(server):
    objects = {"train/one.jpg": PHOTO, "empty.jpg": b"", "a b/ü%20?x#y.jpg": b"odd", "/leading.jpg": b"slash"}
    for key, data in objects.items():
        fetched = fetch(server.storage, f"s3://photos/{key}", expected_bytes=len(data), max_bytes=len(PHOTO))
        assert fetched == Fetched(data, f"s3://photos/{key}")
    for url in ("s3://photos/train/two.jpg", "s3://nowhere/train/one.jpg"):
        error = failure(server.storage, url)
        assert (error.code, error.http_status, error.transient) == ("http_404", 404, False)
        assert error.detail.startswith(("NoSuchKey: ", "NoSuchBucket: "))


def test_a_public_bucket_needs_no_credentials_and_a_private_one_says_so(server):
    assert fetch(server.public_storage, "s3://public/train/one.jpg").data == PHOTO
    error = failure(server.public_storage)
    assert (error.code, error.http_status) == ("http_403", 403)
    assert "public" not in error.detail  # It is asked as a public one already.


def test_only_the_right_credentials_open_a_bucket(server):
    with server.checking_credentials() as known:
        assert fetch(known.storage, "s3://photos/train/one.jpg").data == PHOTO
        errors = [failure(server.storage), failure(S3Server(known.endpoint, known.key, SECRET).storage)]
    assert [error.code for error in errors] == ["credentials", "credentials"]
    assert [error.detail.partition(":")[0] for error in errors] == ["InvalidAccessKeyId", "SignatureDoesNotMatch"]
    assert all(error.detail.endswith('(if the bucket is public, set crawl.storage: {"s3": {"anon": true}})') for error in errors)
    assert not any(known.key in error.detail or known.secret in error.detail for error in errors)


def test_no_credentials_at_all_are_told_with_the_way_out(server, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    error = failure({"s3": {"endpoint_url": server.endpoint}})
    assert error.code == "credentials"
    assert error.detail.startswith("NoCredentialsError: ")
    assert '{"s3": {"anon": true}}' in error.detail


def test_sizes_by_one_byte(server):
    error = failure(server.storage, max_bytes=len(PHOTO) - 1)
    assert (error.code, error.detail) == ("too_large", "more than 5,119 bytes")
    for expected in (len(PHOTO) - 1, len(PHOTO) + 1):
        assert failure(server.storage, expected_bytes=expected).code == "size_mismatch"


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_one_request_for_no_more_bytes_than_a_photo_may_have(protocol):
    """Also of the 50 MB that are the default, which libraries would ask for in several requests at once."""
    _needs(protocol)
    for limit in (1000, 50_000_000):
        [(fetched, heads)] = ask_raw(saying(http("206 Partial Content", b"photo")), protocol=protocol, max_bytes=limit)
        assert fetched.data == b"photo"
        assert len(heads) == 1
        assert heads[0].startswith(b"GET ")
        assert f"\r\nrange: bytes=0-{limit}\r\n".encode() in heads[0].lower()


STORE_SAYS: list[tuple[Answer, str, int | None]] = [
    (saying(s3_says("503 Slow Down", "SlowDown", "Retry-After: 7")), "http_429", 503),
    (saying(s3_says("429 Too Many Requests", "Anything")), "http_429", 429),
    (saying(s3_says("500 Internal Server Error", "InternalError")), "http_5xx", 500),
    (saying(s3_says("503 Service Unavailable", "ServiceUnavailable")), "http_5xx", 503),
    (saying(http("502 Bad Gateway", b"<html>")), "http_5xx", 502),
    (saying(s3_says("400 Bad Request", "ExpiredToken")), "credentials", 400),
    (saying(s3_says("400 Bad Request", "InvalidRequest")), "http_4xx", 400),
    (saying(s3_says("401 Unauthorized", "Who")), "http_403", 401),
    (saying(s3_says("403 Forbidden", "AccessDenied")), "http_403", 403),
    (saying(s3_says("410 Gone", "Gone")), "http_410", 410),
    (saying(s3_says("301 Moved Permanently", "PermanentRedirect")), "http_other", 301),
    (saying(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\n\r\nphoto", close=True), "incomplete", None),
    (saying(b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nph", close=True), "incomplete", None),
    (saying(b"this is no HTTP\r\n\r\n", close=True), "bad_response", None),
]


def test_what_a_store_says_has_a_code_and_is_asked_once():
    """The crawl decides whether and when to ask again, so a library that does it by itself would fail here."""
    outcomes = ask_raw(*(answer for answer, _, _ in STORE_SAYS))
    for (_, code, status), (error, heads) in zip(STORE_SAYS, outcomes, strict=True):
        assert isinstance(error, FetchError)
        assert (error.code, error.http_status) == (code, status)
        assert error.retry_after == (7 if status == 503 and code == "http_429" else None)
        assert len(heads) == (2 if status == 301 else 1)  # A bucket of another region: one question which that is.
        assert KEY not in error.detail


@pytest.mark.parametrize(
    "begin", [b"", b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100000\r\n\r\n"], ids=["silent", "trickling"]
)
def test_a_store_that_does_not_finish_is_given_up_in_time(begin):
    """One that says nothing, and one that always says a little more."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        for _ in range(600):  # Half a minute: long against the limit, which must come first.
            writer.write(b"x" * bool(begin))
            await asyncio.sleep(0.05)
        writer.close()

    [(error, _)] = ask_raw(answer, total_seconds=0.7)
    assert (error.code, error.transient) == ("timeout", True)


def test_a_slow_store_has_all_the_time_that_the_settings_give_it(monkeypatch):
    """The library would wait 15 s for the first byte; here 0.1 s, so that the test need not last as long."""
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 0.1)

    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.write(http("206 Partial Content", b"photo"))

    [(fetched, heads)] = ask_raw(answer)
    assert (fetched.data, len(heads)) == (b"photo", 1)


def test_the_way_to_a_store_can_fail_in_four_ways(server):
    [(cut, heads)] = ask_raw(saying(b"", close=True))
    assert cut.code == "connect"
    assert len(heads) <= 2  # aiohttp itself asks again, once and at once: such a connection may have been an old one.
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        refused = failure(S3Server(f"http://127.0.0.1:{unheard.getsockname()[1]}").storage)
    assert refused.code == "connect"
    assert failure(S3Server("http://no-such-host.invalid").storage).code == "dns"
    assert failure(S3Server(server.endpoint.replace("http://", "https://")).storage).code == "tls"


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_so_many_photos_are_in_flight_as_the_settings_say(protocol):
    """The server answers nobody before all have asked: a smaller pool (10 are the default of S3) would wait for ever."""
    _needs(protocol)
    count = 40

    async def run() -> list[Fetched]:
        everybody = asyncio.Barrier(count)

        async def answer(writer: asyncio.StreamWriter) -> None:
            await everybody.wait()
            writer.write(http("206 Partial Content", b"photo"))

        async with (
            raw_server(answer) as (endpoint, _),
            stores(storage_of(protocol, endpoint), connections=count, total_seconds=600) as opened,
        ):
            return await asyncio.gather(*(opened.fetch(f"{protocol}://photos/{number}.jpg") for number in range(count)))

    assert [fetched.data for fetched in asyncio.run(run())] == [b"photo"] * count


def test_urls_that_are_not_asked_for(server):
    for url in ("s3://", "s3://photos", "s3://photos/", "s3:///key", "s3://no bucket!/key"):
        assert failure(server.storage, url).code == "bad_url"
    for url in ("file:///etc/passwd", "https://photos/one.jpg", "memory://photos/one.jpg", "photos/one.jpg"):
        assert failure(server.storage, url).code == "blocked_scheme"


def test_other_file_systems_of_fsspec_can_be_named_in_the_settings():
    fsspec.filesystem("memory").pipe("/photos/one.jpg", PHOTO)
    assert fetch({"memory": {}}, "memory://photos/one.jpg").data == PHOTO
    assert failure({"memory": {}}, "memory://photos/one.jpg", max_bytes=10).code == "too_large"
    assert failure({"memory": {}}, "memory://photos/two.jpg").code == "http_404"


def test_googles_answers_have_the_same_codes_and_come_as_they_are_stored(caplog):
    """Unpacked, a few KB could be gigabytes; an empty object has no byte 0."""
    _needs("gs")
    errors = {
        "http_404": http("404 Not Found", b"No such object"),
        "http_403": http("403 Forbidden", b'{"error": {"code": 403, "message": "anonymous caller has no access"}}'),
        "http_4xx": http("400 Bad Request", b'{"error": {"code": 400, "message": "no"}}'),
    }
    for code, (error, heads) in zip(errors, ask_raw(*map(saying, errors.values()), protocol="gs"), strict=True):
        assert isinstance(error, FetchError)
        assert (error.code, len(heads)) == (code, 1)
    assert not caplog.records  # Its tracebacks would be as many as the failures.
    packed = gzip.compress(bytes(100_000))
    objects = {
        http("416 Range Not Satisfiable", b'{"error": {"code": 416, "message": "no such range"}}'): b"",
        http("206 Partial Content", packed, "Content-Encoding: gzip"): packed,
    }
    fetched = ask_raw(*map(saying, objects), protocol="gs", max_bytes=1000)
    assert [outcome.data for outcome, _ in fetched] == list(objects.values())


def test_a_missing_library_is_named_before_any_work(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gcsfs"] + ["gcsfs"]:
        monkeypatch.setitem(sys.modules, name, None)
    check_object_stores(["/data/photos", "https://photos/{image_id}.jpg", "{url}", "s3://photos/{image_id}.jpg"], CrawlSettings())
    with pytest.raises(InputError, match=r"gs:// needs pip install -c constraints.txt '\.\[gcs\]'"):
        check_object_stores(["s3", "gs://photos/{image_id}.jpg"], CrawlSettings())
    assert failure({}, "gs://photos/one.jpg").code == "unexpected"


def test_options_that_a_library_does_not_know_are_named_before_any_work(server):
    storage = {"s3": {**server.storage["s3"], "anonymous": SECRET}}
    with pytest.raises(InputError, match=r"crawl\.storage: the options of s3 .*TypeError.*anonymous") as raised:
        check_object_stores(["s3://photos/{image_id}.jpg"], CrawlSettings(storage=storage))
    assert SECRET not in str(raised.value)
    error = failure(storage)
    assert error.code == "unexpected"
    assert error.detail.startswith("TypeError: ")
    check_object_stores(["s3://photos/{image_id}.jpg"], CrawlSettings(storage=server.storage))


def test_no_secret_of_the_options_or_the_environment_is_told(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-environment")
    storage = {
        "s3": {"key": "my-key", "client_kwargs": {"aws_secret_access_key": "my-key-and-more"}, "endpoint_url": "http://host"}
    }
    text = "my-key-and-more\nmy-key token-of-the-environment http://host/photos " + "x" * 500
    detail = fetch_error(ValueError(text), "s3", CrawlSettings(storage=storage)).detail
    assert detail.startswith("ValueError: *** *** *** http://host/photos xxx")
    assert len(detail) == 200


def test_a_crawl_of_a_bucket(server, tmp_path, monkeypatch):
    """With a photo that is missing, and nobody else asked."""
    monkeypatch.setattr(crawl, "crawl_on_ray", crawl_here)
    pictures = {f"{number:04d}": good_photo(str(number)) for number in range(3)}
    server.put("crawled", {f"train/{name}.jpg": data for name, data in pictures.items()})
    tables = write_tables(tmp_path / "tables", dict.fromkeys((*pictures, "lost"), ""))
    more = {"crawl.storage": json.dumps(server.storage)}
    store = tmp_path / "store"
    call_crawl(crawl_options(tables, store, tmp_path / "out", None, ["s3://crawled/{split}/{image_id}.jpg"], more))
    assert codes_of(store) == {**dict.fromkeys(pictures, "ok"), "lost": "http_404"}
    assert all(PhotoStore(store).read("train", name) == data for name, data in pictures.items())


def _needs(protocol: str) -> None:
    if protocol == "gs":
        pytest.importorskip("gcsfs", reason="needs '.[gcs]'")
