#!/usr/bin/env bash
# open_clip_torch 3.3.0 and transformers 5.24.0: of the same photo of 640 x 427, CLIP is shown pictures that lie 1 px apart.
#
# Guess: both give the same 224 x 224, up to rounding.
# Behaviour: both resize to 335 x 224. Of the 111 columns too many, open_clip cuts 56 at the left, rounding half to even, and
# transformers' CLIPImageProcessor 55, rounding down. They differ where the columns too many are 3 above a multiple of 4.
# Why it matters: COCO has many photos of 640 x 427. Embeddings stored with one and compared with the other's, or CLIP scores
# of the two, are of shifted pictures, at edges nearly as far apart as black and white.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "torchvision==0.28.0" "numpy==2.4.6" "pillow==13.0.0" "open_clip_torch==3.3.0" "transformers==5.24.0"
cat >probe.py <<'END'
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image

if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    # A torchvision for CUDA beside a torch for CPU: it wants operators that nothing here calls.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from open_clip.transform import image_transform
from transformers import CLIPImageProcessor


def difference(width, height):
    """Largest difference between the two pictures of a coarse pattern, and what is left of it after a shift by 1 px."""
    photo = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    photo = Image.fromarray(photo.repeat(8, 0).repeat(8, 1)[:height, :width])
    one = image_transform(224, is_train=False)(photo)
    other = CLIPImageProcessor()(photo, return_tensors="pt")["pixel_values"][0]
    return (one - other).abs().max().item(), (one[:, :, :-1] - other[:, :, 1:]).abs().max().item()


seen = {}
for shape in ((640, 427), (640, 431)):
    here, shifted = difference(*shape)
    print(shape, f"largest difference {here:.3f}, after a shift by 1 px {shifted:.3f}")
    seen[shape] = "same" if here < 0.1 else "1 px apart" if shifted < 0.1 else "other"
recorded = {(640, 427): "1 px apart", (640, 431): "same"}
print("open_clip", version("open_clip_torch"), "transformers", version("transformers"))
print("guess:", dict.fromkeys(recorded, "same"))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
