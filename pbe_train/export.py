"""Export a run: to diffusers' pipeline, to the original code's checkpoint, or as this program's own weights without all else.

python -m pbe_train.export --model runs/first --out exported --format diffusers
python -m pbe_train.export --model runs/first --out exported/model.ckpt --format ldm
python -m pbe_train.export --model runs/first --out exported --format weights
python -m pbe_train.export --model runs/lora --out exported --format lora
python -m pbe_train.export --model runs/lora --out exported --format diffusers --merge
python -m pbe_train.export --model runs/first --merge --lora a.safetensors:0.8 --out exported --format diffusers
"""

import argparse
import sys
from pathlib import Path

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress


def main() -> None:
    """Load the run, check that the layout can hold it, write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="run folder of train.py, or one of its checkpoints; with --lora any model",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; for ldm also FOLDER/NAME.ckpt or FOLDER/NAME.safetensors"
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "ldm", "weights", "lora", "kohya"),
        required=True,
        help="whose layout; `weights` is our own; `lora` (diffusers') and `kohya` hold a LoRA alone",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights, where there are any, or plain"
    )
    parser.add_argument("--merge", action="store_true", help="write a whole model: the base with the LoRA in its weights")
    parser.add_argument(
        "--lora", nargs="+", default=[], metavar="LORA[:WEIGHT]", help="with --merge: LoRAs to add to --model, in any layout"
    )
    options = parser.parse_args()
    alone = options.format in ("lora", "kohya")
    if alone and (options.merge or options.lora):
        raise InputError(f"--format {options.format}: holds a LoRA alone; --merge and --lora are for whole models")
    if options.lora and not options.merge:
        raise InputError("--lora: an export holds one model; give --merge, too, to write them into its weights")
    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.checkpoints.export import check_free
    from pbe_train.checkpoints.lora_export import export_lora

    folder, file = place(options.out, options.format)
    check_free(folder)
    if alone:
        with Progress("exporting"):
            step = export_lora(options.model, folder, options.format, options.weights)
    else:
        step = export_whole(options, folder, file)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: step {step}, {size / 1e6:.1f} MB; how to load it: {folder / 'README.md'}")


def export_whole(options: argparse.Namespace, folder: Path, file: str) -> int:
    """Export a model with all its weights; returns the step of its run.

    Raises:
        InputError: the run trains a LoRA, and nothing says that it is to be merged; or as `load_run` and `export`.
    """
    from pbe_train.checkpoints.export import export
    from pbe_train.checkpoints.from_pretrained import load_model, load_run
    from pbe_train.checkpoints.lora_export import has_lora
    from pbe_train.checkpoints.lora_merge import merge_loras

    if has_lora(options.model) != options.merge and not options.lora:
        if options.merge:
            raise InputError(f"{options.model}: all weights are its own, there is nothing to merge; name LoRAs by --lora")
        raise InputError(
            f"{options.model}: trains a LoRA, and --format {options.format} holds a whole model; give --merge to write the base "
            "with the LoRA in it, or --format lora (or kohya) to write the LoRA alone"
        )
    with Progress("loading the model"):
        load = load_model if options.lora else load_run
        run = load(options.model, options.weights, device="cpu")
        merged = merge_loras(run, options.lora)
    for note in (note for lora in merged for note in lora.notes):
        print(note, file=sys.stderr)
    with Progress("exporting"):
        export(run, options.model, folder, file, options.format, options.weights, merged)
    return run.step


def place(out: Path, form: str) -> tuple[Path, str]:
    """The folder of the export, and the name of its file (of `ldm`; by its ending in `out`, or safetensors).

    Raises:
        InputError: a file where a folder is needed.
    """
    from pbe_train.checkpoints.ldm_format import DEFAULT_NAME, SUFFIXES

    if out.suffix not in SUFFIXES:
        return out, DEFAULT_NAME
    if form != "ldm":
        raise InputError(f"--out {out}: --format {form} writes a folder; give a name without {out.suffix}")
    return out.parent, out.name


if __name__ == "__main__":
    run_program(main)
