"""Export a run: to diffusers' pipeline, to the original code's checkpoint, or as this program's own weights without all else.

python -m pbe_train.export --model runs/first --out exported --format diffusers
python -m pbe_train.export --model runs/first --out exported/model.ckpt --format ldm
python -m pbe_train.export --model runs/first --out exported --format weights
"""

import argparse
from pathlib import Path

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress


def main() -> None:
    """Load the run, check that the layout can hold it, write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="run folder that train.py wrote, or one of its checkpoints")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; for ldm also FOLDER/NAME.ckpt or FOLDER/NAME.safetensors"
    )
    parser.add_argument(
        "--format", choices=("diffusers", "ldm", "weights"), required=True, help="whose layout; `weights` is our own"
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights, where there are any, or plain"
    )
    options = parser.parse_args()
    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.checkpoints.export import check_free, export
    from pbe_train.checkpoints.from_pretrained import load_run

    folder, file = place(options.out, options.format)
    check_free(folder)
    with Progress("loading the model"):
        run = load_run(options.model, options.weights, device="cpu")
    with Progress("exporting"):
        export(run, options.model, folder, file, options.format, options.weights)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: step {run.step}, {size / 1e6:.1f} MB; how to load it: {folder / 'README.md'}")


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
