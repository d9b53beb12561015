#!/usr/bin/env bash
# Pillow 13.0.0 and OpenCV 5.0.0.93: a JPEG that has its orientation in XMP alone is turned by Pillow and not by OpenCV.
#
# Guess: nobody turns it; ImageOps.exif_transpose goes by EXIF, as its name says.
# Behaviour: where there is no EXIF orientation, Pillow's getexif() takes the one of XMP, so exif_transpose turns the photo.
# OpenCV and libvips do not.
# Why it matters: boxes that a detector found in a photo read with OpenCV lie elsewhere in a loader that reads with Pillow.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "opencv-python-headless==5.0.0.93" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import sys

import cv2
import PIL
from PIL import Image, ImageOps

xmp = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:tiff="http://ns.adobe.com/tiff/1.0/">
<rdf:Description rdf:about="" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
Image.new("RGB", (40, 30), (200, 30, 30)).save("photo.jpg", xmp=xmp)
height, width = cv2.imread("photo.jpg").shape[:2]
seen = [ImageOps.exif_transpose(Image.open("photo.jpg")).size, (width, height)]
recorded = [(30, 40), (40, 30)]
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__)
print("width and height by Pillow's exif_transpose, by OpenCV's imread")
print("guess:", [(40, 30), (40, 30)])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
