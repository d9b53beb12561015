"""Models of the hub: whole and in safe files, or one line that says what is wrong with the hub."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pbe_core.hub
from pbe_core.errors import InputError
from pbe_core.vae import load_vae
from pbe_train import PaintByExample
from pbe_train.checkpoints.diffusers_format import choose_files, load_diffusers_pipeline
from pbe_train.checkpoints.networks import load_encoder, read_pretrained
from tests.hub_server import HubServer
from tests.pbe_train.published import Published, make_published, write_hub, write_in_shards

USES: dict[str, Callable[[str], object]] = {
    "VAE": load_vae,
    "encoder": load_encoder,
    "start": read_pretrained,
    "model to paint with": PaintByExample.from_pretrained,
    "pipeline of diffusers": load_diffusers_pipeline,
}


@pytest.fixture(scope="module")
def paint() -> Published:
    return make_published(9)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(pbe_core.hub, "PAUSES_S", (0.0, 0.0))
    with HubServer(tmp_path / "served") as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


@pytest.mark.parametrize("use", USES)
def test_every_use_says_what_is_wrong(use: str, hub: HubServer):
    hub.faults["/"] = "gated"
    with pytest.raises(InputError, match="not allowed") as caught:
        USES[use]("someone/model")
    assert "\n" not in str(caught.value)
    assert {line.split()[1] for line in hub.asked} == {"/api/models/someone/model"}, "only its names were asked for"


@pytest.mark.parametrize("layout", ["safetensors", "fp16", "pickles", "shards of fp16"])
def test_a_model_of_the_hub_is_the_one_that_is_there(layout: str, paint: Published, hub: HubServer, tmp_path: Path):
    """Every tensor of U-Net and conditioner, from whatever files there are; pickles only where there is nothing else."""
    write_hub(hub.folder, paint, pickles="pickles" in layout)
    if "fp16" in layout:
        for path in list(hub.folder.rglob("*.safetensors")):
            save_file(load_file(path), path.with_suffix(".fp16.safetensors"))
            path.unlink()
    if "shards" in layout:
        write_in_shards(hub.folder)
    if layout == "safetensors":
        (hub.folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not wanted")
        (hub.folder / "text_encoder").mkdir()
        (hub.folder / "text_encoder" / "model.safetensors").write_bytes(b"not wanted")
    source = read_pretrained("someone/model")
    assert source.kind == "Paint by Example, diffusers layout"
    assert source.conditioner is not None
    for found, expected in ((source.unet, paint.unet), (source.conditioner, paint.encoder)):
        state = expected.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert len(source.unet) == len(paint.unet.state_dict())
    encoder = load_encoder("someone/model").state_dict()
    assert all(torch.equal(encoder[name], tensor) for name, tensor in paint.encoder.model.state_dict().items())
    fetched = [line.removeprefix("GET /someone/model/resolve/main/") for line in hub.asked if line.startswith("GET /someone")]
    assert len([name for name in fetched if name.endswith((".safetensors", ".bin"))]) == (9 if "shards" in layout else 3)
    assert any(name.endswith(".bin") for name in fetched) == ("pickles" in layout)
    assert not any(name.startswith("text_encoder") for name in fetched)


def test_the_networks_of_the_hub_alone(paint: Published, hub: HubServer):
    """A VAE and a vision encoder, whole, in half precision, or in shards, inside a pipeline or by themselves."""
    hub.folder.mkdir()
    paint.vae.save_pretrained(hub.folder / "vae", max_shard_size="200KB")
    paint.vae.save_pretrained(hub.folder / "half", variant="fp16", max_shard_size="200KB")
    paint.encoder.model.save_pretrained(hub.folder)
    assert len(list((hub.folder / "half").glob("*fp16-0*.safetensors"))) > 1
    for source in ("someone/model", "someone/model/half"):
        state = load_vae(source).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in paint.vae.state_dict().items())
    state = load_encoder("someone/model").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in paint.encoder.model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["README.md", "model.ckpt"], r"no model in diffusers' layout"),
        (["unet/config.json", "unet/flax_model.msgpack"], r"no weights in unet/ as diffusion_pytorch_model\.safetensors, "),
        (["unet/config.json", "unet/diffusion_pytorch_model.bin", "vae/config.json"], r"no weights in vae/ as "),
    ],
)
def test_repositories_that_are_no_such_model(names: list[str], said: str):
    with pytest.raises(InputError, match=rf"someone/model: the hub has it, but .*{said}"):
        choose_files("someone/model", names)


def test_the_u_net_alone_of_a_repository():
    names = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "README.md"]
    assert choose_files("someone/unet", names) == ["config.json", "diffusion_pytorch_model.safetensors"]
