"""The Inception v3 that FID is defined by: 2,048 features of a picture, and its two published ways to prepare one.

    picture ──prepare──▶ [3, 299, 299] in [-1, 1] ──stem, 11 blocks──▶ [2048, 8, 8] ──mean──▶ 2048

TensorFlow's network of 2015-12-05, with the tensor names of pytorch-fid's and torch-fidelity's files. It is not torchvision's:
average pools leave the padding out of the mean, and the last block has a maximum in place of an average.

Source: Szegedy et al. (2016) for the network; Heusel et al. (2017) for FID; Parmar et al. (2022) for `clean`.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pbe_core.images import AnyPhoto
from pbe_core.judges.loading import LoadedNetwork, fill, read_tensors
from pbe_core.vae import weights_sha256

SIZE, WIDTH, CLASSES = 299, 2048, 1008
CLEAN = "clean: each channel as float32 by Pillow's bicubic to 299 x 299 px, clipped to 0-255, not rounded, then (x - 128) / 128"
LEGACY = "legacy: x / 255 bilinear without antialiasing, as torch does it, to 299 x 299 px, half-pixel centres, then 2 x - 1"

Layer = tuple[int, int | tuple[int, int]]
"""Output channels, and the kernel's size (or height and width)."""
Chain = list[Layer | str]
"""Layers one after the other; or the name of a pool, or `fork`: two layers side by side on one input."""


def load_inception(where: str, way: str) -> LoadedNetwork:
    """The judge's network from a file of pytorch-fid's or torch-fidelity's; `way` is `clean` or `legacy`.

    Raises:
        InputError: no such file, or it holds something else.
    """
    tensors = read_tensors(where)
    with torch.device("meta"):
        network = Inception()
    fill(network, tensors, where, "FID's Inception v3 (pt_inception-2015-12-05 or weights-inception-2015-12-05)")
    prepare, preparation = (prepare_clean, CLEAN) if way == "clean" else (prepare_legacy, LEGACY)
    return LoadedNetwork(folded(network), prepare, preparation, SIZE, WIDTH, weights_sha256(tensors))


def prepare_clean(picture: AnyPhoto) -> Float32[np.ndarray, "3 299 299"]:
    """A picture as clean-fid 0.1.35 prepares it in its mode `clean`."""
    channels = [Image.fromarray(np.ascontiguousarray(picture[..., channel], np.float32)) for channel in range(3)]
    resized = np.stack([np.asarray(channel.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for channel in channels])
    return (resized.clip(0, 255) - 128) / 128


def prepare_legacy(picture: AnyPhoto) -> Float32[np.ndarray, "3 299 299"]:
    """A picture as pytorch-fid 0.3.0 prepares it, by OpenCV, which has no wait among threads in it: same to 5e-5 of the range."""
    resized = cv2.resize(picture.astype(np.float32) / np.float32(255), (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized.transpose(2, 0, 1)) * 2 - 1


class Unit(nn.Module):
    """Convolution, batch norm, ReLU. With stride 1 the size is kept, with stride 2 nothing is padded, unless told otherwise."""

    def __init__(self, inputs: int, layer: Layer, stride: int = 1, padded: bool | None = None) -> None:
        super().__init__()
        channels, kernel = layer
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if (stride == 1 if padded is None else padded) else (0, 0)
        self.conv = nn.Conv2d(inputs, channels, sides, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n channels h2 w2"]:
        """Features of 0 and more."""
        return F.relu_(self.bn(self.conv(x)))


class Block(nn.Module):
    """Paths side by side on one input, their outputs one after the other in the channels.

    The only unit of a path bears its name; others get `_1`, `_2`, ...; a fork's two `_Na` and `_Nb`.
    """

    def __init__(self, inputs: int, paths: dict[str, Chain], stride: int = 1) -> None:
        super().__init__()
        self.paths: list[list[str]] = []
        self.channels = 0
        for name, path in paths.items():
            channels, steps = inputs, []
            layers = [step for step in path if step not in POOLS]
            for number, step in enumerate(path, start=1):
                own = name if len(layers) == 1 else f"{name}_{number}"
                if step == "fork":
                    self.add_module(f"{own}a", Unit(channels, (channels, (1, 3))))
                    self.add_module(f"{own}b", Unit(channels, (channels, (3, 1))))
                    channels *= 2
                    steps.append(f"{own}a|{own}b")
                elif isinstance(step, str):
                    steps.append(step)
                else:
                    # A block that halves the size does so in the last layer of each path.
                    self.add_module(own, Unit(channels, step, stride if number == len(path) else 1))
                    channels = step[0]
                    steps.append(own)
            self.paths.append(steps)
            self.channels += channels

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n channels h2 w2"]:
        """All paths."""
        return torch.cat([self._along(steps, x) for steps in self.paths], 1)

    def _along(self, steps: list[str], x: Tensor) -> Tensor:
        for step in steps:
            if step in POOLS:
                x = POOLS[step](x)
            else:
                units = [self.get_submodule(name)(x) for name in step.split("|")]
                x = units[0] if len(units) == 1 else torch.cat(units, 1)
        return x


POOLS = {
    # TensorFlow's mean does not count the padding.
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halving": lambda x: F.max_pool2d(x, 3, 2),
}


def _block_5(pooled: int) -> dict[str, Chain]:
    wide: Chain = [(64, 1), (96, 3), (96, 3)]
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": wide,
        "branch_pool": ["average", (pooled, 1)],
    }


def _block_6(narrow: int) -> dict[str, Chain]:
    across, down = (1, 7), (7, 1)
    twice: Chain = [(narrow, 1), (narrow, down), (narrow, across), (narrow, down), (192, across)]
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(narrow, 1), (narrow, across), (192, down)],
        "branch7x7dbl": twice,
        "branch_pool": ["average", (192, 1)],
    }


