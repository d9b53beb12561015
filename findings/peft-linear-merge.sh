#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter(..., combination_type="linear") of two equal LoRAs, half and half, can give nothing at all.
#
# Guess: "linear" with weights 0.5 and 0.5 is the mean of what the two adapters add to a weight.
# Behaviour: the A matrices are summed, and the B matrices are summed, with the roots of the weights, so that each A meets the
# other's B. An adapter with A and B negated adds the same to the weight, and merging it with the original cancels both. "cat"
# is the sum that was meant, at the ranks' sum.
# Why it matters: "linear" is what is taken for styles and subjects that were trained one by one. The result depends on signs
# that mean nothing, and a merge that fades is taken for a matter of the weights.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "peft==0.21.2"
cat >probe.py <<'END'
import sys

import peft
import torch

layer = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
torch.nn.init.zeros_(layer[0].weight)
model = peft.get_peft_model(layer, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), adapter_name="one")
model.add_adapter("other", peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
for name, sign in (("one", 1.0), ("other", -1.0)):
    part = model.base_model.model[0]
    torch.nn.init.constant_(part.lora_A[name].weight, sign)
    torch.nn.init.constant_(part.lora_B[name].weight, sign)
for kind in ("linear", "cat"):
    model.add_weighted_adapter(["one", "other"], [0.5, 0.5], kind, combination_type=kind)
seen = {}
for name in ("one", "other", "linear", "cat"):
    model.set_adapter(name)
    seen[name] = round(model(torch.ones(1, 1)).item(), 4)
recorded = {"one": 1.0, "other": 1.0, "linear": 0.0, "cat": 1.0}
print("peft", peft.__version__)
print("what each adapter adds to a weight of 0")
print("guess:", {**recorded, "linear": 1.0})
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
