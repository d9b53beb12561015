#!/usr/bin/env bash
# bitsandbytes 0.50.2: the first step of its AdamW turns channels_last weights into contiguous ones.
#
# Guess: an optimizer's step changes the values of a weight and leaves its layout in memory as it was, as PyTorch's AdamW does.
# Behaviour: every parameter is made contiguous in the first step (on a CPU), by AdamW8bit and the AdamW of 32 bits alike. Values are right.
# Why it matters: channels_last is asked for once, before the optimizer is made, and convolutions are faster for it on GPUs. With
# this optimizer the model runs in the other layout from the second step on, converts at each convolution, and nothing is said;
# whoever compares optimizers by speed compares layouts.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "bitsandbytes==0.50.2"
cat >probe.py <<'END'
import sys

import bitsandbytes
import torch


def kept(kind):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)
    optimizer = kind(layer.parameters(), lr=1e-3)
    layer(torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.step()
    return layer.weight.is_contiguous(memory_format=torch.channels_last)


kinds = {
    "torch AdamW": torch.optim.AdamW,
    "bitsandbytes AdamW": bitsandbytes.optim.AdamW,
    "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit,
}
seen = {name: kept(kind) for name, kind in kinds.items()}
recorded = dict(zip(kinds, (True, False, False)))
print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
print("is a channels_last weight still channels_last after a step?")
print("guess:", dict.fromkeys(kinds, True))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
