"""One table of names: the original code's (LDM) on one side, diffusers' on the other. It is read in both directions.

    model.diffusion_model.input_blocks.1.0.in_layers.0.weight   ◀─▶   down_blocks.0.resnets.0.norm1.weight
    first_stage_model.encoder.mid.attn_1.q.weight [C, C, 1, 1]  ◀─▶   encoder.mid_block.attentions.0.to_q.weight [C, C]
    cond_stage_model.mapper.resblocks.0.attn.c_qkv.bias [3C]    ◀─▶   mapper.blocks.0.attn1.to_{q,k,v}.bias, three of [C]

Pure: names and views of tensors, no files. What a table does not know comes back by name, for the caller to refuse.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

# Where the original code keeps each network. The conditioner's table below has names from the top of the file.
LDM_UNET = "model.diffusion_model."
LDM_VAE = "first_stage_model."
LDM_ENCODER = "cond_stage_model.transformer."
# transformers 4 has the vision model inside another module; transformers 5 has it bare, which is how it is named here.
VISION_MODEL = "vision_model."
# A counter 0, 1, 2, ... that some versions of transformers save.
POSITION_IDS = "embeddings.position_ids"
# What diffusers' configuration of XL's U-Net says of the pooled words and sizes that it is told.
ADDED = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLDER_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Entry:
    """A module, or a single tensor, on both sides; what follows its name is the same on both.

    Attributes:
        ldm: its name in the original code.
        diffusers: its name in diffusers; several where the original stacks their outputs along the first axis.
        kernel: the original keeps the weight of this linear layer as that of a 1 x 1 convolution.
    """

    ldm: str
    diffusers: tuple[str, ...]
    kernel: bool = False


class NameTable:
    """Entries, found by the longest name that a tensor's name begins with."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = list(entries)
        self._by_ldm = {entry.ldm: entry for entry in self.entries}
        self._by_diffusers = {name: entry for entry in self.entries for name in entry.diffusers}

    def ldm_name(self, name: str) -> str | None:
        """The original code's name of a module that diffusers calls so; null where the table does not have it."""
        found = _longest(name, self._by_diffusers)
        return self._by_diffusers[found].ldm + name[len(found) :] if found else None

    def to_diffusers(self, tensors: Tensors) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors under diffusers' names (views of the given ones), and the names that the table does not have."""
        named: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            found = _longest(name, self._by_ldm)
            if not found:
                unknown.append(name)
                continue
            entry, rest = self._by_ldm[found], name[len(found) :]
            if entry.kernel and tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]
            parts = tensor.chunk(len(entry.diffusers)) if len(entry.diffusers) > 1 else (tensor,)
            named |= {own + rest: part for own, part in zip(entry.diffusers, parts, strict=False)}
        return named, unknown

    def to_ldm(self, tensors: Tensors) -> tuple[dict[str, Tensor], list[str]]:
        """The inverse of `to_diffusers`; stacked tensors are copies."""
        named: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            found = _longest(name, self._by_diffusers)
            if not found:
                unknown.append(name)
                continue
            entry, rest = self._by_diffusers[found], name[len(found) :]
            if len(entry.diffusers) > 1:
                if found == entry.diffusers[0]:
                    named[entry.ldm + rest] = torch.cat([tensors[part + rest] for part in entry.diffusers])
                continue
            named[entry.ldm + rest] = tensor[:, :, None, None] if entry.kernel and tensor.ndim == 2 else tensor
        return named, unknown


def _longest(name: str, known: Mapping[str, Entry]) -> str | None:
    words = name.split(".")
    candidates = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((candidate for candidate in candidates if candidate in known), None)


