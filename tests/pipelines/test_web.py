"""One GET against a server that misbehaves on real sockets; every guard, and the code that each trouble gets."""

import asyncio
import ipaddress
import socket
import ssl
import threading
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import integers, ip_addresses, sampled_from, text

from pbe_core.errors import InputError
from pipelines.config import CrawlSettings, HostSettings
from pipelines.crawling import web
from pipelines.crawling.addresses import AddressRefused, AddressRules
from pipelines.crawling.answers import Fetched, FetchError
from pipelines.crawling.hosts import HostLimits
from pipelines.crawling.web import WebClient
from schemas.outcomes import OUTCOMES
from tests.hostile_server import BY_THE_BYTES, ETAG, LATE, MAX_BYTES, MODIFIED, TROUBLES, HostileServer, good_photo


class OpenGate(HostLimits):
    """Lets everything through, and keeps a diary."""

    def __init__(self):
        super().__init__(HostSettings(), 1)
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


def ask(server, *paths, gate=None, getaddrinfo=socket.getaddrinfo, wishes=None, at_once=False, **options):
    """What comes of these paths or URLs, one after the other or at once, with one client; a single one is not put into a list."""

    async def go():
        async with client(server, gate=gate, getaddrinfo=getaddrinfo, **options) as it:
            urls = [path if "://" in path.partition("?")[0] else server.url(path) for path in paths]
            asking = [outcome(it, url, **(wishes or {})) for url in urls]
            outcomes = await asyncio.gather(*asking) if at_once else [await each for each in asking]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return outcomes

    outcomes = asyncio.run(go())
    return outcomes if len(paths) > 1 else outcomes[0]


def codes(outcomes):
    return [getattr(each, "code", "ok") for each in outcomes]


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

GOOD = ["/photos/a.jpg", "/chunked", "/until-closed", "/gzip-photo", "/deflate-photo", "/gzip-in-members", "/etag",
        "/last-modified", "/headers?tdm-reservation=0", "/headers?X-Robots-Tag=all", "/interim"]  # fmt: skip


def test_each_trouble_has_its_code(server):
    """All at once; each pass of the gate is given back, and the gate learns of what speaks against a host."""
    gate = OpenGate()
    found = dict(zip(TROUBLES, ask(server, *TROUBLES, gate=gate, at_once=True), strict=True))
    assert {path: getattr(each, "code", each) for path, each in found.items()} == TROUBLES
    assert set(gate.diary) >= set(TROUBLES.values()) - {"redirect_loop"}
    assert sum(line.startswith("in ") for line in gate.diary) == sum(line.startswith("out ") for line in gate.diary)
    assert (found["/status/404"].http_status, found["/status/404"].detail) == (404, "HTTP 404 Whatever")


def test_photos_come_as_they_are_and_what_bytes_are_is_not_judged_here(server):
    assert [each.data for each in ask(server, *GOOD, at_once=True)] == [good_photo()] * len(GOOD)
    assert set(codes(ask(server, *BY_THE_BYTES, at_once=True))) == {"ok"}


@pytest.mark.parametrize(("code", "limits"), [("timeout", {"total_seconds": 0.4}), ("too_slow", {"slow": 0.3})])
def test_what_takes_too_long_is_given_up(server, code, limits):
    paths = [path for path, late in LATE.items() if late == code]
    assert codes(ask(server, *paths, at_once=True, **limits)) == [code] * len(paths)


def test_a_failing_server_is_asked_once(server):
    """No attempts of anybody's own: aiohttp would ask a second time when a connection breaks."""
    ask(server, "/reset/once", "/hangs-up/once", "/fails/1/once")
    assert [server.hits[path] for path in ("/reset/once", "/hangs-up/once", "/fails/1/once")] == [1, 1, 1]


def test_retry_after_is_handed_on(server):
    then = quote(format_datetime(datetime.now(UTC) + timedelta(seconds=10_000), usegmt=True))
    plain, date, none = ask(
        server, "/status/429?retry-after=7", f"/status/503/date?retry-after={then}", "/status/503/none", at_once=True
    )
    assert plain.retry_after == 7
    assert 8000 < date.retry_after <= 10_000  # Less the time that the test takes.
    assert none.retry_after is None


@given(text() | sampled_from(["9" * 5000, "Wed, 21 Oct 99999 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 -0000", MODIFIED, "٣"]))
def test_any_retry_after_is_a_bounded_wait_or_none(value):
    seconds = web._seconds_until(value)
    assert seconds is None or 0 <= seconds < 1e12


# Time.


