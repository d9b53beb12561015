"""A pass of an edit through the U-Net, less what is the same in all of its passes.

    noisy latents ──conv_in, C channels──▶ (+) ──▶ layers ──▶ both halves ──▶ layers ──▶ last layers ──▶ predicted
    masked latents, mask ──the rest──▶ once ┘                        ▲                  │ kept for next steps ▲
    one token ──to_out(to_v(token)) of each layer──▶ once ───────────┘                  └─── `last_layers` ───┘

It goes through diffusers' own layers in diffusers' own order, and gives what `UNet2DConditionModel.forward` gives but for
rounding: the first convolution is a sum of two, and the null pass lies in one batch with the condition's. Both begin with the
same latents, and are one until the first layer that sees a condition; time embeddings are one for all items and both halves.

Keeping the deep features: Ma et al., DeepCache (CVPR 2024).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pbe_train.model.paint_model import OneTokenAttention, attention_to_condition

REDONE = 2
"""Layers at the end of the U-Net, and skip connections into them, that a step goes through which keeps the deep features."""
# What the layers attend to: the tokens, or what attention to the only one comes to, by the layer's name.
Condition = Tensor | Mapping[str, Tensor]
_BLOCKS = (CrossAttnDownBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn, CrossAttnUpBlock2D, UpBlock2D)
# Of diffusers' configuration: inputs and steps that this project's U-Nets do not have.
_ELSE = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "time_embedding_act_fn")


def passes_apart(unet: object, height: int, width: int) -> bool:
    """Whether a U-Net is of the kind that this file goes through: Stable Diffusion's, at a size that halves evenly.

    Args:
        unet: any object; test doubles are not.
        height: of the latents.
        width: of the latents.
    """
    if not isinstance(unet, UNet2DConditionModel):
        return False
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    plain = not unet.config.center_input_sample and not any(unet.config.get(name) for name in _ELSE)
    # Elsewhere diffusers interpolates to the sizes of the skip connections.
    even = not (height % 2**unet.num_upsamplers or width % 2**unet.num_upsamplers)
    return plain and even and unet.class_embedding is None and all(type(block) in _BLOCKS for block in blocks)


def fixed_planes(
    unet: UNet2DConditionModel, masked: Float[Tensor, "batch channels height width"], mask: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch features height width"]:
    """What the first convolution makes of masked latents and mask, with its bias."""
    planes: Tensor = unet.conv_in(torch.cat([torch.zeros_like(masked), masked, mask], dim=1))
    return planes


def fixed_condition(unet: UNet2DConditionModel, tokens: Float[Tensor, "batch tokens features"]) -> Condition:
    """What all passes under these tokens attend to: of one token, what attention to it comes to in each layer."""
    layers = list(attention_to_condition(unet))
    if tokens.shape[1] != 1 or not all(isinstance(layer.processor, OneTokenAttention) for layer in layers):
        return tokens
    return {layer.processor.name: layer.processor.output(layer, tokens) for layer in layers}


def both(one: Condition, other: Condition) -> Condition:
    """The conditions of two batches of items as those of one, the first before the second."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.cat([one, other])
    assert isinstance(one, Mapping)
    assert isinstance(other, Mapping)
    return {name: torch.cat([output, other[name]]) for name, output in one.items()}


