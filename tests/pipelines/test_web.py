"""One GET against a server that misbehaves on real sockets; every guard, and the code that each trouble gets."""

import asyncio
import gzip
import ipaddress
import itertools
import socket
import ssl
import threading
import zlib
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import quote

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import binary, integers, ip_addresses, lists, sampled_from, text

from pbe_core.errors import InputError
from pipelines.config import CrawlSettings
from pipelines.crawling import web
from pipelines.crawling.addresses import AddressRefused, AddressRules
from pipelines.crawling.answers import Fetched, FetchError
from pipelines.crawling.web import AnswerBody, WebClient
from schemas.outcomes import OUTCOMES
from tests.hostile_server import ETAG, LARGE, LATE, MAX_BYTES, MODIFIED, ROUTES, TROUBLES, HostileServer, good_photo

patiently = settings(deadline=None)  # The machine may be busy.


class OpenGate:
    """Lets everything through, and keeps a diary."""

    def __init__(self):
        self.diary = []

    @asynccontextmanager
    async def request(self, host):
        self.diary.append(f"in {host}")
        try:
            yield
        except FetchError as error:
            self.diary.append(error.code)
            raise
        finally:
            self.diary.append(f"out {host}")


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """What `client` sets is set back."""
    for name in ("CONNECT_SECONDS", "SLOW_SECONDS", "MOST_REDIRECTS"):
        monkeypatch.setattr(web, name, getattr(web, name))


@pytest.fixture(scope="module")
def server():
    with HostileServer({"a.jpg": good_photo()}) as server:
        yield server


@pytest.fixture(scope="module")
def other():
    """A server that nobody may ask: its port is not allowed."""
    with HostileServer() as server:
        yield server


def client(server, *, gate=None, getaddrinfo=socket.getaddrinfo, connect=600, slow=600, redirects=5, **options):
    """A client that may ask `server`, with time limits that nothing reaches: those that something shall reach are given."""
    web.CONNECT_SECONDS, web.SLOW_SECONDS, web.MOST_REDIRECTS = connect, slow, redirects
    allowed = (f"127.0.0.1:{server.port}",)
    given = {"allowed_addresses": allowed, "total_seconds": 600, "max_bytes": MAX_BYTES, **options}
    return WebClient(CrawlSettings(**given), gate or OpenGate(), getaddrinfo)


async def outcome(client, url, **wishes):
    """What came of it: `Fetched` or the `FetchError`; nothing else may escape."""
    try:
        return await client.fetch(url, **wishes)
    except FetchError as error:
        failure = error
    assert failure.code in OUTCOMES
    assert failure.detail.isascii()
    return failure


def ask(server, *paths, gate=None, getaddrinfo=socket.getaddrinfo, wishes=None, **options):
    """What comes of these paths or URLs, one after the other with one client; a single one is not put into a list."""

    async def go():
        async with client(server, gate=gate, getaddrinfo=getaddrinfo, **options) as it:
            urls = [path if "://" in path.partition("?")[0] else server.url(path) for path in paths]
            outcomes = [await outcome(it, url, **(wishes or {})) for url in urls]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return outcomes

    outcomes = asyncio.run(go())
    return outcomes if len(paths) > 1 else outcomes[0]


def resolving(*answers):
    """A getaddrinfo that gives these lists of addresses, one list at each call, the last one for ever; `.calls` counts."""

    def getaddrinfo(host, port, **_):
        getaddrinfo.calls += 1
        addresses = answers[min(getaddrinfo.calls, len(answers)) - 1]
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        places = [(address, port, 0, 0) if ":" in address else (address, port) for address in addresses]
        return [(family, socket.SOCK_STREAM, 6, "", place) for family, place in zip(families, places, strict=True)]

    getaddrinfo.calls = 0
    return getaddrinfo


# What a server does, and what it is called.

CODES = {
    **TROUBLES,
    **LARGE,
    **LATE,
    "/photos/missing.jpg": "http_404",
    "/status/206": "http_other",
    "/status/305": "http_other",
    "/status/999": "http_other",
    "/gzip-photo?encoding=gzip,+gzip": "bad_response",
    "/redirect?to=http://a%2520b/": "bad_response",
    "/robots?tag=noai": "opted_out",
    "/redirect?to=http://169.254.169.254:1/latest/meta-data/": "blocked_address",
}
QUICK = {"timeout": {"total_seconds": 0.4}, "too_slow": {"slow": 0.3}}


