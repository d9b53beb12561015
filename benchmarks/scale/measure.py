"""Small runs that the model takes its constants from, and others that it is checked against. Writes results/scale.json.

    crawl      the benchmark's local photo server; 1 process at two sizes, then 2 processes
    pack       the benchmark's world; 1 packing actor, then 2
    tables     select, plan and list the wanted photos of 1, 2, 30 and 100 % of 14.6 M boxes: seconds, memory, bytes a row
    store      parts of a photo store read, merged and searched for placeholders, at three sizes
    footers    Parquet files of many row groups: bytes of the footer, seconds to parse it
    hashes     first bytes of the hashes of so many photos, sorted: seconds and memory
    limits     what Arrow does below and above the limits that end a design
    pool       units that do nothing, on Ray: what the one driver takes to hand out each

Usage:  python -m benchmarks.scale.measure --folder DIR [--parts crawl pack ...] [--rows 14_600_000]

Each run of `tables` is a process of its own, so that its peak memory is its own. What is repeated is listed with all its turns;
figures are medians. Parts that are not asked for keep what the file has of them.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.make_annotations import TRAIN_PHOTOS, TRAIN_ROWS, make_annotations
from benchmarks.memory import high_water_mb
from pbe_core.errors import InputError, run_program
from pbe_core.settings import load_settings, preset
from pipelines.config import BuildSettings
from pipelines.crawling.tables import come_often
from schemas.tables import INDEX, PLAN, STORED_PHOTOS, WANTED

RESULT = RESULTS / "scale.json"
TURNS = 3
CRAWLS = ((1, 10_000), (1, 40_000), (2, 40_000))
"""Processes and photos: the first two calibrate, the last is predicted."""
CONNECTIONS = 32
SAMPLES = 1_000
SHARES = (0.01, 0.02, 0.3, 1.0)
"""Of the rows: the second and third calibrate, the others are predicted."""
_LARGE = 1.0
"""From this share on once: no median is worth the minutes."""
_SEEN_SECONDS = 2.0
"""Of CPU time; what takes less is repeated."""
PARTS_OF_STORE = (50, 100, 400)
PHOTOS_PER_PART = 500
FOOTERS = (1_000, 4_000, 20_000)
UNITS = (300, 1_200)
HASHES = (2_000_000, 4_000_000, 12_000_000)
RECORDS = 5_000


def median_of(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number over several turns of one thing, with the turns' seconds beside it."""
    numbers = {name: statistics.median(turn[name] for turn in turns) for name, value in turns[0].items() if is_number(value)}
    return {**turns[0], **numbers, "turns_seconds": [round(turn["seconds"], 3) for turn in turns]}


