"""One face for every kind of VAE: it gives what the network gives, by its configuration, of which nothing is passed over."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError
from pbe_core.vae import identify_vae, load_vae, weights_sha256
from pbe_core.vae_kinds import TAEF2_FILES, read_vae_sizes
from schemas.dataset import Normalisation, VaeIdentity
from tests.kinds_of_vae import KINDS, make_kind, save_taef2

torch.manual_seed(0)
BY_CHANNEL = ("16 by channel", "qwen")
PIXELS = torch.rand(2, 3, 32, 48) * 2 - 1


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    make_kind(request.param, folder)
    return request.param, folder


def own_latents(name: str, vae: Autoencoder) -> tuple[Tensor, Tensor | None]:
    """Mean and deviation as diffusers' documentation has them, without the adapter; TAEF2 takes [0, 1]."""
    if name == "taef2":
        return vae.network.encoder(PIXELS / 2 + 0.5), None
    if name == "tiny":
        return vae.network.encode(PIXELS).latents, None
    if name == "sana":
        return vae.network.encode(PIXELS).latent, None
    if name == "qwen":
        own = vae.network.encode(PIXELS.unsqueeze(2)).latent_dist
        return own.mean.squeeze(2), own.std.squeeze(2)
    own = vae.network.encode(PIXELS).latent_dist
    return own.mean, own.std