@pytest.mark.parametrize(("path", "code"), CODES.items(), ids=CODES)
def test_each_trouble_has_its_code(server, path, code):
    gate = OpenGate()
    error = ask(server, path, gate=gate, **QUICK.get(code, {}))
    assert isinstance(error, FetchError), error
    assert error.code == code
    # The gate learns of it, so that it can spare the host; and every pass is given back.
    assert code in gate.diary or code == "redirect_loop"
    assert sum(line.startswith("in ") for line in gate.diary) == sum(line.startswith("out ") for line in gate.diary)


GOOD = ["/photos/a.jpg", "/chunked", "/until-closed", "/gzip-photo", "/gzip-photo?encoding=x-gzip",
        "/gzip-photo?encoding=deflate", "/gzip-in-members", "/etag", "/last-modified", "/strange-etag",
        "/tdm?value=0", "/robots?tag=all"]  # fmt: skip
ODD = ["/html-as-jpeg", "/large-png", "/png-text", "/png-profile", "/heic", "/no-end-mark", "/truncated",
       "/good", "/cookie", "/interim/9"]  # fmt: skip


@pytest.mark.parametrize("path", GOOD)
def test_a_photo_comes_as_it_is(server, path):
    assert ask(server, path).data == good_photo()


@pytest.mark.parametrize("path", ODD)
def test_what_bytes_are_is_not_judged_here(server, path):
    assert isinstance(ask(server, path), Fetched)


def test_all_routes_of_the_server_are_used():
    used = {path.split("?")[0].split("/")[1] for path in [*CODES, *GOOD, *ODD]}
    assert used | {"busy", "fails", "bad-chunks"} == ROUTES


def test_chunks_that_are_none_end_the_fetch(server):
    """What aiohttp makes of them depends on when they come; the time limits hold."""
    assert ask(server, "/bad-chunks", slow=0.3).code in ("incomplete", "too_slow", "bad_response")


def test_the_error_says_what_the_server_said(server):
    error = ask(server, "/status/404")
    assert (error.http_status, error.detail) == (404, "HTTP 404 Whatever")
    assert ask(server, "/truncated", wishes={"expected_bytes": 7}).http_status == 200


def test_a_failing_server_is_asked_once(server):
    """No attempts of anybody's own: aiohttp would ask a second time when a connection breaks."""
    ask(server, "/reset/once", "/hangs-up/once", "/fails/1/once")
    assert [server.hits[path] for path in ("/reset/once", "/hangs-up/once", "/fails/1/once")] == [1, 1, 1]
    assert isinstance(ask(server, "/fails/1/once"), Fetched)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_handed_on(server, status):
    then = quote(format_datetime(datetime.now(UTC) + timedelta(seconds=10_000), usegmt=True))
    plain, date, none = ask(
        server, f"/status/{status}?retry-after=7", f"/status/{status}/date?retry-after={then}", f"/status/{status}/none"
    )
    assert plain.retry_after == 7
    assert 8000 < date.retry_after <= 10_000  # Less the time that the test takes.
    assert none.retry_after is None


@given(
    text()
    | sampled_from(["9" * 5000, "Wed, 21 Oct 99999 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 -0000", MODIFIED, "٣", "-1", "1.5"])
)
@patiently
def test_any_retry_after_is_a_bounded_wait_or_none(value):
    seconds = web._seconds_until(value)
    assert seconds is None or 0 <= seconds < 1e12


# Time.


def test_no_connection_in_time(server):
    """A server that never answers a TLS handshake, and a name that never resolves."""
    event = threading.Event()
    error = ask(server, server.url("/good").replace("http", "https"), connect=0.3)
    assert (error.code, "no connection" in error.detail) == ("timeout", True)
    try:
        error = ask(server, "http://hangs.example/", getaddrinfo=lambda *_, **__: event.wait(60), connect=0.3)
    finally:
        event.set()
    assert (error.code, "no connection" in error.detail) == ("timeout", True)


