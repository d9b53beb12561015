"""Get the photos of accepted objects into a photo store, with an outcome for each photo.

    python pipelines/crawl.py --config configs/open_images.yaml --crawl.contact you@example.org

    objects, metadata ──▶ wanted photos ──those without an outcome──▶ a round ──Ray──▶ parts ──▶ index, status, failures

Stopped, or killed, the same command goes on where it was; photos that have an outcome are not asked for again. With

    --retry transient   also those whose failure may have passed (or: all, or codes as in http_404,timeout)
    --refresh           also those that are there: unchanged ones are kept, those that are gone at their source leave the store
    --verify            nothing is fetched: read the store from end to end and say what is wrong with it

`pipelines/build.py` with the same settings does the same before it packs. Docs: docs/crawling.md.
"""

import argparse
import difflib
import signal
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pbe_core.errors import InputError, run_program
from pbe_core.files import lock_folder
from pbe_core.photo_files import is_store
from pbe_core.progress import Progress
from pbe_core.settings import help_first, load_settings, preset
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.config import BuildSettings, with_absolute_paths
from pipelines.crawling.addresses import AddressRules
from pipelines.crawling.buckets import check_object_stores
from pipelines.crawling.rounds import (
    freeze_round,
    open_store,
    photos_to_ask,
    quarantined,
    quarantined_keys,
    read_parts,
    sweep,
)
from pipelines.crawling.tables import count_codes, find_placeholders, merge, verify_store
from pipelines.crawling.wanted import PhotoSource, list_wanted, read_sources
from pipelines.crawling.workers import Stop, crawl_on_ray
from pipelines.dataset.write_plan import select_and_plan
from pipelines.on_ray import find_cluster
from schemas.outcomes import OK, OUTCOMES, TRANSIENT

_LONGEST_EXAMPLE = 160


@dataclass(frozen=True)
class Flags:
    """Options that are no settings: what to do this time, beside getting what is missing."""

    again: frozenset[str] = frozenset()
    """Codes whose photos are asked for again."""
    verify: bool = False


def main() -> int:
    """The story of a crawl."""
    help_first(BuildSettings, "build", __doc__, preset("tiny"))
    flags, rest = read_flags(sys.argv[1:])
    settings = with_absolute_paths(load_settings(BuildSettings, "build", rest, preset("tiny")))
    store = settings.source.photos
    if flags.verify and flags.again:
        raise InputError("--verify fetches nothing; give it without --retry and --refresh")
    if flags.verify:
        if not is_store(store):
            raise InputError(f"{store}: no photo store here; set --source.photos to the one to verify")
        return print_problems(settings)
    if not settings.crawl.sources:
        raise InputError(
            "build.crawl.sources is empty: say where the photos are, as --crawl.sources "
            "'[\"s3://open-images-dataset/{split}/{image_id}.jpg\"]' (docs/crawling.md)"
        )
    find_cluster(settings.ray.address)  # Before any work.
    selection, _ = select_and_plan(settings)
    for note in selection.notes:
        print(f"note: {note}", file=sys.stderr)
    return crawl_photos(settings, flags.again)


def crawl_photos(settings: BuildSettings, again: Collection[str] = ()) -> int:
    """Bring the store of `source.photos` up to date with `objects.parquet`; returns the exit status.

    Args:
        settings: of the build, whose tables are frozen; its paths are absolute.
        again: codes whose photos are asked for again.

    Raises:
        InputError: a source of photos is not there, or the folder is no photo store.
    """
    if settings.source.photos_url:
        raise InputError(f"{settings.source.photos_url}: photos are crawled into a local folder; set build.source.photos to one")
    sources = read_sources(settings.crawl)
    AddressRules(settings.crawl.allowed_addresses)
    check_object_stores([source.text for source in sources if source.kind == "bucket"], settings.crawl)
    store = settings.source.photos
    open_store(store, settings.source.photos_of)
    stop = Stop()
    try:
        with stop, lock_folder(store, "another crawl is using this photo store; wait for it, or stop it"):
            counts, errors = crawl_rounds(settings, sources, again, stop)
        print_outcomes(settings, counts)
    except KeyboardInterrupt:
        stop.signal = stop.signal or signal.SIGINT
        errors = {}
    for message, units in Counter(errors.values()).items():  # One line for a full disk.
        print(f"{number_of(units, 'part')} could not be made: {message}", file=sys.stderr)
    if stop.signal:
        print("stopped: what has come is kept, and the same command goes on from there", file=sys.stderr)
        return 128 + stop.signal
    if errors or counts[""]:
        print(f"error: of {number_of(counts[''], 'photo')} nothing was recorded; the others are kept, run again", file=sys.stderr)
        return 1
    return 0


