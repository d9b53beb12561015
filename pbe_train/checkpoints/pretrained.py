"""A pretrained model in one form, whatever layout it came in; files of tensors, which run no code; strict loading.

An export's metadata says what no tensor does: how its model is to be used, how deep it is, its licence. A file in the LDM layout
carries it inside, so that a copy of the file paints the same; a folder has it in export.json.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_core.errors import InputError
from pbe_core.weight_files import read_index, weights_format, weights_of
from pbe_core.words import number_of
from pbe_train.checkpoints.key_mapping import Tensors, bare_encoder_names, starting_with
from pbe_train.config import MaskChannel
from pbe_train.model.pipeline import Run

METADATA_FILE = "export.json"
METADATA_KEY = "paint_by_example"
"""Key of the metadata (JSON) in a safetensors file, or beside the `state_dict` of a pickle."""


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model. Its tensors are backed by its files and have the names of today's diffusers."""

    where: str
    """Its folder or file."""
    kind: str
    """Its name and layout: `Stable Diffusion, diffusers layout`, `Stable Diffusion 2 inpainting, original layout`, `Paint by
    Example, ...`, `run of this trainer`."""
    unet_config: dict[str, Any]
    """diffusers' configuration of its U-Net."""
    unet: Tensors
    conditioner: Tensors | None = None
    """What stands between vision encoder and U-Net: mapper, normalisation, projection, null vector. Null: it has none."""
    encoder: Tensors | None = None
    """Its vision encoder, under bare names (those of transformers 5)."""
    encoder_config: CLIPVisionConfig | None = None
    encoder_sha256: str | None = None
    """In place of an encoder: the hash of the one it was trained with."""
    vae: Tensors | None = None
    vae_sha256: str | None = None
    """In place of a VAE: the hash of the one it was trained with."""
    prediction: str | None = None
    """What its U-Net predicts, where it says so, in diffusers' words."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """The noise schedule of its training, where it says so, in diffusers' words."""
    by_words: bool = False
    """Whether it says that it paints by words: a text encoder is beside it, or it is called an inpainting model."""
    mask_channel: MaskChannel = "keep"
    """What 1 means in the mask that its U-Net sees, if it sees one."""
    trained_with: dict[str, Any] = field(default_factory=dict)
    """Settings of `train.model` that it was trained with, where it says so."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Metadata of an export of this project; empty for any other model."""
    aside: dict[str, int] = field(default_factory=dict)
    """What it has and a training has no use for: what it is -> tensors; 0 for what was not opened."""


class ModelTensors(NamedTuple):
    """The tensors of a trained model by part, contiguous and on the CPU, under names of diffusers and transformers 5."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    encoder: dict[str, Tensor]
    """The vision encoder, under bare names."""
    conditioner: dict[str, Tensor]
    """Mapper, normalisation, projection, null vector."""


def tensors_of(run: Run) -> ModelTensors:
    """All tensors of a run that painting needs."""
    state = run.model.conditioner.state_dict()
    conditioner = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    parts = (run.model.unet.state_dict(), run.vae.state_dict(), bare_encoder_names(starting_with("model.", state)), conditioner)
    return ModelTensors(*({name: tensor.detach().cpu().contiguous() for name, tensor in part.items()} for part in parts))


class TensorFile(NamedTuple):
    """The content of a file of weights."""

    tensors: dict[str, Tensor]
    """By name, backed by the file."""
    metadata: dict[str, Any]
    """Metadata of an export of this project; empty for any other file."""
    others: list[str]
    """Names of what is there beside named tensors, as a training leaves it: step, hyper-parameters, optimizer."""


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
            return TensorFile(load_file(path), _parse_metadata(notes.get(METADATA_KEY)), [])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: a safetensors file that is damaged or cut short ({error})") from None
    # PyTorch cannot map its older format, and takes a file of that name for one of safetensors.
    content = _unpickle(path, mapped=kind == "zip" and path.suffix != ".safetensors")
    whole = content if isinstance(content, Mapping) else {}
    inside = whole.get("state_dict")
    named = inside if isinstance(inside, Mapping) else whole
    tensors = {name: value for name, value in named.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no named tensors; give a checkpoint with a `state_dict`")
    others = {str(name) for name in named if name not in tensors}
    if named is not whole:
        others |= {str(name) for name in whole if name != "state_dict"}
    return TensorFile(tensors, _parse_metadata(whole.get(METADATA_KEY)), sorted(others - {METADATA_KEY}))


class _Stub:
    """Stands in for a class of another package: takes any arguments and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


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
    (r"collections\.defaultdict", lambda *_: {}),
)


