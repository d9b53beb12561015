"""Workers on a real Ray: a host that cools down, a busy cluster, progress, what ends a run early, other sources."""

import io
import json
import logging
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pbe_core.errors import InputError
from pbe_core.progress import Progress
from pbe_core.settings import REPOSITORY, load_settings, preset
from pipelines import crawl
from pipelines.annotations import open_source
from pipelines.config import BuildSettings, with_absolute_paths
from pipelines.dataset.write_plan import select_and_plan
from tests.crawl_world import crawl_command, crawl_options, write_tables
from tests.hostile_server import HostileServer, good_photo


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def settings_of(
    tmp_path: Path, urls: dict[str, str], ports: list[int], sources=("{url}",), metadata=None, **others: Any
) -> BuildSettings:
    tables = write_tables(tmp_path / "tables", urls, metadata)
    given = {"crawl.allowed_addresses": json.dumps([f"127.0.0.1:{port}" for port in ports]), "crawl.workers": 1, **others}
    options = crawl_options(tables, tmp_path / "store", tmp_path / "out", None, sources, given)
    return with_absolute_paths(load_settings(BuildSettings, "build", options, preset("tiny")))


def crawl_photos(settings: BuildSettings) -> tuple[int, str]:
    """The stage in this process: its exit status, and what it said."""
    select_and_plan(settings)
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        status = crawl.crawl_photos(settings)
    return status, said.getvalue()


def codes_of(settings: BuildSettings) -> dict[str, str]:
    return {row["photo_id"]: row["code"] for row in pq.read_table(settings.source.photos / "status.parquet").to_pylist()}


