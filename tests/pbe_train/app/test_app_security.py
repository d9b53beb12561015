"""Who may ask a server for what: names, origins, cookies, the password, headers of every answer; and what starts and stops it."""

import gzip
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbe_train.app import __main__ as app
from pbe_train.app.login import ATTEMPTS, VARIABLE, network_of, read_password
from pbe_train.app.security import HEADERS, Hosts, is_loopback
from tests.conftest import call_program
from tests.pbe_train.app.serving import EXAMPLE, QUICK, Person, Served, serve

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that other machines may reach, with a password."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "password").write_text(f"{PASSWORD}\n")
    options = ["--host", "0.0.0.0", "--password-file", str(folder / "password"), "--allowed-host", "photos.example.org"]
    with serve(folder, *options, "--model", f"mine={EXAMPLE.parent / 'weights' / 'model'}") as served:
        yield served


def log_in(person: Person, password: str = PASSWORD) -> None:
    answer = person.ask("POST", "/api/login", {"password": password})
    assert answer.status == 200, answer.body


@pytest.fixture
def ann(server: Served) -> Person:
    person = Person(server.port)
    log_in(person)
    return person


def test_nothing_but_the_login_page_is_there_without_the_password(server: Served):
    stranger = Person(server.port)
    for path in ("/", "/dataset"):
        answer = stranger.get(path)
        assert (answer.status, answer.headers["location"]) == (303, "/login")
    for method, path in (("GET", "/api/models"), ("POST", "/api/photos"), ("GET", "/api/edits/x"), ("GET", "/nothing")):
        answer = stranger.ask(method, path)
        assert answer.status == (401 if path.startswith("/api/") else 303)
    assert stranger.get("/login").status == 200
    assert stranger.get("/static/login.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert not stranger.cookies
    for wrong in ({"password": "wrong horse"}, {"password": 1}, {"password": ""}, {}):
        answer = stranger.ask("POST", "/api/login", wrong)
        assert (answer.status, answer.error) == (403, "that is not the password; ask who runs this server")
    assert stranger.ask("POST", "/api/login", b"\xff").status == 403
    log_in(stranger)
    assert stranger.get("/").status == 200
    assert stranger.get("/api/models").json()["models"][0]["name"] == "mine"


def test_the_cookie_is_for_this_server_alone_and_cannot_be_chosen(server: Served, ann: Person):
    (name,) = ann.cookies
    # Of the port, and of the machine: tunnels bring two servers of one port to one machine.
    assert re.fullmatch(rf"pbe_{server.port}_[0-9a-f]{{8}}", name)
    answer = Person(server.port).ask("POST", "/api/login", {"password": PASSWORD}, Cookie=f"{name}=chosen")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{name}=")
    assert not cookie.startswith(f"{name}=chosen")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    behind = Person(server.port).ask(
        "POST",
        "/api/login",
        {"password": PASSWORD},
        Host="photos.example.org",
        Origin="https://photos.example.org",
        X_Forwarded_Proto="https",
    )
    assert "Secure" in behind.headers["set-cookie"].split("; ")
    assert ann.get("/", Cookie=f"{name}=chosen").status == 303


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:{port}", True),
        ("localhost:9999", True),  # Behind a tunnel.
        ("[::1]:{port}", True),
        ("192.168.7.7:{port}", True),  # No name that somebody points here.
        ("photos.example.org", True),
        ("evil.example.org:{port}", False),
        ("localhost.evil.example.org", False),
        ("photos.example.org.evil", False),
        ("localhost@evil.example.org", False),
        ("", False),
        ("a:b:c", False),
    ],
)
def test_only_requests_for_this_servers_names_are_answered(server: Served, ann: Person, host: str, known: bool):
    answer = ann.get("/api/models", Host=host.format(port=server.port))
    assert answer.status == (200 if known else 421)
    assert known or "is not called" in answer.error


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 403),
        ("null", 403),
        ("http://evil.example.org", 403),
        ("http://127.0.0.1:1", 403),
        ("http://localhost:{port}", 403),
        ("https://127.0.0.1:{port}", 403),
        ("http://127.0.0.1:{port}.evil.example.org", 403),
        ("http://127.0.0.1:{port}@evil.example.org", 403),
        ("http://127.0.0.1:{port}", 200),
    ],
)
def test_only_this_servers_own_pages_may_change_something(server: Served, ann: Person, origin: str | None, status: int):
    given = origin and origin.format(port=server.port)
    assert ann.ask("POST", "/api/photos", (EXAMPLE / "photo.png").read_bytes(), Origin=given).status == status
    assert ann.ask("DELETE", "/api/photos/x", Origin=given).status == (404 if status == 200 else 403)


def test_the_header_that_forms_cannot_send_is_needed(ann: Person):
    for value in (None, "", "0"):
        assert ann.ask("POST", "/api/photos", b"", X_PBE=value).error.startswith("the header X-PBE: 1 is missing")


