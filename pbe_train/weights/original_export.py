"""A trained run as one file in the original code's layout."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from pbe_train.editing.sampling import Run
from pbe_train.weights.original_file import original_tensors
from pbe_train.weights.trained import tensors_of
from schemas.errors import InputError

SUFFIXES = (".safetensors", ".ckpt")
DEFAULT_NAME = "model.safetensors"


def check_original(run: Run) -> None:
    """Refuse a run that the original code could not paint with.

    Raises:
        InputError: with the reason.
    """
    if run.settings.model.tokens != "class":
        raise InputError(
            "--format ldm: the run conditions on all tokens of the encoder (model.tokens: all), the original code on the class "
            "token alone; such a run paints with pbe_train.sample only"
        )
    if run.settings.prediction != "epsilon":
        raise InputError(
            f"--format ldm: the run predicts {run.settings.prediction}, the original code can sample from predicted noise only; "
            "export with --format diffusers"
        )


def write_original(run: Run, path: Path) -> None:
    """Write the file: .safetensors, or .ckpt with the tensors under `state_dict`.

    Raises:
        InputError: the run holds tensors that the original code has no name for.
    """
    parts = tensors_of(run)
    config = run.identity.unet
    attention = tuple("CrossAttn" in kind for kind in config["down_block_types"])
    tensors = original_tensors(*parts, attention=attention, layers=config["layers_per_block"])
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": run.step}, path)
