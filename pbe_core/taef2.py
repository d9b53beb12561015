"""TAEF2, a small deterministic autoencoder with FLUX.2's 32-channel latents, as its author publishes it: two files of weights.

Source: github.com/madebyollin/taesd (MIT), files taef2_encoder and taef2_decoder. Layers are numbered as the tensors' names there
are; layers without a tensor have a number all the same. diffusers' AutoencoderTiny lacks the pooled blocks.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbe_core.errors import InputError
from pbe_core.vae_kinds import TAEF2_CONFIG, TAEF2_FILES
from pbe_core.weight_files import check_finite

WIDTH, POOLED_WIDTH, GROUPS = 64, 256, 4
CHANNELS: int = TAEF2_CONFIG["latent_channels"]
# The decoder softly limits its latents to this.
LIMIT = 3.0


class Taef2(nn.Module):
    """Encoder and decoder; neither knows of the range [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv3(3, WIDTH),
            Block(),
            *(layer for _ in range(2) for layer in (_halving(), Block(), Block(), Block())),
            *(_halving(), Block(pooled=True), Block(pooled=True), Block(pooled=True)),
            conv3(WIDTH, CHANNELS),
        )
        self.decoder = nn.Sequential(
            *(SoftLimit(), conv3(CHANNELS, WIDTH), nn.ReLU()),
            *(Block(pooled=True), Block(pooled=True), Block(pooled=True), *_doubling()),
            *(layer for _ in range(2) for layer in (Block(), Block(), Block(), *_doubling())),
            *(Block(), conv3(WIDTH, 3)),
        )

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """RGB in [0, 1] -> latents, about [-3, 3], of one cell for 8 x 8 px."""
        latents: Tensor = self.encoder(pixels)
        return latents

    def decode(self, latents: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Latents -> RGB, about [0, 1] and not clamped."""
        pixels: Tensor = self.decoder(latents)
        return pixels


class Block(nn.Module):
    """Three convolutions and a skip; a pooled one first mixes in a wide view of its input, normalised over the whole picture."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        convolutions = [conv3(WIDTH, WIDTH) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.pool = (
            nn.Sequential(
                nn.Conv2d(WIDTH, POOLED_WIDTH, 1, bias=False),
                nn.GroupNorm(GROUPS, POOLED_WIDTH),
                nn.ReLU(),
                nn.Conv2d(POOLED_WIDTH, WIDTH, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width h w"]:
        """The same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftLimit(nn.Module):
    """Keeps latents within `LIMIT`, nearly linear in the middle."""

    def forward(self, latents: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        """The same shape."""
        return torch.tanh(latents / LIMIT) * LIMIT


def conv3(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution of 3 x 3 that keeps the size, but for its stride."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def _halving() -> nn.Conv2d:
    return conv3(WIDTH, WIDTH, stride=2, bias=False)


def _doubling() -> tuple[nn.Module, nn.Module]:
    return nn.Upsample(scale_factor=2), conv3(WIDTH, WIDTH, bias=False)


def load_taef2(folder: Path) -> Taef2:
    """The model of a folder that holds both files, in float32.

    Raises:
        InputError: a file is missing or damaged, or its tensors are not these networks'.
    """
    with torch.device("meta"):
        model = Taef2()
    model = model.to_empty(device="cpu")
    for name, network in zip(TAEF2_FILES, (model.encoder, model.decoder), strict=True):
        path = folder / name
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise InputError(f"{path}: is not there; TAEF2 is two files, {' and '.join(TAEF2_FILES)}: put both here") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: a safetensors file that is damaged or cut short ({error}); get it again") from None
        own = network.state_dict()
        odd = sorted(key for key in own.keys() | tensors.keys() if key not in tensors or _shape(own, key) != tensors[key].shape)
        if odd:
            raise InputError(f"{path}: the tensors are not those of TAEF2 (first {odd[0]}); get the file again from its author")
        check_finite(tensors, str(path))
        network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return model


def _shape(own: dict[str, Tensor], key: str) -> torch.Size | None:
    return own[key].shape if key in own else None
