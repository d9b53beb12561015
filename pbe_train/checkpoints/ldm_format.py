"""The original code's layout (LDM): one .ckpt or .safetensors file with all networks of Stable Diffusion or Paint by Example.

read_ldm    file ─▶ PretrainedModel: what a training needs under diffusers' names, the rest counted by kind
write_ldm   ModelTensors ─▶ file: with all that the original code's strict loading asks for
"""

import inspect
import json
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_core.errors import InputError
from pbe_core.weight_files import save_tensors
from pbe_core.words import number_of
from pbe_train.checkpoints.key_mapping import (
    ADDED,
    LDM_ENCODER,
    LDM_UNET,
    LDM_VAE,
    POSITION_IDS,
    VISION_MODEL,
    NameTable,
    Tensors,
    conditioner_table,
    count_blocks,
    prefixed,
    starting_with,
    unet_table,
    vae_table,
)
from pbe_train.checkpoints.pretrained import METADATA_KEY, ModelTensors, PretrainedModel, check_depth, read_tensor_file
from pbe_train.config import TIMESTEPS
from pbe_train.model.pipeline import Run

CONDITION = "cond_stage_model."
MAPPER = f"{CONDITION}mapper.resblocks."
# All that stands between vision encoder and U-Net.
CONDITIONER = (f"{CONDITION}mapper.", f"{CONDITION}final_ln.", "proj_out.", "learnable_vector")
# Networks beside a whole model that change what it predicts.
ADDED_NETWORKS = {"control_model.": "a ControlNet", "lora_": "a LoRA", "ip_adapter.": "an adapter", "adapter.": "an adapter"}

# No shape says these; Rombach et al. (2022) and all Stable Diffusion 1.x models have 8 heads, 32 groups, this scale of latents.
# Stable Diffusion 2.x and XL have heads 64 wide, and are known by the linear layers around their transformers; XL also by what
# it is told of sizes, each as a vector of 256.
HEADS = 8
WIDE_HEAD = 64
XL_SIZE, XL_CELLS = 256, 128
GROUPS = 32
SCALE = 0.18215
# Radford et al. (2021): every CLIP of OpenAI has heads 64 wide, and its activation is a fast approximation of GELU.
CLIP_HEAD = 64

SUFFIXES = (".safetensors", ".ckpt")
DEFAULT_NAME = "model.safetensors"
# Options that have no effect on what a network computes from inputs of a given size.
NO_EFFECT = {"sample_size", "force_upcast", "upcast_attention"}
VISION_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def read_ldm(path: Path) -> PretrainedModel:
    """The model in such a file.

    Raises:
        InputError: not one of these models, or tensors within its networks that no such network has.
    """
    tensors, metadata, others = read_tensor_file(path)
    unet, vae = starting_with(LDM_UNET, tensors), starting_with(LDM_VAE, tensors)
    if not unet:
        raise InputError(
            f"{path}: no tensor here begins with {LDM_UNET}, so it is another network (a LoRA, a VAE alone, ...); "
            "give a whole Stable Diffusion or Paint by Example model"
        )
    # transformers 5 writes one level less.
    bare = f"{LDM_ENCODER}embeddings.patch_embedding.weight" in tensors
    vision_start = LDM_ENCODER if bare else LDM_ENCODER + VISION_MODEL
    vision = starting_with(vision_start, tensors)
    try:
        config = unet_config_of(unet)
        encoder_config = vision_config_of(vision) if vision else None
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing: it is cut short or no Stable Diffusion model") from None

    aside = _left_aside(path, tensors, vision_start)
    placed = {name for names in aside.values() for name in names}
    vision.pop(POSITION_IDS, None)
    own_unet, odd_unet = unet_names(config).to_diffusers(unet)
    own_vae, odd_vae = _vae_table(vae).to_diffusers({k: v for k, v in vae.items() if LDM_VAE + k not in placed})
    rest = {name: tensor for name, tensor in tensors.items() if name.startswith(CONDITIONER)}
    conditioner, odd = conditioner_table(count_blocks(rest, MAPPER)).to_diffusers(rest)
    odd += [LDM_UNET + name for name in odd_unet] + [LDM_VAE + name for name in odd_vae]
    if odd:
        raise InputError(
            f"{path}: {number_of(len(odd), 'tensor')} within its networks that no Stable Diffusion or Paint by Example "
            f"model has, first {min(odd)}"
        )
    if encoder_config is not None:
        check_depth(str(path), count_blocks(conditioner, "mapper.blocks."), encoder_config.num_hidden_layers, metadata)
    left = {what: len(names) for what, names in aside.items()}
    if others:
        left[f"what is no tensor: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}"] = len(others)
    return PretrainedModel(
        where=str(path),
        kind="Paint by Example, original layout" if conditioner else "Stable Diffusion, original layout",
        unet_config=config,
        unet=own_unet,
        conditioner=conditioner or None,
        encoder=vision or None,
        encoder_config=encoder_config,
        vae=own_vae or None,
        # The original code has no other; those of Stable Diffusion 2.x and XL have both, and do not write which.
        prediction=None if config["use_linear_projection"] else "epsilon",
        by_words="text encoder" in aside and not vision,
        metadata=metadata,
        aside=left,
    )


