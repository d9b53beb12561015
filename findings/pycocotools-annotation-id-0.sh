#!/usr/bin/env bash
# pycocotools 2.0.11 and faster-coco-eval 1.8.0: detections that are all right have an AP of 0.25 where annotations count from 0.
#
# Guess: AP is 1; an id is a name, and 0 is one as good as another.
# Behaviour: a detection is marked with the id of the annotation that it met, and the mark 0 reads as "met none". So the best
# hit of all can be a false alarm, and its object a missed one. faster-coco-eval gives the same number, with a warning.
# Why it matters: a script that numbers annotations by enumerate() starts at 0, and pycocotools says nothing. In a small test
# set, or a class of few objects, the score sinks far; in a large one by a little that nobody looks for.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "numpy==2.4.6" "pycocotools==2.0.11" "faster-coco-eval==1.8.0"
cat >probe.py <<'END'
import contextlib
import io
import sys
import warnings
from importlib.metadata import version

import faster_coco_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

boxes = [[10, 10, 20, 20], [50, 10, 20, 20]]


def precision(start, read, evaluate):
    """AP of detections that are the annotations, which are numbered from `start`."""
    one = {"image_id": 1, "category_id": 1}
    truth = read()
    truth.dataset = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "boat"}],
        "annotations": [{**one, "id": start + i, "bbox": box, "area": 400, "iscrowd": 0} for i, box in enumerate(boxes)],
    }
    truth.createIndex()
    found = truth.loadRes([{**one, "bbox": box, "score": 0.9 - 0.1 * i} for i, box in enumerate(boxes)])
    run = evaluate(truth, found, "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return round(float(run.stats[0]), 2)


tools = {"pycocotools": (COCO, COCOeval), "faster-coco-eval": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)}
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
    seen = {name: [precision(start, *tool) for start in (1, 0)] for name, tool in tools.items()}
recorded = {"pycocotools": [1.0, 0.25], "faster-coco-eval": [1.0, 0.25]}
print(*(f"{name} {version(name)}" for name in tools))
print("AP with ids from 1, with ids from 0")
print("guess:", dict.fromkeys(tools, [1.0, 1.0]))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
