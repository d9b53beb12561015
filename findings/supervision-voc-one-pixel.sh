#!/usr/bin/env bash
# supervision 0.31.2 and 0.30.9: a VOC file of the older version, read by the newer, has boxes that are 1 px too wide and too
# high.
#
# Guess: supervision takes 1 from all four edges when it reads, so what it wrote earlier comes back as it was.
# Behaviour: 0.30.9 adds 1 to all four edges when it writes and takes 1 from all four when it reads. 0.31.2 adds and takes 1 at
# the left and top edges only. Each reads its own files, and nothing in a file says which of the two wrote it.
# Why it matters: a box of the whole photo ends beyond the photo, and boxes of two batches of one data set differ by a pixel.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "supervision==0.31.2" "opencv-python-headless==5.0.0.93" "numpy==2.4.6"
install --no-deps --target old "supervision==0.30.9"
cat >probe.py <<'END'
import os
import subprocess
import sys

import cv2
import numpy as np
import supervision as sv

WRITE = """
import numpy as np, supervision as sv
found = sv.Detections(xyxy=np.array([[10.0, 10.0, 20.0, 20.0], [0.0, 0.0, 640.0, 480.0]]), class_id=np.array([0, 0]))
data = sv.DetectionDataset(classes=["cat"], images=["photos/a.png"], annotations={"photos/a.png": found})
data.as_pascal_voc(annotations_directory_path="xml")
print(sv.__version__)
"""
os.mkdir("photos")
cv2.imwrite("photos/a.png", np.zeros((480, 640, 3), np.uint8))
old = {**os.environ, "PYTHONPATH": "old"}
older = subprocess.run([sys.executable, "-c", WRITE], env=old, capture_output=True, text=True, check=True)
read = sv.DetectionDataset.from_pascal_voc(images_directory_path="photos", annotations_directory_path="xml")
seen = [older.stdout.strip(), sv.__version__, next(iter(read.annotations.values())).xyxy.tolist()]
recorded = ["0.30.9", "0.31.2", [[10.0, 10.0, 21.0, 21.0], [0.0, 0.0, 641.0, 481.0]]]
print("guess:", [[10.0, 10.0, 20.0, 20.0], [0.0, 0.0, 640.0, 480.0]])
print("seen: ", *seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
