"""Survey the photos themselves: read, hash and decode each one, and find those that are there twice under two ids.

    python pipelines/survey.py --config configs/open_images.yaml --source.survey data/open_images/survey

    boxes ──▶ photo_list.parquet ──chunks, on Ray──▶ parts/*.parquet ──▶ photos.parquet ──▶ same_photos.parquet, .png
              (each photo once, sorted, frozen)                          (survey.json, written last: the survey is finished)

A build with the same `source.survey` then knows all sizes, and drops photos that are there twice. Interrupted, the survey goes on
where it stopped when the same command is run again; photos that could not be used are then looked at again.
"""

import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from pbe_core.errors import InputError, run_program
from pbe_core.images.sheets import save_picture
from pbe_core.progress import Progress
from pbe_core.settings import help_first, load_settings, preset
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.config import BuildSettings
from pipelines.on_ray import find_cluster
from pipelines.photos import check_photos
from pipelines.selection.duplicate_scan import caption_of, draw_pairs, finish, freeze_list, list_photos, scan_missing
from pipelines.selection.duplicates import read_scan

PAIRS_PRINTED = 5


def main() -> int:
    """The story of a survey; returns the exit status."""
    help_first(BuildSettings, "build", __doc__, preset("tiny"))
    settings = load_settings(BuildSettings, "build", default_config=preset("tiny"))
    if settings.source.survey is None:
        raise InputError("build.source.survey is not set: give --source.survey FOLDER, the folder to write the survey to")
    find_cluster(settings.ray.address)  # Before any work.
    folder = settings.source.survey.resolve()
    check_photos(settings)
    with Progress("opening the annotations"):
        source = open_source(settings)
    source.print_notes()
    with Progress("listing the photos"):
        chunks = freeze_list(list_photos(source), settings.source, folder)
    errors = scan_missing(chunks, settings)
    if errors:
        for number, message in errors.items():
            print(f"chunk {number} failed {number_of(settings.ray.attempts, 'time')}, last with:\n{message}", file=sys.stderr)
        of_all = f"{len(errors):,} of {number_of(len(chunks.sizes), 'chunk')}"
        print(f"error: {of_all} failed; the others are kept, run again", file=sys.stderr)
        return 1
    with Progress("comparing the photos"):
        finish(chunks)
    print_summary(folder)
    path = folder / "same_photos.png"
    path.unlink(missing_ok=True)
    with Progress("drawing pairs"):
        picture = draw_pairs(folder, settings.source)
    if picture is not None:
        save_picture(picture, path)
        print(f"the pairs that are least alike: {path}")
    return 0


def print_summary(folder: Path) -> None:
    """Where every photo went, and the first few that are there in two splits."""
    survey = read_scan(folder)
    codes: Counter[tuple[str, str]] = Counter()
    plain = 0
    for batch in survey.read_photos():
        codes.update(zip(batch["code"].to_pylist(), batch["split"].to_pylist(), strict=True))
        plain += batch["perceptual_hash"].null_count - batch["width"].null_count
    same = survey.same.to_pylist()
    across = [pair for pair in same if pair["split"] != pair["kept_split"]]
    groups = {(pair["kept_split"], pair["kept_photo_id"]) for pair in same}
    by_code = sorted(codes.items(), key=lambda item: (item[0][0] != "ok", item[0]))
    rows = [
        *(("ok" if code == "ok" else f"failed: {code}", split, count) for (code, split), count in by_code),
        ("ok, but too plain for a perceptual hash", "", plain),
        ("groups of the same photo, of which one is kept", "", len(groups)),
        ("the others in these groups", "", len(same)),
        *((f"of these found by {by}", "", count) for by, count in Counter(pair["by"] for pair in same).most_common()),
        ("of these in another split than the one kept", "", len(across)),
    ]
    table = Table("outcome", "split", Column("photos", justify="right"), title="What the photos are like", title_justify="left")
    for outcome, split, count in rows:
        table.add_row(outcome, split, f"{count:,}")
    Console().print(table)
    for pair in across[:PAIRS_PRINTED]:
        print(caption_of(pair))
    if len(across) > PAIRS_PRINTED:
        print(f"... and {len(across) - PAIRS_PRINTED:,} more in {folder / 'same_photos.parquet'}")
    print(f"survey: {folder}")


if __name__ == "__main__":
    run_program(main)