def is_number(value: object) -> bool:
    """Whether a median of it means something."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def measure_crawl(folder: Path) -> list[dict[str, Any]]:
    """The crawl as a user starts it, host limits off."""
    from benchmarks import crawl
    from benchmarks.photo_server import running_server

    found: dict[tuple[int, int], list[dict[str, Any]]] = {key: [] for key in CRAWLS}
    with running_server() as server:
        urls = [server.url(f"train/{number:08d}.jpg") for number in range(max(photos for _, photos in CRAWLS))]
        for photos in {photos for _, photos in CRAWLS}:
            crawl.write_tables(folder / f"tables-{photos}", urls[:photos])
        for _, (processes, photos) in itertools.product(range(TURNS), CRAWLS):
            place = (folder / f"tables-{photos}", folder / "scratch")
            way = crawl.ours(*place, server, processes, CONNECTIONS, f"{processes} of {photos}")
            one = crawl.measure(way, photos, server, folder / "scratch")
            found[processes, photos].append(
                {
                    "processes": processes,
                    "photos": photos,
                    "seconds": one.seconds,
                    "steady_photos_per_second": one.steady_photos_per_second,
                    "cpu_seconds": one.cpu_seconds,
                    "worker_cpu_seconds": one.cpu_by_process_seconds.get("ray::CrawlWorke", 0.0),
                    "driver_cpu_seconds": one.cpu_by_process_seconds.get("main", 0.0),
                    "server_cpu_seconds": one.server_cpu_seconds,
                    "driver_mb": one.peak_by_process_mb.get("main", 0.0),
                    "worker_mb": one.peak_by_process_mb.get("ray::CrawlWorke", 0.0) / processes,
                    "others_cpu_seconds": one.others_cpu_seconds,
                }
            )
    return [median_of(turns) for turns in found.values()]


def measure_pack(folder: Path) -> dict[str, Any]:
    """One packing actor and two, as in `packing.py`; bytes of what they leave."""
    from benchmarks import packing
    from benchmarks.packing_world import draw_photos, make_world

    make_world(folder / "world", draw_photos(folder / "drawn"), SAMPLES)
    settings = packing.plan(folder / "world", folder / "out", SAMPLES // packing.SHARDS)
    found, _ = packing.measure_workers(settings)
    rows = [
        {"workers": workers, "samples": one.samples, "seconds": one.seconds, "cpu_seconds": one.cpu_seconds, "turns": one.turns}
        for workers, one in zip(packing.WORKERS, found, strict=True)
    ]
    shards = settings.out / "shards"
    index = pa.concat_tables(pq.read_table(path) for path in sorted(shards.glob("*.index.parquet")))
    record = next(shards.glob("*-*.json")).read_bytes()
    return {
        "shards": packing.SHARDS,
        "workers": rows,
        "index_bytes_per_row": written_bytes(index) / len(index),
        "sample_bytes": sum(path.stat().st_size for path in shards.glob("*.tar")) / len(index),
        "record_bytes": len(record),
        "record_memory_bytes": held_bytes(lambda: [json.loads(record) for _ in range(RECORDS)]) / RECORDS,
    }


def held_bytes(make: Callable[[], object]) -> int:
    """Memory that Python objects hold."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    made = make()
    held = tracemalloc.get_traced_memory()[0] - before
    del made
    tracemalloc.stop()
    return held


def written_bytes(table: pa.Table) -> int:
    """Of a Parquet file of these rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return int(sink.getvalue().size)


def measure_tables(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Select, plan and list wanted photos, each size in processes of its own."""
    found = []
    for share in SHARES:
        turns = TURNS if share < _LARGE else 1
        place = folder / f"rows-{share:g}"
        own = round(rows * share)
        make_annotations(place, own, round(own * TRAIN_PHOTOS / TRAIN_ROWS))
        ran = []
        for _ in range(turns):
            done = {}
            for step in ("select", "rest"):
                command = [sys.executable, "-m", "benchmarks.scale.measure", "--folder", str(place), "--step", step]
                done |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            ran.append({"share": share, "seconds": done["select_seconds"], **done})
        found.append(median_of(ran))
        shutil.rmtree(place)
    return found


def run_step(step: str, place: Path) -> dict[str, Any]:
    """The selection, or what follows it, in this process: CPU and wall seconds, and how far its peak memory rose."""
    from pipelines.annotations import open_source
    from pipelines.crawling.wanted import list_wanted
    from pipelines.dataset.plan_shards import Plan, write_plan
    from pipelines.selection.objects import select_objects

    out = place / "out"
    given = {"out": out, "source.annotations": place, "source.photos": place, "source.splits": '["train"]'}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    settings = load_settings(BuildSettings, "build", words, preset("open_images"))
    source = open_source(settings)
    if step == "select":
        selection, taken = taken_by("select", lambda: select_objects(settings, out, source))
        return {"boxes": selection.boxes, "objects": selection.objects, "photos": selection.photos_with_objects, **taken}
    # The plan streams, and comes second: a peak of its own would hide that of the list.
    _, taken = taken_by("wanted", lambda: list_wanted(out / "objects.parquet", source, []))
    plan = out / "plan.parquet"
    sizes = settings.views.per_object, settings.shards.samples
    taken |= taken_by("plan", lambda: write_plan(out / "objects.parquet", plan, *sizes))[1]
    tables = {name: out / f"{name}.parquet" for name in ("objects", "rejects", "plan")}
    bytes_per_row = {
        f"{name}_bytes_per_row": path.stat().st_size / max(1, pq.read_metadata(path).num_rows) for name, path in tables.items()
    }
    return {"shards": len(Plan(plan).shards), **taken, **bytes_per_row}