def crawl_rounds(
    settings: BuildSettings, sources: Sequence[PhotoSource], again: Collection[str], stop: Stop
) -> tuple[Counter[str], dict[int, str]]:
    """Crawl the missing photos, then placeholders from later sources; returns outcomes (`count_codes`) and errors of parts."""
    store = settings.source.photos
    errors: dict[int, str] = {}
    with Progress("reading what the store has"):
        parts = read_parts(store)
        sweep(store, parts)
        merge(store, parts)

    def list_photos() -> pa.Table:
        return list_wanted(settings.out / "objects.parquet", open_source(settings), list(sources))

    with Progress("listing the wanted photos"):
        wanted = list_photos()
        keys = wanted["key"].combine_chunks()
        asked = photos_to_ask(store, wanted, again)
    del wanted  # Millions of rows: while photos come, nobody needs them.
    known = quarantined_keys(store)
    if not len(asked):
        print("nothing to ask for: each photo has an outcome; --retry asks again for those that failed", file=sys.stderr)
    while len(asked) and not errors and not stop.signal:
        with Progress("dividing the photos into parts"):
            parts = read_parts(store)
            placeholders = find_placeholders(store, parts)
            chosen = freeze_round(store, asked, settings.crawl.photos_per_part, parts, placeholders)
        del asked
        pa.default_memory_pool().release_unused()
        with Progress("crawling", sum(chosen.sizes), "photos") as progress:
            errors = crawl_on_ray(chosen, sources, settings, progress, stop)
        with Progress("making the store's tables"):
            merge(store, read_parts(store))
            # Placeholders show only now, when many have come. Another source may have the photos themselves.
            asked = quarantined(store, list_photos, keys, known, settings.crawl.sources)
        known = quarantined_keys(store)
    with Progress("counting what has come"):
        counts = count_codes(store, keys)
    return counts, errors


def print_outcomes(settings: BuildSettings, counts: Counter[str]) -> None:
    """The table of outcomes, whose counts add up to the wanted photos, and where everything is."""
    store = settings.source.photos
    console = Console()
    console.print(summary_table(counts))
    later = sum(count for code, count in counts.items() if code in TRANSIENT)
    if later:
        count = number_of(later, "photo")
        hint = f"{count} may come another time: pipelines/crawl.py with the same settings and --retry transient"
        console.print(hint, soft_wrap=True, highlight=False)
    console.print(f"photo store: {store}", soft_wrap=True, highlight=False)
    for code, detail in examples(store, [code for code in counts if code not in (OK, "")]).items():
        console.print(f"{code}, for example: {detail[:_LONGEST_EXAMPLE]}", soft_wrap=True, highlight=False, markup=False)
    if counts.total() > counts[OK] + counts[""]:
        console.print(f"what failed, and why: {store / 'failures.parquet'}", soft_wrap=True, highlight=False)


def summary_table(counts: Mapping[str, int]) -> Table:
    """Where every wanted photo went; "" are those of which nothing is recorded yet."""
    table = Table(title="What became of the wanted photos", title_justify="left")
    table.add_column("outcome")
    table.add_column("photos", justify="right")
    table.add_column("may come later")
    table.add_column("meaning")
    total = sum(counts.values())
    table.add_row("wanted", f"{total:,}", "", "")
    table.add_section()
    for code, count in counts.items():
        if code:
            outcome = OUTCOMES[code]
            table.add_row(code, f"{count:,}", "yes" if outcome.transient else "", outcome.meaning)
        else:
            table.add_row("not asked for yet", f"{count:,}", "yes", "nothing is recorded: the same command goes on")
    return table


def examples(store: Path, codes: Collection[str]) -> dict[str, str]:
    """The detail of one photo of each of these codes."""
    found: dict[str, str] = {}
    for batch in pq.ParquetFile(store / "failures.parquet").iter_batches(columns=["code", "detail"]):
        for code in set(codes) - found.keys():
            details = batch["detail"].filter(pc.equal(batch["code"].cast(pa.string()), code)).drop_null()
            if len(details):
                found[code] = details[0].as_py()
    return {code: found[code] for code in codes if code in found}


def print_problems(settings: BuildSettings) -> int:
    """Verify the store and say what is wrong; returns the exit status."""
    store = settings.source.photos
    problems, photos = verify_store(store)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"error: {store}: {number_of(len(problems), 'problem')}, see above", file=sys.stderr)
        return 1
    print(f"{store}: {number_of(photos, 'photo')}, all of them whole and where the index says")
    return 0


def read_flags(arguments: Sequence[str]) -> tuple[Flags, list[str]]:
    """The options that are no settings, and the other arguments.

    Raises:
        InputError: --retry names a code that does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--retry", default="")
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--verify", action="store_true")
    given, rest = parser.parse_known_args(list(arguments))
    failures = [code for code in OUTCOMES if code != OK]
    groups = {"transient": TRANSIENT, "all": failures}
    again: set[str] = {OK} if given.refresh else set()
    for word in filter(None, given.retry.split(",")):
        if word not in (*groups, *failures):
            near = difflib.get_close_matches(word, [*groups, *failures], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"--retry {word}: no such outcome{hint}; give transient, all, or some of {', '.join(failures)}")
        again.update(groups.get(word, (word,)))
    return Flags(frozenset(again), given.verify), rest


if __name__ == "__main__":
    run_program(main)