def test_dead_names_do_not_hold_up_others(server):
    """More hanging look-ups than the loop's own pool has threads."""
    event = threading.Event()

    def getaddrinfo(host, port, **_):
        return resolving(["127.0.0.1"])(host, port) if host == "alive.example" else event.wait(600)

    async def go():
        async with client(server, getaddrinfo=getaddrinfo, connections=50) as it:
            dead = [asyncio.create_task(outcome(it, f"http://dead{n}.example/")) for n in range(40)]
            await asyncio.sleep(0)
            photo = await it.fetch(server.url("/photos/a.jpg", "alive.example"))
            assert not any(task.done() for task in dead)
            for task in dead:
                task.cancel()
            await asyncio.gather(*dead, return_exceptions=True)
            return photo

    try:
        assert asyncio.run(go()).data == good_photo()
    finally:
        event.set()


def test_the_time_of_all_redirects_counts(server):
    slow = "/redirect?pause=0.2&to=" + quote("/redirect?pause=0.2&to=" + quote("/good?pause=0.2", safe=""), safe="")
    assert ask(server, slow, total_seconds=0.5).code == "timeout"
    assert isinstance(ask(server, slow), Fetched)


def test_waiting_for_the_pass_does_not_count(server):
    """An hour before each of two requests, by the loop's clock."""
    waited = 0

    class SlowGate(OpenGate):
        @asynccontextmanager
        async def request(self, host):
            nonlocal waited
            waited += 3600
            yield

    async def go():
        loop = asyncio.get_running_loop()
        clock = loop.time
        loop.time = lambda: clock() + waited
        async with client(server, gate=SlowGate()) as it:
            return await it.fetch(server.url("/chain/1/pass"))

    assert asyncio.run(go()).data == good_photo("/chain/0/pass")
    assert waited == 7200


def test_what_is_slow_enough_comes(server):
    """Many windows of 100 bytes, all of which come in time; then 20 bytes per s against 250."""
    steady = {"slow_bytes_per_second": 1, "slow": 100}
    assert ask(server, "/slow-body?interval=0.01&step=40", **steady).data == good_photo()
    assert ask(server, "/slow-body?interval=0.05&step=1", slow_bytes_per_second=250, slow=0.4).code == "too_slow"


def test_the_slow_are_given_up_after_two_windows(server):
    """The first has its bytes early; the second has none."""
    error = ask(server, "/stalls", slow=0.3, slow_bytes_per_second=3000)
    assert error.code == "too_slow"
    assert error.detail.startswith("only 0 bytes within 0.3 s")
    assert error.detail.endswith("after 1000 bytes")


def test_cancelling_is_not_an_error(server):
    async def go():
        async with client(server) as it:
            task = asyncio.create_task(it.fetch(server.url("/never/cancelled")))
            while not server.hits["/never/cancelled"]:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(go())


# Size.


def test_too_large_by_one_byte(server):
    size = len(good_photo())
    for path in ("/photos/a.jpg", "/chunked", "/gzip-photo"):
        assert isinstance(ask(server, path, max_bytes=size), Fetched)
        assert ask(server, path, max_bytes=size - 1).code == "too_large"
    # At once, though nothing comes.
    assert ask(server, f"/stalls?length={MAX_BYTES + 1}").code == "too_large"


def test_a_size_that_is_not_expected(server):
    """At once where it is announced, though nothing comes; in the end where it is not."""
    size = len(good_photo())
    assert ask(server, f"/stalls?length={size + 1}", wishes={"expected_bytes": size}).code == "size_mismatch"
    for path in ("/photos/a.jpg", "/chunked", "/gzip-photo"):
        assert ask(server, path, wishes={"expected_bytes": size + 1}).code == "size_mismatch"
        assert isinstance(ask(server, path, wishes={"expected_bytes": size}), Fetched)


def test_what_is_given_up_is_not_drained(server):
    """Its connection is not used again, and the next answer is right."""
    before = server.connections
    large, photo = ask(server, f"/stalls/drained?length={MAX_BYTES + 1}", "/photos/a.jpg")
    assert (large.code, photo.data) == ("too_large", good_photo())
    assert server.connections == before + 2


def test_what_unpacks_to_more_than_is_allowed_is_not_unpacked(monkeypatch):
    """What is packed may be a thousand times as long. The limit bounds the memory: no more than one step goes beyond it."""
    monkeypatch.setattr(web, "_UNPACKED_AT_ONCE", 100)
    body = AnswerBody(1000, packed=True)
    with pytest.raises(FetchError, match="too_large"):
        body.add(gzip.compress(bytes(1500)))
    assert len(body._photo) <= 1100


