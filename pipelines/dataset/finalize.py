"""Finalizing: all commit records -> index.parquet, shard_records.parquet, failures.parquet, sizes.json and, last, dataset.json.

Runs in one place, once every planned shard is packed. Refuses counts that do not balance.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pbe_core.dataset_reader import find_imbalance
from pbe_core.errors import InputError
from pbe_core.files import atomic_file, write_atomically
from pbe_core.words import number_of
from pipelines.config import BuildSettings
from pipelines.dataset.card import write_card
from pipelines.dataset.folder import Record, ShardFolder, share
from pipelines.dataset.write_plan import read_selection
from schemas.dataset import Books, DatasetInfo, SplitCounts, VaeIdentity
from schemas.tables import FAILURES, INDEX, REFERENCE_PLACES, REJECT_REASONS, SHARD_RECORDS

TABLES = ("index.parquet", "README.md", "shard_records.parquet", "failures.parquet", "shards/sizes.json", "estimate.json")
_FAILURES_AT_ONCE = 50_000


def finalize(
    settings: BuildSettings,
    shards: ShardFolder,
    fingerprint: str,
    vae: VaeIdentity,
    records: list[Record],
    planned: Mapping[str, int],
) -> DatasetInfo:
    """Put the parts together.

    Args:
        settings: of the build.
        shards: where the shards are.
        fingerprint: of the plan.
        vae: which VAE made the latents.
        records: commit record of every planned shard, in the plan's order.
        planned: shard -> planned samples.

    Raises:
        InputError: nothing could be packed, or a shard's part of the index is damaged.
        RuntimeError: the counts do not balance, which is a defect of the program.
    """
    out = settings.out
    info = DatasetInfo(
        fingerprint=fingerprint,
        view_size=settings.views.nominal_size,
        buckets=settings.views.buckets,
        masks_per_view=settings.masks.per_view,
        vae=vae,
        splits=count_splits(records),
        books=count_all(out, counted(records, planned)),
        settings=settings.told(),
    )
    imbalance = find_imbalance(info.books)
    if imbalance:
        raise RuntimeError(f"{out}: the counts do not balance: {imbalance}")
    if not info.books.samples:
        codes = ", ".join(f"{code} {count}" for code, count in info.books.failures.items())
        raise InputError(
            f"{settings.source.photos}: none of the {number_of(info.books.planned, 'planned sample')} could be made ({codes}); "
            f"are these the photos of {settings.source.annotations}?"
        )
    schema = index_schema(records)
    with atomic_file(out / "index.parquet") as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for record in records:
            writer.write_table(in_columns_of(schema, shards.index_part(record)))
    write_card(out, info)
    _write_table(out / "shard_records.parquet", records, SHARD_RECORDS)
    _write_failures(out / "failures.parquet", shards, counted(records, planned))
    sizes = {f"{record['shard']}.tar": record["samples"] for record in records}
    write_atomically(out / "shards" / "sizes.json", json.dumps(sizes, indent=1).encode())
    write_atomically(out / "dataset.json", info.model_dump_json(indent=1).encode())
    if shards.remote:
        share(shards.remote, out, [*TABLES, "dataset.json"])
    return info


def index_schema(records: Iterable[Record]) -> pa.Schema:
    """The columns of a dataset's index: where a shard tells of references from other photos, with their places."""
    paired = any("references" in record for record in records)
    return pa.schema([*INDEX, REFERENCE_PLACES], metadata=INDEX.metadata) if paired else INDEX


def in_columns_of(schema: pa.Schema, part: pa.Table) -> pa.Table:
    """A shard's part of the index with these columns; null in those that it lacks."""
    for field in schema:
        if field.name not in part.column_names:
            part = part.append_column(field, pa.nulls(len(part), field.type))
    return part.select(schema.names).cast(schema)


def counted(records: Iterable[Record], planned: Mapping[str, int]) -> list[Record]:
    """Commit records as they are counted: what failed in a shard before the dataset was extended counts where it is planned now.

    Args:
        records: of shards of the plan.
        planned: shard -> planned samples.
    """
    nothing = {"failed": 0, "failures": {}}
    return [
        record if planned[record["shard"]] == record["planned"] else {**record, **nothing, "planned": record["samples"]}
        for record in records
    ]


def count_all(out: Path, records: list[Record]) -> Books:
    """What became of every box and every planned sample, counted from the tables and the `counted` records."""
    rejects: Counter[str] = Counter()
    for batch in pq.ParquetFile(out / "rejects.parquet").iter_batches(columns=["reason"]):
        counts = pc.value_counts(batch.column("reason").cast(pa.string()))
        rejects.update({item["values"]: item["counts"] for item in counts.to_pylist()})
    return Books(
        boxes=read_selection(out).boxes,
        objects=pq.ParquetFile(out / "objects.parquet").metadata.num_rows,
        rejects={reason: rejects[reason] for reason in REJECT_REASONS if reason in rejects},
        planned=pq.ParquetFile(out / "plan.parquet").metadata.num_rows,
        samples=sum(record["samples"] for record in records),
        failures=_sum_counts(records, "failures"),
        masks=_sum_counts(records, "masks"),
        padded_views=sum(record["padded_views"] for record in records),
        references=sum(record.get("references", 0) for record in records),
        lost_references=_sum_counts([record for record in records if "lost_references" in record], "lost_references"),
    )


def count_splits(records: list[Record]) -> dict[str, SplitCounts]:
    """Shards, samples and bytes of each split."""
    splits = sorted({record["split"] for record in records})
    by_split = {split: [record for record in records if record["split"] == split] for split in splits}
    return {
        split: SplitCounts(
            shards=[record["shard"] for record in own],
            samples=sum(record["samples"] for record in own),
            bytes=sum(record["bytes"] for record in own),
        )
        for split, own in by_split.items()
    }


def _sum_counts(records: list[Record], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record[name])
    return dict(sorted(total.items()))


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    chosen = [{name: row[name] for name in schema.names} for row in rows]
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(chosen, schema=schema), temporary)


def _write_failures(path: Path, shards: ShardFolder, records: Iterable[Record]) -> None:
    """In parts: where half of the photos are still to come, these are millions."""
    rows: list[dict[str, Any]] = []
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, FAILURES) as writer:
        for shard in (record["shard"] for record in records if record["failed"]):
            rows += ({"shard": shard, **failure} for failure in shards.failed_samples(shard))
            if len(rows) >= _FAILURES_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, schema=FAILURES))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=FAILURES))
