"""The sizes of networks, read off the shapes of their tensors, where a checkpoint in the original layout tells nothing else."""

from math import isqrt
from typing import Any

from transformers import CLIPVisionConfig

from pbe_train.checkpoints.key_mapping import Tensors, count_blocks

# Neither can be read off a shape; Rombach et al. (2022) and all Stable Diffusion 1.x models have 8 heads and 32 groups.
HEADS = 8
GROUPS = 32
# By which all Stable Diffusion 1.x models scale their latents.
SCALE = 0.18215
# Radford et al. (2021): every CLIP of OpenAI has heads 64 wide, and its activation is a fast approximation of GELU.
CLIP_HEAD = 64


def original_levels(unet: Tensors) -> tuple[tuple[bool, ...], int]:
    """Whether each level of a U-Net in the original layout has attention, and its residual blocks a level.

    Raises:
        KeyError: these are no tensors of such a U-Net.
    """
    blocks = count_blocks(unet, "input_blocks.")
    ends = [number for number in range(blocks) if f"input_blocks.{number}.0.op.weight" in unet]
    # The first layer, then each level's residual blocks and, but for the last, the convolution that halves the resolution.
    layers = ends[0] - 1 if ends else blocks - 1
    if layers < 1:
        raise KeyError("input_blocks.1.0.in_layers.0.weight")
    firsts = range(1, blocks, layers + 1)
    return tuple(f"input_blocks.{first}.1.norm.weight" in unet for first in firsts), layers


def original_unet_config(unet: Tensors) -> dict[str, Any]:
    """Diffusers' configuration of a U-Net in the original layout.

    Raises:
        KeyError: these are no tensors of such a U-Net; the key names one that is missing.
    """
    attention, layers = original_levels(unet)
    widths = [unet[f"input_blocks.{1 + level * (layers + 1)}.0.out_layers.3.weight"].shape[0] for level in range(len(attention))]
    return {
        "sample_size": 64,
        "in_channels": unet["input_blocks.0.0.weight"].shape[1],
        "out_channels": unet["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "cross_attention_dim": unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": HEADS,
        "norm_num_groups": GROUPS,
    }


def vae_config(vae: Tensors) -> dict[str, Any]:
    """Diffusers' configuration of a Stable Diffusion 1.x VAE, from its tensors under diffusers' names.

    Raises:
        KeyError: these are no tensors of such a VAE; the key names one that is missing.
    """
    levels = count_blocks(vae, "encoder.down_blocks.")
    widths = [vae[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count_blocks(vae, "encoder.down_blocks.0.resnets."),
        "latent_channels": vae["post_quant_conv.weight"].shape[0],
        "norm_num_groups": GROUPS,
        "scaling_factor": SCALE,
    }


def vision_config(encoder: Tensors) -> CLIPVisionConfig:
    """Transformers' configuration of a CLIP vision model of OpenAI's, from its tensors under bare names.

    Raises:
        KeyError: these are no tensors of such a model; the key names one that is missing.
    """
    patches = encoder["embeddings.patch_embedding.weight"]
    positions = encoder["embeddings.position_embedding.weight"].shape[0] - 1
    hidden = patches.shape[0]
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=encoder["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count_blocks(encoder, "encoder.layers."),
        num_attention_heads=max(1, hidden // CLIP_HEAD),
        image_size=isqrt(positions) * patches.shape[-1],
        patch_size=patches.shape[-1],
        hidden_act="quick_gelu",
    )
