#!/usr/bin/env bash
# pillow-jxl-plugin 1.3.8: a JPEG that was opened, drawn upon and saved as .jxl is written without the drawing.
#
# Guess: what is saved is what the picture in memory shows, as with every other format of Pillow.
# Behaviour: by default (lossless_jpeg) the plugin writes the bytes of the file that was opened, whatever was done to the
# picture in place: drawing, pasting, thumbnail(). quality is not used either. It warns of the default, not of the loss. New
# pictures, as of resize() or convert(), are saved as they are; lossless_jpeg=False saves all.
# Why it matters: whoever blacks out faces or number plates, or shrinks photos, before a data set is published, publishes the
# originals.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "pillow-jxl-plugin==1.3.8" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import sys
import warnings
from importlib.metadata import version

import pillow_jxl  # noqa: F401
from PIL import Image, ImageDraw

warnings.simplefilter("ignore")
Image.new("RGB", (64, 48), (200, 30, 30)).save("photo.jpg", quality=95)
photo = Image.open("photo.jpg")
ImageDraw.Draw(photo).rectangle((0, 0, 63, 47), fill=(0, 0, 0))
photo.save("drawn.jxl")
photo.save("drawn_as_pixels.jxl", lossless_jpeg=False)
small = Image.open("photo.jpg")
small.thumbnail((16, 16))
small.save("small.jxl")


def reddest(path):
    return max(pixel[0] for pixel in Image.open(path).convert("RGB").get_flattened_data())


seen = [reddest("drawn.jxl") > 150, reddest("drawn_as_pixels.jxl") > 150, Image.open("small.jxl").size]
recorded = [True, False, (64, 48)]
print("pillow-jxl-plugin", version("pillow-jxl-plugin"))
print("is red under the drawing; so with lossless_jpeg=False; size after thumbnail()")
print("guess:", [False, False, (16, 12)])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
