"""What the model counts with: read from the committed benchmarks and the settings' defaults; from outside what has a source.

    results/crawl.json, packing.json, selection.json, scale.json  ──┐
    pipelines/dataset/rates/encoder_rates.json                     ─┼─▶ Constants
    defaults of `BuildSettings`                                    ─┘
    what nobody can measure here (the web, a cloud, broken machines) ──▶ World, each with its source

Seconds are of one core of the machine that the benchmarks ran on, unless they say otherwise.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import RESULTS
from pbe_core.settings import preset
from pipelines.config import BuildSettings
from pipelines.dataset.estimate import RATES

DEVICE, PRECISION = "NVIDIA H100 80GB HBM3", "bf16"
"""The encoder whose rate is taken."""
_VAE, _SIDE = "stable-diffusion-v1", 512


@dataclass(frozen=True)
class World:
    """What is outside: the web, an object store and machines. Each figure with its source; what has none is an assumption."""

    top_100_hosts: float = 0.47
    """Share of the photos on the 100 largest hosts. Of 12 M photos of LAION: A. Baio, Exploring 12
    Million of the 2.3 Billion Images Used to Train Stable Diffusion's Image Generator, waxy.org, August 2022."""
    largest_host: float = 0.085
    """The same data; not counted with, but compared (`check.py`)."""
    gone: float = 0.2
    """Share of the photos whose URL gives none any more. "Over 20 %" of 270 M URLs of 24 data sets: Link-Rot in Web-Sourced
    Multimedia Datasets, MMM 2023."""
    passing: float = 0.02
    """Share of the requests that fail in a way that may pass. Assumption."""
    dead_hosts: float = 0.01
    """Share of the hosts that do not answer during the whole run. Assumption."""
    latency_s: float = 0.5
    """Median over hosts of the time of one request. Assumption; `img2dataset` reports 1,350 photos/s of 16 processes."""
    latency_spread: float = 1.0
    """Standard deviation of its logarithm: one host in six is 2.7 times slower, one in forty 7 times. Assumption."""
    node_failures_per_day: float = 6.5e-3
    """Of one node. 6.50 per 1,000 node-days: Kokolis et al., Revisiting Reliability in Large-Scale Machine Learning Research
    Clusters, HPCA 2025, cluster RSC-1 (2.34 in RSC-2)."""
    repair_s: float = 900.0
    """From a node's loss to its successor's first unit: 15 s until Ray notices (docs/clusters.md), then a new machine.
    Assumption."""
    slow_nodes: float = 0.02
    slow_factor: float = 0.5
    """Share of the nodes that are slow, and their speed. Assumption."""
    puts_per_second: float = 3_500.0
    gets_per_second: float = 5_500.0
    """Of one prefix of a bucket: Amazon S3 User Guide, Best practices design patterns: optimizing Amazon S3 performance."""
    store_latency_s: float = 0.1
    """Until a small object's first byte: 100-200 ms, the same guide."""
    photo_bytes: float = 300e3
    """Of one photo of 1,024 px; Open Images' own copies, as `pbe plan` counts them."""
    driver_bytes: float = 64e9
    """Memory of the machine whose program hands out the work. Assumption."""
    cores: int = 16
    """Of a node. Assumption."""
    gpus: int = 8
    """Of a node that packs. Assumption."""


@dataclass(frozen=True)
class Constants:
    """What was measured, and the defaults that it was measured under. Bytes, seconds."""

    crawl_cpu_s: float
    """A crawling process, for a small photo: request, checks, hash, tar, record."""
    decode_cpu_s: float
    """Decoding a photo of 1,024 x 768 px."""
    pack_s: float
    """A sample, all but the encoder, by the clock: of an actor that has as many cores as it wants for its threads."""
    pack_cpu_s: float
    """The same in CPU time of all its threads."""
    speed_spread: float
    """Standard deviation of the logarithm of a worker's pace."""
    pictures_per_second: float
    """Of the encoder, on one GPU."""
    pictures: int
    """To encode for one sample."""
    samples_per_photo: float
    boxes_per_photo: float
    shard_samples: int
    part_photos: int
    most_processes: int
    """That crawl by default, on any number of nodes."""
    host_rate: float
    host_slots: int
    connections: int
    attempts: int
    hand_out_s: float
    """The driver's, for one unit."""
    hand_out_per_actor_s: float
    """The same, for each actor that there is."""
    footer_bytes: Mapping[str, float]
    """Table -> bytes of its footer for each row group."""
    parse_s: Mapping[str, float]
    """Table -> seconds to read that, for each row group."""
    wanted_bytes: float
    """Memory of the driver for each photo while it lists the wanted ones."""
    hash_bytes: float
    """Memory for each photo while placeholders are looked for."""
    photo_store_bytes: float
    """Memory of each packing actor for each photo of the store."""
    merge_s: float
    """For each photo of a store whose tables are made."""
    read_part_s: float
    record_bytes: float
    """Memory of a shard's commit record."""
    select_s: float
    """For each box, one program on the machine."""
    select_bytes: float
    """Memory of the selection beyond what is imported; the same for any number of rows that its buckets are made for."""
    plan_s: float
    """For each sample."""
    row_bytes: Mapping[str, float]
    """Table -> bytes of a row in Parquet."""
    sample_bytes: float
    """Of a sample in a shard."""