def _block_7(pool: str) -> dict[str, Chain]:
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), "fork"],
        "branch3x3dbl": [(448, 1), (384, 3), "fork"],
        "branch_pool": [pool, (192, 1)],
    }


HALVING_6: dict[str, Chain] = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": ["halving"]}
HALVING_7: dict[str, Chain] = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
    "branch_pool": ["halving"],
}
BLOCKS: dict[str, tuple[dict[str, Chain], int]] = {
    "Mixed_5b": (_block_5(32), 1),
    "Mixed_5c": (_block_5(64), 1),
    "Mixed_5d": (_block_5(64), 1),
    "Mixed_6a": (HALVING_6, 2),
    "Mixed_6b": (_block_6(128), 1),
    "Mixed_6c": (_block_6(160), 1),
    "Mixed_6d": (_block_6(160), 1),
    "Mixed_6e": (_block_6(192), 1),
    "Mixed_7a": (HALVING_7, 2),
    "Mixed_7b": (_block_7("average"), 1),
    "Mixed_7c": (_block_7("maximum"), 1),
}


class Inception(nn.Module):
    """The network as published. Its classifier `fc` is there for the file's sake: who has 1,000 classes has another network."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, (32, 3), stride=2)
        self.Conv2d_2a_3x3 = Unit(32, (32, 3), padded=False)
        self.Conv2d_2b_3x3 = Unit(32, (64, 3))
        self.Conv2d_3b_1x1 = Unit(64, (80, 1))
        self.Conv2d_4a_3x3 = Unit(80, (192, 3), padded=False)
        channels = 192
        for name, (paths, stride) in BLOCKS.items():
            block = Block(channels, paths, stride)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        """Pictures in [-1, 1] -> features."""
        x = POOLS["halving"](self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = POOLS["halving"](self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def folded(network: Inception) -> Inception:
    """The same function with batch norms in the convolutions' weights, which saves a pass over each activation."""
    for unit in network.eval().modules():
        if isinstance(unit, Unit) and isinstance(unit.bn, nn.BatchNorm2d):
            unit.conv = fuse_conv_bn_eval(unit.conv.double(), unit.bn.double()).float()
            unit.bn = nn.Identity()
    return network
