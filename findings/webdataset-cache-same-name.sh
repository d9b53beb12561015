#!/usr/bin/env bash
# webdataset 1.0.2: with cache_dir, shards of one name in two folders are one file: val/000000.tar gives the samples of
# train/000000.tar.
#
# Guess: the cache keeps the shards of two URLs apart.
# Behaviour: a shard is cached under the last part of its URL. The second URL finds the first one's file there and reads that.
# See https://github.com/webdataset/webdataset/issues/471: url_to_name of FileCache can give other names.
# Why it matters: nearly all tools number shards from 000000.tar, and data sets have a folder for each split. A model is then
# validated on its own training samples, and its loss looks the better for it.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "webdataset==1.0.2" "numpy==2.4.6"
cat >probe.py <<'END'
import functools
import http.server
import os
import sys
import threading
import warnings
from importlib.metadata import version

import webdataset

warnings.simplefilter("ignore")
for split in ("train", "val"):
    os.makedirs(f"served/{split}")
    with webdataset.TarWriter(f"served/{split}/000000.tar") as shard:
        shard.write({"__key__": "0", "txt": f"a sample of {split}"})


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory="served"))
threading.Thread(target=server.serve_forever, daemon=True).start()
os.mkdir("cache")
seen = []
for split in ("train", "val"):
    url = f"http://127.0.0.1:{server.server_port}/{split}/000000.tar"
    seen += [sample["txt"].decode() for sample in webdataset.WebDataset(url, cache_dir="cache", shardshuffle=False)]
recorded = ["a sample of train", "a sample of train"]
print("webdataset", version("webdataset"))
print("guess:", ["a sample of train", "a sample of val"])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
