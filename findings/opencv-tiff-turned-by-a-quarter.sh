#!/usr/bin/env bash
# OpenCV 5.0.0.93: imread gives None for a TIFF whose Orientation tag turns it by a quarter; imdecode of the same bytes reads
# it.
#
# Guess: with IMREAD_UNCHANGED, which ignores the orientation, the pixels come as they are stored.
# Behaviour: imread gives None whatever the flags, where the sides differ in length: IMREAD_UNCHANGED,
# IMREAD_IGNORE_ORIENTATION, IMREAD_COLOR. A square one is read. imdecode reads it, and turns it even where it is told to ignore
# the orientation. 4.11 to 4.14 do the same.
# Why it matters: upright photos and scans as TIFF are lost to every loader that is built upon cv2.imread, most of which skip
# what gives None. And where imdecode reads it, boxes that were drawn on the stored pixels lie elsewhere.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "opencv-python-headless==5.0.0.93" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import sys

import cv2
import numpy as np
from PIL import Image

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
exif = Image.Exif()
exif[0x0112] = 6
Image.new("RGB", (40, 30), (200, 30, 30)).save("photo.tif", exif=exif)
Image.new("RGB", (40, 40), (200, 30, 30)).save("square.tif", exif=exif)
data = np.fromfile("photo.tif", np.uint8)


def shape(picture):
    return None if picture is None else picture.shape[:2]


flags = (cv2.IMREAD_UNCHANGED, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, cv2.IMREAD_COLOR)
seen = [[shape(cv2.imread("photo.tif", flag)) for flag in flags], [shape(cv2.imdecode(data, flag)) for flag in flags[1:]]]
seen.append(shape(cv2.imread("square.tif", cv2.IMREAD_UNCHANGED)))
recorded = [[None, None, None], [(40, 30), (40, 30)], (40, 40)]
print("OpenCV", cv2.__version__)
print("imread: unchanged, ignoring orientation, plain; imdecode: ignoring, plain; imread of a square one")
print("guess:", [[(30, 40), (30, 40), (40, 30)], [(30, 40), (40, 30)], (40, 40)])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
