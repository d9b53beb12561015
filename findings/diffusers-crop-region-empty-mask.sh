#!/usr/bin/env bash
# diffusers 0.42.1: get_crop_region() of a mask that marks nothing gives a region whose right edge lies left of its left edge.
#
# Guess: the whole picture, or an error that says what is wrong with the mask.
# Behaviour: the search for the mask's edges meets in the far corner, and the padding is added to that: (96, 86, 4, -6) for a
# mask of 100 x 80 px.
# Why it matters: it is what inpainting pipelines cut out for padding_mask_crop. A mask that a detector or a threshold left
# empty, one in a batch of many, shows up as an error about coordinates in the cropping, or as an empty crop, and not as an
# empty mask.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1" "pillow==13.0.0"
cat >probe.py <<'END'
import sys

import diffusers
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

left, top, right, bottom = seen = VaeImageProcessor(vae_scale_factor=8).get_crop_region(Image.new("L", (100, 80)), 64, 64, pad=4)
recorded = (96, 86, 4, -6)
print("diffusers", diffusers.__version__)
print("guess:", (0, 0, 100, 80), "or an error")
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