def test_pages_of_other_sites_and_ports_have_no_business_with_the_api(ann: Person):
    for site in ("cross-site", "same-site"):
        assert ann.get("/api/models", Sec_Fetch_Site=site).status == 403
        # A link on another site may lead here; the cookie that the browser kept back is not replaced.
        assert "set-cookie" not in ann.get("/", Sec_Fetch_Site=site, Cookie=None).headers
    assert ann.get("/api/models", Sec_Fetch_Site="same-origin").status == 200


def test_every_answer_has_the_headers(ann: Person):
    photo = ann.give("photos", EXAMPLE / "photo.png").json()["id"]
    asked = [
        ("GET", "/", 200),
        ("GET", "/login", 200),
        ("GET", "/static/style.css", 200),
        ("GET", "/static/example/photo.png", 200),
        ("GET", "/api/models", 200),
        ("GET", f"/api/photos/{photo}", 200),
        ("HEAD", "/", 200),
        ("GET", "/nothing", 404),
        ("GET", "/api/photos/x", 404),
        ("GET", f"/api/photos/{photo}?most=many", 400),
        ("PUT", "/", 405),
        ("POST", "/api/photos", 400),
        ("POST", "/api/edits", 400),
    ]
    for method, path, status in asked:
        answer = ann.ask(method, path)
        assert answer.status == status, (method, path)
        assert {name: answer.headers.get(name.lower()) for name in HEADERS} == HEADERS, (method, path)
        assert answer.headers["server"] == "pbe"
        assert status < 400 or answer.error
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
    assert not any("unsafe" in value or "http" in value for value in policy.values())


def test_nothing_but_the_named_files_is_served(ann: Person):
    for path in ("../server.py", "%2e%2e/server.py", "..%2fserver.py", "/etc/passwd", "example/../../README.md", "example", "."):
        assert ann.get(f"/static/{path}").status == 404
    assert ann.get("/static/example/mask.png").body == (EXAMPLE / "mask.png").read_bytes()


def test_people_elsewhere_learn_no_path_of_this_machine(ann: Person):
    edit = ann.edit(ann.give_example() | {"model": "mine"})
    assert ann.wait(edit)["state"] == "done"
    told = ann.get(f"/api/edits/{edit}/settings")
    assert told.json()["model"]["source"] is None
    assert told.json()["model"]["name"] == "mine"
    assert b"/" not in told.body.replace(b"\\/", b"/")


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/api/login", NESTED, {}, 403, "that is not the password"),
        ("/api/left-out", NESTED, {}, 400, "the request's body is no JSON object"),
        ("/api/left-out", b'{"what": ' + NESTED, {}, 400, "the request's body is no JSON object"),
        ("/api/left-out", b"{}", {"Content_Type": "application/json; charset=none"}, 400, "a mark is `what`"),
        ("/api/edits", NESTED, {}, 400, "the request: Invalid JSON"),
        ("/api/photos", gzip.compress(b"x", mtime=0), {"Content_Encoding": "gzip"}, 415, "the request's body is compressed"),
        ("/api/photos", b"x", {"Content_Encoding": "gzip"}, 415, "the request's body is compressed"),
    ],
)
def test_odd_bodies_are_refused_in_a_sentence_and_fill_no_log(
    server: Served, ann: Person, path: str, body: bytes, headers: dict[str, str], status: int, message: str
):
    answer = ann.ask("POST", path, body, **headers)
    assert (answer.status, answer.error[: len(message)]) == (status, message)
    assert ann.get("/api/models").status == 200
    assert not [line for line in server.said if "Traceback" in line]


def test_long_requests_that_carry_no_file_are_refused(ann: Person):
    answer = ann.ask("POST", "/api/edits", ann.give_example() | QUICK | {"scheduler": "x" * 300_000})
    assert (answer.status, answer.error) == (413, "the request is longer than any of its kind; send less")


def test_passwords_are_guessed_at_few_times_a_minute(server: Served):
    """Last in this file: from then on nobody of this address is let in. Those that are on their way at once count, too."""
    stranger, body = Person(server.port), b'{"password": "x"}'
    head = f"POST /api/login HTTP/1.1\r\nHost: {stranger.own}\r\nOrigin: http://{stranger.own}\r\nX-PBE: 1\r\n"
    head += f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    with ExitStack() as opened:
        connect = partial(socket.create_connection, ("127.0.0.1", server.port))
        connections = [opened.enter_context(connect()) for _ in range(2 * ATTEMPTS)]
        for connection in connections:
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        for connection in connections:
            connection.sendall(body)
        statuses = [connection.recv(12)[9:] for connection in connections]
    assert set(statuses) == {b"403", b"429"}
    assert statuses.count(b"403") <= ATTEMPTS
    # The right one, too: else its answer would tell.
    assert stranger.ask("POST", "/api/login", {"password": PASSWORD}).error == "too many wrong passwords; wait a minute"