def test_no_connection_in_time(server):
    """A server that never answers a TLS handshake, and a name that never resolves."""
    event = threading.Event()
    urls = [server.url("/good").replace("http", "https"), "http://hangs.example/"]
    try:
        for error in ask(server, *urls, getaddrinfo=lambda *_, **__: event.wait(60), connect=0.3, at_once=True):
            assert (error.code, "no connection" in error.detail) == ("timeout", True)
    finally:
        event.set()


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


def test_what_is_slow_enough_comes_and_the_slow_are_given_up_after_two_windows(server):
    """Many windows of 100 bytes, all of which come in time; then one that has its bytes early before one that has none."""
    steady = {"slow_bytes_per_second": 1, "slow": 100}
    assert ask(server, "/slow-body?interval=0.01&step=40", **steady).data == good_photo()
    error = ask(server, "/stalls", slow=0.3, slow_bytes_per_second=3000)
    assert error.code == "too_slow"
    assert error.detail.startswith("only 0 bytes within 0.3 s")
    assert error.detail.endswith("after 1,000 bytes")


# Size.


def test_sizes_by_one_byte(server):
    """Too large, or not the expected size: at once where it is announced, though nothing comes; in the end where it is not."""
    size = len(good_photo())
    paths = ["/photos/a.jpg", "/chunked", "/gzip-photo"]
    assert codes(ask(server, *paths, max_bytes=size, wishes={"expected_bytes": size})) == ["ok"] * 3
    assert codes(ask(server, *paths, max_bytes=size - 1)) == ["too_large"] * 3
    mismatch = ask(server, *paths, wishes={"expected_bytes": size + 1})
    assert [(each.code, each.http_status) for each in mismatch] == [("size_mismatch", 200)] * 3
    assert ask(server, f"/stalls?length={MAX_BYTES + 1}").code == "too_large"
    assert ask(server, f"/stalls?length={size + 1}", wishes={"expected_bytes": size}).code == "size_mismatch"


# Opting out.


def test_robots_tags(server):
    opts_out = [
        "noai",
        "NoImageAI",
        "max-image-preview: large, noindex",
        "unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noindex",
        "none",
        "*: noai",
        "paint-by-example: noai",
        "googlebot: nofollow, paint-by-example: nofollow, noai",
    ]
    not_us = ["googlebot: noindex", "googlebot: nofollow, noindex", "all", "nofollow, noarchive", "noindexes", " "]
    two = "/headers?X-Robots-Tag=nofollow&X-Robots-Tag=noimageindex"
    paths = [f"/headers?X-Robots-Tag={quote(tag)}" for tag in (*opts_out, *not_us)]
    assert codes(ask(server, two, *paths)) == ["opted_out"] * (1 + len(opts_out)) + ["ok"] * len(not_us)
    assert set(codes(ask(server, two, *paths, "/headers?tdm-reservation=1", opt_out=()))) == {"ok"}
    noindex, noai = "/headers?X-Robots-Tag=noindex", "/headers?X-Robots-Tag=noai"
    assert codes(ask(server, noindex, noai, opt_out=("noai",))) == ["ok", "opted_out"]


# What we have already.


def test_what_has_not_changed_does_not_come_again(server):
    new = ask(server, "/etag")
    assert (new.data, new.etag, new.not_modified) == (good_photo(), ETAG, False)
    same = ask(server, "/etag", wishes={"etag": new.etag})
    assert (same.data, same.etag, same.http_status, same.not_modified) == (b"", ETAG, 304, True)
    assert ask(server, "/etag", wishes={"etag": '"old"'}).data == good_photo()
    same = ask(server, "/last-modified", wishes={"last_modified": MODIFIED})
    assert (same.last_modified, same.not_modified) == (MODIFIED, True)
    strange = ask(server, "/headers?ETag=%22%E9%22&Last-Modified=%E9t%E9")  # No UTF-8: it cannot be stored.
    assert (strange.etag, strange.last_modified) == (None, None)


# What the server learns of us.