def test_a_photo_in_too_many_members_is_none(server, monkeypatch):
    """Those without content cost time and add nothing to the bytes that are counted: the limit bounds the time."""
    monkeypatch.setattr(web, "_MOST_MEMBERS", 10)
    assert isinstance(ask(server, "/gzip-in-members?empty=8"), Fetched)
    assert ask(server, "/gzip-in-members?empty=9").code == "bad_response"


@given(binary(max_size=200), integers(1, 5), lists(integers(0, 400)), integers(1, 40), sampled_from(["gzip", "deflate"]))
@patiently
def test_unpacking_gives_what_was_packed(data, members, cuts, step, encoding):
    """However it is cut into chunks, and however little is unpacked at once."""
    members = members if encoding == "gzip" else 1
    packed = (gzip.compress(data) if encoding == "gzip" else zlib.compress(data)) * members
    expected = data * members
    edges = sorted({0, len(packed), *(cut for cut in cuts if cut < len(packed))})
    body = AnswerBody(len(packed) + len(expected), packed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "_UNPACKED_AT_ONCE", step)
        for start, end in itertools.pairwise(edges):
            body.add(packed[start:end])
    if expected:
        assert body.finished() == expected
    else:
        with pytest.raises(FetchError, match="not_an_image"):
            body.finished()


# Opting out.


@pytest.mark.parametrize(
    ("tags", "counts"),
    [
        (["noai"], True),
        (["NoImageAI"], True),
        (["max-image-preview: large, noindex"], True),
        (["unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noindex"], True),
        (["nofollow", "noimageindex"], True),
        (["none"], True),
        (["*: noai"], True),
        (["paint-by-example: noai"], True),
        (["googlebot: nofollow, paint-by-example: nofollow, noai"], True),
        (["googlebot: noindex", "noindex"], True),
        (["googlebot: noindex"], False),
        (["googlebot: nofollow, noindex"], False),
        (["all"], False),
        (["nofollow, noarchive"], False),
        (["noindexes"], False),
        ([" "], False),
    ],
)
def test_robots_tags(server, tags, counts):
    path = "/robots?" + "&".join(f"tag={quote(tag)}" for tag in tags)
    answer, unasked = ask(server, path), ask(server, path, opt_out=())
    assert isinstance(unasked, Fetched)
    assert (isinstance(answer, FetchError) and answer.code == "opted_out") == counts


def test_opting_out_is_the_users_choice(server):
    noindex, noai = ask(server, "/robots?tag=noindex", "/robots?tag=noai", opt_out=("noai",))
    assert (isinstance(noindex, Fetched), noai.code) == (True, "opted_out")
    assert isinstance(ask(server, "/tdm", opt_out=()), Fetched)


# What we have already.


def test_what_has_not_changed_does_not_come_again(server):
    new = ask(server, "/etag")
    assert (new.data, new.etag, new.not_modified) == (good_photo(), ETAG, False)
    same = ask(server, "/etag", wishes={"etag": new.etag})
    assert (same.data, same.etag, same.http_status, same.not_modified) == (b"", ETAG, 304, True)
    assert ask(server, "/etag", wishes={"etag": '"old"'}).data == good_photo()
    new = ask(server, "/last-modified")
    assert (new.last_modified, new.etag) == (MODIFIED, None)
    same = ask(server, "/last-modified", wishes={"last_modified": MODIFIED})
    assert (same.last_modified, same.not_modified) == (MODIFIED, True)


def test_tags_that_cannot_be_stored_are_dropped(server):
    fetched = ask(server, "/strange-etag")
    assert (fetched.etag, fetched.last_modified) == (None, None)


# What the server learns of us.


