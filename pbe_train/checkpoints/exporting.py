"""Writing one export of a run, in the layout that was asked for: weights, record and card."""

from pathlib import Path

from pbe_train.checkpoints.card import read_evaluations, write_card
from pbe_train.checkpoints.diffusers_export import check_diffusers, write_diffusers
from pbe_train.checkpoints.export_folder import new_export
from pbe_train.checkpoints.from_pretrained import record_of
from pbe_train.checkpoints.ldm_export import check_original, write_original
from pbe_train.checkpoints.load_report import read_account
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint
from pbe_train.model.pipeline import Run


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
