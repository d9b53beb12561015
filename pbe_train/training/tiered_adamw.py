"""AdamW in little memory: its moments in 8 bits or on the CPU, over weights that may be bf16.

    a tensor's elements, a piece at a time, on the device of the moments and in fp32

    gradient ─┐                                  ┌─▶ moments, in 8 bits again where they are
    moments  ─┼─▶ AdamW of PyTorch, fused ───────┤
    weights  ─┘                                  └─▶ weights: fp32; or bf16, rounded up or down at random;
                                                     or fp32 copies on the CPU, of which the device gets bf16

A piece is short, so that what is computed in between takes some 0.1 GB whatever the model's size. Pieces go along a tensor's
indices and not along its memory, so that states do not depend on memory layouts. The noise of rounding is a function of the seed,
the step and the tensor's name.

Own code, since neither torchao nor bitsandbytes keeps to what the trainer promises: docs/decisions.md.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pbe_core.randomness import name_hash
from pbe_train.config import OptimizerSettings
from pbe_train.training.eight_bit import BLOCK, EightBit, blocks_of

PIECE = 2**22
"""Elements that are computed at once: whole blocks of 8-bit numbers."""
assert PIECE % BLOCK == 0
LEAST_8BIT = 4096
"""Elements of a tensor below which moments stay fp32: norms and biases, which are few and matter. As in bitsandbytes."""
# The moments' names in checkpoints, those of PyTorch's AdamW: means of the gradient, and of its square, which has no sign.
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


class TieredAdamW(torch.optim.Optimizer):
    """AdamW over named parameters of one device.

    `param_groups` and `found_inf` are those of PyTorch's fused AdamW; a group's `step` is the run's step, which names the noise.

    Args:
        trained: name -> parameter.
        settings: learning rate, decay, and how and where moments are kept.
        seed: of the run.
        masters: name -> fp32 weights on the CPU of which the parameters are bf16 copies; empty: parameters are trained directly.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], settings: OptimizerSettings, seed: int, masters: Mapping[str, Tensor]
    ) -> None:
        super().__init__(trained.values(), {"lr": settings.learning_rate, "step": 0})
        self.trained, self.masters, self.seed = dict(trained), dict(masters), seed
        self.weight_decay = settings.weight_decay
        first = next(iter(self.trained.values())).device
        self.device = torch.device("cpu") if settings.place == "cpu" else first
        self.moments = {
            name: tuple(_moment(parameter.numel(), signed, settings.state, self.device) for signed in MOMENTS.values())
            for name, parameter in self.trained.items()
        }
        self.count: Float32[Tensor, ""] = torch.zeros((), device=self.device)
        self.found_inf: Tensor = torch.zeros((), device=first)
        self._noise = torch.Generator(self.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or where `found_inf` is not 0 one that changes nothing. With moments on the CPU the host waits for both."""
        unless = self.found_inf.to(self.device)
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                self._noise.manual_seed(name_hash(self.seed, "train", "rounding", self.param_groups[0]["step"], name, bits=56))
                self._step_one(name, parameter, parameter.grad, unless)
        self.count += unless == 0

    def _step_one(self, name: str, parameter: nn.Parameter, gradient: Tensor, unless: Tensor) -> None:
        # Where the tensor lies in this order already, these are the tensors themselves.
        live, given = parameter.detach().contiguous().view(-1), gradient.contiguous().view(-1)
        master = self.masters[name].view(-1) if self.masters else None
        for start in range(0, len(live), PIECE):
            piece = slice(start, min(start + PIECE, len(live)))
            weights = (live if master is None else master)[piece].to(self.device, torch.float32)
            means = [_read(moment, piece) for moment in self.moments[name]]
            self._adamw(weights, given[piece].to(self.device, torch.float32), means, unless)
            for moment, mean in zip(self.moments[name], means, strict=True):
                if isinstance(moment, EightBit):
                    _write(moment, piece, mean, unless, self._noise)
            if master is None and live.dtype == torch.bfloat16:
                weights = round_at_random(weights, self._noise)
            if weights.data_ptr() != live[piece].data_ptr():
                live[piece].copy_(weights)
        if live.data_ptr() != parameter.data_ptr():
            parameter.copy_(live.view(parameter.shape))

    def _adamw(self, weights: Tensor, gradient: Tensor, means: list[Tensor], unless: Tensor) -> None:
        first, second = ([mean] for mean in means)
        adamw(
            [weights],
            [gradient],
            first,
            second,
            [],
            [self.count.clone()],  # It is counted up for each piece.
            fused=True,
            found_inf=unless,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.param_groups[0]["lr"],
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs of the moments, by name; in the parameters' shapes, but for scales."""
        named = {}
        for name, parameter in self.trained.items():
            for kind, moment in zip(MOMENTS, self.moments[name], strict=True):
                if isinstance(moment, EightBit):
                    named[f"{kind}_scale.{name}"] = moment.scales
                values = moment.codes if isinstance(moment, EightBit) else moment
                named[f"{kind}.{name}"] = values.view(parameter.shape)
        return named

    def resume(self, count: int) -> None:
        """Go on after so many steps, once `tensors` and `masters` have got what they had."""
        self.count.fill_(count)
        with torch.no_grad():
            for name, master in self.masters.items():
                self.trained[name].copy_(master)


Moment = Tensor | EightBit


def _moment(count: int, signed: bool, state: str, device: torch.device) -> Moment:
    if state == "8bit" and count >= LEAST_8BIT:
        return EightBit(count, signed, device)
    return torch.zeros(count, device=device)


def _read(moment: Moment, piece: slice) -> Tensor:
    if not isinstance(moment, EightBit):
        return moment[piece]
    values = moment.read(piece.start, piece.stop)
    return values if moment.signed else values.square_()


def _write(moment: EightBit, piece: slice, mean: Tensor, unless: Tensor, noise: torch.Generator) -> None:
    # Of the second moment its root is kept, which AdamW divides by. The published 8 bits of the moment itself have half as many
    # decades: small ones become 0, and a step the first moment divided by almost nothing. It moves by a thousandth a step, less
    # than codes lie apart: to the nearest it would stay where it is.
    if moment.signed:
        moment.write(piece.start, piece.stop, mean, unless)
    else:
        moment.write(piece.start, piece.stop, mean.sqrt(), unless, noise)


def round_at_random(values: Float32[Tensor, "*shape"], noise: torch.Generator) -> BFloat16[Tensor, "*shape"]:
    """fp32 -> bf16: to one of the two neighbours, with the odds that make it right on average. What bf16 has stays as it is.

    Steps of training are far smaller than the spacing of bf16: rounded to the nearest, most of them would come to nothing.
    """
    # bf16 is the upper half of fp32. Of the lower half, a random number of 16 bits carries as often as its size says.
    bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=noise)
    bits += values.view(torch.int32)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def moment_bytes(counts: list[int], state: str) -> int:
    """Bytes of both moments of tensors of so many elements."""
    eight = sum(count + 4 * blocks_of(count) for count in counts if state == "8bit" and count >= LEAST_8BIT)
    return 2 * (eight + 4 * sum(count for count in counts if state == "fp32" or count < LEAST_8BIT))


def temporary_bytes(trained: Iterable[Tensor], settings: OptimizerSettings) -> int:
    """Bytes on the device of the parameters that a step takes at its peak, beside weights, gradients and moments."""
    most = 0
    for parameter in trained:
        count, width = parameter.numel(), parameter.element_size()
        # Weights and gradient in the order of their indices, where they lie in another one.
        ordered = 0 if parameter.is_contiguous() else 2 * count * width
        piece = min(count, PIECE)
        if settings.place == "cpu":
            inside = 0 if width == 4 else piece * width  # The piece that comes back.
        else:
            casts = piece * (0 if width == 4 else 8)
            eight = settings.state == "8bit" and count >= LEAST_8BIT
            # Both means, and what the larger of two things takes: rounding the weights, or putting a mean into 8 bits.
            inside = casts + (piece * (8 + 28) if eight else piece * (6 if width == 2 else 0))
        most = max(most, ordered + inside)
    return most
