"""In which arithmetic and layout this machine edits fastest: measured once, kept in the user's cache, told in one line.

    device, U-Net ──small?──▶ fp32 as ever
                 └──known?──▶ the cache's answer ◀── else: a convolution, a projection and an attention are timed in each way

What is chosen differs from machine to machine, and so do pixels. `precision="fp32"` asks for nothing and measures nothing.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import silu

from pbe_core.machine import cpu_name
from pbe_train.editing.prepacked import can_prepack, prepack

Precision = Literal["fp32", "bf16", "fp16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_PARAMETERS = 50_000_000
"""Of a U-Net. Below this size a second thread costs more than it gives, above all beside other work, and so do other ways."""
WORTH = 0.9
"""A way further from plain fp32 is taken if it needs no more than this share of the time of those before it."""
REPEATS = 3
HEADS = 8
"""Of the attention that is measured."""


class Way(NamedTuple):
    """How the networks compute."""

    precision: Precision = "fp32"
    channels_last: bool = False
    prepacked: bool = False
    """The U-Net's weights, as oneDNN computes with them (prepacked.py)."""

    def __str__(self) -> str:
        return self.precision + ", channels-last" * self.channels_last + ", prepacked" * self.prepacked


PLAIN = Way()


def ways_of(device: torch.device) -> tuple[Way, ...]:
    """Those that a device may be fastest in, from the plainest on; none where none but the plainest is known to work."""
    if device.type == "cpu":  # Has no arithmetic in fp16 worth having.
        ways = (PLAIN, *(Way(precision, True, packed) for precision in ("fp32", "bf16") for packed in (False, True)))
        return tuple(way for way in ways if not way.prepacked or can_prepack(device, TYPES[way.precision]))
    if device.type == "cuda":  # GPUs before Ampere have no arithmetic in bf16.
        return PLAIN, Way("fp32", True), Way("bf16", True), Way("fp16", True)
    return ()


def choose(seconds: Mapping[Way, float]) -> Way:
    """The fastest way, unless a plainer one is nearly as fast.

    Args:
        seconds: of the same work in each way, the plainest first.
    """
    chosen = next(iter(seconds))
    for way, needed in seconds.items():
        if needed <= WORTH * seconds[chosen]:
            chosen = way
    return chosen


def fastest_way(
    unet: UNet2DConditionModel, device: torch.device, cells: int, compile: bool = False, folder: Path | None = None
) -> tuple[Way, str | None]:
    """The way to edit with a U-Net on a device, and a line that says so; null where it is the plain one.

    Args:
        unet: loaded; it stays as it is.
        device: that will compute.
        cells: side of the latents.
        compile: whether passes will be compiled; then torch.compile packs weights itself.
        folder: where measurements are kept; by default the user's cache.
    """
    ways = ways_of(device)
    if is_small(unet) or not ways:
        return PLAIN, None
    file = (folder or user_cache()) / "speed.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    widths = unet.config.block_out_channels
    key = f"{name} | torch {torch.__version__} | {'-'.join(map(str, widths))} at {cells}"
    seconds = _known(file, key, ways)
    if not seconds:
        # The second level: half the side of the first, where the features are twice as many.
        width = widths[min(1, len(widths) - 1)]
        seconds = measure(width - width % HEADS, max(cells // 2, 8), device, ways)
        _keep(file, key, seconds)
    way = choose({way: needed for way, needed in seconds.items() if not (compile and way.prepacked)})
    if way == PLAIN:
        return way, None
    gain = seconds[PLAIN] / seconds[way]
    return way, (
        f"computing in {way}: {gain:.1f} x as fast as fp32 here ({file}); the same pixels on every machine: --precision fp32"
    )


def is_small(unet: nn.Module) -> bool:
    """Whether a U-Net is so small that there is nothing to gain."""
    return sum(parameter.numel() for parameter in unet.parameters()) < SMALL_PARAMETERS


def user_cache() -> Path:
    """The user's folder for what is found out once; of a user without a home, as in some containers, that for temporary files."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        cache = Path(tempfile.gettempdir())
    return cache / "paint-by-example"


@torch.no_grad()
def measure(width: int, side: int, device: torch.device, ways: Iterable[Way]) -> dict[Way, float]:
    """Seconds of a layer of a U-Net in each way, the least of some; together seconds, at the sizes of Stable Diffusion.

    Args:
        width: features.
        side: of the square of positions.
        device: that computes.
        ways: plainest first.
    """
    seconds = {}
    for way in ways:
        kind, layout = TYPES[way.precision], torch.channels_last if way.channels_last else torch.contiguous_format
        with torch.random.fork_rng(devices=[]):
            layer = _Layer(width).to(device, kind).to(memory_format=layout)  # type: ignore[call-overload]
            if way.prepacked:
                prepack(layer)
            given = torch.randn(2, width, side, side).to(device, kind)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            seconds[way] = min(_seconds(layer, given) for _ in range(1 + REPEATS))
    return seconds


class _Layer(nn.Module):
    """A convolution, and self-attention with its projections, as a U-Net has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.attention = Attention(width, heads=HEADS, dim_head=width // HEADS)

    def forward(self, features: Tensor) -> Tensor:
        features = self.convolution(silu(self.norm(features)))
        attended: Tensor = self.attention(features.flatten(2).transpose(1, 2))
        return attended


def _seconds(layer: nn.Module, given: Tensor) -> float:
    if given.is_cuda:
        torch.cuda.synchronize(given.device)
    began = time.perf_counter()
    layer(given)
    if given.is_cuda:
        torch.cuda.synchronize(given.device)
    return time.perf_counter() - began


def _known(file: Path, key: str, ways: Iterable[Way]) -> dict[Way, float]:
    """What was measured before; nothing where that was something else, or cannot be read."""
    with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        kept = json.loads(file.read_bytes())[key]
        seconds = {way: float(kept[str(way)]) for way in ways}
        return seconds if all(0 < needed < math.inf for needed in seconds.values()) else {}
    return {}


def _keep(file: Path, key: str, seconds: Mapping[Way, float]) -> None:
    """Write a measurement; where that is not possible it is made again next time."""
    kept: dict[str, object] = {}
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_bytes())
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}.tmp")
        known = kept if isinstance(kept, dict) else {}
        new.write_text(json.dumps({**known, key: {str(way): round(value, 6) for way, value in seconds.items()}}, indent=2) + "\n")
        new.replace(file)
