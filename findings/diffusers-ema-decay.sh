#!/usr/bin/env bash
# diffusers 0.42.1: EMAModel(decay=0.9999) without warm-up has a warm-up: its decay is (1 + step) / (10 + step) until that is
# larger.
#
# Guess: with use_ema_warmup=False, which is the default, the decay is 0.9999 from the first step.
# Behaviour: it is 0.18 at the second step, 0.99 after 900 and reaches 0.9999 after 90,000. use_ema_warmup=True is another
# curve, not the only one. min_decay sets the lower end.
# Why it matters: a fine-tuning of 1,000 steps averages over its last hundred, not over all of it, and is compared with papers
# whose average has the decay that was asked for.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1" "pillow==13.0.0"
cat >probe.py <<'END'
import sys

import diffusers
import torch
from diffusers.training_utils import EMAModel

average = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999)
steps = (2, 10, 100, 1_000, 10_000, 100_000)
seen = [round(average.get_decay(step), 4) for step in steps]
recorded = [0.1818, 0.5263, 0.9174, 0.9911, 0.9991, 0.9999]
print("diffusers", diffusers.__version__)
print("decay at steps", steps)
print("guess:", [0.9999] * len(steps))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