def _left_aside(path: Path, tensors: Tensors, vision_start: str) -> dict[str, list[str]]:
    """What a training has no use for: what it is -> names of its tensors. Together with the networks that is the whole file."""
    # The first beginning that fits counts; null: a network's.
    places = {
        vision_start + POSITION_IDS: "position_ids",
        f"{LDM_VAE}loss.": "loss of the VAE's training",
        **dict.fromkeys((LDM_UNET, LDM_VAE, vision_start, *CONDITIONER)),
        # Whose names have changed with the version of transformers that wrote them.
        CONDITION: "text encoder",
        "conditioner.embedders.": "text encoder",
        "model_ema.": "moving average (EMA)",
        **dict.fromkeys(schedule_buffers(), "schedule"),
    }
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if added := next((network for start, network in ADDED_NETWORKS.items() if name.startswith(start)), None):
            raise InputError(f"{path}: {added} ({name}, ...) beside the model, which would be lost; give the model without it")
        other = f"{name.partition('.')[0]}.*" if "." in name else name
        if what := next((what for start, what in places.items() if name.startswith(start)), other):
            groups.setdefault(what, []).append(name)
    return groups


def levels_of(unet: Tensors) -> tuple[tuple[bool, ...], int]:
    """Whether each level of a U-Net in this layout has attention, and its residual blocks a level. Raises as `unet_config_of`."""
    blocks = count_blocks(unet, "input_blocks.")
    ends = [number for number in range(blocks) if f"input_blocks.{number}.0.op.weight" in unet]
    # The first layer, then each level's residual blocks and, but for the last, the convolution that halves the resolution.
    layers = ends[0] - 1 if ends else blocks - 1
    if layers < 1:
        raise KeyError("input_blocks.1.0.in_layers.0.weight")
    firsts = range(1, blocks, layers + 1)
    return tuple(f"input_blocks.{first}.1.norm.weight" in unet for first in firsts), layers


