"""How fast photos are brought from a web server, and in how much memory: our crawl against img2dataset and one after the other.

    ours               pipelines/crawl.py as a user starts it: tables read, boxes selected, crawled on Ray, photo store merged
    ours, a tenth      the same for a tenth of the photos: does memory grow with the dataset?
    img2dataset        the same photos into WebDataset tars as they come, nothing decoded (disable_all_reencoding)
    img2dataset, decoding      the same, but that each photo is decoded once (skip_reencode), as ours does
    one after the other        a tenth of the photos: urllib in a loop, each into a file

Usage:  python -m benchmarks.crawl --folder DIR --photos 100_000 --img2dataset X/bin/python
        prints the table and writes benchmarks/results/crawl.json

The server (photo_server.py) is one process on the same machine, so its CPU time is taken from the same CPUs; it is told apart.
All ways have as many processes and requests in flight, one after another against one server. What they wrote is counted, and
must be all photos, byte for byte as many as the server sent.

Seconds are those of the command from its start to its end, Ray's start and the tables included. The steady rate is that between
the photo that is the tenth part of all and the one that is nine tenths, by what the server has answered. CPU seconds are of all
processes of the way, as last seen before each ended (every 0.25 s). Memory is PSS (pages that n processes share count 1/n),
summed over all of them, every second: its peak, and its means over the quarters of the time in which photos came.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.make_annotations import BOX_COLUMNS, BOX_FILE, CLASS_FILE, PHOTO_COLUMNS, PHOTO_FILE
from benchmarks.photo_server import Books, PhotoServer, running_server
from pbe_core.errors import InputError, run_program
from pbe_core.settings import REPOSITORY

LABEL = "/m/01yrx"
PHOTOS = 100_000
TENTH = 10
FEWEST = 1_000
"""Of fewer photos it is not asked how memory grows: they would be one part, for one process."""
PROCESSES, CONNECTIONS = 2, 32
LOOK_SECONDS = 0.25
LOOKS_PER_WEIGHING = 4
"""Memory is looked at more seldom than CPU time: the kernel walks through all pages of a process to answer."""
NAME_LENGTH = 15
"""Of a process in Linux's eyes. Ray's actors append what they do just now to theirs, after a dot."""
STEADY = (0.1, 0.9)
QUARTERS = 4
MOST_DISTURBANCE = 0.05
"""Share of the CPUs' time that other programs may take before it is told."""
TABLE_WIDTH = 130
# Without these the benchmark would measure how polite we are, and not how fast.
NO_LIMITS = {
    "crawl.per_host.requests_per_second": 1_000_000,
    "crawl.per_host.concurrency": 10_000,
}
IMG2DATASET = {
    "input_format": "parquet",
    "output_format": "webdataset",
    "resize_mode": "no",
    "encode_format": "jpg",
    "enable_wandb": False,
}
LOOP = """
import pathlib, sys, urllib.request
folder = pathlib.Path(sys.argv[2])
folder.mkdir()
for number, url in enumerate(open(sys.argv[1])):
    with urllib.request.urlopen(url.strip(), timeout=10) as answer:
        (folder / f"{number:09d}.jpg").write_bytes(answer.read())
"""
# Nothing asks its makers for news or an account.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
HOW_TO_INSTALL = "left out: img2dataset; python -m venv X && X/bin/pip install img2dataset, then --img2dataset X/bin/python"


@dataclass(frozen=True)
class Look:
    """What was seen at one moment."""

    seconds: float
    """Since the start."""
    photos: int
    """That the server had given."""
    memory_mb: dict[str, float] | None
    """PSS by name of the process; null where it was not looked at."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table. MB are 10^6 bytes."""

    way: str
    photos: int
    photo_bytes: int
    seconds: float
    photos_per_second: float
    steady_photos_per_second: float
    cpu_seconds: float
    cpu_by_process_seconds: dict[str, float]
    server_cpu_seconds: float
    connections: int
    """That were opened for it."""
    peak_mb: float
    peak_by_process_mb: dict[str, float]
    """Of the same moment."""
    quarters_mb: list[float]
    """Mean memory in each quarter of the time in which photos came."""
    looks: int
    """How often memory was looked at."""
    watching_cpu_seconds: float
    """What all this looking took, from the same CPUs."""
    others_cpu_seconds: float
    """What programs took meanwhile that have nothing to do with it."""


@dataclass(frozen=True)
class Way:
    """A command that brings photos, and how to count what it has written."""

    name: str
    command: list[str]
    count: Callable[[], tuple[int, int]]
    """Photos and their bytes."""