def whole_pass(
    unet: UNet2DConditionModel,
    noisy: Float[Tensor, "batch channels height width"],
    planes: Float[Tensor, "batch features height width"],
    time: Shaped[Tensor, "1"],
    condition: Condition,
) -> tuple[Float[Tensor, "conditions channels height width"], Float[Tensor, "conditions deep height width"]]:
    """What the U-Net predicts, and the features before its last `REDONE` layers.

    Args:
        unet: one of those that `passes_apart`.
        noisy: scaled as the U-Net takes them.
        planes: of `fixed_planes`.
        time: the timestep, of all items.
        condition: of `fixed_condition`: for each item, or for all items and then for all again.
    """
    hidden, time_embedding = _begin(unet, noisy, planes, time)
    skips = [hidden]
    for block in unet.down_blocks:
        for layers in _layers(block):
            hidden = _through(layers, hidden, time_embedding, condition)
            skips.append(hidden)
        for sampler in block.downsamplers or ():
            hidden = sampler(hidden)
            skips.append(hidden)
    hidden = _repeated(hidden, _count(condition))
    hidden = unet.mid_block(hidden, time_embedding, encoder_hidden_states=condition)
    deep = hidden
    for block in unet.up_blocks:
        for layers in _layers(block):
            if len(skips) == REDONE:
                deep = hidden
            hidden = _joined(layers, hidden, skips.pop(), time_embedding, condition)
        for sampler in block.upsamplers or ():
            hidden = sampler(hidden)
    return _end(unet, hidden), deep


def last_layers(
    unet: UNet2DConditionModel,
    noisy: Float[Tensor, "batch channels height width"],
    planes: Float[Tensor, "batch features height width"],
    time: Shaped[Tensor, "1"],
    condition: Condition,
    deep: Float[Tensor, "conditions deep height width"],
) -> Float[Tensor, "conditions channels height width"]:
    """What the U-Net predicts if its features are those of an earlier pass, but for its first and its last layers.

    Args:
        unet: as in `whole_pass`, and the other arguments too.
        noisy: scaled as the U-Net takes them.
        planes: of `fixed_planes`.
        time: the timestep, of all items.
        condition: of `fixed_condition`, as many as in the earlier pass.
        deep: features before the last layers, of the earlier pass.
    """
    hidden, time_embedding = _begin(unet, noisy, planes, time)
    skips = [hidden]
    for layers, _ in zip(_layers(unet.down_blocks[0]), range(REDONE - 1), strict=False):
        hidden = _through(layers, hidden, time_embedding, condition)
        skips.append(hidden)
    hidden = deep
    for layers in list(_layers(unet.up_blocks[-1]))[-REDONE:]:
        hidden = _joined(layers, hidden, skips.pop(), time_embedding, condition)
    return _end(unet, hidden)


def _begin(unet: UNet2DConditionModel, noisy: Tensor, planes: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The first features, and the embedding of the time, one for all items."""
    time_embedding = unet.time_embedding(unet.time_proj(time).to(noisy.dtype))
    first = unet.conv_in
    return conv2d(noisy, first.weight[:, : noisy.shape[1]], padding=first.padding) + planes, time_embedding


def _layers(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """A block's convolutions, each with the attention that follows it."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)  # type: ignore[arg-type]
    yield from zip(block.resnets, attentions, strict=True)  # type: ignore[arg-type]


def _through(layers: tuple[nn.Module, nn.Module | None], hidden: Tensor, time_embedding: Tensor, condition: Condition) -> Tensor:
    convolutions, attention = layers
    hidden = convolutions(hidden, time_embedding)
    if attention is None:
        return hidden
    hidden = _repeated(hidden, _count(condition))
    return attention(hidden, encoder_hidden_states=condition, return_dict=False)[0]  # type: ignore[no-any-return]


def _joined(layers: Any, hidden: Tensor, skip: Tensor, time_embedding: Tensor, condition: Condition) -> Tensor:
    return _through(layers, torch.cat([hidden, _repeated(skip, len(hidden))], dim=1), time_embedding, condition)


def _end(unet: UNet2DConditionModel, hidden: Tensor) -> Tensor:
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    return unet.conv_out(hidden)  # type: ignore[no-any-return]


def _count(condition: Condition) -> int:
    return len(condition) if isinstance(condition, Tensor) else len(next(iter(condition.values())))


def _repeated(features: Tensor, count: int) -> Tensor:
    """Features of all items, or of both halves: until they meet a condition, those of both halves are the same."""
    return features if len(features) == count else torch.cat([features] * (count // len(features)))
