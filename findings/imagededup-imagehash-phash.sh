#!/usr/bin/env bash
# imagededup 0.3.3.post2 and imagehash 4.3.2: no photo has the same perceptual hash in both.
#
# Guess: both make 64 bits of the 8 x 8 lowest frequencies of a photo at 32 x 32 px by their median, so a photo's hashes are one.
# Behaviour: imagehash sets the bits above the median of all 64, which are 32. imagededup leaves the first, the mean, out of the
# median and sets those that reach it, which are 33. So they differ in one bit at least; of smooth photos it mostly is one.
# Why it matters: a list of known photos that one of them made finds nothing with the other at a distance of 0, and is one
# nearer to its limit at any other.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "imagededup==0.3.3.post2" "imagehash==4.3.2" "torch==2.14.1" "torchvision==0.29.1"
cat >probe.py <<'END'
import sys
from importlib.metadata import version

import imagehash
import numpy as np
from imagededup.methods import PHash
from PIL import Image, ImageFilter

random, method = np.random.default_rng(0), PHash(verbose=False)
ours, distances = set(), []
for _ in range(20):
    noise = Image.fromarray(random.integers(0, 256, (320, 320, 3), np.uint8))
    picture = noise.filter(ImageFilter.GaussianBlur(12)).crop((32, 32, 288, 288))
    one, other = int(str(imagehash.phash(picture)), 16), int(method.encode_image(image_array=np.asarray(picture)), 16)
    ours.add((one.bit_count(), other.bit_count()))
    distances.append((one ^ other).bit_count())
seen = [sorted(ours), min(distances)]
recorded = [[(32, 33)], 1]
print("imagededup", version("imagededup"), "imagehash", version("imagehash"))
print("guess: bits that are set, and the least distance:", [[(32, 32)], 0])
print("seen: ", seen, "distances", distances)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
