#!/usr/bin/env bash
# imagecodecs 2026.3.6: jpeg_decode(data, outcolorspace="RGB") of a CMYK JPEG gives an empty array, without an error.
#
# Guess: RGB of height x width x 3, within 15 levels of what Pillow, OpenCV and simplejpeg make of it.
# Behaviour: the shape is (0, 0). Without outcolorspace the four inks are decoded.
# Why it matters: photos for print are CMYK, and data sets of web photos hold some. An empty array passes through many loaders
# and fails far from here, or has a mean and a size of nothing in a data set's statistics.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "imagecodecs==2026.3.6" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import io
import sys

import imagecodecs
from PIL import Image

file = io.BytesIO()
Image.new("CMYK", (32, 24), (0, 200, 200, 30)).save(file, "JPEG", quality=95)
data = file.getvalue()
seen = [imagecodecs.jpeg_decode(data, outcolorspace="RGB").shape, imagecodecs.jpeg_decode(data).shape]
recorded = [(0, 0), (24, 32, 4)]
print("imagecodecs", imagecodecs.__version__)
print("guess:", [(24, 32, 3), (24, 32, 4)])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