def test_wrong_passwords_are_counted_for_what_one_machine_can_call_itself():
    """Of IPv6 anybody has 2**64 addresses: counted one by one, one machine would soon lock out all."""
    same = [["10.0.0.1", "::ffff:10.0.0.1"], ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2"], ["::1"], [""]]
    counted = [{network_of(address) for address in addresses} for addresses in same]
    assert [len(each) for each in counted] == [1] * len(same)
    assert len(set.union(*counted)) == len(same)
    assert network_of("2001:db8:0:2::1") != network_of("2001:db8:0:1::1")


def test_a_password_of_an_editor_that_marks_utf_8(tmp_path: Path):
    (tmp_path / "password").write_bytes("\ufeffpässword\r\n".encode())
    assert read_password(tmp_path / "password", "0.0.0.0") == "pässword"


@given(host=st.from_regex(r"[a-z0-9.:\[\]@/-]{0,30}", fullmatch=True))
def test_no_other_name_is_known_to_a_server_of_this_machine_alone(host: str):
    known = Hosts("127.0.0.1").know(host)
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host.removesuffix(":")
    assert not known or name.rpartition("@")[2].partition("/")[0] in ("localhost", "127.0.0.1", "[::1]")


def test_which_addresses_are_this_machines_own():
    own = ["127.0.0.1", "127.8.8.8", "::1", "localhost"]
    others = ["0.0.0.0", "::", "192.168.1.1", "example.org", "localhost.example.org", ""]
    assert [is_loopback(host) for host in own + others] == [True] * len(own) + [False] * len(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: other machines reach this address, so a password is needed; give --password-file",
        ),
        (["--host", "::"], "--host ::: other machines reach this address, so a password is needed"),
        (["--password-file", "gone"], "--password-file gone: cannot be read"),
        (["--password-file", "short"], "--password-file short: the password has 3 characters; give 8 or more"),
        (["--port", "70000"], "--port 70000: give one from 1 to 65535"),
        (
            ["--port", "{taken}"],
            "--port {taken}: another program listens there; give another port, or --port 0 for any that is free",
        ),
        (["--host", "192.0.2.1", "--password-file", "good"], "--host 192.0.2.1 --port 7860: cannot listen there"),
        (["--host", "a..b", "--password-file", "good"], "--host a..b: no name of a host; give an address of this machine"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
        (["--model", "a=x", "--model", "a=y"], "--model a=y: there is a model of this name already; give another name"),
    ],
)
def test_what_does_not_start_says_why(tmp_path: Path, monkeypatch, options: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    Path("short").write_text("abc\n")
    Path("good").write_text("long enough")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = call_program(app.main, *(option.format(taken=port) for option in options))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message.format(taken=port)}")
    assert done.stderr.count("\n") == 1


def test_a_model_that_is_not_there_is_told_at_the_start(tmp_path: Path):
    with (
        pytest.raises(AssertionError, match="error: nowhere: no such file or folder, and no hub id"),
        serve(tmp_path, "--model", "nowhere"),
    ):
        pass


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}/dataset"


def ask_in_vain(person: Person) -> None:
    with suppress(OSError):
        person.get("/api/datasets/0")


def test_nothing_is_left_of_a_server_that_ended_or_died(server: Served, tmp_path: Path):
    """Told to end, it removes its files; killed, the next one does. Others' files stay."""
    parent = tmp_path / f"pbe-app-{os.getuid()}"
    with serve(tmp_path) as served:
        served.person().give_example()
        assert len(list(parent.iterdir())) == 1
        assert parent.stat().st_mode & 0o777 == 0o700
        assert served.end(signal.SIGKILL) == -signal.SIGKILL
        left = set(parent.iterdir())
        assert len(left) == 1
    # Of a training that was killed, say. It is no reason not to start.
    broken = tmp_path / "runs" / "broken" / "checkpoints" / "step-00000001" / "state.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    # A store that takes requests and answers none: nobody waits for it at the end.
    with socket.create_server(("127.0.0.1", 0)) as silent, serve(tmp_path, "--dataset", url_of(silent)) as served:
        assert not left & set(parent.iterdir())
        assert "left out: runs/broken/checkpoints/step-00000001/state.json: damaged" in served.said[0]
        person = served.person()
        assert [model["id"] for model in person.get("/api/models").json()["models"]] == ["tiny-world"]
        following = person.follow(person.edit(person.give_example(), steps=1000))
        while next(following)["step"] < 1:
            pass
        asking = Thread(target=ask_in_vain, args=(person,))
        asking.start()
        silent.accept()
        assert served.end(signal.SIGTERM) == 0
        asking.join()
        assert list(parent.iterdir()) == []
