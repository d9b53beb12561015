"""A crawl on a real Ray: its processes are stopped or die, wait for hosts, share a cluster, meet a full disk."""

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray

from pbe_core.progress import Progress
from pbe_core.settings import REPOSITORY
from pipelines import crawl
from tests.crawl_world import (
    Done,
    call_crawl,
    codes_of,
    crawl_command,
    crawl_here,
    crawl_options,
    rows_of,
    summary_of,
    write_tables,
)
from tests.hostile_server import HostileServer, good_photo

PATIENCE_SECONDS = 900
"""For what hangs. Nothing is measured by it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray that is there already, so that not each crawl waits for one of its own; its address."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


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


def hold_after(server: HostileServer, more: int) -> Callable[[], bool]:
    """Answer so many requests more; whether one is held now."""
    server.answers = len(server.requests) + more
    return lambda: len(server.requests) > server.answers


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for does not happen"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def stopped(process: subprocess.Popen[str], status: int) -> Done:
    """What a crawl left that was stopped."""
    said, warned = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == status, warned
    assert "Traceback" not in warned
    assert "the same command goes on from there" in warned
    return Done(process.returncode, said, warned)


def test_stopped_in_the_middle_what_came_is_kept_and_not_asked_for_again(tmp_path, monkeypatch):
    """Ctrl-C, which a terminal sends to all processes, while requests are held. A host's limits hold for both workers."""
    store, count = tmp_path / "store", 120
    with HostileServer() as server:
        urls = {f"{number:016x}": server.url(f"/good/{number:016x}?pause=0.05") for number in range(count)}
        more = {"crawl.per_host.requests_per_second": 40, "crawl.per_host.concurrency": 3, "crawl.workers": 2}
        # Nobody waits for a request that is held.
        more |= {"crawl.photos_per_part": 20, "crawl.connections": 4, "crawl.total_seconds": 3600}
        options = crawl_options(write_tables(tmp_path / "tables", urls), store, tmp_path / "out", server.port, others=more)
        held = hold_after(server, 50)
        process = start(options)
        wait_until(held, process)
        refused = call_crawl([*options, "--out", str(tmp_path / "other")], status=2)
        assert f"error: {store}: another crawl is using this photo store; wait for it, or stop it" in refused.stderr
        os.killpg(process.pid, signal.SIGINT)
        done = stopped(process, 130)
        recorded = {path: server.hits[path] for path in (f"/good/{photo}" for photo in rows_of(store, "status"))}
        # Lost are at most those that were in flight, or on their way through a worker's decoder: twice its 4 connections.
        assert len(server.hits) - 16 <= len(recorded) <= 50
        assert summary_of(done) == {"wanted": count, "ok": len(recorded), "not asked for yet": count - len(recorded)}
        times = server.times("/good/")
        for first, last in itertools.combinations(range(len(times)), 2):
            # Each of two processes may start two at once, 0.1 s of its share; and 3 may have been on their way.
            assert last - first <= 40 * (times[last] - times[first]) + 10
        assert server.most_at_once("/good/") <= 3

        server.answers = float("inf")
        monkeypatch.setattr(crawl, "crawl_on_ray", crawl_here)
        assert summary_of(call_crawl(options)) == {"wanted": count, "ok": count}
        assert all(server.hits[path] == hits for path, hits in recorded.items())
        assert not list(store.rglob("*.tmp"))
        call_crawl([*options, "--verify"])


def test_stopped_while_ray_starts(tmp_path):
    with HostileServer() as server:
        server.answers = 0  # Where Ray is quicker than the signal, nothing is in flight for long either.
        tables = write_tables(tmp_path / "tables", {"a": server.url("/good/a")})
        process = start(crawl_options(tables, tmp_path / "store", tmp_path / "out", server.port))
        wait_until(psutil.Process(process.pid).children, process)
        process.terminate()
        stopped(process, 143)


def test_a_host_that_cools_down_stops_no_other(cluster, tmp_path):
    """One photo in ten lies at a host that asks for a long pause: nearly each unit waits for it. Then SIGTERM to the program."""
    pause = 300  # Nobody waits so long: it ends when the others have come.
    with HostileServer() as good, HostileServer() as busy:
        urls = {
            f"{number:04d}": busy.url(f"/busy/1000/x?retry-after={pause}") if number % 10 == 0 else good.url(f"/good/{number}")
            for number in range(200)
        }
        allowed = json.dumps([f"127.0.0.1:{server.port}" for server in (good, busy)])
        more = {"crawl.allowed_addresses": allowed, "crawl.workers": 1, "crawl.photos_per_part": 20, "ray.address": cluster}
        tables = write_tables(tmp_path / "tables", urls)
        process = start(crawl_options(tables, tmp_path / "store", tmp_path / "out", None, others=more))
        wait_until(lambda: len(good.hits) == 180, process)
        process.terminate()
        stopped(process, 143)
        # All of them came while the other host cooled down, though nearly each unit waits for that.
        assert len(good.times("/good/")) == 180
        assert max(good.times("/good/")) < busy.times("/busy/")[0] + pause