def taken_by(name: str, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What some work gives, and what it takes: of little work, which a clock hardly sees, the mean of many times."""
    before, start, cpu = high_water_mb() or 0.0, time.perf_counter(), time.process_time()
    made = work()
    peak, times = high_water_mb() or 0.0, 1
    while time.process_time() - cpu < _SEEN_SECONDS:
        work()
        times += 1
    seconds, cpu_seconds = ((now - then) / times for now, then in ((time.perf_counter(), start), (time.process_time(), cpu)))
    taken = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak, "rise_mb": peak - before}
    return made, {f"{name}_{key}": value for key, value in taken.items()}


def stored_row(key: int, random: np.random.Generator) -> dict[str, Any]:
    """What a crawl records of a photo that came from a web server: hashes and names as long as real ones."""
    digest = random.bytes(32).hex()
    row: dict[str, Any] = dict.fromkeys(STORED_PHOTOS.names)
    url = f"https://farm{key % 9}.staticflickr.com/{key % 9999}/{key % 10**10}_{digest[:10]}_o.jpg"
    row |= {"key": key, "split": "train", "photo_id": f"{key:016x}", "code": "ok", "transient": False, "attempts": 1}
    row |= {"source": "{url}", "url": url, "http_status": 200, "sha256": digest, "verified": False, "width": 1024, "height": 768}
    moment = np.datetime64("2026-11-30T00:00:00").astype("O")
    return row | {"asked_at": moment, "fetched_at": moment, "etag": f'"{digest[:32]}"', "exif_orientation": 1}


def measure_store(folder: Path) -> list[dict[str, Any]]:
    """What reading, merging and searching the parts takes, and what a packing actor holds of the tables."""
    from pbe_core.photo_files import PhotoStore
    from pipelines.crawling.rounds import PartWriter, freeze_round, open_store, read_parts
    from pipelines.crawling.tables import merge

    found = []
    for count in PARTS_OF_STORE:
        store = folder / f"store-{count}"
        open_store(store, "a benchmark")
        random = np.random.default_rng(count)
        keys = np.sort(random.integers(0, 2**64, count * PHOTOS_PER_PART, np.uint64))
        missing = {field.name: pa.nulls(len(keys), field.type) for field in WANTED}
        wanted = pa.table({**missing, "key": keys, "split": ["train"] * len(keys), "photo_id": [f"{key:016x}" for key in keys]})
        chosen = freeze_round(store, wanted.select(WANTED.names), PHOTOS_PER_PART, [], [])
        one_byte = b"x"
        for unit in range(count):
            writer = PartWriter(store, chosen.number, unit)
            for key in keys[unit * PHOTOS_PER_PART : (unit + 1) * PHOTOS_PER_PART].tolist():
                writer.add(stored_row(key, random), one_byte, "jpg")
            writer.commit()
        parts = read_parts(store)
        read, merged = [], []
        for _ in range(TURNS):
            read.append(cpu_of(partial(read_parts, store)))
            (store / "status.parquet").unlink(missing_ok=True)
            merged.append(cpu_of(partial(merge, store, parts)))
        opened = PhotoStore(store)
        held = sum(column.nbytes for column in vars(opened).values() if hasattr(column, "nbytes"))
        found.append(
            {
                "parts": count,
                "photos": len(opened.keys),
                "seconds": statistics.median(merged),
                "read_parts_cpu_seconds": statistics.median(read),
                "merge_cpu_seconds": statistics.median(merged),
                "photo_store_bytes": held,
                "parts_memory_bytes": held_bytes(partial(read_parts, store)),
                "round_bytes": (store / "rounds/000001.parquet").stat().st_size,
                "index_bytes": (store / "index.parquet").stat().st_size,
                "status_bytes": (store / "status.parquet").stat().st_size,
            }
        )
        shutil.rmtree(store)
    return found


def cpu_of(work: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_hashes() -> list[dict[str, Any]]:
    """How placeholders are found: the first bytes of all photos' hashes, sorted; each size in a process of its own."""
    found = []
    for photos in HASHES:
        command = [sys.executable, "-m", "benchmarks.scale.measure", "--folder", ".", "--step", "group", "--rows", str(photos)]
        ran = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(TURNS)]
        found.append(median_of(ran))
    return found


