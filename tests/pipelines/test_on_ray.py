"""Which Ray is joined or started: addresses that are none, clusters that are gone, folders that are too long for sockets."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pbe_core import machine
from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pipelines import build, crawl, on_ray, survey
from pipelines.on_ray import check_answers, find_cluster, folder_for_sockets, start_ray
from tests.conftest import build_options, run_build


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine at which nobody listens, as that of a cluster that is gone."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "environment", "parts"),
    [
        (
            None,
            "http://127.0.0.1:8265",
            ["RAY_ADDRESS is http://127.0.0.1:8265", "ray job submit --address http", "--ray.address local"],
        ),
        ("https://head", None, ["build.ray.address is https://head", "ray job submit"]),
        (None, "ray://head:10001", ["RAY_ADDRESS is ray://head:10001", "submit it there", "HOST:6379"]),
        ("head", None, ["build.ray.address is head", "no address of a Ray cluster", "HOST:6379"]),
        ("127.0.0.1:port", None, ["build.ray.address is 127.0.0.1:port", "no address of a Ray cluster"]),
    ],
)
def test_what_is_no_address_of_a_cluster_is_one_line_with_the_way_out(address, environment, parts, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with pytest.raises(InputError) as caught:
        find_cluster(address)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("program", [build, crawl, survey])
def test_all_programs_look_at_the_address_before_any_work(program, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    extra = ["--source.survey", str(tmp_path / "survey"), "--crawl.sources", '["nowhere"]']
    monkeypatch.setattr(sys, "argv", ["a program", *build_options(photos, tmp_path / "out"), *extra])
    with pytest.raises(InputError, match="ray job submit"):
        program.main()
    assert not (tmp_path / "out" / "objects.parquet").exists()


@pytest.mark.parametrize("options", [("--extend", "--selection.min_area", "0.01"), ("--verify-existing",), ()])
def test_a_finished_dataset_stays_one_where_the_address_is_wrong(options, photos, dataset, tmp_path, monkeypatch):
    """Whether there is something to pack is known late: no table is changed for it, and no dataset.json removed, before."""
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    (out / "shards" / "train-000000.tar").write_bytes(b"damaged")
    before = {path: path.stat().st_mtime_ns for path in (out / "dataset.json", *out.glob("*.parquet"))}
    done = run_build(*build_options(photos, out), "--ray.address", "http://127.0.0.1:8265", *options, check=False)
    assert done.returncode == 2
    assert "ray job submit" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "dataset.json", *out.glob("*.parquet"))} == before


def test_without_an_address_or_with_local_a_ray_of_our_own_is_started(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert find_cluster("local") is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert find_cluster("somewhere:6379") == ("somewhere:6379", "build.ray.address")


@pytest.mark.parametrize("told_by", ["setting", "variable", "file"])
def test_a_cluster_that_is_gone_is_one_line_at_once(told_by, closed_port, tmp_path, monkeypatch):
    """Ray itself asks for minutes, and prints what only its authors understand."""
    address = f"127.0.0.1:{closed_port}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if told_by == "variable":
        monkeypatch.setenv("RAY_ADDRESS", address)
    if told_by == "file":  # As `ray start` leaves it.
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    with pytest.raises(InputError) as caught:
        start_ray(address if told_by == "setting" else None)
    words = {"setting": "build.ray.address", "variable": "RAY_ADDRESS", "file": "`ray stop` forgets it"}[told_by]
    said = str(caught.value)
    assert said.startswith("no Ray cluster answers at ")
    assert "\n" not in said
    for part in (f":{closed_port}", words, "Connection refused", "--ray.address local"):
        assert part in said


def test_what_is_no_ray_cluster_is_told_in_bounded_time(monkeypatch):
    """A web server, or the port of Ray's dashboard."""
    monkeypatch.setattr(on_ray, "_ANSWER_SECONDS", 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=r"something is there, and is no Ray cluster, or does not answer within 2 s"):
            check_answers(f"127.0.0.1:{server.server_port}", "RAY_ADDRESS")
        server.shutdown()


STARTED = """
import os, ray
from pipelines.on_ray import start_ray
start_ray(None)
ran, niceness = ray.get(ray.remote(lambda: ("ran", os.nice(0))).remote())
print(ran, niceness - os.nice(0), ray._private.worker._global_node.get_session_dir_path())
"""


def test_a_long_folder_for_temporary_files_is_no_obstacle(tmp_path):
    """As batch systems set TMPDIR: the path of a socket in it would be too long. What takes its place is gone afterwards.

    Nor are workers of this Ray nicer than the program.
    """
    long = tmp_path / ("scratch_of_a_batch_system_" * 3) / "jobs"
    long.mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(long), "RAY_USAGE_STATS_ENABLED": "0"}
    for name in ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_worker_niceness"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran, nicer, session = done.stdout.split()
    assert (ran, nicer) == ("ran", "0")
    assert f"{long} is too long a name for Ray's sockets" in done.stderr
    assert not Path(session).parent.exists()
    assert not list(long.iterdir())


def test_the_usual_folder_is_taken_where_it_fits(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert folder_for_sockets() is None
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    monkeypatch.setattr(machine, "_SHORT_FOLDERS", (str(tmp_path / "not there"),))
    with pytest.raises(InputError, match=r"too long a name for Ray's sockets; set RAY_TMPDIR to a folder of a short name"):
        folder_for_sockets()


SIGNALLED = """
import os, signal, sys
from pbe_core.errors import Terminated
from pipelines.on_ray import start_ray
noted, sent = [], []
if sys.argv[1] == "noted":
    signal.signal(signal.SIGTERM, lambda *_: noted.append(1))


def send():
    if not sent:
        sent.append(1)
        os.kill(os.getpid(), signal.SIGTERM)


os.register_at_fork(after_in_parent=send)
try:
    start_ray("local")
    signal.raise_signal(signal.SIGTERM)
except Terminated:
    noted.append("terminated")
print(sent, noted)
"""


@pytest.mark.parametrize(("before", "noted"), [("noted", [1, 1]), ("nothing", ["terminated"])])
def test_a_stop_that_comes_in_a_fork_while_ray_starts_is_not_lost(before, noted):
    """What a handler raises there is lost, and Ray's own raises. Who has a handler keeps it, else it ends the program."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, before], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), "Exception ignored" in done.stderr) == (0, f"[1] {noted}", False), done.stderr
