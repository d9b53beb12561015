#!/usr/bin/env bash
# torch-fidelity 0.4.0, pytorch-fid 0.3.0 and clean-fid 0.1.35 each take other pictures of one folder.
#
# Guess: the three take the same files, all pictures that are not hidden.
# Behaviour: torch-fidelity leaves out WebP and TIFF; pytorch-fid leaves out every suffix with a capital, on Linux;
# clean-fid takes .JPG, .JPEG and .PNG but not .Jpeg, .WEBP or .TIF, and looks into folders, which the others do not. The first
# two take hidden files. None names what it leaves out.
# Why it matters: cameras write IMG_0001.JPG. FID, KID and the rest are then of a part of the set, and differ between tools for
# a cause that is looked for in weights and resizing. A folder of originals beside the results counts as results in one.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "torchvision==0.28.0" "numpy==2.4.6" "pillow==13.0.0" "scipy==1.17.1" \
    "torch-fidelity==0.4.0" "pytorch-fid==0.3.0" "clean-fid==0.1.35"
cat >probe.py <<'END'
import contextlib
import io
import os
import subprocess
import sys
from importlib.metadata import version

import torch
from PIL import Image

if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    # A torchvision for CUDA beside a torch for CPU: it wants operators that nothing here calls.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from cleanfid import fid as clean_fid
from pytorch_fid import fid_score
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.utils import glob_samples_paths as listed

# Each picture is of one grey, by which it is known again: a "model" that notes the greys it is shown stands for Inception.
# torch-fidelity has a listing of its own, which is asked with its defaults.
names = ["a.jpg", "b.JPG", "c.Jpeg", "d.png", "e.PNG", "f.webp", "g.WEBP", "h.tif", "i.TIF", "old/j.png", ".k.png"]
os.makedirs("photos/old")
for grey, name in enumerate(names):
    Image.new("RGB", (32, 32), (20 * grey,) * 3).save(f"photos/{name}", quality=95)
usual = [DEFAULTS[key] for key in ("samples_find_deep", "samples_find_ext")]
shown = set()


def note(pictures, top):
    means = pictures.float().mean((2, 3))
    shown.update(names[round(mean * 255 / top / 20)] for mean in means[:, 0].tolist())
    return means


class Model(torch.nn.Module):
    def forward(self, pictures):
        return [note(pictures, 1)[..., None, None]]


tools = {
    "torch-fidelity": lambda: shown.update(os.path.relpath(path, os.path.realpath("photos")) for path in listed("photos", *usual)),
    "pytorch-fid": lambda: fid_score.compute_statistics_of_path("photos", Model(), 50, 3, "cpu", 0),
    "clean-fid": lambda: clean_fid.get_folder_features("photos", lambda batch: note(batch, 255), 0, device=torch.device("cpu")),
}
seen = {}
for name, read in tools.items():
    shown.clear()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        read()
    seen[name] = " ".join(one for one in names if one in shown)
recorded = {
    "torch-fidelity": "a.jpg b.JPG c.Jpeg d.png e.PNG .k.png",
    "pytorch-fid": "a.jpg d.png f.webp h.tif .k.png",
    "clean-fid": "a.jpg b.JPG d.png e.PNG f.webp h.tif old/j.png",
}
print(*(f"{name} {version(name)}" for name in tools))
print("guess:", dict.fromkeys(tools, " ".join(names[:10])))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
