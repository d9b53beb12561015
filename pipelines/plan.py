"""What a build would make and cost, before a photo is fetched or a GPU is rented: from the annotation tables alone.

    python pipelines/plan.py --config configs/open_images.yaml --source.annotations FOLDER --out DATASET

Takes the same settings as pipelines/build.py, which goes on from what this leaves in DATASET: objects.parquet, rejects.parquet,
plan.parquet, and report.html to look at. Other settings in the same folder plan anew until a build has begun there.
"""

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import run_program
from pbe_core.files import write_atomically
from pbe_core.progress import Progress
from pbe_core.settings import help_first, load_settings, preset
from pipelines.config import BuildSettings
from pipelines.dataset.estimate import ESTIMATE_RECORD, as_json, estimate, print_comparison, print_estimate, print_selection
from pipelines.dataset.write_plan import check_packing, select_and_plan


def main() -> None:
    """Command line."""
    help_first(BuildSettings, "build", __doc__, preset("tiny"))
    from pipelines.inspection.report import write_report  # It loads matplotlib, which takes seconds: not for --help.

    settings = load_settings(BuildSettings, "build", default_config=preset("tiny"))
    selection, inputs = select_and_plan(settings)
    check_packing(settings, inputs)
    with Progress("estimating"):
        estimated = estimate(settings, selection)
    write_atomically(settings.out / ESTIMATE_RECORD, as_json(estimated))
    print_selection(selection)
    print_estimate(estimated)
    if (settings.out / "dataset.json").is_file():
        print_comparison(estimated, read_dataset(settings.out))
    report = settings.out / "report.html"
    with Progress("drawing the report"):
        write_report(settings.out, settings, report)
    print(f"report: {report}")


if __name__ == "__main__":
    run_program(main)
