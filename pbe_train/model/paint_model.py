"""The model: a U-Net that sees the noisy view, the masked view and the mask, under one token that says what to paint.

    reference ─▶ CLIP (frozen) ─ class token ─▶ 5 blocks ─▶ LayerNorm ─▶ Linear ─▶ condition [B, 1, D] ──┐ cross-attention
                                                           null vector, p = 0.2 ──────────────────────────┤
    [noisy latent C | masked-image latent C | mask channel 1] ──────────────────────────────────────────▶ U-Net ─▶ noise C

Attention to a single token needs no attention: its softmax is 1, so the layer is a linear map of that token.

    softmax(q k^T) v = v  ──▶  attention(x, c) = to_out(to_v(c)), the same for every position of x

Queries and keys then cannot change the output, nor can the normalisation that only the queries see: their gradient is 0, but for
what rounding leaves of it in fused attention. With the sizes of Stable Diffusion 1.x these are 22.0 M parameters of the U-Net and
3.2 % of the arithmetic of its forward pass.

Source: Yang et al., Paint by Example (CVPR 2023), sections 3.2 and 3.3, and the published code.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pbe_train.config import LoraSettings, MaskChannel, ModelSettings, TokenMode, UNetSettings
from pbe_train.model.lora import add_layers, is_lora, own_name


class Mapper(nn.Module):
    """Transformer blocks on the condition's tokens; one head, as published."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="gelu", attention_bias=True) for _ in range(blocks)
        )

    def forward(self, tokens: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch tokens features"]:
        """Apply the blocks."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Conditioner(nn.Module):
    """Reference -> condition tokens. Parameter names are those of diffusers' `PaintByExampleImageEncoder`.

    Args:
        encoder: CLIP's vision model; frozen here, and always in eval mode.
        blocks: transformer blocks after it.
        width: D, of a condition token.
        tokens: `class` for the content bottleneck, `all` for every token of the encoder.
    """

    def __init__(self, encoder: CLIPVisionModel, blocks: int, width: int, tokens: TokenMode) -> None:
        super().__init__()
        hidden = encoder.config.hidden_size
        self.tokens = tokens
        self.model = encoder.requires_grad_(False).eval()
        self.mapper = Mapper(hidden, blocks)
        self.final_layer_norm = nn.LayerNorm(hidden)
        self.proj_out = nn.Linear(hidden, width)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, width))

    def train(self, mode: bool = True) -> "Conditioner":
        """Set the mode of the trained part; the encoder stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, reference: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch tokens features"]:
        """CLIP-normalised references -> condition tokens (one each under the bottleneck)."""
        return self.condense(self.features(reference))

    @torch.no_grad()
    def features(self, reference: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch tokens hidden"]:
        """CLIP-normalised references -> the encoder's class token, or all of its tokens."""
        seen = self.model(pixel_values=reference)
        if self.tokens == "class":
            return seen.pooler_output[:, None]  # type: ignore[no-any-return]
        # CLIP normalises its class token only; the same normalisation makes all tokens alike in scale.
        return getattr(self.model, "vision_model", self.model).post_layernorm(seen.last_hidden_state)  # type: ignore[no-any-return]

    def condense(self, features: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens features"]:
        """The encoder's tokens -> condition tokens: what is trained of the conditioner."""
        return self.proj_out(self.final_layer_norm(self.mapper(features)))  # type: ignore[no-any-return]


class PaintByExampleModel(nn.Module):
    """U-Net and conditioner. Trained: the whole U-Net and all of the conditioner but the encoder.

    Under the bottleneck, less what cannot change the output: queries and keys of the attention to the one token. With a LoRA,
    its matrices alone (`with_lora`).

    Attributes:
        mask_channel: what 1 means in the mask that the U-Net sees. Callers give 1 = keep, whichever it is.
        base_sha256: of a model with a LoRA, the hash of all that `kept` held before; null: it has none.
        compiled_edits: whether the passes of an edit are compiled, apart from the training's.
    """

    base_sha256: str | None = None
    compiled_edits: bool = False

    def __init__(self, unet: UNet2DConditionModel, conditioner: Conditioner, mask_channel: MaskChannel = "keep") -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.mask_channel: MaskChannel = mask_channel
        if conditioner.tokens == "class":
            # Weight decay would move them, and so would AdamW, which makes steps of full length of what rounding leaves of their
            # gradient; and DDP would wait for gradients that the shortcut does not compute.
            for parameter in parameters_without_effect(unet, conditioner.mapper):
                parameter.requires_grad_(False)

    def forward(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        masked: Float[Tensor, "batch channels height width"],
        mask_channel: Float[Tensor, "batch 1 height width"],
        timestep: Int64[Tensor, " batch"],
        reference: Float[Tensor, "references 3 size size"],
        dropped: Bool[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The noise in `noisy`, under the reference or, where `dropped`, under the null vector.

        Of several references a sample, which stand together, the condition is the mean of theirs.
        """
        condition = self.conditioner(reference)
        if len(condition) > len(noisy):
            condition = condition.unflatten(0, (len(noisy), -1)).mean(1)
        # `where` keeps the null vector in the graph when nothing is dropped: DDP expects a gradient for every parameter.
        condition = torch.where(dropped[:, None, None], self.conditioner.uncond_vector.to(condition.dtype), condition)
        return self.predict(noisy, masked, mask_channel, timestep, condition)

    def predict(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        masked: Float[Tensor, "batch channels height width"],
        mask_channel: Float[Tensor, "batch 1 height width"],
        timestep: Shaped[Tensor, " batch"],
        condition: Float[Tensor, "batch tokens features"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The noise in `noisy` under condition tokens. Some samplers stop between two whole timesteps."""
        seen = torch.cat([noisy, masked, self.seen_mask(mask_channel)], dim=1)
        return self.unet(seen, timestep, encoder_hidden_states=condition).sample  # type: ignore[no-any-return]

    def seen_mask(self, mask_channel: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
        """The mask as the U-Net sees it, from 1 = keep.

        Before the convolution, which pads with zeros: weights of the other sign would differ from this at the border.
        """
        return mask_channel if self.mask_channel == "keep" else 1 - mask_channel

    def trained(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained, and so averaged."""
        return {own_name(name): parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def kept(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is saved: all but the encoder, whether it is trained or has no effect.

        The names are the same whatever `tokens` is, so that released weights of either kind fit. With a LoRA, that alone.
        """
        named = {name: parameter for name, parameter in self.named_parameters() if not name.startswith("conditioner.model.")}
        if self.base_sha256 is None:
            return named
        return {own_name(name): parameter for name, parameter in named.items() if is_lora(name)}


def assemble(
    settings: ModelSettings, unet: UNet2DConditionModel, encoder: CLIPVisionModel, mask_channel: MaskChannel = "keep"
) -> PaintByExampleModel:
    """The model of these networks, computed as the settings ask, with a new conditioner from torch's global generator."""
    if settings.attention == "plain":
        unet.set_attn_processor(AttnProcessor())
    if settings.gradient_checkpointing:
        # Nothing in it is random; keeping the generators' state would be a word from the device, which cannot be recorded.
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    conditioner = Conditioner(encoder, settings.conditioner_blocks, unet.config.cross_attention_dim, settings.tokens)
    if settings.one_token_shortcut and settings.tokens == "class":
        take_shortcuts(unet, conditioner.mapper)
    model = PaintByExampleModel(unet, conditioner, mask_channel)
    if settings.train:
        freeze_all_but(model, settings.train)
    return model


def freeze_all_but(model: PaintByExampleModel, parts: Sequence[str]) -> None:
    """Leave only some parts of a model to be trained: parameters in whose dotted name one of `parts` is.

    Raises:
        InputError: a part that nothing trained is in; says which there are.
    """
    trained = model.trained()
    for part in parts:
        if not any(f".{part}." in f".{name}." for name in trained):
            known = sorted({word for name in trained for word in name.split(".") if not word.isdecimal()})
            raise InputError(f"model.train: nothing that is trained is in {part!r}; names are made of {', '.join(known)}")
    for name, parameter in trained.items():
        parameter.requires_grad_(any(f".{part}." in f".{name}." for part in parts))


def new_unet(settings: UNetSettings, latent_channels: int) -> UNet2DConditionModel:
    """A U-Net from scratch: 2C + 1 input channels, C output channels, Stable Diffusion's layout."""
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in settings.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(settings.attention)]
    return UNet2DConditionModel(
        in_channels=2 * latent_channels + 1,
        out_channels=latent_channels,
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        # diffusers' name is historical: for this U-Net it is the number of heads.
        attention_head_dim=settings.attention_heads,
        norm_num_groups=settings.norm_groups,
        cross_attention_dim=settings.cross_attention_dim,
    )


def with_lora(model: PaintByExampleModel, settings: LoraSettings, base_sha256: str) -> PaintByExampleModel:
    """The same model, frozen, with a LoRA beside its weights, which is all that is trained and kept from now on.

    Args:
        model: with the weights that the LoRA begins from.
        settings: of the LoRA, whose random half is drawn from torch's global generator.
        base_sha256: hash of these weights.

    Raises:
        InputError: the model has no layers of a kind that is asked for.
    """
    model.requires_grad_(False)
    add_layers(model.unet, model.conditioner, settings, model.conditioner.tokens == "class")
    model.base_sha256 = base_sha256
    return model


class OneTokenAttention:
    """An attention processor of diffusers for layers that always see one token.

    For layers as `BasicTransformerBlock` makes them: no normalisation inside, no residual connection, no rescaling.

    Args:
        name: of the layer, no other's in its network.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch positions features"],
        encoder_hidden_states: Float[Tensor, "batch tokens condition"] | Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch positions features"]:
        """`to_out(to_v(token))`, broadcast over the positions.

        Args:
            attn: the layer.
            hidden_states: which positions there are.
            encoder_hidden_states: the token; null for self-attention; or, by the layer's name, what `output` made of the token.
            attention_mask: null.

        Raises:
            InputError: more tokens than one, or a mask; the result would be wrong silently.
        """
        if isinstance(encoder_hidden_states, Mapping):
            return encoder_hidden_states[self.name].expand(-1, hidden_states.shape[1], -1)
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if seen.shape[1] != 1 or attention_mask is not None:
            given = number_of(seen.shape[1], "condition token") + ("" if attention_mask is None else " and a mask")
            raise InputError(
                f"model.one_token_shortcut: {given} came to a layer that takes one token; set model.one_token_shortcut to false"
            )
        return self.output(attn, seen).expand(-1, hidden_states.shape[1], -1)

    def output(self, attn: Attention, token: Float[Tensor, "batch 1 condition"]) -> Float[Tensor, "batch 1 features"]:
        """`to_out(to_v(token))`: what attention to one token comes to, wherever it is attended from."""
        projection, dropout = attn.to_out
        return dropout(projection(attn.to_v(token)))  # type: ignore[no-any-return]


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
    for number, block in enumerate(_blocks(unet)):
        if block.attn2 is not None:
            block.attn2.set_processor(OneTokenAttention(f"layer {number}"))
            block.norm2 = SkippedNorm.of(block.norm2)
    for number, block in enumerate(_blocks(mapper)):
        block.attn1.set_processor(OneTokenAttention(f"mapper {number}"))


def attention_to_condition(unet: nn.Module) -> Iterator[Attention]:
    """The layers of a U-Net that attend to the condition."""
    return (block.attn2 for block in _blocks(unet) if block.attn2 is not None)


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


@torch.no_grad()
def copy_values(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy the values of `source` into the tensors of the same names."""
    torch._foreach_copy_([target[name] for name in source], list(source.values()))


def prepare(model: PaintByExampleModel, settings: ModelSettings, device: torch.device) -> PaintByExampleModel:
    """The same model, on the device, in the layout and with the kernels that the settings ask for.

    Call it before the optimizer is made and before the model is wrapped for many ranks. Compilation is in place and happens at
    the first call: parameters keep their names. What was compiled once is taken from torch's cache on disk, whose place
    (TORCHINDUCTOR_CACHE_DIR) stays the user's. Each other shape of a batch is compiled anew; what is rarely called, such as
    painting during training, should be inside `uncompiled()`.
    """
    model.to(device)
    # On a CPU, PyTorch 2.13 ends the process in the backward pass of a group normalisation of this layout whose input needs no
    # gradient, as behind frozen parts.
    if settings.channels_last and not (device.type == "cpu" and settings.train):
        # Only weights with four dimensions have this layout; activations follow the weights of the first convolution.
        model.unet.to(memory_format=torch.channels_last)
    # PyTorch prefers cuDNN's attention on Hopper, whose backward pass is reported to give NaN; flash attention takes its place.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if settings.compile:
        model.unet.compile(dynamic=False)
        model.conditioner.compile(dynamic=False)
    return model


def uncompiled() -> AbstractContextManager[object]:
    """Inside this block, a compiled model runs as if it were not, and nothing is compiled."""
    # Dynamo is imported by this call; a process that compiled nothing has no need of it.
    block: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return block


@torch.no_grad()
def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the device of `parameter` and in its memory layout.

    For moments that are put back into an optimizer: files hold them contiguous, and a fused AdamW pairs the elements of parameter
    and moment by their places in memory, so that in another layout it would silently take the wrong ones.
    """
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
