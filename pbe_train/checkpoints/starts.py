"""What published starts that paint by words have otherwise than this project's U-Net, put in its place exactly.

inpainting   conv_in sees latent, mask, masked view ─▶ latent, masked view, mask; 1 in its mask goes on meaning "repaint"
XL           pooled words and sizes of pictures, constant here ─▶ the bias of time_embedding.linear_2

The mask's meaning is kept, and not turned in the weights, because no weights do it: of a convolution that pads with zeros,
weights of the other sign and another bias make up for `1 - mask` everywhere but at the border. `PaintByExampleModel.mask_channel`
says which it is; `turned` is for those who need the published meaning more than exactness.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Float
from torch import Tensor

from pbe_core.errors import InputError
from pbe_train.checkpoints.key_mapping import ADDED, Tensors, starting_with
from pbe_train.checkpoints.pretrained import PretrainedModel, strict_load

FIRST_LAYER, FIRST_BIAS = "conv_in.weight", "conv_in.bias"
# diffusers' own, in and out, for a configuration that does not say.
DEFAULT_CHANNELS = 4
PLAIN = "Stable Diffusion"
# What XL's U-Net is told of a picture: height and width that it had, top and left of the cut, height and width that it has.
SIZES_TOLD = 6
ADDED_NETWORK, ADDED_TO = "add_embedding.", "time_embedding.linear_2.bias"
# Of XL, side in latent cells that it was trained at, and px of a cell.
XL_CELLS, XL_CELL = 128, 8


def as_start(source: PretrainedModel) -> PretrainedModel:
    """The same model with inputs as this project's U-Net has them; one that has them already comes back as it is.

    Raises:
        InputError: tensors that are missing, or XL's refiner.
    """
    if source.conditioner is not None or not source.kind.startswith(PLAIN):
        return source
    name = _family(source.unet_config)
    if _is_inpainting(source):
        name += " inpainting"
        first = {FIRST_LAYER: in_our_order(source.unet[FIRST_LAYER])}
        source = replace(source, unet={**source.unet, **first}, mask_channel="repaint")
        # The mask is shrunk so by its own training's code and by diffusers' pipeline.
        source = replace(source, trained_with={**source.trained_with, "mask_to_latent": "nearest"})
    if source.unet_config.get("addition_embed_type") == "text_time":
        source = _with_sizes_folded(source)
    return replace(source, kind=source.kind.replace(PLAIN, name, 1))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a U-Net after `as_start`."""
    if config.get("addition_embed_type") != "text_time":
        return dict(config)
    return {name: value for name, value in config.items() if name not in ADDED}


def in_our_order(weight: Float[Tensor, "out wide height width"]) -> Float[Tensor, "out wide height width"]:
    """The first layer's weight for latent C, masked view C, mask 1, from one for latent C, mask 1, masked view C."""
    channels = (weight.shape[1] - 1) // 2
    latent, mask, masked = torch.split(weight, [channels, 1, channels], dim=1)
    return torch.cat([latent, masked, mask], dim=1)


def turned(source: PretrainedModel) -> PretrainedModel:
    """A model whose mask means "repaint", such that 1 means "keep": the same but in the outermost cells that its U-Net sees.

    Raises:
        InputError: its first layer has no bias.
    """
    if FIRST_BIAS not in source.unet:
        raise InputError(f"{source.where}: the tensors of its U-Net do not fit: 1 missing ({FIRST_BIAS})")
    weight, bias = source.unet[FIRST_LAYER].float(), source.unet[FIRST_BIAS].float()
    rest, mask = weight[:, :-1], weight[:, -1:]
    layer = {FIRST_LAYER: torch.cat([rest, -mask], dim=1), FIRST_BIAS: bias + mask.sum(dim=(1, 2, 3))}
    return replace(source, unet={**source.unet, **layer}, mask_channel="keep")


def _family(config: Mapping[str, Any]) -> str:
    if config.get("addition_embed_type") == "text_time":
        return f"{PLAIN} XL"
    return f"{PLAIN} 2" if config.get("use_linear_projection") else PLAIN


def _is_inpainting(source: PretrainedModel) -> bool:
    """Whether its further input channels are those of a model that paints by words; a U-Net alone does not say."""
    channels = source.unet_config.get("out_channels", DEFAULT_CHANNELS)
    weight = source.unet.get(FIRST_LAYER)
    wide = weight is not None and weight.ndim == 4 and weight.shape[1] == 2 * channels + 1
    # The published training began with further channels that are all 0, whose order means nothing.
    return wide and source.by_words and bool(weight[:, channels:].any())  # type: ignore[index]


def _with_sizes_folded(source: PretrainedModel) -> PretrainedModel:
    """XL without its added conditions: no pooled words, and a picture that was made at the size it was trained at, not cut.

    No words are zeros, as XL's own pipeline gives for an empty prompt (`force_zeros_for_empty_prompt`).
    """
    config = source.unet_config
    told, whole = (config.get(name) for name in ADDED[1:])
    if not isinstance(told, int) or not isinstance(whole, int) or whole <= SIZES_TOLD * told:
        raise InputError(f"{source.where}: its U-Net has {ADDED[1]} {told} and {ADDED[2]} {whole}, which do not go together")
    if whole - 5 * told == config.get("cross_attention_dim"):
        raise InputError(f"{source.where}: the refiner of Stable Diffusion XL, which finishes pictures; give the base model")
    bias = source.unet.get(ADDED_TO)
    if bias is None:
        raise InputError(f"{source.where}: the tensors of its U-Net do not fit: 1 missing ({ADDED_TO})")
    network = TimestepEmbedding(whole, bias.shape[0])
    added = starting_with(ADDED_NETWORK, source.unet)
    strict_load(network.state_dict(), added, source.where, "U-Net (add_embedding)")
    vector = _added(network, config, whole - SIZES_TOLD * told)
    kept = {name: tensor for name, tensor in source.unet.items() if not name.startswith(ADDED_NETWORK)}
    unet: Tensors = {**kept, ADDED_TO: bias.float() + vector}
    aside = {**source.aside, "add_embedding, folded into time_embedding": len(added)}
    return replace(source, unet=unet, unet_config=plain_config(config), aside=aside)


@torch.no_grad()
def _added(network: TimestepEmbedding, config: Mapping[str, Any], pooled: int) -> Float[Tensor, " embedding"]:
    cells = config.get("sample_size")
    side = XL_CELL * (cells if isinstance(cells, int) else XL_CELLS)
    frequencies = Timesteps(config[ADDED[1]], config.get("flip_sin_to_cos", True), config.get("freq_shift", 0))
    sizes = frequencies(torch.tensor([side, side, 0, 0, side, side])).flatten()
    vector: Tensor = network(torch.cat([torch.zeros(pooled), sizes])[None])[0]
    return vector
