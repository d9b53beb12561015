"""Where today's design ends: each table, loop and limit with the number of photos, or of nodes, at which it does.

    Constants, World ──▶ breaks, those that come first at the beginning

A limit of a format was tried (`python -m benchmarks.scale.measure --parts limits`); memory and seconds are measured for one
photo or shard and multiplied. Which it is says `kind`: `error` stops the run, `memory` ends with the driver's or an
actor's memory, `pace` only makes it slower, or nodes useless.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.scale.constants import Constants, World
from benchmarks.scale.pack_model import ASKED_BY_DRIVER
from pipelines.selection.partition import _BITS, ROWS_AT_ONCE

FOOTER_BYTES = 2**31 - 1
"""Of a Parquet file's footer: Arrow reads its length as 32 bits with a sign."""
THRIFT_STRING, THRIFT_ITEMS = 100_000_000, 1_000_000
"""Bytes of one entry of a footer's metadata, and row groups, that Arrow reads by default."""
_SHARD_ENTRY = len('"train-1000000": 1000, ')
_UNIT_DIGITS = 6


@dataclass(frozen=True)
class Break:
    """One end of today's design."""

    name: str
    photos: float | None
    """At which it comes; null where it is the number of nodes that counts."""
    nodes: float | None
    kind: str
    where: str
    """File and function."""
    why: str
    instead: str
    """What exists and would replace it."""


def find_breaks(constants: Constants, world: World) -> list[Break]:
    """All of them, by photos; those of nodes last."""
    found = [*_of_crawl(constants, world), *_of_tables(constants, world), *_of_pack(constants, world)]
    return sorted(found, key=lambda one: (one.photos is None, one.photos or one.nodes or 0.0))


def _of_crawl(c: Constants, world: World) -> list[Break]:
    per_unit = c.part_photos * (c.crawl_cpu_s + (1 - world.gone) * c.decode_cpu_s)
    small = c.part_photos * c.crawl_cpu_s
    ok = 1 - world.gone
    return [
        Break(
            "a unit's row group is read through the whole footer",
            c.part_photos * per_unit / c.parse_s["wanted"],
            None,
            "pace",
            "crawling/rounds.py Round.read_unit",
            f"each unit parses the footer of all units, {1e6 * c.parse_s['wanted']:.0f} us a unit: from here on that takes as "
            f"long as its photos do (of small photos: {c.part_photos * small / c.parse_s['wanted'] / 1e6:.1f} M)",
            "one file for some thousand units, as Iceberg's and Lance's manifests list files; or hash partitions",
        ),
        Break(
            "the list of wanted photos",
            world.driver_bytes / c.wanted_bytes,
            None,
            "memory",
            "crawling/wanted.py list_wanted, photos.py known_about",
            f"{c.wanted_bytes:,.0f} bytes a photo in the driver: all photos in memory, twice while they are put in order",
            "a join in partitions by the photo's hash, as `selection/partition.py` has; DuckDB, Polars streaming, Spark",
        ),
        Break(
            "first bytes of all photos' hashes, to find placeholders",
            world.driver_bytes / c.hash_bytes / ok,
            None,
            "memory",
            "crawling/tables.py come_often",
            f"{c.hash_bytes:,.0f} bytes a stored photo in the driver, at the beginning of each round and at its end",
            "count in partitions by the hash's first bits; approximate counts (DataSketches, Spark's approx functions)",
        ),
        Break(
            "footer of a round",
            c.part_photos * FOOTER_BYTES / c.footer_bytes["wanted"],
            None,
            "error",
            "crawling/rounds.py freeze_round",
            f"a row group for each unit, {c.footer_bytes['wanted']:,.0f} bytes of footer each: over 2 GiB",
            "as the row of that table above: one file for some thousand units",
        ),
        Break(
            "row groups of a round, and six digits of a unit",
            c.part_photos * 10.0**_UNIT_DIGITS,
            None,
            "error",
            "crawling/rounds.py freeze_round; sweep (_PART_NAME_LENGTH)",
            "Arrow reads at most a million; a damaged part with a longer number is removed, and not kept in damaged/",
            "likewise; compare the name up to its second dash (one line)",
        ),
        Break(
            "crawling processes",
            None,
            c.most_processes / world.cores,
            "pace",
            "crawling/workers.py MOST_WORKERS, hosts.py most_processes",
            f"{c.most_processes} by default, {c.host_slots} at most for web servers, on all nodes together: each has an equal "
            f"share of every host, and a host's {c.host_slots} requests at once cannot be shared by more",
            "each host one process's own (units by the hash of the host, as Nutch's and Common Crawl's fetch lists)",
        ),
    ]


