#!/usr/bin/env bash
# labelformat 0.1.17: COCO to YOLOv8 keeps COCO's category ids as class numbers, and labelformat cannot read what it wrote.
#
# Guess: ids 1 to n of COCO become classes 0 to n - 1, as YOLO counts them.
# Behaviour: labels hold 1 to n, data.yaml has the names under 1 to n and says nc: n. Class n is one too many for a model of n
# classes. labelformat's own reader of YOLOv8 asks data.yaml for name 0 and ends with a KeyError.
# Why it matters: COCO's ids begin at 1 and have gaps, so most files are hit. A trainer either refuses the last class or learns
# a class that has no name.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "labelformat==0.1.17" "numpy==2.4.6" "pillow==13.0.0"
cat >probe.py <<'END'
import json
import os
import subprocess
import sys
from importlib.metadata import version

from PIL import Image

photo = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}
box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0, "segmentation": []}
with open("coco.json", "w") as file:
    json.dump({"images": [photo], "annotations": [box], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}, file)
convert = ["venv/bin/labelformat", "convert", "--task", "object-detection"]
coco = ["--input-format", "coco", "--input-file", "coco.json"]
yolo = ["--output-format", "yolov8", "--output-file", "yolo/data.yaml", "--output-split", "train"]
subprocess.run([*convert, *coco, *yolo], capture_output=True, check=True)
os.makedirs("yolo/images")
Image.new("RGB", (100, 80)).save("yolo/images/a.jpg")
again = ["--input-format", "yolov8", "--input-file", "yolo/data.yaml", "--input-split", "train"]
back = [*convert, *again, "--output-format", "coco", "--output-file", "back.json"]
said = subprocess.run(back, capture_output=True, text=True).stderr.strip().splitlines()
with open("yolo/data.yaml") as names, open("yolo/labels/a.txt") as labels:
    seen = [names.read().split("path")[0].split(), labels.read().split()[0], said[-1] if said else ""]
recorded = [["names:", "1:", "cat", "2:", "dog", "nc:", "2"], "2", "KeyError: 0"]
print("labelformat", version("labelformat"))
print("guess:", [["names:", "0:", "cat", "1:", "dog", "nc:", "2"], "1", ""])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
