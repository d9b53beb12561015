"""Packed layers and attention in blocks give what the layers of PyTorch and diffusers give, but for rounding."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pbe_core.errors import InputError
from pbe_train import PaintByExample
from pbe_train.editing import placing, prepacked
from pbe_train.editing.prepacked import AttentionInBlocks, attend, can_prepack, prepack
from pbe_train.editing.speed import Way
from tests.pbe_train.test_editing import levels, photo, region
from tests.pbe_train.test_editing import paint as paint

CPU = torch.device("cpu")
KINDS = [(kind, share) for kind, share in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)) if can_prepack(CPU, kind)]


def packed(layer: nn.Module) -> nn.Module:
    network = nn.ModuleDict({"layer": layer})
    prepack(network)
    assert type(network["layer"]) is not type(layer)
    return network["layer"]


def assert_same(one: torch.Tensor, other: torch.Tensor, share: float) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert (one - other).abs().max() <= share * other.abs().max()


@pytest.mark.parametrize(("kind", "share"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_projection(kind: torch.dtype, share: float, bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(40, 72, bias=bias).to(kind)
    ours = packed(layer)
    # The first call packs for its size, and others come after it.
    for shape in ((2, 64, 40), (1, 64, 40), (3, 40), (40,)):
        given = torch.randn(shape).to(kind)
        assert_same(ours(given), layer(given), share)
    # What does not lie one behind the other, as the positions of a picture do not.
    given = torch.randn(2, 40, 9, dtype=kind).transpose(1, 2)
    assert_same(ours(given), layer(given), share)


@pytest.mark.parametrize(("kind", "share"), KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel_size": (1, 1)},
        {"kernel_size": 3, "padding": (2, 0), "dilation": 2, "groups": 4},
    ],
)
@torch.no_grad()
def test_a_convolution(kind: torch.dtype, share: float, options: dict):
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 32, **options).to(kind, memory_format=torch.channels_last)
    ours = packed(layer)
    for layout, shape in ((torch.channels_last, (2, 24, 8, 8)), (torch.contiguous_format, (1, 24, 11, 6))):
        given = torch.randn(shape).to(kind, memory_format=layout)
        assert_same(ours(given), layer(given), share)


def test_other_layers_stay():
    """Those that do what the operations do not, or whose weights are looked at."""
    network = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(4, 8, 3),
            "around": nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
            "named": nn.Conv2d(4, 8, 3, padding="same"),
            "in one": nn.MultiheadAttention(8, 2),
            "norm": Attention(8, heads=2, dim_head=4, qk_norm="layer_norm"),
        }
    )
    before = {name: type(layer) for name, layer in network.named_modules()}
    prepack(network)
    changed = {name for name, layer in network.named_modules() if type(layer) is not before[name]}
    assert changed == {f"norm.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert type(network["norm"].processor) is AttnProcessor2_0


@pytest.mark.parametrize(("kind", "share"), KINDS)
@pytest.mark.parametrize("scores", [1, 100, 2**20])
@pytest.mark.parametrize(("positions", "tokens"), [(50, 50), (50, 7), (1, 1)])
def test_attention_in_blocks(monkeypatch: pytest.MonkeyPatch, kind, share: float, scores: int, positions: int, tokens: int):
    """Of one row, of two, of all; the last block is a part."""
    monkeypatch.setattr(prepacked, "SCORES", scores)
    torch.manual_seed(0)
    queries = 3 * torch.randn(2, positions, 3, 8).to(kind)
    keys, values = (torch.randn(2, tokens, 3, 8).to(kind) for _ in range(2))
    expected = scaled_dot_product_attention(*(each.transpose(1, 2) for each in (queries, keys, values))).transpose(1, 2)
    assert_same(attend(queries, keys, values), expected, share)


@torch.no_grad()
def test_a_layer_of_attention():
    """Self-attention, attention to something else, and a mask, which diffusers' own processor sees to."""
    torch.manual_seed(0)
    layer = Attention(24, cross_attention_dim=16, heads=3, dim_head=8)
    alone = Attention(24, heads=3, dim_head=8)
    hidden, seen, mask = torch.randn(2, 10, 24), torch.randn(2, 5, 16), torch.zeros(2, 1, 5)
    mask[:, :, 3:] = -10_000
    expected = alone(hidden), layer(hidden, seen), layer(hidden, seen, attention_mask=mask)
    prepack(nn.ModuleList([layer, alone]))
    assert type(layer.processor) is type(alone.processor) is AttentionInBlocks
    for one, other in zip((alone(hidden), layer(hidden, seen), layer(hidden, seen, attention_mask=mask)), expected, strict=True):
        assert_same(one, other, 1e-5)
    assert (expected[1] - expected[2]).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"reuse": 2, "guidance_interval": (0, 0.6)}])
