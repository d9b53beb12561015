#!/usr/bin/env bash
# globox 2.4.1: COCO boxes of crowds come back from it as boxes of single objects, and annotations count from 0.
#
# Guess: a COCO file that is read and written as COCO keeps `iscrowd`, `area` and the annotations' ids, as it keeps the ids of
# photos and categories.
# Behaviour: `iscrowd` is 0 for every box, `area` is the box's, ids begin at 0. As Open Images it writes the photo's file name,
# with its ending, as ImageID, and nothing in the columns of the flags.
# Why it matters: a crowd is no object to train on, and a detection in it no error; read so, it is both. With pycocotools, what is
# matched to the annotation of id 0 counts as unmatched (pycocotools-annotation-id-0.sh).
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "globox==2.4.1" "numpy==1.24.2" "pillow==13.0.0"
cat >probe.py <<'END'
import csv
import json
import sys
from importlib.metadata import version
from pathlib import Path

from globox import AnnotationSet

photo = {"id": 7, "file_name": "a.jpg", "width": 640, "height": 480}
outline = [[10, 20, 40, 20, 40, 60, 10, 60]]
one = {"id": 100, "image_id": 7, "category_id": 17, "bbox": [10, 20, 30, 40], "area": 900, "iscrowd": 0, "segmentation": outline}
filled = {"counts": [0, 640 * 480], "size": [480, 640]}
crowd = {"id": 101, "image_id": 7, "category_id": 17, "bbox": [0, 0, 640, 480], "area": 307200, "iscrowd": 1, "segmentation": filled}
coco = {"images": [photo], "categories": [{"id": 17, "name": "dog"}], "annotations": [one, crowd]}
Path("given.json").write_text(json.dumps(coco))
boxes = AnnotationSet.from_coco(file_path=Path("given.json"))
boxes.save_coco(Path("back.json"))
boxes.save_openimage(Path("boxes.csv"))
written = json.loads(Path("back.json").read_text())["annotations"]
row = next(csv.DictReader(Path("boxes.csv").open()))
seen = [[(each["id"], each["iscrowd"], each["area"]) for each in written], row["ImageID"], row["IsGroupOf"]]
recorded = [[(0, 0, 1200.0), (1, 0, 307200.0)], "a.jpg", ""]
print("globox", version("globox"))
print("guess:", [[(100, 0, 900), (101, 1, 307200)], "a", "0"])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
