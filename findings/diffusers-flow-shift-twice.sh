#!/usr/bin/env bash
# diffusers 0.42.1: FlowMatchEulerDiscreteScheduler(shift=3) shifts its smallest sigma twice, and a step goes to almost nothing.
#
# Guess: 4 steps of shift 3 go through the shifted 1, 3/4, 1/2, 1/4, which is 1, 0.9, 0.75, 0.5.
# Behaviour: 1, 0.858, 0.602, 0.009. The ends of the range are kept as shifted, spread over evenly down to 0.003, and shifted
# once more.
# See https://github.com/huggingface/diffusers/issues/13243, which tells the cause.
# Why it matters: the last of few steps removes 0.9 % of the noise, the one before it 59 %. Sigmas that are given to
# set_timesteps() are shifted once, so two ways to sample one model differ.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1" "pillow==13.0.0"
cat >probe.py <<'END'
import sys

import diffusers

scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(4)
evenly = [round(float(sigma), 3) for sigma in scheduler.sigmas]
scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
given = [round(float(sigma), 3) for sigma in scheduler.sigmas]
seen = [evenly, given]
recorded = [[1.0, 0.858, 0.602, 0.009, 0.0], [1.0, 0.9, 0.75, 0.5, 0.0]]
print("diffusers", diffusers.__version__)
print("sigmas of 4 steps; of 1, 3/4, 1/2, 1/4 given")
print("guess:", [recorded[1], recorded[1]])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