def test_a_host_that_cools_down_stops_no_other(tmp_path):
    """One photo in ten lies at a host that asks for a long pause: nearly each unit waits for it."""
    pause = 300  # Nobody waits so long: it ends when the others have come.
    with HostileServer() as good, HostileServer() as busy:
        urls = {
            f"{number:04d}": busy.url(f"/busy/1000/x?retry-after={pause}") if number % 10 == 0 else good.url(f"/good/{number}")
            for number in range(200)
        }
        allowed = json.dumps([f"127.0.0.1:{server.port}" for server in (good, busy)])
        options = {"crawl.allowed_addresses": allowed, "crawl.workers": 1, "crawl.photos_per_part": 20}
        tables = write_tables(tmp_path / "tables", urls)
        with subprocess.Popen(
            crawl_command(crawl_options(tables, tmp_path / "store", tmp_path / "out", None, others=options)),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as crawling:
            deadline = time.monotonic() + pause
            while len(good.hits) < 180 and time.monotonic() < deadline:
                time.sleep(0.1)
            crawling.terminate()
        # All of them came while the other host cooled down, though nearly each unit waits for that.
        assert crawling.returncode == 143
        assert len(good.times("/good/")) == len(good.hits) == 180
        first, *_ = busy.times("/busy/")
        assert max(good.times("/good/")) < first + pause


def test_workers_find_a_place_on_a_busy_cluster(cluster, tmp_path):
    """Another job has all CPUs but a part of one."""

    @ray.remote
    class Holder:
        def there(self) -> None: ...

    holder = Holder.options(num_cpus=1.7).remote()
    ray.get(holder.there.remote())
    with HostileServer() as server:
        urls = {f"{number:04d}": server.url(f"/good/{number}") for number in range(60)}
        settings = settings_of(tmp_path, urls, [server.port], **{"crawl.workers": 2, "crawl.photos_per_part": 5})
        assert crawl_photos(settings)[0] == 0
    assert len(codes_of(settings)) == 60
    ray.kill(holder)


def test_progress_counts_photos_of_every_kind_of_source(cluster, tmp_path, monkeypatch):
    """Local ones, too, for which no web host is asked: with a rate, the time that is left, and outcomes."""
    shown: list[str] = []

    class Watched(Progress):
        def say(self, status: str) -> None:
            super().say(status)
            shown.append(self.line())

    monkeypatch.setattr(crawl, "Progress", Watched)
    (tmp_path / "photos" / "train").mkdir(parents=True)
    urls = {}
    for number in range(100):
        (tmp_path / "photos" / "train" / f"{number:04d}.jpg").write_bytes(good_photo(f"{number}", 640, 480))
        urls[f"{number:04d}"] = ""
    settings = settings_of(tmp_path, urls, [], [str(tmp_path / "photos")], **{"crawl.photos_per_part": 10})
    assert crawl_photos(settings)[0] == 0
    assert set(codes_of(settings).values()) == {"ok"}
    assert any(re.match(r"crawling: [1-9]\d* of 100 photos .*photos/s, .* left, ok \d+ ", line) for line in shown), shown


def test_placeholders_are_asked_for_at_the_next_source_in_the_same_run(cluster, tmp_path):
    """They show when many have come; those whose MD5 is known need not wait so long."""
    gone = good_photo("gone")
    with HostileServer({"gone.jpg": gone}, behaves={f"/first/{number}": "/photos/gone.jpg" for number in range(12)}) as server:
        urls = {f"{number:04d}": server.url(f"/first/{number}" if number < 12 else f"/good/{number}") for number in range(30)}
        settings = settings_of(tmp_path, urls, [server.port], ["{url}", server.url("/good/second/{image_id}")])
        assert crawl_photos(settings)[0] == 0
        assert set(codes_of(settings).values()) == {"ok"}
        index = {row["photo_id"]: row for row in pq.read_table(settings.source.photos / "index.parquet").to_pylist()}
        assert {row["source"] for photo, row in index.items() if int(photo) < 12} == {server.url("/good/second/{image_id}")}
        assert {row["source"] for photo, row in index.items() if int(photo) >= 12} == {"{url}"}
        asked = len(server.requests)
        assert crawl_photos(settings)[0] == 0
        assert len(server.requests) == asked


def test_a_full_disk_ends_the_run_with_one_message_and_keeps_what_is_recorded(cluster, tmp_path, monkeypatch):
    """Not three downloads of everything for nothing."""
    with HostileServer() as server:
        urls = {f"{number:04d}": server.url(f"/good/{number}") for number in range(300)}
        options = {"crawl.photos_per_part": 10}
        settings = settings_of(tmp_path, urls, [server.port], **options)
        select_and_plan(settings)
        store = settings.source.photos
        store.mkdir()
        (store / "store.json").write_text(json.dumps({"version": 1, "photos_of": "open_images"}))
        (store / "rounds").mkdir()
        # A folder that takes no files, also of root: /proc.
        (store / "parts").symlink_to("/proc/self/task")
        monkeypatch.setattr(crawl, "sweep", lambda *_: None)
        status, said = crawl_photos(settings)
        assert status == 1
        assert " could not be made: FileNotFoundError: " in said
        assert "Traceback" not in said
        assert len(server.requests) < 300
        (store / "parts").unlink()
        (store / "parts").mkdir()
        assert crawl_photos(settings)[0] == 0
    assert len(codes_of(settings)) == 300


@pytest.mark.parametrize("places", ["folder", "web", "both"])
def test_coco_photos_are_looked_for_where_coco_puts_them(tmp_path, places):
    """With a store for `source.photos`, the folder train2017 is that of the sources."""
    (tmp_path / "annotations").mkdir()
    image = {"id": 7, "file_name": "7.jpg", "width": 100, "height": 100}
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0, "segmentation": []}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}]}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    web = "https://images.example.org/{file_name}"
    sources = {"folder": [str(tmp_path / "coco")], "web": [web], "both": [str(tmp_path / "coco"), web]}[places]
    options = [
        *("--source.kind", "coco", "--source.splits", '["train"]', "--source.annotations", str(tmp_path / "annotations")),
        *("--source.photos", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--crawl.sources", json.dumps(sources)),
    ]
    settings = load_settings(BuildSettings, "build", options, preset("tiny"))
    rows = [row for batch in open_source(settings).read_photos() for row in batch.to_pylist()]
    assert [row["file_name"] for row in rows] == ["train2017/7.jpg"]
    flat = tmp_path / "flat"
    flat.mkdir()
    settings = load_settings(BuildSettings, "build", [*options[:-1], json.dumps([str(flat)])], preset("tiny"))
    rows = [row for batch in open_source(settings).read_photos() for row in batch.to_pylist()]
    assert [row["file_name"] for row in rows] == ["7.jpg"]


def test_boxes_in_px_need_sizes_before_there_are_photos(tmp_path):
    (tmp_path / "boxes.csv").write_text("photo,x_min,y_min,x_max,y_max,url\na.jpg,1,2,30,40,https://x.example.org/a.jpg\n")
    options = [
        *("--source.kind", "boxes", "--source.unit", "pixel", "--source.annotations", str(tmp_path / "boxes.csv")),
        *("--source.photos", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--crawl.sources", '["{url}"]'),
    ]
    with pytest.raises(InputError, match=r"boxes\.csv: boxes in px need the sizes of photos.*add columns width and height"):
        open_source(load_settings(BuildSettings, "build", options, preset("tiny")))
    fractions = [option if option != "pixel" else "fraction" for option in options]
    (tmp_path / "boxes.csv").write_text("photo,x_min,y_min,x_max,y_max\na.jpg,0.1,0.2,0.3,0.4\n")
    open_source(load_settings(BuildSettings, "build", fractions, preset("tiny")))