def test_who_asks_is_said_and_no_more(monkeypatch):
    """No cookies, no password, no proxy of the environment, nothing packed."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with HostileServer() as server:
        url = server.url("/cookie").replace("127", "me:secret@127")
        fetched = ask(server, url, "/good/who#part", contact="https://example.org/crawl")
    assert [each.url for each in fetched] == [server.url("/good/cookie"), server.url("/good/who")]
    assert server.hits == {"/cookie": 1, "/good/cookie": 1, "/good/who": 1}
    for request in server.requests:
        assert set(request.headers) == {"host", "user-agent", "accept", "accept-encoding"}
        assert request.headers["accept"].startswith("image/jpeg,image/png,image/webp,image/avif,")
        assert request.headers["accept"].endswith(",image/*;q=0.5")
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["user-agent"].startswith("paint-by-example/")
        assert request.headers["user-agent"].endswith(" (+https://example.org/crawl)")


def test_connections_are_used_again(server):
    before = server.connections
    assert all(isinstance(each, Fetched) for each in ask(server, *(f"/good/{n}" for n in range(20)), "/chain/3", "/etag"))
    assert server.connections == before + 1


def test_a_certificate_that_nobody_trusts():
    with HostileServer(tls=True) as server:
        assert ask(server, "/good").code == "tls"
        assert not server.requests


def test_a_certificate_that_is_trusted(monkeypatch):
    """The same server is fine where its certificate is; so it is the certificate that is looked at."""
    with HostileServer(tls=True) as server:
        trusting = ssl.create_default_context(cadata=ssl.get_server_certificate(("127.0.0.1", server.port)))
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
        localhost, number = ask(server, server.url("/good", "localhost"), "/good", getaddrinfo=resolving(["127.0.0.1"]))
        assert isinstance(localhost, Fetched)
        assert number.code == "tls"


# URLs and redirects.


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("", "bad_url"),
        ("photo.jpg", "bad_url"),
        ("//example.com/a.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http:///a.jpg", "bad_url"),
        ("http://a:b:c/", "bad_url"),
        ("http://example.com:99999/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://[fe80::g]/", "bad_url"),
        ("http://[]@/", "bad_url"),
        ("http://a..b/", "bad_url"),
        (f"http://{'a' * 64}.com/", "bad_url"),
        ("http://a%00b/", "bad_url"),
        ("http://a b/", "bad_url"),
        ("http://a\udce9/", "bad_url"),
        ("http://1.2.3.4.5/", "bad_url"),
        ("file:///etc/passwd", "blocked_scheme"),
        ("ftp://example.com/a.jpg", "blocked_scheme"),
        ("data:image/png;base64,AA==", "blocked_scheme"),
        ("javascript:alert(1)", "blocked_scheme"),
    ],
)
def test_urls_that_are_not_asked_for(server, url, code):
    async def go():
        async with client(server, getaddrinfo=resolving(["127.0.0.1"])) as it:
            return await outcome(it, url)

    assert asyncio.run(go()).code == code


@given(text(max_size=30) | text(alphabet="http:/[]@.%0123456789abx#?\\ ", max_size=30))
@example("[]@")
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_url_or_a_bad_one(anything):
    """Nothing else escapes, and what remains has a host that can be looked up and no password."""
    for base in (None, web._as_url("http://example.com/a/b")):
        for prefix in ("", "http://", "https://u:p@"):
            try:
                url = web._as_url(prefix + anything, base)
            except FetchError as error:
                url = error
            if isinstance(url, FetchError):
                assert url.code in ("bad_url", "blocked_scheme")
            else:
                assert url.scheme in ("http", "https")
                assert url.user is None
                assert web._as_host(url.raw_host) == url.raw_host


@pytest.mark.parametrize("path", ["/a%2Fb", "/a?x=%2f&y=%7e", "/a?sig=%3D%2B+~", "/%e9", "/a//b/../c"])
def test_urls_are_asked_for_as_they_stand(server, path):
    """A signature over the URL would not survive other quoting."""
    ask(server, path)
    request = server.requests[-1]
    assert request.target == path


def test_redirects_lead_on(server, other):
    """Relative ones, as many as are allowed; what came where from; each host's own pass, one at a time."""
    gate = OpenGate()
    fetched = ask(server, "/chain/5/x", gate=gate)
    assert (fetched.url, fetched.http_status) == (server.url("/chain/0/x"), 200)
    assert gate.diary == [f"in 127.0.0.1:{server.port}", f"out 127.0.0.1:{server.port}"] * 6
    both = {"allowed_addresses": (f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}")}
    gate = OpenGate()
    assert ask(server, f"/redirect?to={quote(other.url('/good'))}", gate=gate, **both).url == other.url("/good")
    hosts = [f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}"]
    assert gate.diary == [f"{way} {host}" for host in hosts for way in ("in", "out")]
    gate = OpenGate()
    ask(server, server.url("/good", "Photos.Example"), gate=gate, getaddrinfo=resolving(["127.0.0.1"]))
    assert gate.diary[0] == f"in photos.example:{server.port}"


def test_redirects_have_an_end(server):
    ask(server, "/loop/a/end", "/itself/end")
    assert [server.hits[path] for path in ("/loop/a/end", "/loop/b/end", "/itself/end")] == [1, 1, 1]
    assert ask(server, "/chain/3/end", redirects=2).code == "redirect_loop"
    assert [server.hits[f"/chain/{left}/end"] for left in (3, 2, 1, 0)] == [1, 1, 1, 0]
    assert isinstance(ask(server, "/good", redirects=0), Fetched)


def test_a_redirect_in_latin_1(server):
    """Bytes that are no UTF-8 are percent-encoded, as browsers do."""
    assert ask(server, "/redirect?to=/good/%E9").url == server.url("/good/%E9")
    assert ask(server, "/redirect?to=/good/%C3%A9").url == server.url("/good/%C3%A9")


def test_a_host_that_is_given_up_is_not_asked(server):
    class ShutGate(OpenGate):
        @asynccontextmanager
        async def request(self, host):
            raise FetchError("http_5xx", "given up")
            yield

    assert ask(server, "/good/given-up", gate=ShutGate()).code == "http_5xx"
    assert server.hits["/good/given-up"] == 0


# Addresses.


def test_only_the_allowed_port(server, other):
    """Neither directly nor by a redirect, nor with a connection that stands already."""
    first, direct, led = ask(server, "/good", other.url("/secret"), f"/redirect?to={quote(other.url('/secret'))}")
    assert isinstance(first, Fetched)
    assert (direct.code, led.code) == ("blocked_address", "blocked_address")
    assert other.hits["/secret"] == 0


SPELLINGS = ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1",
             "127.0.0.1.", "127。0。0。1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]  # fmt: skip
OTHER_WAYS = ["0.0.0.0", "0", "[::]", "[::1]", "[fe80::1%25lo]", "[fe80::1%lo]", "[::127.0.0.1]",
              "[64:ff9b::7f00:1]"]  # fmt: skip


@pytest.mark.parametrize("host", SPELLINGS)
def test_spellings_of_an_address(server, other, host):
    """Each is the address that it means: refused where that is, and one host for the gate where it is allowed."""
    connections = other.connections
    for url in (other.url("/secret", host), server.url(f"/redirect?to={quote(other.url('/secret', host))}")):
        assert ask(server, url).code == "blocked_address"
    assert other.connections == connections
    gate = OpenGate()
    assert isinstance(ask(server, server.url("/good", host), gate=gate), Fetched)
    assert gate.diary[0] == f"in {'[::ffff:7f00:1]' if '[' in host else '127.0.0.1'}:{server.port}"


@pytest.mark.parametrize("host", OTHER_WAYS)
def test_other_ways_to_this_machine(other, server, host):
    connections = other.connections
    assert ask(server, other.url("/secret", host)).code == "blocked_address"
    assert other.connections == connections


@pytest.mark.parametrize("addresses", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "fe80::1"]])
def test_a_name_with_one_bad_address_is_refused(server, addresses):
    """Not even the good one is connected to; the message names both the name and the address."""
    connections = server.connections
    error = ask(server, server.url("/good", "two.example"), getaddrinfo=resolving(addresses))
    assert error.code == "blocked_address"
    assert "two.example" in error.detail
    assert ("127.0.0.2" if "127.0.0.2" in addresses else "fe80::1") in error.detail
    assert server.connections == connections


