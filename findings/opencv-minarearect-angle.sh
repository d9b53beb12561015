#!/usr/bin/env bash
# OpenCV 4.12.0.88 and 4.14.0.94: minAreaRect gives another angle, and width and height change places.
#
# Guess: since 4.5.1 the angle is in (0, 90], so an upright rectangle has 90, in all later versions.
# Behaviour: 4.11 and 4.12 give 90 and 26.6 degrees for the two rectangles here, 4.14 and 5.0 give -90 and -63.4, the second
# with its sides exchanged. The documentation of 5.0 says [-90, 0).
# Why it matters: rotated boxes are stored as centre, sides and angle. Labels of two versions differ by a quarter turn, which a
# detector of rotated boxes learns as two classes of angle. cv2.boxPoints() of either gives the same corners: store these.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "opencv-python-headless==4.14.0.94" "numpy==2.2.6"
install --no-deps --target old "opencv-python-headless==4.12.0.88"
cat >probe.py <<'END'
import os
import subprocess
import sys

MEASURE = """
import cv2, numpy as np
shapes = ([[0, 0], [10, 0], [10, 4], [0, 4]], [[0, 0], [6, 3], [4, 7], [-2, 4]])
print(cv2.__version__, [tuple(round(v, 1) for v in (*sides, angle)) for _, sides, angle in
      (cv2.minAreaRect(np.array(shape, np.int32)) for shape in shapes)])
"""
new = os.environ
old = {**os.environ, "PYTHONPATH": "old"}
seen = [subprocess.check_output([sys.executable, "-c", MEASURE], env=env, text=True).strip() for env in (old, new)]
recorded = ["4.12.0 [(4.0, 10.0, 90.0), (6.7, 4.5, 26.6)]", "4.14.0 [(4.0, 10.0, -90.0), (4.5, 6.7, -63.4)]"]
print("width, height and angle of two rectangles")
print("guess:", [recorded[0], recorded[0].replace("4.12", "4.14")])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
