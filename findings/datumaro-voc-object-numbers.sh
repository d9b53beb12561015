#!/usr/bin/env bash
# datumaro 1.13.12: in a VOC export, the numbers of objects in SegmentationObject are not their places in the XML.
#
# Guess: SegmentationObject/*.png are palette PNGs as Pascal's own: pixel value n is the n-th object of the photo's XML.
# Behaviour: the PNGs are RGB, with Pascal's colours, and only objects with a mask are counted. If an object with a box alone stands
# first in the XML, value 1 is the second object. (In Pascal's data every object of a segmented photo is in the PNG.)
# Why it matters: who pairs masks and objects by number, as with Pascal's files, gives a cat's pixels to the wrong box without a
# word; and who reads the PNG as numbers gets an array of three dimensions.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "datumaro==1.13.12" "numpy==2.2.6" "pillow==12.3.0" "opencv-python-headless==4.12.0.88" "pandas==2.3.3" "pyarrow==25.0.1"
cat >probe.py <<'END'
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datumaro.components.annotation import Bbox, Mask
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image as Media
from PIL import Image


def rectangle(left, top, right, bottom):
    pixels = np.zeros((40, 60), bool)
    pixels[top:bottom, left:right] = True
    return pixels


box_alone = [Bbox(0, 30, 8, 8, label=0, id=1, group=1)]
cat = [Bbox(5, 5, 10, 20, label=0, id=2, group=2), Mask(rectangle(5, 5, 15, 25), label=0, id=3, group=2)]
dog = [Bbox(30, 10, 20, 15, label=1, id=4, group=3), Mask(rectangle(30, 10, 50, 25), label=1, id=5, group=3)]
photo = Media.from_numpy(data=np.full((40, 60, 3), 128, np.uint8))
item = DatasetItem("a", subset="train", media=photo, annotations=[*box_alone, *cat, *dog])
Dataset.from_iterable([item], categories=["cat", "dog"]).export("out", "voc", save_media=True)

lefts = [float(text) for text in re.findall(r"<xmin>([\d.]+)</xmin>", Path("out/Annotations/a.xml").read_text())]
picture = Image.open("out/SegmentationObject/a.png")
# Pascal's palette: 1 is dark red, 2 dark green, 3 dark yellow.
numbers = {(128, 0, 0): 1, (0, 128, 0): 2, (128, 128, 0): 3}
pixels = picture.convert("RGB")
seen = [picture.mode, lefts, numbers.get(pixels.getpixel((10, 10))), numbers.get(pixels.getpixel((40, 15)))]
recorded = ["RGB", [0.0, 5.0, 30.0], 1, 2]
print("datumaro", version("datumaro"))
print("guess:", ["P", [0.0, 5.0, 30.0], 2, 3], "(mode of the PNG, left edges in the XML, number at the second object, at the third)")
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
