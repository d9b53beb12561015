"""Files of tensors, mapped into memory: what is not read takes none. Nothing that is loaded can run code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pbe_train.weights.record import KEY, parse_record
from schemas.errors import InputError

PICKLES = (".ckpt", ".bin", ".pt", ".pth")


class _ByNameOnly:
    """In place of what a published file names beside its tensors, and that nothing here has need of.

    It takes what it is called with and does nothing.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Checkpoints of Lightning, as those of Stable Diffusion and Paint by Example are, name the class of the callback that saved them,
# as a key of a dictionary, and hold numbers of numpy, among them the learning rate. With an empty class of each name they can be
# read without these packages, and without running anything of them.
NAMED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "_codecs.encode",
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of a pickle of PyTorch, as `read_recorded` reads them.

    Raises:
        InputError: they cannot be read.
    """
    return read_recorded(path)[0]


def read_recorded(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors of a .safetensors file or of a pickle of PyTorch, backed by the file, and an export's record in it.

    A pickle may hold them under `state_dict`, beside what a training left there.

    Raises:
        InputError: another kind of file, a damaged one, one that only code could read, or no named tensors in it.
    """
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = load_file(path)
            with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
                notes = opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a safetensors file, or cut short ({_line(error)}); get the file again") from None
        return tensors, parse_record(notes.get(KEY))
    if path.suffix not in PICKLES:
        raise InputError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)}; give one of these, or a folder")
    content = _unpickle(path)
    record = parse_record(content.get(KEY)) if isinstance(content, Mapping) else {}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds no named tensors; give a checkpoint with a `state_dict`")
    odd = next((name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)), None)
    if odd is not None:
        raise InputError(f"{path}: `{odd}` is no tensor; give a checkpoint with a `state_dict` of named tensors")
    return dict(content), record


def _unpickle(path: Path) -> Any:
    stubs: list[Any] = [(_ByNameOnly, name) for name in NAMED]
    try:
        with torch.serialization.safe_globals(stubs):  # type: ignore[no-untyped-call]
            # PyTorch's older format is not a zip file and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        cause = next((line for line in str(error).splitlines() if "GLOBAL" in line), _line(error))
        raise InputError(
            f"{path}: a pickle of more than tensors, which could run code when loaded ({' '.join(cause.split())[:160]}); "
            "where you trust it, load it and save its state_dict as .safetensors, and give that file"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a file of PyTorch, or cut short ({_line(error)}); get the file again") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