def test_who_asks_is_said_and_no_more(monkeypatch):
    """No cookies, no password, no proxy of the environment, nothing packed."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with HostileServer() as server:
        url = server.url("/redirect").replace("127", "me:secret@127")
        fetched = ask(server, url, "/good/who#part", contact="https://example.org/crawl")
    assert [each.url for each in fetched] == [server.url("/good/redirected"), server.url("/good/who")]
    for request in server.requests:
        assert set(request.headers) == {"host", "user-agent", "accept", "accept-encoding"}
        assert request.headers["accept"].startswith("image/jpeg,image/png,image/webp,image/avif,")
        assert request.headers["accept"].endswith(",image/*;q=0.5")
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["user-agent"].startswith("paint-by-example/")
        assert request.headers["user-agent"].endswith(" (+https://example.org/crawl)")


def test_connections_are_used_again(server):
    before = server.connections
    assert set(codes(ask(server, *(f"/good/{n}" for n in range(20)), "/chain/3", "/etag"))) == {"ok"}
    assert server.connections == before + 1


def test_only_trusted_certificates(monkeypatch):
    """The same server is fine where its certificate is; so it is the certificate that is looked at."""
    with HostileServer(tls=True) as server:
        assert ask(server, "/good").code == "tls"
        assert not server.requests
        trusting = ssl.create_default_context(cadata=ssl.get_server_certificate(("127.0.0.1", server.port)))
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
        outcomes = ask(server, server.url("/good", "localhost"), "/good", getaddrinfo=resolving(["127.0.0.1"]))
        assert codes(outcomes) == ["ok", "tls"]


# URLs and redirects.


def test_urls_that_are_not_asked_for(server):
    bad = [
        *("", "photo.jpg", "//example.com/a.jpg", "http://", "http:///a.jpg", "http://a:b:c/", "http://example.com:99999/"),
        *("http://[::1/", "http://[fe80::g]/", "http://[]@/", "http://a..b/", f"http://{'a' * 64}.com/", "http://a%00b/"),
        *("http://a b/", "http://a\udce9/", "http://1.2.3.4.5/"),
    ]
    blocked = ["file:///etc/passwd", "ftp://example.com/a.jpg", "data:image/png;base64,AA==", "javascript:alert(1)"]

    async def go():
        async with client(server, getaddrinfo=resolving(["127.0.0.1"])) as it:
            return [(url, (await outcome(it, url)).code) for url in (*bad, *blocked)]

    assert asyncio.run(go()) == [*((url, "bad_url") for url in bad), *((url, "blocked_scheme") for url in blocked)]


@given(text(max_size=30) | text(alphabet="http:/[]@.%0123456789abx#?\\ ", max_size=30))
@example("[]@")
@settings(max_examples=200)
def test_any_text_is_a_url_or_a_bad_one(anything):
    """Nothing else escapes, and what remains has a host that can be looked up and no password."""
    for base in (None, web._as_url("http://example.com/a/b")):
        for prefix in ("", "http://", "https://u:p@"):
            try:
                url = web._as_url(prefix + anything, base)
            except FetchError:
                continue
            assert url.scheme in ("http", "https")
            assert url.user is None
            assert web._as_host(url.raw_host) == url.raw_host


def test_urls_are_asked_for_as_they_stand(server):
    """A signature over the URL would not survive other quoting."""
    paths = ["/a%2Fb", "/a?x=%2f&y=%7e", "/a?sig=%3D%2B+~", "/%e9", "/a//b/../c"]
    before = len(server.requests)
    ask(server, *paths)
    assert [request.target for request in server.requests[before:]] == paths


def test_redirects_lead_on(server, other):
    """Relative ones, as many as are allowed; what came where from; each host's own pass, one at a time."""
    here, there = f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}"
    gate = OpenGate()
    fetched = ask(server, "/chain/5/x", gate=gate)
    assert (fetched.url, fetched.http_status) == (server.url("/chain/0/x"), 200)
    assert gate.diary == [f"in {here}", f"out {here}"] * 6
    gate = OpenGate()
    fetched = ask(server, f"/redirect?to={quote(other.url('/good'))}", gate=gate, allowed_addresses=(here, there))
    assert fetched.url == other.url("/good")
    assert gate.diary == [f"{way} {host}" for host in (here, there) for way in ("in", "out")]
    gate = OpenGate()
    ask(server, server.url("/good", "Photos.Example"), gate=gate, getaddrinfo=resolving(["127.0.0.1"]))
    assert gate.diary[0] == f"in photos.example:{server.port}"
    # Bytes that are no UTF-8 are percent-encoded, as browsers do.
    for path in ("/good/%E9", "/good/%C3%A9"):
        assert ask(server, f"/redirect?to={path}").url == server.url(path)


def test_redirects_have_an_end(server):
    ask(server, "/loop/a/end", "/loop/c/end")
    assert [server.hits[path] for path in ("/loop/a/end", "/loop/b/end", "/loop/c/end")] == [1, 1, 1]
    assert ask(server, "/chain/3/end", redirects=2).code == "redirect_loop"
    assert [server.hits[f"/chain/{left}/end"] for left in (3, 2, 1, 0)] == [1, 1, 1, 0]


# Addresses.


def test_only_the_allowed_port(server, other):
    """Neither directly nor by a redirect, nor with a connection that stands already."""
    outcomes = ask(server, "/good", other.url("/secret"), f"/redirect?to={quote(other.url('/secret'))}")
    assert codes(outcomes) == ["ok", "blocked_address", "blocked_address"]
    assert other.hits["/secret"] == 0


