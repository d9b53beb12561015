"""Files of tensors, mapped into memory: what is not read takes none. Nothing that is loaded can run code."""

import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.weight_files import read_index, weights_format, weights_of
from pbe_core.words import number_of
from pbe_train.checkpoints.pretrained import METADATA_KEY, parse_metadata


class TensorFile(NamedTuple):
    """The content of a file of weights."""

    tensors: dict[str, Tensor]
    """By name, backed by the file."""
    metadata: dict[str, Any]
    """Metadata of an export of this project; empty for any other file."""
    others: list[str]
    """Names of what is there beside named tensors, as a training leaves it: step, hyper-parameters, optimizer."""


class _Stub:
    """Stands in for a class of another package: takes any arguments and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _stub_of_defaultdict(*_: object) -> dict[Any, Any]:
    return {}


# Checkpoints of Lightning, as those of Stable Diffusion and Paint by Example are, hold more than tensors: the class of the
# callback that saved them, numbers of numpy (the learning rate), and hyper-parameters in OmegaConf's containers or a namespace.
# A stub stands in for each of these names, so that the files are read without these packages, and nothing of them runs.
# Other names are refused.
STUBS: tuple[tuple[str, Callable[..., object]], ...] = (
    (r"(pytorch_lightning|lightning|lightning_fabric)\..+", _Stub),
    (r"omegaconf\..+", _Stub),
    (r"numpy(\._?core\.multiarray\.(scalar|_reconstruct)|\.ndarray|\.dtype|\.dtypes\.\w+)", _Stub),
    (r"_codecs\.encode|typing\.Any|argparse\.Namespace|pathlib\.\w+", _Stub),
    (r"builtins\.(dict|list|tuple|set|str|int|float|bool|bytes|complex)", _Stub),
    (r"collections\.defaultdict", _stub_of_defaultdict),
)

WAY_OUT = "where you trust it, load it with its own packages, save its state_dict as .safetensors, and give that file"


def read_tensor_file(path: Path) -> TensorFile:
    """The named tensors of a .safetensors file or of a pickle of PyTorch, whatever its name is, and what else is in it.

    A pickle may hold them under `state_dict`, beside what a training left there.

    Raises:
        InputError: another kind of file, a damaged one, one that only code could read, or no named tensors in it.
    """
    kind = weights_format(path)
    if kind == "safetensors":
        try:
            with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
                notes = opened.metadata() or {}
            return TensorFile(load_file(path), parse_metadata(notes.get(METADATA_KEY)), [])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: a damaged safetensors file ({_line(error)})") from None
    content = _unpickle(path, in_zip=kind == "zip")
    whole = content if isinstance(content, Mapping) else {}
    inside = whole.get("state_dict")
    named = inside if isinstance(inside, Mapping) else whole
    tensors = {name: value for name, value in named.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no named tensors; give a checkpoint with a `state_dict`")
    others = {str(name) for name in named if name not in tensors}
    if named is not whole:
        others |= {str(name) for name in whole if name != "state_dict"}
    return TensorFile(tensors, parse_metadata(whole.get(METADATA_KEY)), sorted(others - {METADATA_KEY}))


def read_weights(folder: Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of the network in a folder, from the first of these files that is there, in one piece or in shards.

    Raises:
        InputError: none is, or it cannot be read, or a shard is missing or lacks a tensor.
    """
    found = weights_of([path.name for path in folder.iterdir()] if folder.is_dir() else [], files)
    if not found:
        raise InputError(f"{folder}: no weights here: none of {', '.join(files)}, nor an index of their shards")
    if not found[0].endswith(".json"):
        return read_tensor_file(folder / found[0]).tensors
    shards = read_index(folder / found[0])
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= read_tensor_file(shard).tensors
    if lost := sorted(shards.keys() - tensors.keys()):
        raise InputError(f"{folder / found[0]}: {number_of(len(lost), 'tensor')} in no shard, first {lost[0]}")
    return tensors


def _unpickle(path: Path, in_zip: bool) -> Any:
    try:
        names = _named_classes(path)
        stubs: list[Any] = [(stub, name) for name in names for pattern, stub in STUBS if re.fullmatch(pattern, name)]
        # It warns of protocols that it goes on to refuse.
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings(action="ignore"):  # type: ignore[no-untyped-call]
            if in_zip and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            # The older format cannot be mapped; and PyTorch takes a file of that name for one of safetensors.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        strange = _strange_names(names - {name for _, name in stubs}, error)
        named = f": it names {strange}" if strange else ""
        raise InputError(f"{path}: a pickle of more than tensors, which could run code when loaded{named}; {WAY_OUT}") from None
    except Exception as error:  # Whatever a reader of a stranger's bytes raises is the file's.
        raise InputError(f"{path}: a damaged file of PyTorch, or cut short ({_line(error)})") from None


def _named_classes(path: Path) -> set[str]:
    """Classes and functions that a file of torch.save names, as `module.name`. Nothing of it is made, imported or run.

    Raises:
        InputError: a pickle of another program.
        Exception: of any kind, where the file is damaged.
    """
    names: set[str] = set()
    for opcodes in _pickles_in(path):
        for opcode, argument, _ in opcodes:
            # Later protocols, which torch.save does not write, have another opcode for it.
            if opcode.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                # Python 3's name for what a pickle of protocol 2 calls by that of Python 2.
                names.add(".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))))
    return names


def _pickles_in(path: Path) -> Iterator[Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]]:
    """The pickles of a file of torch.save: that of its zip archive, or those that its older format begins with."""
    if weights_format(path) == "zip":
        with zipfile.ZipFile(path) as archive:
            inner = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(inner) as file:
                yield pickletools.genops(file)  # type: ignore[arg-type]
        return
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with path.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise InputError(f"{path}: a pickle that torch.save has not written, and that could run code when loaded; {WAY_OUT}")
        # The version, the machine's sizes, and the object.
        for _ in range(3):
            yield pickletools.genops(file)


def _strange_names(names: set[str], error: Exception) -> str:
    """The classes that stand in the way of reading a pickle."""
    # PyTorch allows some of its own, and these.
    strange = sorted(name for name in names if not re.fullmatch(r"torch\..*|collections\.(OrderedDict|Counter)", name))
    if not strange and (refused := re.search(r"GLOBAL (\S+) ", str(error))):
        strange = [refused[1]]
    return ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
