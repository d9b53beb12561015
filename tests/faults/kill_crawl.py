"""kill -9 of a whole crawl at random moments, again and again: nothing that was recorded may be lost, or asked for twice.

    python -m tests.faults.kill_crawl --photos 5000 --kills 20

Half of the kills hit the program alone, whose Ray must then end by itself, half of them all of its processes; after some of the
former the next run begins at once, while the workers of the one before are still at it. The moments are drawn by a seed: after so
many photos, while a part is committed, while tables are made, while Ray starts. Prints the kills; status 1 if anything is wrong.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from pipelines.crawling.rounds import read_parts
from pipelines.crawling.tables import verify_store
from schemas.outcomes import OK
from tests.crawl_world import crawl_command, crawl_options, write_tables
from tests.faults.marked import MarkedProcesses
from tests.hostile_server import HostileServer, good_photo

# Only what will never come is given up: how fast a machine is says nothing about a crawl.
PATIENCE_SECONDS = 1800
_LONGEST_AFTERLIFE_SECONDS = 600
"""Of what Ray itself has started: it looks only now and then whether its parent lives."""
HITS = ("the program, and the next run at once", "all processes", "the program", "all processes")
MOMENTS = ("photos", "commit", "photos", "commit", "photos", "merge", "photos", "start")


@dataclass
class Kill:
    """One kill."""

    hit: str
    moment: str
    seconds: float
    """From the start of the run."""
    recorded: int
    """Photos in parts that count, afterwards."""


@dataclass
class Report:
    """What became of a crawl that was killed so often."""

    photos: int
    kills: list[Kill] = field(default_factory=list)
    requests: int = 0
    seconds: float = 0
    problems: list[str] = field(default_factory=list)


def photos_of(count: int) -> dict[str, bytes]:
    """Photos by name, no two of them the same: one JPEG with a comment each."""
    photo = good_photo("one for all", 128, 96)
    names = [f"{number:016x}" for number in range(count)]
    comments = {name: b"\xff\xfe" + (2 + len(name)).to_bytes(2, "big") + name.encode() for name in names}
    return {name: photo[:2] + comment + photo[2:] for name, comment in comments.items()}


class Killer(MarkedProcesses):
    """Runs one crawl over and over, and ends it by SIGKILL."""

    def __init__(self, folder: Path, server: HostileServer, names: list[str]) -> None:
        """The tables are written; nothing is started yet."""
        self.server = server
        self.names = names
        self.store = folder / "store"
        tables = write_tables(folder / "tables", {name: server.url(f"/photos/{name}") for name in names})
        parts = {"crawl.photos_per_part": max(5, len(names) // 500), "crawl.workers": 2}
        options = crawl_options(tables, self.store, folder / "out", server.port, others=parts)
        super().__init__(crawl_command(options), folder / "log.txt")

    def recorded(self) -> dict[str, int]:
        """Names of the photos in parts that count now -> how often each was asked for."""
        if not (self.store / "store.json").is_file():
            return {}
        names: list[str] = []
        for part in read_parts(self.store):
            names += pq.read_table(self.store / "parts" / part.table, columns=["photo_id"])["photo_id"].to_pylist()
        return {name: self.server.hits[f"/photos/{name}"] for name in names}

    def kill(self, process: subprocess.Popen[bytes], hit: str) -> dict[str, int]:
        """End a run; returns what was recorded then. Its other processes may go on only where the next run begins at once."""
        process.kill()
        if hit == "all processes":
            self.end_all()
        process.wait()
        if not hit.endswith("at once"):
            self.await_end()
        return self.recorded()

    def await_end(self) -> None:
        """Until no process of earlier runs is left."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.alive():
            if time.monotonic() > deadline:
                raise TimeoutError("processes live on")
            time.sleep(0.05)


def moment_of(killer: Killer, kind: str, photos: int, seconds: float) -> tuple[str, Callable[[float], bool]]:
    """When to kill: words for it, and whether it is now, at so many s after the start."""
    before = len(killer.server.requests)

    def after_photos(_: float) -> bool:
        return len(killer.server.requests) - before >= photos

    def has(folder: Path, ending: str) -> bool:
        try:
            return any(entry.name.startswith(".") and ending in entry.name for entry in os.scandir(folder))
        except FileNotFoundError:
            return False

    if kind == "commit":
        return f"commit after {photos} photos", lambda now: after_photos(now) and has(killer.store / "parts", ".parquet.")
    if kind == "merge":
        return "tables are made", lambda now: has(killer.store, ".parquet.")
    if kind == "start":
        return "start", lambda now: now > seconds
    return f"{photos} photos", after_photos