@torch.no_grad()
def test_latents_are_the_networks_own_by_its_configuration(kind):
    """SD3's and FLUX's pipelines in diffusers subtract shift_factor; SDXL's subtract latents_mean, and divide by latents_std."""
    name, folder = kind
    vae = load_vae(str(folder))
    mean, deviation = own_latents(name, vae)
    config = vae.config
    scaled, scale = vae.encode(PIXELS).mean * vae.sizes.scaling_factor, config.get("scaling_factor", 1)
    if name in BY_CHANNEL:
        by_channel = [torch.tensor(config[key])[:, None, None] for key in ("latents_mean", "latents_std")]
        expected = (mean - by_channel[0]) * scale / by_channel[1]
    else:
        expected = (mean - (config.get("shift_factor") or 0)) * scale
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-5)
    found = vae.encode(PIXELS)
    assert vae.sizes.deterministic == (found.deviation is None) == (deviation is None)
    if deviation is not None:
        spread = torch.tensor(config["latents_std"])[:, None, None] if name in BY_CHANNEL else 1
        torch.testing.assert_close(found.deviation, deviation / spread)
        assert found.stacked().shape[1] == 2 * vae.sizes.latent_channels
    assert found.mean.shape == (2, vae.sizes.latent_channels, 32 // vae.sizes.downsampling, 48 // vae.sizes.downsampling)


@torch.no_grad()
def test_decoding_undoes_what_encoding_did_to_the_networks_latents(kind):
    name, folder = kind
    vae = load_vae(str(folder))
    mean, _ = own_latents(name, vae)
    if name == "taef2":
        expected = vae.network.decoder(mean) * 2 - 1
    elif name == "qwen":
        expected = vae.network.decode(mean.unsqueeze(2)).sample.squeeze(2)
    else:
        expected = vae.network.decode(mean).sample
    torch.testing.assert_close(vae.decode(vae.encode(PIXELS).mean), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_kind_is_laid_out_as_builds_ask(kind):
    """Channels innermost, where a network's kernels have such a layout; the same latents but for rounding."""
    _, folder = kind
    vae = load_vae(str(folder))
    latents = vae.encode(PIXELS).mean
    changed = vae.to(torch.device("cpu"), memory_format=torch.channels_last)
    torch.testing.assert_close(changed.encode(PIXELS).mean, latents, rtol=1e-4, atol=1e-5)


def test_the_identity_tells_how_to_read_what_is_stored(kind):
    """It comes back from JSON as it was; what a plain AutoencoderKL has, it says as ever."""
    name, folder = kind
    vae = load_vae(str(folder))
    identity = identify_vae(vae, "here")
    written = json.loads(identity.model_dump_json())
    assert VaeIdentity.model_validate(written) == identity
    assert identity.sha256 == weights_sha256(vae.network.state_dict())
    assert identity.stored_channels == vae.encode(PIXELS).stacked().shape[1]
    told = {"kind", "deterministic", "normalisation"} & written.keys()
    expected = {"4": set(), "qwen": {"kind", "normalisation"}, "asymmetric": {"kind"}}
    expected |= {each: {"kind", "deterministic"} for each in ("tiny", "taef2", "sana")}
    assert told == expected.get(name, {"normalisation"})


def test_a_recorded_normalisation_takes_the_place_of_the_configurations(tmp_path):
    """Datasets of before know of none, and were made without: they are read as they were made."""
    make_kind("8 shifted", tmp_path)
    vae = load_vae(str(tmp_path))
    shifted = vae.encode(PIXELS).mean
    assert vae.normalise(None).encode(PIXELS).mean.sub(shifted).allclose(torch.tensor(0.5))
    other = Normalisation(shift=(1.0,) * 8, spread=(2.0,) * 8)
    assert vae.normalise(other).encode(PIXELS).mean.allclose((shifted + 0.5 - 1) / 2, atol=1e-6)
    assert vae.encode(PIXELS).mean.shape[1] == 8


BAD = {
    "of another kind": ({"_class_name": "AutoencoderOobleck"}, "is of a AutoencoderOobleck; taken are AutoencoderKL, .* and a"),
    "of one that is folded": ({"_class_name": "AutoencoderKLFlux2"}, "is of a AutoencoderKLFlux2, whose latents are folded"),
    "shifted twice": ({"latents_mean": [0.0] * 8}, "gives both shift_factor and latents_mean"),
    "too few numbers": ({"shift_factor": None, "latents_mean": [0.0] * 4}, "is no list of 8 numbers"),
    "divided by 0": ({"shift_factor": None, "latents_std": [0.0] * 8}, "latents_std is no list of 8 numbers"),
    "a word": ({"shift_factor": None, "latents_std": "wide"}, "latents_std is no list of 8 numbers"),
    "not finite": ({"shift_factor": math.nan}, "latents_mean or shift_factor is no list of 8 numbers"),
    "scaled by 0": ({"scaling_factor": 0}, "scaling_factor 0 is no positive number"),
    "no channels": ({"latent_channels": None}, "not the config of an AutoencoderKL"),
    "half a channel": ({"latent_channels": 8.5}, "not the config of an AutoencoderKL"),
    "channels as text": ({"latent_channels": "8"}, "not the config of an AutoencoderKL"),
    "less than no channels": ({"latent_channels": -8}, "not the config of an AutoencoderKL"),
    "no blocks": ({"block_out_channels": []}, "not the config of an AutoencoderKL"),
    "blocks as text": ({"block_out_channels": "8888"}, "not the config of an AutoencoderKL"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_configuration_that_cannot_be_followed_is_refused(case, tmp_path):
    changes, said = BAD[case]
    make_kind("8 shifted", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=said) as raised:
        load_vae(str(tmp_path))
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_configuration_that_the_library_fails_on_is_refused(tmp_path):
    """Diffusers raises whatever comes of it: here a TypeError."""
    make_kind("4", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": "1"}))
    with pytest.raises(InputError, match="cannot load a AutoencoderKL") as raised:
        load_vae(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_weights_that_the_configuration_leaves_out_are_told(tmp_path):
    """Without quant_conv the latents of the same file are others: nothing else would tell."""
    make_kind("4", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_quant_conv": False}))
    with pytest.raises(InputError, match=r"2 tensors that its config\.json has no place for, first quant_conv\.bias"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("name", ["4", "tiny", "taef2"])
def test_weights_that_are_not_finite_are_refused(name, tmp_path):
    """A dataset built with them would hold none but such latents."""
    make_kind(name, tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(path)
    first = min(key for key in tensors if key.endswith("weight"))
    save_file({**tensors, first: tensors[first] * math.nan}, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"1 tensor with numbers that are not finite, first {first}"):
        load_vae(str(tmp_path))


def test_sizes_are_known_without_loading(kind):
    _, folder = kind
    found, loaded = read_vae_sizes(folder), load_vae(str(folder)).sizes
    assert found[0] == loaded[0]
    assert found[2:] == loaded[2:]
    with torch.device("meta"):
        assert Autoencoder.unloaded(found).encode(torch.empty(1, 3, 32, 32)).mean.shape[1] == found.latent_channels


# --- TAEF2 ----------------------------------------------------------------------------------------------------------------


def table_block(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A block by its description, from tensors by their names."""
    if f"{name}.pool.0.weight" in tensors:
        norm = tensors[f"{name}.pool.1.weight"], tensors[f"{name}.pool.1.bias"]
        wide = functional.group_norm(functional.conv2d(x, tensors[f"{name}.pool.0.weight"]), 4, *norm, 1e-5)
        x = x + functional.conv2d(wide.relu(), tensors[f"{name}.pool.3.weight"])
    first = table_conv(tensors, f"{name}.conv.0", x).relu()
    return (table_conv(tensors, f"{name}.conv.4", table_conv(tensors, f"{name}.conv.2", first).relu()) + x).relu()


def table_conv(tensors: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    return functional.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), stride, padding=1)


def table_encoder(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    for layer in range(15):
        if layer in (0, 2, 6, 10, 14):
            x = table_conv(tensors, str(layer), x, 2 if layer in (2, 6, 10) else 1)
        else:
            x = table_block(tensors, str(layer), x)
    return x


def table_decoder(tensors: dict[str, Tensor], z: Tensor) -> Tensor:
    x = table_conv(tensors, "1", 3 * torch.tanh(z / 3)).relu()
    for layer in range(3, 20):
        if layer in (6, 11, 16):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif layer in (7, 12, 17, 19):
            x = table_conv(tensors, str(layer), x)
        else:
            x = table_block(tensors, str(layer), x)
    return x


@torch.no_grad()
def test_taef2_is_what_its_tables_say(tmp_path):
    """Layer by layer from tensors by their names, of which each file has so many and none is left over."""
    save_taef2(tmp_path)
    encoder, decoder = (load_file(tmp_path / name) for name in TAEF2_FILES)
    for tensors, count in ((encoder, 1_338_528), (decoder, 1_338_499)):
        assert len(tensors) == 79
        assert sum(tensor.numel() for tensor in tensors.values()) == count
    model = load_vae(str(tmp_path)).network
    pixels = torch.rand(1, 3, 24, 16)
    latents = table_encoder({name: tensor.float() for name, tensor in encoder.items()}, pixels)
    assert latents.std() > 1e-3
    torch.testing.assert_close(model.encode(pixels), latents)
    painted = table_decoder({name: tensor.float() for name, tensor in decoder.items()}, latents)
    torch.testing.assert_close(model.decode(latents), painted)


def hurt(change: str):
    def apply(folder: Path) -> None:
        path = folder / TAEF2_FILES[1]
        if change == "gone":
            path.unlink()
        elif change == "short":
            path.write_bytes(path.read_bytes()[:-10])
        else:
            tensors = load_file(path)
            taken = tensors.pop("8.conv.0.weight")
            if change != "dropped":
                tensors[change] = taken[:, :32].contiguous()
            save_file(tensors, path)

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gone", "is not there; TAEF2 is two files, taef2_encoder.safetensors and taef2_decoder.safetensors"),
        ("short", "damaged or cut short"),
        ("dropped", r"not those of TAEF2 \(first 8\.conv\.0\.weight\)"),
        ("8.conv.0.weight", r"not those of TAEF2 \(first 8\.conv\.0\.weight\)"),
        ("8.conv.1.weight", r"not those of TAEF2 \(first 8\.conv\.0\.weight\)"),
    ],
)
def test_half_of_taef2_is_refused(change, said, tmp_path):
    save_taef2(tmp_path)
    hurt(change)(tmp_path)
    with pytest.raises(InputError, match=said) as raised:
        load_vae(str(tmp_path))
    assert str(raised.value).startswith(str(tmp_path / TAEF2_FILES[1]))


@pytest.fixture(scope="module")
def published(real_data) -> Path:
    """TAEF2's own weights."""
    folder = real_data / "taef2"
    if not (folder / TAEF2_FILES[0]).is_file():
        pytest.skip(f"no TAEF2 in {folder}")
    return folder


@torch.no_grad()
def test_the_published_weights_give_photos_back(published: Path, real_data: Path):
    """Figures measured with the author's code on these photos: 29.86 dB on average, latents of deviation 0.851."""
    vae = load_vae(str(published))
    noise, spread = [], []
    for path in sorted((real_data / "open_images_mini").rglob("*.jpg"))[:3]:
        photo = Image.open(path).convert("RGB")
        side = min(photo.size)
        square = np.asarray(photo.crop((0, 0, side, side)).resize((256, 256), Image.Resampling.LANCZOS), np.float32)
        pixels = torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)[None]
        latents = vae.encode(pixels).mean
        error = (vae.decode(latents).clamp(-1, 1) - pixels).div(2).square().mean()
        noise.append(-10 * math.log10(error))
        spread.append(float((latents * vae.sizes.scaling_factor).square().mean()))
    assert 24 < np.mean(noise) < 36
    assert math.sqrt(np.mean(spread)) == pytest.approx(1, abs=0.15)