def _unpickle(path: Path, mapped: bool) -> Any:
    stubs: list[Any] = []
    while True:
        try:
            # PyTorch warns of protocols that it goes on to refuse.
            with torch.serialization.safe_globals(stubs), warnings.catch_warnings(action="ignore"):  # type: ignore[no-untyped-call]
                if mapped:
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # Whatever a reader of a stranger's bytes raises is the file's.
            refused = re.search(r"GLOBAL (\S+) ", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if refused is None:
                cause = " ".join(str(error).split())[:160] or type(error).__name__
                raise InputError(f"{path}: a damaged file of PyTorch, or cut short ({cause})") from None
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            stub = next((stub for pattern, stub in STUBS if re.fullmatch(pattern, name)), None)
            if stub is None or (stub, name) in stubs:
                raise InputError(
                    f"{path}: a pickle of more than tensors, which could run code when loaded: it names {name}; where you trust "
                    "it, load it with its own packages, save its state_dict as .safetensors, and give that file"
                ) from None
            # PyTorch names the next strange class only when it knows this one.
            stubs.append((stub, name))


def read_weights(folder: Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of the network in a folder, from the first of these files that is there, in one piece or in shards.

    Raises:
        InputError: none of them is there, one is damaged, or a shard is missing.
    """
    found = weights_of([path.name for path in folder.iterdir()] if folder.is_dir() else [], files)
    if not found:
        raise InputError(f"{folder}: no weights here ({', '.join(files)}, or shards of these with their index)")
    if found[0] in files:
        return read_tensor_file(folder / found[0]).tensors
    shards = read_index(folder / found[0])
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= read_tensor_file(shard).tensors
    if lost := sorted(shards.keys() - tensors.keys()):
        raise InputError(f"{folder / found[0]}: {number_of(len(lost), 'tensor')} in no shard, first {lost[0]}")
    return tensors


@torch.no_grad()
def strict_load(target: Mapping[str, Tensor], tensors: Tensors, where: str, part: str) -> None:
    """Copy all of `tensors` into all of `target`.

    Args:
        target: of one part of the model.
        tensors: of the same names and shapes, in any precision.
        where: file or folder of the tensors, for messages.
        part: what they are, for messages.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape; then nothing was copied.
    """
    reshaped = [
        f"{name} {list(tensors[name].shape)}, not {list(target[name].shape)}"
        for name in target.keys() & tensors.keys()
        if target[name].shape != tensors[name].shape
    ]
    faults = {
        "missing": target.keys() - tensors.keys(),
        "unexpected": tensors.keys() - target.keys(),
        "of another shape": reshaped,
    }
    listed = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in faults.items()
        if names
    ]
    if listed:
        raise InputError(f"{where}: the tensors of its {part} do not fit: {'; '.join(listed)}")
    for name, tensor in tensors.items():
        target[name].copy_(tensor)


def check_depth(where: str, blocks: int, layers: int, metadata: Mapping[str, Any]) -> None:
    """Refuse a model that is not whole, which would otherwise be taken for a shallower one.

    Args:
        where: file or folder, for messages.
        blocks: of its conditioner.
        layers: of its vision encoder.
        metadata: how deep it says it is; by default the published programs' rule, (layers + 1) // 5 blocks.

    Raises:
        InputError: it has other depths.
    """
    expected = metadata.get("conditioner_blocks", (layers + 1) // 5), metadata.get("encoder_layers", layers)
    if (blocks, layers) != expected:
        raise InputError(
            f"{where}: its conditioner has {number_of(blocks, 'block')} and its vision encoder {number_of(layers, 'layer')}, "
            f"where {expected[0]} and {expected[1]} belong together: it is cut short or of another kind"
        )


def _parse_metadata(text: object) -> dict[str, Any]:
    """The metadata in a value of `METADATA_KEY`; empty where it is none."""
    try:
        content = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def metadata_beside(folder: Path, file: str) -> dict[str, Any]:
    """The content of export.json in a folder; empty where it is not about `file` (weights, by their path in the folder)."""
    try:
        metadata = json.loads((folder / METADATA_FILE).read_bytes())
        mine = metadata["files"][file]["bytes"] == (folder / file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return metadata if mine else {}
