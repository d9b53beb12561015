"""Attention to a single token, without the attention: its softmax is 1, so the layer is a linear map of that token.

    softmax(q k^T) v = v  ──▶  attention(x, c) = to_out(to_v(c)), the same for every position of x

Queries and keys then cannot change the output, nor can the normalisation that only the queries see: their gradient is 0, but for
what rounding leaves of it in fused attention. With the sizes of Stable Diffusion 1.x these are 22.0 M parameters of the U-Net and
3.2 % of the arithmetic of its forward pass.
"""

from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from pbe_core.errors import InputError
from pbe_core.words import number_of


class OneTokenAttention:
    """An attention processor of diffusers for layers that always see one token.

    For layers as `BasicTransformerBlock` makes them: no normalisation inside, no residual connection, no rescaling.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch positions features"],
        encoder_hidden_states: Float[Tensor, "batch tokens condition"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch positions features"]:
        """`to_out(to_v(token))`, broadcast over the positions.

        Args:
            attn: the layer.
            hidden_states: where attention is asked from; only their number counts, unless they are the token (self-attention).
            encoder_hidden_states: the token; null for self-attention.
            attention_mask: must be null: the only token cannot be masked.

        Raises:
            InputError: more tokens than one, or a mask; the result would be wrong silently.
        """
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if seen.shape[1] != 1 or attention_mask is not None:
            given = number_of(seen.shape[1], "condition token") + ("" if attention_mask is None else " and a mask")
            raise InputError(
                f"model.one_token_shortcut: {given} came to a layer that takes one token; set model.one_token_shortcut to false"
            )
        projection, dropout = attn.to_out
        return dropout(projection(attn.to_v(seen))).expand(-1, hidden_states.shape[1], -1)  # type: ignore[no-any-return]


class SkippedNorm(nn.LayerNorm):
    """A layer normalisation whose output is not used: it keeps its weights, under their names, and does nothing."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> "SkippedNorm":
        """A skipped one with the very parameters of `norm`."""
        with torch.device("meta"):
            skipped = cls(norm.normalized_shape, norm.eps, norm.elementwise_affine, norm.bias is not None)
        skipped.weight, skipped.bias = norm.weight, norm.bias
        return skipped

    def forward(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Its input."""
        return input


def take_shortcuts(unet: nn.Module, mapper: nn.Module) -> None:
    """Replace the attention to the one condition token, in the U-Net and in the conditioner. Parameters keep their names.

    Args:
        unet: its blocks attend to the condition in `attn2`.
        mapper: its blocks attend to themselves in `attn1`.
    """
    for block in _blocks(unet):
        if block.attn2 is not None:
            block.attn2.set_processor(OneTokenAttention())
            block.norm2 = SkippedNorm.of(block.norm2)
    for block in _blocks(mapper):
        block.attn1.set_processor(OneTokenAttention())


def parameters_without_effect(unet: nn.Module, mapper: nn.Module) -> Iterator[nn.Parameter]:
    """What cannot change the output under a single condition token, however the attention to it is computed."""
    for block in _blocks(unet):
        if block.attn2 is not None:
            for part in (block.norm2, block.attn2.to_q, block.attn2.to_k):
                yield from part.parameters()
    for block in _blocks(mapper):
        for part in (block.attn1.to_q, block.attn1.to_k):
            yield from part.parameters()


def _blocks(network: nn.Module) -> Iterator[BasicTransformerBlock]:
    return (module for module in network.modules() if isinstance(module, BasicTransformerBlock))
