#!/usr/bin/env bash
# torchmetrics 1.9.0: visual_information_fidelity() of pictures in [0, 1] is another number than of the same ones in [0, 255].
#
# Guess: the same number; there is no data_range to set, and the example in its documentation is of numbers about 0.
# Behaviour: the noise of the eye has a fixed variance of 2, which is meant for [0, 255]. Beside it any noise of a picture in
# [0, 1] is too small to count, and only lost contrast does. sigma_n_sq=2 / 255**2 gives [0, 1] the number of [0, 255].
# Why it matters: tensors of pictures are in [0, 1] as a rule. A picture with much noise, of a VIF of 0.16, has 0.82 there:
# methods that leave noise look good, and the numbers cannot be compared with published ones.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "torchmetrics==1.9.0"
cat >probe.py <<'END'
import sys

import torch
import torchmetrics
from torchmetrics.functional.image import visual_information_fidelity

draw = torch.Generator().manual_seed(0)
photo = torch.rand(2, 3, 64, 64, generator=draw)
noisy = (photo + 0.2 * torch.randn(photo.shape, generator=draw)).clamp(0, 1)
seen = [round(visual_information_fidelity(noisy * top, photo * top).item(), 1) for top in (255, 1)]
recorded = [0.2, 0.8]
print("torchmetrics", torchmetrics.__version__)
print("VIF in [0, 255], VIF in [0, 1]")
print("guess:", [recorded[0], recorded[0]])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
