#!/usr/bin/env bash
# img2dataset 1.47.0: photos that were taken upright with a phone are stored lying on their side, and nothing turns them back.
#
# Guess: a photo of EXIF orientation 6 is stored as viewers show it.
# Behaviour: the pixels are resized as they are stored, and written as a JPEG without EXIF. The tag stands in the metadata's
# JSON alone.
# Why it matters: a model learns people and houses that lie on their side from every such photo, with captions that do not say
# so, and width and height, which buckets of aspect ratio go by, are exchanged.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "img2dataset==1.47.0" "numpy==2.4.6" "pillow==13.0.0"
cat >probe.py <<'END'
import functools
import http.server
import json
import sys
import threading
from importlib.metadata import version

from PIL import Image


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


if __name__ == "__main__":
    from img2dataset import download

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 300), (200, 30, 30)).save("photo.jpg", exif=exif)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory="."))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open("urls.txt", "w") as file:
        file.write(f"http://127.0.0.1:{server.server_port}/photo.jpg\n")
    few = {"processes_count": 1, "thread_count": 1, "enable_wandb": False, "output_format": "files", "input_format": "txt"}
    download(url_list="urls.txt", output_folder="out", image_size=200, resize_mode="keep_ratio", **few)
    stored = Image.open("out/00000/000000000.jpg")
    with open("out/00000/000000000.json") as file:
        seen = [stored.size, stored.getexif().get(0x0112), json.loads(json.load(file)["exif"])]
    recorded = [(267, 200), None, {"Image Orientation": "Rotated 90 CW"}]
    print("img2dataset", version("img2dataset"))
    print("width and height as stored, orientation in the file, in its metadata")
    print("guess:", [(200, 267), None, recorded[2]])
    print("seen: ", seen)
    sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