def test_a_process_that_dies_costs_nothing_but_time(cluster, tmp_path):
    """SIGKILL to the one worker in the middle of its parts; each photo is in the index once."""
    with HostileServer() as server:
        urls = {f"{number:016x}": server.url(f"/good/{number}?pause=0.02") for number in range(120)}
        tables = write_tables(tmp_path / "tables", urls)
        more = {"crawl.workers": 1, "crawl.photos_per_part": 10, "crawl.per_host.concurrency": 3, "crawl.total_seconds": 3600}
        options = crawl_options(tables, tmp_path / "store", tmp_path / "out", server.port, others=more)
        killed: list[int] = []

        def kill() -> None:
            """While requests are held, so that the crawl cannot be over."""
            wait_until(hold_after(server, 50))
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
    assert len(killed) == 1
    assert summary_of(done) == {"wanted": len(urls), "ok": len(urls)}
    assert server.most_at_once("/good/") <= 3
    # Asked again are the photos of parts that were begun, which come one after the other.
    assert max(server.hits.values()) <= 2
    assert sum(server.hits.values()) <= len(urls) + 40
    call_crawl([*options, "--verify"])


def test_workers_find_a_place_on_a_busy_cluster_and_progress_counts_local_photos(cluster, tmp_path, monkeypatch):
    """Another job has all CPUs but a part of one. Shown are a rate, the time that is left, and outcomes."""
    shown: list[str] = []

    class Watched(Progress):
        def say(self, status: str) -> None:
            super().say(status)
            shown.append(self.line())

    @ray.remote
    class Holder:
        def there(self) -> None: ...

    monkeypatch.setattr(crawl, "Progress", Watched)
    holder = Holder.options(num_cpus=1.7).remote()
    ray.get(holder.there.remote())
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for number in range(60):
        (tmp_path / "photos" / "train" / f"{number:04d}.jpg").write_bytes(good_photo(f"{number}", 640, 480))
    tables = write_tables(tmp_path / "tables", {f"{number:04d}": "" for number in range(60)})
    more = {"crawl.workers": 2, "crawl.photos_per_part": 5}
    call_crawl(crawl_options(tables, tmp_path / "store", tmp_path / "out", None, [str(tmp_path / "photos")], more))
    ray.kill(holder)
    assert list(codes_of(tmp_path / "store").values()) == ["ok"] * 60
    assert any(re.match(r"crawling: [1-9]\d* of 60 photos .*photos/s, .* left, ok \d+ ", line) for line in shown), shown


def test_a_full_disk_ends_the_run_and_keeps_what_is_recorded(cluster, tmp_path, monkeypatch):
    """Not downloads of everything for nothing."""
    with HostileServer() as server:
        tables = write_tables(tmp_path / "tables", {f"{number:04d}": server.url(f"/good/{number}") for number in range(300)})
        more = {"crawl.workers": 1, "crawl.photos_per_part": 10}
        store = tmp_path / "store"
        options = crawl_options(tables, store, tmp_path / "out", server.port, others=more)
        (store / "rounds").mkdir(parents=True)
        (store / "store.json").write_text(json.dumps({"version": 1, "photos_of": "open_images"}))
        # A folder that takes no files, also of root: /proc.
        (store / "parts").symlink_to("/proc/self/task")
        with monkeypatch.context() as patch:
            patch.setattr(crawl, "sweep", lambda *_: None)
            done = call_crawl(options, status=1)
        failed = sum(map(int, re.findall(r"^(\d+) parts? could not be made: FileNotFoundError: ", done.stderr, re.MULTILINE)))
        assert 3 <= failed < 30, "it gave up after some in a row"
        assert "Traceback" not in done.stderr
        (store / "parts").unlink()
        (store / "parts").mkdir()
        monkeypatch.setattr(crawl, "crawl_on_ray", crawl_here)
        assert summary_of(call_crawl(options)) == {"wanted": 300, "ok": 300}
