#!/usr/bin/env bash
# torch 2.13.0: randn_like() of a tensor in channels_last gives other noise at the same places, from the same seed.
#
# Guess: the memory format is a matter of speed: values at the same indices are the same.
# Behaviour: numbers are drawn in the order of memory, so noise[0, 0, 0, 1] is another number. rand_like() and dropout() do the
# same, bernoulli() does not. memory_format=torch.contiguous_format brings the old numbers back.
# Why it matters: channels_last is switched on for speed in training and sampling. A seed then gives another picture, another
# mask of dropout and another loss, which looks like an error of the change.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6"
cat >probe.py <<'END'
import sys

import torch

plain = torch.zeros(1, 4, 8, 8)
last = plain.to(memory_format=torch.channels_last)


def noise(tensor, **options):
    torch.manual_seed(0)
    return torch.randn_like(tensor, **options)


kept = noise(last, memory_format=torch.contiguous_format)
seen = [torch.equal(noise(plain), noise(last)), torch.equal(noise(plain), kept)]
recorded = [False, True]
print("torch", torch.__version__)
print("is the noise the same in channels_last; so with memory_format=torch.contiguous_format")
print("guess:", [True, True])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
