"""Sizes of what the hub has under names that are usual starts, so that a training is counted before anything is downloaded."""

from typing import Any

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"
# Its networks have the sizes of Stable Diffusion v1-4 and of CLIP, but for the first layer, which is counted as widened anyway.
PAINT_BY_EXAMPLE = "Fantasy-Studio/Paint-by-Example"
CLIP = "openai/clip-vit-large-patch14"
# Radford et al., Learning transferable visual models from natural language supervision (2021), table 20: ViT-L/14 at 224 px.
CLIP_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
# Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), f = 8: 83.7 M parameters.
VAE_SIZES = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
# What the U-Nets of the later ones have otherwise than Stable Diffusion v1-4's. Heads are 64 wide.
_TWO: dict[str, Any] = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_XL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "sample_size": 128,
}
_ONES = (
    *(f"CompVis/stable-diffusion-v1-{number}" for number in (1, 2, 3, 4)),
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "runwayml/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting",
    PAINT_BY_EXAMPLE,
)
# Published by Stability AI, and since late 2025 kept under the second name.
_TWOS = [
    f"{owner}/stable-diffusion-2{more}"
    for owner in ("stabilityai", "sd2-community")
    for more in ("", "-base", "-1", "-1-base", "-inpainting")
]
_XLS = ("stabilityai/stable-diffusion-xl-base-1.0", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1")
U_NETS: dict[str, dict[str, Any]] = {**{name: {} for name in _ONES}, **dict.fromkeys(_TWOS, _TWO), **dict.fromkeys(_XLS, _XL)}
"""Hub id -> what its U-Net has otherwise than one from scratch of the default sizes, which are Stable Diffusion v1-4's."""
_XL_VAE = {"sample_size": 1024, "scaling_factor": 0.13025}
VAES: dict[str, dict[str, Any]] = {
    **{name + inside: {} for name in (*_ONES, *_TWOS) for inside in ("", "/vae")},
    **{name + inside: _XL_VAE for name in _XLS for inside in ("", "/vae")},
    "stabilityai/sd-vae-ft-mse": {},
    "stabilityai/sd-vae-ft-ema": {},
    "stabilityai/sdxl-vae": _XL_VAE,
    "madebyollin/sdxl-vae-fp16-fix": _XL_VAE,
}
"""Hub id, also of a pipeline or the VAE in it -> what the VAE has otherwise than `VAE_SIZES`."""
