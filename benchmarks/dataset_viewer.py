"""Measure the dataset viewer over as many samples as Open Images has boxes: first page, filters, scrolling, memory of the server.

    FOLDER/dataset/    made here: index, its parts, plan, records; all shards are one tar of 1,000 samples, linked to each name
    server             `pbe app --dataset FOLDER/dataset`, a process of its own, asked over HTTP as the page asks
    baseline           the columns of the index that the page shows, loaded with pandas

Tables are compressed with zstd, which halves the disk that this takes (2.6 GB) and is slower to read than a build's own.
"""

import argparse
import http.client
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine, describe_versions, today
from benchmarks.make_annotations import TRAIN_ROWS, vocabulary
from benchmarks.memory import MemorySampler, high_water_mb, run_watched
from pbe_core.errors import InputError, run_program
from pbe_core.files import TarWriter
from pbe_core.progress import Progress
from pbe_core.sample_codec import Sample, encode_sample, jpeg_bytes
from pbe_core.words import number_of
from schemas.dataset import Books, DatasetInfo, SplitCounts, VaeIdentity
from schemas.sample import SampleRecord
from schemas.tables import INDEX, MEMBER_LOCATION, PLAN, SHARD_RECORDS

SHARD = 1000
PAGE = 60
VIEW = 64
"""Side of a view, px: of a sample the reference alone is asked for."""
CONNECTIONS = 6
"""As browsers open."""
BASELINE_COLUMNS = ["key", "split", "shard", "label", "label_name"]
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def make_dataset(folder: Path, rows: int) -> None:
    """A dataset of so many samples: all tables that the viewer reads, and one tar under the names of all shards."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    places = write_samples(folder / "samples.tar", min(SHARD, rows))
    names = [f"train-{number:06d}" for number in range(-(-rows // SHARD))]
    counts = [min(SHARD, rows - number * SHARD) for number in range(len(names))]
    random = np.random.default_rng(0)
    options = {"compression": "zstd", "compression_level": 1}
    with (
        pq.ParquetWriter(folder / "index.parquet", INDEX, **options) as index,
        Progress("making shards", len(names), "shards") as progress,
    ):
        for name, count in zip(names, counts, strict=True):
            table = index_rows(name, count, places, random)
            index.write_table(table)
            pq.write_table(table, shards / f"{name}.index.parquet", **options)
            os.link(folder / "samples.tar", shards / f"{name}.tar")
            progress.update(1)
    write_plan(folder / "plan.parquet", names, counts, random)
    write_records(folder, names, counts)


def write_samples(path: Path, count: int) -> list[dict[str, dict[str, int]]]:
    """A tar of samples with references of noise; where each member lies."""
    random = np.random.default_rng(1)
    places = []
    with path.open("wb") as file:
        tar = TarWriter(file)
        for number in range(count):
            coarse = random.integers(0, 256, (28, 28, 3), np.uint8)
            picture = cv2.resize(coarse, (224, 224), interpolation=cv2.INTER_CUBIC)
            masks = np.zeros((2, VIEW, VIEW), bool)
            masks[:, 8:40, 8:40] = True
            latents = random.standard_normal((3, 8, VIEW // 8, VIEW // 8)).astype(np.float16)
            latents[:, 4:] = abs(latents[:, 4:])
            sample = Sample(record_of(number), latents[0], latents[1:], masks, jpeg_bytes(picture, 95), None)
            own = {}
            for member, data in encode_sample(sample).items():
                place = {"offset": tar.add(f"{number}.{member}", data), "length": len(data), "crc32": zlib.crc32(data)}
                own[member.replace(".", "_")] = place
            places.append(own)
        tar.close()
    return places


def record_of(number: int) -> SampleRecord:
    """The record of a sample."""
    return SampleRecord(
        key=f"{number:016x}-{number:012x}_0",
        object_id=f"{number:016x}-{number:012x}",
        split="train",
        photo_id=f"{number:016x}",
        file_name=None,
        rotation=0,
        photo_size=(VIEW, VIEW),
        photo_sha256="0" * 64,
        label="/m/0",
        label_name="Thing",
        box=(8, 8, 40, 40),
        window=(0, 0, VIEW),
        box_in_view=(8, 8, 40, 40),
        padded=False,
        mask_kinds=("box", "box"),
        mask_polygons=(((8, 8), (40, 8), (40, 40)),) * 2,
        reference_window=(4, 4, 44, 44),
        reference_mask=None,
        url=None,
        author=None,
        licence=None,
        seed=0,
    )


def index_rows(name: str, count: int, places: list[dict[str, dict[str, int]]], random: np.random.Generator) -> pa.Table:
    """Rows of the index of one shard: three samples a photo, classes as frequent as Open Images'."""
    words = vocabulary()
    photos = random.integers(0, 1 << 63, count // 3 + 1, np.int64).repeat(3)[:count]
    objects = np.concatenate(
        [hexadecimal(photos, 16), dashes(count, b"-"), hexadecimal(random.integers(0, 1 << 48, count), 12)], 1
    )
    labels = np.searchsorted(np.cumsum(words.shares), random.random(count)).clip(0, len(words.ids) - 1).astype(np.int32)
    columns = {
        "key": strings(np.concatenate([objects, dashes(count, b"_0")], 1)),
        "split": pa.repeat("train", count),
        "shard": pa.repeat(name, count),
        "position": pa.array(np.arange(count, dtype=np.int32)),
        "object_id": strings(objects),
        "label": pa.DictionaryArray.from_arrays(labels, pa.array(words.ids)).cast(pa.string()),
        "label_name": pa.DictionaryArray.from_arrays(labels, pa.array(words.names)).cast(pa.string()),
        "view_jpg": pa.array([None] * count, MEMBER_LOCATION),
    }
    for member in ("latent_npy", "mask_json", "masked_npy", "ref_jpg", "json"):
        columns[member] = pa.array([place[member] for place in places[:count]], MEMBER_LOCATION)
    return pa.table([columns[column] for column in INDEX.names], schema=INDEX)


def hexadecimal(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers as characters [rows, width]."""
    octets = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - width // 2 :]
    return np.stack([HEX[octets >> 4], HEX[octets & 15]], axis=2).reshape(-1, width)


def dashes(count: int, text: bytes) -> np.ndarray:
    """The same characters on each row."""
    return np.tile(np.frombuffer(text, np.uint8), (count, 1))


def strings(characters: np.ndarray) -> pa.StringArray:
    """Characters [rows, width] as strings."""
    count, width = characters.shape
    offsets = np.arange(0, width * count + 1, width, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(characters).tobytes()))


def write_plan(path: Path, names: list[str], counts: list[int], random: np.random.Generator) -> None:
    """A plan of which the sizes alone are told: no sample failed, so nothing else of it is read."""
    fields = [PLAN.field(name) for name in ("shard", "area_share")]
    metadata = {"shards": json.dumps(dict(zip(names, counts, strict=True)))}
    schema = pa.schema(fields, metadata=metadata)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(names), 16):
            own = [pa.repeat(name, count) for name, count in zip(names[start : start + 16], counts[start:], strict=False)]
            total = sum(counts[start : start + 16])
            writer.write_table(pa.table([pa.chunked_array(own), random.uniform(0.02, 0.8, total)], schema=schema))


def write_records(folder: Path, names: list[str], counts: list[int]) -> None:
    """shard_records.parquet and dataset.json."""
    nothing = {"fingerprint": "", "failed": 0, "bytes": 0, "sha256": "", "index_bytes": 0, "index_sha256": ""}
    nothing |= {"failures": {}, "masks": {}, "padded_views": 0}
    records = [
        {"shard": name, "split": "train", "planned": count, "samples": count, **nothing}
        for name, count in zip(names, counts, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(records, SHARD_RECORDS), folder / "shard_records.parquet")
    rows = sum(counts)
    vae = VaeIdentity(source="none", sha256="", config={}, scaling_factor=1, latent_channels=4, downsampling=8)
    books = Books(
        boxes=rows, objects=rows, rejects={}, planned=rows, samples=rows, failures={}, masks={"box": 2 * rows}, padded_views=0
    )
    info = DatasetInfo(
        fingerprint="benchmark",
        view_size=VIEW,
        masks_per_view=2,
        vae=vae,
        splits={"train": SplitCounts(shards=names, samples=rows, bytes=0)},
        books=books,
        settings={},
    )
    (folder / "dataset.json").write_text(info.model_dump_json())


class Client:
    """Asks a server as a page does."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.headers = {"Cookie": ""}
        connection = http.client.HTTPConnection(address)
        connection.request("GET", "/dataset")
        self.headers["Cookie"] = (connection.getresponse().getheader("Set-Cookie") or "").split(";")[0]

    def get(self, path: str) -> bytes:
        """The body of an answer. Raises RuntimeError where it is an error."""
        connection = http.client.HTTPConnection(self.address)
        connection.request("GET", path, headers=self.headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{path}: {answer.status} {body[:300]!r}")
        return body

    def rows(self, query: str = "", first: int = 0) -> dict[str, Any]:
        """A page of rows."""
        content: dict[str, Any] = json.loads(self.get(f"/api/datasets/0/rows?first={first}&count={PAGE}{query}"))
        return content

    def page(self, query: str = "", first: int = 0) -> tuple[float, float, int]:
        """Seconds to a page's rows, to the last of its tiles, and how many samples pass."""
        start = time.perf_counter()
        found = self.rows(query, first)
        listed = time.perf_counter() - start
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(self.get, (f"/api/datasets/0/samples/{row['place']}/tile" for row in found["rows"])))
        return listed, time.perf_counter() - start, found["total"]

    def wait(self, path: str) -> float:
        """Ask until all is read; the seconds that it took."""
        start = time.perf_counter()
        while json.loads(self.get(path))["read"] < 1:
            time.sleep(0.2)
        return time.perf_counter() - start


@contextmanager
def server(folder: Path, cache: Path, log: Path) -> Iterator[tuple[Client, psutil.Process]]:
    """`pbe app` on a free port, ended with the block."""
    command = [sys.executable, "-m", "pbe_train.app", "--dataset", str(folder), "--cache", str(cache), "--port", "0"]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.search(r"http://([^/ ]+)/", line)
            if not found:
                raise InputError(f"the server did not start: {log.read_text()[-500:]}")
            yield Client(found[1]), psutil.Process(process.pid)
        finally:
            process.terminate()


class ServerMemory(MemorySampler):
    """The server and, at its largest, with the processes that read tables for it; without the one that paints edits."""

    def __init__(self, process: int) -> None:
        super().__init__(process)
        self.alone_mb = 0.0

    def memory_mb(self) -> float:
        """What is held now, in MB."""
        held = 0.0
        try:
            self.alone_mb = max(self.alone_mb, alone := self.process.memory_full_info().pss / 1e6)
            held = alone
            for child in self.process.children():
                if any("dataset_scan" in word for word in child.cmdline()):
                    held += child.memory_full_info().pss / 1e6
        except psutil.Error:
            pass
        return held


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Start a server and ask it."""
    words = vocabulary()
    common, middling, rare = (f"&label={words.ids[place]}".replace("/", "%2F") for place in (0, 100, 599))
    cache = folder.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    result: dict[str, Any] = {}
    with server(folder, cache, folder.parent / "server.log") as (client, process):

        def page(query: str = "", first: int = 0) -> dict[str, float]:
            """A page's seconds by the clock, and those of CPU time that the server took for its rows and tiles together."""
            before = sum(process.cpu_times()[:2])
            listed, tiles, total = client.page(query, first)
            cpu = sum(process.cpu_times()[:2]) - before
            return {"samples": total, "rows_s": round(listed, 3), "with_tiles_s": round(tiles, 3), "cpu_s": round(cpu, 2)}

        memory = ServerMemory(process.pid)
        memory.start()
        start, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        client.get("/api/datasets/0")
        told, cpu = time.perf_counter() - start, sum(process.cpu_times()[:2]) - cpu
        first = page()
        opened = {"rows_s": told, "with_tiles_s": told, "cpu_s": cpu}
        result["first_page"] = first | {name: round(first[name] + more, 3) for name, more in opened.items()}
        result["classes_read_s"] = round(client.wait("/api/datasets/0/classes"), 2)
        for name, query in (("common", common), ("middling", middling), ("rare", rare)):
            result[f"class_{name}"] = page(query)
            result[f"middle_of_class_{name}"] = page(query, int(result[f"class_{name}"]["samples"]) // 2)
        result["middle"] = page("", rows // 2)
        result["sizes_read_s"] = round(client.wait(f"/api/datasets/0/rows?count={PAGE}&smallest=0.3"), 2)
        result["size_and_class"] = page(f"{common}&smallest=0.31")
        start = time.perf_counter()
        client.get("/api/datasets/0/classes?smallest=0.32")
        result["histogram_of_a_size_s"] = round(time.perf_counter() - start, 3)
        key = client.rows("", rows - PAGE)["rows"][-1]["key"]
        result["text_searched_s"] = round(client.wait(f"/api/datasets/0/rows?count={PAGE}&text={key[:16]}"), 2)
        memory.finish()
        result["memory_mb"] = {"server": round(memory.alone_mb), "with_reading_processes": round(memory.peak_mb)}
    with server(folder, cache, folder.parent / "server.log") as (client, _):  # What was read once is in the cache.
        result["class_middling_after_restart"] = {"rows_s": round(client.page(middling)[0], 3)}
    return result


def load_with_pandas(folder: Path) -> dict[str, Any]:
    """The baseline, in this process: the columns that a page shows in a table of pandas, and a filter by class."""
    pandas = importlib.import_module("pandas")
    start = time.perf_counter()
    table = pandas.read_parquet(folder / "index.parquet", columns=BASELINE_COLUMNS)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    found = table[table["label"] == vocabulary().ids[100]].head(PAGE)
    return {"loaded_s": round(loaded, 2), "filtered_s": round(time.perf_counter() - start, 3), "rows": len(found)}


def table_of(result: dict[str, Any]) -> Table:
    """The table to print."""
    table = Table("what", "viewer", "pandas")
    ours, theirs = result["viewer"], result["pandas"]

    def add(what: str, one: dict[str, float]) -> None:
        table.add_row(f"{what}: rows; with tiles; CPU, s", f"{one['rows_s']}; {one['with_tiles_s']}; {one['cpu_s']}", "")

    add("first page", ours["first_page"])
    table.add_row("table loaded / classes read, once, s", f"{ours['classes_read_s']}", f"{theirs['loaded_s']}")
    for name in ("common", "middling", "rare"):
        one = ours[f"class_{name}"]
        add(f"filter by a class of {one['samples']:,}", one)
    table.add_row("the same with pandas, s", "", f"{theirs['filtered_s']}")
    add("the middle of all", ours["middle"])
    memory = ours["memory_mb"]
    table.add_row(
        "memory, MB: server; with its readers", f"{memory['server']}; {memory['with_reading_processes']}", f"{theirs['mb']}"
    )
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the dataset, which is made where it is not there")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="samples (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "dataset_viewer.json", help="file to write (default: %(default)s)"
    )
    # How this program starts itself for the baseline.
    parser.add_argument("--pandas", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.pandas:
        told = load_with_pandas(given.folder)
        given.pandas.write_text(json.dumps({**told, "high_water_mb": high_water_mb()}))
        return
    machine = describe_machine()
    dataset = given.folder / f"rows-{given.rows}"
    if not dataset.is_dir():
        unfinished = given.folder / f"rows-{given.rows}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        make_dataset(unfinished, given.rows)
        unfinished.rename(dataset)
    viewer = measure(dataset, given.rows)
    report = given.folder / f"pandas-{given.rows}.json"
    if not report.is_file():  # It takes minutes, and knows nothing of the viewer.
        command = [sys.executable, "-m", "benchmarks.dataset_viewer", "--folder", str(dataset), "--pandas", str(report)]
        sampler = run_watched(command, given.folder / "pandas.log", "pandas")
        report.write_text(json.dumps({**json.loads(report.read_text()), "mb": round(sampler.peak_mb)}))
    result = {
        "date": today(),
        "machine": machine,
        # Beside other programs' work, `chrt -r 1 python -m ...` measures what an idle machine would show.
        "real_time_priority": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "versions": describe_versions(["aiohttp", "numpy", "pandas", "pyarrow"]),
        "rows": given.rows,
        "page": PAGE,
        "viewer": viewer,
        "pandas": json.loads(report.read_text()),
    }
    Console(width=110).print(table_of(result))
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{given.results}; {number_of(given.rows, 'row')}; {given.folder} may be removed")


if __name__ == "__main__":
    run_program(main)
