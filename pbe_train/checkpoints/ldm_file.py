"""A checkpoint in the original code's layout (LDM): Stable Diffusion 1.x or Paint by Example, as .ckpt or .safetensors.

One flat dictionary holds U-Net, VAE, the vision or text encoder, and much that a training needs and a start does not.
"""

from pathlib import Path

import torch
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pbe_train.checkpoints.files import read_recorded
from pbe_train.checkpoints.key_mapping import (
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
from pbe_train.checkpoints.record import check_depth, record_beside
from pbe_train.checkpoints.sizes import original_levels, original_unet_config, vision_config
from pbe_train.checkpoints.source import Source
from pbe_train.config import TIMESTEPS

CONDITION = "cond_stage_model."
MAPPER = f"{CONDITION}mapper.resblocks."
# All that stands between vision encoder and U-Net.
CONDITIONER = (f"{CONDITION}mapper.", f"{CONDITION}final_ln.", "proj_out.", "learnable_vector")
# Beside a whole model they change what it predicts: who starts from the rest of the file starts from another model.
ADDED_NETWORKS = {"control_model.": "a ControlNet", "lora_": "a LoRA", "ip_adapter.": "an adapter", "adapter.": "an adapter"}


def read_original(path: Path) -> Source:
    """The model in such a file.

    Raises:
        InputError: not one of these models, or tensors within its networks that no such network has.
    """
    tensors, record, others = read_recorded(path)
    record = record or record_beside(path.parent, path.name)
    unet, vae = starting_with(LDM_UNET, tensors), starting_with(LDM_VAE, tensors)
    if not unet:
        raise InputError(
            f"{path}: {_other_network(tensors)} (no tensor here begins with {LDM_UNET}); "
            "give a Stable Diffusion 1.x or Paint by Example model"
        )
    vision_start = _vision_start(tensors)
    try:
        attention, layers = original_levels(unet)
        config = original_unet_config(unet)
        vision = starting_with(vision_start, tensors)
        encoder_config = vision_config(vision) if vision else None
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing; the file is cut short or no Stable Diffusion 1.x model") from None

    aside, unknown = _left_aside(path, tensors, vision_start)
    placed = {name for names in aside.values() for name in names}
    vision.pop(POSITION_IDS, None)
    own_unet, odd_unet = unet_table(attention, layers).to_diffusers(unet)
    own_vae, odd_vae = _vae_table(vae).to_diffusers({k: v for k, v in vae.items() if LDM_VAE + k not in placed})
    rest = {name: tensor for name, tensor in tensors.items() if name.startswith(CONDITIONER)}
    conditioner, odd = conditioner_table(count_blocks(rest, MAPPER)).to_diffusers(rest)
    odd += [LDM_UNET + name for name in odd_unet] + [LDM_VAE + name for name in odd_vae]
    if odd:
        raise InputError(
            f"{path}: {number_of(len(odd), 'tensor')} within its networks that no Stable Diffusion 1.x or Paint by Example "
            f"model has, first {min(odd)}; give a model of these kinds"
        )
    if encoder_config is not None:
        check_depth(str(path), count_blocks(conditioner, "mapper.blocks."), encoder_config.num_hidden_layers, record)
    left = {what: len(names) for what, names in aside.items()}
    if others:
        left[f"what is no tensor: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}"] = len(others)
    return Source(
        where=str(path),
        kind="Paint by Example, original layout" if conditioner else "Stable Diffusion, original layout",
        unet_config=config,
        unet=own_unet,
        conditioner=conditioner or None,
        encoder=vision or None,
        encoder_config=encoder_config,
        vae=own_vae or None,
        # The original code predicts the noise; it knows no velocity.
        prediction="epsilon",
        record=record,
        aside=left,
        unknown=unknown,
    )


def _other_network(tensors: Tensors) -> str:
    """What a file without a U-Net of the original layout holds, by the beginnings of its names."""
    kinds = {
        **ADDED_NETWORKS,
        "down_blocks.": "a U-Net or ControlNet of diffusers' layout, of which the folder with its config.json is read",
        "unet.": "a LoRA or U-Net of another program",
        "first_stage_model.": "a VAE alone",
        "encoder.": "a VAE alone",
        "emb_params": "a textual inversion",
        "text_model.": "a CLIP model alone",
        "vision_model.": "a CLIP model alone",
    }
    return next((kind for start, kind in kinds.items() if any(name.startswith(start) for name in tensors)), "no such model")


def _vision_start(tensors: Tensors) -> str:
    """How the names of the vision encoder begin; transformers 5 writes one level less."""
    bare = f"{LDM_ENCODER}embeddings.patch_embedding.weight" in tensors
    return LDM_ENCODER if bare else LDM_ENCODER + VISION_MODEL


def _left_aside(path: Path, tensors: Tensors, vision_start: str) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """What a start has no use for: what it is -> names of its tensors; and which of it no published model has.

    Together with the networks that is the whole file.

    Raises:
        InputError: a network that was added to the model.
    """
    # The first beginning that fits counts; null: a network's.
    places = {
        vision_start + POSITION_IDS: "position_ids",
        f"{LDM_VAE}loss.": "loss of the VAE's training",
        **dict.fromkeys((LDM_UNET, LDM_VAE, vision_start, *CONDITIONER)),
        # Whose names have changed with the version of transformers that wrote them.
        CONDITION: "text encoder",
        "model_ema.": "moving average (EMA)",
        **dict.fromkeys(schedule_buffers(), "schedule"),
    }
    groups: dict[str, list[str]] = {}
    unknown: set[str] = set()
    for name in tensors:
        if added := next((network for start, network in ADDED_NETWORKS.items() if name.startswith(start)), None):
            raise InputError(f"{path}: {added} ({name}, ...) beside the model, which would be lost; give the model without it")
        start = next((start for start in places if name.startswith(start)), None)
        if start is None:
            what = f"{name.partition('.')[0]}.*" if "." in name else name
            unknown.add(what)
            groups.setdefault(what, []).append(name)
        elif what := places[start]:
            groups.setdefault(what, []).append(name)
    return groups, tuple(sorted(unknown))


def original_tensors(
    unet: Tensors, vae: Tensors, encoder: Tensors, conditioner: Tensors, attention: tuple[bool, ...], layers: int
) -> dict[str, Tensor]:
    """A Paint by Example model under the original code's names, with all that its strict loading asks for.

    Args:
        unet: under diffusers' names.
        vae: likewise.
        encoder: under bare names.
        conditioner: under diffusers' names.
        attention: of each level of the U-Net.
        layers: residual blocks of a level of the U-Net.

    Raises:
        InputError: a tensor that the original code has no name for.
    """
    blocks = count_blocks(conditioner, "mapper.blocks.")
    own_unet, odd_unet = unet_table(attention, layers).to_ldm(unet)
    own_vae, odd_vae = _vae_table(vae).to_ldm(vae)
    own_conditioner, odd_conditioner = conditioner_table(blocks).to_ldm(conditioner)
    if odd := odd_unet + odd_vae + odd_conditioner:
        raise InputError(f"{min(odd)}: the original code has no name for this tensor; export with --format diffusers")
    positions = encoder["embeddings.position_embedding.weight"].shape[0]
    return {
        **schedule_buffers(),
        **prefixed(LDM_UNET, own_unet),
        **prefixed(LDM_VAE, own_vae),
        LDM_ENCODER + VISION_MODEL + POSITION_IDS: torch.arange(positions)[None],
        **prefixed(LDM_ENCODER + VISION_MODEL, encoder),
        **own_conditioner,
    }


def schedule_buffers() -> dict[str, Tensor]:
    """The noise schedule as the original code saves it: float32 [1000] each, computed in float64.

    Source: Ho et al., Denoising diffusion probabilistic models (2020), equations 4 to 7; betas linear in their square root.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
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


def _vae_table(vae: Tensors) -> NameTable:
    """The table for a VAE in either layout."""
    levels = max(count_blocks(vae, "encoder.down."), count_blocks(vae, "encoder.down_blocks."))
    first = ("encoder.down.0.block.", "encoder.down_blocks.0.resnets.")
    return vae_table(levels, max(count_blocks(vae, prefix) for prefix in first))
