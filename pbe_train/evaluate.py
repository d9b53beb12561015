"""How good is a model? Scores of its pictures with intervals, between rows that bound them: any pairs, any checkpoint.

    python -m pbe_train.evaluate --model runs/tiny --dataset data/tiny/dataset --out runs/tiny/evaluation
    python -m pbe_train.evaluate --model MODEL --pairs test_bench --judge clip=openai/clip-vit-base-patch32 --out RESULT
    python -m pbe_train.evaluate --pictures theirs=FOLDER --pairs test_bench --judge ... --out RESULT
    python -m pbe_train.evaluate --beside RESULT RESULT --out TOGETHER

    pairs ──paint──▶ OUT/pictures/ROW ──judges, once──▶ OUT/features ──▶ OUT/evaluation.json, index.html

Started again after it was interrupted, it goes on: what is painted is not painted again, nor looked at again. Under torchrun the
processes share the work. docs/evaluation.md explains scores, judges and rows.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pbe_core.errors import InputError, run_program
from pbe_train.model.sampling import add_sampling_options, check_interval


def main() -> None:
    """Paint, look, score, and show."""
    options = parse_options()
    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.evaluation.program import evaluate

    evaluate(options)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: by default the program's own.

    Raises:
        InputError: options that do not go together.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="docs/evaluation.md explains pair sets, rows, judges and scores.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _add_pairs(parser.add_argument_group("what is asked (one of --pairs and --dataset)").add_argument)
    _add_rows(parser.add_argument_group("who is asked (one or more)").add_argument)
    painting = parser.add_argument_group("how it paints")
    add_sampling_options(painting)
    _add_painting(painting.add_argument)
    _add_scoring(parser.add_argument_group("how it is scored").add_argument)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads that read pictures, and of networks on a CPU"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, features, evaluation.json and index.html")
    options = parser.parse_args(arguments)
    asked = options.model or options.checkpoints or options.pictures
    results_alone = options.beside and not (asked or options.pairs or options.dataset)
    if bool(options.pairs) == bool(options.dataset) and not results_alone:
        raise InputError("give one of --pairs and --dataset: what is to be painted")
    if not asked and not results_alone:
        raise InputError("give --model, --checkpoints or --pictures: what is to be scored")
    if options.out.suffix == ".json":
        raise InputError(f"--out {options.out}: give a folder; evaluation.json and the page are written into it")
    check_interval(options.guidance_interval)
    numbers = {name: getattr(options, name) for name in ("count", "steps", "reuse", "batch", "replicates", "threads")}
    if wrong := [f"--{name} {number}" for name, number in numbers.items() if number < 1]:
        raise InputError(f"{', '.join(wrong)}: must be 1 or more")
    return options


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any: not `None` of a path, nor `True` of --no-blend."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.nargs != 0 and action.default not in (None, [], {})
        return super()._get_help_string(action) if told else action.help


def _add_pairs(add: Callable[..., object]) -> None:
    add(
        "--pairs", type=Path, help="folder laid out as COCOEE (`pbe benchmark` makes such), or a .csv, .jsonl or .parquet of rows"
    )
    add("--dataset", help="a dataset that `pbe build` made, a folder or URL; the split must keep its views (views.keep)")
    add("--storage", type=_storage, default={}, metavar="JSON", help="options of fsspec for a URL")
    add("--split", default="validation", help="of the dataset; one that was not trained on")
    add("--count", type=int, default=200, help="pairs drawn from the dataset's split")
    add(
        "--references",
        choices=("own", "another"),
        default="own",
        help="of the dataset: the sample's own object, or one of another label",
    )


def _storage(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text[:60]}: not a JSON object of options, as {{"anon": true}}')
    return found


def _add_rows(add: Callable[..., object]) -> None:
    add("--model", nargs="+", default=[], metavar="[NAME=]MODEL", help="runs of train.py, checkpoints, published models")
    add("--checkpoints", type=Path, metavar="RUN", help="all checkpoints of a run, for curves over steps")
    add("--pictures", nargs="+", default=[], metavar="[NAME=]FOLDER", help="folders of pictures ID.png that any program painted")
    add(
        "--beside",
        nargs="+",
        default=[],
        type=Path,
        metavar="RESULT",
        help="earlier results (their --out) for the same table and page; with nothing else, these alone",
    )


def _add_painting(add: Callable[..., object]) -> None:
    add("--seed", type=int, default=0, help="of noise, samples and resamples")
    add("--size", type=int, help="side in px at which the model works; by default the one it was trained at")
    add(
        "--window",
        choices=("whole", "region"),
        default="whole",
        help="whole: a square photo is the view, as in the published test; region: the square around the region, as `pbe edit`",
    )
    add(
        "--no-blend",
        dest="blend",
        action="store_false",
        help="the model's own px outside the mask, too, as in the published test",
    )
    add("--batch", type=int, default=16, help="pairs painted at once; fewer need less memory")


def _add_scoring(add: Callable[..., object]) -> None:
    kinds = "inception-clean, inception-legacy, clip, dinov2, resnet, mobilenet"
    add("--judge", nargs="+", default=[], metavar="[NAME:]KIND=WHERE", help=f"networks that see the pictures; kinds: {kinds}")
    add("--real", type=Path, help="folder of real photos for FID and its kind (published: COCO test2017)")
    add("--codec", default="png", help="both sides pass it before they are compared: png (unchanged), or jpeg:QUALITY")
    add("--replicates", type=int, default=1000, help="resamples for the intervals of set scores")
    add("--extrapolate", action="store_true", help="also FID-infinity (FID∞), which depends less on the number of pictures")
    add("--mixture", type=Path, help=".npz for QS; made from the real pictures (k = 20) where there is no such file")


if __name__ == "__main__":
    run_program(main)
