#!/usr/bin/env bash
# diffusers 0.42.1 and peft 0.21.2: a LoRA saved with save_lora_weights() and loaded again has lost its alpha, and so its
# strength.
#
# Guess: a LoRA of rank 4 and alpha 16 paints the same after saving and loading.
# Behaviour: get_peft_model_state_dict() holds no alpha, save_lora_weights() writes none unless it is given
# unet_lora_adapter_metadata, and loading takes alpha = rank. The scaling falls from 4 to 1, without a word. save_lora_adapter()
# of the model itself keeps it.
# See https://github.com/huggingface/diffusers/issues/6087, of 2023.
# Why it matters: alpha = 2 x rank is usual. What was trained and looked well is a half or a quarter as strong where it is used.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1" "pillow==13.0.0" "peft==0.21.2"
cat >probe.py <<'END'
import sys

import diffusers
import peft
import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader


def network():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(**blocks, **small, cross_attention_dim=8, attention_head_dim=4)


def scalings(model):
    return sorted({scale for part in model.modules() if hasattr(part, "lora_A") for scale in part.scaling.values()})


trained, loaded = network(), network()
trained.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]))
Loader.save_lora_weights("lora", unet_lora_layers=peft.get_peft_model_state_dict(trained))
weights, alphas = Loader.lora_state_dict("lora", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)[:2]
Loader.load_lora_into_unet(weights, network_alphas=alphas, unet=loaded)
seen = [scalings(trained), scalings(loaded)]
recorded = [[4.0], [1.0]]
print("diffusers", diffusers.__version__, "peft", peft.__version__)
print("strength as trained, as loaded")
print("guess:", [[4.0], [4.0]])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
