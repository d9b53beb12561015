"""Make pairs of photo, mask and reference from boxes, as the published COCOEE has them, for judging models by.

    python pipelines/benchmark.py --config configs/coco.yaml --benchmark.out sets/coco --benchmark.judge clip=FOLDER

    boxes ──select──▶ objects ──draw──▶ one a photo, by name ──▶ square and mask of its box ─┬─▶ GT_<n>, Mask_bbox_<n>, Ref_<n>,
                         └────draw────▶ pools of each class ───▶ one of another photo ───────┘    id_list.npy, pairs.csv, ...

Takes the settings of a build, and its own below `benchmark`. With --benchmark.ids id_list.npy the photos and boxes are those of
COCO's annotation ids. The set takes its name when it is whole; interrupted, the same command begins anew, and ends with the same
bytes.
"""

import errno
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pbe_core.errors import InputError, machine_error, run_program
from pbe_core.files import sweep, temporary_folder
from pbe_core.progress import Progress
from pbe_core.settings import help_first, load_settings, preset
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.pairing.annotation_ids import read_different_ids
from pipelines.pairing.make_pairs import Compares, one_thread_each
from pipelines.pairing.make_set import make_set, rules_of
from pipelines.pairing.settings import BenchmarkSettings, of_one_split
from pipelines.pairing.write_set import read_finished
from pipelines.photos import check_photos


def main() -> None:
    """The story of a pair set."""
    help_first(BenchmarkSettings, "build", __doc__, preset("tiny"))
    settings = of_one_split(load_settings(BenchmarkSettings, "build", default_config=preset("tiny")))
    out = settings.benchmark.out.absolute()
    judge = _load_judge(settings)
    ids = read_different_ids(settings.benchmark.ids) if settings.benchmark.ids else None
    check_photos(settings)
    with Progress("opening the annotations"):
        source = open_source(settings)
    source.print_notes()
    rules = rules_of(settings, source, judge)
    record = read_finished(out, rules)
    if record is None:
        _make_parent(out)
        sweep(out.parent, out.name)
        with temporary_folder(out.parent, out.name) as folder, one_thread_each(asked=judge is not None):
            record = make_set(settings, source, judge, ids, folder, rules)
            _give_name(folder, out)
    print_summary(record, out)


def print_summary(record: dict[str, Any], out: Path) -> None:
    """Where every box went, and what a user should know."""
    books = record["books"]
    table = Table("boxes", Column("number", justify="right"), title="Where every box went", title_justify="left")
    table.add_row("pairs", f"{record['pairs']:,}")
    for reason, count in books["left_out"].items():
        table.add_row(f"left out: {reason}", f"{count:,}")
    table.add_row("all", f"{books['boxes']:,}", style="bold")
    Console().print(table)
    for note in record["notes"]:
        print(f"note: {note}")
    print(f"{number_of(record['pairs'], 'pair')} of {number_of(len(record['classes']), 'class', 'classes')}: {out}")
    print(f"look at {out / 'contact_sheet.png'}; fingerprint {record['fingerprint'][:12]}")


def _load_judge(settings: BenchmarkSettings) -> Compares | None:
    if settings.benchmark.judge is None:
        return None
    from pbe_core.judges.judge import load_judge  # It loads PyTorch.

    judge: Compares = load_judge(settings.benchmark.judge)
    return judge


def _make_parent(out: Path) -> None:
    """Make the folder that the set's is to be in. Raises InputError where that, or giving the set its name, cannot work."""
    reason = "a mount, which nothing can take the place of; give a folder in it" if os.path.ismount(out) else ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Tried, as permissions tell nothing of /proc and the like, nor of names that are too long.
        with temporary_folder(out.parent, out.name):
            pass
    except OSError as error:
        if machine_error(error):
            raise
        reason = reason or f"no folder can be made there ({error.strerror})"
    if reason:
        raise InputError(f"{str(out)[:300]}: {reason}; set build.benchmark.out (--benchmark.out) to another place")


def _give_name(folder: Path, out: Path) -> None:
    """Make a finished folder the set. Raises InputError where another run's has come there meanwhile."""
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InputError(f"{out}: filled by somebody else while this ran; look there, or give another --benchmark.out") from None


if __name__ == "__main__":
    run_program(main)
