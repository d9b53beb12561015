#!/usr/bin/env bash
# kornia 0.9.0: RandomHorizontalFlip and RandomVerticalFlip put boxes 1 px left of, or above, what they hold.
#
# Guess: a box from x = 10 to 20 in a photo of 100 px lies from 80 to 90 after the flip, where its pixels are.
# Behaviour: it lies from 79 to 89. The corners are mirrored about (width - 1) / 2, which is right for the middle of a pixel and
# not for an edge. Rotations and resizing treat corners as edges.
# Why it matters: half of all training samples have boxes that are off by a pixel to one side, and masks that are made of them
# too.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "kornia==0.9.0"
cat >probe.py <<'END'
import sys

import kornia.augmentation
import torch

photo = torch.zeros(1, 3, 60, 100)
photo[..., 10:20, 10:20] = 1
seen = []
for flip in (kornia.augmentation.RandomHorizontalFlip(p=1.0), kornia.augmentation.RandomVerticalFlip(p=1.0)):
    both = kornia.augmentation.AugmentationSequential(flip, data_keys=["input", "bbox_xyxy"])
    flipped, box = both(photo, torch.tensor([[[10.0, 10.0, 20.0, 20.0]]]))
    y, x = torch.where(flipped[0, 0] > 0)
    pixels = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
    seen.append((pixels, [round(edge) for edge in box.flatten().tolist()]))
recorded = [([80, 10, 90, 20], [79, 10, 89, 20]), ([10, 40, 20, 50], [10, 39, 20, 49])]
print("kornia", kornia.__version__)
print("where the pixels are, and where the box is, after a flip of each kind")
print("guess:", [(pixels, pixels) for pixels, _ in recorded])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
