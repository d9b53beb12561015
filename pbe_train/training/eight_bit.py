"""Numbers in 8 bits: blocks of 256, each with one fp32 scale, and codes that are fine near zero and coarse near the largest.

    values [n] ──by block──▶ scale = largest magnitude ──▶ values / scale, in [-1, 1] ──nearest of 256──▶ codes [n]

AdamW's moments are kept so: 1.016 bytes a number instead of 4. All of it is arithmetic of single blocks, the same on each device,
without a word from the device to the host.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (ICLR 2022), sections 2.1 and 2.2.
"""

from functools import cache

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

BLOCK = 256


@cache
def dynamic_codes(signed: bool) -> tuple[float, ...]:
    """The 256 values in [-1, 1], or in [0, 1], that a code can mean, in ascending order.

    Each power of ten from 1e-6 to 1 has twice as many values as the one below it.
    """
    values = [0.0, 1.0]
    for power in range(7):
        steps = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        means = 10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + ((-means).tolist() if signed else [])
    return tuple(sorted(values))


class EightBit:
    """A flat tensor in 8 bits; begins as zeros.

    Attributes:
        codes: [n], the place of each number among `dynamic_codes`.
        scales: [blocks], the largest magnitude of each block.
    """

    def __init__(self, count: int, signed: bool, device: torch.device) -> None:
        self.signed = signed
        means = torch.tensor(dynamic_codes(signed), dtype=torch.float32)
        self._means = means.to(device)
        self._edges = ((means[1:] + means[:-1]) / 2).to(device)
        self.codes: UInt8[Tensor, " n"] = torch.full((count,), dynamic_codes(signed).index(0.0), dtype=torch.uint8, device=device)
        self.scales: Float32[Tensor, " blocks"] = torch.zeros(blocks_of(count), device=device)

    def read(self, start: int, stop: int) -> Float32[Tensor, " part"]:
        """The numbers from `start`, the beginning of a block, up to `stop`, the end of one or of all."""
        values = self._means[self.codes[start:stop].int()]
        return _padded(values).mul_(self._scales(start, stop)[:, None]).view(-1)[: stop - start]

    def write(
        self, start: int, stop: int, values: Float32[Tensor, " part"], unless: Tensor, noise: torch.Generator | None = None
    ) -> None:
        """Put numbers there; where `unless` is not 0, what is there stays to the bit.

        Rounded to the nearest code; with `noise` to one of the two neighbours, with the odds that make it right on average, and
        never to 0 from above it: that is for numbers without a sign.
        """
        blocks = _padded(values)
        scales = blocks.abs().amax(dim=1)
        # Any positive number will do for a block of zeros.
        shares = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: stop - start]
        codes = torch.bucketize(shares, self._edges, out_int32=True) if noise is None else self._rounded(shares, noise)
        for own, new in ((self.codes[start:stop], codes.to(torch.uint8)), (self._scales(start, stop), scales)):
            own.copy_(torch.where(unless == 0, new, own))

    def _rounded(self, shares: Tensor, noise: torch.Generator) -> Tensor:
        below = torch.bucketize(shares, self._means, right=True, out_int32=True).sub_(1).clamp_(0, len(self._means) - 2)
        least = self._means[below]
        above = torch.rand(len(shares), generator=noise, device=shares.device) * (self._means[below + 1] - least) < shares - least
        return (below + above).maximum((shares > 0).int())

    def _scales(self, start: int, stop: int) -> Tensor:
        return self.scales[start // BLOCK : blocks_of(stop)]


def blocks_of(count: int) -> int:
    """Blocks of so many numbers; the last one may be shorter."""
    return -(-count // BLOCK)


def _padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
