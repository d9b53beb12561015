"""Sealing: all commit records -> index.parquet, shard_records.parquet, failures.parquet, sizes.json and, last, dataset.json.

Runs in one place, once every planned shard is done. Refuses to seal books that do not balance.
"""

import json
from collections import Counter
from collections.abc import Mapping
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
from pipelines.dataset.records import Damaged, Record, ShardFolder
from pipelines.dataset.upload import share
from pipelines.dataset.write_plan import read_selection
from schemas.dataset import Books, DatasetInfo, SplitCounts, VaeIdentity
from schemas.tables import FAILURES, INDEX, REJECT_REASONS, SHARD_RECORDS

SEALED = ("index.parquet", "README.md", "shard_records.parquet", "failures.parquet", "shards/sizes.json", "estimate.json")
_FAILURES_AT_ONCE = 50_000


def seal(
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
        RuntimeError: the books do not balance, which is a defect of the program.
    """
    out = settings.out
    # What failed in a shard before the dataset was extended was planned again, and counts where it was.
    counted = [record if planned[record["shard"]] == record["planned"] else _without_failures(record) for record in records]
    info = DatasetInfo(
        fingerprint=fingerprint,
        view_size=settings.views.size,
        masks_per_view=settings.masks.per_view,
        vae=vae,
        splits=_count_splits(records),
        books=_keep_books(out, counted),
        settings=settings.told(),
    )
    imbalance = find_imbalance(info.books)
    if imbalance:
        raise RuntimeError(f"{out}: the books do not balance: {imbalance}")
    if not info.books.samples:
        codes = ", ".join(f"{code} {count}" for code, count in info.books.failures.items())
        raise InputError(
            f"{settings.source.photos}: none of the {number_of(info.books.planned, 'planned sample')} could be made ({codes}); "
            f"are these the photos of {settings.source.annotations}?"
        )
    with atomic_file(out / "index.parquet") as temporary, pq.ParquetWriter(temporary, INDEX) as writer:
        for record in records:
            try:
                writer.write_table(shards.index_part(record))
            except Damaged as error:
                shards.forget(record["shard"])
                raise InputError(f"{out}: {error}; run the build again, which makes this shard anew") from None
    write_card(out, info)
    _write_table(out / "shard_records.parquet", records, SHARD_RECORDS)
    _write_failures(out / "failures.parquet", shards, [record["shard"] for record in counted if record["failed"]])
    sizes = {f"{record['shard']}.tar": record["samples"] for record in records}
    write_atomically(out / "shards" / "sizes.json", json.dumps(sizes, indent=1).encode())
    write_atomically(out / "dataset.json", info.model_dump_json(indent=1).encode())
    if shards.remote:
        share(shards.remote, out, [*SEALED, "dataset.json"])
    return info


def _without_failures(record: Record) -> Record:
    return {**record, "planned": record["samples"], "failed": 0, "failures": {}}


def _keep_books(out: Path, records: list[dict[str, Any]]) -> Books:
    # Counted from the tables themselves; only what was read is a record.
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
    )


def _count_splits(records: list[dict[str, Any]]) -> dict[str, SplitCounts]:
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


def _sum_counts(records: list[dict[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record[name])
    return dict(sorted(total.items()))


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    chosen = [{name: row[name] for name in schema.names} for row in rows]
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(chosen, schema=schema), temporary)


def _write_failures(path: Path, shards: ShardFolder, names: list[str]) -> None:
    """In parts: where half of the photos are still to come, these are millions."""
    rows: list[dict[str, Any]] = []
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, FAILURES) as writer:
        for shard in names:
            rows += ({"shard": shard, **failure} for failure in shards.failed_samples(shard))
            if len(rows) >= _FAILURES_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, schema=FAILURES))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=FAILURES))
