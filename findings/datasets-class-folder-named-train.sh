#!/usr/bin/env bash
# datasets 5.2.0: of class folders boat/, bus/ and train/, imagefolder loads train/ alone, without labels and without a word.
#
# Guess: three folders of photos are three classes in one split.
# Behaviour: a folder or file whose name has the word of a split in it makes the split, and all that has no such word is left
# out. The other folders' photos are not there, and `label` is gone, since one class is left.
# Why it matters: train is a class of COCO, Pascal VOC and Open Images. A folder of crops by class, as classifiers and
# personalised diffusion models are trained on, loses all other classes. drop_labels=False does not bring them back;
# data_files={"train": "**"} does.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=os.path.abspath("home"))
import datasets
from PIL import Image

datasets.disable_progress_bars()
for name in ("boat", "bus", "train"):
    Path("photos", name).mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (8, 8), (40 * n, 90, 120)).save(f"photos/{name}/{n}.jpg")
loaded = datasets.load_dataset("imagefolder", data_dir="photos")
seen = {split: (len(part), sorted(part.features)) for split, part in loaded.items()}
recorded = {"train": (3, ["image"])}
print("datasets", datasets.__version__)
print("guess:", {"train": (9, ["image", "label"])})
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
