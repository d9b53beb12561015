"""A file of weights is what its content says, whatever its name is; any other file is refused by what it is."""

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pbe_core.errors import InputError
from pbe_core.vae import load_vae
from pbe_core.weight_files import DIFFUSERS_FILES, TRANSFORMERS_FILES, read_index, weights_format, weights_of
from tests.conftest import VAE

TENSORS = save({"a": torch.ones(40)})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4265380512\n"


def saved(*, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(40)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def zipped(**contents: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), data)
    return file.getvalue()


OTHERS = {
    "empty": (b"", "is empty"),
    "pointer of Git LFS": (POINTER, r"a pointer of Git LFS to a file of 4,265,380,512 bytes.*`git lfs pull`"),
    "page": (b"\n<!DOCTYPE html><html><title>Log in</title>", "an HTML page .*download the file itself"),
    "page without doctype": (b"\xef\xbb\xbf<html lang='en'>\n", "an HTML page"),
    "answer of a bucket": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an HTML page .* or an error"),
    "JSON": (b'{"metadata": {}, "weight_map": {}}', 'a text, which begins with \'{"metadata"'),
    "text": (b"Entry not found\n", "a text, which begins with 'Entry not found'"),
    "accents": ("modèle supprimé".encode(), "a text, which begins with 'modèle supprimé'"),
    "zip": (zipped(model_ckpt=b"x", readme=b"y"), "a zip archive of 2 files, first model_ckpt; unpack it"),
    "TorchScript": (zipped(m__data_pkl=b"", m__constants_pkl=b""), "a TorchScript archive"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), r"no file of weights \(it begins with b'GGUF"),
    "gzip": (gzip.compress(b"x"), "no file of weights"),
    "zeros": (bytes(100), "begins with zeros"),
    "cut zip": (saved()[:-30], "a zip archive .* cut short"),
    "cut safetensors": (TENSORS[:-30], rf"a safetensors file that is cut short: {len(TENSORS) - 30} of {len(TENSORS)} bytes"),
    "cut header": (TENSORS[:30], "a safetensors file that is cut short, within its header"),
    "longer safetensors": (TENSORS + b"more", "a safetensors file that is damaged"),
    "damaged header": (TENSORS[:8] + b"{" * 50 + TENSORS[58:], "a safetensors file with a damaged header"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_other_files_are_refused_by_what_they_are(what: str, name: str, tmp_path: Path):
    content, said = OTHERS[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        weights_format(tmp_path / name)
    caught.match(rf"{name}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"), [(TENSORS, "safetensors"), (saved(), "zip"), (saved(zipped=False), "pickle"), (save({}), "safetensors")]
)
def test_names_do_not_count(content: bytes, kind: str, tmp_path: Path):
    for name in ("model.ckpt", "model.safetensors", "model.bin", "model"):
        (tmp_path / name).write_bytes(content)
        assert weights_format(tmp_path / name) == kind


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"nothing\.ckpt: cannot be read \(No such file"):
        weights_format(tmp_path / "nothing.ckpt")


def test_a_vae_whose_weights_are_none(tmp_path: Path):
    """As `git clone` leaves a model where Git LFS is not installed; and a pickle under the name of safetensors."""
    (tmp_path / "config.json").write_bytes((Path(VAE) / "config.json").read_bytes())
    for content, said in ((POINTER, "a pointer of Git LFS"), (saved(), "a pickle under the name of safetensors")):
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=rf"diffusion_pytorch_model\.safetensors: {said}"):
            load_vae(str(tmp_path))


def test_a_vae_that_is_a_file(tmp_path: Path):
    (tmp_path / "vae.safetensors").write_bytes(TENSORS)
    with pytest.raises(InputError, match=r"vae\.safetensors: is a file; give the folder of a AutoencoderKL"):
        load_vae(str(tmp_path / "vae.safetensors"))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HALF = ["model.fp16-00001-of-00002.safetensors", "model-00002-of-00002.fp16.safetensors"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "config.json"], ["pytorch_model.bin"]),
        ([*SHARDS, *HALF, "model.safetensors.index.json"], ["model.safetensors.index.json", *SHARDS]),
        ([*HALF, "model.safetensors.index.fp16.json"], ["model.safetensors.index.fp16.json", *sorted(HALF)]),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", *SHARDS], None),
        (SHARDS, []),
        (["flax_model.msgpack"], []),
    ],
)
def test_which_files_hold_the_weights(names: list[str], chosen: list[str] | None):
    expected = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"] if chosen is None else chosen
    assert weights_of(names, TRANSFORMERS_FILES) == expected
    assert weights_of(names, DIFFUSERS_FILES) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "no index of shards"),
        ('{"weight_map": ["a"]}', "no index of shards"),
        ("not JSON", "no index of shards"),
        (json.dumps({"weight_map": {"a": "../other.safetensors"}}), r"names .*\.\./other\.safetensors, which"),
        (json.dumps({"weight_map": {"a": "/etc/passwd"}}), "names /etc/passwd, which is not in"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), r"its shard gone\.safetensors is not there"),
    ],
)
def test_an_index_that_leads_nowhere(content: str, said: str, tmp_path: Path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    (tmp_path.parent / "other.safetensors").write_bytes(TENSORS)
    with pytest.raises(InputError, match=said):
        read_index(path)
