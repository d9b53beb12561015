"""Does the model paint what the reference shows? Held-out views are repainted, and the reference is asked for among eight.

    python -m pbe_train.evaluate --model runs/tiny --dataset data/tiny/dataset --out evaluation.json

For each sample eight candidate references of eight labels are drawn, its own among them. A region is *recognised* if the
reference that was painted lies strictly nearer to it than the other seven: cosine of class-token features, region = bounding box
of the mask. Chance is 12.5 %. Painting *another* candidate than the sample's own separates following the reference from filling
in what the surroundings suggest. Two rows bound the test from above: the real region, and the region after the VAE.

What is judged is the model's own output for the whole view: nothing is pasted back, so no px of the photo is in it. The model
saw the masked view, though; where a jittered mask left a rim of the object outside, it may repaint that rim.

The judge is the frozen encoder whose class token also conditions the model: the test tells whether the model paints what that
encoder sees in the reference, not whether people would agree.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress


def main() -> None:
    """Paint, ask, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="run folder that train.py wrote, or one of its checkpoints")
    parser.add_argument("--dataset", required=True, help="dataset folder or URL; its split must keep views")
    parser.add_argument("--storage", type=json.loads, default={}, metavar="JSON", help="options of fsspec for a URL")
    parser.add_argument("--split", default="validation", help="split that was not trained on")
    parser.add_argument("--count", type=int, default=200, help="samples; each is painted twice")
    parser.add_argument("--guidance", type=float, default=5.0, help="how strongly to follow the reference; 1 = no guidance")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="draws samples, candidates, masks and noise")
    parser.add_argument("--scheduler", default="DPMSolverMultistepScheduler", help="a scheduler of diffusers")
    parser.add_argument("--out", type=Path, help="JSON file to write the table to")
    parser.add_argument("--batch", type=int, default=16, help="samples painted at once; fewer need less memory")
    options = parser.parse_args()
    if min(options.count, options.steps, options.batch) < 1:
        raise InputError(f"--count {options.count}, --steps {options.steps}, --batch {options.batch}: must be 1 or more")

    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.checkpoints.from_pretrained import load_run
    from pbe_train.config import TRAIN_SPLIT
    from pbe_train.data.remote_shards import open_reader
    from pbe_train.evaluation.held_out import check_fits
    from pbe_train.evaluation.recognition import CANDIDATES, draw_questions, evaluate, make_table
    from pbe_train.model.pipeline import SamplingSettings, check_guidance

    with Progress("loading the model"):
        run = load_run(options.model)
    check_guidance(run, options.guidance)
    reader = open_reader(run.settings.over(options.dataset, options.storage), options.split)
    check_fits(run, reader)
    trained_on = reader.info.fingerprint == run.identity.dataset_fingerprint and options.split == TRAIN_SPLIT
    if trained_on:
        print(f"warning: the run was trained on split `{options.split}`; these scores say nothing of new photos", file=sys.stderr)
    with Progress("reading the labels"):
        questions = draw_questions(reader, options.count, options.seed)
    how = SamplingSettings(options.guidance, options.steps, options.scheduler)
    scores = evaluate(run, reader, questions, how, options.seed, options.batch)
    Console().print(make_table(scores, run.step, options.guidance))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "model": str(options.model),
            "step": run.step,
            "dataset_fingerprint": reader.info.fingerprint,
            "split": options.split,
            "trained_on": trained_on,
            "judge": f"class token of model.encoder {run.settings.model.encoder}, which also conditions the model",
            "seed": options.seed,
            "sampling": asdict(how),
            "chance": 1 / CANDIDATES,
            "scores": {name: asdict(score) for name, score in scores.items()},
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
