#!/usr/bin/env bash
# scikit-image 0.26.0: one NaN in a picture makes NaN of the whole SSIM map to the right of it and below.
#
# Guess: in the map of structural_similarity(..., full=True), the 7 x 7 windows that hold the NaN are NaN, 49 pixels.
# Behaviour: the windows' means are running sums along rows, then along columns, and a NaN that came into a sum never leaves it.
# With gaussian_weights=True each window is added up by itself, and the NaN stays in the 11 x 11 that hold it.
# Why it matters: SSIM outside of an edited box is got by setting the box to NaN and taking nanmean of the map. It gives a
# number, of the strips above the box and left of it alone.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "numpy==2.4.6" "scipy==1.17.1" "scikit-image==0.26.0"
cat >probe.py <<'END'
import sys
from importlib.metadata import version

import numpy as np
from skimage.metrics import structural_similarity

photo = np.random.default_rng(0).random((60, 60))
holed = photo.copy()
holed[10, 10] = np.nan
kinds = {"default": {}, "gaussian": {"gaussian_weights": True, "use_sample_covariance": False}}
seen = {}
for name, options in kinds.items():
    _, ssim = structural_similarity(photo, holed, data_range=1.0, full=True, **options)
    seen[name] = int(np.isnan(ssim).sum())
recorded = {"default": 53 * 53, "gaussian": 11 * 11}
print("scikit-image", version("scikit-image"), "scipy", version("scipy"))
print("pixels of 3600 that are NaN in the map, for one NaN in the picture")
print("guess:", {"default": 7 * 7})
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