def unet_config_of(unet: Tensors) -> dict[str, Any]:
    """Diffusers' configuration of a U-Net in this layout.

    Raises:
        KeyError: these are no tensors of such a U-Net; the key names one that is missing.
    """
    attention, layers = levels_of(unet)
    firsts = [1 + level * (layers + 1) for level in range(len(attention))]
    widths = [unet[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    depths = [max(1, count_blocks(unet, f"input_blocks.{first}.1.transformer_blocks.")) for first in firsts]
    newer = unet["middle_block.1.proj_in.weight"].ndim == 2
    told = unet.get("label_emb.0.0.weight")
    added: dict[str, Any] = {}
    if told is not None:
        added = {"sample_size": XL_CELLS, **dict(zip(ADDED, ("text_time", XL_SIZE, told.shape[1]), strict=True))}
    return {
        "sample_size": 64,
        "in_channels": unet["input_blocks.0.0.weight"].shape[1],
        "out_channels": unet["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "cross_attention_dim": unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": [max(1, width // WIDE_HEAD) for width in widths] if newer else HEADS,
        "norm_num_groups": GROUPS,
        "use_linear_projection": newer,
        "transformer_layers_per_block": depths if max(depths) > 1 else 1,
        **added,
    }


def vae_config_of(vae: Tensors) -> dict[str, Any]:
    """Diffusers' configuration of a Stable Diffusion 1.x VAE, from its tensors under diffusers' names. Raises likewise."""
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


def vision_config_of(encoder: Tensors) -> CLIPVisionConfig:
    """Transformers' configuration of a CLIP vision model of OpenAI's, from its tensors under bare names. Raises likewise."""
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


def check_ldm(run: Run, parts: ModelTensors) -> None:
    """Refuse a run that the original code could not paint with.

    The file holds the shapes of its tensors and nothing else, so all else must be as published.

    Raises:
        InputError: naming the setting.
    """
    if run.settings.prediction != "epsilon":
        raise InputError(
            f"--format ldm: the run predicts {run.settings.prediction}, the original code samples from predicted noise only; "
            "export with --format diffusers"
        )
    if run.identity.unet.get("use_linear_projection"):
        raise InputError(
            "--format ldm: the run's U-Net is of Stable Diffusion 2.x or XL (use_linear_projection), which the original "
            "code cannot make; export with --format diffusers"
        )
    vae = {**run.vae.config, "scaling_factor": run.identity.scaling_factor}
    vision = run.model.conditioner.model.config
    encoder = {name: getattr(vision, name) for name in VISION_SETTINGS}
    unet = unet_names(run.identity.unet).to_ldm(parts.unet)[0]
    _compare("U-Net", run.identity.unet, lambda: _defaults(UNet2DConditionModel) | unet_config_of(unet))
    _compare("VAE", vae, lambda: _defaults(AutoencoderKL) | vae_config_of(parts.vae))
    _compare("vision encoder", encoder, lambda: vision_config_of(parts.encoder).to_dict())


def _defaults(network: type) -> dict[str, Any]:
    parameters = inspect.signature(network.__init__).parameters  # type: ignore[misc]
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _compare(network: str, own: Mapping[str, Any], read_back: Callable[[], dict[str, Any]]) -> None:
    try:
        found = read_back()
    except KeyError as error:
        raise InputError(f"--format ldm: the run's {network} has no {error.args[0]}; export with --format diffusers") from None
    for name in sorted(own.keys() & found.keys() - NO_EFFECT):
        ours, theirs = (list(value) if isinstance(value, tuple) else value for value in (own[name], found[name]))
        if ours != theirs:
            raise InputError(
                f"--format ldm: the run's {network} has {name} {ours!r}, which the file cannot say and is read back as "
                f"{theirs!r}; export with --format diffusers"
            )


def write_ldm(run: Run, parts: ModelTensors, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the file: .safetensors, or .ckpt with the tensors under `state_dict`; the metadata goes inside.

    Raises:
        InputError: a tensor that the original code has no name for.
    """
    own_unet, odd_unet = unet_names(run.identity.unet).to_ldm(parts.unet)
    own_vae, odd_vae = _vae_table(parts.vae).to_ldm(parts.vae)
    blocks = count_blocks(parts.conditioner, "mapper.blocks.")
    own_conditioner, odd_conditioner = conditioner_table(blocks).to_ldm(parts.conditioner)
    if odd := odd_unet + odd_vae + odd_conditioner:
        raise InputError(f"{min(odd)}: the original code has no name for this tensor; export with --format diffusers")
    positions = parts.encoder["embeddings.position_embedding.weight"].shape[0]
    named = {
        **schedule_buffers(),
        **prefixed(LDM_UNET, own_unet),
        **prefixed(LDM_VAE, own_vae),
        LDM_ENCODER + VISION_MODEL + POSITION_IDS: torch.arange(positions)[None],
        **prefixed(LDM_ENCODER + VISION_MODEL, parts.encoder),
        **own_conditioner,
    }
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    if path.suffix == ".safetensors":
        save_tensors(tensors, path, {"format": "pt", METADATA_KEY: json.dumps(metadata)})
    else:
        torch.save({"state_dict": tensors, "global_step": run.step, METADATA_KEY: json.dumps(metadata)}, path)


def schedule_buffers() -> dict[str, Tensor]:
    """The noise schedule as the original code saves it: float32 [1000] each, computed in float64.

    Source: Ho et al., Denoising diffusion probabilistic models (2020), equations 4 to 7; betas linear in their square root.
    """
    # On the CPU also where a model's sizes are counted on `meta`.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64, device="cpu") ** 2
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": variance,
        # The first variance is 0, whose logarithm is not finite.
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
    }
    return {name: values.float() for name, values in buffers.items()}


def unet_names(config: Mapping[str, Any]) -> NameTable:
    """Names of a U-Net of this configuration (diffusers) here and in the original code."""
    """The table for a U-Net of this diffusers configuration."""
    attention = tuple("CrossAttn" in kind for kind in config["down_block_types"])
    return unet_table(attention, int(config["layers_per_block"]), ADDED[0] in config and config[ADDED[0]] is not None)


def _vae_table(vae: Tensors) -> NameTable:
    """The table for a VAE in either layout."""
    levels = max(count_blocks(vae, "encoder.down."), count_blocks(vae, "encoder.down_blocks."))
    first = ("encoder.down.0.block.", "encoder.down_blocks.0.resnets.")
    return vae_table(levels, max(count_blocks(vae, prefix) for prefix in first))
