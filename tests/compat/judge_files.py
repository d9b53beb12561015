"""Weights of judges' architectures drawn at random from a seed: the same numbers on any machine, and alive to the last layer."""

import numpy as np
import torch
from torch import Tensor, nn

from pbe_core.judges.inception import Inception
from pbe_core.judges.mobilenet import mobilenet

SPREAD = {"bn.weight": (0.6, 1.4), "bn.bias": (-0.2, 0.2), "bn.running_mean": (-0.2, 0.2), "bn.running_var": (0.6, 1.4)}


def inception_tensors(seed: int = 0) -> dict[str, Tensor]:
    """As published files have them, without counters."""
    return _drawn(Inception, seed)


def mobilenet_tensors(seed: int = 0) -> dict[str, Tensor]:
    """As the small real judge has them."""
    return _drawn(mobilenet, seed)


def _drawn(network: type[nn.Module], seed: int) -> dict[str, Tensor]:
    random, tensors = np.random.default_rng(seed), {}
    with torch.device("meta"):
        state = network().state_dict()
    for name in sorted(name for name in state if not name.endswith("num_batches_tracked")):
        shape = tuple(state[name].shape)
        spread = next((spread for end, spread in SPREAD.items() if name.endswith(end)), None)
        if spread:
            values = random.uniform(*spread, shape)
        else:
            # He et al.: activations keep their size from layer to layer.
            values = random.standard_normal(shape) * (2 / max(np.prod(shape[1:]), 2)) ** 0.5
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors
