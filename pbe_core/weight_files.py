"""What a file of weights is, by its content: names may be wrong, and downloads that fail leave files behind.

    safetensors   8 bytes: length of a JSON header, the header, the tensors
    PyTorch zip   what torch.save writes today: a zip archive that holds NAME/data.pkl
    pickle        what torch.save wrote before 1.6

Everything else is refused by what it is. Nothing is decoded here beyond headers.
"""

import json
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, Literal

from pbe_core.errors import InputError
from pbe_core.words import number_of

# In this order: half precision (`variant="fp16"` of the libraries) where there is no other, pickles where there is nothing else.
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
TRANSFORMERS_FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")

_LFS = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"
_HEADER_LIMIT = 100_000_000
"""Bytes; the same limit as in the safetensors library."""

Format = Literal["safetensors", "zip", "pickle"]


def weights_format(path: Path) -> Format:
    """How the tensors in a file are stored, by its content alone.

    A safetensors file is checked to be as long as its header says, and an archive to be one of PyTorch.

    Raises:
        InputError: it cannot be read, or is another kind of file, with what it is.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
            if head.startswith(_ZIP):
                return _check_zip(path, file)
            if _is_safetensors(head):
                return _check_safetensors(path, file, size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head[:1] == b"\x80":
        return "pickle"
    raise InputError(f"{path}: {_other_kind(head, size)}")


def weights_of(names: Collection[str], files: tuple[str, ...]) -> list[str]:
    """The files that hold the weights of a network: one, or an index and its shards; none where they are not there.

    Args:
        names: of all files in the network's folder.
        files: names for weights in one file, the best first. Of each, its shards count as it does.
    """
    for file in files:
        if file in names:
            return [file]
        index = index_name(file)
        if index in names:
            return [index, *sorted(name for name in names if _is_shard(name, file))]
    return []


def index_name(file: str) -> str:
    """The index of the shards of a file: `x.safetensors` -> `x.safetensors.index.json`; fp16 stands behind `index`."""
    stem, variant, ending = re.fullmatch(r"(.+?)(\.fp16)?\.(\w+)", file).groups("")  # type: ignore[union-attr]
    return f"{stem}.{ending}.index{variant}.json"


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
        if shard.parent != path.parent or shard.name in ("", ".."):
            raise InputError(f"{path}: names {shard}, which is not in its own folder")
        if not shard.is_file():
            raise InputError(f"{path}: its shard {shard.name} is not there")
    return shards


def _is_shard(name: str, file: str) -> bool:
    """Whether a name is that of a shard of `file`; libraries have put `fp16` before the number, and behind it."""
    stem, variant, ending = re.fullmatch(r"(.+?)(\.fp16)?\.(\w+)", file).groups("")  # type: ignore[union-attr]
    found = re.fullmatch(rf"{re.escape(stem)}(\.fp16)?-\d+-of-\d+(\.fp16)?\.{ending}", name)
    return found is not None and (found[1] or found[2] or "") == variant


def _is_safetensors(head: bytes) -> bool:
    # A text that has { as its ninth character does not pass: its first eight, read as a number, are above the limit.
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 2 <= length <= _HEADER_LIMIT


def _check_safetensors(path: Path, file: BinaryIO, size: int) -> Format:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if size < start:
        raise InputError(f"{path}: a safetensors file that is cut short, within its header")
    try:
        header = json.loads(file.read(length))
        end = max((start + value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=start)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise InputError(f"{path}: a safetensors file with a damaged header") from None
    if size != end:
        what = "cut short" if size < end else "damaged"
        raise InputError(f"{path}: a safetensors file that is {what}: {size:,} of {end:,} bytes")
    return "safetensors"


def _check_zip(path: Path, file: BinaryIO) -> Format:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise InputError(f"{path}: a zip archive (as torch.save writes) that is cut short: its end is missing") from None
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        raise InputError(f"{path}: a TorchScript archive, which is a program; give a checkpoint of weights")
    if "data.pkl" not in inside:
        first = f", first {names[0]}" if names else ""
        raise InputError(
            f"{path}: a zip archive of {number_of(len(names), 'file')}{first}; unpack it, and give the file of weights in it"
        )
    return "zip"


def _other_kind(head: bytes, size: int) -> str:
    """What a file is that holds no weights."""
    if not size:
        return "is empty"
    if head.startswith(_LFS):
        found = re.search(rb"\nsize (\d+)", head)
        of = f" to a file of {int(found[1]):,} bytes" if found else ""
        return f"a pointer of Git LFS{of}, not that file; `git lfs pull` in its repository fetches it"
    if not head.strip(b"\0"):
        return "begins with zeros, as a download that was stopped leaves it"
    text = head.decode("utf-8-sig", "ignore").strip()
    if re.match(r"<(!doctype|html|head|body|\?xml)", text, re.IGNORECASE):
        return "an HTML page (to log in, to confirm the download, or an error) and no weights; download the file itself"
    if 2 * len(text) > len(head) and not re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return f"a text, which begins with {text[:40]!r}, and no weights"
    return f"no file of weights (it begins with {head[:8]!r}); give .safetensors or a checkpoint of PyTorch"