def test_a_scoped_address_keeps_its_scope(server):
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))]
    error = ask(server, "http://scoped.example/", getaddrinfo=lambda *_, **__: found)
    assert (error.code, "fe80::1%3" in error.detail) == ("blocked_address", True)


def test_a_name_that_changes_its_address(server, other):
    """What was checked is what is connected to; and what is looked up anew is checked anew."""
    look_up = resolving(["127.0.0.1"], ["127.0.0.2"])
    ports = {"allowed_addresses": (f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}")}
    first = server.url("/photos/a.jpg", "rebinding.example")
    outcomes = ask(server, first, first, other.url("/secret", "rebinding.example"), getaddrinfo=look_up, **ports)
    assert [getattr(each, "code", "ok") for each in outcomes] == ["ok", "ok", "blocked_address"]
    assert look_up.calls == 2
    assert other.hits["/secret"] == 0


def test_names_are_looked_up_once(server):
    look_up = resolving(["127.0.0.1"])
    ask(server, *[server.url("/until-closed", "often.example")] * 3, getaddrinfo=look_up)
    assert look_up.calls == 1


def test_a_name_without_address(server):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert ask(server, "http://nowhere.example/", getaddrinfo=unknown).code == "dns"
    assert ask(server, "http://nothing.example/", getaddrinfo=resolving([])).code == "dns"


def test_a_port_where_nobody_listens(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert ask(server, f"http://127.0.0.1:{port}/", allowed_addresses=("127.0.0.1",)).code == "connect"


def test_what_nobody_foresaw_has_its_name(server):
    def broken(*_, **__):
        raise ZeroDivisionError("first line\nsecond line")

    error = ask(server, "http://broken.example/", getaddrinfo=broken)
    assert (error.code, error.detail) == ("unexpected", "ZeroDivisionError: first line")


NETWORKS = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
            "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
            "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "::/128",
            "::1/128", "::/96", "100::/64", "64:ff9b:1::/48", "2001::/32", "2001:db8::/32", "2001:10::/28", "2001:20::/28",
            "3fff::/20", "4000::/3", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"]  # fmt: skip
PRIVATE = [ipaddress.ip_network(network) for network in NETWORKS]
PUBLIC_6 = [ipaddress.ip_network(network) for network in ("2001:4860::/32", "2606:4700::/32", "2a00::/12", "2404::/16")]


def disguises(number):
    """IPv6 addresses whose packets end at this IPv4 one."""
    kinds = {"mapped": (0xFFFF << 32, 0), "6to4": (0x2002 << 112, 80), "NAT64": (0x64FF9B << 96, 0)}
    return [ipaddress.IPv6Address(prefix | int(number) << shift) for prefix, shift in kinds.values()]


@given(sampled_from(PRIVATE).flatmap(lambda network: ip_addresses(network=network)), integers(1, 65535))
@patiently
def test_no_private_address(number, port):
    rules = AddressRules([])
    assert rules.refusal(str(number), port)
    if number.version == 4:
        assert all(rules.refusal(str(other), port) for other in disguises(number))
        assert rules.refusal(f"::{number}", port)
    else:
        assert rules.refusal(f"{number}%eth0", port)


@given(ip_addresses(v=4) | sampled_from(PUBLIC_6).flatmap(lambda network: ip_addresses(network=network)))
@patiently
def test_all_public_addresses(number):
    rules = AddressRules([])
    if any(number in network for network in PRIVATE):
        return
    assert rules.refusal(str(number), 80) is None
    if number.version == 4:
        assert not any(rules.refusal(str(other), 80) for other in disguises(number))


@given(text(max_size=20))
@example("127.0.0.1%lo")
@patiently
def test_what_is_no_address_is_refused(anything):
    """A resolver further down would take it for a name, and what that gives is not looked at."""
    try:
        ipaddress.ip_address(anything)
    except ValueError:
        assert AddressRules(["0.0.0.0/0", "::/0"]).refusal(anything, 80)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("fe80::1%eth0", "link-local"),
        ("224.0.0.1", "multicast"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "carrier's NAT"),
        ("4000::1", "reserved"),
        ("64:ff9b::a00:1", "NAT64 for 10.0.0.1, private"),
        ("2002:a00:1::", "6to4 for 10.0.0.1, private"),
        ("::a00:1", "IPv4-compatible, for 10.0.0.1"),
    ],
)
def test_a_refusal_says_what_the_address_is(address, kind):
    refusal = AddressRules([]).refusal(address, 80)
    assert refusal == f"{address} is not public ({kind}) and not among crawl.allowed_addresses"


