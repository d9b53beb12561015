#!/usr/bin/env bash
# sahi 0.12.8: slice_coco turns a photo as its EXIF says and leaves its boxes where they were.
#
# Guess: COCO gives `width` and `height` of the photo as it is stored, 500 x 300, so it is cut in that frame, and each box lies on
# its object.
# Behaviour: the photo is turned to 300 x 500 first, the boxes are not. The slice that is said to hold the object is black; the
# object is in another one, which is said to hold none. Nothing is reported.
# Why it matters: phones write upright photos so. COCO's own photos have no such tag, those that people label themselves often do.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "sahi==0.12.8" "pillow==13.0.0"
cat >probe.py <<'END'
import json
import os
import sys
from importlib.metadata import version

import numpy as np
from PIL import Image
from sahi.slicing import slice_coco

os.makedirs("photos")
photo = np.zeros((300, 500, 3), np.uint8)
photo[40:80, 20:90] = 255  # The object.
turned = Image.Exif()
turned[0x0112] = 6
Image.fromarray(photo).save("photos/plain.jpg", quality=95)
Image.fromarray(photo).save("photos/turned.jpg", quality=95, exif=turned)
photos = [{"id": number, "file_name": name, "width": 500, "height": 300} for number, name in enumerate(("plain.jpg", "turned.jpg"), 1)]
boxes = [
    {"id": number, "image_id": number, "category_id": 1, "bbox": [20, 40, 70, 40], "area": 2800, "iscrowd": 0, "segmentation": []}
    for number in (1, 2)
]
with open("coco.json", "w") as file:
    json.dump({"images": photos, "annotations": boxes, "categories": [{"id": 1, "name": "bar"}]}, file)
cut = {"slice_height": 200, "slice_width": 200, "overlap_height_ratio": 0.1, "overlap_width_ratio": 0.1, "verbose": False}
coco, _ = slice_coco("coco.json", "photos", "sliced", output_dir="slices", ignore_negative_samples=True, **cut)
names = {each["id"]: each["file_name"] for each in coco["images"]}
seen = []
for box in coco["annotations"]:
    left, top, width, height = map(int, box["bbox"])
    picture = np.asarray(Image.open(f"slices/{names[box['image_id']]}").convert("L"))
    bright = picture[top : top + height, left : left + width].mean() > 200
    seen.append((names[box["image_id"]].split("_")[0], "the object" if bright else "nothing"))
recorded = [("plain", "the object"), ("turned", "nothing")]
print("sahi", version("sahi"))
print("guess: inside the boxes", [("plain", "the object"), ("turned", "the object")])
print("seen:  inside the boxes", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