def test_an_edit_is_the_same_but_for_rounding(run_folder: Path, paint: PaintByExample, options: dict):
    ours = PaintByExample.from_pretrained(run_folder, device="cpu", precision="fp32", prepacked=True)
    unet = ours.run.model.unet
    plain = sum(parameter.numel() for parameter in paint.run.model.unet.parameters())
    given = photo(1), region(), photo(2, 20, 30)
    for shape in (given, (photo(3, 40, 60), region(40, 60), given[2])):
        painted, expected = (each(*shape, steps=4, **options) for each in (ours, paint))
        assert levels(painted, expected) <= 1
    kept = sum(parameter.numel() for parameter in unet.parameters())
    assert kept < plain / 10, "what is packed is not kept a second time"
    layers = [layer for layer in unet.modules() if type(layer).__name__ in ("_Projection", "_Convolution")]
    assert len(layers) > 20
    # The attention to one token asks neither what it is asked for, nor where from.
    unused = {name for name, layer in unet.named_modules() if getattr(layer, "plain", None) is not None}
    assert all(name.rpartition(".")[2] in ("to_q", "to_k") and ".attn2." in name for name in unused)
    with pytest.raises(InputError, match="exact published: the model computes in fp32, prepacked; load it with precision fp32"):
        ours.check_exact()


def test_what_cannot_be_packed(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert can_prepack(CPU, torch.float32)
    assert not can_prepack(torch.device("meta"), torch.float32)
    monkeypatch.setattr("pbe_train.editing.paint_by_example.check_compiler", lambda offload: None)
    with pytest.raises(InputError, match=r"prepacked: weights cannot be packed here \(torch.compile packs them itself\); leave"):
        PaintByExample.from_pretrained(run_folder, device="cpu", prepacked=True, compile=True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not can_prepack(CPU, torch.float32)
    with pytest.raises(InputError, match=r"\(for fp32 it takes an x86 CPU that oneDNN has kernels for, which cpu is not\)"):
        PaintByExample.from_pretrained(run_folder, device="cpu", prepacked=True)


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bits_are_packed_where_the_processor_has_them(run_folder: Path, monkeypatch: pytest.MonkeyPatch, precision, kind):
    """Where it is said to, it works; where it is said not to, nothing is packed."""
    monkeypatch.setattr(placing, "is_small", lambda unet: False)
    if can_prepack(CPU, kind):
        paint = PaintByExample.from_pretrained(run_folder, device="cpu", precision=precision)
        assert paint.way == Way(precision, True, True)
        paint(photo(1), region(), photo(2, 20, 30), steps=1)
    monkeypatch.setattr(prepacked, "_ONEDNN", SimpleNamespace(**{f"_is_mkldnn_{precision}_supported": lambda: False}))
    assert not can_prepack(CPU, kind)
    assert PaintByExample.from_pretrained(run_folder, device="cpu", precision=precision).way == Way(precision, True, False)
    with pytest.raises(InputError, match=f"for {precision} it takes an x86 CPU"):
        PaintByExample.from_pretrained(run_folder, device="cpu", precision=precision, prepacked=True)


def test_what_passes_freed_is_given_back_before_a_decoding(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Of large models, on CPUs."""
    given_back: list[None] = []
    monkeypatch.setattr(placing, "give_memory_back", lambda: given_back.append(None))
    for small, times in ((True, 0), (False, 2)):
        monkeypatch.setattr(placing, "is_small", lambda unet, small=small: small)
        paint = PaintByExample.from_pretrained(run_folder, device="cpu", precision="fp32")
        for _ in range(2):
            paint(photo(1), region(), photo(2, 20, 30), steps=1)
        assert len(given_back) == times
