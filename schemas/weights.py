"""Identity of a network: a hash of its weights, so that a dataset and a model can agree on the VAE they use."""

import hashlib
from collections.abc import Mapping

import torch


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values (as little-endian float32) of all tensors, sorted by name.

    Independent of the file format and of storage in float16 or float32: the same values give the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