METADATA = ["169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16",
            "192.0.0.192", "fe80::a9fe:a9fe"]  # fmt: skip


@pytest.mark.parametrize("address", METADATA)
def test_metadata_services(address):
    assert AddressRules(["10.0.0.0/8"]).refusal(address, 80)


@pytest.mark.parametrize(
    ("rule", "fine", "refused"),
    [
        ("127.0.0.1", [("127.0.0.1", 80), ("127.0.0.1", 8000), ("::ffff:127.0.0.1", 1)], [("127.0.0.2", 80), ("::1", 80)]),
        ("127.0.0.1:8000", [("127.0.0.1", 8000)], [("127.0.0.1", 80)]),
        ("::1", [("::1", 80)], [("127.0.0.1", 80)]),
        ("[::1]:8000", [("::1", 8000)], [("::1", 80)]),
        ("10.1.0.0/16", [("10.1.2.3", 80), ("10.1.255.255", 9)], [("10.2.0.0", 80)]),
        ("10.1.0.0/16:8000", [("10.1.2.3", 8000)], [("10.1.2.3", 80)]),
        ("fd00::/8", [("fd12::1", 80)], [("fe80::1", 80)]),
        ("fd00::/8:8000", [("fd12::1", 8000)], [("fd12::1", 80)]),
        ("fe80::/10", [("fe80::1%eth0", 80)], [("fd00::1", 80)]),
    ],
)
def test_allowed_addresses(rule, fine, refused):
    rules = AddressRules([rule])
    assert [rules.refusal(*place) for place in fine] == [None] * len(fine)
    assert all("crawl.allowed_addresses" in rules.refusal(*place) for place in refused)


