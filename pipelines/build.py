"""Build a dataset: boxes and photos -> shards. Photos are fetched first where `crawl.sources` says from where.

    python pipelines/build.py --config configs/tiny.yaml
    ray submit CLUSTER.yaml pipelines/build.py -- --config configs/open_images.yaml

Interrupted, or failed in part, it goes on where it stopped when the same command is run again. With

    --extend             other annotations or rules, in the folder of a finished dataset: what is new goes into further shards
    --verify-existing    first read all shards that are there from end to end, and make those again that are not what was written

Docs: docs/building.md.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder, sweep, write_atomically
from pbe_core.images.sheets import save_picture
from pbe_core.progress import Progress
from pbe_core.settings import help_first, load_settings, preset
from pbe_core.words import number_of
from pipelines.config import BuildSettings, with_absolute_paths
from pipelines.dataset.estimate import (
    ESTIMATE_RECORD,
    Estimate,
    as_json,
    check_shapes,
    estimate,
    print_comparison,
    print_estimate,
    print_selection,
)
from pipelines.dataset.finalize import finalize
from pipelines.dataset.folder import Record, ShardFolder, fetch_tables, share_tables
from pipelines.dataset.plan_shards import Plan
from pipelines.dataset.write_plan import accepted_fingerprints, record_plan, recorded_vae, select_and_plan
from pipelines.inspection.contact_sheet import contact_sheet
from pipelines.photos import check_photos
from pipelines.selection.objects import Selection
from schemas.dataset import DatasetInfo, VaeIdentity

REPORT, SHEET = "report.html", "contact_sheet.png"
KEPT = (
    "{shard}: photos came that it lacked, but photos of samples or references in it cannot be used any more; it is kept as it "
    "is, so that these are not lost: put their photos back to have all of them"
)


def main() -> int:
    """Read the command line, and build while nobody else builds in the same folder."""
    help_first(BuildSettings, "build", __doc__, preset("tiny"))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--extend", action="store_true")
    parser.add_argument("--verify-existing", action="store_true")
    flags, rest = parser.parse_known_args()
    settings = with_absolute_paths(load_settings(BuildSettings, "build", rest, preset("tiny")))
    with lock_folder(settings.out, "another build is at work in this folder; wait for it, or stop it"):
        return build(settings, flags.extend, flags.verify_existing)


def build(settings: BuildSettings, extend: bool = False, verify: bool = False) -> int:
    """The story of a build, with the two options of the command line; returns the exit status."""
    started = time.monotonic()
    if extend or settings.crawl.sources or not (settings.out / "dataset.json").is_file():
        check_address(settings)  # Before any work.
    sweep(settings.out)
    if not settings.crawl.sources:
        check_photos(settings)
    folder = ShardFolder(settings)
    if folder.remote:
        with Progress(f"fetching the tables from {folder.remote.url}"):
            fetch_tables(folder.remote, settings.out)
    selection, inputs = select_and_plan(settings, extend)
    vae = read_vae(settings)
    identity = record_plan(settings, inputs, vae, extend)
    if folder.remote:
        with Progress(f"uploading the tables to {folder.remote.url}"):
            share_tables(folder.remote, settings.out)
    print_selection(selection)
    estimated = estimate_plan(settings, selection)
    if settings.crawl.sources:
        from pipelines.crawl import crawl_photos  # It loads Ray and aiohttp.

        status = crawl_photos(settings)
        if status:
            return status
    planned = Plan(settings.out / "plan.parquet").shards
    if verify:
        verify_existing(settings, folder, planned)
    records, errors, packing_seconds = pack_missing(settings, folder, identity, planned)
    if errors:
        print_errors(errors, settings.ray.attempts)
        of_all = f"{len(errors):,} of {number_of(len(planned), 'shard')}"
        print(f"error: {of_all} could not be packed; the others are kept, run again", file=sys.stderr)
        return 1

    # Whatever was packed anew took the file away.
    unchanged = (settings.out / "dataset.json").is_file()
    with Progress("finalizing"):
        info = finalize(settings, folder, identity, vae, [records[shard] for shard in planned], planned)
    print_summary(info, settings, time.monotonic() - started)
    if estimated:
        print_comparison(estimated, info, packing_seconds)
    draw_pictures(settings, folder, unchanged)
    return 0


def check_address(settings: BuildSettings) -> None:
    """Raises InputError where the settings name what is no address of a cluster. Of a finished dataset only if it needs Ray."""
    from pipelines.on_ray import find_cluster  # Ray takes 0.4 s of CPU to load.

    find_cluster(settings.ray.address)


def read_vae(settings: BuildSettings) -> VaeIdentity:
    """Which VAE the settings name. Raises InputError where it is not there, or cannot encode views of this size."""
    with Progress("looking for the VAE"):
        vae = recorded_vae(settings)
    if vae is None:
        from pbe_core.vae import identify_vae, load_vae  # PyTorch and diffusers take 4 s of CPU to load.

        with Progress("loading the VAE"):
            vae = identify_vae(load_vae(settings.latents.vae), settings.latents.vae)
    check_shapes(settings.views, vae.downsampling)
    return vae


def verify_existing(settings: BuildSettings, folder: ShardFolder, planned: dict[str, int]) -> None:
    """Read shards from end to end; those that are not what was written are to be made again."""
    records = folder.read_records(planned, accepted_fingerprints(settings.out))
    damaged = folder.rehash(records.values())
    if damaged:
        check_address(settings)
        mark_unfinished(settings, folder)
    for shard, wrong in damaged.items():
        print(f"{shard}: {wrong}; it will be made again", file=sys.stderr)
        folder.forget(shard)


def mark_unfinished(settings: BuildSettings, folder: ShardFolder) -> None:
    """Until it is finalized again this is no dataset: its index would point into shards that are being replaced."""
    (settings.out / "dataset.json").unlink(missing_ok=True)
    if folder.remote:
        folder.remote.remove("dataset.json")


def pack_missing(
    settings: BuildSettings, folder: ShardFolder, identity: str, planned: dict[str, int]
) -> tuple[dict[str, Record], dict[str, str], float | None]:
    """Pack the shards that are missing or stale, a bounded number of times each.

    Args:
        settings: of the build.
        folder: where the shards are.
        identity: the plan's fingerprint, as a hash.
        planned: shard -> number of planned samples, in the order of the plan.

    Returns:
        Commit records by shard, the last error by shard of those that failed, and the seconds that packing took, from when the
        first actor stood: how long Ray takes to start says nothing about an encoder. Null where other runs packed a part.

    Raises:
        InputError: something is missing, and what is given is no address of a cluster; nothing was changed.
    """
    folder.local.mkdir(exist_ok=True)
    folder.sweep()
    shards, accepted = list(planned), accepted_fingerprints(settings.out)
    with Progress("looking for what is packed"):
        states = folder.states(planned, accepted)
        unplanned = folder.unplanned(planned, accepted)
    packed_before = any(state.record for state in states.values())
    missing = [number for number, shard in enumerate(shards) if states[shard].name != "packed"]
    if missing:
        check_address(settings)
    if unplanned or missing:
        mark_unfinished(settings, folder)
    for shard in unplanned:
        folder.remove(shard)
    errors: dict[str, str] = {}
    seconds = 0.0
    done = sum(planned.values()) - sum(planned[shards[number]] for number in missing)
    with Progress("packing", sum(planned.values()), "samples", done) as progress:
        for _ in range(settings.ray.attempts):
            if not missing:
                break
            from pipelines.dataset.pack import pack_on_ray  # It loads PyTorch and Ray.

            errors = {}
            for number, error in pack_on_ray(settings, identity, missing, progress):
                shard = shards[number]
                after = folder.state_after(shard, states[shard], error, accepted)
                if after.name == "missing":
                    errors[shard] = error or "it was packed, but its commit record does not fit its tar"
                    continue
                states[shard] = after
                progress.update(planned[shard])
                if after.name == "kept":
                    progress.note(KEPT.format(shard=shard))
            missing = [number for number in missing if shards[number] in errors]
            seconds += time.monotonic() - progress.began
    folder.sweep()
    records = {shard: state.record for shard, state in states.items() if state.record}
    return records, errors, None if packed_before else seconds


def print_errors(errors: dict[str, str], attempts: int) -> None:
    """What went wrong with which shards; a full disk is told once."""
    by_message: dict[str, list[str]] = {}
    for shard, message in errors.items():
        by_message.setdefault(message, []).append(shard)
    for message, shards in by_message.items():
        others = f" and {number_of(len(shards) - 1, 'other')}" if len(shards) > 1 else ""
        print(f"shard {shards[0]}{others} failed {number_of(attempts, 'time')}, last with:\n{message.strip()}", file=sys.stderr)


def are_drawn(out: Path) -> bool:
    """Whether the pictures are there, and later than the tables that they show.

    Drawing takes PyTorch and matplotlib, and most of the time of a build that has nothing else to do.
    """
    pictures = [out / REPORT, out / SHEET]
    tables = [out / name for name in ("selection.json", "objects.parquet", "rejects.parquet", "plan.parquet")]
    return all(picture.is_file() for picture in pictures) and min(map(_written, pictures)) >= max(map(_written, tables))


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns


def draw_pictures(settings: BuildSettings, folder: ShardFolder, unchanged: bool) -> None:
    """What a person looks at; of a dataset that is as it was, only if it lacks them. It is finished with or without them."""
    if unchanged and not folder.remote and are_drawn(settings.out):
        print(f"report: {settings.out / REPORT}\ncontact sheet: {settings.out / SHEET}")
        return
    from pipelines.inspection.report import write_report  # It loads matplotlib.

    try:
        with Progress("drawing the report"):
            write_report(settings.out, settings, settings.out / REPORT)
    except InputError as error:
        print(f"warning: no report: {error}", file=sys.stderr)
        return
    print(f"report: {settings.out / 'report.html'}")
    if folder.remote:
        folder.remote.upload(settings.out / REPORT, REPORT)
        return
    try:
        with Progress("drawing the contact sheet"):
            save_picture(contact_sheet(settings.out, settings.source.photos), settings.out / SHEET)
    except InputError as error:
        print(f"warning: no contact sheet: {error}", file=sys.stderr)
    else:
        print(f"contact sheet: {settings.out / 'contact_sheet.png'}")


def estimate_plan(settings: BuildSettings, selection: Selection) -> Estimate | None:
    """What the build will make and cost; a table of rates that is missing must not stop a build."""
    try:
        with Progress("estimating"):
            estimated = estimate(settings, selection)
    except InputError as error:
        print(f"warning: no estimate: {error}", file=sys.stderr)
        return None
    write_atomically(settings.out / ESTIMATE_RECORD, as_json(estimated))
    print_estimate(estimated)
    return estimated


def print_summary(info: DatasetInfo, settings: BuildSettings, seconds: float) -> None:
    """Where every sample went, and where the dataset is."""
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
    if books.references or books.lost_references:
        table.add_section()
        table.add_row("references", "from other photos", f"{books.references:,}")
        for code, count in books.lost_references.items():
            table.add_row("", f"not cut: {code}", f"{count:,}")
    table.add_section()
    masks = sum(books.masks.values())
    for kind, count in books.masks.items():
        table.add_row("masks", kind, f"{count:,} ({count / masks:.0%})")
    table.add_section()
    for split, counts in info.splits.items():
        size = f"{counts.bytes / 1e6:,.1f} MB"
        table.add_row(split, f"{number_of(len(counts.shards), 'shard')}, {size}", f"{counts.samples:,}")
    console = Console()
    console.print(table)
    place = settings.upload or settings.out
    console.print(f"dataset, made in {seconds:.0f} s: {place}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run_program(main)