def read_constants(results: Path = RESULTS, rates: Path = RATES) -> Constants:
    """Read all of them.

    Args:
        results: folder of the committed results.
        rates: folder of the encoder's rates.
    """
    crawl, packing, selection, scale = (read(results / f"{name}.json") for name in ("crawl", "packing", "selection", "scale"))
    settings = paper_settings()
    ours, floor = way_of(crawl, "ours"), way_of(selection, "floor")
    whole, worker = way_of(selection, "ours"), way_of(packing, "1 worker")
    four, one = (way_of(packing, f"ours, {words} a photo") for words in ("4 objects", "1 object"))
    cpu_four, cpu_one = (way["cpu_seconds"] / way["samples"] for way in (four, one))
    tables = scale["tables"]["measured"]
    footers = scale["footers"]["measured"]
    stores = scale["store"]["measured"]
    pools = scale["pool"]["measured"]
    per_unit = [pool["driver_cpu_seconds"] / pool["units"] for pool in pools]
    hand_out_per_actor, hand_out = line([pool["actors"] for pool in pools], per_unit)
    names = sorted({footer["table"] for footer in footers})
    lines = {
        name: {
            key: line(
                [one["row_groups"] for one in footers if one["table"] == name],
                [one[key] for one in footers if one["table"] == name],
            )[0]
            for key in ("footer_bytes", "parse_cpu_seconds")
        }
        for name in names
    }
    views = settings.views.per_object
    last = tables[-1]
    return Constants(
        crawl_cpu_s=ours["cpu_by_process_seconds"]["ray::CrawlWorke"] / ours["photos"],
        # A photo's decoding is paid once for all of its objects: what one object a photo costs more than four is 3/4 of it.
        decode_cpu_s=(cpu_one - cpu_four) * 4 / 3,
        pack_s=worker["seconds"] / worker["samples"],
        pack_cpu_s=worker["cpu_seconds"] / worker["samples"],
        speed_spread=statistics.stdev(worker["turns"]) / statistics.fmean(worker["turns"]),
        pictures_per_second=encoder_rate(read(rates / "encoder_rates.json")["rows"], DEVICE, PRECISION),
        pictures=1 + settings.masks.per_view,
        samples_per_photo=floor["accepted"] / selection["photos"] * views,
        boxes_per_photo=selection["rows"] / selection["photos"],
        shard_samples=settings.shards.samples,
        part_photos=settings.crawl.photos_per_part,
        most_processes=most_crawling(settings),
        host_rate=settings.crawl.per_host.requests_per_second,
        host_slots=settings.crawl.per_host.concurrency,
        connections=settings.crawl.connections,
        attempts=settings.crawl.attempts,
        hand_out_s=hand_out,
        hand_out_per_actor_s=max(0.0, hand_out_per_actor),
        footer_bytes={name: lines[name]["footer_bytes"] for name in names},
        parse_s={name: lines[name]["parse_cpu_seconds"] for name in names},
        wanted_bytes=1e6 * line([one["photos"] for one in tables], [one["wanted_rise_mb"] for one in tables])[0],
        hash_bytes=1e6 * line(*columns(scale["hashes"]["measured"], "photos", "rise_mb"))[0],
        photo_store_bytes=line(*columns(stores, "photos", "photo_store_bytes"))[0],
        merge_s=line(*columns(stores, "photos", "merge_cpu_seconds"))[0],
        read_part_s=line(*columns(stores, "parts", "read_parts_cpu_seconds"))[0],
        record_bytes=scale["pack"]["measured"]["record_memory_bytes"],
        select_s=whole["seconds"] / whole["rows"],
        select_bytes=1e6 * last["select_rise_mb"],
        plan_s=last["plan_cpu_seconds"] / (last["objects"] * views),
        row_bytes={
            "objects": last["objects_bytes_per_row"],
            "rejects": last["rejects_bytes_per_row"],
            "plan": last["plan_bytes_per_row"],
            "index": scale["pack"]["measured"]["index_bytes_per_row"],
            "photo status": stores[-1]["status_bytes"] / stores[-1]["photos"],
            "photo index": stores[-1]["index_bytes"] / stores[-1]["photos"],
        },
        sample_bytes=scale["pack"]["measured"]["sample_bytes"],
    )


def paper_settings() -> BuildSettings:
    """The paper's settings; nothing is read but the preset."""
    given = yaml.safe_load(preset("open_images").read_text())["build"]
    source = {**given.get("source", {}), "annotations": "annotations", "photos": "photos"}
    return BuildSettings.model_validate({**given, "source": source, "out": "out"})


def most_crawling(settings: BuildSettings) -> int:
    """Processes that crawl web servers where the settings do not say how many."""
    from pipelines.crawling.hosts import most_processes
    from pipelines.crawling.workers import MOST_WORKERS

    return min(MOST_WORKERS, most_processes(settings.crawl.per_host))


def encoder_rate(rows: Sequence[Mapping[str, Any]], device: str, precision: str) -> float:
    """Pictures of 512 px a second: measured where it was, else computed."""
    fitting = [
        row for row in rows if (row["device"], row["precision"], row["vae"], row["size_px"]) == (device, precision, _VAE, _SIDE)
    ]
    return float(max(fitting, key=lambda row: row["kind"] == "measured")["pictures_per_second"])


def read(path: Path) -> dict[str, Any]:
    """A file of results."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def way_of(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The row of a way."""
    way: dict[str, Any] = next(way for way in results["ways"] if way["way"] == name)
    return way


def columns(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[float]]:
    """Some numbers of rows, column by column."""
    return [[row[name] for row in rows] for name in names]


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the straight line with the smallest squares."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept
