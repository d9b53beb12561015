"""MobileNet v1 (1.0, 224 px) without its last layer: a small judge, 1,024 numbers of a picture that are 0 and more.

    picture ──centre square, bicubic──▶ [3, 224, 224] in [-1, 1] ──27 convolutions──▶ [1024, 7, 7] ──mean──▶ 1024

Batch norms are in the weights already. Source: Howard et al., MobileNets (2017); TensorFlow's "same" padding.
"""

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import nn

from pbe_core.images import AnyPhoto
from pbe_core.judges.loading import LoadedNetwork, fill, read_tensors
from pbe_core.vae import weights_sha256

SIZE = 224
PREPARATION = "the centre square by Pillow's bicubic to 224 x 224 px, then x / 127.5 - 1"
# Output channels and stride of each depthwise convolution and the 1 x 1 after it.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def load_mobilenet(where: str) -> LoadedNetwork:
    """The judge's network from a file with tensors `I.weight` and `I.bias`, I = 1, 4, ..., 79.

    Raises:
        InputError: no such file, or it holds something else.
    """
    tensors = read_tensors(where)
    with torch.device("meta"):
        network = mobilenet()
    fill(network, tensors, where, "MobileNet v1 (1.0, 224 px) without its last layer")
    return LoadedNetwork(network, prepare, PREPARATION, SIZE, PAIRS[-1][0], weights_sha256(tensors))


def prepare(picture: AnyPhoto) -> Float32[np.ndarray, "3 224 224"]:
    """The centre square of a picture, in [-1, 1]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    values = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)) / np.float32(127.5) - 1


def mobilenet() -> nn.Sequential:
    """Pictures [n, 3, 224, 224] -> features [n, 1024]. Each convolution has its padding before it and ReLU6 behind it."""
    layers, channels = _convolution(3, 32, 3, 2), 32
    for out, stride in PAIRS:
        layers += _convolution(channels, channels, 3, stride, groups=channels) + _convolution(channels, out, 1, 1)
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    # TensorFlow's "same" for an even size: with stride 2, one pixel right and below only.
    halves = stride == 2
    before = nn.ZeroPad2d((0, 1, 0, 1)) if halves else nn.Identity()
    return [before, nn.Conv2d(inputs, outputs, kernel, stride, 0 if halves else kernel // 2, groups=groups), nn.ReLU6(True)]
