"""A U-Net's layers on x86 CPUs as oneDNN computes them fastest: weights packed once, attention in blocks that stay in the cache.

    convolution, projection ──first call──▶ weights in blocks as wide as the registers, kept ──▶ oneDNN
    self-attention ──▶ the scores of some rows at a time: oneDNN ──▶ softmax ──▶ oneDNN

PyTorch leaves projections and attention in fp32 to MKL, which on an AMD CPU with AVX-512 comes to 40 % of what oneDNN reaches;
and a convolution packs its weights anew in each call, which at 8 x 8 positions is half of its time. The operations are those that
torch.compile puts in place of layers whose weights stay as they are. Results differ by rounding from those of the layers (by 4e-6
of a prediction in fp32).
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

SCORES = 2**20
"""Of attention, made at a time: 4 MiB, for which a laptop's last cache has room."""
_ONEDNN: Any = torch.ops.mkldnn
_AS_IT_IS: tuple[Any, ...] = ("none", [], "")
"""What is applied to a result before it is written: nothing."""


def can_prepack(device: torch.device, kind: torch.dtype) -> bool:
    """Whether a device has these operations for weights of a type: an x86 CPU and a PyTorch with oneDNN, and for 16 bits more."""
    onednn, cpu = torch.backends.mkldnn.is_available(), torch.backends.cpu.get_cpu_capability()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not onednn or not cpu.startswith("AVX"):
        return False
    # Where the processor lacks what oneDNN needs for 16 bits, the operations raise.
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return kind not in asked or bool(getattr(_ONEDNN, asked[kind])())


def prepack(unet: nn.Module) -> None:
    """Let a network's convolutions, projections and self-attention be computed by what is in this file, for inference alone.

    A layer packs its weights when it is first called, since how depends on the size of what it is given, and gives up its own:
    at no time are there two copies of more than one layer. What is packed serves every other size.

    Args:
        unet: changed in place; what is packed can be neither moved nor saved. Its first convolution stays, of whose
            weights an edit uses a part.
    """
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, Attention) and type(layer.processor) is AttnProcessor2_0 and _is_plain(layer):
            layer.set_processor(AttentionInBlocks())
        elif type(layer) is nn.Linear:
            unet.set_submodule(name, _Projection(layer))
        elif type(layer) is nn.Conv2d and name != "conv_in" and _is_padded_by_numbers(layer):
            unet.set_submodule(name, _Convolution(layer))


def _is_padded_by_numbers(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)


def _is_plain(layer: Attention) -> bool:
    """Whether an attention does nothing but attend: as all do that `BasicTransformerBlock` makes for Stable Diffusion."""
    norms = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
    return not any(norms) and not layer.residual_connection and layer.rescale_output_factor == 1


class _Projection(nn.Module):
    """`nn.Linear` with packed weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        self.packed = layer.weight.detach()
        self.plain: Tensor | None = self.packed

    def forward(self, given: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch projected"]:
        plain = self.plain
        if plain is not None:
            # In this order, since an app's threads may come here together.
            self.packed = _ONEDNN._reorder_linear_weight(plain, given.numel() // given.shape[-1])
            self.plain = None
        projected: Tensor = _ONEDNN._linear_pointwise(given.to(self.packed.dtype), self.packed, self.bias, *_AS_IT_IS)
        return projected


class _Convolution(nn.Module):
    """`nn.Conv2d` with packed weights."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.bias = layer.bias
        self.packed = layer.weight.detach()
        self.plain: Tensor | None = self.packed
        self.geometry = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)

    def forward(self, given: Float[Tensor, "batch features height width"]) -> Float[Tensor, "batch convolved h w"]:
        plain = self.plain
        if plain is not None:
            self.packed = _ONEDNN._reorder_convolution_weight(plain, *self.geometry, list(given.shape))
            self.plain = None
        given = given.to(self.packed.dtype)
        convolved: Tensor = _ONEDNN._convolution_pointwise(given, self.packed, self.bias, *self.geometry, *_AS_IT_IS)
        return convolved


class AttentionInBlocks(AttnProcessor2_0):  # type: ignore[misc]
    """An attention processor for plain layers."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch positions features"],
        encoder_hidden_states: Float[Tensor, "batch tokens condition"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch positions features"]:
        """What diffusers' own processor gives; with a mask, by it."""
        if attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)  # type: ignore[no-any-return]
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (each.unflatten(-1, (attn.heads, -1)) for each in (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen)))
        attended = attend(*heads).flatten(2)
        projection, dropout = attn.to_out
        return dropout(projection(attended))  # type: ignore[no-any-return]


def attend(
    queries: Float[Tensor, "batch positions heads features"],
    keys: Float[Tensor, "batch tokens heads features"],
    values: Float[Tensor, "batch tokens heads features"],
) -> Float[Tensor, "batch positions heads features"]:
    """Softmax of the scaled products of queries and keys, times the values; computed in fp32, in the type of the queries."""
    scaled = queries.float() * queries.shape[-1] ** -0.5
    attended = torch.empty_like(queries, memory_format=torch.contiguous_format)
    rows = max(1, SCORES // keys.shape[1])
    for item in range(len(queries)):
        for head in range(queries.shape[2]):
            towards, values_by_feature = keys[item, :, head].float().contiguous(), values[item, :, head].float().t().contiguous()
            for begin in range(0, queries.shape[1], rows):
                block = slice(begin, begin + rows)
                scores = _ONEDNN._linear_pointwise(scaled[item, block, head], towards, None, *_AS_IT_IS)
                torch.softmax(scores, -1, out=scores)
                attended[item, block, head] = _ONEDNN._linear_pointwise(scores, values_by_feature, None, *_AS_IT_IS)
    return attended
