#!/usr/bin/env bash
# label-studio-sdk 2.1.2: a photo that two people have labelled is two photos in the COCO export, and one of them in VOC and YOLO.
#
# Guess: COCO's `images` lists each file once; the export takes the first person's boxes, or the boxes of both.
# Behaviour: COCO lists the file twice, under two ids, each with the boxes of one person. VOC and YOLO have one file a photo, which
# the last person's boxes overwrite. A photo on which nobody found anything is there without width and height.
# Why it matters: who splits by COCO's image ids gets the same photo into both splits, and each object counts twice.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "label-studio-sdk==2.1.2"
cat >probe.py <<'END'
import json
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

from label_studio_sdk.converter import Converter

CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="dog"/></RectangleLabels></View>"""


def rectangle(x, rotation):
    value = {"x": x, "y": 10, "width": 20, "height": 40, "rotation": rotation, "rectanglelabels": ["dog"]}
    ends = {"id": "r1", "from_name": "label", "to_name": "image", "type": "rectanglelabels"}
    return ends | {"original_width": 400, "original_height": 200, "image_rotation": 0, "value": value}


def annotation(number, rectangles):
    who = {"id": number, "email": f"annotator{number}@example.org"}
    when = "2026-01-01T00:00:00Z"
    about = {"was_cancelled": False, "ground_truth": False, "created_at": when, "updated_at": when, "lead_time": 3.0}
    return {"id": number, "completed_by": who, "result": rectangles} | about


tasks = [
    {"id": 1, "data": {"image": "/data/upload/1/one.jpg"}, "annotations": [annotation(n, [rectangle(9 + n, 0)]) for n in (1, 2)]},
    {"id": 2, "data": {"image": "/data/upload/1/none.jpg"}, "annotations": [annotation(3, [])]},
]
Path("tasks.json").write_text(json.dumps(tasks))
converter = Converter(CONFIG, ".", download_resources=False)
for form in ("COCO", "VOC"):
    converter.convert("tasks.json", form, form, is_dir=False)
coco = json.loads(Path("COCO/result.json").read_text())
photos = [(each["id"], Path(each["file_name"]).name, each["width"]) for each in coco["images"]]
lefts = [box.findtext("xmin") for box in ElementTree.parse("VOC/Annotations/one.xml").iterfind("object/bndbox")]
seen = [photos, [each["image_id"] for each in coco["annotations"]], lefts]
recorded = [[(0, "one.jpg", 400), (1, "one.jpg", 400), (2, "none.jpg", None)], [0, 1], ["44"]]
print("label-studio-sdk", version("label-studio-sdk"))
print("guess:", [[(0, "one.jpg", 400), (1, "none.jpg", 400)], [0, 0], ["40", "44"]])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py 2>probe.log || { cat probe.log >&2; exit 1; }
