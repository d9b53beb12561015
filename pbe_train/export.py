"""Export a run to a layout that others load: diffusers' pipeline, or the original code's checkpoint.

python -m pbe_train.export --model runs/first --out exported --format diffusers
python -m pbe_train.export --model runs/first --out exported/model.ckpt --format ldm
"""

import argparse
from pathlib import Path

from pbe_train.editing.sampling import Run, load_run
from pbe_train.training.checkpoint import locate_checkpoint
from pbe_train.weights.account import read_account
from pbe_train.weights.card import read_evaluations, write_card
from pbe_train.weights.diffusers_export import check_diffusers, write_diffusers
from pbe_train.weights.export_folder import check_free, new_export
from pbe_train.weights.original_export import DEFAULT_NAME, SUFFIXES, check_original, write_original
from pbe_train.weights.paintable import record_of
from schemas.errors import InputError, run_program


def main() -> None:
    """Load the run, check that the layout can hold it, write."""
    options = parse_options()
    folder, file = place(options.out, options.format)
    check_free(folder)
    run = load_run(options.model, options.weights, device="cpu")
    export(run, options.model, folder, file, options.format, options.weights)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: step {run.step}, {size / 1e6:.1f} MB; how to load it: {folder / 'README.md'}")


def export(run: Run, model: Path, folder: Path, file: str, form: str, weights: str) -> None:
    """Write one export.

    Args:
        run: loaded from `model`.
        model: run folder or checkpoint folder.
        folder: of the export.
        file: name of the file in it, for `ldm`.
        form: `diffusers` or `ldm`.
        weights: which weights were loaded, where the run keeps both.

    Raises:
        InputError: the layout cannot hold this run, or the folder holds something else.
    """
    (check_diffusers if form == "diffusers" else check_original)(run)
    checkpoint = locate_checkpoint(model)
    assert checkpoint
    kept = "ema" if weights == "ema" and (checkpoint / "ema.safetensors").is_file() else "model"
    start = read_account(checkpoint)
    record = record_of(run, start)
    told = {"format": form, "step": run.step, "weights": kept, "run": str(model), **record}
    name = folder.name if form == "diffusers" else file
    with new_export(folder, told) as partial:
        if form == "diffusers":
            write_diffusers(run, partial)
        else:
            write_original(run, partial / file, record)
        evaluations = read_evaluations(checkpoint.parent.parent)
        card = write_card(run, kept, form, name, evaluations, start)
        (partial / "README.md").write_text(card, encoding="utf-8")


def place(out: Path, form: str) -> tuple[Path, str]:
    """The folder of the export, and the name of its file (of `ldm`; by its ending in `out`, or safetensors).

    Raises:
        InputError: a file where a folder is needed.
    """
    if out.suffix not in SUFFIXES:
        if out.suffix in (".pt", ".pth", ".bin"):
            raise InputError(f"--out {out}: give a folder, or a name that ends in {' or '.join(SUFFIXES)}")
        return out, DEFAULT_NAME
    if form != "ldm":
        raise InputError(f"--out {out}: --format {form} writes a folder; give a name without {out.suffix}")
    return out.parent, out.name


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="run folder that train.py wrote, or one of its checkpoints")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; for ldm also FOLDER/NAME.ckpt or FOLDER/NAME.safetensors"
    )
    parser.add_argument("--format", choices=("diffusers", "ldm"), required=True, help="whose layout")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights, where there are any, or plain"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
