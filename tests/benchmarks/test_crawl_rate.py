"""The benchmark of crawling: its server is an honest one, and a tiny run counts what each way has brought."""

import http.client
import io
import json
import sys

import pytest
from PIL import Image

from benchmarks import crawl
from benchmarks.crawl import Look, quarter_means, time_of
from benchmarks.photo_server import running_server


def test_the_server_keeps_connections_and_books():
    with running_server(photos=3) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        bodies = []
        for path in ("/a", "/b", "/a"):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.version, answer.getheader("Content-Type")) == (200, 11, "image/jpeg")
            bodies.append(answer.read())
        connection.request("HEAD", "/a")
        answer = connection.getresponse()
        assert int(answer.headers["Content-Length"]) == len(bodies[0])
        assert answer.read() == b""
        connection.request("GET", "/c", headers={"Connection": "close"})
        answer = connection.getresponse()
        assert answer.getheader("Connection") == "close"
        bodies.append(answer.read())
        connection.request("DELETE", "/a")  # Another connection.
        assert connection.getresponse().status == 501
        connection.close()
        books = server.books()
    a, b, again, c = bodies
    assert a == again
    assert len({a, b, c}) == 3
    with Image.open(io.BytesIO(b)) as photo:
        photo.load()
        assert photo.size == (96, 96)
        assert photo.info["comment"] == b"/b"
    assert (books.photos, books.bytes, books.connections) == (5, sum(map(len, bodies)), 3)
    assert books.cpu_seconds > 0


def test_moments_between_two_looks():
    looks = [Look(0.0, 0, None), Look(1.0, 0, None), Look(2.0, 50, None), Look(4.0, 100, None)]
    assert time_of(looks, 25) == pytest.approx(1.5)
    assert time_of(looks, 90) == pytest.approx(3.6)
    assert time_of(looks, 100) == pytest.approx(4.0)
    assert quarter_means([(float(moment), float(moment // 2)) for moment in range(8)]) == [0, 1, 2, 3]
    assert quarter_means([(0.0, 1.0)]) == []


def test_a_tiny_run(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results" / "crawl.json"
    options = ["--folder", str(tmp_path), "--photos", "200", "--results", str(results), "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["crawl.py", *options])
    crawl.main()
    assert "left out: img2dataset" in capsys.readouterr().out
    result = json.loads(results.read_text())
    ways = {way["way"]: way for way in result["ways"]}
    assert {name: way["photos"] for name, way in ways.items()} == {"ours": 200, "one after the other": 20}
    ours = ways["ours"]
    assert ours["steady_photos_per_second"] > ours["photos_per_second"] > 0
    assert ours["cpu_seconds"] > ours["server_cpu_seconds"] > 0
    assert 1 <= ours["connections"] <= result["connections_per_process"]
    assert ways["one after the other"]["connections"] == 20
    assert sum(ours["peak_by_process_mb"].values()) == pytest.approx(ours["peak_mb"], abs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