def _of_tables(c: Constants, world: World) -> list[Break]:
    per_shard = c.shard_samples / c.samples_per_photo
    return [
        Break(
            "footer of the index",
            per_shard * FOOTER_BYTES / c.footer_bytes["index"],
            None,
            "error",
            "dataset/finalize.py finalize",
            f"a row group for each shard, {c.footer_bytes['index']:,.0f} bytes of footer each: over 2 GiB",
            "several shards a row group, as the plan has; Iceberg or Lance for many files that are one table",
        ),
        Break(
            "row groups of the index",
            per_shard * THRIFT_ITEMS,
            None,
            "error",
            "dataset/finalize.py finalize",
            "Arrow reads at most a million row groups; training and the viewer read this file, too",
            "the same",
        ),
        Break(
            "buckets of the selection",
            (1 << _BITS) * ROWS_AT_ONCE / c.boxes_per_photo * world.driver_bytes / c.select_bytes,
            None,
            "memory",
            "selection/partition.py SpillFiles, Partitions.parts",
            f"{1 << _BITS} buckets a split: {c.select_bytes / 1e6:.0f} MB up to {ROWS_AT_ONCE:,} rows each, then in proportion",
            "more bits (one number), or DuckDB, Spark: the same join, spilled",
        ),
        Break(
            "list of shards in the plan's footer",
            per_shard * THRIFT_STRING / _SHARD_ENTRY,
            None,
            "error",
            "dataset/plan_shards.py writing_plan, Plan",
            f"one JSON of about {_SHARD_ENTRY} bytes a shard; Arrow reads 100 MB of text in a footer",
            "a table of shards beside the plan",
        ),
        Break(
            "commit records in the driver",
            per_shard * world.driver_bytes / c.record_bytes,
            None,
            "memory",
            "build.py pack_missing, dataset/finalize.py",
            f"{c.record_bytes:,.0f} bytes a shard as Python dictionaries",
            "a table of records, appended to (Iceberg, Delta); stream them",
        ),
    ]


def _of_pack(c: Constants, world: World) -> list[Break]:
    per_shard = c.shard_samples / c.samples_per_photo
    gpu_photos = c.pictures_per_second / c.pictures / c.samples_per_photo
    finalize_s = world.store_latency_s / per_shard
    return [
        Break(
            "tables of the store in each packing actor",
            world.driver_bytes / c.photo_store_bytes / (1 - world.gone) / world.gpus,
            None,
            "memory",
            "pbe_core/photo_files.py PhotoStore",
            f"{c.photo_store_bytes:.0f} bytes a photo for each of {world.gpus} actors in {world.driver_bytes / 1e9:.0f} GB",
            "places of a shard's photos in its rows of the plan; or a memory-mapped Arrow file that a node's actors share",
        ),
        Break(
            "photos read one by one from one prefix",
            None,
            world.gets_per_second / gpu_photos / world.gpus,
            "pace",
            "pbe_core/photo_files.py _read_remote",
            f"{world.gets_per_second:,.0f} GET/s for one prefix; {gpu_photos:.1f} photos/s a GPU",
            "parts below prefixes of their own hash (parts/3f/...), or whole tars read in the order of the plan",
        ),
        Break(
            "the driver asks for each shard that is done",
            None,
            per_shard / (ASKED_BY_DRIVER * world.store_latency_s * gpu_photos) / world.gpus,
            "pace",
            "build.py pack_missing, folder.py state_after",
            f"with `upload`, {ASKED_BY_DRIVER} requests of {world.store_latency_s:g} s one after the other; meanwhile nothing is "
            f"handed out: {1 / (ASKED_BY_DRIVER * world.store_latency_s):.1f} shards/s on any number of nodes",
            "what the worker answers; several requests at once; a list of what is there, once a minute",
        ),
        Break(
            "parts of the index read one after the other",
            None,
            1 / (finalize_s * gpu_photos) / world.gpus,
            "pace",
            "dataset/finalize.py finalize, folder.py index_part",
            f"{world.store_latency_s:g} s a shard in one place: from here on it takes as long as packing",
            "several requests at once (a few lines); a table format that commits files without reading them (Iceberg, Lance)",
        ),
        Break(
            "one driver hands out shards",
            None,
            _nodes_of_driver(c, gpu_photos / per_shard, world.gpus),
            "pace",
            "ray_pool.py",
            f"{1e3 * c.hand_out_s:.2f} ms + {1e6 * c.hand_out_per_actor_s:.1f} us an actor for each unit",
            "Ray Data's streaming executor, Spark's scheduler; or longer units",
        ),
    ]


def _nodes_of_driver(c: Constants, shards_per_second: float, gpus: int) -> float:
    """Nodes at which the driver is busy all the time: n g r (a + b n g) = 1."""
    a, b = c.hand_out_s, c.hand_out_per_actor_s
    actors = 1 / (shards_per_second * a) if not b else (-a + (a * a + 4 * b / shards_per_second) ** 0.5) / (2 * b)
    return actors / gpus


def table_sizes(constants: Constants, photos: float) -> Mapping[str, float]:
    """Bytes of each table on disk, for so many photos (a fifth of which are gone)."""
    samples = photos * constants.samples_per_photo
    rows = {"objects": samples, "plan": samples, "index": samples, "photo status": photos, "photo index": photos}
    rows["rejects"] = photos * (constants.boxes_per_photo - constants.samples_per_photo)
    return {name: rows[name] * constants.row_bytes[name] for name in sorted(rows)}