SPELLINGS = ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1",
             "127.0.0.1.", "127。0。0。1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]  # fmt: skip
OTHER_WAYS = ["0.0.0.0", "0", "[::]", "[::1]", "[fe80::1%25lo]", "[fe80::1%lo]", "[::127.0.0.1]",
              "[64:ff9b::7f00:1]"]  # fmt: skip


def test_spellings_of_an_address(server, other):
    """Each is the address that it means: refused where that is, and one host for the gate where it is allowed."""
    before = other.connections
    led = [server.url(f"/redirect?to={quote(other.url('/secret', host))}") for host in SPELLINGS]
    refused = ask(server, *(other.url("/secret", host) for host in (*SPELLINGS, *OTHER_WAYS)), *led)
    assert set(codes(refused)) == {"blocked_address"}
    assert other.connections == before
    for host in SPELLINGS:
        gate = OpenGate()
        assert isinstance(ask(server, server.url("/good", host), gate=gate), Fetched), host
        assert gate.diary[0] == f"in {'[::ffff:7f00:1]' if '[' in host else '127.0.0.1'}:{server.port}"


def test_a_name_with_one_bad_address_is_refused(server):
    """Not even the good one is connected to; the message names both the name and the address."""
    before = server.connections
    for bad, addresses in (
        ("127.0.0.2", ["127.0.0.1", "127.0.0.2"]),
        ("127.0.0.2", ["127.0.0.2", "127.0.0.1"]),
        ("fe80::1", ["127.0.0.1", "fe80::1"]),
    ):
        error = ask(server, server.url("/good", "two.example"), getaddrinfo=resolving(addresses))
        assert (error.code, "two.example" in error.detail, bad in error.detail) == ("blocked_address", True, True)
    assert server.connections == before
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))]
    assert "fe80::1%3 is not public" in ask(server, "http://scoped.example/", getaddrinfo=lambda *_, **__: found).detail


def test_a_name_that_changes_its_address(server, other):
    """What was checked is what is connected to; and what is looked up anew is checked anew."""
    look_up = resolving(["127.0.0.1"], ["127.0.0.2"])
    ports = {"allowed_addresses": (f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}")}
    first = server.url("/until-closed", "rebinding.example")
    outcomes = ask(server, first, first, other.url("/secret", "rebinding.example"), getaddrinfo=look_up, **ports)
    assert codes(outcomes) == ["ok", "ok", "blocked_address"]
    assert look_up.calls == 2
    assert other.hits["/secret"] == 0


def test_names_and_ports_where_nobody_is(server):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def broken(*_, **__):
        raise ZeroDivisionError("first line\nsecond line")

    assert ask(server, "http://nowhere.example/", getaddrinfo=unknown).code == "dns"
    assert ask(server, "http://nothing.example/", getaddrinfo=resolving([])).code == "dns"
    error = ask(server, "http://broken.example/", getaddrinfo=broken)
    assert (error.code, error.detail) == ("unexpected", "ZeroDivisionError: first line")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert ask(server, f"http://127.0.0.1:{port}/", allowed_addresses=("127.0.0.1",)).code == "connect"


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
def test_no_private_address(number, port):
    rules = AddressRules([])
    assert rules.refusal(str(number), port)
    if number.version == 4:
        assert all(rules.refusal(str(other), port) for other in disguises(number))
        assert rules.refusal(f"::{number}", port)
    else:
        assert rules.refusal(f"{number}%eth0", port)


@given(ip_addresses(v=4) | sampled_from(PUBLIC_6).flatmap(lambda network: ip_addresses(network=network)))
def test_all_public_addresses(number):
    rules = AddressRules([])
    if any(number in network for network in PRIVATE):
        return
    assert rules.refusal(str(number), 80) is None
    if number.version == 4:
        assert not any(rules.refusal(str(other), 80) for other in disguises(number))


METADATA = ["169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16",
            "192.0.0.192", "fe80::a9fe:a9fe"]  # fmt: skip


def test_metadata_services_and_what_is_no_address():
    """A resolver further down would take the latter for a name, and what that gives is not looked at."""
    assert all(AddressRules(["10.0.0.0/8"]).refusal(address, 80) for address in METADATA)
    rules = AddressRules(["0.0.0.0/0", "::/0"])
    assert all(rules.refusal(text, 80) for text in ("", "localhost", "127.1", "2130706433", "127.0.0.1%lo", "[::1]"))


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


BAD_RULES = ["", "127.0.0.1 ", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "10.0.0", "10.0.0.0/33", "10.0.0.1/16",
             "[::1]", "[::1]:x", "::1]:80", "localhost", "http://127.0.0.1", "*"]  # fmt: skip


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
