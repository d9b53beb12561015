#!/usr/bin/env bash
# pybboxes 0.2.0: a COCO box converted to YOLO is rounded to whole pixels on the way.
#
# Guess: both formats hold fractions, so (10.4, 20.6, 30.5, 40.5) px of a photo of 640 x 480 becomes 30.5 / 640 wide, and comes
# back unchanged.
# Behaviour: it becomes 30 / 640 wide, and comes back as (10, 21, 30, 40). From YOLO to FiftyOne, two formats of fractions with
# nothing of pixels in them, boxes move likewise. Halves go to the even neighbour. A box of 0.4 px is refused, as none.
# Why it matters: COCO's boxes have two decimals, and YOLO's six. A box of 5 px that moves by half a pixel both ways has an
# IoU of 0.68 with itself.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "pybboxes==0.2.0"
cat >probe.py <<'END'
import sys
from importlib.metadata import version

from pybboxes import convert_bbox

SIZE = (640, 480)
given = (10.4, 20.6, 30.5, 40.5)
yolo = convert_bbox(given, from_type="coco", to_type="yolo", image_size=SIZE)
back = convert_bbox(yolo, from_type="yolo", to_type="coco", image_size=SIZE)
fractions = (0.1, 0.1, 0.05, 0.05)
fiftyone = convert_bbox(fractions, from_type="yolo", to_type="fiftyone", image_size=(130, 130))
seen = [yolo[2] * 640, tuple(back), fiftyone[2] * 130]
recorded = [30.0, (10, 21, 30, 40), 6.0]
print("pybboxes", version("pybboxes"))
print("guess:", [30.5, given, 6.5])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
