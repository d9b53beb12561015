#!/usr/bin/env bash
# pylabel 0.1.55: ExportToCoco gives a photo without boxes the annotation of the photo before it.
#
# Guess: photos without boxes are dropped when COCO is read, and all other boxes are written as they were.
# Behaviour: it is kept, and the annotation that was written before it is written once more, with the same id and the same
# image_id.
# Why it matters: one box counts twice, ids of annotations are no longer unique, and the photos without boxes, which a detector
# needs as negative examples, are what brings it about. A data set in which all photos have boxes shows nothing of it.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "pylabel==0.1.55" "pandas==2.3.3" "numpy==2.2.6"
cat >probe.py <<'END'
import json
import sys
from importlib.metadata import version

from pylabel import importer

photos = [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n in (1, 2, 3)]
boxes = [
    {"id": n, "image_id": photo, "category_id": 1, "bbox": [10, 10, 5 * n, 20], "area": 100 * n, "iscrowd": 0, "segmentation": []}
    for n, photo in ((1, 1), (2, 3))
]
data = {"images": photos, "annotations": boxes, "categories": [{"id": 1, "name": "cat", "supercategory": ""}]}
with open("given.json", "w") as file:
    json.dump(data, file)
importer.ImportCoco("given.json").export.ExportToCoco("written.json", cat_id_index=1)
with open("written.json") as file:
    seen = [(item["image_id"], item["bbox"]) for item in json.load(file)["annotations"]]
recorded = [(1, [10.0, 10.0, 5.0, 20.0]), (1, [10.0, 10.0, 5.0, 20.0]), (3, [10.0, 10.0, 10.0, 20.0])]
print("pylabel", version("pylabel"))
print("guess:", [(box["image_id"], box["bbox"]) for box in boxes])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
