"""What a file of weights is, by its content: names may be wrong, and downloads that fail leave files behind.

    safetensors   8 bytes: length of a JSON header, the header, the tensors
    PyTorch zip   what torch.save writes today: a zip archive that holds NAME/data.pkl
    pickle        what torch.save wrote before 1.6

Everything else is refused by what it is. Only the first bytes are read here; who loads the file sees whether it is whole.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbe_core.errors import InputError
from pbe_core.words import number_of

if TYPE_CHECKING:  # Who only looks for files does not wait for PyTorch.
    from torch import Tensor

# In this order: half precision (`variant="fp16"` of the libraries) where there is no other, pickles where there is nothing else.
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
TRANSFORMERS_FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")

# Counts of training steps, which some files have and others lack; nothing is computed with them.
COUNTERS = ".num_batches_tracked"

_LFS = b"version https://git-lfs.github.com/spec/"
# Bytes; the same limit as in the safetensors library.
_HEADER_LIMIT = 100_000_000

Format = Literal["safetensors", "zip", "pickle"]


def weights_format(path: Path) -> Format:
    """How the tensors in a file are stored, by its content alone.

    Raises:
        InputError: it cannot be read, or is another kind of file, with what it is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    # A text that has { as its ninth character is no safetensors file: its first eight, as a number, are above the limit.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_LIMIT:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    raise InputError(f"{path}: {_other_kind(head)}")


def weights_of(names: Collection[str], files: tuple[str, ...]) -> list[str]:
    """The files that hold the weights of a network: one, or an index and its shards; none where they are not there.

    Args:
        names: of all files in the network's folder.
        files: names for weights in one file, the best first. Of each, its shards count as it does.
    """
    for file in files:
        if file in names:
            return [file]
        stem, variant, ending = re.fullmatch(r"(.+?)(\.fp16)?\.(\w+)", file).groups("")  # type: ignore[union-attr]
        index = f"{stem}.{ending}.index{variant}.json"
        if index in names:
            # Libraries have put `fp16` before the number of a shard, and behind it.
            number, half = r"-\d+-of-\d+", re.escape(variant)
            shard = re.compile(rf"{re.escape(stem)}({half}{number}|{number}{half})\.{ending}")
            return [index, *sorted(filter(shard.fullmatch, names))]
    return []


def read_index(path: Path) -> dict[str, Path]:
    """The index of a network in shards: name of a tensor -> the file that holds it.

    Raises:
        InputError: damaged, or it names a file that is not there or not in its own folder.
    """
    try:
        content = json.loads(path.read_bytes())["weight_map"]
        shards = {str(name): path.parent / shard for name, shard in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: no index of shards (`weight_map`), or damaged") from None
    for shard in sorted(set(shards.values())):
        if shard.parent != path.parent:
            raise InputError(f"{path}: names {shard}, which is not in its own folder")
        if not shard.is_file():
            raise InputError(f"{path}: its shard {shard.name} is not there")
    return shards


def _other_kind(head: bytes) -> str:
    """What a file is that holds no weights."""
    if not head:
        return "is empty"
    if head.startswith(_LFS):
        return "a pointer of Git LFS and not the file; `git lfs pull` in its repository fetches it"
    text = head.decode("utf-8-sig", "ignore").strip()
    if re.match(r"<(!doctype|html|head|body|\?xml)", text, re.IGNORECASE):
        return "an HTML page (to log in, to confirm the download, or an error) and no weights; download the file itself"
    return f"no file of weights (it begins with {head[:16]!r}); give .safetensors or a checkpoint of PyTorch"


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file that others may read where they may read the files beside it.

    safetensors 0.8 makes its files readable by their owner alone, whatever the umask is: a model in a folder that a group shares
    would be nobody else's.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_finite(tensors: Mapping[str, "Tensor"], where: str) -> None:
    """Raises InputError: a number in the weights is infinite or none at all; all that is computed with them would be, too."""
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise InputError(
            f"{where}: {number_of(len(bad), 'tensor')} with numbers that are not finite, first {bad[0]}; get the file again"
        )