BAD_RULES = [
    *(
        "",
        "127.0.0.1 ",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "10.0.0",
        "10.0.0.0/33",
        "10.0.0.1/16",
        "10.0.0.0/255.0.0.0",
    ),
    *("[::1]", "[::1]:x", "::1]:80", "fe80::1%eth0", "localhost", "http://127.0.0.1", "*"),
]


@pytest.mark.parametrize("rule", BAD_RULES)
def test_a_rule_that_cannot_be_read_names_the_setting(rule):
    with pytest.raises(InputError, match=r"crawl\.allowed_addresses"):
        AddressRules([rule])


def test_sockets_are_only_for_fine_addresses():
    """Also where something else than our resolver chose the address."""
    rules = AddressRules(["127.0.0.1:80"])
    rules.checked_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))).close()
    for place in (("127.0.0.1", 81), ("2130706433", 80), ("localhost", 80), ("169.254.169.254", 80)):
        with pytest.raises(AddressRefused):
            rules.checked_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", place))


# All at once.


def test_a_thousand_of_everything(server):
    """At 64 in flight: each ends with one of our codes, and memory stays where it was."""
    paths = [*CODES, *GOOD]
    process = psutil.Process()
    peak = 0

    async def go():
        nonlocal peak
        waiting = iter(range(1000))
        async with client(server, total_seconds=0.5, slow=0.2) as it:

            async def work():
                nonlocal peak
                for number in waiting:
                    path = paths[number % len(paths)]
                    results.append((path, await outcome(it, server.url(path))))
                    peak = max(peak, process.memory_info().rss)

            await asyncio.gather(*(work() for _ in range(64)))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    results = []
    ask(server, "/large-gzip")
    before = process.memory_info().rss
    asyncio.run(go())
    assert len(results) == 1000
    assert peak - before < 150e6
    # A busy machine may be too slow for these limits; but nothing is called what it is not.
    strange = [(path, each) for path, each in results if getattr(each, "code", "ok") not in (CODES.get(path, "ok"), *QUICK)]
    assert not strange
    for thread in threading.enumerate():
        if thread.name.startswith("dns"):
            thread.join(600)
            assert not thread.is_alive()


def test_the_server_measures_limits():
    """What tests of politeness rely on: it sees how many are in flight, and when each came; and it can hold them."""
    permits = asyncio.Semaphore(3)

    class NarrowGate(OpenGate):
        @asynccontextmanager
        async def request(self, host):
            async with permits:
                yield

    async def go():
        server.answers = 0
        async with client(server, gate=NarrowGate()) as it:
            asking = asyncio.gather(*(it.fetch(server.url(f"/good/measured/{n}?pause=0.1")) for n in range(6)))
            while len(server.requests) < 3:
                await asyncio.sleep(0.01)
            server.answers = 6
            await asking

    with HostileServer() as server:
        asyncio.run(go())
    times = server.times("/good/measured/")
    assert server.most_at_once("/good/measured/") == 3
    assert len(times) == 6
    assert times[3] - times[0] >= 0.1
