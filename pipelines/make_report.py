"""Write a page about a dataset folder: classes, sizes, positions, masks, rejected boxes, as figures and tables.

    python pipelines/make_report.py DATASET --out report.html

Needs the plan alone: it shows what a build would train on before anything is packed. The numbers go to report.json beside it.
"""

import argparse
from pathlib import Path

from pbe_core.errors import run_program
from pbe_core.progress import Progress


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dataset", type=Path, help="folder of the dataset, or of a plan that is not packed yet")
    parser.add_argument("--out", type=Path, help="HTML file to write (default: report.html in the folder)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.dataset / "report.html"
    from pipelines.inspection.report import write_report  # It loads matplotlib, which takes seconds: not for --help.

    with Progress("drawing the report"):
        write_report(arguments.dataset, None, out)
    print(out)


if __name__ == "__main__":
    run_program(main)