def unet_table(attention: tuple[bool, ...], layers: int, told: bool = False) -> NameTable:
    """Names of a U-Net of Stable Diffusion's kind.

    Args:
        attention: whether a level has transformer blocks, from the full resolution downwards.
        layers: residual blocks of a level on the way down; one more on the way up.
        told: whether it is told of sizes and pooled words, as XL's.
    """
    pairs = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    if told:
        pairs |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level, has_attention in enumerate(attention):
        for layer in range(layers):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}"
            resnets[f"{block}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if has_attention:
                pairs[f"{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
        if level < len(attention) - 1:
            pairs[f"input_blocks.{(level + 1) * (layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, has_attention in enumerate(reversed(attention)):
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            resnets[f"{block}.0"] = f"up_blocks.{level}.resnets.{layer}"
            if has_attention:
                pairs[f"{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if level < len(attention) - 1:
            # The last module of the level's last block, behind the attention if it has one.
            block = f"output_blocks.{level * (layers + 1) + layers}"
            pairs[f"{block}.{2 if has_attention else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    inner = {f"{ldm}.{a}": f"{own}.{b}" for ldm, own in resnets.items() for a, b in _RESNET.items()}
    return NameTable(Entry(ldm, (own,)) for ldm, own in (pairs | inner).items())


def vae_table(levels: int, layers: int) -> NameTable:
    """Names of a VAE of Stable Diffusion's kind.

    Args:
        levels: resolutions, each half of the one before.
        layers: residual blocks of a level of the encoder; the decoder has one more.
    """
    pairs = {name: name for name in ("quant_conv", "post_quant_conv")}
    resnets: dict[str, str] = {}
    entries: list[Entry] = []
    for side in ("encoder", "decoder"):
        pairs |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        pairs[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        pairs[f"{side}.mid.attn_1.norm"] = f"{side}.mid_block.attentions.0.group_norm"
        resnets |= {f"{side}.mid.block_{number + 1}": f"{side}.mid_block.resnets.{number}" for number in range(2)}
        attention = f"{side}.mid_block.attentions.0"
        entries += [Entry(f"{side}.mid.attn_1.{a}", (f"{attention}.{b}",), kernel=True) for a, b in _VAE_ATTENTION.items()]
    for level in range(levels):
        mirrored = levels - 1 - level  # The original counts the decoder's levels from the full resolution, diffusers as run.
        for layer in range(layers):
            resnets[f"encoder.down.{level}.block.{layer}"] = f"encoder.down_blocks.{level}.resnets.{layer}"
        for layer in range(layers + 1):
            resnets[f"decoder.up.{mirrored}.block.{layer}"] = f"decoder.up_blocks.{level}.resnets.{layer}"
        if level < levels - 1:
            pairs[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
            pairs[f"decoder.up.{mirrored}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
    inner = {f"{ldm}.{a}": f"{own}.{b}" for ldm, own in resnets.items() for a, b in _VAE_RESNET.items()}
    return NameTable([*entries, *(Entry(ldm, (own,)) for ldm, own in (pairs | inner).items())])


def conditioner_table(blocks: int) -> NameTable:
    """Names of all that stands between the vision encoder and the U-Net: mapper, normalisation, projection, null vector.

    The original mapper is that of GLIDE with one head, whose queries, keys and values are three thirds of one layer's output.
    """
    pairs = {"cond_stage_model.final_ln": "final_layer_norm", "proj_out": "proj_out", "learnable_vector": "uncond_vector"}
    entries = []
    for number in range(blocks):
        ldm, own = f"cond_stage_model.mapper.resblocks.{number}", f"mapper.blocks.{number}"
        entries.append(Entry(f"{ldm}.attn.c_qkv", tuple(f"{own}.attn1.to_{letter}" for letter in "qkv")))
        pairs |= {
            f"{ldm}.attn.c_proj": f"{own}.attn1.to_out.0",
            f"{ldm}.ln_1": f"{own}.norm1",
            f"{ldm}.mlp.c_fc": f"{own}.ff.net.0.proj",
            f"{ldm}.mlp.c_proj": f"{own}.ff.net.2",
            f"{ldm}.ln_2": f"{own}.norm3",
        }
    return NameTable([*entries, *(Entry(ldm, (own,)) for ldm, own in pairs.items())])


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbered modules follow a prefix: 1 + the largest number, or 0."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)


def starting_with(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors with a prefix to each name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def bare_encoder_names(tensors: Tensors) -> dict[str, Tensor]:
    """Names of a CLIP vision model as transformers 5 has them, whichever version named it."""
    return {name.removeprefix(VISION_MODEL): tensor for name, tensor in tensors.items()}


def current_vae_names(tensors: Tensors) -> dict[str, Tensor]:
    """A VAE in diffusers' layout whose attention may have the names (and 1 x 1 kernels) of older versions, in today's."""
    named = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        parent, _, own = module.rpartition(".")
        if own in _OLDER_VAE_ATTENTION and parent.endswith("attentions.0"):
            name = f"{parent}.{_OLDER_VAE_ATTENTION[own]}.{kind}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        named[name] = tensor
    return named