def run_group(photos: int) -> dict[str, Any]:
    """What `find_placeholders` does with the first bytes of each hash, part by part, for photos that all differ."""
    draw = np.random.default_rng(photos)
    parts = (draw.integers(0, 2**64, PHOTOS_PER_PART, np.uint64) for _ in range(photos // PHOTOS_PER_PART))
    before, start, cpu = high_water_mb() or 0.0, time.perf_counter(), time.process_time()
    assert not len(come_often(parts))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {"photos": photos, "seconds": seconds, "cpu_seconds": cpu_seconds, "rise_mb": (high_water_mb() or 0.0) - before}


def measure_footers() -> list[dict[str, Any]]:
    """Files whose row groups hold one row: only the footer counts."""
    found = []
    for (name, schema), count in itertools.product((("wanted", WANTED), ("plan", PLAN), ("index", INDEX)), FOOTERS):
        row = {field.name: filler(field) for field in schema}
        one = pa.Table.from_pylist([row], schema=schema)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema, write_statistics=name != "plan") as writer:
            for _ in range(count):
                writer.write_table(one)
        data = sink.getvalue()
        seconds = statistics.median(cpu_of(lambda data=data: pq.ParquetFile(pa.BufferReader(data))) for _ in range(2 * TURNS + 1))
        size = pq.read_metadata(pa.BufferReader(data)).serialized_size
        found.append({"table": name, "row_groups": count, "footer_bytes": size, "parse_cpu_seconds": seconds})
    return found


def filler(field: pa.Field) -> Any:
    """A value of a column's type."""
    kind = field.type
    if pa.types.is_struct(kind):
        return {inner.name: filler(inner) for inner in kind}
    if pa.types.is_string(kind) or pa.types.is_dictionary(kind):
        return "0123456789abcdef"
    if pa.types.is_list(kind):
        return []
    return None if pa.types.is_timestamp(kind) or pa.types.is_boolean(kind) else 1


def measure_limits() -> list[dict[str, Any]]:
    """What Arrow does just below and just above the limits that `breaks.py` names; takes 4 GB of memory."""
    tried: list[tuple[str, Callable[[int], object], int, int]] = [
        ("bytes of text in a footer", text_in_footer, 99_000_000, 101_000_000),
        ("row groups of a file", row_groups, 40_000, 1_000_001),
        (
            "SHA-256 in hex, joined to one array",
            lambda count: pa.chunked_array(2 * [letters(count // 2, 64)]).combine_chunks(),
            33_000_000,
            34_000_000,
        ),
        ("names of 22 letters, padded to 24", lambda count: pc.ascii_rpad(letters(count, 22), 24, "\0"), 46_000_000, 47_000_000),
    ]
    return [{"what": what, "below": below, "above": above, **outcomes(work, below, above)} for what, work, below, above in tried]


def outcomes(work: Callable[[int], object], below: int, above: int) -> dict[str, str]:
    """What came of both."""
    said = {}
    for name, count in (("of_below", below), ("of_above", above)):
        try:
            work(count)
            said[name] = "ok"
        except (OSError, pa.ArrowException) as error:
            said[name] = f"{type(error).__name__}: {str(error).strip()}"
    return said


def letters(count: int, length: int) -> pa.StringArray:
    """So many strings of one length."""
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return pa.StringArray.from_buffers(
        count, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(np.full(count * length, 97, np.uint8))
    )


def text_in_footer(size: int) -> None:
    """Write and open a file whose footer has a text of so many bytes."""
    sink, table = pa.BufferOutputStream(), pa.table({"a": pa.array([1], pa.int8())})
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"text": "x" * size})
    pq.ParquetFile(pa.BufferReader(sink.getvalue()))


def row_groups(count: int) -> None:
    """Write so many row groups, and read the last."""
    sink, table = pa.BufferOutputStream(), pa.table({"a": pa.array([1], pa.int8())})
    with pq.ParquetWriter(sink, table.schema, write_statistics=False, use_dictionary=False, store_schema=False) as writer:
        for _ in range(count):
            writer.write_table(table)
    pq.ParquetFile(pa.BufferReader(sink.getvalue())).read_row_group(count - 1)


class Idle:
    """A worker of the pool that does nothing."""

    def ready(self) -> None:
        """It stands."""

    def work(self, unit: int) -> str:
        """Nothing is wrong."""
        return ""

    def done(self) -> float:
        """Of the unit at hand."""
        return 0.0


def measure_pool() -> list[dict[str, Any]]:
    """CPU and wall seconds that the driver takes for units without work, by the number of actors."""
    import ray

    from pbe_core.progress import Progress
    from pipelines.on_ray import start_ray
    from pipelines.ray_pool import actor_options, work_on_ray

    start_ray("local")
    found = []
    for actors, units in itertools.product((1, 4, 8), UNITS):
        make = ray.remote(Idle).options(**actor_options(0.1, at_once=4))
        for _ in range(2):  # The first time the processes start.
            work = work_on_ray(make.remote, actors, range(units), Progress("idle"), "", at_once=4)
            next(work)
            start, cpu = time.perf_counter(), time.process_time()
            rest = sum(1 for _ in work)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        found.append({"actors": actors, "units": rest, "seconds": seconds, "driver_cpu_seconds": cpu_seconds})
    ray.shutdown()
    return found


def main() -> None:
    """Measure what is asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for what is made meanwhile (3 GB), which is removed afterwards"
    )
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="boxes of the largest tables (default: %(default)s)")
    parts = ("crawl", "pack", "tables", "store", "hashes", "footers", "limits", "pool")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="(default: all)")
    parser.add_argument("--results", type=Path, default=RESULT, help="file to write (default: %(default)s)")
    parser.add_argument("--step", choices=("select", "rest", "group"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(run_group(given.rows) if given.step == "group" else run_step(given.step, given.folder)))
        return
    if given.rows < 1_000:
        raise InputError(f"--rows {given.rows}: at least 1,000, since a hundredth of them is measured, too")
    given.folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(given.results.read_text()) if given.results.is_file() else {}
    works: dict[str, Callable[[Path], Any]] = {
        "crawl": measure_crawl,
        "pack": measure_pack,
        "tables": lambda folder: measure_tables(folder, given.rows),
        "store": measure_store,
        "hashes": lambda folder: measure_hashes(),
        "footers": lambda folder: measure_footers(),
        "limits": lambda folder: measure_limits(),
        "pool": lambda folder: measure_pool(),
    }
    for part in given.parts:
        machine = describe_machine()
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            measured = works[part](Path(scratch))
        result[part] = {"date": today(), "machine": machine, "measured": measured}
        result["versions"] = describe_versions(["numpy", "pyarrow", "ray"])
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{part}: {given.results}")


if __name__ == "__main__":
    run_program(main)