class Watcher(threading.Thread):
    """Looks at a process and all its children until told to finish; notes CPU time, memory and what the server has given."""

    def __init__(self, process: int, server: PhotoServer, before: Books) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(process)
        self.server = server
        self.before = before
        self.looks: list[Look] = []
        self.cpu_seconds: dict[tuple[int, float], tuple[str, float]] = {}
        """By process (id and start): its name, and its CPU time as last seen."""
        self.own_cpu_seconds = 0.0
        self.busy_seconds = -busy_seconds()
        self.finished = threading.Event()
        self.started = time.perf_counter()

    def run(self) -> None:
        """Look until `finish` is called, and once more."""
        began = time.thread_time()
        for number in itertools.count():
            ends = self.finished.is_set()
            self.look(weigh=number % LOOKS_PER_WEIGHING == 0)
            if ends:
                break
            self.finished.wait(LOOK_SECONDS)
        self.own_cpu_seconds = time.thread_time() - began

    def look(self, weigh: bool) -> None:
        """One look."""
        photos = self.server.books().photos - self.before.photos
        seconds = time.perf_counter() - self.started
        memory: dict[str, float] = {}
        try:
            processes = [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            processes = []
        for process in processes:
            try:
                with process.oneshot():
                    name = "main" if process == self.process else process.name().partition(".")[0][:NAME_LENGTH]
                    times = process.cpu_times()
                    self.cpu_seconds[process.pid, process.create_time()] = name, times.user + times.system
                    if weigh:
                        held = process.memory_full_info()
                        memory[name] = memory.get(name, 0) + getattr(held, "pss", held.uss) / 1e6
            except psutil.Error:  # It ended while we looked.
                continue
        self.looks.append(Look(seconds, photos, memory if weigh and memory else None))

    def finish(self) -> None:
        """Stop and wait."""
        self.finished.set()
        self.join()
        self.busy_seconds += busy_seconds()


def write_tables(folder: Path, urls: Sequence[str]) -> None:
    """Photos as Open Images' tables tell of them, with one box each; and the URLs alone, for others."""
    folder.mkdir(parents=True)
    ids = [f"{number:016x}" for number in range(len(urls))]
    box = {"Source": "xclick", "LabelName": LABEL, "Confidence": 1, "XMin": 0.2, "XMax": 0.7, "YMin": 0.2, "YMax": 0.7}
    write_csv(folder / f"{BOX_FILE}.csv", BOX_COLUMNS, ({"ImageID": photo, **box} for photo in ids))
    rows = ({"ImageID": photo, "Subset": "train", "OriginalURL": url} for photo, url in zip(ids, urls, strict=True))
    write_csv(folder / f"{PHOTO_FILE}.csv", PHOTO_COLUMNS, rows)
    (folder / CLASS_FILE).write_text(f"{LABEL},Cat\n")
    pq.write_table(pa.table({"url": urls}), folder / "urls.parquet")
    (folder / "urls.txt").write_text("\n".join(urls))


def write_csv(path: Path, columns: Sequence[str], rows: Any) -> None:
    """Rows as dictionaries; what they lack is 0."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="0" if "IsInside" in columns else "")
        writer.writeheader()
        writer.writerows(rows)


def ours(tables: Path, scratch: Path, server: PhotoServer, processes: int, connections: int, name: str) -> Way:
    """The crawl as a user starts it."""
    store = scratch / "store"
    options = {
        "source.annotations": tables,
        "source.photos": store,
        "source.splits": '["train"]',
        "out": scratch / "out",
        "crawl.sources": '["{url}"]',
        "crawl.contact": "benchmark@example.org",
        "crawl.allowed_addresses": f'["127.0.0.1:{server.port}"]',
        "crawl.workers": processes,
        "crawl.connections": connections,
        **NO_LIMITS,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]

    def count() -> tuple[int, int]:
        lengths = pq.read_table(store / "index.parquet", columns=["length"])["length"]
        return len(lengths), pc.sum(lengths).as_py() or 0

    return Way(name, [sys.executable, "pipelines/crawl.py", "--config", "configs/tiny.yaml", *words], count)


def img2dataset(python: Path, tables: Path, scratch: Path, processes: int, threads: int, photos: int, decoding: bool) -> Way:
    """The published tool."""
    out = scratch / "tars"
    options = {
        **IMG2DATASET,
        "url_list": tables / "urls.parquet",
        "output_folder": out,
        "processes_count": processes,
        "thread_count": threads,
        # Its default, or less where not all processes would have something to do.
        "number_sample_per_shard": min(10_000, -(-photos // processes)),
        **({"skip_reencode": True} if decoding else {"disable_all_reencoding": True}),
    }
    words = [f"--{key}={value}" for key, value in options.items()]

    def count() -> tuple[int, int]:
        sizes = []
        for path in out.glob("*.tar"):
            with tarfile.open(path) as tar:
                sizes += [member.size for member in tar if member.name.endswith(".jpg")]
        return len(sizes), sum(sizes)

    start = "from img2dataset.main import main; main()"
    return Way(f"img2dataset{', decoding' if decoding else ''}", [str(python), "-c", start, *words], count)


def one_after_the_other(tables: Path, scratch: Path) -> Way:
    """What a few lines do."""
    out = scratch / "files"

    def count() -> tuple[int, int]:
        sizes = [path.stat().st_size for path in out.iterdir()]
        return len(sizes), sum(sizes)

    return Way("one after the other", [sys.executable, "-c", LOOP, str(tables / "urls.txt"), str(out)], count)


def measure(way: Way, photos: int, server: PhotoServer, scratch: Path) -> Measurement:
    """Run one way and watch it; what it wrote is gone afterwards.

    Raises:
        InputError: it failed, or has not written all photos.
    """
    scratch.mkdir()
    log = scratch / "log.txt"
    # A cluster that happens to run on this machine is not what is measured.
    environment = {**os.environ, "RAY_ADDRESS": "local", **QUIET}
    before = server.books()
    with log.open("wb") as output:
        start = time.perf_counter()
        with subprocess.Popen(way.command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, env=environment) as process:
            watcher = Watcher(process.pid, server, before)
            watcher.start()
            try:
                process.wait()
            finally:
                seconds = time.perf_counter() - start
                watcher.finish()
    after = server.books()
    last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    if process.returncode:
        raise InputError(f"`{way.name}` ended with status {process.returncode}:\n{last_lines}")
    written, written_bytes = way.count()
    if (written, written_bytes) != (photos, after.bytes - before.bytes):
        sent = f"the server sent {after.photos - before.photos:,} photos and {after.bytes - before.bytes:,} bytes"
        raise InputError(f"`{way.name}` wrote {written:,} photos and {written_bytes:,} bytes; {sent}:\n{last_lines}")
    shutil.rmtree(scratch)
    return summary(way.name, photos, written_bytes, seconds, watcher, before, after)


def summary(
    name: str, photos: int, photo_bytes: int, seconds: float, watcher: Watcher, before: Books, after: Books
) -> Measurement:
    """What was seen, in numbers."""
    weighed = [(look.seconds, look.memory_mb) for look in watcher.looks if look.memory_mb]
    peak = max((memory for _, memory in weighed), key=lambda memory: sum(memory.values()))
    cpu_by_process: dict[str, float] = defaultdict(float)
    for process, spent in watcher.cpu_seconds.values():
        cpu_by_process[process] += spent
    server_cpu = after.cpu_seconds - before.cpu_seconds
    begin, end = (time_of(watcher.looks, share * photos) for share in STEADY)
    first, last = (time_of(watcher.looks, count) for count in (1, photos))
    return Measurement(
        name,
        photos,
        photo_bytes,
        round(seconds, 2),
        round(photos / seconds, 1),
        round((STEADY[1] - STEADY[0]) * photos / (end - begin), 1),
        round(sum(cpu_by_process.values()), 2),
        largest_first(cpu_by_process),
        round(server_cpu, 2),
        after.connections - before.connections - len(watcher.looks) - 1,
        round(sum(peak.values()), 1),
        largest_first(peak),
        quarter_means([(moment, sum(memory.values())) for moment, memory in weighed if first <= moment <= last]),
        len(weighed),
        round(watcher.own_cpu_seconds, 2),
        round(max(0.0, watcher.busy_seconds - sum(cpu_by_process.values()) - server_cpu - watcher.own_cpu_seconds), 2),
    )


def busy_seconds() -> float:
    """CPU time of all programs on this machine since it was started."""
    times = psutil.cpu_times()
    return float(times.user + times.system)


def largest_first(numbers: Mapping[str, float]) -> dict[str, float]:
    """Rounded, and those that round to nothing left out."""
    ranked = sorted(numbers.items(), key=lambda item: -item[1])
    return {name: round(number, 1) for name, number in ranked if round(number, 1)}


def time_of(looks: Sequence[Look], photos: float) -> float:
    """When so many photos had been given, in s; between two looks as if at an even pace."""
    earlier = looks[0]
    for look in looks:
        if look.photos >= photos:
            share = (photos - earlier.photos) / (look.photos - earlier.photos) if look.photos > earlier.photos else 1.0
            return earlier.seconds + share * (look.seconds - earlier.seconds)
        earlier = look
    return earlier.seconds


def quarter_means(points: Sequence[tuple[float, float]]) -> list[float]:
    """Means of values in each quarter of their time; of none, nothing."""
    if len(points) < QUARTERS:
        return []
    edges = [len(points) * part // QUARTERS for part in range(QUARTERS + 1)]
    return [round(fmean(value for _, value in points[first:after]), 1) for first, after in itertools.pairwise(edges)]


def table_of(measurements: Sequence[Measurement]) -> Table:
    """The table to print; the first measurement is ours."""
    columns = ("photos", "seconds", "photos/s", "steady/s", "CPU s", "CPU ms/photo", "server's CPU s", "peak MB", "times ours")
    table = Table("way", *columns)
    for one in measurements:
        table.add_row(
            one.way,
            f"{one.photos:,}",
            f"{one.seconds:,.1f}",
            f"{one.photos_per_second:,.0f}",
            f"{one.steady_photos_per_second:,.0f}",
            f"{one.cpu_seconds:,.1f}",
            f"{1000 * one.cpu_seconds / one.photos:.2f}",
            f"{one.server_cpu_seconds:,.1f}",
            f"{one.peak_mb:,.0f}",
            f"{one.steady_photos_per_second / measurements[0].steady_photos_per_second:.2f}",
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def package_version(python: Path, package: str) -> str:
    """Of a package in another environment.

    Raises:
        InputError: it is not there.
    """
    ask = [str(python), "-c", f"from importlib.metadata import version; print(version({package!r}))"]
    try:
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise InputError(f"{python}: no Python with {package}; X/bin/pip install {package}, then X/bin/python") from None


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for what comes (1.2 GB), which is removed afterwards")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="photos in all (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="of each way (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help="of each process (default: %(default)s)")
    parser.add_argument("--img2dataset", type=Path, help="a Python that has img2dataset; without it, that way is left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "crawl.json", help="file to write (default: %(default)s)")
    given = parser.parse_args()
    machine = describe_machine()
    versions = describe_versions(["aiohttp", "pillow", "psutil", "pyarrow", "ray"])
    # Not resolved: the interpreter of a virtual environment is a link, and its place tells what is installed.
    python = given.img2dataset and Path(os.path.abspath(given.img2dataset))
    if python:
        versions["img2dataset"] = package_version(python, "img2dataset")
    folder = given.folder.resolve() / f"crawl-{os.getpid()}"
    tenth = given.photos // TENTH
    scratch, whole_tables, tenth_tables = folder / "scratch", folder / "tables", folder / "tenth"
    pace = (given.processes, given.connections)
    try:
        with running_server() as server:
            urls = [server.url(f"train/{number:08d}.jpg") for number in range(given.photos)]
            write_tables(whole_tables, urls)
            write_tables(tenth_tables, urls[:tenth])
            ways = [(ours(whole_tables, scratch, server, *pace, "ours"), given.photos)]
            if python:
                ways += [
                    (img2dataset(python, whole_tables, scratch, *pace, given.photos, decoding), given.photos)
                    for decoding in (False, True)
                ]
            ways.append((one_after_the_other(tenth_tables, scratch), tenth))
            if tenth >= FEWEST:
                ways.append((ours(tenth_tables, scratch, server, *pace, "ours, a tenth"), tenth))
            measurements = [measure(way, photos, server, scratch) for way, photos in ways]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    growth = measurements[0].peak_mb / measurements[-1].peak_mb - 1 if tenth >= FEWEST else None
    console = Console(width=TABLE_WIDTH)
    console.print(table_of(measurements))
    console.print("Steady: from 10 % to 90 % of the photos; `times ours` is of it. Memory: PSS of all processes.")
    if growth is not None:
        console.print(f"Ten times the photos take {growth:+.0%} memory.")
    disturbance = max(one.others_cpu_seconds / (one.seconds * machine["cpus"]) for one in measurements)
    if disturbance > MOST_DISTURBANCE:
        console.print(f"Other programs took up to {disturbance:.0%} of the CPUs meanwhile: measure again when nothing else runs.")
    if not python:
        console.print(HOW_TO_INSTALL)
    result = {
        "date": today(),
        "machine": machine,
        "versions": versions,
        "processes": given.processes,
        "connections_per_process": given.connections,
        "limits_of_ours": NO_LIMITS,
        "settings_of_img2dataset": IMG2DATASET,
        "memory_growth_percent": None if growth is None else round(100 * growth, 1),
        "ways": [asdict(one) for one in measurements],
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