def kill_often(photos: int, kills: int, seed: int, folder: Path, say: Callable[[str], None] = print) -> Report:
    """Crawl `photos` photos, killing it `kills` times, then let it come to its end, and look at what is there."""
    rng = random.Random(seed)
    report = Report(photos)
    pictures = photos_of(photos)
    began = time.monotonic()
    with HostileServer(pictures) as server, Killer(folder, server, list(pictures)) as killer:
        known: dict[str, int] = {}
        for number in range(kills):
            share = photos / (kills + 1)
            kind = MOMENTS[number % len(MOMENTS)]
            moment, is_now = moment_of(killer, kind, round(share * rng.uniform(0.3, 1.3)), rng.uniform(0.5, 8))
            started = time.monotonic()
            process = killer.start()
            while process.poll() is None and not is_now(time.monotonic() - started):
                if time.monotonic() - started > PATIENCE_SECONDS:
                    raise TimeoutError(f"{moment}: did not come; see {killer.log}")
                time.sleep(0.001)
            seconds = time.monotonic() - started
            if process.poll() is not None:
                report.problems.append(f"kill {number + 1}: the crawl ended by itself, status {process.returncode}")
                break
            hit = HITS[number % len(HITS)]
            recorded = killer.kill(process, hit)
            report.kills.append(Kill(hit, moment, seconds, len(recorded)))
            report.problems += [f"kill {number + 1}: {problem}" for problem in _lost_or_again(known, recorded)]
            known = recorded
            say(f"kill {number + 1} of {kills}: {hit}, {moment}, {len(recorded)} recorded")
        # What earlier runs left may write for a while; none of it counts, and the last run takes it away once they have ended.
        killer.await_end()
        process = killer.start()
        status = process.wait(PATIENCE_SECONDS + photos)
        final = killer.recorded()
        report.problems += _lost_or_again(known, final)
        report.problems += _problems_at_the_end(killer, status, pictures)
        report.requests = len(server.requests)
    report.seconds = time.monotonic() - began
    return report


def _lost_or_again(before: dict[str, int], now: dict[str, int]) -> Iterator[str]:
    """What was recorded must still be, and must not have been asked for again."""
    lost = before.keys() - now.keys()
    if lost:
        yield f"{len(lost)} photos were recorded and are not any more, as {min(lost)}"
    again = [name for name, hits in before.items() if now.get(name, hits) != hits]
    if again:
        yield f"{len(again)} photos were recorded and asked for again, as {min(again)}"


def _problems_at_the_end(killer: Killer, status: int, pictures: dict[str, bytes]) -> Iterator[str]:
    """Each photo once and whole, and nothing left lying about."""
    if status:
        yield f"the last run ended with status {status}; see {killer.log}"
    codes = pq.read_table(killer.store / "status.parquet", columns=["photo_id", "code"]).to_pylist()
    times = Counter(row["photo_id"] for row in codes if row["code"] == OK)
    if times != dict.fromkeys(pictures, 1):
        yield f"status.parquet: {len(times)} photos are ok, {sum(times.values()) - len(times)} of them twice"
    index = Counter(pq.read_table(killer.store / "index.parquet", columns=["photo_id"])["photo_id"].to_pylist())
    if index != dict.fromkeys(pictures, 1):
        yield f"index.parquet: {len(index)} photos, {sum(index.values()) - len(index)} of them twice"
    problems, photos = verify_store(killer.store)
    yield from problems
    if photos != len(pictures):
        yield f"{photos} photos verified, not {len(pictures)}"
    for path in killer.store.rglob(".*.tmp"):
        yield f"{path}: left over"
    named = {name for part in read_parts(killer.store) for name in (*part.files, f"{part.name}.json")}
    for path in (killer.store / "parts").iterdir():
        if path.name not in named:
            yield f"{path}: of no part"
    deadline = time.monotonic() + _LONGEST_AFTERLIFE_SECONDS
    while (alive := killer.alive()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            yield f"process {process.pid} lives on: {' '.join(process.cmdline())[:100]}"


def print_report(report: Report) -> None:
    """The kills, and what was wrong."""
    for number, kill in enumerate(report.kills, 1):
        print(
            f"{number}: {kill.hit}; {kill.moment}, {kill.seconds:.1f} s; {kill.recorded:,} of {report.photos:,} photos recorded"
        )
    extra = report.requests - report.photos
    print(
        f"{report.requests:,} requests, {extra:,} of them again for photos of which there was no record; {report.seconds:.0f} s"
    )
    for problem in report.problems:
        print(f"WRONG: {problem}")
    if not report.problems:
        print("each photo is there once and whole, and none that was recorded was asked for again")


def main() -> int:
    """Kill, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything in this new folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = kill_often(given.photos, given.kills, given.seed, folder, lambda line: print(line, flush=True))
    print_report(report)
    return bool(report.problems)


if __name__ == "__main__":
    sys.exit(main())
