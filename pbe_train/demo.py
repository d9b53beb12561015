"""Show what a run can do: held-out views repainted with their own reference and with another object's.

python -m pbe_train.demo --model runs/tiny --dataset data/tiny/dataset --out demo.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from pbe_core.errors import InputError, run_program
from pbe_core.images.sheets import sheet, tint
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pbe_train.model.sampling import add_sampling_options, check_interval

EDITS_A_ROW = 2


def main() -> None:
    """Paint and write the sheet."""
    options = parse_options()
    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.checkpoints.from_pretrained import load_run
    from pbe_train.data.remote_shards import open_reader
    from pbe_train.evaluation.held_out import check_fits, find_other, paint_held_out, read_held_out, reconstruct, spread_places
    from pbe_train.model.pipeline import SamplingSettings, check_guidance

    with Progress("loading the model"):
        run = load_run(options.model)
    check_guidance(run, options.guidance)
    reader = open_reader(run.settings.over(options.dataset, options.storage), options.split)
    check_fits(run, reader)
    with Progress("reading the samples"):
        samples = read_held_out(reader, spread_places(reader.counts, options.count), options.seed)
    lenders = [one if number % 2 == 0 else find_other(samples, number) for number, one in enumerate(samples)]
    references = [lender.sample.reference for lender in lenders]
    interval = check_interval(options.guidance_interval)
    how = SamplingSettings(options.guidance, options.steps, options.scheduler, interval, options.reuse)
    seeds = [options.seed + number for number in range(len(samples))]
    with Progress("painting", len(samples), "views") as progress:
        painted = paint_held_out(run, samples, references, seeds, how, batch=options.batch, progress=progress)
    with Progress("decoding the views"):
        decoded = reconstruct(run, samples)
    edits, titles = [], []
    for one, lender, made, result in zip(samples, lenders, decoded, painted, strict=True):
        source = made if one.sample.view is None else one.sample.view
        edits.append([source, tint(source, one.mask), lender.sample.reference, result])
        whose = "own" if lender is one else "other"
        titles.append([f"{whose}: {lender.sample.label_name}", "", "", ""])
    columns = ["source", "region", "reference", "result"] * min(EDITS_A_ROW, len(edits))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(side_by_side(edits), columns, titles=side_by_side(titles))).save(options.out)
    print(f"{options.out}: {number_of(len(edits), 'edit')} by step {run.step} of {options.model}")


def side_by_side(edits: list[list[Any]]) -> list[list[Any]]:
    """Rows of so many edits each, as a picture on a wide screen."""
    rows = [edits[start : start + EDITS_A_ROW] for start in range(0, len(edits), EDITS_A_ROW)]
    return [[cell for edit in row for cell in edit] for row in rows]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="run folder that train.py wrote, or one of its checkpoints")
    parser.add_argument("--dataset", required=True, help="dataset folder or URL")
    parser.add_argument("--storage", type=json.loads, default={}, metavar="JSON", help="options of fsspec for a URL")
    parser.add_argument("--split", default="validation", help="split whose samples are shown")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--count", type=int, default=8, help="edits; every second one gets another object's reference")
    add_sampling_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="the same seed paints the same picture")
    parser.add_argument("--batch", type=int, default=16, help="samples painted at once; fewer need less memory")
    options = parser.parse_args()
    if min(options.count, options.steps, options.reuse, options.batch) < 1:
        numbers = f"--count {options.count}, --steps {options.steps}, --reuse {options.reuse}, --batch {options.batch}"
        raise InputError(f"{numbers}: must be 1 or more")
    return options


if __name__ == "__main__":
    run_program(main)
