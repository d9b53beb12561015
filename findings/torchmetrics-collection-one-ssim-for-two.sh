#!/usr/bin/env bash
# torchmetrics 1.9.0: a MetricCollection of SSIM and MS-SSIM gives one number for both if the first batch is of equal pictures.
#
# Guess: each metric of a collection has its own value, whatever the first batch is.
# Behaviour: after the first update, metrics whose states are equal in number are taken for ones that share their states, and
# from then on the first of them alone is updated. Equal pictures have an SSIM and an MS-SSIM of 1. So it goes for one metric
# with two settings, too. With compute_groups=False each has its own.
# Why it matters: an evaluation of edits that starts with the unedited pictures, or a batch that came out unchanged, reports one
# metric under the name of another. In another order of the batches the numbers are others, and right.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "torchmetrics==1.9.0"
cat >probe.py <<'END'
import sys

import torch
import torchmetrics
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure, StructuralSimilarityIndexMeasure

draw = torch.Generator().manual_seed(0)
photo = torch.rand(1, 3, 192, 192, generator=draw)
noisy = (photo + 0.2 * torch.randn(photo.shape, generator=draw)).clamp(0, 1)
ssim, ms_ssim = StructuralSimilarityIndexMeasure, MultiScaleStructuralSimilarityIndexMeasure
orders = {"equal pair first": [photo, noisy], "equal pair last": [noisy, photo]}
values = {}
for order, edits in orders.items():
    both = torchmetrics.MetricCollection({"ssim": ssim(data_range=1.0), "ms": ms_ssim(data_range=1.0)})
    for edit in edits:
        both.update(edit, photo)
    values[order] = {name: value.item() for name, value in both.compute().items()}
seen = {order: abs(value["ssim"] - value["ms"]) < 1e-6 for order, value in values.items()}
recorded = {"equal pair first": True, "equal pair last": False}
print("torchmetrics", torchmetrics.__version__)
print("SSIM and MS-SSIM over two pairs:", {order: {k: round(v, 3) for k, v in value.items()} for order, value in values.items()})
print("are they one number?")
print("guess:", dict.fromkeys(recorded, False))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
