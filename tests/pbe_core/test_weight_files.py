"""A file of weights is what its content says, whatever its name is; any other file is refused by what it is."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pbe_core.errors import InputError
from pbe_core.vae import load_vae
from pbe_core.weight_files import DIFFUSERS_FILES, TRANSFORMERS_FILES, read_index, weights_format, weights_of
from pbe_train.checkpoints.pretrained import read_tensor_file
from tests.conftest import VAE

TENSORS = save({"a": torch.ones(40)})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4265380512\n"


def saved(*, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(40)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


OTHERS = {
    "empty": (b"", "is empty"),
    "pointer of Git LFS": (POINTER, "a pointer of Git LFS .*`git lfs pull`"),
    "page": (b"\n<!DOCTYPE html><html><title>Log in</title>", "an HTML page .*download the file itself"),
    "page without doctype": (b"\xef\xbb\xbf<html lang='en'>\n", "an HTML page"),
    "answer of a bucket": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an HTML page .* or an error"),
    "JSON": (b'{"metadata": {}, "weight_map": {}}', "no file of weights .*metadata"),
    "text": (b"Entry not found\n", r"no file of weights \(it begins with b'Entry not found"),
    "zeros": (bytes(100), "no file of weights"),
    "cut zip": (saved()[:-30], "a damaged file of PyTorch, or cut short"),
    "cut safetensors": (TENSORS[:-30], "a safetensors file that is damaged or cut short"),
    "cut header": (TENSORS[:30], "a safetensors file that is damaged or cut short"),
    "longer safetensors": (TENSORS + b"more", "a safetensors file that is damaged"),
    "damaged header": (TENSORS[:8] + b"{" * 50 + TENSORS[58:], "a safetensors file that is damaged"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_refused_by_what_they_are(what: str, tmp_path: Path):
    content, said = OTHERS[what]
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_tensor_file(tmp_path / name)
        caught.match(rf"{name}: {said}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"), [(TENSORS, "safetensors"), (saved(), "zip"), (saved(zipped=False), "pickle"), (save({}), "safetensors")]
)
def test_names_do_not_count(content: bytes, kind: str, tmp_path: Path):
    for name in ("model.ckpt", "model.safetensors", "model.bin", "model"):
        (tmp_path / name).write_bytes(content)
        assert weights_format(tmp_path / name) == kind
    with pytest.raises(InputError, match=r"nothing\.ckpt: cannot be read \(No such file"):
        weights_format(tmp_path / "nothing.ckpt")


def test_a_vae_whose_weights_are_none(tmp_path: Path):
    """As `git clone` leaves a model where Git LFS is not installed; a pickle under the name of safetensors; half a file."""
    (tmp_path / "config.json").write_bytes((Path(VAE) / "config.json").read_bytes())
    weights = tmp_path / DIFFUSERS_FILES[0]
    for content, said in (
        (POINTER, r"model\.safetensors: a pointer of Git LFS"),
        (saved(), r"model\.safetensors: a pickle under the name of safetensors"),
        ((Path(VAE) / DIFFUSERS_FILES[0]).read_bytes()[:-30], "cannot load a AutoencoderKL"),
    ):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=said):
            load_vae(str(tmp_path))
    with pytest.raises(InputError, match=r"model\.safetensors: is a file; give the folder of a AutoencoderKL"):
        load_vae(str(weights))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HALF = ["model.fp16-00001-of-00002.safetensors", "model-00002-of-00002.fp16.safetensors"]
PICKLES = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "config.json"], ["pytorch_model.bin"]),
        ([*SHARDS, *HALF, "model.safetensors.index.json"], ["model.safetensors.index.json", *SHARDS]),
        ([*HALF, "model.safetensors.index.fp16.json"], ["model.safetensors.index.fp16.json", *sorted(HALF)]),
        ([*PICKLES, *SHARDS], PICKLES),
        (SHARDS, []),
        (["flax_model.msgpack"], []),
    ],
)
def test_which_files_hold_the_weights(names: list[str], chosen: list[str]):
    assert weights_of(names, TRANSFORMERS_FILES) == chosen
    assert weights_of(names, DIFFUSERS_FILES) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"weight_map": ["a"]}', "no index of shards"),
        ("not JSON", "no index of shards"),
        (json.dumps({"weight_map": {"a": "../other.safetensors"}}), r"names .*\.\./other\.safetensors, which"),
        (json.dumps({"weight_map": {"a": "/etc/passwd"}}), "names /etc/passwd, which is not in"),
        (json.dumps({"weight_map": {"a": ".."}}), "is not"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), r"its shard gone\.safetensors is not there"),
    ],
)
def test_an_index_that_leads_nowhere(content: str, said: str, tmp_path: Path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    (tmp_path.parent / "other.safetensors").write_bytes(TENSORS)
    with pytest.raises(InputError, match=said):
        read_index(path)
