"""Look at a dataset: its tables and shards as a page or a contact sheet, and one sample back to its box and photo.

    python pipelines/inspect_dataset.py report DATASET                    classes, sizes, masks, rejected boxes, as charts
    python pipelines/inspect_dataset.py preview DATASET --out sheet.png   samples at random, or --by class
    python pipelines/inspect_dataset.py trace KEY DATASET                 one sample: box, photo, author, licence, all parts
    python pipelines/inspect_dataset.py masks --out masks.png             masks of random boxes, without a dataset

The code is in pipelines/inspection/. `report` needs the plan alone: it shows what would be trained on before anything is packed.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress

if TYPE_CHECKING:
    from pbe_core.images.sheets import Picture


def main() -> None:
    """Command line. What draws takes seconds to load, which --help does without."""
    options = parse_options()
    if options.what == "report":
        from pipelines.inspection.report import write_report

        options.out = options.out or options.dataset / "report.html"
        with Progress("drawing the report"):
            write_report(options.dataset, None, options.out)
    elif options.what == "trace":
        from pipelines.inspection.trace import trace

        trace(options.key, options.dataset, options.photos, options.out, options.vae)
    else:
        from pbe_core.images.sheets import save_picture
        from pipelines.inspection.contact_sheet import mask_sheet

        save_picture(preview(options) if options.what == "preview" else mask_sheet(seed=options.seed), options.out)
    if options.out:
        print(options.out)


def preview(options: argparse.Namespace) -> "Picture":
    """A contact sheet."""
    from pipelines.inspection.contact_sheet import class_sheet, contact_sheet

    if min(options.count, options.each) < 1:
        raise InputError(f"--count {options.count}, --each {options.each}: must be 1 or more")
    labels = options.labels.split(",") if options.labels else ()
    with Progress("drawing"):
        if options.by == "class" or labels:
            return class_sheet(options.dataset, options.photos, labels, options.count, options.each, options.seed, options.vae)
        return contact_sheet(options.dataset, options.photos, options.count, options.seed, options.vae)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    page = commands.add_parser("report", help="a page of charts and tables; the plan is enough")
    sheet = commands.add_parser("preview", help="a contact sheet: photo with box, view under each mask, reference; or by class")
    trace = commands.add_parser("trace", help="one sample: its box, photo, author, licence, how it was cut, where it lies")
    masks = commands.add_parser("masks", help="a sheet of 64 masks of random boxes, box and Bessel in turn")
    trace.add_argument("key", help="a sample's key, the beginning of one, or an object's id")
    for command in (page, sheet, trace):
        command.add_argument("dataset", type=Path, help="folder of the dataset")
    page.add_argument("--out", type=Path, help="HTML file to write (default: report.html in the folder)")
    for command in (sheet, masks):
        command.add_argument("--out", type=Path, required=True, help="PNG to write")
        command.add_argument("--seed", type=int, default=0, help="which random choice (default: %(default)s)")
    trace.add_argument("--out", type=Path, help="PNG to write: all parts of the sample")
    for command, default in ((sheet, "shown without photos"), (trace, "where the build had them")):
        command.add_argument("--photos", type=Path, help=f"folder of the photos (default: {default})")
        command.add_argument("--vae", help="the dataset's VAE, if it is not where the build had it: folder or hub id")
    sheet.add_argument("--by", choices=("random", "class"), default="random", help="samples, or a row for each class")
    sheet.add_argument("--labels", help="classes to show, by name or id: Cat,Dog (default: those of most samples)")
    sheet.add_argument("--count", type=int, default=12, help="samples to show, or classes (default: %(default)s)")
    sheet.add_argument("--each", type=int, default=4, help="samples of each class (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
