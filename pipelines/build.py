"""Build a dataset: boxes and photos -> shards. Photos are fetched first where `crawl.sources` says from where.

    python pipelines/build.py --config configs/tiny.yaml
    ray submit CLUSTER.yaml pipelines/build.py -- --config configs/open_images.yaml

Interrupted, or failed in part, it goes on where it stopped when the same command is run again.
"""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pipelines.config import BuildSettings, with_absolute_paths
from pipelines.crawl import crawl_photos
from pipelines.packing.pack import can_be_mended, read_record
from pipelines.packing.seal import seal
from pipelines.packing.workers import pack_on_ray
from pipelines.photo_folder import check_photos
from pipelines.planning.estimate import ESTIMATE_RECORD, Estimate, as_json, estimate
from pipelines.planning.freeze import freeze_plan, freeze_tables
from pipelines.planning.shards import planned_shards
from pipelines.planning.summary import print_comparison, print_estimate, print_selection
from pipelines.preview import contact_sheet, save_picture
from pipelines.report.page import write_report
from pipelines.selection.objects import Selection
from schemas.dataset import DatasetInfo
from schemas.errors import InputError, run_program
from schemas.files import write_atomically
from schemas.settings import load_settings, preset
from schemas.weights import identify_vae, load_vae


def main() -> int:
    """The story of a build."""
    started = time.monotonic()
    settings = with_absolute_paths(load_settings(BuildSettings, "build", default_config=preset("tiny")))
    if not settings.crawl.sources:
        check_photos(settings)
    selection, inputs = freeze_tables(settings)
    vae = identify_vae(load_vae(settings.latents.vae), settings.latents.vae)
    if settings.views.size % vae.downsampling:
        raise InputError(f"views.size {settings.views.size} is no multiple of the VAE's downsampling, {vae.downsampling}")
    identity = freeze_plan(settings, inputs, vae)
    print_selection(selection)
    said = estimate_plan(settings, selection)
    if settings.crawl.sources:
        status = crawl_photos(settings)
        if status:
            return status
    planned = planned_shards(settings.out / "plan.parquet")
    packed_before = any(read_record(settings.out / "shards", shard, identity) for shard in planned)
    packing_started = time.monotonic()
    records, errors = pack_missing(settings, identity, planned)
    # Of a build that went on, the time would be that of a part.
    packing_seconds = None if packed_before else time.monotonic() - packing_started
    if errors:
        for shard, message in errors.items():
            print(f"shard {shard} failed {settings.ray.attempts} times, last with:\n{message}", file=sys.stderr)
        print(
            f"error: {len(errors)} of {len(planned)} shards could not be packed; the others are kept, run again", file=sys.stderr
        )
        return 1

    info = seal(settings, identity, vae, [records[shard] for shard in planned])
    print_summary(info, settings.out, time.monotonic() - started)
    if said:
        print_comparison(said, info, packing_seconds)
    write_report(settings.out, settings, settings.out / "report.html")
    print(f"report: {settings.out / 'report.html'}")
    try:
        picture = contact_sheet(settings.out, settings.source.photos)
        save_picture(picture, settings.out / "contact_sheet.png")
    except InputError as error:  # The dataset is sealed and whole; only its picture cannot be drawn.
        print(f"warning: no contact sheet: {error}", file=sys.stderr)
    else:
        print(f"contact sheet: {settings.out / 'contact_sheet.png'}")
    return 0


def estimate_plan(settings: BuildSettings, selection: Selection) -> Estimate | None:
    """What the plan says that the build will make and cost; a table of rates that is missing must not stop a build."""
    try:
        said = estimate(settings, selection)
    except InputError as error:
        print(f"warning: no estimate: {error}", file=sys.stderr)
        return None
    write_atomically(settings.out / ESTIMATE_RECORD, as_json(said))
    print_estimate(said)
    return said


def pack_missing(
    settings: BuildSettings, identity: str, planned: dict[str, int]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Pack the shards that have no valid commit record, a bounded number of times each.

    Args:
        settings: of the build.
        identity: the plan's fingerprint, as a hash.
        planned: shard -> number of planned samples, in the order of the plan's row groups.

    Returns:
        Commit records by shard, and the last error by shard of those that failed.
    """
    folder = settings.out / "shards"
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # Of attempts that were killed.
        leftover.unlink()
    shards = list(planned)
    done = {shard: record for shard in shards if (record := read_record(folder, shard, identity))}
    records = {shard: record for shard, record in done.items() if not can_be_mended(record, settings)}
    errors: dict[str, str] = {}
    there = sum(planned[shard] for shard in records)
    with tqdm(total=sum(planned.values()), initial=there, unit=" samples", desc="packing", smoothing=0.1) as progress:
        for _ in range(settings.ray.attempts):
            missing = [group for group, shard in enumerate(shards) if shard not in records]
            if not missing:
                break
            # From here to the next sealing this is no dataset: its index would point into shards that are being replaced.
            (settings.out / "dataset.json").unlink(missing_ok=True)
            errors = {}
            for group, error in pack_on_ray(settings, identity, missing):
                shard = shards[group]
                record = read_record(folder, shard, identity)
                if record:
                    records[shard] = record
                    progress.update(planned[shard])
                else:
                    errors[shard] = error or "it was packed, but its commit record does not fit its tar"
    return records, errors


def print_summary(info: DatasetInfo, out: Path, seconds: float) -> None:
    """Tables in which the books balance, and where everything is."""
    books = info.books
    table = Table(title="Where every sample went", title_justify="left")
    table.add_column("stage")
    table.add_column("outcome")
    table.add_column("count", justify="right")
    table.add_row("samples", "planned", f"{books.planned:,}")
    table.add_row("", "packed", f"{books.samples:,}")
    for code, count in books.failures.items():
        table.add_row("", f"failed: {code}", f"{count:,}")
    table.add_row("", "of these views padded by reflection", f"{books.padded_views:,}")
    table.add_section()
    masks = sum(books.masks.values())
    for kind, count in books.masks.items():
        table.add_row("masks", kind, f"{count:,} ({count / masks:.0%})")
    table.add_section()
    for split, counts in info.splits.items():
        size = f"{counts.bytes / 1e6:,.1f} MB"
        table.add_row(split, f"{len(counts.shards)} shards, {size}", f"{counts.samples:,}")
    console = Console()
    console.print(table)
    console.print(f"dataset, made in {seconds:.0f} s: {out}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run_program(main)
